"""The adapter at batch 1, as decoding runs it: `python benchmark.py adapter`.

Random weights of the default size: their proposals mean nothing, their costs are real. Our steps (a
cache of keys and values, CUDA graphs on a GPU) run beside two plain ways to the same proposals: the
module step by step with such a cache, and a whole pass without a cache for each token.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from base import UserError, check_counts, log, option

if TYPE_CHECKING:                    # torch is imported only after the flags are read
    import torch

    from token_adapter import AdapterConfig, TokenAdapter

REPEATS = 30                   # timings of each figure
PROPOSALS = 8                  # tokens of a chain
READ = 5                       # newly verified tokens that a round reads first
PREFIX = 20                    # tokens verified before

EXPLANATION = (
    f"Step: one proposal more, the difference of chains of {PROPOSALS} and of 2 after {PREFIX} "
    f"verified tokens. Eight: a chain of {PROPOSALS} after {READ} newly verified tokens are read, "
    "as in a round of decoding; ours copies the ids to the host once.",
    "Begin: the whole draft is read. Draft pass: all positions of draft conditioning in one pass, "
    "the best ids on the host.",
    "Plain, cached: the module step by step on the same kind of cache, the best id read after each "
    "step. Plain, whole: a pass over draft and answer for each proposal. Both are eager, as is all "
    "of ours on a CPU.",
    "Limit: the bytes of the weights that each pass must read over this device's copy rate. Draft "
    "pass: the same, or its floating-point operations over the matmul ceiling in float32, "
    "whichever takes longer.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the adapter at batch 1: a step, eight proposals, reading a draft, a draft-conditioning
    pass.
    """

    draft_tokens: int = option(47, "tokens of the draft")
    vocab_size: int = option(32000, "ids of the adapter")
    max_seq_len: int = option(128, "tokens of draft and of target in use")
    embed_dim: int = option(512, "width of the adapter")
    num_layers: int = option(4, "layers of the adapter")
    num_heads: int = option(8, "attention heads of the adapter")
    output: Path = option(Path("benchmark_adapter.json"), "where all numbers go")
    compare: Path | None = option(None,
                                  "an earlier output: print old, new and ratio of each figure")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(42, "of the weights and tokens")

    def __post_init__(self):
        check_counts(self, ("draft_tokens", "vocab_size", "embed_dim", "num_layers", "num_heads"))
        if self.max_seq_len < max(PREFIX + READ + PROPOSALS, self.draft_tokens):
            raise UserError(f"--max_seq_len must be {max(PREFIX + READ + PROPOSALS, self.draft_tokens)} "
                            f"or more, got {self.max_seq_len}")
        if self.embed_dim % self.num_heads:
            raise UserError("--num_heads must divide --embed_dim, got "
                            f"{self.num_heads} and {self.embed_dim}")


def new_adapter(sizes: AdapterConfig, seed: int, device: torch.device) -> TokenAdapter:
    from training.adapters import new_adapter as random_adapter

    return random_adapter(sizes, seed).eval().requires_grad_(False).to(device)


def median_ms(work, device: torch.device, before=lambda: None) -> float:
    """Median milliseconds of work(); before() runs before each timing and is not timed."""
    from machine.timing import timed

    times = []
    for _ in range(REPEATS):
        before()
        times.append(1000 * timed(work, device)[1])
    return statistics.median(times[REPEATS // 5:])     # the first timings warm up


# --------------------------------------------------------------------------------------------- ways
class Plain:
    """The module, eager: with the cache of `start` and `step`, or a whole pass for each token."""

    def __init__(self, adapter: TokenAdapter, cached: bool):
        self.adapter, self.cached, self.device = adapter, cached, adapter.begin.device

    def _ids(self, tokens: list[int]) -> torch.Tensor:
        import torch

        return torch.tensor([tokens], dtype=torch.long, device=self.device)

    def begin(self, draft: list[int]) -> None:
        import torch

        self.draft = self._ids(draft)
        self.length = torch.tensor([len(draft)], device=self.device)
        self.fed: list[int] = []
        if self.cached:
            self.logits, self.cache = self.adapter.start(self.draft, self.length)

    def propose(self, prefix: list[int], count: int) -> list[int]:
        import torch

        from drafting.contract import matching

        tokens = list(prefix)
        with torch.inference_mode():
            if self.cached:                          # of the tokens in the cache keep the verified
                same = matching(self.fed, prefix)
                self.cache.length -= len(self.fed) - same
                self.fed = tokens[:same]
            while len(tokens) < len(prefix) + count:
                if not self.cached:
                    logits = self.adapter(self.draft, self.length, self._ids(tokens))
                else:
                    if len(tokens) > len(self.fed):
                        self.logits = self.adapter.step(self._ids(tokens[len(self.fed):]), self.cache)
                    logits, self.fed = self.logits, list(tokens)
                tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prefix):]


class Ours:
    def __init__(self, adapter: TokenAdapter):
        from drafting.steps import AdapterSteps

        self.steps = AdapterSteps(adapter, top_k=1)

    def begin(self, draft: list[int]) -> None:
        self.steps.begin(draft)

    def propose(self, prefix: list[int], count: int) -> list[int]:
        return [ids[0] for ids, _ in self.steps.after(prefix, count - 1)]


def time_steps(way: Plain | Ours, draft: list[int], answer: list[int],
               device: torch.device) -> tuple[dict, list[int]]:
    """({"step", "eight", "begin"} in ms, the proposals after the first PREFIX + READ tokens)."""
    import torch

    prefix, longer = answer[:PREFIX], answer[:PREFIX + READ]

    def start() -> None:                             # anew: nothing of the last round is left
        way.begin(draft)
        way.propose(prefix, 1)

    with torch.inference_mode():
        eight_ms, two_ms = (median_ms(lambda n=n: way.propose(prefix, n), device, start)
                            for n in (PROPOSALS, 2))
        times = {"step": (eight_ms - two_ms) / (PROPOSALS - 2),
                 "eight": median_ms(lambda: way.propose(longer, PROPOSALS), device, start),
                 "begin": median_ms(lambda: way.begin(draft), device)}
        start()
        return times, way.propose(longer, PROPOSALS)


