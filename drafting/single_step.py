"""One step of a TokenAdapter at batch 1, in three quarters of the kernels that
`TokenAdapter.step_at` launches.
"""

import torch
import torch.nn.functional as F
from torch import nn

from token_adapter import Cache, TokenAdapter


class SingleStep:
    """`step_at` for one token of one answer in three quarters of its kernels: in a graph too, each
    costs 2 to 3 us.

    Scores begin as the mask and the residual stream as itself, to which products are added in
    place; the biases of products that are added so are a further column of their weights, for an
    input that is always 1. It keeps copies of these weights, as they are now. For a prefix
    conditioning, whose blocks norm first.
    """

    def __init__(self, adapter: TokenAdapter, cache: Cache):
        self.adapter, self.cache, config = adapter, cache, adapter.config
        blocks = adapter.transformer["layers"]
        self.out, self.linear2 = ([self._with_bias(linear) for linear in linears] for linears in (
            [block.self_attn.out_proj for block in blocks], [block.linear2 for block in blocks]))
        self.mixed, self.inner = (linears[0].new_zeros(1, linears[0].shape[1])
                                  for linears in (self.out, self.linear2))
        self.mixed[:, config.embed_dim] = self.inner[:, config.feedforward_dim] = 1
        self.scores = cache.masks.new_zeros(config.num_layers, config.num_heads, 1, len(cache.slots))

    @staticmethod
    # (outputs, inputs + 8): in eights, for alignment
    def _with_bias(linear: nn.Linear) -> torch.Tensor:
        return torch.cat([linear.weight, F.pad(linear.bias[:, None], (0, 7))], 1).detach()

    @torch.inference_mode()
    def __call__(self, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """token (1,), slot (1,) int64 -> logits (1, V) of what follows; keys and values are written
        at the slot.
        """
        config, cache = self.adapter.config, self.cache
        mixed = self.mixed[:, :config.embed_dim].view(config.num_heads, 1, -1)
        inner = self.inner[:, :config.feedforward_dim]
        x = self.adapter.embedding(token) + cache.positions.index_select(0, slot)
        self.scores.copy_(cache.masks[0].index_select(1, slot))
        for block, values, scores, out, linear2 in zip(self.adapter.transformer["layers"],
                                                       cache.values, self.scores, self.out,
                                                       self.linear2):
            attention = block.self_attn
            projected = F.linear(block.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
            projected = projected.view(3, config.num_heads, 1, -1)
            key, value = values[:, 0].index_copy_(2, slot, projected[1:])
            scores.baddbmm_(projected[0], key.mT, alpha=projected.shape[-1] ** -0.5)
            torch.bmm(scores.softmax(-1), value, out=mixed)
            x.addmm_(self.mixed, out.t())
            torch.ops.aten.gelu.out(block.linear1(block.norm2(x)), out=inner)
            x.addmm_(self.inner, linear2.t())
        return self.adapter._logits(x)
