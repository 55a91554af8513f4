"""Attention of a few new positions over a long cache, where the new positions form a tree (a chain
is one path).

A Triton kernel splits the keys over the whole GPU (Dao et al. 2023, "Flash-Decoding"): each program
takes one head and a part of the slots, and the last program of a head to finish joins the parts in
the order of the slots, so that the result does not depend on the order in which programs run. 32
layers of 7B over 2,077 positions in bfloat16, one H100: 0.57 ms for 1 query, 0.66 for 17, 0.70 for
33, 0.82 for 65 (products written out in PyTorch: 0.64, 1.42, 1.73, 1.77; reading keys and values
once: 0.37). Without Triton PyTorch's scaled_dot_product_attention does the same.
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

MAX_NODES = 64                       # positions behind the first new one: the bits of an int64
SPLITS = 4                           # 32 heads x 4 programs fill the 132 processors of an H100 once
BLOCK_SLOTS = 64
LOG2_E = 1.4426950408889634


def ancestors_of(parents: list[int]) -> list[int]:
    """For each of k new positions the bits of the nodes it may see, itself included.

    parents: position -> position it follows, below its own; -1 for position 0, the root. Bit j
    stands for position j + 1; the root is visible to all. As signed 64-bit numbers.
    """
    bits = [0]
    for position, parent in enumerate(parents[1:], 1):
        assert 0 <= parent < position <= MAX_NODES, f"position {position} follows {parent}"
        bits.append(bits[parent] | 1 << (position - 1))
    return [number - (1 << 64) if number >> 63 else number for number in bits]


def depths_of(parents: list[int]) -> list[int]:
    """The depth of each position; 0 is the root."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


