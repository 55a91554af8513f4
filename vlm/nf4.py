"""Products of few rows with bitsandbytes' NF4 weights, near the speed at which memory is read.

    layer = packed([attention.q_proj, attention.k_proj, attention.v_proj], torch.bfloat16)
    layer(x)                      # (..., N) of all three; layer.rows(0, 4096) is q_proj on the same memory

bitsandbytes takes 3.9 ms for all products of a 7B model with one row but 12 ms with nine (H100), so
that verifying proposals would cost more than they save. nf4.cu says what is faster and why. Many
rows (prompts) are multiplied as bitsandbytes does it: with the weights written out.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from machine import nvrtc

BLOCK = 64                           # weights that share a scale
CODE = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# The kernel multiplies 16-bit values of CODE * STRETCH and divides the float32 sums by STRETCH.
# With these factors the 16 values lie closest to 16-bit numbers: rounding them costs 0.063 % in
# bfloat16 (0.106 % unstretched) and 0.006 % in float16 (0.016 %).
STRETCH = {torch.bfloat16: 1.437, torch.float16: 1.6777}
EIGHTS = range(1, 10)                # there are kernels for so many rows of x, in eights
MAX_PARTS = 8                        # of K; more cost more to add up than they bring (H100)
PAIR_BYTES = 256 * 32 * 4            # the table of nf4.cu
FEW_ROWS = 8 * EIGHTS[-1]            # the kernel is used up to here until more were measured


class Linear4bit(Protocol):
    """What is used of bitsandbytes' layer."""

    in_features: int
    out_features: int
    weight: Any                      # .data, uint8, and .quant_state
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


