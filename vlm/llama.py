"""LLaMA's layers over packed positions; the caller (steps.py, batches.py) passes cache and attention.

Also those that differ from LLaMA's by biases of queries, keys and values (Qwen2, Qwen2.5), by norms
of queries and keys (Qwen3), or by positions with several axes (Qwen-VL); vlm/fits.py says which.

Our own forward over transformers' modules: positions and places in the cache are explicit tensors,
so that a CUDA graph can hold a step, and the operations between the matrix products are fused
(kernels.py). Where q/k/v and gate/up are plain layers they are fused; the model's modules
become views of the fused matrices: nothing is stored twice, and transformers' forward goes on
working. The same holds for 4-bit layers where nf4.py is adopted.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from base import UserError
from vlm.adopt_nf4 import adopt
from vlm.fits import why_not
from vlm.kernels import add_and_norm, rotate_and_store, swiglu
from vlm.nf4 import NF4Linear

SAME = 0.05                  # `apart` up to this is rounding; a broken graph differs by about 1
NO_NUMBER = -1               # in place of a token id where the logits are NaN or infinite


class Next(NamedTuple):
    """The next token after each of n positions. Valid until the next pass: graphs reuse the memory."""

    logits: torch.Tensor        # (n, V) in the model's dtype
    best: torch.Tensor          # (n,) int64: their argmax; -1 where the largest is NaN or infinite


class Fused(NamedTuple):
    """Plain linear layers in one."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def position_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of one cache position: keys and values of all layers."""
    heads = config.num_key_value_heads * head_dim_of(config)
    return 2 * config.num_hidden_layers * heads * dtype.itemsize


class Llama:
    """One model's fused weights. Holds references to them: drop it before the model is unloaded."""

    def __init__(self, language_model: nn.Module, lm_head: nn.Module, room: int):
        """language_model: LlamaModel; lm_head: its output layer; room: capacity in positions."""
        config, weight = language_model.config, language_model.embed_tokens.weight
        self.model = language_model
        self.lm_head = lm_head
        self.device = weight.device
        self.dtype = weight.dtype
        self.depth = config.num_hidden_layers
        self.vocab_size = language_model.embed_tokens.num_embeddings
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim_of(config)
        if reason := why_not(config, language_model):
            raise UserError(f"this language model can't run here: {reason}")
        # Row p belongs to slot p: its position is p itself unless set_positions says otherwise.
        self.rope = self._rope_of(torch.arange(room, device=self.device)[None])
        adopt(language_model, self.dtype)            # 4-bit layers, where that is faster
        self.qkv, self.gate_up = [], []
        # Layer by layer: the weights that are replaced are freed before the next layer is fused
        for layer in language_model.layers:
            self.qkv.append(
                fuse([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]))
            self.gate_up.append(fuse([layer.mlp.gate_proj, layer.mlp.up_proj]))
        kinds = {type(module).__name__ for module in language_model.modules()}
        # LLM.int8 searches outliers on the host, which a graph can't capture.
        self.may_be_captured = self.device.type == "cuda" and "Linear8bitLt" not in kinds
        self.is_silu = config.hidden_act == "silu"
        self.has_head_norms = hasattr(language_model.layers[0].self_attn, "q_norm")

    def _rope_of(self, positions: torch.Tensor) -> torch.Tensor:
        """positions (axes, n) int64 -> (2, n, d): cos, and sin with rotate_half's sign in it.

        By the model's own RoPE, with its scaling.
        """
        rope = self.model.config.rope_parameters
        if "mrope_section" in rope:                  # wants all three axes, for text too
            positions = positions.expand(3, -1)[:, None]
        like = self.model.embed_tokens.weight[:1, None]
        cos, sin = self.model.rotary_emb(like, position_ids=positions)
        minus, plus = sin.chunk(2, -1)
        return torch.cat([cos, torch.cat([-minus, plus], -1)]).contiguous()

    @torch.inference_mode()
    def set_positions(self, positions: torch.Tensor) -> None:
        """Set the positions (axes, P) of the next prompt's first P slots; the last is text, and text
        follows. In place, for graphs that have been captured.
        """
        self.rope.copy_(self._rope_of(with_text(positions, self.rope.shape[1])))

    def on_device(self) -> contextlib.AbstractContextManager:
        """Make the model's device current: Triton and CUDA events use the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def new_cache(self, rows: int, slots: int) -> torch.Tensor:
        """(layers, 2, rows, kv_heads, slots, d): keys, values.

        Zeros, not empty: a masked slot has weight 0, but 0 * NaN is NaN.
        """
        return torch.zeros(self.depth, 2, rows, self.kv_heads, slots, self.head_dim,
                           dtype=self.dtype, device=self.device)

    def layers(self, x: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor,
               places: torch.Tensor, attend: Callable, follow: bool = True,
               added: torch.Tensor | None = None) -> torch.Tensor:
        """x (n, D) at positions (n,) -> (n, D) before the final norm.

        Keys and values are written to cache (layers, 2, rows, kv_heads, slots, d) at places (n,) =
        row * slots + slot, before attend(layer number, queries (n, heads, d)) -> (n, heads * d) is
        called. follow=False fills the cache alone: it skips the last layer's output and returns x
        before that layer. added (k, m, D): to add to the first m positions behind each of the first
        k layers.
        """
        h = normed(x, self.model.layers[0].input_layernorm)
        for number, layer in enumerate(self.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = together(h, self.qkv[number], attention.q_proj, attention.k_proj,
                           attention.v_proj).view(len(x), -1, self.head_dim)
            if self.has_head_norms:
                self._norm_heads(qkv, attention)
            queries = rotate_and_store(qkv, self.rope, positions, cache[number], places)
            if number + 1 == self.depth and not follow:
                return x
            x, h = add_and_norm(x, attention.o_proj(attend(number, queries)),
                                layer.post_attention_layernorm)
            gate_up = together(h, self.gate_up[number], mlp.gate_proj, mlp.up_proj)
            gate, up = gate_up.chunk(2, -1)
            out = mlp.down_proj(swiglu(gate_up) if self.is_silu else mlp.act_fn(gate) * up)
            if added is not None and number < len(added):
                out[:added.shape[1]] += added[number]
            if number + 1 < self.depth:
                x, h = add_and_norm(x, out, self.model.layers[number + 1].input_layernorm)
        return x + out

    def _norm_heads(self, qkv: torch.Tensor, attention: nn.Module) -> None:
        """Norm each head's query and key in place: qkv (n, heads + 2 kv_heads, d)."""
        last = self.heads + self.kv_heads
        for heads, norm in ((slice(0, self.heads), attention.q_norm),
                            (slice(self.heads, last), attention.k_norm)):
            qkv[:, heads] = normed(qkv[:, heads], norm)

    def following(self, x: torch.Tensor) -> Next:
        """x (n, D) as `layers` gives it -> the next token after each position."""
        logits = self.lm_head(normed(x, self.model.norm))
        largest, best = logits.max(-1)               # max of a row with a NaN is NaN
        return Next(logits, best.where(largest.isfinite(), NO_NUMBER))


