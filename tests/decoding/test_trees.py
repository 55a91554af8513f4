"""Decoding with trees of proposals says what plain decoding says, and needs the passes that
simulation foretells.
"""

import random

import numpy as np
import pytest
import torch

from acceptance.simulation import simulate_trees
from base import UserError
from decoding.limits import MAX_NODES, Limits, check_tree, limits_of
from decoding.loop import decode
from decoding.rules import Sampling
from drafting.contract import Costs, NoDrafts
from drafting.hybrid import LiveHybrid
from drafting.memory import LiveMemory
from drafting.ngrams import NGrams
from drafting.tree import Tree, build_tree
from machine.device import Runtime
from tests.conftest import ROOT
from tests.decoding.test_decoding import (
    EOS,
    PROMPTS,
    QUALITY,
    VOCABULARY,
    Automaton,
    Following,
    live,
    tiny,
    world,  # noqa: F401  (a fixture)
)
from vlm.steps import Prompted, Steps
from vlm.video_llava import VideoLlava


class Branched(Automaton):
    """The automaton over trees: each position is answered after its own path."""

    def _over(self, past: list[int], tokens: list[int], parents: list[int]) -> Following:
        assert parents[0] == -1 and all(0 <= parent < node
                                        for node, parent in enumerate(parents[1:], 1))
        paths: list[list[int]] = []
        for token, parent in zip(tokens, parents):
            paths.append([*(paths[parent] if parent >= 0 else past), token])
        self.start, self.paths = len(past), paths
        rows = [super(Branched, self)._after(path, 1).logits[0] for path in paths]
        logits = torch.stack(rows)
        return Following(logits.argmax(-1), logits)

    def prefill(self, proposed, parents=None):
        if parents is None:
            return super().prefill(proposed)
        return self._over(self.prompt[:-1], [self.prompt[-1], *proposed], parents)

    def verify(self, tokens, parents=None):
        return super().verify(tokens) if parents is None else self._over(self.fed, tokens, parents)

    def keep_path(self, path):
        assert path[0] == 0 and self.paths[path[-1]][self.start:] == [self.paths[node][-1] for node in path]
        self.fed = self.paths[path[-1]]


class Guessing(NoDrafts):
    """A tree of random shape: at each place some wrong tokens, duplicates too, and the right one
    with a chance.
    """

    def __init__(self, answer: list[int], seed: int, right: float):
        self.answer, self.random, self.right = answer, random.Random(seed), right

    def place_after(self, prefix):
        return list(prefix)

    def next_place(self, place, token):
        return [*place, token]

    def choices(self, place, reached, price, upcoming=None):
        tokens = [self.random.randrange(VOCABULARY + 3) for _ in range(self.random.randrange(4))]
        tokens += tokens[:1]
        if len(place) < len(self.answer) and self.random.random() < self.right:
            tokens.insert(self.random.randrange(len(tokens) + 1), self.answer[len(place)])
        return [(self.random.random(), token) for token in tokens]


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("nodes", [1, 2, 5, 16, 64])
def test_whatever_tree_is_proposed_the_answer_is_that_of_plain_decoding(nodes, right):
    """Never, sometimes and always right; EOS and the limit on any branch; ids that the target does
    not have.
    """
    for eos_every in (0, 1, 2, 5):
        target = Branched(eos_every, eos_every)
        for seed, prompt in enumerate(PROMPTS):
            for length in (1, 2, 7, 30):
                plain = target.plain(prompt, length)
                target.ask(prompt)
                decoded = decode(target, Guessing(plain, seed, right),
                                 Limits(length, (EOS, ), 1, nodes))
                assert decoded.tokens == plain
                assert sum(decoded.accepted) + len(decoded.accepted) >= len(plain)


def test_a_perfect_tree_needs_the_passes_of_a_perfect_chain():
    class Perfect(Guessing):
        def choices(self, place, reached, price, upcoming=None):
            return [(0.9, self.answer[len(place)]),
                    (0.1, 5)] if len(place) < len(self.answer) else []

    target = Branched(3, 0)
    plain = target.plain(PROMPTS[0], 30)
    target.ask(PROMPTS[0])
    decoded = decode(target, Perfect(plain, 0, 1.0), Limits(30, (EOS,), 1, 9))
    assert decoded.tokens == plain and len(decoded.accepted) <= 6


@pytest.mark.parametrize("quality", QUALITY)
def test_a_tree_that_is_a_chain_is_verified_as_a_chain(quality):
    """The target's own chain verbs run: nothing changes for targets that know no trees."""
    class Single(Guessing):
        def choices(self, place, reached, price, upcoming=None):
            token = self.answer[len(place)] if len(place) < len(self.answer) else 5
            return [(1.0, (token + QUALITY[quality](len(place))) % VOCABULARY)]

    target = Automaton(5, 5)
    plain = target.plain(PROMPTS[1], 12)
    target.ask(PROMPTS[1])
    assert decode(target, Single(plain, 0, 1.0), Limits(12, (EOS,), 1, 4)).tokens == plain


