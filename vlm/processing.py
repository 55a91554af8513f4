"""Pictures and a question as the inputs of any model of transformers, by the model's own processor.

    processing = Processing.of(checkpoint)             # a UserError where no processor can be made
    inputs = processing.inputs(pictures)            # the prompt to the end of the pictures, pixels
    ids = processing.after(query, len(pictures))    # the prompt's ids behind the pictures

One picture is shown as an image, several as a video, or as several images to a processor that reads
no videos. The text around them is the folder's chat template's. Pictures are handed over as arrays:
no processor opens a file.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoProcessor

from base import UserError, first_line, install_command
from clips.limits import MediaError
from machine.files import read_json
from vlm.checkpoints import Checkpoint
from vlm.errors import UNSAFE_ADVICE, in_words
from vlm.tokenizers import guarded, silent_panics

# Frames come sampled already and without times. Models that write times into the prompt are told
# this rate, at which the Qwen-VL family was trained.
FPS = 2.0
SHOWN = (240, 320)  # height and width of pictures that stand for those of a clip
OPTIONAL = ("torchvision", "num2words")  # packages of requirements-models.txt
PIXELS = "pixel_values"  # begins the names of what is cast to the model's dtype


@dataclasses.dataclass
class ClipInputs:
    """The prompt of one clip up to the end of its pictures, as the model's forward takes it."""

    # input_ids (1, P) int64, what goes along with it (attention_mask, mm_token_type_ids), and
    # tensors of the pictures, whose first axis holds clips, pictures or patches
    tensors: dict[str, torch.Tensor]
    pictures: int  # how many the clip has

    @functools.cached_property
    def shape(self) -> tuple:
        """Equal for clips that can share a batch: shapes, and the values of all but the pixels."""
        return tuple(
            (
                name,
                tensor.shape,
                None
                if name.startswith(PIXELS) or tensor.ndim > 2
                else tuple(tensor.flatten().tolist()),
            )
            for name, tensor in sorted(self.tensors.items())
        )

    @property
    def length(self) -> int:
        """Positions of the prompt up to the end of the pictures."""
        return self.tensors["input_ids"].shape[1]


