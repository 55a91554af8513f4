"""The two roles and the model that plays each: the ONE table of what differs between draft and
target.

    for role in ROLES.values():                          # the draft first, then the target
        role.check(name, questions, view, max_new_tokens)
    model = DRAFT.load(folder, runtime)                  # a vlm.contract.VisionLanguageModel
    pixels = model.prepare(DRAFT.pictures(sample, view))

Which file of vlm/ plays a role is decided by the model's config.json: EventGPT and Video-LLaVA have
files of their own, all others go through vlm/any_model.py. A model with a fast path of its own is a
file in vlm/ (load, check, revision and a class that satisfies vlm/contract.py) and an entry in OWN.
Imports no torch: a model's own file is imported when it is needed.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from base import UserError

if TYPE_CHECKING:
    import numpy as np

    from clips.dataset import Sample
    from machine.device import Runtime
    from vlm.contract import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class View:
    """How much of a clip the models are shown."""

    num_frames: int = 8  # video frames, for a model that reads videos
    event_images: Literal["first", "all"] = "first"  # event pictures, for a model that reads events
    draft_sees: Literal["events", "frames"] = "events"       # which of both the draft model reads


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Which pictures of a clip a model reads."""

    # RGB (H, W, 3) uint8, oldest first; or a MediaError
    read: Callable[[Sample, View], list[np.ndarray]]
    # the files that they come from; None: a row names none
    files: Callable[[Sample, View], list[Path | None]]
    most: Callable[[list[Sample], View], int]  # the most pictures of any of these samples


@dataclasses.dataclass(frozen=True)
class Role:
    """One role: the names in flags and files, and the model that plays it."""

    role: Literal["draft", "target"]      # the name in code and logs, and in Pairs
    name: str  # of the model in JSON: models.eventgpt, failed[].model, eventgpt_success
    row: str  # begins the keys of a pair row: egpt_tokens, egpt_text, egpt_finished
    title: str                            # the model's name in sentences and reports
    flag: str                             # --flag that names the folder (or hub id)
    module: str  # of the model that the role was made for; see module_of
    sees: Callable[[View], Pictures]

    def _module(self, name: str | Path) -> types.ModuleType:
        """Holds load(name, runtime), check(...) and revision(name) of this model."""
        return importlib.import_module(module_of(name) or self.module)

    def key(self, field: Literal["tokens", "text", "finished"]) -> str:
        """The key of a pair row that holds this field of the model's answer."""
        return f"{self.row}_{field}"

    def load(self, name: str | Path, runtime: Runtime) -> VisionLanguageModel:
        """The model of this folder or hub id, ready to answer; raises UserError (see
        vlm/contract.py).
        """
        return self._module(name).load(name, runtime)

    def check(
        self, name: str | Path, questions: list[str], view: View, max_new_tokens: int
    ) -> None:
        """Raise UserError for everything that would end the model's run and can be known without
        its weights.

        Missing folder, shards or tokenizer files, half a download, a checkpoint that is quantised
        already, special marks in a question, a prompt and answer longer than the model's positions.
        Takes about a second.
        """
        module = self._module(name)
        if module.__name__ == ANY:
            module.check(name, questions, self.most_pictures([], view), max_new_tokens)
            return
        if self.role == "target" and module.__name__ == OWN["eventgpt"]:
            raise UserError(f"--{self.flag} {name} is an EventGPT, which reads event pictures and no "
                            "video: wanted a model that reads videos or several pictures")
        module.check(name, questions, view, max_new_tokens)

    def revision(self, name: str | Path) -> str:
        """What tells these weights from others, as the loaded model records it; see
        vlm.contract.same_weights.
        """
        return self._module(name).revision(name)

    def pictures(self, sample: Sample, view: View) -> list[np.ndarray]:
        """What the model sees of a sample: RGB pictures (H, W, 3) uint8, oldest first; raises
        MediaError.
        """
        return self.sees(view).read(sample, view)

    def files(self, sample: Sample, view: View) -> list[Path | None]:
        """The files that the pictures come from; [None] where the data set names none."""
        return self.sees(view).files(sample, view)

    def most_pictures(self, samples: list[Sample], view: View) -> int:
        """The most pictures that the model sees of any of these samples."""
        return self.sees(view).most(samples, view)


# ------------------------------------------------------------------------------- what a model reads
RAW_EVENT_PICTURES = 5           # drawn from the raw events of a clip that has no event pictures


def _event_pictures(sample: Sample, view: View) -> list[np.ndarray]:
    from clips.dataset import draft_pictures

    return draft_pictures(sample, view.event_images)


def _event_files(sample: Sample, view: View) -> list[Path | None]:
    pictures = sample.event_images[:1] if view.event_images == "first" else sample.event_images
    return list(pictures) or [sample.events]


def most_event_pictures(samples: list[Sample], view: View) -> int:
    """RAW_EVENT_PICTURES where no sample is known."""
    if view.event_images == "first":
        return 1
    return max(
        (len(sample.event_images) or RAW_EVENT_PICTURES for sample in samples),
        default=RAW_EVENT_PICTURES,
    )


def _video_frames(sample: Sample, view: View) -> list[np.ndarray]:
    from clips.dataset import target_pictures

    return target_pictures(sample, view.num_frames)


EVENTS = Pictures(_event_pictures, _event_files, most_event_pictures)
VIDEO = Pictures(
    _video_frames, lambda sample, view: [sample.video], lambda samples, view: view.num_frames
)


def _of_draft(view: View) -> Pictures:
    return VIDEO if view.draft_sees == "frames" else EVENTS


def _of_target(view: View) -> Pictures:
    return VIDEO


# ------------------------------------------------------------------------- which file runs a model
OWN = {"video_llava": "vlm.video_llava", "eventgpt": "vlm.eventgpt"}
ANY = "vlm.any_model"
EVENTGPT_KEYS = {"mm_visual_tower", "event_feature_adaptor"}     # of its config.json


def module_of(name: str | Path) -> str | None:
    """The module that runs the model of this folder or hub id, by its config.json; None without."""
    from vlm.checkpoints import open_checkpoint, read_model_config

    if not Path(name).is_dir():
        config = open_checkpoint(name).config
    elif not (Path(name) / "config.json").is_file():
        return None
    else:
        config = read_model_config(Path(name))
    kind = "eventgpt" if config.keys() >= EVENTGPT_KEYS else config.get("model_type")
    return OWN.get(str(kind), ANY)


# ---------------------------------------------------------------------------------------- the table
DRAFT = Role("draft", "eventgpt", "egpt", "EventGPT", "draft_model", "vlm.eventgpt", _of_draft)
TARGET = Role("target", "videollava", "vl", "Video-LLaVA", "target_model", "vlm.video_llava",
              _of_target)
ROLES = {role.role: role for role in (DRAFT, TARGET)}
BY_NAME = {role.name: role for role in ROLES.values()}       # the names that files use
NO_MODEL = "none"        # --draft_model none: the target alone


def digest_of_files(role: Role, sample: Sample, view: View) -> str:
    """A digest of the names and sizes of the files that the model sees of this sample."""
    from clips.dataset import digest_of

    return digest_of(role.files(sample, view))


def content_of(samples: list[Sample], roles: Iterable[Role], view: View) -> dict[str, dict[str, str]]:
    """Model -> clip's key -> digest of the files that it sees; unusable samples are left out."""
    usable = [sample for sample in samples if not sample.trouble]
    return {role.name: {sample.key: digest_of_files(role, sample, view) for sample in usable}
            for role in roles}
