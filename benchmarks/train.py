"""Training: our loop beside a plain one, on the same pairs in the same run: `python benchmark.py
train`.

The plain loop is what one would write first: float32 (TF32 off), a data set of single pairs padded
to the longest answer there may be, all logits, and the loss read after every step. Same adapter,
same pairs, same number of epochs; afterwards both are measured on the same validation pairs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from base import Progress, UserError, check_counts, log, option
from pairs.formats import load_pairs
from pairs.pairs import Pairs
from pairs.splits import check_ids

if TYPE_CHECKING:                    # torch is imported only after the flags are read
    import torch

    from acceptance.tensors import TokenTensors
    from token_adapter import TokenAdapter

CONDITIONINGS = ("prefix+draft", "prefix", "draft")
EPOCHS, PAIRS = 50, 5208             # of the training that the project's numbers are for
# made pairs: sentences, places in each that vary, words for each
SENTENCES, CHOICES, ALTERNATIVES = 12, 14, 4
TARGET, DRAFT = 50, 47               # tokens, as in the real pairs
OPTIMIZER_BYTES = 28  # AdamW reads weight, gradient and two moments and writes all but the gradient

WHAT = (
    "Plain: float32, TF32 off, padded to --max_seq_len, a data set of single pairs with the "
    "default collate, "
    "cross_entropy over all logits, AdamW as PyTorch chooses it, loss.item() after each step.",
    "Ours: training.train_epoch, as train_and_evaluate.py trains. Both: the same adapter from the "
    "same start, one phase, dropout on, learning rate over exactly these epochs; validation alpha "
    "afterwards, by the same function.",
    f"{EPOCHS} epochs: of {PAIRS} pairs, training steps alone, reckoned from a step of the median "
    "epoch; the first, "
    "in which graphs are captured, is given by itself. Validation comes on top, once an epoch.",
    "Limit of a step: the floating-point operations that these tokens need (no padding, without "
    "attention's own products) over the measured matmul ceiling in ours' format, and AdamW's bytes "
    "over the copy rate.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time training beside a plain loop, and compare what both have learnt."""

    pairs: list[Path] | None = option(None, "pair files to train on; not given: pairs are made")
    test_pairs: list[Path] | None = option(None, "pair files to validate on, of other drives")
    made_pairs: int = option(
        PAIRS, "pairs to make where none are given, and a tenth of them to validate on")
    conditioning: Literal["all", "prefix+draft", "prefix",
                          "draft"] = option("all", "what is trained, one by one")
    num_epochs: int = option(
        3, "of each, plain and ours; the first warms up and is not timed, so 2 at least")
    plain: bool = option(True, "run the plain loop too, many times slower on a GPU")
    batch_size: int = option(32, "pairs in each training step")
    draft_text: float = option(
        0.5, "prefix conditionings: weight of learning the drafts' sentences as further text")
    max_seq_len: int = option(128, "tokens of draft and of target in use")
    vocab_size: int = option(32000, "ids of the adapter")
    embed_dim: int = option(512, "width of the adapter")
    num_layers: int = option(4, "layers of the adapter")
    num_heads: int = option(8, "attention heads of the adapter")
    output: Path = option(Path("benchmark_train.json"), "where all numbers go")
    compare: Path | None = option(None,
                                  "an earlier output: print old, new and ratio of each figure")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(42, "of pairs, weights and order")

    def __post_init__(self):
        check_counts(self, ("batch_size", "max_seq_len", "embed_dim", "num_layers", "num_heads"))
        if (self.pairs is None) != (self.test_pairs is None):
            raise UserError("--pairs and --test_pairs belong together: give both, or none to have "
                            "pairs made")
        if self.num_epochs < 2:
            raise UserError(f"--num_epochs must be 2 or more (the first warms up), got {self.num_epochs}")
        if self.made_pairs < 10 or self.vocab_size < 64:
            raise UserError("--made_pairs must be 10 or more and --vocab_size 64 or more, got "
                            f"{self.made_pairs} and {self.vocab_size}")
        if self.embed_dim % self.num_heads:
            raise UserError(f"--num_heads must divide --embed_dim, got {self.num_heads} and "
                            f"{self.embed_dim}")


