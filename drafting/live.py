"""Live drafters: they propose for one answer at a time, without knowing it.

A live drafter proposes what its namesake in simulated.py proposes:

    begin(draft, question)             a new answer: EventGPT's tokens for it and the question's
    propose(prefix, gamma, price)      up to gamma tokens to follow the verified prefix, as far as they are worth it
    learn(answer)                      the answer has been verified: use it for the next ones

Whatever is proposed, the answer is the target's own: a wrong proposal costs time and nothing else.
"""

import copy
import itertools

import torch
import torch.nn.functional as F

import drafting.simulated as drafting
from drafting.simulated import KEPT, NOTHING, NGrams, mixed, top_of
from drafting.single_step import SingleStep
from machine.graphs import capture
from token_adapter import Cache, TokenAdapter


def matching(ours: list[int], theirs: list[int]) -> int:
    """How many tokens both lists begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs)))


def on_host(tokens: list[int], device_tensor: torch.Tensor) -> torch.Tensor:
    """(k,) int64 to be copied to where the other tensor is: pinned, so that the copy to a GPU doesn't wait for it."""
    return torch.tensor(tokens, dtype=torch.long, pin_memory=device_tensor.is_cuda)


def for_proposing(adapter: TokenAdapter) -> TokenAdapter:
    """The adapter itself, on a GPU a copy in bfloat16: half the bytes, and proposals decide about time alone."""
    if not adapter.embedding.weight.is_cuda:
        return adapter.eval()
    return copy.deepcopy(adapter).eval().requires_grad_(False).bfloat16()


# --------------------------------------------------------------------------------------------------- drafters
class Live:
    """A live drafter, and the one that proposes nothing.

    --gamma auto weighs seconds against tokens. proposal_s: of one more proposal, drafting and verifying it; asking_s:
    of asking the adapter, where that is a choice. Both are measured (measure_drafter) before they count.
    """

    proposal_s = asking_s = 0.0

    def begin(self, draft: list[int], question: list[int] = ()) -> None:
        """A new answer: EventGPT's tokens for it, and the question's."""

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        """Up to gamma tokens to follow the verified prefix; price: the tokens that a second brings otherwise.

        One more is proposed while the chance that it counts (it and all before it are right) is worth its seconds.
        """
        return []

    def learn(self, answer: list[int]) -> None:
        """The answer has been verified."""


class LiveTable(Live):
    """Proposals by position, known when the answer begins: the draft itself, or an adapter that sees nothing else."""

    def __init__(self, adapter: TokenAdapter | None = None):
        self.adapter, self.graph = adapter and for_proposing(adapter), None
        if adapter:
            width = adapter.config.max_seq_len - adapter.config.first_position
            self.draft = torch.zeros(1, width, dtype=torch.long, device=adapter.embedding.weight.device)
            self.best = self.draft[0].clone()
            if self.draft.is_cuda:
                with torch.cuda.device(self.draft.device):
                    self.graph, _ = capture(self._forward)

    @torch.inference_mode()
    def begin(self, draft: list[int], question: list[int] = ()) -> None:
        self.table = draft
        if self.adapter:
            width, config = self.draft.shape[1], self.adapter.config
            known = [token if 0 <= token < config.vocab_size else 0 for token in draft]
            self.draft[0].copy_(on_host([*known, *[0] * width][:width], self.draft), non_blocking=True)
            self.graph.replay() if self.graph else self._forward()
            self.table = [NOTHING] * config.first_position + self.best.tolist()

    def _forward(self) -> None:
        torch.argmax(self.adapter(self.draft)[0], -1, out=self.best)

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        return list(itertools.takewhile(lambda token: token != NOTHING, self.table[len(prefix):len(prefix) + gamma]))


