"""Made-up clips and models for benchmarks of extraction: random pixels, answers that are only counted."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:                  # torch is imported after the flags are read
    import torch

    from clips.dataset import Sample
    from vlm.contract import Answer, VisionLanguageModel


def random_pixels(model: VisionLanguageModel, pictures: int, clips: int) -> list[torch.Tensor]:
    """Prepared pixels of `clips` clips; a few different ones, in turn."""
    import numpy as np

    side, random = model.pixels.crop, np.random.default_rng(0)
    few = [model.prepare(list(random.integers(0, 255, (pictures, side, side, 3), dtype=np.uint8)))
           for _ in range(8)]
    return [few[number % len(few)] for number in range(clips)]


@dataclasses.dataclass
class AllTokens:
    """Results (extraction.answering) that only look whether every answer took all its tokens."""

    max_new_tokens: int

    def keep(self, answered: list[tuple[Sample, list[Answer]]]) -> None:
        lengths = {len(answer.tokens) for _, answers in answered for answer in answers}
        assert lengths <= {self.max_new_tokens}, lengths

    def lose(self, sample: Sample, reason: str) -> None:
        raise AssertionError(f"clip {sample.key} failed: {reason}")


class Prepared:
    """A model whose pictures are prepared pixels already."""

    def __init__(self, model: VisionLanguageModel):
        self._model = model

    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def __getattr__(self, name: str):
        return getattr(self._model, name)
