"""The clips of a decoding: in which order, read ahead for one model after the other, and which of
them failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from base import UserError, log
from machine.files import is_machine_trouble
from pairs.splits import clip_order
from vlm.roles import digest_of_files

if TYPE_CHECKING:
    import torch

    from clips.dataset import Sample
    from vlm.contract import VisionLanguageModel
    from vlm.roles import Role, View


@dataclasses.dataclass
class Clips:
    """What a decoding asks about, and the answers that it could not get."""

    samples: list[Sample]                    # usable ones, in the order of decoding
    questions: list[str]
    view: View
    # threads that read pictures and videos ahead of the model
    num_workers: int
    # model -> clip's key -> digest of the clip's files at the start
    content: dict[str, dict[str, str]]
    failed: list[dict] = dataclasses.field(default_factory=list)

    def read(self, role: Role, model: VisionLanguageModel,
             samples: list[Sample]) -> Iterator[tuple[Sample, torch.Tensor]]:
        """Yield (sample, pixels (n, 3, S, S)) in order. A clip that can't be read is put on the
        list `failed`.
        """
        from clips.dataset import read_ahead

        def prepare(sample: Sample) -> torch.Tensor:
            return model.prepare(role.pictures(sample, self.view))

        for sample, pixels in read_ahead(prepare, samples, self.num_workers, 2 * self.num_workers):
            if isinstance(pixels, Exception):
                self._unreadable(role, sample, pixels)
            else:
                yield sample, pixels

    def thumbnails(self, keys: list[str]) -> dict[str, dict[str, str]]:
        """Clip's key -> {"events": data: URI, "frames": data: URI} of these clips, as far as their
        files can be read.
        """
        from clips.dataset import draft_pictures, read_ahead, target_pictures
        from clips.limits import MediaError
        from clips.thumbnails import event_picture, film_strip

        def prepare(sample: Sample) -> dict[str, str]:
            shown = {}
            # A picture is missed by nobody: even files that are gone don't end a finished decoding.
            with contextlib.suppress(MediaError, UserError, OSError):
                shown["events"] = event_picture(draft_pictures(sample, "first"))
            with contextlib.suppress(MediaError, UserError, OSError):
                shown["frames"] = film_strip(target_pictures(sample, self.view.num_frames))
            return shown

        samples = [sample for sample in self.samples if sample.key in keys]
        prepared = read_ahead(prepare, samples, self.num_workers, 2 * self.num_workers)
        return {sample.key: pictures for sample, pictures in prepared}

    def _unreadable(self, role: Role, sample: Sample, error: Exception) -> None:
        """A clip that can't be read has failed, unless the machine is in trouble or its files have
        changed meanwhile.
        """
        trouble = "the machine is in trouble" if is_machine_trouble(error) else ""
        if digest_of_files(role, sample, self.view) != self.content[role.name][sample.key]:
            trouble = "its files are not those that were there when this run began"
        if trouble:
            raise UserError(
                f"clip {sample.key}: {error}; {trouble}: correct that, then give the same command "
                "again; it goes on from here") from error
        self.fail(role, sample, str(error))

    def fail(self,
             role: Role,
             sample: Sample,
             reason: str,
             question_idx: int | None = None) -> None:
        """Put a clip on the list, or the one question about it that has no answer."""
        self.failed.append(failure(sample, reason, role.name, question_idx))
        log(f"decode | {role.name} | WARNING | clip {sample.key} failed: {reason}")

    def none_left(self, what: str) -> UserError:
        """The error for a decoding of which nothing is left."""
        return UserError(
            f"none of {len(self.samples)} clips could be {what}; the first reason: "
            f"{self.failed[0]['reason'] if self.failed else 'the data set has no usable clip'}")


def failure(sample: Sample,
            reason: str,
            model: str | None = None,
            question_idx: int | None = None) -> dict:
    """A row of `failed` in decode.json. model: the one that failed, None for a row of the data set
    that is unusable.
    """
    row = {
        "sample_id": sample.id, "sequence": sample.sequence, "clip": sample.clip, "model": model,
        "reason": reason
    }
    return row if question_idx is None else {**row, "question_idx": question_idx}


def in_order(samples: list[Sample], shuffled_by: int | None = None) -> list[Sample]:
    """Sequence by sequence, as they were driven, so that a memory has seen the clips before; or
    shuffled by a seed.
    """
    if shuffled_by is not None:
        return random.Random(shuffled_by).sample(samples, len(samples))
    order = clip_order([sample.sequence for sample in samples], [sample.clip for sample in samples])
    return [samples[number] for number in order]
