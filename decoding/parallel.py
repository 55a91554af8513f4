"""Both models at work at once: the draft model answers for the next clip while the target decodes
this one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from base import log
from decoding.contracts import Target
from decoding.decoder import Asked, Decoder
from decoding.limits import Limits
from drafting.contract import NoDrafts
from machine.timing import timed

if TYPE_CHECKING:
    from vlm.contract import VisionLanguageModel

PARALLEL_CLIPS = 32                # clips that are read beforehand and decoded


@dataclasses.dataclass(frozen=True)
class Side:
    """One of both models, loaded, and the clips as it sees them."""

    model: VisionLanguageModel
    target: Target                   # the model's decoder
    pixels: list[torch.Tensor]       # (n, 3, S, S) of each clip
    limits: Limits

    def prompt(self, number: int, question: str) -> Any:
        return self.model.encode(self.pixels[number], question)


class Parallel:
    """Decodes the same clips in two ways, each as a whole by one clock: with drafts made meanwhile,
    and plainly.
    """

    def __init__(self, draft: Side, target: Side, question: str):
        self.draft, self.target, self.question = draft, target, question
        self.words = target.model.tokenizer(question, add_special_tokens=False).input_ids
        device = draft.model.runtime.device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def measure(self, decoder: Decoder, plain: Decoder) -> dict:
        """"parallel" in decode.json: seconds for all clips with the decoder, and without drafts."""
        device = self.target.model.runtime.device
        _, all_s = timed(lambda: self.with_drafts(decoder), device)
        _, plain_all_s = timed(lambda: self.without_drafts(plain), device)
        clips = len(self.target.pixels)
        log(f"decode | in parallel | {clips} clips in {all_s:.2f} s, plain {plain_all_s:.2f} s")
        return {"clips": clips, "all_s": all_s, "plain_all_s": plain_all_s,
                "draft_device": str(self.draft.model.runtime.device)}

    def draft_of(self, number: int) -> list[int]:
        """The draft model's answer for a clip, on a stream of its own."""
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            decoder = Decoder(self.draft.target, NoDrafts())
            return decoder.answer(Asked(self.draft.prompt(number, self.question), [], []),
                                  self.draft.limits).tokens

    def asked(self, number: int, draft: list[int]) -> Asked:
        return Asked(self.target.prompt(number, self.question), draft, self.words)

    def with_drafts(self, decoder: Decoder) -> None:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.draft_of, 0)
            for number in range(len(self.target.pixels)):
                draft = coming.result()
                if number + 1 < len(self.target.pixels):
                    coming = pool.submit(self.draft_of, number + 1)
                decoder.answer(self.asked(number, draft), self.target.limits)

    def without_drafts(self, decoder: Decoder) -> None:
        for number in range(len(self.target.pixels)):
            decoder.answer(self.asked(number, []), self.target.limits)
