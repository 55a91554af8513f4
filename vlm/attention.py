"""Attention for LLaMA's decoders: causal over prompts, and shared-prefix attention for batches.

Rows that share a prompt (several questions about one clip) attend to it in one product; the result
is merged with each row's own part by their log-sum-exps (Juravsky et al. 2024, "Hydragen"; the
merge as in Dao et al. 2022, "FlashAttention"). Heads that share keys and values (grouped queries)
are treated as further positions.
"""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from base import log
from vlm.kernels import join

# cuDNN's kernel reads keys and values at memory speed (H200: 4.2 TB/s; FlashAttention 2 in PyTorch:
# 2.5) and is twice as fast over prompts. It builds a plan for every new shape, so it pays only for
# batches of one shape.
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH
]


def causal(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
           planned: bool = False) -> torch.Tensor:
    """queries (rows, L, heads, d), keys, values (rows, kv_heads, L, d) -> (rows, L, heads * d).

    planned: many calls of exactly this shape will follow.
    """
    with sdpa_kernel(FASTEST_FIRST, set_priority=planned):
        mixed = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, is_causal=True,
                                               enable_gqa=queries.shape[2] != keys.shape[1])
    return mixed.transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------ shared prefix
def shared_and_own(queries: torch.Tensor, shared: torch.Tensor, own: torch.Tensor,
                   slots: torch.Tensor) -> torch.Tensor:
    """Attention of each row to its group's shared prompt followed by its own part.

    queries (rows, T, heads, d) at slots (rows, T) of their own part; keys and values: shared (2,
    groups, kv_heads, P, d), own (2, rows, kv_heads, room, d). Each group is rows / groups
    consecutive rows -> (rows * T, heads * d).
    """
    rows, T, _, d = queries.shape
    groups, kv_heads = shared.shape[1:3]
    by_head = queries.view(groups, rows // groups * T, kv_heads, -1, d).transpose(1, 2)
    seen, sums = with_sums(by_head.reshape(groups, kv_heads, -1, d), *shared)
    return join(queries, own, slots, seen, sums)


def scores_of(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(B, n, d), (B, slots, d) -> their products (B, n, slots), float32 on a GPU."""
    wide = {"out_dtype": torch.float32} if query.is_cuda and query.dtype != torch.float32 else {}
    return torch.bmm(query, keys.mT, **wide)


def with_sums(query: torch.Tensor, keys: torch.Tensor,
              values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """query (B, heads, n, d), keys, values (B, heads, slots, d), no mask -> (like query, log of
    each row's sum of exponentials (B, heads, n) float32)."""
    return _kernel(query.device, query.dtype, query.shape[-1])(query, keys, values)


def _plain(query, keys, values):
    scores = scores_of(query.flatten(0, 1), keys.flatten(0, 1)) * query.shape[-1] ** -0.5
    sums = scores.logsumexp(-1)
    mixed = torch.bmm((scores - sums[..., None]).exp_().to(query), values.flatten(0, 1))
    return mixed.view(query.shape), sums.view(query.shape[:3])


def _cudnn(query, keys, values):
    mixed, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, keys, values, None, True, 0.0, False)
    return mixed, sums.view(query.shape[:3])


def _flash(query, keys, values):
    return torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, False)[:2]


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype, d: int):
    """The first fused kernel (cuDNN, FlashAttention) that runs here and agrees with `_plain`.

    Both are called as internal operators: no public function of PyTorch returns the log-sum-exps.
    """
    if device.type != "cuda" or dtype == torch.float32 or d % 8:
        return _plain
    random = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, 2, n, d, generator=random).to(device, dtype) for n in (3, 40, 40))
    plain = _plain(query, keys, values)
    for kernel in (_cudnn, _flash):
        try:
            for ours, wanted in zip(kernel(query, keys, values), plain):
                torch.testing.assert_close(ours.to(wanted), wanted, rtol=0.02, atol=0.02)
            return kernel
        except (RuntimeError, AttributeError, AssertionError) as error:
            log(f"attention | {kernel.__name__[1:]} can't be used here: {str(error).strip():.200}")
    return _plain
