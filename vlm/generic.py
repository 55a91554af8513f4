"""Decoding and batches through transformers' own forward, for models whose layers are not ours.

The same loop, drafters and verdict as on vlm/steps.py: a pass over several tokens, and a cache that
is cropped behind the accepted ones (as transformers' assisted decoding does). Slower: every pass is
eager, and a proposal is a chain, never a tree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from base import UserError
from vlm.contract import Answer, NotNumbers, Prompt, VisionLanguageModel
from vlm.llama import NO_NUMBER, Next

if TYPE_CHECKING:
    from vlm.processing import ClipInputs

ROWS = 32  # answers side by side on a GPU: each has its prompt in memory
CPU_ROWS = 8
# Kinds of layers for which a cache keeps all keys and values: the masks know their windows.
KEPT_WHOLE = {"full_attention", "sliding_attention", "chunked_attention"}


def best_of(logits: torch.Tensor) -> Next:
    """logits (n, V) -> the next token after each position."""
    largest, best = logits.max(-1)  # max of a row with a NaN is NaN
    return Next(logits, best.where(largest.isfinite(), NO_NUMBER))


def extended(tensors: dict[str, torch.Tensor], ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """Inputs of a prompt (B, P) with these ids behind it, equally many in each of the B rows."""
    more = torch.tensor(ids, dtype=torch.long, device=tensors["input_ids"].device)
    along, longer = tensors["input_ids"].shape, {}
    for name, tensor in tensors.items():
        if name == "input_ids":
            tensor = torch.cat([tensor, more], 1)
        elif tensor.shape == along:  # a mask, or which ids are pictures
            value = int(name == "attention_mask")
            tensor = torch.cat([tensor, torch.full_like(more, value, dtype=tensor.dtype)], 1)
        longer[name] = tensor
    return longer


class GenericTarget:
    """The Target protocol of decoding on a model of transformers, for one prompt at a time."""

    takes_trees = False

    def __init__(self, model: nn.Module, marks: Iterable[int] = ()):
        """model: of AutoModelForImageTextToText; marks: ids that stand for pictures in a prompt."""
        self.model, self.marks = model, set(marks)
        names = inspect.signature(model.forward).parameters
        # past_key_values in earlier versions of transformers 5
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.only_last = "logits_to_keep" in names
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.cache: Any = None
        self.length = 0                                  # positions in the cache
        self.records = False                             # whether it can be cropped but once a pass

    def ask(self, prompt: Prompt) -> None:
        """Set the prompt of the next answer."""
        self.prompt = prompt

    @torch.inference_mode()
    def prefill(self, proposed: list[int], parents: list[int] | None = None) -> Next:
        """The prompt and opening proposals in one pass -> the next token after each."""
        assert parents is None and self.prompt.inputs is not None
        self.cache = None  # frees the memory of the one before
        self.cache = self._new_cache()
        self.length = 0
        # A mark of pictures in an answer is a token like any other, but not beside the pictures.
        first = next(
            (at for at, token in enumerate(proposed) if token in self.marks), len(proposed)
        )
        head = self._forward(extended(self.prompt.inputs, [proposed[:first]]), first + 1)
        if first == len(proposed):
            return head
        tail = self.verify(proposed[first:])
        return Next(*(torch.cat(parts) for parts in zip(head, tail)))

    @torch.inference_mode()
    def verify(self, tokens: list[int], parents: list[int] | None = None) -> Next:
        """Append these tokens -> the next token after each."""
        assert parents is None, "a chain is wanted: takes_trees is False"
        ids = torch.as_tensor(tokens, dtype=torch.long, device=self.model.device)[None]
        return self._forward({"input_ids": ids}, len(tokens))

    @torch.inference_mode()
    def keep(self, tokens: int) -> None:
        """Discard all but the prompt and `tokens` tokens of the answer."""
        length = self.prompt.length + tokens
        assert length <= self.length, f"{length} positions of {self.length}"
        if length < self.length or self.records:         # then crop(0) drops what no token sees
            self.cache.crop(length - self.length)
        self.length = length

    def keep_path(self, path: list[int]) -> None:
        raise AssertionError("a chain is wanted: takes_trees is False")

    def not_numbers(self) -> NotNumbers:
        """The error for an answer that needs a token where `best` is NO_NUMBER."""
        return NotNumbers(self.model.dtype)

    @torch.inference_mode()
    def reference(self, tokens: list[int]) -> torch.Tensor:
        """Logits (n, V) after each of n tokens behind the prompt, in one pass without a cache (with
        one, where a mark of pictures is among them).
        """
        assert self.prompt.inputs is not None
        if self.marks.intersection(tokens):
            return self.prefill(tokens).logits[1:]
        more = {"logits_to_keep": len(tokens)} if self.only_last else {}
        inputs = extended(self.prompt.inputs, [tokens])
        return self.model(**inputs, **more, use_cache=False).logits[0, -len(tokens) :]

    def check(self, token: int) -> None:
        """A UserError unless discarded tokens leave no trace in the cache; token: any that is text.

        ask() comes before.
        """
        self.prefill([token] * 2)
        if not getattr(self.cache, "is_croppable", True):
            raise UserError(
                f"{type(self.model).__name__} keeps a state that can't be set back behind a "
                "refused proposal (a recurrent layer): wanted a model whose layers are attention alone"
            )
        self.keep(0)
        ours, theirs = self.verify([token]).logits.float(), self.reference([token]).float()
        difference = float((ours - theirs).norm() / theirs.norm())
        if difference > 0.1:
            raise UserError(
                f"{type(self.model).__name__} gives other logits after discarded tokens (by "
                f"{difference:.1%}): its cache can't be cropped, and nothing can be decoded "
                "speculatively on it"
            )

    def _new_cache(self) -> DynamicCache:
        """A cache that can be cropped: without the config it forgets nothing behind a window."""
        config = self.model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ())
        self.records = not kinds <= KEPT_WHOLE
        if not self.records:
            return DynamicCache()
        cache = DynamicCache(config=config)
        if hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
        return cache

    def _forward(self, inputs: dict[str, torch.Tensor], wanted: int) -> Next:
        more: dict[str, Any] = {self.cache_name: self.cache, "use_cache": True}
        if self.only_last:
            more["logits_to_keep"] = wanted
        logits = self.model(**inputs, **more).logits[0, -wanted:]
        self.length += inputs["input_ids"].shape[1]
        return best_of(logits)


class GenericBatches:
    """The interface of vlm.batches.Batches on transformers' generate, one question after the other."""

    def __init__(self, vlm: VisionLanguageModel, questions: list[str], max_new_tokens: int, clips: int):
        self.vlm, self.questions, self.max_new_tokens, self.clips = (
            vlm,
            questions,
            max_new_tokens,
            clips,
        )

    def answer(self, pixels: Sequence[ClipInputs], meanwhile: Callable = lambda: None) -> Callable:
        """As vlm.batches.Batches.answer; all is done when it returns."""
        meanwhile()
        answers: list[list[Answer] | NotNumbers] = [[] for _ in pixels]
        for question in self.questions:
            self._ask(list(pixels), question, answers)
        return lambda: answers

    def _ask(self, pixels: list[ClipInputs], question: str, answers: list) -> None:
        """Add the answer of each clip that has not failed."""
        rows = [number for number, row in enumerate(answers) if not isinstance(row, NotNumbers)]
        while rows:
            try:
                found = self.vlm.answer(
                    [pixels[number] for number in rows], [question] * len(rows), self.max_new_tokens
                )
            except NotNumbers as error:  # its neighbours are asked again without it
                for row in error.rows:
                    answers[rows[row]] = error
                rows = [number for at, number in enumerate(rows) if at not in error.rows]
                continue
            for number, answer in zip(rows, found):
                answers[number].append(answer)
            return
