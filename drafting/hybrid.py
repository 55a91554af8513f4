"""The hybrid: memory and adapter mixed. The adapter runs only where the memory is unsure.

Adapter and memory err at different tokens: on real pairs the mixture is right more often than
either of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from base import log
from drafting.adapter import Adapter, adapter_passes
from drafting.branches import LOOK_AHEAD, Branch, BranchSteps
from drafting.contract import NOTHING, TOP, Costs, Timer, seconds_per_token
from drafting.memory import LiveMemory, Memory, live_counts, live_memory, simulated_memory, top_of
from drafting.ngrams import NGrams, State
from drafting.parts import LiveParts, SimulationParts
from drafting.steps import AdapterSteps
from drafting.tree import MAX_CHILDREN, Upcoming, none_upcoming
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


class Place:
    """A place in a tree: the state of the memory, the node as the adapter reads it."""

    __slots__ = ("branch", "memory", "state")

    def __init__(self, state: State, branch: Branch):
        self.state, self.branch = state, branch
        self.memory: list[tuple[float, int]] | None = None

    def memory_choices(self, ngrams: NGrams) -> list[tuple[float, int]]:
        """The memory's (probability, token), best first; looked up once."""
        if self.memory is None:
            self.memory = ngrams.best(self.state, MEMORY_CHOICES)
        return self.memory


class LiveHybrid(LiveMemory):
    """Live: chains and trees like the memory's. The adapter runs where the memory is unsure enough to
    be worth a step.
    """

    def __init__(self, ngrams: NGrams, adapter: TokenAdapter, share: float):
        super().__init__(ngrams)
        self.share, self.steps = share, AdapterSteps(adapter)
        self.branches = BranchSteps(self.steps)

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
        if not self.is_worth_a_step(1 - sure, reached, price) or not self.steps.can_follow(tokens):
            return [], []
        return self.steps.after(tokens)[0]

    def is_worth_a_step(self, doubt: float, reached: float, price: float) -> bool:
        return doubt > 1 - SURE and reached * doubt >= self.costs.adapter_step_s * price

    def place_after(self, prefix: list[int]) -> Place:
        return Place(self.ngrams.at(prefix), self.branches.open(prefix))

    def next_place(self, place: Place, token: int) -> Place:
        return Place(self.ngrams.after(place.state, token), self.branches.below(place.branch, token))

    def choices(self, place: Place, reached: float, price: float,
                upcoming: Upcoming = none_upcoming) -> list[tuple[float, int]]:
        memory = place.memory_choices(self.ngrams)
        if place.branch.row is None and self.wants_step(place, reached, price):
            others = [other.branch for other, chance in upcoming(LOOK_AHEAD)
                      if other.branch.row is None and self.wants_step(other, chance, price)]
            self.branches.read([place.branch, *others])
        if place.branch.row is None or not place.branch.row[0]:
            return memory[:MAX_CHILDREN]
        remembered = {token: probability for probability, token in memory}
        mixture = mixed(*place.branch.row, remembered, self.share)
        best = heapq.nlargest(MAX_CHILDREN, mixture, key=mixture.__getitem__)
        return [(mixture[token], token) for token in best]

    def wants_step(self, place: Place, reached: float, price: float) -> bool:
        """Whether the memory is unsure enough there for a step of the adapter."""
        if not place.branch.can_follow:
            return False
        memory = place.memory_choices(self.ngrams)
        return self.is_worth_a_step(1 - (memory[0][0] if memory else 0.0), reached, price)

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
