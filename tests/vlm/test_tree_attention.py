"""A pass over a tree says of each node what a pass over its path alone says, and keeps just the
path it is told to.
"""

import random

import pytest
import torch

from tests.vlm.test_steps import (
    ANSWER,
    PROMPT,
    VARIANTS,
    VOCAB,
    alike,
    logits_of,
    needs_gpu,
    started,
    tiny_llama,
)
from vlm import tree_attention
from vlm.llama import NO_NUMBER
from vlm.tree_attention import MAX_NODES, TreeAttention, ancestors_of, attend_plain, depths_of, visibility

CHAIN, STAR = [-1, 0, 1, 2, 3], [-1, 0, 0, 0, 0]


def random_tree(nodes: int, seed: int) -> list[int]:
    choose = random.Random(seed)
    return [-1, *(choose.randrange(position) for position in range(1, nodes))]


def path_to(node: int, parents: list[int]) -> list[int]:
    path = [node]
    while path[0]:
        path.insert(0, parents[path[0]])
    return path


TREES = [[-1], [-1, 0], CHAIN, STAR, [-1, 0, 1, 0, 3, 2, 2], *(random_tree(24, seed) for seed in range(4))]


def test_ancestors_and_depths_by_hand():
    parents = [-1, 0, 1, 0, 3, 2, 2]
    assert depths_of(parents) == [0, 1, 2, 1, 2, 3, 3]
    assert ancestors_of(parents) == [0, 0b1, 0b11, 0b100, 0b1100, 0b10011, 0b100011]
    full = ancestors_of(list(range(-1, MAX_NODES)))
    assert len(full) == 65 and full[-1] == -1 and full[-2] == 2**63 - 1


def test_visibility_shows_the_past_the_path_and_nothing_else():
    mask = visibility(torch.tensor([3]), torch.tensor(ancestors_of([-1, 0, 0, 2])),
                      torch.arange(80), torch.float32)
    assert [(row == 0).nonzero()[:, 0].tolist() for row in mask] == [
        [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5, 6]]


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def llama(request):
    return tiny_llama(**request.param)


@pytest.mark.parametrize("parents", TREES, ids=len)
def test_each_node_of_a_tree_is_answered_as_the_end_of_its_own_path(llama, parents):
    steps, tokens = started(llama), [(7 * node + 5) % VOCAB for node in range(len(parents))]
    following = steps.verify(tokens, parents)
    for node in range(len(parents)):
        path = [tokens[step] for step in path_to(node, parents)]
        reference = logits_of(llama, PROMPT + path)[-1:]
        assert alike(following.logits[node:node + 1], reference)
        assert following.best[node] == reference.argmax()