# ------------------------------------------------------------------------------------- packing
def pack(weights: torch.Tensor) -> torch.Tensor:
    """(N, K/2) uint8 as bitsandbytes packs, two of a row in a byte -> (N/16, K/64, 512) uint8.

    512 bytes are 16 for each of 32 threads. Thread 4 g + t holds 16 weights along K, from 16 t on,
    of row g and of row g + 8; their bytes alternate.
    """
    n, width = weights.shape
    parts = weights.view(n // 16, 2, 8, width // 32, 4, 8)       # tile, half, g, block, t, byte
    return parts.permute(0, 3, 2, 4, 5, 1).reshape(n // 16, width // 32, 512)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    tiles, blocks, _ = words.shape
    parts = words.view(tiles, blocks, 8, 4, 8, 2)
    return parts.permute(0, 5, 2, 1, 3, 4).reshape(tiles * 16, blocks * 32)


def pack_scales(scales: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(N, K/64) float32 -> ((N/16, K/64, 16) float16 in the order of `pack`, the factor left out).

    float32 would cost 0.3 GiB of a 7B model. float16 of scale / largest keeps 11 bits of each scale
    down to 1/16,000 of the largest, and below it an error that no sum can show.
    """
    n, blocks = scales.shape
    factor = max(float(scales.abs().max()), 1e-30)
    parts = (scales / factor).half().view(n // 16, 2, 8, blocks)
    return parts.permute(0, 3, 2, 1).reshape(n // 16, blocks, 16), factor


def unpack_scales(scales: torch.Tensor, factor: float) -> torch.Tensor:
    """(N, K/64) float32."""
    tiles, blocks, _ = scales.shape
    parts = scales.view(tiles, blocks, 8, 2).permute(0, 3, 2, 1)
    return parts.reshape(tiles * 16, blocks).float() * factor


def scales_of(state) -> torch.Tensor:
    """The scales in a bitsandbytes QuantState, flat, float32. Nested ones are quantised themselves."""
    if not state.nested:
        return state.absmax.float()
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


@torch.no_grad()         # not inference_mode: a model must not be left with inference tensors
def packed(layers: list[Linear4bit], dtype: torch.dtype) -> "NF4Linear":
    """One layer of the outputs of these, side by side."""
    words, scales = [], []
    for layer in layers:
        n, k = layer.out_features, layer.in_features
        words.append(pack(layer.weight.data.view(torch.uint8).view(n, k // 2)))
        scales.append(scales_of(layer.weight.quant_state).view(n, k // BLOCK))
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    return NF4Linear(torch.cat(words), *pack_scales(torch.cat(scales)),
                     torch.cat(biases) if biases else None, dtype)


# --------------------------------------------------------------------------------- the kernels
class Plan(NamedTuple):
    """How a product is cut up for the device, in the words of nf4.cu. No plan changes a bit of it."""

    rows: int                        # of x for a block of threads, in eights
    tiles: int = 1
    warps: int = 8
    blocks: int = 1
    stages: int = 3
    least: int = 2

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        weights = self.warps * self.tiles * self.blocks * (512 + 32)
        return PAIR_BYTES + self.stages * (weights + 8 * self.rows * (128 * self.blocks + 16))


def plan_for(rows: int, n: int, room: int) -> Plan:
    """The plan for `rows` rows of x, N outputs and `room` bytes of shared memory.

    Fastest on an H100 of seven ways to cut, for outputs of 4096, 12288 and 22016. Consumer cards have
    room for 99 KiB, where some must do with blocks=1.
    """
    eights = min(-(-rows // 8), EIGHTS[-1])
    plan = Plan(eights, blocks=2 if eights <= 8 else 1)
    if n > 16384:
        plan = Plan(eights, tiles=2, blocks=2 if eights <= 3 else 1)
    elif n > 8192 and 1 < eights < 8:
        plan = Plan(eights, tiles=2, warps=4, least=3)
    return plan if plan.shared <= room else plan._replace(blocks=1)


def parts_of(n: int, k: int, processors: int) -> int:
    """The number of parts that K is split into for this many multiprocessors.

    It depends on the matrix alone, so that all numbers of rows add in one order. Wanted are 1.5 to
    4 blocks of threads, of 128 outputs each, for every multiprocessor, as close to a whole number
    of them as possible.
    """
    tiles, blocks = -(-n // 128), k // BLOCK

    def busy(parts: int) -> float:
        each = tiles * parts / processors
        return each / math.ceil(each) - max(0, 1.5 - each) - max(0, each - 4)

    parts = max(range(1, min(MAX_PARTS, blocks) + 1), key=busy)        # the smallest of equals
    return -(-blocks // -(-blocks // parts))                          # none is empty


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_room(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads can have."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 99 * 1024)


@functools.cache
def kernel(device: torch.device, dtype: torch.dtype, name: str, plan: Plan) -> nvrtc.Kernel:
    defines = {key.upper(): value for key, value in plan._asdict().items()}
    source = Path(__file__).with_name("nf4.cu").read_text(encoding="utf-8")
    with torch.cuda.device(device):
        return nvrtc.build(source, name, {"HALF": int(dtype == torch.float16), **defines},
                           plan.shared if name == "product" else 0)


@functools.cache
def code(device: torch.device) -> torch.Tensor:
    """CODE, (16,) float32."""
    return torch.tensor(CODE, device=device)


@functools.cache
def pairs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(256, 2): the two weights in each byte, times STRETCH. The high four bits come first."""
    stretched = torch.tensor(CODE, dtype=torch.float64) * STRETCH[dtype]
    return torch.cartesian_prod(*[stretched.to(device, dtype)] * 2)


# ----------------------------------------------------------------------------------- the layer
class NF4Linear(nn.Module):
    """What bitsandbytes' Linear4bit computes, from packed weights.

    fused: where other layers read the same input, the product of all of them; else this layer.
    """

    def __init__(self, words: torch.Tensor, scales: torch.Tensor, factor: float,
                 bias: torch.Tensor | None, dtype: torch.dtype):
        """words (N/16, K/64, 512), scales (N/16, K/64, 16), factor: of pack and pack_scales.

        bias (N,) or None; dtype: bfloat16 or float16, in which x and weights are multiplied.
        """
        super().__init__()
        # Parameters, so that whoever counts a model's weights counts them.
        self.words = nn.Parameter(words, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.factor, self.dtype, self.device = factor, dtype, words.device
        self.out_features, self.in_features = len(words) * 16, words.shape[1] * BLOCK
        self.few_rows = FEW_ROWS
        self.arrived = torch.zeros(32 * -(-len(words) // 4), dtype=torch.int32, device=words.device)
        self.__dict__["fused"] = self                # nn.Module would count its parameters twice

    def rows(self, first: int, last: int) -> "NF4Linear":
        """The layer of these outputs, both multiples of 16, on the same memory."""
        part = slice(first // 16, last // 16)
        bias = None if self.bias is None else self.bias.data[first:last]
        layer = NF4Linear(self.words.data[part], self.scales.data[part], self.factor, bias, self.dtype)
        layer.few_rows = self.few_rows
        layer.__dict__["fused"] = self
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        few = self.words.is_cuda and 0 < len(rows) <= self.few_rows
        y = self.few(rows) if few else self.many(rows)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def many(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, K) -> (M, N) with the weights written out."""
        return F.linear(x, self.weight(), self.bias)

    def few(self, x: torch.Tensor, plan: Plan | None = None) -> torch.Tensor:
        """x (M, K) -> (M, N) by the kernel."""
        (m, k), n, device = x.shape, self.out_features, self.device
        groups = -(-m // FEW_ROWS)                   # of rows, as large as each other
        plan = plan or plan_for(-(-m // groups), n, shared_room(device))
        parts = parts_of(n, k, processors(device))
        x = x.contiguous()
        if x.data_ptr() % 16:                        # the kernel reads 16 bytes at a time
            x = x.clone()
        groups, tiles = -(-m // (8 * plan.rows)), -(-n // (16 * plan.tiles * plan.warps))
        sums = groups * tiles * plan.warps * plan.tiles * plan.rows * 128
        y = x.new_empty(m, n)
        partial = x.new_empty(parts * sums if parts > 1 else 0, dtype=torch.float32)
        with torch.cuda.device(device):
            kernel(device, self.dtype, "product", plan)(
                (groups, tiles, parts), 32 * plan.warps, x, self.words, self.scales,
                pairs(device, self.dtype), self.bias, y, partial, self.arrived, m, n, k,
                -(-(k // BLOCK) // parts), self.factor / STRETCH[self.dtype])
        return y

    def weight(self) -> torch.Tensor:
        """The weights (N, K), rounded to dtype."""
        if not self.words.is_cuda:
            return self.exact_weight().to(self.dtype)
        out = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.device)
        plan, count = Plan(1), self.words.numel() // 512
        with torch.cuda.device(self.device):
            kernel(self.device, self.dtype, "dequantise", plan)(
                (-(-count // plan.warps), 1, 1), 32 * plan.warps, self.words, self.scales,
                code(self.device), out, self.out_features, self.in_features, self.factor)
        return out

    def exact_weight(self) -> torch.Tensor:
        """The weights (N, K) in float32, by PyTorch's own operations: the kernels' reference."""
        nibbles = unpack(self.words.data)
        values = code(self.device)[torch.stack([nibbles >> 4, nibbles & 15], -1).int()].flatten(1)
        return values * unpack_scales(self.scales.data, self.factor).repeat_interleave(BLOCK, 1)
