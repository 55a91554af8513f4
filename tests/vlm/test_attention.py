"""Attention in two parts equals attention over both in a row; fused kernels give what the plain
definition gives.
"""

import pytest
import torch
import torch.nn.functional as F

from vlm import kernels
from vlm.attention import _kernel, _plain, causal, shared_and_own, with_sums

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random(*shape: int, device="cpu", dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def in_a_row(queries, shared, own, slots):
    """The definition: each row's keys behind those of its group, one softmax over all of them."""
    rows, _, heads, d = queries.shape
    queries_each, side = rows // shared.shape[1], heads // shared.shape[2]
    keys, values = (torch.cat([both[0].repeat_interleave(queries_each, 0), both[1]],
                              2).repeat_interleave(side, 1) for both in zip(shared, own))
    seen = torch.arange(own.shape[3], device=own.device) <= slots[:, :, None]
    seen = F.pad(seen, (shared.shape[3], 0), value=True)[:, None]
    mixed = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, seen)
    return mixed.transpose(1, 2).reshape(-1, heads * d)


def case_of(groups, queries_each, T, heads, kv_heads, d=8, room=7, **how) -> tuple:
    rows = groups * queries_each
    slots = ((torch.arange(rows)[:, None] + torch.arange(T)) % room).to(how.get("device", "cpu"))
    # Queries stand beside keys and values, as the layers give them.
    queries = random(rows, T, heads + 2 * kv_heads, d, **how)[:, :, :heads]
    return queries, random(2, groups, kv_heads, 9, d, **how), random(2, rows, kv_heads, room, d,
                                                                     **how), slots


SHAPES = [(3, 1, 1, 4, 4), (2, 3, 1, 4, 4), (2, 3, 5, 4, 2), (1, 4, 2, 6, 1), (3, 1, 4, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_two_parts_equal_both_in_a_row(shape):
    case = case_of(*shape)
    torch.testing.assert_close(shared_and_own(*case), in_a_row(*case))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_parts_equal_both_in_a_row_on_a_gpu(shape, dtype):
    case = case_of(*shape, d=64, room=75, device="cuda", dtype=dtype)
    tolerance = {"rtol": 0.02, "atol": 0.02
                 } if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(shared_and_own(*case), in_a_row(*case), **tolerance)


def test_causal_attends_to_nothing_that_comes_later():
    queries, keys, values = random(2, 6, 4, 8), random(2, 2, 6, 8), random(2, 2, 6, 8) + 1
    outputs = causal(queries, keys, values, planned=True)
    keys[:, :, 4:], values[:, :, 4:] = 9.0, 9.0
    torch.testing.assert_close(causal(queries, keys, values)[:, :4], outputs[:, :4])
    assert not torch.allclose(causal(queries, keys, values)[:, 4:], outputs[:, 4:])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_attention_with_sums_equals_the_plain_definition(dtype):
    assert _kernel(torch.device("cuda", 0), dtype, 128) is not _plain
    for n, slots in ((1, 2061), (10, 617), (20, 100)):
        query, keys, values = random(3, 4, n, 128, device="cuda", dtype=dtype), *(
            random(3, 4, slots, 128, device="cuda", dtype=dtype) for _ in range(2))
        for ours, plain in zip(with_sums(query, keys, values), _plain(query, keys, values)):
            torch.testing.assert_close(ours.float(), plain.float(), rtol=0.02, atol=0.02)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [32, 128])
def test_triton_kernels_equal_pytorch(dtype, d):
    device = torch.device("cuda", 0)
    assert kernels.fused_kernels_work(device, dtype)
    heads, kv_heads, slots, n = 5, 3, 11, 40
    qkv, rope = (random(*shape, device=device, dtype=dtype)
                 for shape in ((n, heads + 2 * kv_heads, d), (2, 50, d)))
    positions = torch.arange(n, device=device).flip(0) % 50
    places = torch.randperm(4 * slots, generator=torch.Generator().manual_seed(0))[:n].to(device)
    outputs = []
    for rotate in (kernels._rotate_plain, kernels._rotate_fused):
        cache = random(2, 4, kv_heads, slots, d, device=device, dtype=dtype)
        outputs.append((rotate(qkv.clone(), rope, positions, cache, places), cache))
    tolerance = {"rtol": 0.02, "atol": 0.04
                 } if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for plain, fused in zip(*outputs):
        torch.testing.assert_close(fused, plain, **tolerance)
    gate_up = random(9, 2 * 3000, device=device, dtype=dtype)
    torch.testing.assert_close(kernels._swiglu_fused(gate_up), kernels._swiglu_plain(gate_up), **tolerance)
