"""A tree of proposals: the tokens that are most likely to be reached, several where a drafter is
unsure.

One pass of the target verifies all nodes; the longest path of right nodes is accepted. A chain is a
single path. Simulation and the live loop both build trees by `build_tree`. OPT-Tree (Wang et al.
2024) and EAGLE-2 (Li et al. 2024) choose nodes by the same product of probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from drafting.contract import Drafter, Timer

MAX_DEPTH = 24                 # tokens on one path
MAX_CHILDREN = 6               # of one node
MEASURED_NODES = 32, 64        # of the trees that `seconds_per_node` compares

# (count) -> (place, probability that it is reached) of the most probable nodes that wait to be chosen
Upcoming = Callable[[int], list[tuple[Any, float]]]


def none_upcoming(count: int) -> list[tuple[Any, float]]:
    """Where no other place is known."""
    return []


@runtime_checkable
class Branching(Drafter, Protocol):
    """A live drafter that has second choices. A place is a point in an answer, in any form that the
    drafter likes.
    """

    def place_after(self, prefix: list[int]) -> Any:
        """The place after a verified prefix."""

    def next_place(self, place: Any, token: int) -> Any:
        """The place after one more token."""

    def choices(self, place: Any, reached: float, price: float,
                upcoming: Upcoming) -> list[tuple[float, int]]:
        """(probability, token) of at most MAX_CHILDREN next tokens, best first.

        reached: probability that the place is reached; price: tokens per second, as for
        `Drafter.propose`; upcoming: what else may be asked for soon, for drafters that work on
        several places at once.
        """


# Who proposed a node -> for each node the probability that it gave the token; True where it names a
# token without a probability, None where it had no say.
Sources = dict[str, list[float | bool | None]]


@runtime_checkable
class Attributing(Drafter, Protocol):
    """A live drafter that can tell who proposed what."""

    def sources(self, prefix: list[int], proposed: Tree) -> Sources:
        """Who proposed the nodes of a tree of the current answer, before the answer is learnt."""


@dataclasses.dataclass
class Tree:
    """Nodes in the order they were chosen: a parent stands before its children."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    # number of the parent node; -1: the prefix
    parents: list[int] = dataclasses.field(default_factory=list)
    # probability that the path up to it is right
    reached: list[float] = dataclasses.field(default_factory=list)
    # the drafter's place that each node follows; none in a chain that was proposed as such
    before: list[Any] = dataclasses.field(default_factory=list)

    @staticmethod
    def chain(tokens: list[int]) -> Tree:
        """A single path."""
        return Tree(list(tokens), list(range(-1, len(tokens) - 1)))

    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.tokens) - 1))

    def positions(self) -> list[int]:
        """For the last known token, position 0, and each node, at its number + 1: the position that
        it follows.
        """
        return [-1, *(parent + 1 for parent in self.parents)]

    def depths(self) -> list[int]:
        """Depth of position 0 and of each node: tokens of the path that ends there."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent + 1] + 1)
        return depths

    def follow(self, chosen: list[int]) -> tuple[list[int], list[int]]:
        """The path of nodes that the target would have chosen too, and their tokens with its own
        next token behind them. chosen: the target's token after position 0 and after each node.
        """
        children: dict[tuple[int, int], int] = {}
        for number, (token, parent) in enumerate(zip(self.tokens, self.parents)):
            children.setdefault((parent, token), number)
        path, tokens = [], [chosen[0]]
        node: int | None = children.get((-1, chosen[0]))
        while node is not None:
            path.append(node)
            tokens.append(chosen[node + 1])
            node = children.get((node, tokens[-1]))
        return path, tokens

    def below(self, vocab_size: int) -> Tree:
        """The tree without ids outside a vocabulary, and without what follows them."""
        if all(0 <= token < vocab_size for token in self.tokens):
            return self
        number, tree = {-1: -1}, Tree()
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents)):
            if 0 <= token < vocab_size and parent in number:
                number[node] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(number[parent])
                tree.before += self.before[node:node + 1]
        return tree

    def paths(self, prefix: list[int]) -> list[list[int]]:
        """For each node, the prefix and the tokens of the path before it."""
        paths: list[list[int]] = []
        for parent in self.parents:
            paths.append([*paths[parent], self.tokens[parent]] if parent >= 0 else prefix)
        return paths

    def accepted(self, answer: list[int]) -> int:
        """Length of the longest path of nodes that an answer begins with."""
        depth_of = {-1: 0}                                             # right nodes -> their depth
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents)):
            depth = depth_of.get(parent)
            if depth is not None and depth < len(answer) and answer[depth] == token:
                depth_of[node] = depth + 1
        return max(depth_of.values())

    def depth(self) -> int:
        """Tokens of the longest path."""
        return max(self.depths())


def seconds_per_node(drafter: Branching, prefix: list[int], timer: Timer) -> float:
    """Seconds of one node more in a large tree. The last nodes cost least: nothing follows them."""
    few, many = MEASURED_NODES
    added = len(build_tree(drafter, prefix, many).tokens) - few
    if added <= 0:
        return 0.0
    seconds = [timer(functools.partial(build_tree, drafter, prefix, count)) for count in MEASURED_NODES]
    return max(0.0, seconds[1] - seconds[0]) / added


def build_tree(drafter: Branching, prefix: list[int], nodes: int, depth: int = MAX_DEPTH,
               price: float = 0.0, least: float = 0.0) -> Tree:
    """The `nodes` tokens that are most likely to be reached after the prefix, by the drafter's own
    probabilities.

    One node is expanded at a time, the most probable first: expanding several together fills the
    tree with unlikely siblings and loses all of the gain. least: nodes that are reached with less
    probability are left out.
    """
    tree, heap = Tree(), []                 # heap: nodes that wait to be chosen
    numbers = itertools.count()              # of nodes of equal probability the older comes first
    places: dict[int, Any] = {}              # of nodes that wait, by number: those made already

    def expand(place: Any, node: int, reached: float, level: int) -> None:
        for probability, token in drafter.choices(place, reached, price, upcoming):
            if reached * probability < least:
                break
            heapq.heappush(heap, (-reached * probability, next(numbers), node, token, place, level))

    def upcoming(count: int) -> list[tuple[Any, float]]:
        return [(place_of(number, token, before), -negative)
                for negative, number, _, token, before, _ in heapq.nsmallest(count, heap)]

    def place_of(number: int, token: int, before: Any) -> Any:
        if number not in places:
            places[number] = drafter.next_place(before, token)
        return places[number]

    expand(drafter.place_after(prefix), -1, 1.0, 1)
    while heap and len(tree.tokens) < nodes:
        negative, number, parent, token, before, level = heapq.heappop(heap)
        if not negative:
            break
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.reached.append(-negative)
        tree.before.append(before)
        if level < depth and len(tree.tokens) < nodes:
            expand(place_of(number, token, before), len(tree.tokens) - 1, -negative, level + 1)
    return tree
