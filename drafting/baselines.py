"""Baselines: the draft's own tokens, a constant string, prompt lookup, and no proposals at all.

What a trained drafter must beat: copying shows what EventGPT's tokens are worth as they stand, the
constant string how much of an acceptance rate is template.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from drafting.contract import NOTHING, TOP, NoDrafts
from drafting.parts import LiveParts, SimulationParts
from drafting.tree import Sources, Tree
from pairs.pairs import Pairs


# --------------------------------------------------------------------------------------------- copy
def direct_copy(pairs: Pairs, width: int) -> np.ndarray:
    """(N, width) int32: the draft's own tokens as proposals; NOTHING past its end.

    Of drafts of another tokenizer their text in the target's tokens.
    """
    inside = np.arange(width) < pairs.lengths("copy")[:, None]
    return np.where(inside, pairs.padded("copy", width), NOTHING)


class Copy:
    """Simulated: the draft's own tokens; NOTHING past its end."""

    def __init__(self, pairs: Pairs):
        self.pairs, self.lengths = pairs, pairs.lengths("target")

    def predict(self, number: int) -> np.ndarray:
        proposals = np.full((self.lengths[number], TOP), NOTHING, np.int32)
        draft = self.pairs.answer("copy", number)[:len(proposals)]
        proposals[:len(draft), 0] = draft
        return proposals

    def learn(self, number: int) -> None:
        pass


class LiveCopy(NoDrafts):
    """Live: proposals by position, all known when the answer begins."""

    def __init__(self, translate: Callable[[list[int]], list[int]] | None = None) -> None:
        """translate: a draft -> the same text in the target's tokens; None: of one tokenizer."""
        self.table: list[int] = []
        self.translate = translate

    def begin(self, draft: list[int], question: Sequence[int] = ()) -> None:
        self.table = self.translate(draft) if self.translate else draft

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        ahead = self.table[len(prefix):len(prefix) + gamma]
        return list(itertools.takewhile(lambda token: token != NOTHING, ahead))

    def sources(self, prefix: list[int], proposed: Tree) -> Sources:
        return {"draft": [True] * len(proposed.tokens)}


# ---------------------------------------------------------------------------------- constant string
def commonest_tokens(training: Pairs, width: int) -> np.ndarray:
    """(width, TOP) int32: the commonest target tokens at each position, then NOTHING; column 0 is
    the string.
    """
    lengths = training.lengths("target")
    commonest = np.full((width, TOP), NOTHING, np.int32)
    for position in range(min(width, int(lengths.max()))):
        counts = np.bincount(training.target[training.target_start[lengths > position] + position])
        best = np.argsort(-counts, kind="stable")[:TOP]
        best = best[counts[best] > 0]
        commonest[position, :len(best)] = best
    return commonest


class Fixed:
    """Simulated: proposals (N, T, TOP) known before the first answer, or (T, TOP) the same for
    every clip.
    """

    def __init__(self, proposals: np.ndarray, pairs: Pairs):
        self.lengths = pairs.lengths("target")
        self.proposals = np.broadcast_to(proposals, (len(pairs), *proposals.shape[-2:]))

    def predict(self, number: int) -> np.ndarray:
        return self.proposals[number, :self.lengths[number]]

    def learn(self, number: int) -> None:
        pass


# ------------------------------------------------------------------------------------------- lookup
class LiveLookup(NoDrafts):
    """Prompt lookup (Saxena 2023): the tokens that followed the last tokens earlier in question and
    answer.
    """

    LONGEST = 3

    def __init__(self) -> None:
        self.question: list[int] = []

    def begin(self, draft: list[int], question: Sequence[int] = ()) -> None:
        self.question = list(question)

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        text = self.question + prefix
        for size in range(min(self.LONGEST, len(text) - 1), 0, -1):
            for at in range(len(text) - size - 1, -1, -1):
                if text[at:at + size] == text[-size:]:
                    return text[at + size:at + size + gamma]
        return []

    def sources(self, prefix: list[int], proposed: Tree) -> Sources:
        return {"prompt": [True] * len(proposed.tokens)}


# ---------------------------------------------------------------------------------------- factories
def simulated_copy(parts: SimulationParts) -> Copy | None:
    return Copy(parts.pairs) if parts.pairs.has_drafts else None


def simulated_constant(parts: SimulationParts) -> Fixed | None:
    if not parts.training:
        return None
    longest = int(parts.pairs.lengths("target").max())
    return Fixed(commonest_tokens(parts.training, longest), parts.pairs)


def live_none(parts: LiveParts) -> NoDrafts:
    return NoDrafts()


def live_copy(parts: LiveParts) -> LiveCopy:
    return LiveCopy(parts.translate)


def live_lookup(parts: LiveParts) -> LiveLookup:
    return LiveLookup()
