"""Products of few rows with bitsandbytes' NF4 weights, near the speed at which memory is read.

    adopt(language_model, torch.bfloat16)         # Linear4bit -> NF4Linear, where that is right and faster
    layer.self_attn.q_proj(x)                     # as before; NF4Linear.fused is q, k and v as one product

bitsandbytes needs 3.5 ms for all products of a 7B model and one row, but 12 ms from nine rows on (H100): verifying
proposals would cost more than they bring. nf4.cu holds what is faster and why. Each weight is stored once: packed
anew, 16 x 64 of them in a run, and transformers' own forward goes through NF4Linear too. Many rows (prompts) are
multiplied as bitsandbytes does it, with the weights written out.
"""

import copy
import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from base import first_line, log
from machine import nvrtc

BLOCK = 64                           # weights that share a scale
CODE = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# The kernel multiplies 16-bit values of code * STRETCH and divides the sums. At these factors the 16 values happen to
# lie closest to 16-bit numbers: bfloat16's rounding costs 0.063 % instead of 0.106 %, float16's 0.006 % not 0.016 %.
STRETCH = {torch.bfloat16: 1.437, torch.float16: 1.6777}
PAIR_BYTES = 256 * 32 * 4            # the table of nf4.cu
EIGHTS = (1, 2, 3, 4, 6, 8)          # rows of x that there are kernels for, in eights
MOST_ROWS = (64, 128, 192, 256)      # that the kernel may be used for; how many is measured
CHECKED_ROWS = (1, 9, 17, 25, 33)    # that must give the same alone and among others: one of each plan
TIMES = 9                            # of which a timing is the median


class Plan(NamedTuple):
    """How a product is shared out on the device: nf4.cu says what the names mean. No plan changes a bit of it."""

    rows: int                        # of x that a block of threads takes, in eights
    tiles: int = 1
    warps: int = 8
    blocks: int = 1
    stages: int = 3
    least: int = 2

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        stage = self.warps * self.tiles * self.blocks * (512 + 32) + 8 * self.rows * (128 * self.blocks + 16)
        return PAIR_BYTES + self.stages * stage


def eights(rows: int) -> int:
    """The rows of a plan for so many rows of x."""
    return next((number for number in EIGHTS if rows <= 8 * number), EIGHTS[-1])


def candidates(rows: int, device: torch.device) -> list[Plan]:
    """Plans for so many eights of rows that fit into the device; which is fastest is measured."""
    room = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)
    plans = [Plan(rows, *cut) for cut in ((1, 8, 1, 3, 2), (1, 8, 2, 3, 2), (2, 8, 1, 3, 2), (2, 8, 2, 3, 2),
                                          (2, 4, 1, 3, 3), (2, 4, 2, 3, 2), (2, 8, 1, 4, 1))]
    return [plan for plan in plans if plan.shared <= room]


