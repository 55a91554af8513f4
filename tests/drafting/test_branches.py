"""Reading a tree with the adapter, several nodes as one step, gives what reading each path alone
gives."""

import random

import pytest
import torch

from drafting.adapter import LiveAdapter
from drafting.branches import NOTHING_TO_SAY, Branch, BranchSteps
from drafting.hybrid import LiveHybrid
from drafting.ngrams import NGrams
from drafting.steps import AdapterSteps
from drafting.tree import build_tree
from token_adapter import AdapterConfig, TokenAdapter

VOCAB_SIZE, LONGEST = 40, 24
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                                reason="needs a GPU"))]


def random_adapter(conditioning: str, device: str = "cpu") -> TokenAdapter:
    torch.manual_seed(7)
    config = AdapterConfig(VOCAB_SIZE, conditioning, embed_dim=32, num_layers=2, num_heads=4,
                           feedforward_dim=64, max_seq_len=LONGEST)
    return TokenAdapter(config).eval().to(device)


def path_of(branch: Branch) -> list[int]:
    path = []
    while branch.above is not None:
        path.append(branch.token)
        branch = branch.above
    return path[::-1]


def assert_same(row, wanted, tolerance: float) -> None:
    """Equal probabilities, and equal ids where neighbours are further apart than rounding."""
    assert row[1] == pytest.approx(wanted[1], abs=tolerance)
    for at, (ours, theirs) in enumerate(zip(*map(list, (row[0], wanted[0])))):
        near = any(abs(wanted[1][at] - other) < 2 * tolerance
                   for other in wanted[1][max(0, at - 1):at] + wanted[1][at + 1:at + 2])
        assert ours == theirs or near or at == len(row[0]) - 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("conditioning", ["prefix", "prefix+draft"])
def test_nodes_read_together_in_any_order_say_what_their_paths_say(conditioning, device):
    adapter = random_adapter(conditioning, device)
    tolerance = 1e-6 if device == "cpu" else 0.02                # a GPU proposes in bfloat16
    rng = random.Random(3)
    steps, single = AdapterSteps(adapter), AdapterSteps(adapter)
    branches = BranchSteps(steps)
    for draft in ([5, 6, 7], []):
        steps.begin(draft), single.begin(draft)
        prefix: list[int] = []
        while len(prefix) < LONGEST - 4:
            nodes = [branches.open(prefix)]
            for _ in range(25):
                above = rng.choice(nodes)
                if above.tokens < LONGEST - 1:
                    nodes.append(branches.below(above, rng.randrange(VOCAB_SIZE)))
            rng.shuffle(nodes)
            batch = [node for node in nodes if node.can_follow][:rng.randrange(1, 20)]
            while batch:
                count = rng.randrange(1, 6)
                branches.read(batch[:count])
                batch = batch[count:]
            for node in nodes:
                if node.row is not None:
                    assert_same(node.row, single.after(prefix + path_of(node))[0], tolerance)
            if rng.random() < 0.3:             # a chain between trees finds the same cache
                assert_same(steps.after(prefix, 2)[0], single.after(prefix, 2)[0], tolerance)
            prefix = prefix + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 5))]


def test_where_no_slot_is_left_the_adapter_says_nothing():
    branches = BranchSteps(AdapterSteps(random_adapter("prefix")))
    branches.steps.begin([])
    root = branches.open([3])
    nodes = [branches.below(root, token % VOCAB_SIZE) for token in range(400)]
    branches.read(nodes[:200]), branches.read(nodes[200:])
    assert nodes[0].row[0] and nodes[-1].row == NOTHING_TO_SAY


def test_a_node_past_the_longest_answer_or_of_an_unknown_token_cant_be_followed():
    branches = BranchSteps(AdapterSteps(random_adapter("prefix")))
    branches.steps.begin([])
    root = branches.open([3] * (LONGEST - 2))
    last = branches.below(root, 4)
    assert root.can_follow and last.can_follow and not branches.below(last, 4).can_follow
    unknown = branches.below(root, VOCAB_SIZE)
    assert not unknown.can_follow and not branches.below(unknown, 1).can_follow


def test_a_token_that_makes_nans_costs_its_own_tree_alone():
    adapter = random_adapter("prefix")
    with torch.no_grad():
        adapter.embedding.weight[9] = torch.nan
    # tied to the embedding, the output layer would make every row NaN
    adapter.output_proj[1].weight = torch.nn.Parameter(random_adapter("prefix").embedding.weight.clone())
    steps = AdapterSteps(adapter)
    branches = BranchSteps(steps)
    steps.begin([])
    root = branches.open([3])
    branches.read([branches.below(root, 9)])
    good = branches.below(root, 4)
    branches.read([good])
    assert good.row == NOTHING_TO_SAY
    good = branches.below(branches.open([3]), 4)
    branches.read([good])
    fine = AdapterSteps(random_adapter("prefix"))
    fine.begin([])
    assert_same(good.row, fine.after([3, 4])[0], 1e-6)


@pytest.mark.parametrize("conditioning", ["prefix", "prefix+draft"])
@pytest.mark.parametrize("kind", ["adapter", "hybrid"])
def test_looking_ahead_changes_no_tree(conditioning, kind, monkeypatch):
    rng = random.Random(1)
    answers = [[rng.randrange(4, 9) for _ in range(12)] for _ in range(6)]
    trees = []
    for ahead in (0, 6):
        monkeypatch.setattr(f"drafting.{kind}.LOOK_AHEAD", ahead)
        adapter = random_adapter(conditioning)
        drafter = LiveAdapter(adapter) if kind == "adapter" else LiveHybrid(NGrams(answers), adapter, 0.5)
        drafter.begin([5, 6])
        calls = count_steps(drafter.branches)
        trees.append([build_tree(drafter, answers[0][:at], 24, 8) for at in (0, 1, 4, 9)])
        trees[-1].append(calls)
    *without, more_calls = trees[0]
    *ahead, calls = trees[1]
    assert [tree.tokens for tree in ahead] == [tree.tokens for tree in without]
    assert [tree.parents for tree in ahead] == [tree.parents for tree in without]
    assert len(calls) < len(more_calls)


def count_steps(branches: BranchSteps) -> list[int]:
    calls, step = [], branches._step
    branches._step = lambda nodes: calls.append(len(nodes)) or step(nodes)
    return calls
