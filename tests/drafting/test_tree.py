"""A tree holds the most probable nodes, and is worth what the longest right path in it is worth."""

import itertools

import numpy as np
import pytest

from acceptance.simulation import simulate, simulate_trees, stream
from drafting import memory as memory_module
from drafting.memory import LiveMemory, Memory
from drafting.ngrams import NGrams
from drafting.tree import Tree, build_tree
from tests.acceptance.builders import pairs_of
from tests.drafting.test_ngrams import answers


class Dice:
    """A drafter whose probabilities hang on the last token alone; token 0 has no continuation."""

    def __init__(self, seed: int, tokens: int = 4):
        self.chances = np.random.default_rng(seed).dirichlet(np.ones(tokens), tokens)

    def place_after(self, prefix: list[int]) -> int:
        return prefix[-1]

    def next_place(self, place: int, token: int) -> int:
        return token

    def choices(self, place: int, reached: float, price: float, upcoming) -> list[tuple[float, int]]:
        row = self.chances[place]
        return sorted(((float(row[token]), token)
                       for token in range(len(row))), reverse=True) if place else []


def every_path(dice: Dice, first: int, depth: int) -> list[float]:
    """Probabilities of all paths of up to so many tokens."""
    values = []
    for length in range(1, depth + 1):
        for path in itertools.product(range(4), repeat=length):
            places = [first, *path]
            if 0 not in places[:-1]:
                values.append(np.prod([dice.chances[a][b] for a, b in itertools.pairwise(places)]))
    return sorted(values, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_the_nodes_are_the_most_probable_paths_of_all(seed):
    dice = Dice(seed)
    tree = build_tree(dice, [3], 12, depth=5)
    assert tree.reached == pytest.approx(every_path(dice, 3, 5)[:12])
    assert all(parent < node for node, parent in enumerate(tree.parents)) and tree.depth() <= 5
    assert build_tree(dice, [0], 12).tokens == []
    assert len(build_tree(dice, [3], 200, depth=2).tokens) <= 4 + 16
    least = build_tree(dice, [3], 50, depth=5, least=0.1)
    assert least.tokens == [] or min(least.reached) >= 0.1


def test_accepted_is_the_longest_right_path_also_among_equal_siblings():
    tree = Tree([5, 6, 7, 5, 8, 9, 8], [-1, 0, 1, -1, 3, 0, 5])
    for answer, length in (([5, 6, 7, 1], 3), ([5, 8, 8], 2), ([5, 9, 8, 8], 3), ([6], 0), ([], 0),
                           ([5], 1)):
        assert tree.accepted(answer) == length


def test_a_tree_without_branches_is_worth_what_a_chain_is_worth(monkeypatch):
    rows = answers(40, 2)
    pairs, training = pairs_of(rows, rows), NGrams(answers(40, 1))
    hits = stream(Memory(training, pairs), pairs)["top1"]
    wide = simulate_trees(LiveMemory(NGrams(before=training)), pairs, 8)
    monkeypatch.setattr(memory_module, "MAX_CHILDREN", 1)
    chain = simulate_trees(LiveMemory(NGrams(before=training)), pairs, 8)
    assert chain["tau"] == pytest.approx(simulate(hits, pairs.lengths("target"), 8)["tau"], rel=0.03)
    assert chain["depth"] <= 8 < simulate_trees(LiveMemory(NGrams(before=training)), pairs, 16)["depth"]
    assert 1 < wide["nodes"] <= 8