# -------------------------------------------------------------------------------------------- pairs
def make_rows(count: int, vocab_size: int, seed: int) -> list[dict]:
    """Rows of a pair file: sentences of which some words vary; the draft, in other words, tells
    half of these.

    So a prefix tells most of what follows, a draft some more, and the rest nothing. The seed varies
    the rows alone: the sentences are the same for training and validation.
    """
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    sentences, drafts = (fixed.integers(3, vocab_size, (SENTENCES, size)) for size in (TARGET, DRAFT))
    places = np.array([fixed.permutation(min(TARGET, DRAFT) - 1)[:CHOICES] + 1 for _ in range(SENTENCES)])
    words = fixed.integers(3, vocab_size, (SENTENCES, CHOICES, ALTERNATIVES))
    rows = []
    for number in range(count):
        kind = rng.integers(SENTENCES)
        said = rng.choice(ALTERNATIVES, CHOICES, p=[0.55, 0.25, 0.15, 0.05])
        target, draft = sentences[kind].copy(), drafts[kind].copy()
        target[places[kind]] = words[kind, np.arange(CHOICES), said]
        told = np.arange(CHOICES) % 2 == 0
        draft[places[kind][told]] = (words[kind, np.arange(CHOICES), said][told] + 1) % vocab_size
        draft = draft[:rng.integers(DRAFT - 6, DRAFT + 1)]
        rows.append({
            "sample_idx": number, "sequence": f"made_{seed}_{number // 100:03}_a",
            "clip": number % 100, "egpt_tokens": draft.tolist(), "vl_tokens": target.tolist()
        })
    return rows


