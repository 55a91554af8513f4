"""The memory: an n-gram model of the target's earlier answers that learns each answer once it is
verified.

Answers come in clip order: consecutive clips of a drive get similar answers, so that the last
verified answers are the best source of proposals there is. Simulated and live drafter stand side by
side; save and load at the end.
"""

from __future__ import annotations

import dataclasses
import itertools
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from base import UserError, log
from drafting.contract import NOTHING, TOP, Costs, NoDrafts, Timer
from drafting.ngrams import NGrams, State
from drafting.parts import LiveParts, SimulationParts
from drafting.tree import MAX_CHILDREN, Sources, Tree, Upcoming, none_upcoming, seconds_per_node
from machine.files import check_format, check_plain, write_whole
from pairs.formats import MAX_ANSWER
from pairs.pairs import Pairs
from pairs.splits import MAX_VOCAB_SIZE, clip_order

FORMAT = 1  # of memory.npz; absent: of versions before formats were counted
# The odds of the memory's best token are raised to this power: its probabilities are too sure of
# themselves, and errors come together. Chosen on training drives, each left out in turn: nodes said to
# be reached 1.86 times as often as they were, now 0.89 times, and trees of 32 bring 7.51 tokens a pass
# instead of 7.29.
TEMPER = 0.4
SUREST = 0.9999
MAX_TRAINING_ANSWERS = 20_000  # answers that a memory begins with: 1,403 real ones take 38 MiB
MAX_TRAINING_TOKENS = 2**20          # in all of them: 20,000 real ones have 50 tokens each
MAX_FILE_BYTES = 2**26               # of memory.npz
MAX_UNPACKED_BYTES = 2**27           # of memory.npz: half a million answers of 50 tokens


def top_of(distribution: dict[int, float]) -> list[int]:
    """The TOP most probable tokens, best first, filled up with NOTHING."""
    best = sorted(distribution, key=distribution.__getitem__, reverse=True)[:TOP]
    return best + [NOTHING] * (TOP - len(best))


def tempered(probability: float) -> float:
    """How likely the best token is right, from the probability that the memory gives it."""
    odds = 1 / min(probability, SUREST) - 1
    return min(probability, 1 / (1 + odds**TEMPER))


