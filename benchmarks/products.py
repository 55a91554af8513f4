"""The matrix products of a 7B model's layers at few rows: `python benchmark.py products`.

4-bit weights by the fused kernel, by bitsandbytes as it dispatches, and bf16 weights by PyTorch; for each number of
rows, the time of all products of 32 layers and the share of the device's copy speed at which weights are read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from base import UserError, log, option

ROWS = (1, 2, 4, 8, 9, 16, 17, 24, 32, 33, 48, 64, 65, 128, 256)
LAYERS, DEPTH = 8, 32                # layers in turn, so that none is in the cache; the model's
REPEATS = 7                          # of which the median is taken


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the products of a 7B model's layers by the number of rows, on 4-bit and on 16-bit weights."""

    output: Path = option(Path("benchmark_products.json"), "where all numbers go")
    compare: Path | None = option(None, "an earlier output: print old, new and ratio of each figure")
    dtype: Literal["bfloat16", "float16"] = option("bfloat16", "of what is multiplied")
    device: str = option("auto", "auto, cuda or cuda:N")


def shapes() -> dict[str, list[int]]:
    """{product: outputs of each layer in it, then the inputs}."""
    from vlm.peers import TEXT_7B

    hidden, wide = TEXT_7B["hidden_size"], TEXT_7B["intermediate_size"]
    return {"q k v": [hidden, hidden, hidden, hidden], "o": [hidden, hidden], "gate up": [wide, wide, hidden],
            "down": [hidden, wide]}


