"""The matrix products of a 7B model's layers with few rows: `python benchmark.py products`.

For each number of rows, the time of all products of 32 layers: 4-bit weights by the fused kernel and
by bitsandbytes as it dispatches, and 16-bit weights by PyTorch; the share of the device's copy speed
at which weights are read; errors; and how often the largest logit is the same whatever the rows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from base import UserError, log, option

ROWS = (1, 2, 4, 8, 9, 16, 17, 25, 32, 33, 49, 64, 65, 128, 256)
LAYERS, DEPTH = 8, 32                # layers in turn, so that none is in the cache; the model's
REPEATS = 7                          # of which the median is taken
WAYS = ("fused", "bitsandbytes", "16 bits")
NIBBLE_BYTES = 4.127 / 8             # of a weight as bitsandbytes stores it, with its share of scales
WANTED_MS = {1: 3.0, 9: 3.0, 16: 3.0, 32: 3.8, 64: 5.0}              # of 32 layers, one H100


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the products of a 7B model's layers by the number of rows, with 4-bit and 16-bit
    weights.
    """

    output: Path = option(Path("benchmark_products.json"), "where all numbers go")
    compare: Path | None = option(None,
                                  "an earlier output: print old, new and ratio of each figure")
    dtype: Literal["bfloat16", "float16"] = option("bfloat16", "in which rows are multiplied")
    device: str = option("auto", "auto, cuda or cuda:N")


def shapes() -> dict[str, tuple[list[int], int]]:
    """{product: (outputs of each layer in it, inputs)}."""
    from vlm.peers import TEXT_7B

    hidden, wide = TEXT_7B["hidden_size"], TEXT_7B["intermediate_size"]
    return {"q k v": ([hidden] * 3, hidden), "o": ([hidden], hidden),
            "gate up": ([wide] * 2, hidden), "down": ([hidden], wide)}


# ------------------------------------------------------------------------------------- timing
def time_product(works: list, device) -> dict:
    """us of one product: the median over repeats of a CUDA graph of all `works`, least and most."""
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


def measure_product(outputs: list[int], k: int, runtime, copy_rate: float) -> dict:
    """{"by_rows": {rows: {way: times and share of the copy speed}}, "error": {way: relative}}."""
    import torch
    import torch.nn.functional as F

    from vlm.adopt_nf4 import distance
    from vlm.nf4 import packed
    from vlm.peers import linear_4bit

    layers, weights = [], []
    for _ in range(LAYERS):
        parts = [random_weight(n, k, runtime) for n in outputs]
        weights.append(torch.cat(parts))
        layers.append([linear_4bit(part, runtime) for part in parts])
    fused = [packed(parts, runtime.dtype) for parts in layers]
    sizes = {"fused": sum(part.nbytes for part in fused[0].parameters()),
             "bitsandbytes": sum(outputs) * k * NIBBLE_BYTES, "16 bits": weights[0].nbytes}

    def works_of(way: str, x) -> list:
        if way == "fused":
            return [lambda layer=layer: layer.few(x) for layer in fused]
        if way == "bitsandbytes":
            return [lambda parts=parts: [part(x) for part in parts] for parts in layers]
        return [lambda weight=weight: F.linear(x, weight) for weight in weights]

    by_rows = {}
    for rows in ROWS:
        x = torch.randn(rows, k, device=runtime.device).to(runtime.dtype)
        by_rows[rows] = {way: time_product(works_of(way, x), runtime.device) for way in WAYS}
        for way, times in by_rows[rows].items():
            times["share_of_copy"] = sizes[way] / (times["us"] * 1e-6) / copy_rate
    x = torch.randn(64, k, device=runtime.device).to(runtime.dtype)
    exact = x.double() @ fused[0].exact_weight().double().T
    theirs = torch.cat([layer(x) for layer in layers[0]], -1)
    error = {"fused": distance(fused[0].few(x), exact), "bitsandbytes": distance(theirs, exact)}
    return {"by_rows": by_rows, "error": error}


def random_weight(n: int, k: int, runtime):
    import torch

    return (torch.randn(n, k, device=runtime.device) * 0.02).to(runtime.dtype)


