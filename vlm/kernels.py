"""Fused operations between LLaMA's matrix products, each one Triton kernel.

Triton comes with PyTorch's CUDA build for Linux. Without it, or where its first use fails (it needs
a C compiler) or gives other results, PyTorch's own operations do the same, more slowly.
"""

import functools

import torch
import torch.nn.functional as F

from base import log

try:
    import triton
    import triton.language as tl
except ImportError:                  # a PyTorch for CPUs
    triton = None

HEADS, COLUMNS = 16, 1024            # per Triton program


def rotate_and_store(qkv: torch.Tensor, rope: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor,
                     places: torch.Tensor) -> torch.Tensor:
    """Rotate queries and keys by RoPE, write keys and values to the cache -> queries (n, heads, d).

    qkv (n, heads + 2 kv_heads, d), contiguous, overwritten; rope (2, room, d): cos, and sin with
    rotate_half's sign; positions (n,) int64; cache (2, rows, kv_heads, slots, d): keys, values;
    places (n,) int64: row * slots + slot.
    """
    d = qkv.shape[-1]
    fused = qkv.is_cuda and d & (d - 1) == 0 and fused_kernels_work(qkv.device, qkv.dtype)
    return (_rotate_fused if fused else _rotate_plain)(qkv, rope, positions, cache, places)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up (n, 2 I), contiguous: gate, then up -> silu(gate) * up (n, I)."""
    fused = gate_up.is_cuda and fused_kernels_work(gate_up.device, gate_up.dtype)
    return (_swiglu_fused if fused else _swiglu_plain)(gate_up)


def add_and_norm(x: torch.Tensor, delta: torch.Tensor,
                 norm: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta (n, D), contiguous; norm: LLaMA's RMS norm -> (x + delta, its norm).

    One kernel on a GPU: the 65 norms and 64 additions of a 17-token pass at 7B take 0.12 ms on an H100
    instead of 0.39.
    """
    fused = x.is_cuda and x.dtype != torch.float32 and fused_kernels_work(x.device, x.dtype)
    return (_add_and_norm_fused if fused else _add_and_norm_plain)(x, delta, norm.weight,
                                                                   norm.variance_epsilon)


def join(queries: torch.Tensor, own: torch.Tensor, last: torch.Tensor, seen: torch.Tensor,
         sums: torch.Tensor) -> torch.Tensor:
    """Attention of rows to their own keys, merged with that to shared keys -> (rows * T, heads * d).

    queries (rows, T, heads, d); own (2, rows, kv_heads, slots, d): keys, values; last (rows, T)
    int64: the last slot that each query may attend to. The shared part is given: seen (groups,
    kv_heads, n, d), its attention output, and sums (groups, kv_heads, n) float32, its log-sum-exps;
    n counts the queries that share keys, in the order rows / groups, T, heads / kv_heads.
    """
    d = queries.shape[-1]
    fused = queries.is_cuda and d & (d - 1) == 0 and fused_kernels_work(queries.device, queries.dtype)
    return (_join_fused if fused else _join_plain)(queries, own, last, seen, sums)