def time_product(works: list, device) -> dict:
    """us of one product: the median over repeats of a graph of all `works`, with the least and the most."""
    import torch

    from machine.graphs import capture

    graph, _ = capture(lambda: [work() for work in works])
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(1000 * start.elapsed_time(end) / len(works))
    times.sort()
    return {"us": times[REPEATS // 2], "least_us": times[0], "most_us": times[-1]}


def measure_product(name: str, sizes: list[int], runtime, rates: dict) -> dict:
    """{rows: {way: time and share of the copy speed}} of one product, and its errors."""
    import torch
    import torch.nn.functional as F

    from vlm.nf4 import EIGHTS, distance, fastest, packed
    from vlm.peers import linear_4bit

    *outputs, k = sizes
    layers, weights = [], []
    for _ in range(LAYERS):
        parts = []
        for n in outputs:
            weight = torch.randn(n, k, device=runtime.device) * 0.02
            parts.append(linear_4bit(weight.to(runtime.dtype), runtime))
        layers.append(parts)
        weights.append(torch.randn(sum(outputs), k, device=runtime.device).to(runtime.dtype))
    fused = [packed(parts, runtime.dtype) for parts in layers]
    plans = {number: fastest(fused[0], number) for number in EIGHTS}
    for layer in fused:
        layer.plans = plans
    size = {"fused": sum(part.nbytes for part in fused[0].parameters()), "bf16": weights[0].nbytes}
    size["bitsandbytes"] = sum(outputs) * k * 4.127 / 8
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, k, device=runtime.device).to(runtime.dtype)
        ways = {"fused": [lambda layer=layer: layer.few(x) for layer in fused],                               # noqa: B023
                "bitsandbytes": [lambda parts=parts: [layer(x) for layer in parts] for parts in layers],      # noqa: B023
                "bf16": [lambda weight=weight: F.linear(x, weight) for weight in weights]}                    # noqa: B023
        found[rows] = {way: time_product(works, runtime.device) for way, works in ways.items()}
        for way, times in found[rows].items():
            times["share_of_copy"] = size[way] / (times["us"] * 1e-6) / rates["copy"]
    exact_weight = fused[0].exact_weight().double()
    x = torch.randn(64, k, device=runtime.device).to(runtime.dtype)
    exact = x.double() @ exact_weight.T
    theirs = torch.cat([layer(x) for layer in layers[0]], -1)
    found["plans"] = {number: plan._asdict() for number, plan in plans.items()}
    found["error"] = {"fused": distance(fused[0].few(x), exact), "bitsandbytes": distance(theirs, exact)}
    log(f"products | {name:7} | " + " | ".join(f"{rows} {found[rows]['fused']['us']:.1f} us" for rows in ROWS))
    return found


def agreement(runtime) -> dict:
    """Share of rows whose argmax is the same alone as among others, and as float64's; random and near-tied logits."""
    import torch

    from vlm.nf4 import packed
    from vlm.peers import TEXT_7B, linear_4bit

    k, n, rows = TEXT_7B["hidden_size"], 32000, 64
    shares = {}
    for kind in ("random", "near-tied"):
        weight = torch.randn(n, k, device=runtime.device) * 0.02
        if kind == "near-tied":                      # each output has a twin: the two differ by about a rounding
            weight[n // 2:] = weight[:n // 2] * (1 + 2**-7 * torch.randn(n // 2, 1, device=runtime.device))
        layer = linear_4bit(weight.to(runtime.dtype), runtime)
        fused = packed([layer], runtime.dtype)
        x = torch.randn(rows, k, device=runtime.device).to(runtime.dtype)
        ways = {"fused": fused.few, "bitsandbytes": layer}
        exact = (x.double() @ fused.exact_weight().double().T).argmax(-1)
        shares[kind] = {}
        for name, way in ways.items():
            together, alone = way(x).argmax(-1), torch.cat([way(row[None]).argmax(-1) for row in x])
            nine = torch.cat([way(part).argmax(-1) for part in x.split(9)])
            shares[kind][name] = {"alone": float((alone == together).float().mean()),
                                  "nine": float((nine == alone).float().mean()),
                                  "float64": float((alone == exact).float().mean())}
    return shares


def measure(config: Config) -> dict:
    import torch

    from benchmarks.limits import copy_rate
    from machine.device import Runtime, device_name
    from vlm.nf4 import compile_all

    runtime = Runtime.choose(config.device, config.dtype, "4bit")
    if runtime.device.type != "cuda":
        raise UserError("benchmark.py products needs a CUDA device: its kernel runs nowhere else")
    rates = {"copy": copy_rate(runtime.device)}
    with torch.inference_mode(), torch.cuda.device(runtime.device):
        compile_all(torch.device("cuda", torch.cuda.current_device()), runtime.dtype)
        products = {name: measure_product(name, sizes, runtime, rates) for name, sizes in shapes().items()}
        agree = agreement(runtime)
    totals = {way: {rows: DEPTH * sum(found[rows][way]["us"] for found in products.values()) / 1000 for rows in ROWS}
              for way in ("fused", "bitsandbytes", "bf16")}
    results = {"device": device_name(runtime.device), "dtype": config.dtype, "copy_gib_per_s": rates["copy"] / 2**30,
               "products": products, "all_layers_ms": totals, "agreement": agree,
               "wanted_of": "of all products of 32 layers, one H100"}
    return results | {"wanted": [
        {"what": f"{rows} rows, ms", "measured": totals["fused"][rows], "wanted": f"<= {bound}"}
        for rows, bound in ((1, 3.0), (9, 3.0), (16, 3.0), (32, 3.8), (64, 5.0))]}


def show(results: dict) -> None:
    """The table, as log lines."""
    log(f"table | {results['device']} | copy {results['copy_gib_per_s']:.0f} GiB/s | ms of the products of 32 layers")
    for way, times in results["all_layers_ms"].items():
        log(f"table | {way:12} | " + " | ".join(f"{rows} {ms:.2f}" for rows, ms in times.items()))
    for name, found in results["products"].items():
        shares = " ".join(f"{rows} {found[rows]['fused']['share_of_copy']:.0%}" for rows in ROWS[:-3])
        log(f"table | {name:7} | share of the copy's speed by rows: {shares} | error {found['error']['fused']:.5f} "
            f"(bitsandbytes {found['error']['bitsandbytes']:.5f})")
    for kind, ways in results["agreement"].items():
        log(f"table | equal argmax, {kind} logits | " + " | ".join(
            f"{name}: alone and among 64 {share['alone']:.1%}, among 9 {share['nine']:.1%}, and float64 "
            f"{share['float64']:.1%}" for name, share in ways.items()))


def one_line(results: dict) -> str:
    return "fused, ms of 32 layers: " + ", ".join(f"{rows} rows {results['all_layers_ms']['fused'][rows]:.2f}"
                                                  for rows in (1, 9, 17, 32, 64))
