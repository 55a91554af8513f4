"""The hybrid: memory and adapter mixed. The adapter runs only where the memory is unsure.

Adapter and memory err at different tokens: on real pairs the mixture is right more often than
either of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from base import log
from drafting.adapter import Adapter, adapter_passes
from drafting.contract import NOTHING, TOP, Costs, Timer, seconds_per_token
from drafting.memory import LiveMemory, Memory, live_counts, live_memory, simulated_memory, top_of
from drafting.ngrams import NGrams, State
from drafting.parts import LiveParts, SimulationParts
from drafting.steps import AdapterSteps
from drafting.tree import MAX_CHILDREN
from token_adapter import TokenAdapter

# candidates for the memory's share; the run's own validation chooses
MEMORY_SHARES = (0.3, 0.5, 0.7)
SURE = 0.7  # probability from which the memory's best token is taken without the adapter
MEMORY_CHOICES = 16  # tokens of the memory that a node of a tree mixes with the adapter's


def mixed(ids: list[int], probabilities: list[float], memory: dict[int, float],
          share: float) -> dict[int, float]:
    """{token: (1 - share) x the adapter's probability + share x the memory's}."""
    mixture = dict(zip(ids, ((1 - share) * probability for probability in probabilities)))
    for token, probability in memory.items():
        mixture[token] = mixture.get(token, 0.0) + share * probability
    return mixture


class Hybrid:
    """Simulated."""

    def __init__(self, adapter: Adapter, memory: Memory, share: float):
        self.adapter, self.memory, self.share = adapter, memory, share

    def predict(self, number: int) -> np.ndarray:
        target = self.memory.pairs.answer("target", number)
        ids, probabilities = (array.tolist() for array in self.adapter.best(number))
        proposals = np.full((len(target), TOP), NOTHING, np.int32)
        for at, distribution in enumerate(self.memory.distributions(number)):
            if at < len(ids) and max(distribution.values(), default=0) < SURE:
                distribution = mixed(ids[at], probabilities[at], distribution, self.share)
            proposals[at] = top_of(distribution)
        return proposals

    def learn(self, number: int) -> None:
        self.adapter.learn(number)
        self.memory.learn(number)


class LiveHybrid(LiveMemory):
    """Live: a chain like the memory's. The adapter runs where the memory is unsure enough to be
    worth one step.
    """

    def __init__(self, ngrams: NGrams, adapter: TokenAdapter, share: float):
        super().__init__(ngrams)
        self.share, self.steps = share, AdapterSteps(adapter)

    def begin(self, draft: list[int], question: Sequence[int] = ()) -> None:
        self.steps.begin(draft)

    def distribution(self, tokens: list[int], state: State, reached: float,
                     price: float) -> dict[int, float]:
        memory = self.ngrams.distribution_at(state)
        sure = max(memory.values(), default=0)
        ids, probabilities = self.second_opinion(tokens, sure, reached, price)
        return mixed(ids, probabilities, memory, self.share) if ids else memory

    def second_opinion(self, tokens: list[int], sure: float, reached: float,
                       price: float) -> tuple[list[int], list[float]]:
        """The adapter's ids and probabilities after these tokens; empty where a step isn't worth
        its time.

        sure: probability of the memory's best token: the adapter wins tokens only where the memory
        fails.
        """
        doubt = 1 - sure
        worth_a_step = doubt > 1 - SURE and reached * doubt >= self.costs.adapter_step_s * price
        if not worth_a_step or not self.steps.can_follow(tokens):
            return [], []
        return self.steps.after(tokens)[0]

    def place_after(self, prefix: list[int]) -> Any:
        return self.ngrams.at(prefix), prefix

    def next_place(self, place: Any, token: int) -> Any:
        state, tokens = place
        return self.ngrams.after(state, token), [*tokens, token]

    def choices(self, place: Any, reached: float, price: float) -> list[tuple[float, int]]:
        state, tokens = place
        memory = self.ngrams.best(state, MEMORY_CHOICES)
        sure = memory[0][0] if memory else 0.0
        ids, probabilities = self.second_opinion(tokens, sure, reached, price)
        if not ids:
            return memory[:MAX_CHILDREN]
        remembered = {token: probability for probability, token in memory}
        mixture = mixed(ids, probabilities, remembered, self.share)
        best = heapq.nlargest(MAX_CHILDREN, mixture, key=mixture.__getitem__)
        return [(mixture[token], token) for token in best]

    def measure(self, draft: list[int], question: Sequence[int], answer: list[int], timer: Timer,
                verify_s: float = 0.0) -> Costs:
        """token_s is that of the memory alone: the adapter's steps are weighed one by one."""
        memory = LiveMemory(self.ngrams)
        token_s = seconds_per_token(memory, draft, question, answer, timer) + verify_s
        step_s = self.steps.measure_step(draft, answer, timer)
        self.costs = Costs()                                 # measured unhindered by earlier costs
        self.costs = Costs(seconds_per_token(self, draft, question, answer, timer), token_s, step_s)
        return self.costs


def simulated_hybrid(parts: SimulationParts) -> Hybrid | Memory | None:
    """Where a share was chosen. With an adapter in draft conditioning the memory alone, as live."""
    if "hybrid" in parts.memory_share and not parts.adapter.config.sees_prefix:
        return simulated_memory(parts)
    return _simulated(parts, "hybrid", adapter_passes(parts))


def simulated_online(parts: SimulationParts) -> Hybrid | None:
    if not parts.online:
        return None
    return _simulated(parts, "hybrid, online", adapter_passes(parts, online=True))


def _simulated(parts: SimulationParts, name: str, adapter: Adapter) -> Hybrid | None:
    memory = simulated_memory(parts)
    if name not in parts.memory_share or memory is None or not parts.adapter.config.sees_prefix:
        return None
    return Hybrid(adapter, memory, parts.memory_share[name])


def live_hybrid(parts: LiveParts) -> LiveMemory:
    """An adapter in draft conditioning can't follow a prefix: the memory alone then."""
    assert parts.adapter is not None
    if not parts.adapter.config.sees_prefix:
        log("decode | hybrid | an adapter in draft conditioning knows nothing of the prefix: "
            "memory alone")
        return live_memory(parts)
    return LiveHybrid(live_counts(parts), parts.adapter, parts.memory_share)
