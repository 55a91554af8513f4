"""Speculative decoding of one answer: live drafters, the rules that verify their proposals, the decode loop.

A live drafter proposes what its namesake in drafting.py proposes, one answer at a time and not knowing it:

    begin(draft, question)             a new answer: EventGPT's tokens for it and the question's
    propose(prefix, gamma, price)      up to gamma tokens to follow the verified prefix, as far as they are worth it
    learn(answer)                      the answer has been verified: use it for the next ones

Whatever is proposed, the answer is the target's own: a wrong proposal costs time and nothing else.
"""

import copy
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import drafting
from drafting import KEPT, NOTHING, NGrams, mixed, top_of
from graphs import capture
from token_adapter import Cache, SingleStep, TokenAdapter

REPEATS = 7                        # a cost is the median of so many


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


# ------------------------------------------------------------------------------------------------ decode loop
@dataclasses.dataclass
class Decoded:
    """One answer and how it came about; pass 0 is the prefill."""

    tokens: list[int]
    proposed: list[int] = dataclasses.field(default_factory=list)     # tokens proposed to each pass of the target
    accepted: list[int] = dataclasses.field(default_factory=list)     # and how many of them were right
    draft_s: float = 0.0             # seconds in the drafter, learning included
    prefill_s: float = 0.0           # in the prefill
    verify_s: float = 0.0            # in all other passes


def greedy(answer: list[int], proposed: list[int], following) -> list[int]:
    """The right proposals and the target's own next token: just what greedy decoding would have said.

    following.best (k + 1,): what the target says after the prefix and after each proposal.
    """
    best = following.best.tolist()
    return best[:matching(proposed, best) + 1]


class Sampling:
    """Lossless sampling (Leviathan et al. 2023; Chen et al. 2023) at a temperature; proposals are single tokens.

    With all of the drafter's weight on one token, it is kept with the target's chance of it; if it is not, the token
    comes from the target's distribution without it. Together that is the target's own distribution.
    """

    def __init__(self, temperature: float, seed: int):
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, answer: list[int], proposed: list[int], following) -> list[int]:
        chances, emitted = F.softmax(following.logits.double().cpu() / self.temperature, -1), []
        for row, token in zip(chances, [*proposed, None]):
            if token is not None and float(torch.rand((), generator=self.generator)) < float(row[token]):
                emitted.append(token)
                continue
            if token is not None:
                row[token] = 0.0
            return [*emitted, int(torch.multinomial(row, 1, generator=self.generator))]
        raise AssertionError("the last row always ends the loop")


def decode(target, drafter: Live, max_new_tokens: int, eos: int, gamma: int, price: Callable[[], float] = lambda: 0.0,
           rule: Callable = greedy) -> Decoded:
    """One answer by speculative decoding: the target's own, whatever the drafter proposes.

    target: prefill(proposed) and verify(tokens) -> what follows the last known token and each proposal (`best`
    (k + 1,) ids, `logits` (k + 1, V)); keep(n): forget all but the prompt and n tokens of the answer; vocab_size. eos
    and the length end the answer exactly where they end plain decoding. gamma: proposals a pass at most; price: asked
    before each pass, the tokens that a second is worth, 0 if drafting costs nothing.
    """
    found = Decoded([])
    while True:
        start, answer = time.perf_counter(), found.tokens
        room = min(gamma, max_new_tokens - len(answer) - 1)            # the last token is always the target's own
        proposed = drafter.propose(answer, room, price()) if room > 0 else []
        proposed = list(itertools.takewhile(lambda token: 0 <= token < target.vocab_size, proposed))
        between = time.perf_counter()
        if answer:
            target.keep(len(answer) - 1)
            following = target.verify([answer[-1], *proposed])
        else:
            following = target.prefill(proposed)
        emitted = rule(answer, proposed, following)
        if eos in emitted:
            emitted = emitted[:emitted.index(eos) + 1]
        end = time.perf_counter()
        found.draft_s += between - start
        if answer:
            found.verify_s += end - between
        else:
            found.prefill_s = end - between
        found.proposed.append(len(proposed))
        found.accepted.append(matching(emitted, proposed))
        found.tokens = answer + emitted
        if found.tokens[-1] == eos or len(found.tokens) >= max_new_tokens:
            start = time.perf_counter()
            drafter.learn(found.tokens)
            found.draft_s += time.perf_counter() - start
            return found


