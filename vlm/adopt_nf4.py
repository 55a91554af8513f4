"""Whether a model's 4-bit layers are multiplied by nf4.py or by bitsandbytes, decided once at loading.

    adopt(language_model, torch.bfloat16)         # Linear4bit -> NF4Linear, where it is right and faster

transformers' own forward goes through the new layers too, so no weight is stored twice.
"""

import copy
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from base import first_line, log
from vlm.nf4 import (
    BLOCK,
    EIGHTS,
    FEW_ROWS,
    STRETCH,
    Linear4bit,
    NF4Linear,
    kernel,
    packed,
    plan_for,
    shared_room,
)

MORE_ROWS = (128, 192, 256)          # beyond FEW_ROWS the kernel is used up to the last that pays
CHECKED_ROWS = range(1, FEW_ROWS, 8)                 # a number of rows for each kernel
TIMINGS = 9                            # of which a timing is the median
MAX_ERROR_RATIO = 1.3                # largest error allowed, in errors of bitsandbytes' own way
# Models that stay with bitsandbytes: logged once
REJECTED_MODELS: weakref.WeakSet = weakref.WeakSet()


def adopt(language_model: Any, dtype: torch.dtype) -> bool:
    """Pack a LlamaModel's Linear4bit layers into NF4Linear where it is right and faster; say if done.

    Layers are packed group by group, and each group's old form is freed before the next.
    """
    groups = [group for layer in language_model.layers for group in groups_of(layer)]
    kinds = {type(getattr(parent, name)).__name__ for parent, names in groups for name in names}
    device = language_model.embed_tokens.weight.device
    if "Linear4bit" not in kinds or device.type != "cuda" or language_model in REJECTED_MODELS:
        return False
    try:
        for parent, names in groups:
            if reason := unfit(parent, names, dtype):
                raise RuntimeError(reason)
        first_layer = [[getattr(parent, name) for name in names] for parent, names in groups[:4]]
        with torch.cuda.device(device):
            few_rows = trial(first_layer, dtype)
        del first_layer              # else its old form would stay
    # No compiler library, a device that it does not know, a wrong result, nothing gained.
    except (RuntimeError, OSError) as error:
        REJECTED_MODELS.add(language_model)
        log(f"nf4 | WARNING | 4-bit products are bitsandbytes': {first_line(error)}")
        return False
    for number, (parent, names) in enumerate(groups):
        replace(parent, names, dtype, few_rows[number % len(few_rows)])
    torch.cuda.empty_cache()         # the old form lies in pieces that no large tensor fits into
    return True


def replace(parent: nn.Module, names: list[str], dtype: torch.dtype, few_rows: int) -> None:
    """Put packed layers in the places of these Linear4bit layers."""
    layers = [getattr(parent, name) for name in names]
    fused, first = packed(layers, dtype), 0
    fused.few_rows = few_rows
    for name, layer in zip(names, layers):
        last = first + layer.out_features
        setattr(parent, name, fused if len(names) == 1 else fused.rows(first, last))
        first = last


def groups_of(layer: Any) -> list[tuple[nn.Module, list[str]]]:
    """(parent, names) of the linear layers of a LlamaDecoderLayer that read the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [(attention, ["q_proj", "k_proj", "v_proj"]), (attention, ["o_proj"]),
            (mlp, ["gate_proj", "up_proj"]), (mlp, ["down_proj"])]


def unfit(parent: nn.Module, names: list[str], dtype: torch.dtype) -> str:
    """Why these layers can't be packed, or ""."""
    if dtype not in STRETCH:
        return f"the model computes in {dtype}"
    layers = [getattr(parent, name) for name in names]
    for name, layer in zip(names, layers):
        state = getattr(layer.weight, "quant_state", None)
        if type(layer).__name__ != "Linear4bit" or state is None or state.quant_type != "nf4":
            return f"{name} is not in NF4"
        n, k = layer.out_features, layer.in_features
        if state.blocksize != BLOCK or k % BLOCK or n % BLOCK:
            return f"{name} is {n} x {k} in blocks of {state.blocksize}, wanted multiples of {BLOCK}"
    mixed = len({layer.bias is None for layer in layers}) > 1
    return f"only some of {', '.join(names)} have a bias" if mixed else ""


