"""Training: our loop beside a plain one, on the same pairs in one run: `python benchmark.py train`.

The plain loop is the usual first version: float32 (TF32 off), a data set of single pairs padded to
--max_seq_len, all logits, and the loss read after every step. Both train the same adapter on the same
pairs for as many epochs; then both adapters are measured on the same validation pairs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Generator
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
    from token_adapter import AdapterConfig, TokenAdapter

Losses = Generator[float, None, None]      # the mean loss of each epoch

CONDITIONINGS = ("prefix+draft", "prefix", "draft")
EPOCHS, PAIRS = 50, 5208             # of the real training that "50 epochs" stands for
# Synthetic pairs: sentences, positions in each that vary, words for each position
SENTENCES, CHOICES, ALTERNATIVES = 12, 14, 4
WORD_PROBABILITIES = (0.55, 0.25, 0.15, 0.05)      # of the alternatives
TARGET_TOKENS, DRAFT_TOKENS = 50, 47               # as in the real pairs
DROPOUT = {"prefix+draft": 0.3, "prefix": 0.3, "draft": 0.1}          # as in train_and_evaluate.py
OPTIMIZER_BYTES = 28  # AdamW reads weight, gradient and two moments and writes all but the gradient

NOTES = (
    "Plain: float32, TF32 off, padded to --max_seq_len, a data set of single pairs with the "
    "default collate, cross_entropy over all logits, AdamW as PyTorch chooses it, loss.item() "
    "after each step.",
    "Ours: training.train_epoch, as train_and_evaluate.py trains. Both: the same adapter from the "
    "same start, one phase, dropout on, learning rate over exactly these epochs; validation alpha "
    "afterwards, by the same function.",
    f"{EPOCHS} epochs: of {PAIRS} pairs, training steps alone, computed from a step of the median "
    "epoch; the first, in which graphs are captured, is given by itself. Validation comes on top, "
    "once an epoch.",
    "Limit of a step: the floating-point operations that these tokens need (no padding, without "
    "attention's own products) over the measured matmul ceiling in ours' format, and AdamW's bytes "
    "over the copy rate.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time training beside a plain loop, and compare both adapters."""

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


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and in what batches both loops train."""

    num_epochs: int
    batch_size: int
    draft_text: float                # weight of the drafts' sentences as further text; prefix kinds
    seed: int                        # of weights and order

    def steps(self, pairs: int) -> int:
        """Training steps of an epoch of so many pairs."""
        return math.ceil(pairs / self.batch_size)


# -------------------------------------------------------------------------------------------- pairs
def synthetic_rows(count: int, vocab_size: int, seed: int) -> list[dict]:
    """Rows of a pair file: sentences of which some words vary; the draft reveals half of these.

    So a prefix tells most of the rest, a draft some more, and a part stays open. The seed varies the
    rows alone: the sentences are the same for training and validation.
    """
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    sentences, drafts = (fixed.integers(3, vocab_size, (SENTENCES, size))
                         for size in (TARGET_TOKENS, DRAFT_TOKENS))
    positions = np.array([fixed.permutation(min(TARGET_TOKENS, DRAFT_TOKENS) - 1)[:CHOICES] + 1
                          for _ in range(SENTENCES)])
    words = fixed.integers(3, vocab_size, (SENTENCES, CHOICES, ALTERNATIVES))
    is_revealed = np.arange(CHOICES) % 2 == 0
    rows = []
    for number in range(count):
        kind = rng.integers(SENTENCES)
        chosen = words[kind, np.arange(CHOICES), rng.choice(ALTERNATIVES, CHOICES, p=WORD_PROBABILITIES)]
        target, draft = sentences[kind].copy(), drafts[kind].copy()
        target[positions[kind]] = chosen
        draft[positions[kind][is_revealed]] = (chosen[is_revealed] + 1) % vocab_size
        draft = draft[:rng.integers(DRAFT_TOKENS - 6, DRAFT_TOKENS + 1)]
        rows.append({
            "sample_idx": number, "sequence": f"made_{seed}_{number // 100:03}_a",
            "clip": number % 100, "egpt_tokens": draft.tolist(), "vl_tokens": target.tolist()
        })
    return rows


def synthetic_pairs(count: int, vocab_size: int, seed: int) -> Pairs:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic_pairs.json"
        path.write_text(json.dumps({"results": synthetic_rows(count, vocab_size, seed)}))
        return load_pairs([path])


# -------------------------------------------------------------------------------------------- loops
def new_adapter(sizes: AdapterConfig, seed: int, device: torch.device) -> TokenAdapter:
    from training.adapters import new_adapter as random_adapter

    return random_adapter(sizes, seed).to(device)


def peak_rate(name: str) -> float:
    return 1e-4 if name == "draft" else 1e-3          # as in train_and_evaluate.py


def train_plainly(adapter: TokenAdapter, pairs: Pairs, schedule: Schedule) -> Losses:
    """Yield the mean loss of each epoch of the plain loop."""
    import torch
    import torch.nn.functional as F

    from token_adapter import NOT_SCORED
    from training.loop import MAX_GRADIENT_NORM, check_finite, learning_rate_factor
    from training.loss import DRAFT_DROPOUT

    width, sees_prefix = adapter.config.max_seq_len, adapter.config.sees_prefix
    device = next(adapter.parameters()).device
    is_token = np.arange(width) < pairs.lengths("target")[:, None]
    targets = np.where(is_token, pairs.padded("target", width), NOT_SCORED).astype(np.int64)
    drafts, lengths = pairs.padded("draft", width).astype(np.int64), pairs.lengths("draft").clip(max=width)
    data = [{"draft": torch.from_numpy(draft), "length": int(length), "target": torch.from_numpy(target)}
            # any list is a data set of single pairs
            for draft, length, target in zip(drafts, lengths, targets)]
    loader = torch.utils.data.DataLoader(data, schedule.batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(adapter.parameters(), peak_rate(adapter.config.conditioning),
                                  weight_decay=0.1 if sees_prefix else 0.01,
                                  betas=(0.9, 0.98 if sees_prefix else 0.999))
    steps = schedule.num_epochs * len(loader)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    for _ in range(schedule.num_epochs):
        adapter.train()
        losses = []
        for batch in loader:
            draft, length, target = (batch[key].to(device) for key in ("draft", "length", "target"))
            if sees_prefix:
                shown = length * (torch.rand(len(draft), device=device) >= DRAFT_DROPOUT)
                x = adapter.hidden(draft, shown, target[:, :-1].clamp(min=0),
                                   draft if schedule.draft_text else None)
            else:
                x = adapter.hidden(draft)
            logits = adapter._logits(x)
            loss = total = F.cross_entropy(logits[:, :width].flatten(0, 1), target.flatten())
            if sees_prefix and schedule.draft_text:
                text = torch.where(
                    torch.arange(width, device=device) < length[:, None], draft, NOT_SCORED)
                total = loss + schedule.draft_text * F.cross_entropy(logits[:, width:].flatten(0, 1),
                                                                   text.flatten())
            total.backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        check_finite(losses)
        yield sum(losses) / len(losses)


def train_ours(adapter: TokenAdapter, tokens: TokenTensors, schedule: Schedule) -> Losses:
    """Yield the mean loss of each epoch of ours."""
    import torch

    from training.loop import Trainer, train_epoch

    steps = schedule.num_epochs * schedule.steps(len(tokens.lengths))
    trainer = Trainer(adapter, schedule.batch_size, peak_rate(adapter.config.conditioning), steps,
                      schedule.draft_text)
    generator = torch.Generator().manual_seed(schedule.seed)
    for _ in range(schedule.num_epochs):
        yield train_epoch(trainer, tokens, generator)[0]


def time_training(epochs: Losses, label: str, adapter: TokenAdapter, steps: int,
                  validation: TokenTensors, schedule: Schedule) -> dict:
    """All figures of one loop.

    epochs: trains the adapter one epoch each time and yields the loss; steps: of an epoch.
    """
    from acceptance.metrics import measure
    from acceptance.tensors import predict
    from benchmarks.limits import memory
    from machine.timing import timed

    device, seconds, losses = validation.device, [], []
    memory(device)
    progress = Progress(f"benchmark | {label}", schedule.num_epochs, unit="epochs")
    for epoch in range(schedule.num_epochs):
        loss, epoch_s = timed(lambda: next(epochs), device)
        seconds.append(epoch_s)
        losses.append(loss)
        progress.update(epoch + 1)
    epochs.close()                                    # with its optimizer and graphs
    peak = memory(device)["peak"]
    predict(adapter, validation, schedule.batch_size)
    (top1, top5, loss), validation_s = timed(
        lambda: predict(adapter, validation, schedule.batch_size), device)
    step_s = statistics.median(seconds[1:]) / steps
    return {
        "steps_per_epoch": steps, "step_ms": 1000 * step_s, "steps_per_s": 1 / step_s,
        "epoch_s": step_s * steps, "first_epoch_s": seconds[0], "all_epochs_s": sum(seconds),
        "50_epochs_s": EPOCHS * schedule.steps(PAIRS) * step_s, "train_losses": losses,
        "validation_s": validation_s, "validation_loss": loss,
        "validation_alpha": measure(top1, validation.lengths, top5)["alpha"], "peak_memory_mib": peak
    }


# ------------------------------------------------------------------------------------------ figures
def limits(adapter: TokenAdapter, pairs: Pairs, schedule: Schedule, rates: dict) -> dict:
    """The least time of a step with these pairs, and its operations: means over an epoch."""
    sizes = adapter.config
    blocks = sum(weight.numel() for weight in adapter.transformer.parameters())
    answers, drafts = (int(pairs.lengths(which).clip(max=sizes.max_seq_len).sum())
                       for which in ("target", "draft"))
    text = drafts if sizes.sees_prefix and schedule.draft_text else 0
    read = answers + text + (drafts if sizes.conditioning == "prefix+draft" else 0)
    # For each weight 2 operations forward, 4 back.
    scored = (answers + text) * sizes.vocab_size * sizes.embed_dim
    operations = 6 * (read * blocks + scored) / schedule.steps(len(pairs))
    moved_bytes = OPTIMIZER_BYTES * adapter.num_parameters()
    return {"parameters_million": adapter.num_parameters() / 1e6, "step_gflop": operations / 1e9,
            "optimizer_mib": moved_bytes / 2**20,
            "least_step_ms": 1000 * (operations / rates["matmul"] + moved_bytes / rates["copy"])}


def wanted(runs: dict) -> list[dict]:
    rows = []
    for name, run in runs.items():
        ours, plain = run["ours"], run["plain"]
        gain = plain and ours["validation_alpha"] - plain["validation_alpha"]
        rows += [(f"{name}: ms a step", ours["step_ms"], "<=", 3),
                 (f"{name}: seconds for {EPOCHS} epochs of {PAIRS} pairs", ours["50_epochs_s"],
                  "<=", 60),
                 (f"{name}: times faster than plain", run["times_faster"], ">=", 10),
                 (f"{name}: validation alpha less plain's", gain, ">=", -0.01)]
    return [{"what": label, "measured": value, "wanted": f"{sign} {bound}"}
            for label, value, sign, bound in rows]


def show(results: dict) -> None:
    """The table, as log lines."""
    for line in results["what"]:
        log(f"benchmark | {line}")
    for name, run in results["runs"].items():
        for loop in ("plain", "ours"):
            if run[loop]:
                log(f"table | {name:12} | {loop:5} | {figures_of(run[loop])}")
        if run["times_faster"]:
            log(f"table | {name:12} | ours is {run['times_faster']:.2f} times faster")
        log(f"table | {name:12} | limits | " + ", ".join(
            f"{key} {value:.4g}" for key, value in run["limits"].items()))
    log("table | device | " + ", ".join(f"{key} {value:.4g}"
                                        for key, value in results["limits"].items()))


def figures_of(loop: dict) -> str:
    """The figures of one loop, as a part of a log line."""
    peak = loop["peak_memory_mib"]
    return " | ".join([
        f"{loop['step_ms']:.3f} ms a step", f"{loop['steps_per_s']:.1f} steps/s",
        f"epoch {loop['epoch_s']:.2f} s (first {loop['first_epoch_s']:.2f})",
        f"{EPOCHS} epochs of {PAIRS} pairs {loop['50_epochs_s']:.0f} s, computed",
        f"validation {loop['validation_s']:.2f} s, alpha {loop['validation_alpha']:.2%}",
        f"{loop['model_tflop_per_s']:.3g} TFLOP/s", f"{loop['share_of_limit']:.1%} of the limit",
        f"peak {'none' if peak is None else f'{peak:.0f}'} MiB"])


def one_line(results: dict) -> str:
    parts = []
    for name, run in results["runs"].items():
        faster = f" ({run['times_faster']:.2f} times faster)" if run["times_faster"] else ""
        parts.append(f"{name} {run['ours']['step_ms']:.3f} ms a step{faster}")
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------ measure
def measure(config: Config) -> dict:
    """The benchmark's main: everything below it is given parts, never the configuration."""
    if config.pairs and config.test_pairs:
        pairs, validation_pairs = load_pairs(config.pairs), load_pairs(config.test_pairs)
    else:
        pairs, validation_pairs = (synthetic_pairs(count, config.vocab_size, seed)
                                   for seed, count in ((1, config.made_pairs),
                                                       (2, config.made_pairs // 10)))
    for some in (pairs, validation_pairs):
        check_ids(some.largest_ids(), config.vocab_size, "set --vocab_size to that of the models")

    import torch

    from acceptance.tensors import TokenTensors
    from benchmarks.limits import copy_rate, matmul_rate
    from machine.device import choose_device, device_name
    from token_adapter import AdapterConfig

    device = choose_device(config.device)
    format_ = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = Bench(
        pairs, TokenTensors.of(validation_pairs, config.max_seq_len, device),
        Schedule(config.num_epochs, config.batch_size, config.draft_text, config.seed),
        {"matmul": matmul_rate(device, format_), "copy": copy_rate(device)})
    names = CONDITIONINGS if config.conditioning == "all" else (config.conditioning,)
    sizes = {name: AdapterConfig(config.vocab_size, name, config.embed_dim, config.num_layers,
                                 config.num_heads, 4 * config.embed_dim, config.max_seq_len,
                                 dropout=DROPOUT[name]) for name in names}
    runs = {name: bench.run(sizes[name], config.plain) for name in names}
    return {
        "device": device_name(device), "dtype": str(format_).removeprefix("torch."),
        "what": list(NOTES), "pairs": len(pairs), "validation_pairs": len(validation_pairs),
        "made": config.pairs is None, "limits": {
            "matmul_tflop_per_s": bench.rates["matmul"] / 1e12,
            "copy_gib_per_s": bench.rates["copy"] / 2**30
        }, "runs": runs, "wanted": wanted(runs)
    }


@dataclasses.dataclass(frozen=True)
class Bench:
    """Pairs, schedule and device rates (bytes and operations a second) that all runs share."""

    pairs: Pairs
    validation: TokenTensors
    schedule: Schedule
    rates: dict[str, float]

    def run(self, sizes: AdapterConfig, with_plain: bool) -> dict:
        """Train an adapter of these sizes in our loop and, if wanted, a twin in the plain one."""
        from acceptance.tensors import TokenTensors

        device, schedule, name = self.validation.device, self.schedule, sizes.conditioning
        steps = schedule.steps(len(self.pairs))
        adapter = new_adapter(sizes, schedule.seed, device)
        least = limits(adapter, self.pairs, schedule, self.rates)
        plain = None
        if with_plain:
            epochs = train_plainly(adapter, self.pairs, schedule)
            plain = time_training(epochs, f"{name}, plain", adapter, steps, self.validation, schedule)
            adapter = new_adapter(sizes, schedule.seed, device)
        tokens = TokenTensors.of(self.pairs, sizes.max_seq_len, device)
        epochs = train_ours(adapter, tokens, schedule)
        ours = time_training(epochs, f"{name}, ours", adapter, steps, self.validation, schedule)
        for loop in filter(None, (plain, ours)):
            loop["model_tflop_per_s"] = least["step_gflop"] / loop["step_ms"]
            loop["share_of_limit"] = least["least_step_ms"] / loop["step_ms"]
        return {"plain": plain, "limits": least, "ours": ours,
                "times_faster": plain["step_ms"] / ours["step_ms"] if plain else None}