class Processing:
    """A processor of transformers and its chat template."""

    def __init__(self, processor: Any, name: str):
        """name: of the model, for messages."""
        self.processor, self.name = processor, name
        self.tokenizer = processor.tokenizer

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Processing:
        """The processor of a model folder; a UserError where it can't be made or has no
        template.
        """
        name = checkpoint.name
        try:
            with silent_panics():
                processor = AutoProcessor.from_pretrained(
                    checkpoint.folder, local_files_only=True, trust_remote_code=False
                )
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # damaged files, absent packages, panics of tokenizers
            raise UserError(why_no_processor(name, checkpoint.folder, error)) from error
        if getattr(processor, "tokenizer", None) is None:
            raise UserError(
                f"{name}: its processor is a {type(processor).__name__}, which reads no text "
                "along with pictures; wanted a model for pictures and text"
            )
        template = getattr(processor, "chat_template", None) or getattr(
            processor.tokenizer, "chat_template", None
        )
        if not template:
            raise UserError(
                f"{name} has no chat template (chat_template.jinja, or chat_template in "
                "processor_config.json or tokenizer_config.json): nothing says how a question is put to "
                "it; add the template that it was trained with, or take an instruction-tuned model"
            )
        return cls(processor, name)

    # ---------------------------------------------------------------------------------------- text
    def kind(self, pictures: int) -> Literal["image", "video"]:
        """How so many pictures are shown."""
        reads_videos = getattr(self.processor, "video_processor", None) is not None
        return "video" if pictures > 1 and reads_videos else "image"

    def text(self, query: str, pictures: int) -> str:
        """The prompt of one question, with a mark for the video or for each image."""
        kind = self.kind(pictures)
        shown = [{"type": kind}] * (1 if kind == "video" else pictures)
        content = [*shown, {"type": "text", "text": query}]
        text = guarded(
            f"the chat template of {self.name} can't be used",
            lambda: self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            ),
        )
        if not any(mark in text for mark in self.marks()):
            raise UserError(
                f"the chat template of {self.name} shows no {kind}: its prompt has none of "
                f"{', '.join(self.marks()) or 'the marks of pictures'}; it belongs to another model, "
                "or is not made for pictures"
            )
        behind = max(text.rfind(mark) + len(mark) for mark in self.marks() if mark in text)
        if query.strip() not in text[behind:]:
            raise UserError(
                f"the chat template of {self.name} leaves out the question, or puts it before the "
                "pictures (wanted behind them); it belongs to another model, or is not made for "
                "questions about pictures"
            )
        return text

    def marks(self) -> list[str]:
        """The texts that stand for pictures in a prompt."""
        marks = (getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video"))
        return [str(mark) for mark in marks if mark]

    def mark_ids(self) -> set[int]:
        """The ids that stand for pictures in a prompt."""
        named = (getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video"))
        marks = (self.tokenizer.convert_tokens_to_ids(mark) for mark in self.marks())
        return {token for token in (*named, *marks) if isinstance(token, int)}

    # -------------------------------------------------------------------------------------- inputs
    def inputs(self, pictures: list[np.ndarray]) -> ClipInputs:
        """The prompt up to the end of the pictures; a MediaError where the processor refuses them.

        pictures: (H, W, 3) uint8, oldest first. Thread-safe.
        """
        tensors = self._process(pictures, "")
        positions, end = tensors["input_ids"].shape[1], self._end(tensors, len(pictures))
        for name, tensor in tensors.items():
            if tensor.shape == (1, positions):  # goes along with the ids
                tensors[name] = tensor[:, :end]
        return ClipInputs(tensors, len(pictures))

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one object lives as long
    def after(self, query: str, pictures: int) -> list[int]:
        """The prompt's ids behind the pictures: the same for all clips of so many pictures."""
        tensors = self._process(example(pictures), query)
        return tensors["input_ids"][0, self._end(tensors, pictures) :].tolist()

    def _end(self, tensors: dict[str, torch.Tensor], pictures: int) -> int:
        """The position behind the last that stands for a picture."""
        ids = torch.tensor(sorted(self.mark_ids()), dtype=torch.long)
        marks = torch.isin(tensors["input_ids"][0], ids)
        if not marks.any():
            raise UserError(
                f"the processor of {self.name} gives no id of {', '.join(self.marks())}: its files "
                "belong to different models"
            )
        return int(marks.nonzero().max()) + 1

    def _process(self, pictures: list[np.ndarray], query: str) -> dict[str, torch.Tensor]:
        """All tensors that the processor makes of a whole prompt."""
        kind, text = self.kind(len(pictures)), self.text(query, len(pictures))
        how: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos):  # else the tokenizer would add another
            how["add_special_tokens"] = False
        if kind == "video":
            count = len(pictures)
            if len({picture.shape for picture in pictures}) > 1:
                raise MediaError("its pictures differ in size, and a video has one size")
            how |= {
                "videos": [[np.stack(pictures)]],
                "do_sample_frames": False,
                "video_metadata": [
                    {
                        "total_num_frames": count,
                        "fps": FPS,
                        "duration": count / FPS,
                        "frames_indices": list(range(count)),
                    }
                ],
            }
        else:
            how["images"] = list(pictures)
        try:
            found = self.processor(**how)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # each processor refuses pictures in its own words
            height, width = pictures[0].shape[:2]
            raise MediaError(
                f"{self.name} can't be shown {len(pictures)} pictures of {width} x {height} as "
                f"{kind}: {in_words(error)}; another --num_frames may do"
            ) from error
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def example(pictures: int) -> list[np.ndarray]:
    """So many pictures of noise, as large as SHOWN."""
    return list(np.random.default_rng(0).integers(0, 256, (pictures, *SHOWN, 3), dtype=np.uint8))


def why_no_processor(name: str, folder: Path, error: BaseException) -> str:
    """What a user can do where AutoProcessor fails."""
    words = str(error)
    for package in OPTIONAL:
        if isinstance(error, ImportError) and package in words.lower():
            return (
                f"the processor of {name} needs {package}, which is not installed: "
                f"{install_command('requirements-models.txt')}"
            )
    if UNSAFE_ADVICE.search(words) or names_code(folder):
        return (
            f"the processor of {name} is code of its own (auto_map), which is never run here: wanted a "
            "model whose processor is a part of transformers"
        )
    return (
        f"can't make the processor of {name}: {type(error).__name__}: {first_line(error)}; wanted the "
        "processor_config.json or preprocessor_config.json, and the tokenizer, of its publisher"
    )


def names_code(folder: Path) -> bool:
    """Whether a file that describes the processor names code of the folder."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            settings = read_json(folder / name)
            if isinstance(settings, dict) and "auto_map" in settings:
                return True
    return False