def read_or_make(config: Config) -> tuple[Pairs, Pairs]:
    """(to train on, to validate on)."""
    if config.pairs:
        found = load_pairs(config.pairs), load_pairs(config.test_pairs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path, found = Path(folder) / "made_pairs.json", []
            for seed, count in ((1, config.made_pairs), (2, config.made_pairs // 10)):
                path.write_text(json.dumps({"results": make_rows(count, config.vocab_size, seed)}))
                found.append(load_pairs([path]))
    for pairs in found:
        check_ids(pairs.largest_ids(), config.vocab_size, "set --vocab_size to that of the models")
    return tuple(found)


# -------------------------------------------------------------------------------------------- loops
def new_adapter(name: str, config: Config, device: torch.device) -> TokenAdapter:
    from token_adapter import AdapterConfig
    from training.adapters import new_adapter as random_adapter

    sizes = AdapterConfig(
        config.vocab_size, name, config.embed_dim, config.num_layers, config.num_heads,
        4 * config.embed_dim, config.max_seq_len, dropout=0.1 if name == "draft" else 0.3)
    return random_adapter(sizes, config.seed).to(device)


def peak_rate(name: str) -> float:
    return 1e-4 if name == "draft" else 1e-3          # as in train_and_evaluate.py


def train_plainly(adapter: TokenAdapter, pairs: Pairs, config: Config, device: torch.device):
    """Yield the mean loss of each epoch of the plain loop."""
    import torch
    import torch.nn.functional as F

    from token_adapter import NOT_SCORED
    from training.loop import MAX_GRADIENT_NORM, check_finite, learning_rate_factor
    from training.loss import DRAFT_DROPOUT

    width, sees_prefix = config.max_seq_len, adapter.config.sees_prefix
    inside = np.arange(width) < pairs.lengths("target")[:, None]
    targets = np.where(inside, pairs.padded("target", width), NOT_SCORED).astype(np.int64)
    drafts, lengths = pairs.padded("draft", width).astype(np.int64), pairs.lengths("draft").clip(max=width)
    data = [{"draft": torch.from_numpy(draft), "length": int(length), "target": torch.from_numpy(target)}
            # any list is a data set of single pairs
            for draft, length, target in zip(drafts, lengths, targets)]
    loader = torch.utils.data.DataLoader(data, config.batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(adapter.parameters(), peak_rate(adapter.config.conditioning),
                                  weight_decay=0.1 if sees_prefix else 0.01,
                                  betas=(0.9, 0.98 if sees_prefix else 0.999))
    steps = config.num_epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    for _ in range(config.num_epochs):
        adapter.train()
        losses = []
        for batch in loader:
            draft, length, target = (batch[key].to(device) for key in ("draft", "length", "target"))
            if sees_prefix:
                shown = length * (torch.rand(len(draft), device=device) >= DRAFT_DROPOUT)
                x = adapter.hidden(draft, shown, target[:, :-1].clamp(min=0),
                                   draft if config.draft_text else None)
            else:
                x = adapter.hidden(draft)
            logits = adapter._logits(x)
            loss = whole = F.cross_entropy(logits[:, :width].flatten(0, 1), target.flatten())
            if sees_prefix and config.draft_text:
                text = torch.where(
                    torch.arange(width, device=device) < length[:, None], draft, NOT_SCORED)
                whole = loss + config.draft_text * F.cross_entropy(logits[:, width:].flatten(0, 1),
                                                                   text.flatten())
            whole.backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        check_finite(losses)
        yield sum(losses) / len(losses)


def train_ours(adapter: TokenAdapter, tokens: TokenTensors, config: Config):
    """Yield the mean loss of each epoch of ours."""
    import torch

    from training.loop import Trainer, train_epoch

    steps = config.num_epochs * math.ceil(len(tokens.lengths) / config.batch_size)
    trainer = Trainer(adapter, config.batch_size, peak_rate(adapter.config.conditioning), steps,
                      config.draft_text)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.num_epochs):
        yield train_epoch(trainer, tokens, generator)[0]


def run_one(epochs, what: str, adapter: TokenAdapter, steps: int, validation: TokenTensors,
            config: Config) -> dict:
    """epochs: a generator that trains one epoch each time -> everything measured of it; steps: of
    an epoch.
    """
    from acceptance.metrics import measure
    from acceptance.tensors import predict
    from benchmarks.limits import memory
    from machine.timing import timed

    device, seconds, losses = validation.device, [], []
    memory(device)
    progress = Progress(f"benchmark | {what}", config.num_epochs, unit="epochs")
    for epoch in range(config.num_epochs):
        loss, epoch_s = timed(lambda: next(epochs), device)
        seconds.append(epoch_s)
        losses.append(loss)
        progress.update(epoch + 1)
    epochs.close()                                    # with its optimizer and graphs
    peak = memory(device)["peak"]
    predict(adapter, validation, config.batch_size)
    (top1, top5, loss), validation_s = timed(
        lambda: predict(adapter, validation, config.batch_size), device)
    step_s = statistics.median(seconds[1:]) / steps
    return {
        "steps_per_epoch": steps, "step_ms": 1000 * step_s, "steps_per_s": 1 / step_s,
        "epoch_s": step_s * steps, "first_epoch_s": seconds[0], "all_epochs_s": sum(seconds),
        "50_epochs_s": EPOCHS * math.ceil(PAIRS / config.batch_size) * step_s,
        "train_losses": losses, "validation_s": validation_s, "validation_loss": loss,
        "validation_alpha": measure(top1, validation.lengths,
                                    top5)["alpha"], "peak_memory_mib": peak
    }


# ------------------------------------------------------------------------------------------ figures
def limits(adapter: TokenAdapter, pairs: Pairs, config: Config, rates: dict) -> dict:
    """What a step of these pairs needs at least; the mean over an epoch."""
    kind = adapter.config
    blocks = sum(weight.numel() for weight in adapter.transformer.parameters())
    answers, drafts = (int(pairs.lengths(which).clip(max=config.max_seq_len).sum())
                       for which in ("target", "draft"))
    text = drafts if kind.sees_prefix and config.draft_text else 0
    read = answers + text + (drafts if kind.conditioning == "prefix+draft" else 0)
    steps = math.ceil(len(pairs) / config.batch_size)
    # For each weight 2 operations forward, 4 back.
    needed = 6 * (read * blocks + (answers + text) * kind.vocab_size * kind.embed_dim) / steps
    moved = OPTIMIZER_BYTES * adapter.num_parameters()
    return {"parameters_million": adapter.num_parameters() / 1e6, "step_gflop": needed / 1e9,
            "optimizer_mib": moved / 2**20,
            "least_step_ms": 1000 * (needed / rates["matmul"] + moved / rates["copy"])}


def wanted(runs: dict) -> list[dict]:
    rows = []
    for name, found in runs.items():
        ours, plain = found["ours"], found["plain"]
        less = plain and ours["validation_alpha"] - plain["validation_alpha"]
        rows += [(f"{name}: ms a step", ours["step_ms"], "<=", 3),
                 (f"{name}: seconds for {EPOCHS} epochs of {PAIRS} pairs", ours["50_epochs_s"],
                  "<=", 60), (f"{name}: times faster than plain", found["times_faster"], ">=", 10),
                 (f"{name}: validation alpha less plain's", less, ">=", -0.01)]
    return [{"what": what, "measured": value, "wanted": f"{sign} {bound}"}
            for what, value, sign, bound in rows]


def show(results: dict) -> None:
    """The table, as log lines."""
    for line in results["what"]:
        log(f"benchmark | {line}")
    for name, found in results["runs"].items():
        for loop in ("plain", "ours"):
            run = found[loop]
            if run:
                peak = run["peak_memory_mib"]
                log(" | ".join([
                    f"table | {name:12} | {loop:5}", f"{run['step_ms']:.3f} ms a step",
                    f"{run['steps_per_s']:.1f} steps/s",
                    f"epoch {run['epoch_s']:.2f} s (first {run['first_epoch_s']:.2f})",
                    f"{EPOCHS} epochs of {PAIRS} pairs {run['50_epochs_s']:.0f} s, reckoned",
                    f"validation {run['validation_s']:.2f} s, alpha {run['validation_alpha']:.2%}",
                    f"{run['model_tflop_per_s']:.3g} TFLOP/s", f"{run['share_of_limit']:.1%} of the limit",
                    f"peak {'none' if peak is None else f'{peak:.0f}'} MiB"]))
        if found["times_faster"]:
            log(f"table | {name:12} | ours is {found['times_faster']:.2f} times faster")
        log(f"table | {name:12} | limits | " + ", ".join(
            f"{key} {value:.4g}" for key, value in found["limits"].items()))
    log("table | device | " + ", ".join(f"{key} {value:.4g}"
                                        for key, value in results["limits"].items()))


def one_line(results: dict) -> str:
    return ", ".join(
        f"{name} {found['ours']['step_ms']:.3f} ms a step"
        + (f" ({found['times_faster']:.2f} times faster)" if found["times_faster"] else "")
        for name, found in results["runs"].items())


# ------------------------------------------------------------------------------------------ measure
def measure(config: Config) -> dict:
    pairs, validation_pairs = read_or_make(config)

    import torch

    from acceptance.tensors import TokenTensors
    from benchmarks.limits import copy_rate, matmul_rate
    from machine.device import choose_device, device_name

    device = choose_device(config.device)
    format_ = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = {"matmul": matmul_rate(device, format_), "copy": copy_rate(device)}
    steps, runs = math.ceil(len(pairs) / config.batch_size), {}
    validation = TokenTensors.of(validation_pairs, config.max_seq_len, device)
    for name in CONDITIONINGS if config.conditioning == "all" else (config.conditioning,):
        adapter, found = new_adapter(name, config, device), {"plain": None}
        found["limits"] = limits(adapter, pairs, config, rates)
        if config.plain:
            found["plain"] = run_one(train_plainly(adapter, pairs, config, device),
                                     f"{name}, plain", adapter, steps, validation, config)
        adapter = new_adapter(name, config, device)
        tokens = TokenTensors.of(pairs, config.max_seq_len, device)
        found["ours"] = run_one(train_ours(adapter, tokens, config), f"{name}, ours", adapter,
                                steps, validation, config)
        for run in (found["plain"], found["ours"]):
            if run:
                run["model_tflop_per_s"] = found["limits"]["step_gflop"] / run["step_ms"]
                run["share_of_limit"] = found["limits"]["least_step_ms"] / run["step_ms"]
        found["times_faster"] = found["plain"] and found["plain"]["step_ms"] / found["ours"]["step_ms"]
        runs[name] = found
    return {
        "device": device_name(device), "dtype": str(format_).removeprefix("torch."),
        "what": list(WHAT), "pairs": len(pairs), "validation_pairs": len(validation_pairs),
        "made": config.pairs is None, "limits": {
            "matmul_tflop_per_s": rates["matmul"] / 1e12, "copy_gib_per_s": rates["copy"] / 2**30
        }, "runs": runs, "wanted": wanted(runs)
    }
