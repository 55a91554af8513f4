"""What a step of the adapter is worth beside the memory, learnt while decoding.

A step pays where the adapter's opinion makes more of the next tokens right than the memory alone
would have. How often that happens depends on the stream and on how much the memory knows by now, so
it is counted: tokens that were accepted because of the adapter, for each unit of doubt it was asked
about.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

PRIOR = 1.0                    # units of doubt that count as one token each before anything is known
FADING = 0.97                  # of what earlier answers told, for each answer
EXPLORED = 64                  # in one pass of so many every step is taken, so that the count goes on


class StepWorth:
    """Tokens won for each unit of doubt; doubt: reached x (1 - the memory's best probability)."""

    def __init__(self) -> None:
        self.won = self.asked = PRIOR
        self.passes = 0
        self.opinions: list[tuple[int, Callable[[], list[int]], Collection[int], Collection[int]]] = []

    def pays(self, doubt: float, cost: float) -> bool:
        """Whether steps about so much doubt bring more than `cost` tokens, the tokens that could be
        decoded in their time; 0: always."""
        explores = self.passes % EXPLORED == EXPLORED - 1
        return explores or doubt * max(self.won, 0.0) >= cost * self.asked

    def add(self, tokens: int, path: Callable[[], list[int]], doubt: float, memory: Collection[int],
            mixture: Collection[int]) -> None:
        """The adapter was asked after the path of so many tokens; memory, mixture: the next tokens
        proposed without and with it."""
        self.asked += doubt
        self.opinions.append((tokens, path, memory, mixture))

    def settle(self, verified: list[int]) -> None:
        """Count what the opinions since the last call were worth. verified: the answer so far, whose
        last token is the target's own."""
        accepted = len(verified) - 1
        for tokens, path, memory, mixture in self.opinions:
            if tokens > accepted or path() != verified[:tokens]:
                continue
            token = verified[tokens]
            if token in mixture and token not in memory:
                self.won += accepted - tokens
            elif token in memory and token not in mixture:
                self.won -= 1
        self.opinions.clear()
        self.passes += 1

    def fade(self) -> None:
        """An answer has ended."""
        self.won *= FADING
        self.asked *= FADING