@pytest.mark.parametrize("parents", TREES, ids=len)
def test_the_path_that_is_kept_goes_on_as_if_it_had_been_a_chain(llama, parents):
    tokens = [(11 * node + 2) % VOCAB for node in range(len(parents))]
    for node in {0, len(parents) // 2, len(parents) - 1}:
        path, steps, chain = path_to(node, parents), started(llama), started(llama)
        steps.verify(tokens, parents).best.tolist()
        steps.keep_path(path)
        assert steps.length == len(PROMPT) + len(path)
        chain.verify([tokens[step] for step in path])
        assert torch.allclose(steps.cache[..., :steps.length, :],
                              chain.cache[..., :chain.length, :], atol=1e-5)
        assert alike(steps.verify(ANSWER[:3]).logits, chain.verify(ANSWER[:3]).logits)


@pytest.mark.parametrize("parents", TREES, ids=len)
def test_an_opening_tree_is_verified_inside_the_prefill(llama, parents):
    steps, tokens = started(llama), [(7 * node + 5) % VOCAB for node in range(1, len(parents))]
    following = steps.prefill(steps.embed(PROMPT + tokens), len(parents), parents)
    for node in range(len(parents)):
        path = path_to(node, parents)
        reference = logits_of(llama, PROMPT + [tokens[step - 1] for step in path[1:]])[-1:]
        assert alike(following.logits[node:node + 1], reference)
    node = len(parents) - 1
    path = path_to(node, parents)
    steps.keep_path(path)
    reference = logits_of(llama, PROMPT + [tokens[step - 1] for step in path[1:]] + ANSWER[:2])[-2:]
    assert steps.length == len(PROMPT) + len(path) - 1 and alike(steps.verify(ANSWER[:2]).logits, reference)


def test_a_node_that_is_no_number_leaves_nothing_behind_once_it_is_forgotten():
    """It spoils the pass itself, because a masked weight of 0 times NaN is NaN: the loop asks again
    without it.
    """
    model = tiny_llama()
    steps, spoilt = started(model), 44
    model.model.embed_tokens.weight[spoilt] = torch.nan
    best = steps.verify([5, 9, spoilt, 12], [-1, 0, 0, 1]).best.tolist()
    assert best[2] == NO_NUMBER
    steps.rollback(len(PROMPT))
    assert steps.cache.isfinite().all()
    repeated = steps.verify([5, 9, 12], [-1, 0, 1])
    assert alike(repeated.logits, logits_of(model, [*PROMPT, 5, 9, 12])[len(PROMPT):])


@pytest.mark.parametrize("tokens", [[7, 9, 4], torch.tensor([7, 9, 4])], ids=["list", "on the device"])
def test_a_pass_that_is_padded_to_a_graph_reads_no_token_but_its_own(tokens):
    steps = started(tiny_llama())
    steps._set_inputs(tokens, [-1, 0, 0], steps.length, 5)
    ids, positions, _, ancestors, _ = steps._inputs(5).tolist()
    assert ids == [7, 9, 4, 7, 7] and ancestors == [0, 1, 2, 0, 0]
    assert [position - steps.length for position in positions] == [0, 1, 1, 0, 0]


def test_a_chain_longer_than_a_tree_may_be_is_verified_in_pieces():
    model, tokens = tiny_llama(), [(3 * n) % VOCAB for n in range(90)]
    steps = started(model, room=120)
    assert alike(steps.verify(tokens).logits, logits_of(model, PROMPT + tokens)[len(PROMPT):], 1e-4)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(32, 32), (8, 2)])
def test_the_kernel_gives_what_the_definition_gives_and_every_time_the_same(dtype, heads):
    torch.manual_seed(0)
    (count, kv_heads), slots = heads, 1000
    keys, values = torch.randn(2, kv_heads, slots, 128, device="cuda", dtype=dtype)
    assert tree_attention.kernel_works(keys.device, dtype, 128)
    attention = TreeAttention(count, kv_heads, 128, keys.device, fused=True)
    for root in (0, 5, 63, 64, 500, 930):
        for parents in ([-1], *(random_tree(n, root) for n in (2, 9, 17, 33, 65))):
            queries = torch.randn(len(parents), count, 128, device="cuda", dtype=dtype)
            where = torch.tensor([root], device="cuda")
            bits = torch.tensor(ancestors_of(parents), device="cuda")
            mask = visibility(where, bits, torch.arange(slots, device="cuda"), torch.float32)
            wanted = attend_plain(queries.float(), keys.float(), values.float(), mask)
            ours = attention(queries, keys, values, where, bits, None)
            assert float((ours.float() - wanted).norm() / wanted.norm()) < 0.01
            assert torch.equal(ours, attention(queries, keys, values, where, bits, None))
            single = attention(queries[-1:], keys, values, where, bits[-1:], None)
            assert torch.allclose(single.float(), ours[-1:].float(), atol=0.01)


@needs_gpu
def test_graphs_of_trees_give_what_eager_passes_give():
    model = tiny_llama(hidden_size=128, head_dim=32).cuda().bfloat16()
    for parents in TREES:
        tokens = [(7 * node + 5) % VOCAB for node in range(len(parents))]
        graphed, eager = started(model, graphs=True), started(model, graphs=False)
        ours, plain = graphed.verify(tokens, parents).logits, eager.verify(tokens, parents).logits
        assert alike(ours.float(), plain.float(), 0.02)