# --------------------------------------------------------------------------------------- in PyTorch
def _rotate_plain(qkv, rope, positions, cache, places):
    kv_heads, slots = cache.shape[2:4]
    heads = qkv.shape[1] - 2 * kv_heads
    turned, (cos, sin) = qkv[:, :heads + kv_heads], rope[:, positions, None]
    # (x2, x1); the sign is in sin
    swapped = turned.roll(turned.shape[-1] // 2, -1)
    turned.mul_(cos).addcmul_(swapped, sin)
    rows, at = places // slots, places % slots
    cache[0, rows, :, at] = qkv[:, heads:heads + kv_heads]
    cache[1, rows, :, at] = qkv[:, heads + kv_heads:]
    return qkv[:, :heads]


def _swiglu_plain(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _add_and_norm_plain(x, delta, weight, epsilon):
    x = x + delta
    return x, F.rms_norm(x, weight.shape, weight, epsilon)


def _join_plain(queries, own, last, seen, sums):
    (rows, T, heads, d), (groups, kv_heads, _) = queries.shape, sums.shape
    shape = (groups, kv_heads, rows // groups, T, heads // kv_heads)
    seen, sums = (part.transpose(1, 2).flatten(0, 1)
                  for part in (seen.view(*shape, d), sums.view(*shape, 1)))
    query, (keys, values) = queries.view(rows, T, kv_heads, -1, d).transpose(1, 2), own.float()
    scores = (query.flatten(2, 3).float() @ keys.mT).view(*sums.shape[:4], -1) * d ** -0.5
    hidden = torch.arange(own.shape[3], device=own.device) > last[:, :, None]
    scores = scores.masked_fill(hidden[:, None, :, None], -torch.inf)
    weights = torch.cat([sums, scores], -1).softmax(-1)
    own_part = (weights[..., 1:].flatten(2, 3) @ values).view(seen.shape)
    return (weights[..., :1] * seen + own_part).transpose(1, 2).reshape(rows * T, heads * d).to(queries)


# ---------------------------------------------------------------------------------------- in Triton
if triton:
    @triton.jit
    def _rotate_kernel(qkv, rope, positions, cache, places, heads, kv_heads, slots, of_sin,
                       of_values, of_row, of_head, HALF: tl.constexpr, BLOCK: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        at = tl.arange(0, HALF)[None, :]
        count = heads + 2 * kv_heads
        first = qkv + (token * count + head[:, None]) * 2 * HALF + at
        there = (head < count)[:, None]
        x1, x2 = (tl.load(first, there).to(tl.float32), tl.load(first + HALF, there).to(tl.float32))
        angle = rope + tl.load(positions + token) * 2 * HALF + at
        y1 = x1 * tl.load(angle).to(tl.float32) + x2 * tl.load(angle + of_sin).to(tl.float32)
        y2 = x2 * tl.load(angle + HALF).to(tl.float32) + x1 * tl.load(angle + of_sin + HALF).to(tl.float32)
        is_value, is_query = (head >= heads + kv_heads)[:, None], (head < heads)[:, None]
        y1, y2 = tl.where(is_value, x1, y1), tl.where(is_value, x2, y2)
        tl.store(first, y1, is_query)
        tl.store(first + HALF, y2, is_query)
        place = tl.load(places + token)
        stored = head - heads
        to = (cache + (stored // kv_heads * of_values + stored % kv_heads * of_head)[:, None]
              + place // slots * of_row + place % slots * 2 * HALF + at)
        tl.store(to, y1, there & (head >= heads)[:, None])
        tl.store(to + HALF, y2, there & (head >= heads)[:, None])

    @triton.jit
    def _swiglu_kernel(gate_up, out, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        there = column < width
        gate = tl.load(gate_up + row * 2 * width + column, there).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, there).to(tl.float32)
        tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, there)


    @triton.jit
    def _add_and_norm_kernel(x, delta, weight, total, out, width, epsilon, BLOCK: tl.constexpr):
        column = tl.arange(0, BLOCK)
        there = column < width
        place = tl.program_id(0).to(tl.int64) * width + column
        summed = tl.load(x + place, there, 0.0) + tl.load(delta + place, there, 0.0)
        tl.store(total + place, summed, there)
        summed = summed.to(tl.float32)
        scale = tl.rsqrt(tl.sum(summed * summed, 0) / width + epsilon)
        tl.store(out + place,
                 summed * scale * tl.load(weight + column, there, 0.0).to(tl.float32), there)

    @triton.jit
    def _join_kernel(queries, own, last, seen, sums, out, T, queries_of_group, side, scale, of_query,
                     of_values, of_row, of_head, of_group, of_seen_head, of_seen, of_sums_group,
                     of_sums_head, D: tl.constexpr, BLOCK: tl.constexpr):
        # Number: row * T + t
        number, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        at, kv_head, row, group = tl.arange(0, D), head // side, number // T, number // queries_of_group
        which = number % queries_of_group * side + head % side
        query = tl.load(queries + number * of_query + head * D + at).to(tl.float32) * scale
        # Start the running softmax from the shared part: max = its log-sum-exp, weight = 1
        largest = tl.load(sums + group * of_sums_group + kv_head * of_sums_head + which)
        weight = largest * 0 + 1.0
        mixed = tl.load(seen + group * of_group + kv_head * of_seen_head + which * of_seen + at).to(
            tl.float32)
        count = tl.load(last + number) + 1
        for start in range(0, count, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            there = slot < count
            key = own + row * of_row + kv_head * of_head + slot[:, None] * D + at[None, :]
            scores = tl.sum(tl.load(key, there[:, None], 0).to(tl.float32) * query[None, :], 1)
            scores = tl.where(there, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, 0))
            chances = tl.exp(scores - larger)
            decay = tl.exp(largest - larger)
            values = tl.load(key + of_values, there[:, None], 0).to(tl.float32)
            mixed = mixed * decay + tl.sum(chances[:, None] * values, 0)
            weight = weight * decay + tl.sum(chances, 0)
            largest = larger
        tl.store(out + (number * tl.num_programs(1) + head) * D + at, mixed / weight)


def _join_fused(queries, own, last, seen, sums):
    (rows, T, heads, d), (groups, kv_heads, _) = queries.shape, sums.shape
    flat = queries.flatten(0, 1)
    last = last.contiguous()
    out = queries.new_empty(rows * T, heads * d)
    assert flat.stride()[1:] == (d, 1), flat.stride()
    assert seen.stride(3) == sums.stride(2) == 1, (seen.stride(), sums.stride())
    _join_kernel[rows * T, heads](flat, own, last, seen, sums, out, T, rows // groups * T,
                                  heads // kv_heads, d**-0.5, flat.stride(0), own.stride(0),
                                  own.stride(1), own.stride(2), seen.stride(0), seen.stride(1),
                                  seen.stride(2), sums.stride(0), sums.stride(1), d, 32)
    return out


def _add_and_norm_fused(x, delta, weight, epsilon):
    n, width = x.shape
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_and_norm_kernel[n, ](x, delta, weight, total, out, width, epsilon,
                              triton.next_power_of_2(width), num_warps=8 if width > 2048 else 4)
    return total, out


def _rotate_fused(qkv, rope, positions, cache, places):
    n, count, d = qkv.shape
    kv_heads, slots = cache.shape[2:4]
    heads = count - 2 * kv_heads
    _rotate_kernel[n, -(-count // HEADS)](qkv, rope, positions, cache, places, heads, kv_heads,
                                          slots, rope.stride(0), cache.stride(0), cache.stride(1),
                                          cache.stride(2), d // 2, HEADS)
    return qkv[:, :heads]


def _swiglu_fused(gate_up):
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n, width)
    _swiglu_kernel[n, -(-width // COLUMNS)](gate_up, out, width, COLUMNS)
    return out


@functools.cache
def fused_kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run on this device and agree with PyTorch's operations."""
    if triton is None:
        return False
    random = torch.Generator().manual_seed(0)
    qkv, rope, cache, gate_up, seen = (torch.randn(shape, generator=random).to(device, dtype)
                                       for shape in ((5, 12, 32), (2, 9, 32), (2, 3, 4, 6, 32),
                                                     (7, 90), (3, 4, 2, 32)))
    positions = torch.tensor([8, 0, 3, 5, 5], device=device)
    places = torch.tensor([17, 0, 5, 6, 11], device=device)
    sums = torch.randn(3, 4, 2, generator=random).to(device)
    delta, weight = gate_up.flip(0), gate_up[0].abs()
    try:
        with torch.cuda.device(device):
            results = []
            for rotate, gated, added, joined in (
                    (_rotate_plain, _swiglu_plain, _add_and_norm_plain, _join_plain),
                    (_rotate_fused, _swiglu_fused, _add_and_norm_fused, _join_fused)):
                filled = cache.clone()
                results.append([rotate(qkv.clone(), rope, positions, filled, places), filled, gated(gate_up),
                                *added(gate_up, delta, weight, 1e-5),
                                joined(qkv[:3, None, :8], cache, positions[:3, None] % 6, seen, sums)])
            for plain, fused in zip(*results):
                # PyTorch's operations round in between
                torch.testing.assert_close(fused, plain, rtol=0.02, atol=0.02)
    # Triton reports a missing compiler and a failed build in many ways
    except Exception as error:
        log("kernels | WARNING | PyTorch's own operations instead of Triton's: "
            f"{str(error).strip():.300}")
        return False
    return True