def with_tempered_best(choices: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """(probability, token), best first; the order stays."""
    return [(tempered(choices[0][0]), choices[0][1]), *choices[1:]] if choices else choices


# ------------------------------------------------------------------------------------------- counts
def number_remembered(lengths: np.ndarray) -> int:
    """How many of the last answers a memory begins with; lengths (N,): their tokens. 1 at least, of
    at least 1.
    """
    last = lengths[::-1][:MAX_TRAINING_ANSWERS]
    count = int((np.cumsum(last, dtype=np.int64) <= MAX_TRAINING_TOKENS).sum())
    return max(count, min(1, len(last)))


def remembered(training: Pairs) -> Iterator[list[int]]:
    """The target answers that a memory begins with: all, or the last in clip order that the limits
    allow.
    """
    order = clip_order(training.sequence, training.clip)
    count = number_remembered(training.lengths("target")[order])
    if count < len(training):
        training = training.select(order[-count:])
    return training.answers("target")


# ----------------------------------------------------------------------------------------- drafters
class Memory:
    """Simulated: counts of the training answers and, with `streaming`, of these pairs' answers once
    verified.
    """

    def __init__(self, training: NGrams, pairs: Pairs, streaming: bool = True):
        self.ngrams, self.pairs, self.streaming = NGrams(before=training), pairs, streaming

    def predict(self, number: int) -> np.ndarray:
        return np.array([top_of(row) for row in self.distributions(number)], np.int32)

    def distributions(self, number: int) -> Iterator[dict[int, float]]:
        """{token: probability} at each position of answer `number`, given the true tokens before
        it.
        """
        state = self.ngrams.begin()
        for token in self.pairs.answer("target", number):
            yield self.ngrams.distribution_at(state)
            state = self.ngrams.after(state, token)

    def learn(self, number: int) -> None:
        if self.streaming:
            self.ngrams.add(self.pairs.answer("target", number))


class LiveMemory(NoDrafts):
    """Live: a chain of the memory's most probable tokens, or a tree."""

    def __init__(self, ngrams: NGrams):
        self.ngrams = ngrams
        self.known: NGrams | None = None             # what `forget` goes back to

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        tokens, reached = list(prefix), 1.0  # probability that every token before is right
        state = self.ngrams.at(prefix)
        while len(tokens) < len(prefix) + gamma:
            probabilities = self.distribution(tokens, state, reached, price)
            if not probabilities:
                break
            best = max(probabilities, key=probabilities.__getitem__)
            reached *= tempered(probabilities[best])
            if reached < self.costs.token_s * price:
                break
            tokens.append(best)
            state = self.ngrams.after(state, best)
        return tokens[len(prefix):]

    def distribution(self, tokens: list[int], state: State, reached: float,
                     price: float) -> dict[int, float]:
        """{token: probability} after these tokens, whose state is given; reached and price as in
        `propose`.
        """
        return self.ngrams.distribution_at(state)

    def place_after(self, prefix: list[int]) -> Any:
        return self.ngrams.at(prefix)

    def next_place(self, place: Any, token: int) -> Any:
        return self.ngrams.after(place, token)

    def choices(self, place: Any, reached: float, price: float,
                upcoming: Upcoming = none_upcoming) -> list[tuple[float, int]]:
        return with_tempered_best(self.ngrams.best(place, MAX_CHILDREN))

    def learn(self, answer: list[int]) -> None:
        self.ngrams.add(answer)

    def measure(self, draft: list[int], question: Sequence[int], answer: list[int], timer: Timer,
                verify_s: float = 0.0) -> Costs:
        costs = super().measure(draft, question, answer, timer, verify_s)
        node_s = seconds_per_node(self, answer, timer) + verify_s
        self.costs = dataclasses.replace(costs, node_s=node_s)
        return self.costs

    def forget(self) -> None:
        self.known = self.known or self.ngrams
        self.ngrams = NGrams(before=self.known)

    def sources(self, prefix: list[int], proposed: Tree) -> Sources:
        probabilities: list[float | bool | None] = []
        root, states = self.ngrams.at(prefix), []
        for token, parent in zip(proposed.tokens, proposed.parents):
            after = states[parent] if parent >= 0 else root
            state = self.ngrams.after(after, proposed.tokens[parent]) if parent >= 0 else root
            states.append(state)
            probabilities.append(self.ngrams.distribution_at(state).get(token))
        return {"memory": probabilities}


# ---------------------------------------------------------------------------------------- factories
def training_counts(parts: SimulationParts) -> NGrams | None:
    """Counts of the training answers, which every memory begins with; None without training pairs.
    """
    answers: Iterable[list[int]] | None = parts.training_answers
    if answers is None and parts.training:
        answers = remembered(parts.training)
    return None if answers is None else parts.once("training counts", lambda: NGrams(answers))


def simulated_ngram(parts: SimulationParts) -> Memory | None:
    counts = training_counts(parts)
    return Memory(counts, parts.pairs, streaming=False) if counts else None


def simulated_memory(parts: SimulationParts) -> Memory | None:
    counts = training_counts(parts)
    return Memory(counts, parts.pairs, parts.streaming) if counts else None


def live_counts(parts: LiveParts) -> NGrams:
    """A drafter's own counts: of the training answers, which all drafters share, and of earlier
    decodings.
    """
    counts = NGrams(before=parts.once("training counts", lambda: NGrams(parts.training_answers)))
    for answer in parts.verified_answers:
        counts.add(answer)
    return counts


def live_memory(parts: LiveParts) -> LiveMemory:
    return LiveMemory(live_counts(parts))


# --------------------------------------------------------------------------------------------- file
def save_memory(answers: Iterable[list[int]], path: Path) -> None:
    """Write the target answers that a memory begins with when it decodes, in their order."""
    answers = list(answers)
    target = np.array([token for answer in answers for token in answer], np.int32)
    start = np.cumsum([0, *map(len, answers)])

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, target=target, target_start=start, format=np.int32(FORMAT))

    write_whole(path, write)


def load_memory(path: Path) -> list[list[int]]:
    """The answers of save_memory as token lists: all, or the last that the limits of a memory
    allow.
    """
    check_plain(path)
    try:
        flat, start, number = _arrays(path)
    except Exception as error:      # a torn or hostile archive can raise nearly anything
        raise UserError(f"{path} is not the memory of a task: {error}; wanted a memory.npz of "
                        "training or decoding, or leave it out") from error
    check_format(path, number, FORMAT)
    count = number_remembered(np.diff(start))
    if count < len(start) - 1:
        log(f"memory | WARNING | {path} | the last {count} of {len(start) - 1} answers are used")
    return [flat[first:end].tolist() for first, end in itertools.pairwise(start[-count - 1:])]


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray, int | None]:
    """(all tokens int32, start of each answer and the end, format): checked before they are
    unpacked, and after.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES:,} bytes")
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > MAX_UNPACKED_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
    with np.load(path, allow_pickle=False) as arrays:
        flat, start = arrays["target"], arrays["target_start"]
        number = int(arrays["format"]) if "format" in arrays else None
    if (flat.dtype != np.int32 or flat.ndim != 1 or flat.min(initial=0) < 0
            or start.dtype.kind != "i" or start.ndim != 1 or (np.diff(start) < 0).any()
            or start[0] != 0 or start[-1] != len(flat)):
        raise ValueError("its arrays don't fit together")
    if (longest := np.diff(start).max(initial=0)) > MAX_ANSWER:
        raise ValueError(f"it holds an answer of {longest:,} tokens, more than {MAX_ANSWER:,}")
    if (largest := flat.max(initial=0)) >= MAX_VOCAB_SIZE:
        raise ValueError(f"it holds the token id {largest}, wanted ids below {MAX_VOCAB_SIZE}")
    return flat, start, number