def time_table(adapter: TokenAdapter, draft: list[int], device: torch.device) -> dict:
    """Milliseconds of a pass in draft conditioning: {"plain", "ours"}; "alike": share of equal
    ids.
    """
    import torch

    from drafting.adapter import LiveDraftAdapter

    drafter, width = LiveDraftAdapter(adapter), adapter.config.max_seq_len

    def plain() -> list[int]:
        with torch.no_grad():
            ids = torch.tensor([[*draft, *[0] * width][:width]], device=device)
            return adapter(ids)[0].argmax(-1).tolist()

    drafter.begin(draft)
    equal = sum(ours == theirs for ours, theirs in zip(drafter.table, plain()))
    return {"plain": median_ms(plain, device),
            "ours": median_ms(lambda: drafter.begin(draft), device), "alike": equal / width}


# ------------------------------------------------------------------------------------------ figures
def limits(adapter: TokenAdapter, device: torch.device) -> dict:
    import torch

    from benchmarks.limits import copy_rate, matmul_rate

    blocks = sum(weight.numel() for weight in adapter.transformer.parameters())
    output = sum(weight.numel() for weight in adapter.output_proj.parameters())
    weight_bytes, positions = 4 * (blocks + output), adapter.config.max_seq_len
    copy, matmul = copy_rate(device), matmul_rate(device, torch.float32)
    step_ms = 1000 * weight_bytes / copy
    pass_ms = max(step_ms, 1000 * 2 * positions * (blocks + output) / matmul)
    return {"step_weights_mib": weight_bytes / 2**20, "copy_gib_per_s": copy / 2**30,
            "float32_tflop_per_s": matmul / 1e12,
            "least_ms": {"step": step_ms, "eight": PROPOSALS * step_ms, "draft_pass": pass_ms}}


def wanted(ways: dict, table: dict) -> list[dict]:
    ours = ways["prefix+draft"]["ours"]
    rows = [("adapter step, ms", ours["step"], 0.2),
            (f"8 proposals, {READ} tokens read first, ms", ours["eight"], 1.6),
            ("pass of draft conditioning, ms", table["ours"], 0.5)]
    return [{"what": name, "measured": value, "wanted": f"<= {bound}"}
            for name, value, bound in rows]


def show(results: dict) -> None:
    """The table, as log lines."""
    for line in results["what"]:
        log(f"benchmark | {line}")
    least = results["limits"]["least_ms"]
    for name, ways in results["ms"].items():
        for way, times in ways.items():
            log(f"table | {name:12} | {way:13} | step {times['step']:.3f} ms | eight "
                f"{times['eight']:.3f} ms, {least['eight'] / times['eight']:.1%} of the limit | "
                f"begin {times['begin']:.3f} ms")
    table = results["draft_pass_ms"]
    log(f"table | draft pass | plain {table['plain']:.3f} ms | ours {table['ours']:.3f} ms | "
        f"{least['draft_pass'] / table['ours']:.1%} of the limit")
    log(f"table | equal ids (rounding may differ) | proposals {results['alike']:.1%}, draft pass "
        f"{table['alike']:.1%}")
    log("table | limits | " + ", ".join(
        f"{key} {value:.4g}" for key, value in results["limits"].items() if key != "least_ms"))


def one_line(results: dict) -> str:
    ours = results["ms"]["prefix+draft"]["ours"]
    return (f"step {ours['step']:.3f} ms, eight proposals {ours['eight']:.3f} ms, draft pass "
            f"{results['draft_pass_ms']['ours']:.3f} ms")


# ------------------------------------------------------------------------------------------ measure
def measure(config: Config) -> dict:
    import torch

    from machine.device import choose_device, device_name
    from token_adapter import AdapterConfig

    device = choose_device(config.device)
    log(f"benchmark | adapter | {device_name(device)} | plain ways and ours, in turn")
    generator = torch.Generator().manual_seed(config.seed)
    draft, answer = (torch.randint(3, config.vocab_size, (size,), generator=generator).tolist()
                     for size in (config.draft_tokens, config.max_seq_len))
    adapters = {}
    for name in ("prefix+draft", "prefix", "draft"):
        sizes = AdapterConfig(config.vocab_size, name, config.embed_dim, config.num_layers,
                              config.num_heads, 4 * config.embed_dim, config.max_seq_len)
        adapters[name] = new_adapter(sizes, config.seed, device)
    times: dict[str, dict] = {}
    equal = []
    for name in ("prefix+draft", "prefix"):
        ways: dict[str, Plain | Ours] = {
            "plain, whole": Plain(adapters[name], False), "plain, cached": Plain(adapters[name], True),
            "ours": Ours(adapters[name])}
        timed = {label: time_steps(way, draft, answer, device) for label, way in ways.items()}
        times[name] = {label: milliseconds for label, (milliseconds, _) in timed.items()}
        equal += [ours == theirs for ours, theirs in zip(timed["ours"][1], timed["plain, cached"][1])]
    draft_pass = time_table(adapters["draft"], draft, device)
    return {"device": device_name(device), "dtype": "float32", "what": list(EXPLANATION),
            "limits": limits(adapters["prefix"], device), "ms": times,
            "alike": sum(equal) / len(equal), "draft_pass_ms": draft_pass,
            "wanted": wanted(times, draft_pass)}