def parts_of(n: int, k: int, processors: int) -> int:
    """Into how many parts to share out K: by the matrix alone, so that all numbers of rows add in one order.

    Two to four blocks of threads, of 128 outputs each, for every multiprocessor, as full a number as possible.
    """
    tiles, blocks = -(-n // 128), k // BLOCK

    def busy(parts: int) -> float:
        each = tiles * parts / processors
        return each / math.ceil(each) - max(0, 1.5 - each) - max(0, each - 4)

    parts = max(range(1, min(8, blocks) + 1), key=busy)              # the first of equals
    return -(-blocks // -(-blocks // parts))                         # none of them is empty


# ------------------------------------------------------------------------------------------------- packing
def pack(weights: torch.Tensor) -> torch.Tensor:
    """weights (N, K/2) uint8 as bitsandbytes has them, two of a row in a byte -> (N/16, K/64, 512) uint8.

    16 bytes of each of 32 threads: of rows g and g + 8 in turn, and of 16 weights along K, for 4 g + t = thread.
    """
    n, width = weights.shape
    parts = weights.view(n // 16, 2, 8, width // 32, 4, 8)                       # half, g, block, t, byte
    return parts.permute(0, 3, 2, 4, 5, 1).reshape(n // 16, width // 32, 512)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """What `pack` was given."""
    tiles, blocks, _ = words.shape
    return words.view(tiles, blocks, 8, 4, 8, 2).permute(0, 5, 2, 1, 3, 4).reshape(tiles * 16, blocks * 32)


def pack_scales(scales: torch.Tensor) -> tuple[torch.Tensor, float]:
    """scales (N, K/64) float32 -> ((N/16, K/64, 16) float16, in the order of `pack`; the factor to multiply by).

    float16 keeps 11 bits of a scale, and of one below 1/16,000 of the largest as many as the sum can show.
    """
    n, blocks = scales.shape
    factor = max(float(scales.abs().max()), 1e-30)
    parts = (scales / factor).half().view(n // 16, 2, 8, blocks)
    return parts.permute(0, 3, 2, 1).reshape(n // 16, blocks, 16), factor


def unpack_scales(scales: torch.Tensor, factor: float) -> torch.Tensor:
    """(N, K/64) float32."""
    tiles, blocks, _ = scales.shape
    return scales.view(tiles, blocks, 8, 2).permute(0, 3, 2, 1).reshape(tiles * 16, blocks).float() * factor


def scales_of(state) -> torch.Tensor:
    """The scales of a bitsandbytes QuantState, flat, float32; they may be quantised themselves."""
    if not state.nested:
        return state.absmax.float()
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


@functools.cache
def pairs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(256, 2): the two weights of each byte, times STRETCH. The high bits come first, as in bitsandbytes' bytes."""
    code = (torch.tensor(CODE, dtype=torch.float64) * STRETCH[dtype]).to(device, dtype)
    return torch.cartesian_prod(code, code)


@functools.cache
def code(device: torch.device) -> torch.Tensor:
    """CODE, (16,) float32."""
    return torch.tensor(CODE, device=device)


# -------------------------------------------------------------------------------------------------- product
@functools.cache
def kernel(device: torch.device, dtype: torch.dtype, name: str, plan: Plan) -> nvrtc.Kernel:
    defines = {"HALF": int(dtype == torch.float16), **{key.upper(): value for key, value in plan._asdict().items()}}
    source = Path(__file__).with_name("nf4.cu").read_text()
    with torch.cuda.device(device):
        return nvrtc.build(source, name, defines, plan.shared if name == "product" else 0)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class NF4Linear(nn.Module):
    """A linear layer of packed NF4 weights: what bitsandbytes' Linear4bit computes, without its own copy.

    fused, where other layers read the same input: the product of all of them, on the same memory; else the layer.
    """

    def __init__(self, words: torch.Tensor, scales: torch.Tensor, factor: float, bias: torch.Tensor | None,
                 dtype: torch.dtype):
        """words (N/16, K/64, 512), scales (N/16, K/64, 16), factor: of pack and pack_scales; bias (N,) or None.

        dtype: bfloat16 or float16, of what is multiplied.
        """
        super().__init__()
        # Parameters, so that what counts a model's weights counts them.
        self.words, self.scales = (nn.Parameter(part, requires_grad=False) for part in (words, scales))
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.factor, self.dtype, self.device, self.most_rows = factor, dtype, words.device, MOST_ROWS[0]
        self.plans = {number: Plan(number) for number in EIGHTS}         # until faster ones are known
        self.out_features, self.in_features = len(words) * 16, words.shape[1] * BLOCK
        self.arrived = torch.zeros(32 * -(-len(words) // 4), dtype=torch.int32, device=words.device)
        self.__dict__["fused"] = self                # nn.Module would count its parameters twice

    def rows(self, first: int, last: int) -> "NF4Linear":
        """The layer of these outputs, multiples of 16, on the same memory."""
        bias, part = None if self.bias is None else self.bias.data[first:last], slice(first // 16, last // 16)
        layer = NF4Linear(self.words.data[part], self.scales.data[part], self.factor, bias, self.dtype)
        layer.__dict__["fused"], layer.most_rows, layer.plans = self, self.most_rows, self.plans
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        few = self.words.is_cuda and 0 < len(rows) <= self.most_rows
        return (self.few(rows) if few else self.many(rows)).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def many(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, K) -> (M, N) with the weights written out, as bitsandbytes does it."""
        return F.linear(x, self.weight(), self.bias)

    def few(self, x: torch.Tensor, plan: Plan | None = None) -> torch.Tensor:
        """x (M, K) -> (M, N) by the kernel."""
        (m, k), n = x.shape, self.out_features
        plan, parts = plan or self.plans[eights(m)], parts_of(n, k, processors(self.device))
        x = x.contiguous()
        x = x if x.data_ptr() % 16 == 0 else x.clone()               # it is read 16 bytes at a time
        groups, tiles = -(-m // (8 * plan.rows)), -(-n // (16 * plan.tiles * plan.warps))
        y, sums = x.new_empty(m, n), groups * tiles * plan.warps * plan.tiles * plan.rows * 128
        partial = x.new_empty(parts * sums if parts > 1 else 0, dtype=torch.float32)
        with torch.cuda.device(self.device):
            kernel(self.device, self.dtype, "product", plan)(
                (groups, tiles, parts), 32 * plan.warps, x, self.words, self.scales,
                pairs(self.device, self.dtype), self.bias, y, partial, self.arrived, m, n, k,
                -(-(k // BLOCK) // parts), self.factor / STRETCH[self.dtype])
        return y

    def weight(self) -> torch.Tensor:
        """The weights (N, K), rounded as bitsandbytes rounds them."""
        if not self.words.is_cuda:
            return self.exact_weight().to(self.dtype)
        out = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.device)
        plan = Plan(1)
        with torch.cuda.device(self.device):
            kernel(self.device, self.dtype, "dequantise", plan)(
                (-(-self.words.numel() // 512 // plan.warps), 1, 1), 32 * plan.warps, self.words, self.scales,
                code(self.device), out, self.out_features, self.in_features, self.factor)
        return out

    def exact_weight(self) -> torch.Tensor:
        """The weights (N, K) in float32, by PyTorch's own operations: what the kernels are tested against."""
        nibbles = unpack(self.words.data)
        values = code(self.device)[torch.stack([nibbles >> 4, nibbles & 15], -1).int()].flatten(1)
        return values * unpack_scales(self.scales.data, self.factor).repeat_interleave(BLOCK, 1)


# ------------------------------------------------------------------------------------------------- adoption
def adopt(language_model: nn.Module, dtype: torch.dtype) -> bool:
    """Pack a LlamaModel's Linear4bit layers into NF4Linear, where that is right and faster; whether it was done.

    One group of layers at a time, whose old form is freed then. transformers' forward uses the new layers as well.
    """
    groups = [group for layer in language_model.layers for group in groups_of(layer)]
    if not any(type(getattr(parent, name)).__name__ == "Linear4bit" for parent, names in groups for name in names):
        return False
    device = language_model.embed_tokens.weight.device
    if device.type != "cuda":
        return False
    try:
        if reason := next(filter(None, (unfit(parent, names, dtype) for parent, names in groups)), None):
            raise RuntimeError(reason)
        with torch.cuda.device(device):
            settings = trial([[getattr(parent, name) for name in names] for parent, names in groups[:4]], dtype)
    except (RuntimeError, OSError) as error:         # no compiler library, a device that it does not know, not faster
        log(f"nf4 | WARNING | 4-bit products are bitsandbytes': {first_line(error)}")
        return False
    for number, (parent, names) in enumerate(groups):
        layers = [getattr(parent, name) for name in names]
        fused, first = packed(layers, dtype), 0
        fused.plans, fused.most_rows = settings[number % len(settings)]
        for name, layer in zip(names, layers):
            setattr(parent, name, fused if len(names) == 1 else fused.rows(first, first + layer.out_features))
            first += layer.out_features
    return True


def groups_of(layer: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """(parent, names) of the linear layers of one LLaMA layer that read the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [(attention, ["q_proj", "k_proj", "v_proj"]), (attention, ["o_proj"]), (mlp, ["gate_proj", "up_proj"]),
            (mlp, ["down_proj"])]


def unfit(parent: nn.Module, names: list[str], dtype: torch.dtype) -> str:
    """Why these layers can't be packed, or ""."""
    if dtype not in STRETCH:
        return f"the model computes in {dtype}"
    layers = [getattr(parent, name) for name in names]
    for name, layer in zip(names, layers):
        state = getattr(layer.weight, "quant_state", None)
        if type(layer).__name__ != "Linear4bit" or state is None or state.quant_type != "nf4":
            return f"{name} is not in NF4"
        if state.blocksize != BLOCK or layer.in_features % BLOCK or layer.out_features % BLOCK:
            return f"{name} is {layer.out_features} x {layer.in_features} in blocks of {state.blocksize}"
    return "" if len({layer.bias is None for layer in layers}) == 1 else f"only some of {names} have a bias"


@torch.no_grad()         # not inference_mode: the modules must not be left with inference tensors
def packed(layers: list[nn.Module], dtype: torch.dtype) -> NF4Linear:
    """One layer of the outputs of these Linear4bit, side by side."""
    words, scales = [], []
    for layer in layers:
        n, k = layer.out_features, layer.in_features
        words.append(pack(layer.weight.data.view(torch.uint8).view(n, k // 2)))
        scales.append(scales_of(layer.weight.quant_state).view(n, k // BLOCK))
    bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
    return NF4Linear(torch.cat(words), *pack_scales(torch.cat(scales)), bias, dtype)


@torch.inference_mode()
def trial(groups: list[list[nn.Module]], dtype: torch.dtype) -> list[tuple[dict[int, Plan], int]]:
    """(plans, most rows for the kernel) of each group; RuntimeError unless the kernel is right and pays.

    groups: of the first LLaMA layer; groups of other layers are like them.
    """
    settings, ours_us, theirs_us = [], [0.0, 0.0], [0.0, 0.0]
    compile_all(groups[0][0].weight.device, dtype)
    for layers in groups:
        fused = packed(layers, dtype)
        fused.plans = {number: fastest(fused, number) for number in EIGHTS}
        check(fused, layers)
        for number, rows in enumerate((1, 9)):
            x = torch.randn(rows, fused.in_features, device=fused.device, dtype=dtype)
            ours_us[number] += microseconds(lambda x=x: fused.few(x))                                     # noqa: B023
            theirs_us[number] += microseconds(lambda x=x: [layer(x) for layer in layers])                 # noqa: B023
        settings.append((fused.plans, max([MOST_ROWS[0], *(rows for rows in MOST_ROWS[1:] if pays(fused, rows))])))
    found = ", ".join(f"{rows} {ours:.0f} ({theirs:.0f})" for rows, ours, theirs in zip("19", ours_us, theirs_us))
    if sum(ours_us) >= sum(theirs_us):
        raise RuntimeError(f"the fused ones are not faster (us a layer by rows: {found})")
    log(f"nf4 | fused 4-bit products of up to {min(most for _, most in settings)} rows | us a layer (bitsandbytes') "
        f"by rows: {found}")
    return settings


def compile_all(device: torch.device, dtype: torch.dtype) -> None:
    """The kernels of all plans, side by side: each takes a processor a quarter of a second."""
    plans = [plan for number in EIGHTS for plan in candidates(number, device)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda plan: kernel(device, dtype, "product", plan), plans))


def fastest(fused: NF4Linear, number: int) -> Plan:
    """The plan that takes least time for this layer and so many eights of rows."""
    x = torch.randn(8 * number, fused.in_features, device=fused.device, dtype=fused.dtype)
    return min(candidates(number, fused.device), key=lambda plan: microseconds(lambda: fused.few(x, plan)))


def pays(fused: NF4Linear, rows: int) -> bool:
    """Whether the kernel is faster than writing the weights out."""
    x = torch.randn(rows, fused.in_features, device=fused.device, dtype=fused.dtype)
    return microseconds(lambda: fused.few(x)) < microseconds(lambda: fused.many(x))


def check(fused: NF4Linear, layers: list[nn.Module]) -> None:
    """RuntimeError unless the kernels give what bitsandbytes' weights give in float32, as closely as its own do."""
    from bitsandbytes.functional import dequantize_4bit

    x = torch.randn(64, fused.in_features, device=fused.device, dtype=fused.dtype)
    few, many, first = fused.few(x), fused.many(x), 0
    for layer in layers:
        part, state = slice(first, first + layer.out_features), copy.copy(layer.weight.quant_state)
        bias, first, state.dtype = layer.bias, part.stop, torch.float32
        weight = dequantize_4bit(layer.weight.data, state)
        exact = F.linear(x.float(), weight, None if bias is None else bias.float())
        error = distance(F.linear(x, weight.to(x), None if bias is None else bias.to(x)), exact)
        for name, ours in (("few", few), ("many", many)):
            if not (found := distance(ours[:, part], exact)) <= 1.3 * error + 1e-4:       # scales are float16: 2e-4
                raise RuntimeError(f"the fused product of {name} rows is off by {found:.2%} (bitsandbytes {error:.2%})")
    for rows in CHECKED_ROWS:
        if not torch.equal(fused.few(x[:rows]), few[:rows]):
            raise RuntimeError(f"{rows} rows alone differ from the same rows among others")


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def microseconds(work: Callable) -> float:
    """The median time that the device takes for work(), with nothing of it in the cache."""
    filler, times = torch.empty(2**26, dtype=torch.uint8, device="cuda"), []
    work()
    for _ in range(TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(8):                           # empties the cache, and gives the host time to launch
            filler.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return sorted(times)[TIMES // 2]