def with_text(positions: torch.Tensor, length: int) -> torch.Tensor:
    """positions (axes, P) -> (axes, length): text goes on from the last position of each axis."""
    more = torch.arange(1, length - positions.shape[1] + 1, device=positions.device)
    return torch.cat([positions, positions[:, -1:] + more], 1)


def normed(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """LLaMA's RMS norm in one kernel; transformers' rounds once more in between (seen in 16 bits)."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def together(x: torch.Tensor, fused: Fused | NF4Linear | None,
             *modules: nn.Module) -> torch.Tensor:
    """The concatenated outputs of linear layers: one product if they are fused, else one each."""
    if isinstance(fused, NF4Linear):
        return fused(x)
    if fused is not None:
        return F.linear(x, *fused)
    return torch.cat([module(x) for module in modules], -1)


@torch.no_grad()         # not inference_mode: the modules must not be left with inference tensors
def fuse(modules: list[nn.Module]) -> Fused | NF4Linear | None:
    """The weights of plain linear layers in one matrix, of which they become views.

    None if a layer is of another kind, or if only some have a bias.
    """
    if type(modules[0]) is NF4Linear:
        return modules[0].fused
    biases = [module.bias for module in modules if module.bias is not None]
    if any(type(module) is not nn.Linear for module in modules) or 0 < len(biases) < len(modules):
        return None                                  # bitsandbytes' layers are subclasses of nn.Linear
    bias = torch.cat(biases) if biases else None
    weights = [module.weight for module in modules]
    rows = 0
    for weight in weights:                           # fused before, for another decoder of the same model?
        if weight.untyped_storage().data_ptr() != weights[0].untyped_storage().data_ptr() or (
                weight.storage_offset() != rows * weight.shape[1]):
            break
        rows += len(weight)
    else:
        shape = rows, weights[0].shape[1]
        return Fused(weights[0].as_strided(shape, weights[0].stride(), 0), bias)
    fused = torch.cat(weights)
    for module, part in zip(modules, fused.split([module.out_features for module in modules])):
        module.weight.data = part
    return Fused(fused, bias)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The relative difference of two computations of the same logits (n, V); 16-bit rounding: 1 %.

    Rows with NaN or infinities in both are left out; NaN if only one has them in a row, or all rows
    have them.
    """
    numbers = theirs.isfinite().all(-1)
    if not torch.equal(numbers, ours.isfinite().all(-1)):
        return math.nan
    ours, theirs = ours[numbers].float(), theirs[numbers].float()
    return float((ours - theirs).norm() / theirs.norm())