@pytest.mark.parametrize("kind", ["memory", "hybrid"])
@pytest.mark.parametrize("nodes", [1, 4, 16, 32])
def test_live_trees_need_the_passes_that_simulation_foretells(world, kind, nodes):  # noqa: F811
    _, training, test, prompts = world
    branched = Branched(7, 5)
    answers = list(training.answers("target"))

    def drafter():
        return LiveMemory(NGrams(answers)) if kind == "memory" else LiveHybrid(
            NGrams(answers), tiny("prefix"), 0.5)

    wanted = simulate_trees(drafter(), test, nodes)
    ours, passes, tokens = drafter(), 0, 0
    for prompt, draft, answer in zip(prompts, test.answers("draft"), test.answers("target")):
        ours.begin(draft, [])
        branched.ask(prompt)
        decoded = decode(branched, ours, Limits(12, (EOS,), 1, nodes))
        assert decoded.tokens == answer
        passes, tokens = passes + len(decoded.accepted), tokens + len(answer)
    assert tokens / passes == pytest.approx(wanted["tau"])
    chains = live(drafter(), world, min(nodes, 16))
    assert nodes < 16 or passes <= sum(len(run.accepted) for run in chains)


def test_a_node_that_is_not_worth_its_time_is_left_out(world):  # noqa: F811
    _, training, _, prompts = world
    memory = LiveMemory(NGrams(list(training.answers("target"))))
    memory.costs = Costs(node_s=0.001)
    target, sizes = Branched(7, 5), []
    # Tokens per second; from 1000 on no node is worth it
    for price in (0.0, 100.0, 500.0, 2000.0):
        target.ask(prompts[0])
        decoded = decode(target, memory, Limits(12, (EOS,), 1, 32), price=lambda price=price: price)
        sizes.append(max(decoded.proposed))
    assert sizes[0] > sizes[1] >= sizes[2] >= sizes[3] == 0


def test_the_path_goes_along_the_first_of_equal_siblings_and_ends_with_the_targets_own_token():
    tree = Tree([4, 4, 7, 8, 9], [-1, -1, 0, 1, 2])
    chosen = [4, 7, 8, 9, 1, 3]                          # after the prefix, then after each node
    assert tree.follow(chosen) == ([0, 2, 4], [4, 7, 9, 3]) and tree.depths() == [0, 1, 1, 2, 2, 3]
    assert Tree().follow([4]) == ([], [4])


@pytest.mark.parametrize("nodes", [1, 5, 24])
def test_a_sampled_answer_does_not_depend_on_the_tree(nodes):
    """One draw for each place in the answer: with trees as without proposals."""
    target = Branched(5, 5)
    for seed, prompt in enumerate(PROMPTS):
        target.ask(prompt)
        plain = decode(target, NoDrafts(), Limits(20, (EOS,), 1), rule=Sampling(1.3, 7)).tokens
        target.ask(prompt)
        decoded = decode(target, Guessing(plain, seed, 0.7), Limits(20, (EOS,), 1, nodes),
                         rule=Sampling(1.3, 7))
        assert decoded.tokens == plain and (nodes == 1 or any(decoded.accepted))


def test_ids_that_the_target_does_not_have_leave_the_tree_with_what_follows_them():
    tree = Tree([3, 99, 4, 5, -2, 6], [-1, -1, 1, 0, 3, 3])
    assert (tree.below(50).tokens, tree.below(50).parents) == ([3, 5, 6], [-1, 0, 1])
    assert tree.below(50).is_chain() and not Tree([1, 2], [-1, -1]).is_chain()


@pytest.mark.parametrize("nodes", [3, 24, 64])
def test_the_demo_target_says_its_own_words_whatever_tree_is_proposed(nodes):
    model = VideoLlava.load(ROOT / "demo" / "models" / "video_llava", Runtime.choose("cpu"))
    picture = np.random.default_rng(3).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    pixels, target = model.prepare([picture] * 8), None
    for question in ("What are the key elements in this scene?", "Why?"):
        embeds = model.prompt_embeds(pixels, question)
        target = target or Prompted(Steps(*model.decoder, room=embeds.shape[1] + 120))
        plain = model.answer([pixels], [question], 40)[0].tokens
        for eos in (model.tokenizer.eos_token_id, plain[6], plain[0]):
            wanted = plain[:plain.index(eos) + 1] if eos in plain else plain
            for limit in (len(wanted), 5):
                for seed, right in enumerate((0.0, 0.6, 1.0)):
                    target.ask(embeds)
                    decoded = decode(target, Guessing(wanted, seed, right),
                                     Limits(limit, (eos, ), 1, nodes))
                    assert decoded.tokens == wanted[:limit]


@pytest.mark.parametrize("tree", ["auto", "0", "1", "64"])
def test_values_of_the_flag(tree):
    check_tree(tree)
    assert limits_of("8", 5, (EOS,), tree).nodes == (MAX_NODES if tree == "auto" else int(tree))


@pytest.mark.parametrize("tree", ["65", "-1", "x", "3.5", ""])
def test_other_values_of_the_flag_are_one_clear_error(tree):
    with pytest.raises(UserError, match="--tree must be auto or from 0"):
        check_tree(tree)


def test_the_builder_takes_the_most_probable_nodes_first():
    class Table(NoDrafts):
        def place_after(self, prefix):
            return ()

        def next_place(self, place, token):
            return (*place, token)

        def choices(self, place, reached, price, upcoming=None):
            return {(): [(0.6, 1), (0.3, 2)], (1, ): [(0.4, 3), (0.35, 4)],
                    (2, ): [(0.9, 5)]}.get(place, [])

    tree = build_tree(Table(), [], 4)
    assert list(zip(tree.tokens, tree.parents)) == [(1, -1), (2, -1), (5, 1), (3, 0)]
