"""The hybrid: memory and adapter mixed. The adapter runs only where the memory is unsure.

Adapter and memory err at different tokens: on real pairs the mixture is right more often than
either of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from base import log
from drafting.adapter import Adapter, adapter_passes, chance
from drafting.branches import LOOK_AHEAD, NOTHING_TO_SAY, Branch, BranchSteps, Row
from drafting.contract import NOTHING, TOP, Costs, Timer, seconds_per_token
from drafting.memory import (
    LiveMemory,
    Memory,
    live_counts,
    live_memory,
    simulated_memory,
    top_of,
    with_tempered_best,
)
from drafting.ngrams import NGrams, State
from drafting.parts import LiveParts, SimulationParts
from drafting.steps import AdapterSteps
from drafting.tree import MAX_CHILDREN, Sources, Tree, Upcoming, none_upcoming, seconds_per_node
from drafting.worth import StepWorth
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
    """A place in a tree: the state of the memory, and the node as the adapter reads it, made when it
    is first asked for."""

    __slots__ = ("_branch", "above", "memory", "state", "token")

    def __init__(self, state: State, above: Place | None, token: int, branch: Branch | None = None):
        """token: follows the place above; the root has its branch from the beginning."""
        self.state, self.above, self.token, self._branch = state, above, token, branch
        # the memory's (probability, token), best first; looked up once
        self.memory: list[tuple[float, int]] | None = None

    @property
    def row(self) -> Row | None:
        """What the adapter said there; None where it was not asked."""
        return self._branch.row if self._branch is not None else None

    def branch(self, branches: BranchSteps) -> Branch:
        if self._branch is None:
            assert self.above is not None
            self._branch = branches.below(self.above.branch(branches), self.token)
        return self._branch


def best_of(distribution: dict[int, float]) -> list[int]:
    """The most probable token; [] where there is none."""
    return [max(distribution, key=distribution.__getitem__)] if distribution else []


class LiveHybrid(LiveMemory):
    """Live: chains and trees like the memory's. The adapter runs where the memory is unsure enough to
    be worth a step.
    """

    def __init__(self, ngrams: NGrams, adapter: TokenAdapter, share: float):
        super().__init__(ngrams)
        self.share, self.steps = share, AdapterSteps(adapter)
        self.branches = BranchSteps(self.steps)
        self.worth, self.read_s = StepWorth(), 0.0
        self.chained: dict[tuple[int, ...], Row] = {}      # tokens -> the row asked for in a chain

    def begin(self, draft: list[int], question: Sequence[int] = ()) -> None:
        self.steps.begin(draft)
        self.worth.opinions.clear()
        self.chained = {}

    def forget(self) -> None:
        super().forget()
        self.worth = StepWorth()

    # ----------------------------------------------------------------------------------- as a chain
    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        self.worth.settle(prefix)
        return super().propose(prefix, gamma, price)

    def distribution(self, tokens: list[int], state: State, reached: float,
                     price: float) -> dict[int, float]:
        memory = self.ngrams.distribution_at(state)
        doubt = 1 - max(memory.values(), default=0.0)
        if doubt <= 1 - SURE or not self.steps.can_follow(tokens):
            return memory
        if not self.worth.pays(reached * doubt, self.costs.adapter_step_s * price):
            return memory
        ids, probabilities = self.chained[tuple(tokens)] = self.steps.after(tokens)[0]
        if not ids:
            return memory
        mixture = mixed(ids, probabilities, memory, self.share)
        known = list(tokens)
        self.worth.add(len(known), lambda: known, reached * doubt, best_of(memory), best_of(mixture))
        return mixture

    # ------------------------------------------------------------------------------------ as a tree
    def place_after(self, prefix: list[int]) -> Place:
        self.worth.settle(prefix)
        return Place(self.ngrams.at(prefix), None, NOTHING, self.branches.open(prefix))

    def next_place(self, place: Place, token: int) -> Place:
        return Place(self.ngrams.after(place.state, token), place, token)

    def choices(self, place: Place, reached: float, price: float,
                upcoming: Upcoming = none_upcoming) -> list[tuple[float, int]]:
        memory = self._remembered(place)
        if self._doubt(place) <= 1 - SURE:
            return with_tempered_best(memory[:MAX_CHILDREN])
        branch = place.branch(self.branches)
        if branch.row is None and branch.can_follow:
            self._read(place, reached, price, upcoming)
        ids, probabilities = branch.row or NOTHING_TO_SAY
        if not ids:
            return with_tempered_best(memory[:MAX_CHILDREN])
        mixture = mixed(ids, probabilities, {token: known for known, token in memory}, self.share)
        tokens = heapq.nlargest(MAX_CHILDREN, mixture, key=mixture.__getitem__)
        self.worth.add(branch.tokens, lambda: self.branches.path(branch), 0.0,
                       [token for _, token in memory[:MAX_CHILDREN]], tokens)
        return with_tempered_best([(mixture[token], token) for token in tokens])

    def _remembered(self, place: Place) -> list[tuple[float, int]]:
        if place.memory is None:
            place.memory = self.ngrams.best(place.state, MEMORY_CHOICES)
        return place.memory

    def _doubt(self, place: Place) -> float:
        """Probability that the memory's best token is wrong there."""
        memory = self._remembered(place)
        return 1 - memory[0][0] if memory else 1.0

    def _read(self, place: Place, reached: float, price: float, upcoming: Upcoming) -> None:
        """Ask the adapter about a place, and about others that may be next, where that pays."""
        asked, doubt = [place.branch(self.branches)], reached * self._doubt(place)
        for other, probability in upcoming(LOOK_AHEAD):
            if self._doubt(other) > 1 - SURE:
                branch = other.branch(self.branches)
                if branch.row is None and branch.can_follow:
                    asked.append(branch)
                    doubt += probability * self._doubt(other)
        if self.worth.pays(doubt, self.read_s * price):
            self.worth.asked += doubt
            self.branches.read(asked)
        else:
            asked[0].row = NOTHING_TO_SAY

    def learn(self, answer: list[int]) -> None:
        self.worth.settle(answer)
        self.worth.fade()
        super().learn(answer)

    def sources(self, prefix: list[int], proposed: Tree) -> Sources:
        rows = [place.row for place in proposed.before] or [
            self.chained.get(tuple(path)) for path in proposed.paths(prefix)]
        return {**super().sources(prefix, proposed),
                "adapter": [chance(row, token) for row, token in zip(rows, proposed.tokens)]}

    def measure(self, draft: list[int], question: Sequence[int], answer: list[int], timer: Timer,
                verify_s: float = 0.0) -> Costs:
        """token_s is that of the memory alone: the adapter's steps are weighed one by one."""
        memory = LiveMemory(self.ngrams)
        token_s = seconds_per_token(memory, draft, question, answer, timer) + verify_s
        step_s = self.steps.measure_step(draft, answer, timer)
        self.costs = Costs()                                 # measured unhindered by earlier costs
        proposal_s = seconds_per_token(self, draft, question, answer, timer)
        node_s = seconds_per_node(memory, answer, timer) + verify_s
        self.costs = Costs(proposal_s, token_s, step_s, node_s)
        self.read_s = self._measure_read(draft, answer, timer)
        self.worth = StepWorth()
        return self.costs

    def _measure_read(self, draft: list[int], answer: list[int], timer: Timer) -> float:
        """Seconds of asking the adapter about some places of a tree, what is made of it included."""
        if not self.steps.can_follow([*answer, 0]):
            return 0.0

        def read() -> None:
            root = self.place_after(answer)
            places = [self.next_place(root, token) for token in range(LOOK_AHEAD)]
            nodes = [place.branch(self.branches) for place in places]
            self.branches.read([node for node in nodes if node.can_follow])
            for place in places:
                self.choices(place, 1.0, 0.0)

        self.begin(draft)
        return timer(read)


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