# --------------------------------------------------------------------------------------- trial
@torch.inference_mode()
def trial(groups: list[list[Linear4bit]], dtype: torch.dtype) -> list[int]:
    """The most rows to use the kernel for, by group; RuntimeError unless it is right and faster.

    groups: of the first LLaMA layer, which the other layers are like.
    """
    few_rows, ours_us, theirs_us = [], {1: 0.0, 9: 0.0}, {1: 0.0, 9: 0.0}
    sizes = {sum(layer.out_features for layer in layers) for layers in groups}
    compile_all(groups[0][0].weight.device, dtype, sizes)
    for layers in groups:
        fused = packed(layers, dtype)
        check(fused, layers)
        for rows in ours_us:
            ours, theirs = time_both(fused, layers, rows)
            ours_us[rows] += ours
            theirs_us[rows] += theirs
        few_rows.append(max([FEW_ROWS, *(rows for rows in MORE_ROWS if pays(fused, rows))]))
    table = ", ".join(f"{rows} {ours_us[rows]:.0f} ({theirs_us[rows]:.0f})" for rows in ours_us)
    if sum(ours_us.values()) >= sum(theirs_us.values()):
        raise RuntimeError(f"the fused ones are not faster, us a layer by rows: {table}")
    log(f"nf4 | fused 4-bit products up to {min(few_rows)} rows | us a layer (bitsandbytes') by "
        f"rows: {table}")
    return few_rows


def compile_all(device: torch.device, dtype: torch.dtype, sizes: set[int]) -> None:
    """The kernels for these numbers of outputs, side by side: each takes a CPU core 0.3 s."""
    room = shared_room(device)
    plans = {plan_for(8 * number, n, room) for n in sizes for number in EIGHTS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda plan: kernel(device, dtype, "product", plan), plans))


def check(fused: NF4Linear, layers: list[Linear4bit]) -> None:
    """RuntimeError unless the kernels give what bitsandbytes' weights give in float32.

    The error may be ERROR times that of bitsandbytes' way, and a row must not depend on the others.
    """
    from bitsandbytes.functional import dequantize_4bit

    x = torch.randn(FEW_ROWS, fused.in_features, device=fused.device, dtype=fused.dtype)
    few, many, first = fused.few(x), fused.many(x), 0
    for layer in layers:
        part = slice(first, first + layer.out_features)
        first = part.stop
        state = copy.copy(layer.weight.quant_state)
        state.dtype = torch.float32
        weight, bias = dequantize_4bit(layer.weight.data, state), layer.bias
        exact = F.linear(x.float(), weight, None if bias is None else bias.float())
        theirs = distance(F.linear(x, weight.to(x), None if bias is None else bias.to(x)), exact)
        for name, y in (("few", few), ("many", many)):
            ours = distance(y[:, part], exact)
            if not ours <= MAX_ERROR_RATIO * theirs + 1e-4:      # scales are float16: 2e-4
                raise RuntimeError(f"the fused product of {name} rows is off by {ours:.2%}, "
                                   f"bitsandbytes' by {theirs:.2%}")
    for rows in CHECKED_ROWS:
        if not torch.equal(fused.few(x[:rows]), few[:rows]):
            raise RuntimeError(f"{rows} rows alone differ from the same rows among others")


def time_both(fused: NF4Linear, layers: list[Linear4bit], rows: int) -> tuple[float, float]:
    """us of the kernel and of bitsandbytes' products."""
    x = torch.randn(rows, fused.in_features, device=fused.device, dtype=fused.dtype)
    return microseconds(lambda: fused.few(x)), microseconds(lambda: [layer(x) for layer in layers])


def pays(fused: NF4Linear, rows: int) -> bool:
    """Whether the kernel is faster than writing the weights out."""
    x = torch.randn(rows, fused.in_features, device=fused.device, dtype=fused.dtype)
    return microseconds(lambda: fused.few(x)) < microseconds(lambda: fused.many(x))


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def microseconds(work: Callable) -> float:
    """The median time that the device takes for work(), with none of its data in the cache."""
    filler, times = torch.empty(2**26, dtype=torch.uint8, device="cuda"), []
    work()
    for _ in range(TIMINGS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(8):                           # empties the cache; the host launches meanwhile
            filler.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return sorted(times)[TIMINGS // 2]