# ------------------------------------------------------------------------------------------- checks and costs
def judge(ours: list[int], plain: list[int], target, embeds, noise: float) -> dict:
    """exact; else tie or WRONG, with the first difference and the gap between the target's two best logits there.

    A tie is when rounding explains all of it: at the first difference both tokens lie within the noise of the
    target's best, and so does each of ours from there on, given ours before it (the plain answer went elsewhere).
    """
    if ours == plain:
        return {"verdict": "exact"}
    at = matching(ours, plain)
    found = {"position": at, "gap": None, "ours": ours[at:at + 1], "plain": plain[at:at + 1]}
    if at == min(len(ours), len(plain)):                        # one goes on where the other ends: no rounding does
        return {"verdict": "WRONG", **found}
    target.ask(embeds)
    logits = target.prefill(ours[:-1]).logits[at:].float()                    # what the target says from there on
    said = logits.gather(1, torch.tensor(ours[at:], device=logits.device)[:, None])[:, 0]
    lacking = [*(logits.max(-1).values - said).tolist(), float(logits[0].max() - logits[0, plain[at]])]
    first, second = logits[0].topk(2).values.tolist()
    found["gap"] = first - second if math.isfinite(first - second) else None
    return {"verdict": "tie" if all(lack <= noise for lack in lacking) else "WRONG", **found}     # NaN is no tie


def timed(work: Callable, device) -> tuple:
    """(what work() returns, seconds), with the device done before and after."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - start


def milliseconds(seconds: dict) -> dict:
    return {key: milliseconds(value) if isinstance(value, dict) else 1000 * value for key, value in seconds.items()}


def median_s(work: Callable, device) -> float:
    return statistics.median(timed(work, device)[1] for _ in range(REPEATS))


def measure_costs(target, model, pixels, question: str, device, sizes) -> dict:
    """Seconds of vision (with the prompt's embedding), prefill, and one pass over k tokens for each k in sizes."""
    embeds = model.prompt_embeds(pixels, question)
    target.ask(embeds)
    target.prefill([])

    def one(k: int) -> None:
        target.keep(0)
        target.verify([0] * k).best.tolist()

    for _ in range(3 * REPEATS):                     # a GPU that has waited is slow for its first passes
        one(1)
    verify = {k: median_s(lambda k=k: one(k), device) for k in sizes}
    return {"vision": median_s(lambda: model.prompt_embeds(pixels, question), device),
            "prefill": median_s(lambda: target.prefill([]).best.tolist(), device), "verify": verify}


def rounding(target, model, embeds, tokens: list[int]) -> float:
    """The largest difference of a logit between four ways to reckon it: one by one, together, in the prefill, and by
    transformers' own forward. This is the noise of the number format on this device; it decides what a tie is.
    """
    target.ask(embeds)
    tokens = tokens[:17]
    target.prefill([])
    # Copies: a graph writes its next logits over these.
    one_by_one = torch.cat([target.verify([token]).logits.float().clone() for token in tokens])
    target.keep(0)
    others = [target.verify(tokens).logits.float().clone(), target.prefill(tokens).logits[1:].float()]
    decoder, head = model.decoder
    with torch.inference_mode():
        whole = torch.cat([embeds, target.steps.embed(tokens)], 1)
        others.append(head(decoder(inputs_embeds=whole).last_hidden_state[0, -len(tokens):]).float())
    return float(max((one_by_one - other).abs().max() for other in others))


def measure_drafter(drafter: Live, draft: list[int], question: list[int], answer: list[int], slope_s: float,
                    device) -> dict:
    """Set what a drafter costs, measured on the beginning of a first answer; nothing is learnt from it.

    slope_s: seconds of verifying one token more. Returns seconds: "proposal" of one token, all in all, and "asking".
    """
    def propose() -> int:
        drafter.begin(draft, question)
        return len(drafter.propose(answer, 8))

    def cost_s() -> float:
        begin_s, count = median_s(lambda: drafter.begin(draft, question), device), max(1, propose())
        return max(0.0, median_s(propose, device) - begin_s) / count

    found = {"proposal": cost_s(), "asking": 0.0}
    steps = getattr(drafter, "steps", None)
    if steps and steps.config.max_seq_len > len(answer) + 1 and steps.knows(answer):
        drafter.begin(draft, question)
        turn = itertools.cycle([[0], [1]])                      # another token each time, so that none is remembered
        found["asking"] = median_s(lambda: steps.after(answer + next(turn)), device)
    if isinstance(drafter, LiveHybrid) and steps:
        drafter.steps = None
        drafter.proposal_s = cost_s() + slope_s
        drafter.steps = steps
    else:
        drafter.proposal_s = found["proposal"] + slope_s
    drafter.asking_s = found["asking"]
    return found


@dataclasses.dataclass
class Pace:
    """--gamma auto: what a second is worth, in tokens, by what it brought so far; begins with plain steps.

    Renewal-reward: the stopping rule that gives most tokens a second compares each cost with that very average.
    """

    seconds: float                     # of one plain step, for one token
    tokens: int = 1

    def price(self) -> float:
        return self.tokens / self.seconds

    def add(self, found: Decoded) -> None:
        self.seconds += found.draft_s + found.verify_s
        self.tokens += len(found.tokens)