class LiveLookup(Live):
    """Prompt lookup (Saxena 2023): what followed the last tokens where they stood before, in question or answer."""

    LONGEST = 3

    def begin(self, draft: list[int], question: list[int] = ()) -> None:
        self.question = list(question)

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        text = self.question + prefix
        for size in range(min(self.LONGEST, len(text) - 1), 0, -1):
            for at in range(len(text) - size - 1, -1, -1):
                if text[at:at + size] == text[-size:]:
                    return text[at + size:at + size + gamma]
        return []


class AdapterSteps:
    """A prefix adapter at batch 1 on its cache: eager on a CPU, CUDA graphs on a GPU, where launching costs most."""

    SIZES = (1, 2, 4, 8, Cache.SPARE)

    def __init__(self, adapter: TokenAdapter, kept: int = KEPT):
        self.adapter, self.config = for_proposing(adapter), adapter.config
        device = adapter.begin.device
        self.cache = Cache(self.config, 1, self.adapter.begin.detach())
        self.tokens = torch.zeros(1, self.SIZES[-1], dtype=torch.long, device=device)
        # Row of each slot: ids (int64) and chances (float32) of what follows it, for one copy of both to the host.
        self.kept = min(kept, self.config.outputs)
        self.rows = torch.zeros(len(self.cache.slots), 4 * self.kept, dtype=torch.int32, device=device)
        self.ids, self.chances = self._parts(self.rows)
        self.single = SingleStep(self.adapter, self.cache)
        self.draft = torch.zeros(1, self.config.max_seq_len, dtype=torch.long, device=device)
        self.draft_length = torch.zeros(1, dtype=torch.long, device=device)
        self.first = self.config.max_seq_len if self.config.conditioning == "prefix+draft" else 0
        # Behind begin-of-answer, where a capture may run them: no slot before it has a place in the answer.
        self.slots = self.cache.slots[self.first + 1:self.first + 1 + self.SIZES[-1]].clone()
        self.graphs = {}
        if device.type == "cuda":
            with torch.cuda.device(device):
                pool = torch.cuda.graph_pool_handle()
                for size in ("start", *reversed(self.SIZES)):        # largest first: the others fit into its memory
                    self.graphs[size], _ = capture(lambda: self._forward(size), pool)                    # noqa: B023

    @torch.inference_mode()
    def begin(self, draft: list[int]) -> None:
        # An id beyond the adapter's vocabulary (of pairs that recorded none) is one it never saw: as if not there.
        draft = [token for token in draft if self.knows([token])][:self.config.max_seq_len]
        self.draft[0, :len(draft)].copy_(on_host(draft, self.draft), non_blocking=True)
        self.draft_length.fill_(len(draft))
        self._run("start")
        self.fed, self.known = [], {}

    @torch.inference_mode()
    def after(self, prefix: list[int], further: int = 0) -> list[tuple[list[int], list[float]]]:
        """(ids, chances), best first, of what follows the prefix and each of `further` tokens of its own choice."""
        same = matching(self.fed, prefix)
        self.known = {place: row for place, row in self.known.items() if place <= same}
        if further == 0 and len(prefix) in self.known:
            self.fed = self.fed[:same]
            return [self.known[len(prefix)]]
        for at in range(same, len(prefix), self.SIZES[-1]):
            self._feed(prefix[at:at + self.SIZES[-1]], at)
        last = self.first + len(prefix)
        if further:
            self.tokens[0, :1].copy_(self.ids[last, :1])
            self.slots[:1].copy_(self.cache.slots[last + 1:last + 2])
            for _ in range(further):                                # each writes the next one's input: nothing waits
                self._run(1)
        ids, chances = self._parts(self.rows[last:last + further + 1].cpu())
        rows = list(zip(ids.tolist(), chances.tolist()))
        self.known.update({len(prefix) + k: row for k, row in enumerate(rows)})
        self.fed = prefix + [ids[0] for ids, _ in rows[:-1]]
        return rows

    def knows(self, tokens: list[int]) -> bool:
        """Whether all of these are in the adapter's vocabulary."""
        return all(0 <= token < self.config.vocab_size for token in tokens)

    def _feed(self, tokens: list[int], at: int) -> None:
        size = next(size for size in self.SIZES if size >= len(tokens))
        self.tokens[0, :len(tokens)].copy_(on_host(tokens, self.tokens), non_blocking=True)
        start = self.first + 1 + at
        self.slots[:size].copy_(self.cache.slots[start:start + size])
        self._run(size)

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (n, kept) int64 and chances (n, kept) float32 of rows (n, 4 * kept) int32, as views."""
        return rows.view(torch.long)[:, :self.kept], rows.view(torch.float32)[:, 2 * self.kept:3 * self.kept]

    def _run(self, size: int | str) -> None:
        if size in self.graphs:
            self.graphs[size].replay()
        else:
            self._forward(size)

    def _forward(self, size: int | str) -> None:
        """One step over `size` tokens, or "start": the draft and begin-of-answer."""
        if size == "start":                                  # always as long, so that one graph serves every draft
            logits, _ = self.adapter.start(self.draft, self.draft_length, self.cache)
            self._keep(logits, self.cache.slots[self.first:self.first + 1])
            return
        slots = self.slots[:size]
        if size > 1:
            self._keep(self.adapter.step_at(self.tokens[:, :size], slots, self.cache), slots)
            return
        ids = self._keep(self.single(self.tokens[0, :1], slots)[None], slots)
        self.tokens[0, :1].copy_(ids[0, :1])                     # the next one's input
        slots.add_(1)

    def _keep(self, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:     # (1, T, V) -> ids (T, kept)
        chances = F.softmax(logits[0], -1)
        chances, columns = chances.max(-1, keepdim=True) if self.kept == 1 else chances.topk(self.kept)
        ids = self.adapter.ids_of(columns)
        self.ids.index_copy_(0, slots, ids)
        self.chances.index_copy_(0, slots, chances)
        return ids


class LiveAdapter(Live):
    """The adapter's own best tokens, chained on the device: one wait a proposal however long it is."""

    def __init__(self, adapter: TokenAdapter):
        self.steps = AdapterSteps(adapter, kept=1)

    def begin(self, draft: list[int], question: list[int] = ()) -> None:
        self.steps.begin(draft)

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        gamma = min(gamma, self.steps.config.max_seq_len - len(prefix))
        if gamma < 1 or not self.steps.knows(prefix):
            return []
        rows = self.steps.after(prefix, gamma - 1)
        sure = itertools.accumulate((chances[0] for _, chances in rows), lambda a, b: a * b)
        return [ids[0] for (ids, _), chance in zip(rows, sure) if chance >= self.proposal_s * price]