class TreeAttention:
    """The kernel with its scratch memory, for one cache. Calls must follow one another in one stream."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, device: torch.device, fused: bool):
        """fused: whether to run the kernel (kernel_works says whether it can)."""
        self.fused = fused
        if fused:
            parts = kv_heads * SPLITS * triton.next_power_of_2((MAX_NODES + 1) * (heads // kv_heads))
            self.mixed = torch.empty(parts * head_dim, dtype=torch.float32, device=device)
            self.sums = torch.empty(parts * 2, dtype=torch.float32, device=device)
            self.finished = torch.zeros(kv_heads, dtype=torch.int32, device=device)

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                 root: torch.Tensor, ancestors: torch.Tensor,
                 mask: torch.Tensor | None) -> torch.Tensor:
        """queries (n, heads, d); keys, values (kv_heads, slots, d) -> (n, heads * d).

        root (1,) int64: slots up to it are visible to every query; ancestors (n,) int64, as
        ancestors_of gives them, for the slots behind it. mask (n, slots), visibility(...) of both,
        is needed where the kernel is not used.
        """
        if not self.fused:
            return attend_plain(queries, keys, values, mask)
        n, heads, d = queries.shape
        kv_heads, slots = keys.shape[:2]
        # The least that tl.dot takes
        rows = max(16, triton.next_power_of_2(n * (heads // kv_heads)))
        steps = triton.cdiv(triton.cdiv(slots, SPLITS), BLOCK_SLOTS)
        out = queries.new_empty(n, heads * d)
        _attend_kernel[kv_heads,
                       SPLITS](queries, keys, values, root, ancestors, out, self.mixed, self.sums,
                               self.finished, n, heads // kv_heads, slots, LOG2_E * d**-0.5,
                               queries.stride(0), keys.stride(0), d, rows, BLOCK_SLOTS, SPLITS,
                               steps, MAX_NODES, num_warps=8 if rows > 64 else 4, num_stages=3)
        return out


def visibility(root: torch.Tensor, ancestors: torch.Tensor, slots: torch.Tensor,
               dtype: torch.dtype) -> torch.Tensor:
    """(n, slots) to add to scores: 0 where a query may see a slot, else -inf."""
    node = slots - root - 1
    bit = (ancestors[:, None] >> node.clamp(0, MAX_NODES - 1)) & 1
    hidden = (node >= MAX_NODES) | ((node >= 0) & (bit == 0))
    return torch.zeros(hidden.shape, dtype=dtype,
                       device=slots.device).masked_fill_(hidden, -torch.inf)


def attend_plain(queries, keys, values, mask):
    mixed = F.scaled_dot_product_attention(queries.transpose(0, 1)[None], keys[None], values[None], mask,
                                           enable_gqa=queries.shape[1] != len(keys))
    return mixed[0].transpose(0, 1).reshape(len(queries), -1)


if triton:
    @triton.jit
    def _attend_kernel(queries, keys, values, root, ancestors, out, mixed_parts, sums, finished, n,
                       group, slots, scale, of_token, of_head, D: tl.constexpr, ROWS: tl.constexpr,
                       BLOCK: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr,
                       NODES: tl.constexpr):
        head, split = tl.program_id(0), tl.program_id(1)
        row, dim = tl.arange(0, ROWS), tl.arange(0, D)
        token, query_head = row // group, head * group + row % group
        valid = row < n * group
        first = tl.load(root)
        query = tl.load(queries + token[:, None] * of_token + query_head[:, None] * D + dim[None, :],
                        valid[:, None], 0.0)
        bits = tl.load(ancestors + token, valid, 0)
        largest = tl.full((ROWS,), -1e30, tl.float32)
        weight = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, D), tl.float32)
        base = head.to(tl.int64) * of_head
        begin = split * STEPS * BLOCK
        end = tl.minimum(begin + STEPS * BLOCK, tl.minimum(first + 1 + NODES, slots).to(tl.int32))
        # Blocks before `unmasked_end` are visible to every query: no mask.
        shared_slots = tl.maximum(tl.minimum(end, (first + 1).to(tl.int32)) - begin, 0)
        unmasked_end = begin + shared_slots // BLOCK * BLOCK
        for start in range(begin, unmasked_end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            key = tl.load(keys + base + slot[:, None] * D + dim[None, :])
            scores = tl.dot(query, tl.trans(key)) * scale
            higher = tl.maximum(largest, tl.max(scores, 1))
            probability, rescale = tl.exp2(scores - higher[:, None]), tl.exp2(largest - higher)
            value = tl.load(values + base + slot[:, None] * D + dim[None, :])
            mixed = tl.dot(probability.to(value.dtype), value, mixed * rescale[:, None])
            weight = weight * rescale + tl.sum(probability, 1)
            largest = higher
        for start in range(unmasked_end, end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            inside = slot < slots
            key = tl.load(keys + base + slot[:, None] * D + dim[None, :], inside[:, None], 0.0)
            scores = tl.dot(query, tl.trans(key)) * scale
            node = slot - first - 1
            bit = (bits[:, None] >> tl.minimum(tl.maximum(node, 0), NODES - 1).to(tl.int64)[None, :]) & 1
            visible = ((node < 0)[None, :] | ((node < NODES)[None, :] & (bit == 1))) & inside[None, :]
            scores = tl.where(visible, scores, -1e30)
            higher = tl.maximum(largest, tl.max(scores, 1))
            probability = tl.where(visible, tl.exp2(scores - higher[:, None]), 0.0)
            rescale = tl.exp2(largest - higher)
            value = tl.load(values + base + slot[:, None] * D + dim[None, :], inside[:, None], 0.0)
            mixed = tl.dot(probability.to(value.dtype), value, mixed * rescale[:, None])
            weight = weight * rescale + tl.sum(probability, 1)
            largest = higher
        place = (head * SPLITS + split) * ROWS + row
        tl.store(mixed_parts + place[:, None] * D + dim[None, :], mixed, valid[:, None])
        tl.store(sums + place * 2, largest, valid)
        tl.store(sums + place * 2 + 1, weight, valid)
        # All of this program's stores come before it counts itself as finished
        tl.debug_barrier()
        finished_before = tl.atomic_add(finished + head, 1, sem="acq_rel")
        if finished_before == SPLITS - 1:
            tl.debug_barrier()
            largest = tl.full((ROWS,), -1e30, tl.float32)
            weight = tl.zeros((ROWS,), tl.float32)
            mixed = tl.zeros((ROWS, D), tl.float32)
            for part in range(SPLITS):
                place = (head * SPLITS + part) * ROWS + row
                part_largest = tl.load(sums + place * 2, valid, -1e30, cache_modifier=".cg")
                higher = tl.maximum(largest, part_largest)
                own_scale, part_scale = tl.exp2(largest - higher), tl.exp2(part_largest - higher)
                part_mixed = tl.load(mixed_parts + place[:, None] * D + dim[None, :],
                                      valid[:, None], 0.0, cache_modifier=".cg")
                mixed = mixed * own_scale[:, None] + part_mixed * part_scale[:, None]
                weight = weight * own_scale + tl.load(sums + place * 2 + 1, valid, 0.0,
                                                 cache_modifier=".cg") * part_scale
                largest = higher
            out_at = out + token[:, None] * (tl.num_programs(0) * group *
                                         D) + query_head[:, None] * D + dim[None, :]
            tl.store(out_at, (mixed / weight[:, None]).to(out.dtype.element_ty), valid[:, None])
            tl.store(finished + head, 0)


@functools.cache
def kernel_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel runs on this device and gives what PyTorch's attention gives, for a chain
    and for a tree.

    Not for float32: its products on the tensor cores would be TF32's.
    """
    if device.type != "cuda" or triton is None or dtype == torch.float32 or head_dim & (
            head_dim - 1) or not 16 <= head_dim <= 256:
        return False
    random = torch.Generator().manual_seed(0)
    parents = [-1, 0, 1, 1, 0, 4, 2]
    queries = torch.randn(len(parents), 4, head_dim, generator=random).to(device, dtype)
    keys, values = torch.randn(2, 2, 600, head_dim, generator=random).to(device, dtype)
    ancestors = torch.tensor(ancestors_of(parents), device=device)
    root = torch.tensor([570], device=device)
    try:
        with torch.cuda.device(device):
            attention = TreeAttention(4, 2, head_dim, device, fused=True)
            mask = visibility(root, ancestors, torch.arange(600, device=device), dtype)
            plain = attend_plain(queries, keys, values, mask)
            # The second call finds the counters as the first left them
            for _ in range(2):
                fused = attention(queries, keys, values, root, ancestors, None)
                torch.testing.assert_close(fused, plain, rtol=0.02, atol=0.02)
    # Triton reports a missing compiler and a failed build in many ways
    except Exception as error:
        log("attention | WARNING | PyTorch's own instead of the Triton kernel: "
            f"{str(error).strip():.300}")
        return False
    return True
