"""A prefix adapter step by step at batch 1, as decoding runs it: a cache of keys and values, CUDA
graphs on a GPU.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F

from base import log
from drafting.contract import Timer, matching
from drafting.single_step import SingleStep
from machine.graphs import capture
from token_adapter import Cache, TokenAdapter

TOP_K = 24  # of the adapter's distribution, what the hybrid mixes: the rest holds no winner
BRANCH_SLOTS = 128  # behind those of an answer, for the nodes of a tree


def on_host(tokens: list[int], device_tensor: torch.Tensor) -> torch.Tensor:
    """(k,) int64 on the host, to be copied to the tensor's device: pinned for a GPU, so that no
    copy blocks.
    """
    return torch.tensor(tokens, dtype=torch.long, pin_memory=device_tensor.is_cuda)


def for_proposing(adapter: TokenAdapter) -> TokenAdapter:
    """The adapter itself, on a GPU a copy in bfloat16: half the bytes, and proposals decide about
    time alone.
    """
    if not all(weight.isfinite().all() for weight in adapter.parameters()):
        log("drafters | WARNING | the adapter has weights that are no numbers (NaN or infinite): "
            "it proposes nothing where they count")
    if not adapter.embedding.weight.is_cuda:
        return adapter.eval()
    return copy.deepcopy(adapter).eval().requires_grad_(False).bfloat16()


class AdapterSteps:
    """A prefix adapter at batch 1 on its cache: eager on a CPU, CUDA graphs on a GPU, where
    launching costs most.
    """

    SIZES = (1, 2, 4, 8, Cache.SPARE)

    def __init__(self, adapter: TokenAdapter, top_k: int = TOP_K):
        self.adapter, self.config = for_proposing(adapter), adapter.config
        device = adapter.begin.device
        self.cache = Cache(self.config, 1, self.adapter.begin.detach(), Cache.SPARE + BRANCH_SLOTS)
        self.tokens = torch.zeros(1, self.SIZES[-1], dtype=torch.long, device=device)
        # Row of each slot: ids (int64) and probabilities (float32) of the token after it, for one
        # copy to the host.
        self.top_k = min(top_k, self.config.outputs)
        size = len(self.cache.slots), 4 * self.top_k
        self.rows = torch.zeros(size, dtype=torch.int32, device=device)
        self.ids, self.probabilities = self.parts(self.rows)
        self.single = SingleStep(self.adapter, self.cache)
        self.draft = torch.zeros(1, self.config.max_seq_len, dtype=torch.long, device=device)
        self.draft_length = torch.zeros(1, dtype=torch.long, device=device)
        self.first = self.config.max_seq_len if self.config.conditioning == "prefix+draft" else 0
        self.draft_tokens = 0
        self.fed: list[int] = []  # tokens of the answer whose keys and values are in the cache
        # position -> its row, on the host
        self.known: dict[int, tuple[list[int], list[float]]] = {}
        self.holds_nan = False  # the cache may hold keys and values that are no numbers
        # After begin-of-answer, where a capture may run them: no slot before it has a place in the
        # answer.
        self.slots = self.cache.slots[self.first + 1:self.first + 1 + self.SIZES[-1]].clone()
        self.graphs: dict[int | str, Any] = {}
        if device.type == "cuda":
            with torch.cuda.device(device):
                pool = torch.cuda.graph_pool_handle()
                # largest first: the others reuse its memory
                for step in ("start", *self.SIZES[::-1]):
                    self.graphs[step], _ = capture(lambda: self._forward(step), pool)  # noqa: B023

    @torch.inference_mode()
    def begin(self, draft: list[int]) -> None:
        # Leave out ids beyond the adapter's vocabulary (its pairs recorded none): it never saw
        # them.
        ids = self.config.draft_embeddings or self.config.vocab_size
        draft = [token for token in draft if 0 <= token < ids][:self.config.max_seq_len]
        self.draft[0, :len(draft)].copy_(on_host(draft, self.draft), non_blocking=True)
        self.draft_length.fill_(len(draft))
        self.draft_tokens = len(draft)
        if self.holds_nan:
            self.forget_answer()
        self._run("start")
        self.fed, self.known = [], {}

    @torch.inference_mode()
    def after(self, prefix: list[int], further: int = 0) -> list[tuple[list[int], list[float]]]:
        """Top ids and probabilities (best first) after the prefix, then after each of `further`
        greedy steps.

        Both lists of a row are empty where the logits are no numbers; the rows after it are then
        worthless too.
        """
        same = self.keep_shared(prefix)
        if further == 0 and len(prefix) in self.known:
            self.fed = self.fed[:same]
            return [self.known[len(prefix)]]
        if self.holds_nan:
            self.forget_answer()
            same = 0
        for at in range(same, len(prefix), self.SIZES[-1]):
            self._feed(prefix[at:at + self.SIZES[-1]], at)
        last = self.first + len(prefix)
        if further:
            self.tokens[0, :1].copy_(self.ids[last, :1])
            self.slots[:1].copy_(self.cache.slots[last + 1:last + 2])
            # each step writes the next one's input: no wait for the device
            for _ in range(further):
                self._run(1)
        ids, probabilities = self.parts(self.rows[last:last + further + 1].cpu())
        self.fed = prefix + ids[:-1, 0].tolist()
        rows = [row if math.isfinite(row[1][0]) else ([], [])
                for row in zip(ids.tolist(), probabilities.tolist())]
        self.holds_nan = self.holds_nan or not all(ids for ids, _ in rows)
        self.known.update({len(prefix) + k: row for k, row in enumerate(rows)})
        return rows

    def keep_shared(self, prefix: list[int]) -> int:
        """Forget the rows of positions that this prefix does not share with the tokens in the cache;
        how many tokens it shares.
        """
        same = matching(self.fed, prefix)
        self.known = {place: row for place, row in self.known.items() if place <= same}
        return same

    def forget_answer(self) -> None:
        """Clear all slots of the answer: a NaN that no position sees still counts in sums, since 0
        * NaN is NaN, and makes NaNs of what is computed in the same step."""
        self.cache.values[..., self.first + 1:, :] = 0
        self.fed, self.known, self.holds_nan = [], {}, False

    def can_follow(self, prefix: list[int]) -> bool:
        """Whether there is a position for one more token, and the adapter knows all tokens before
        it.
        """
        return len(prefix) < self.config.max_seq_len and self.knows(prefix)

    def measure_step(self, draft: list[int], answer: list[int], timer: Timer) -> float:
        """Seconds of one step after an answer's beginning; 0 where the adapter can't follow it."""
        if not self.can_follow([*answer, 0]):
            return 0.0
        self.begin(draft)
        # another token each time, so that no row is known already
        turn = itertools.cycle([[0], [1]])
        return timer(lambda: self.after(answer + next(turn)))

    def knows(self, tokens: list[int]) -> bool:
        """Whether all of these tokens are in the adapter's vocabulary."""
        return all(0 <= token < self.config.vocab_size for token in tokens)

    def _feed(self, tokens: list[int], at: int) -> None:
        """Read these tokens of the answer, from position `at` on."""
        size = next(size for size in self.SIZES if size >= len(tokens))
        # Filled up with a token of its own: any other might be one that makes NaNs.
        filled = tokens + tokens[:1] * (size - len(tokens))
        self.tokens[0, :size].copy_(on_host(filled, self.tokens), non_blocking=True)
        start = self.first + 1 + at
        self.slots[:size].copy_(self.cache.slots[start:start + size])
        self._run(size)

    def parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (n, K) int64 and probabilities (n, K) float32 of rows (n, 4 * K) int32, as views."""
        probabilities = rows.view(torch.float32)[:, 2 * self.top_k:3 * self.top_k]
        return rows.view(torch.long)[:, :self.top_k], probabilities

    def _run(self, size: int | str) -> None:
        if size in self.graphs:
            self.graphs[size].replay()
        else:
            self._forward(size)

    def _forward(self, size: int | str) -> None:
        """One step over `size` tokens, or "start": the draft and begin-of-answer."""
        if size == "start":  # always as long, so that one graph serves every draft
            logits, _ = self.adapter.start(self.draft, self.draft_length, self.cache)
            self._store(logits, self.cache.slots[self.first:self.first + 1])
            return
        assert isinstance(size, int), size
        slots = self.slots[:size]
        if size > 1:
            self._store(self.adapter.step_at(self.tokens[:, :size], slots, self.cache), slots)
            return
        ids = self._store(self.single(self.tokens[0, :1], slots)[None], slots)
        self.tokens[0, :1].copy_(ids[0, :1])         # the next step's input
        slots.add_(1)

    # (1, T, V) -> ids (T, K)
    def _store(self, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        probabilities = F.softmax(logits[0], -1)
        if self.top_k == 1:
            probabilities, columns = probabilities.max(-1, keepdim=True)
        else:
            probabilities, columns = probabilities.topk(self.top_k)
        ids = self.adapter.ids_of(columns)
        self.ids.index_copy_(0, slots, ids)
        self.probabilities.index_copy_(0, slots, probabilities)
        return ids
