"""What a vision-language model must offer, and what it hands over. Imports no torch.

vlm/eventgpt.py, vlm/video_llava.py and vlm/any_model.py satisfy the Protocol through vlm/model.py,
which holds what they do alike. Sizes in the docstrings: B clips or rows, n pictures, S pixels a
side, L positions of a prompt, H hidden size, P positions up to the end of the pictures, V
vocabulary size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from base import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from machine.device import Runtime


FAILURES_AT_START = 8       # answers without numbers, and no other answer yet, after which a run ends


@dataclasses.dataclass(frozen=True)
class Answer:
    """New tokens only (no prompt, no BOS; EOS kept when produced), their text, and whether EOS
    ended it.
    """

    tokens: list[int]
    text: str
    finished: bool


class Shared(NamedTuple):
    """The prompts of B clips up to the end of the pictures, as our layers take them."""

    embeds: torch.Tensor           # (B, P, H)
    # (axes, P + 1) int64 for RoPE, that of the first text included, the same in all rows;
    # None: 0, 1, 2, ...
    positions: torch.Tensor | None = None
    # (k, B, P, H) to add behind each of the first k layers: Qwen3-VL's deepstack
    added: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question about one clip, ready to be read: what Target.ask takes."""

    length: int                    # positions
    embeds: torch.Tensor | None = None  # (1, L, H), for our own layers
    # (axes, P) int64 of its first P positions, for RoPE with several axes: the last is text, and
    # text goes on from there; None: 0, 1, 2, ...
    positions: torch.Tensor | None = None
    added: torch.Tensor | None = None            # (k, P, H), as in Shared
    # all tensors of transformers' forward, for a model that our layers do not run
    inputs: dict[str, torch.Tensor] | None = None


class NotNumbers(Exception):
    """The logits that would decide a token of this answer are NaN or infinite: the answer has no
    tokens.

    The clip failed, its neighbours did not. vlm.batches.Batches returns this in place of the clip's
    answers, all others raise it. rows: which rows of the call, where one call answers several.
    """

    def __init__(self, dtype: torch.dtype | str, rows: tuple[int, ...] = ()):
        name, self.rows = str(dtype).removeprefix("torch."), rows
        remedy = {"float16": "float16 overflows beyond 65,504: try --dtype bfloat16 or float32",
                  "bfloat16": "try --dtype float32, or check the weights and the pictures"}
        super().__init__(f"the model's logits in {name} are no numbers (NaN or infinite); "
                         f"{remedy.get(name, 'check the weights and the pictures')}")


class FirstAnswers:
    """Ends a run whose model gives no numbers from its first answer on, before all clips are tried."""

    def __init__(self, name: str, usable: bool):
        """name: of the model; usable: whether it gave an answer in an earlier start of this run."""
        self.name, self.usable, self.failures = name, usable, 0

    def failed(self, reason: str) -> None:
        """Count a NotNumbers with this reason. A UserError if there were only those so far."""
        self.failures += 1
        if not self.usable and self.failures >= FAILURES_AT_START:
            raise UserError(f"{self.name}: none of the first {self.failures} could be answered, so the "
                            f"others are not tried; the reason of the last: {reason}")


def same_weights(recorded: str | None, revision: str) -> bool | None:
    """Whether a recorded revision is this one; None if that can't be told, which is never a yes.

    It can't be told of "unknown", of "local ..." (files of earlier versions: names and sizes alone,
    no content), or of a commit of the hub beside the content of a folder.
    """
    kinds = [_kind_of(recorded), _kind_of(revision)]
    return recorded == revision if kinds[0] == kinds[1] != "unknown" else None


def _kind_of(revision: str | None) -> Literal["commit", "content", "unknown"]:
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return "commit"
    return "content" if re.fullmatch("content [0-9a-f]{20}", revision or "") else "unknown"


class VisionLanguageModel(Protocol):
    """A loaded model. Greedy; the checkpoint's own generation settings play no part but for its EOS
    ids.

    All calls but prepare() belong into one thread. Errors: UserError for what a user can put right
    (a prompt that is too long, a mark in a question), NotNumbers for logits that are none,
    RuntimeError for a lack of memory (vlm.loading.short_of_memory tells).
    """

    model: nn.Module               # transformers' module; gone after unload()
    tokenizer: Any                 # of transformers
    pixels: Any                    # how pictures become input: PixelSettings or Processing
    runtime: Runtime               # device, dtype, quantisation, as loaded
    revision: str  # a hub's commit of 40 hex digits, or "content <digest>" of a folder

    @property
    def vocab_size(self) -> int:
        """V: every token id is below it."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end an answer, at least one; the tokenizer's own EOS first."""

    @property
    def decoder(self) -> tuple[nn.Module, nn.Module]:
        """(the LLaMA-like layers with embed_tokens, layers and norm; the output layer), what
        vlm/llama.py runs.
        """

    @property
    def max_positions(self) -> int:
        """Positions that the decoder knows: prompt and answer together."""

    @property
    def max_prompt(self) -> int:
        """Positions of a prompt that are kept; the rest is cut off at the end."""

    def facts(self, name: str | Path) -> dict:
        """What files record of the model: name, revision, vocab_size, quantization, dtype; read off
        the weights.
        """

    def prepare(self, pictures: list[np.ndarray]) -> Any:
        """RGB pictures (H, W, 3) uint8 of a clip, oldest first -> what the model sees of it, on the
        CPU: (n, 3, S, S) in the model's dtype, or ClipInputs.

        Thread-safe. Clips with the same `shape` can share a batch. Raises MediaError for pictures
        that can't be shown to the model.
        """

    def prompt_text(self, query: str) -> str:
        """The prompt as text, with a mark where the pictures go."""

    def layout(self, questions: list[str], pictures: int,
               clip: Any = None) -> tuple[int, list[list[int]]]:
        """(positions of the prompt up to the end of the pictures, the ids behind by question).

        pictures: how many; clip: as prepare() gives it, where the size of the pictures matters.
        """

    def encode(self, pixels: Any, query: str) -> Any:
        """One clip's prompt, for ask() of the target that open_target gives."""

    def shared_prompts(self, clips: Sequence[Any]) -> Shared:
        """The prompts of clips of one shape, as prepare() gives them, up to the end of the
        pictures.
        """

    def open_target(self, questions: list[str], pictures: int, more_tokens: int) -> Any:
        """A decoding.contracts.Target with room for the longest prompt and so many tokens behind."""

    def open_batches(self, questions: list[str], max_new_tokens: int, clip: Any, clips: int) -> Any:
        """What answers these questions about up to `clips` clips like this: vlm.batches.Batches."""

    def clips_that_fit(self, questions: list[str], max_new_tokens: int, pictures: int) -> int:
        """How many clips at a time the free memory has room for."""

    def answer(
        self, pixels: list[Any], queries: list[str], max_new_tokens: int
    ) -> list[Answer]:
        """transformers' own greedy answers, one per row; rows may differ in query, not in the
        number of pictures.

        Slow (our own loops are steps.py and batches.py): the reference that they are compared with.
        Raises NotNumbers if a token of any row would come from logits that are none; its `rows`
        says which.
        """

    def unload(self) -> None:
        """Free the weights; the object can't answer any more."""