class LiveHybrid(Live):
    """Adapter and memory mixed, token by token, where the memory isn't sure; without an adapter the memory alone.

    Asked is the adapter only where it can win what it costs: the chance that the memory alone fails just here.
    """

    def __init__(self, ngrams: NGrams, adapter: TokenAdapter | None = None, share: float = 1.0):
        self.ngrams, self.share, self.steps = ngrams, share, adapter and AdapterSteps(adapter)

    def begin(self, draft: list[int], question: list[int] = ()) -> None:
        if self.steps:
            self.steps.begin(draft)

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        tokens, sure = list(prefix), 1.0
        while len(tokens) < len(prefix) + gamma:
            chances = self.ngrams.distribution(tokens)
            doubt = 1 - max(chances.values(), default=0)
            asked = doubt > 1 - drafting.SURE and sure * doubt >= self.asking_s * price
            if asked and self.steps and len(tokens) < self.steps.config.max_seq_len and self.steps.knows(tokens):
                chances = mixed(*self.steps.after(tokens)[0], chances, self.share)
            best = top_of(chances)[0]
            sure *= chances.get(best, 0.0)
            if best == NOTHING or sure < self.proposal_s * price:
                break
            tokens.append(best)
        return tokens[len(prefix):]

    def learn(self, answer: list[int]) -> None:
        self.ngrams.add(answer)