# ---------------------------------------------------------------------------------- agreement
def agreement(runtime) -> dict:
    """{kind of logits: {way: shares of rows whose argmax is equal}}.

    Compared are each row alone with the same row among 64 and among 9, and with float64.
    """
    import torch

    from vlm.nf4 import packed
    from vlm.peers import TEXT_7B, WORDS_7B, linear_4bit

    shares: dict[str, dict] = {}
    for kind in ("random", "near-tied"):
        weight = random_weight(WORDS_7B, TEXT_7B["hidden_size"], runtime)
        if kind == "near-tied":                      # each output has a twin about a rounding away
            half = weight[:WORDS_7B // 2]
            weight = torch.cat([half, half * (1 + 2**-7 * torch.randn_like(half[:, :1]))])
        layer = linear_4bit(weight, runtime)
        fused = packed([layer], runtime.dtype)
        x = random_weight(64, TEXT_7B["hidden_size"], runtime)
        exact = (x.double() @ fused.exact_weight().double().T).argmax(-1)
        shares[kind] = {}
        for name, way in (("fused", fused.few), ("bitsandbytes", layer)):
            alone, among_9, among_64 = (
                torch.cat([way(part).argmax(-1) for part in x.split(size)]) for size in (1, 9, 64))
            others = {"among 64": among_64, "among 9": among_9, "float64": exact}
            shares[kind][name] = {other: float((alone == best).float().mean())
                                  for other, best in others.items()}
    return shares


# ------------------------------------------------------------------------------------ measure
def measure(config: Config) -> dict:
    import torch

    from benchmarks.limits import copy_rate
    from machine.device import Runtime, device_name
    from vlm.adopt_nf4 import compile_all

    runtime = Runtime.choose(config.device, config.dtype, "4bit")
    if runtime.device.type != "cuda":
        raise UserError("benchmark.py products needs a CUDA device: its kernel runs nowhere else")
    rate, products = copy_rate(runtime.device), {}
    with torch.inference_mode(), torch.cuda.device(runtime.device):
        device = torch.device("cuda", torch.cuda.current_device())
        compile_all(device, runtime.dtype, {sum(outputs) for outputs, _ in shapes().values()})
        for name, (outputs, k) in shapes().items():
            products[name] = measure_product(outputs, k, runtime, rate)
            times = [(rows, ways["fused"]["us"]) for rows, ways in products[name]["by_rows"].items()]
            log(f"products | {name:7} | fused, us by rows: " + " ".join(f"{r}:{us:.1f}" for r, us in times))
        equal = agreement(runtime)
    totals = {way: {rows: DEPTH / 1000 * sum(product["by_rows"][rows][way]["us"]
                                             for product in products.values()) for rows in ROWS}
              for way in WAYS}
    wanted = [{"what": f"{rows} rows, ms", "measured": totals["fused"][rows], "wanted": f"<= {bound}"}
              for rows, bound in WANTED_MS.items()]
    return {"device": device_name(runtime.device), "dtype": config.dtype,
            "copy_gib_per_s": rate / 2**30, "products": products, "all_layers_ms": totals,
            "equal_argmax": equal, "wanted": wanted,
            "wanted_of": "of all products of 32 layers, one H100"}


def show(results: dict) -> None:
    """The table, as log lines."""
    log(f"table | {results['device']} | copy {results['copy_gib_per_s']:.0f} GiB/s | ms of the "
        "products of 32 layers, by rows")
    for way, times in results["all_layers_ms"].items():
        log(f"table | {way:12} | " + " | ".join(f"{rows} {ms:.2f}" for rows, ms in times.items()))
    for name, product in results["products"].items():
        shares = [(rows, ways["fused"]["share_of_copy"]) for rows, ways in product["by_rows"].items()]
        error = product["error"]
        log(f"table | {name:7} | fused, share of the copy's speed by rows: "
            + " ".join(f"{rows}:{share:.0%}" for rows, share in shares)
            + f" | error {error['fused']:.5f} (bitsandbytes {error['bitsandbytes']:.5f})")
    for kind, ways in results["equal_argmax"].items():
        for name, shares in ways.items():
            log(f"table | argmax of a row alone, {kind} logits, {name}, equal to that "
                + ", ".join(f"{other} {share:.1%}" for other, share in shares.items()))


def one_line(results: dict) -> str:
    times = results["all_layers_ms"]["fused"]
    return "fused, ms of 32 layers: " + ", ".join(
        f"{rows} rows {times[rows]:.2f}" for rows in (1, 9, 17, 32, 64))
