"""Step 2: train a TokenAdapter on token pairs, then measure it once on pairs of drives it never saw.

    python train_and_evaluate.py --train_benchmark train_1s.json --test_benchmark test_1s.json
    python train_and_evaluate.py --checkpoint task/1s_20260128_020530/best_model.pt --test_benchmark test.json

Reads pairs in any of the three formats of pairs.load_pairs. Writes into a new folder task/{task_name}_{time}:
best_model.pt (whenever validation improves), results.json, the curves as PNG, and RESULTS.md last: a folder
that has it is whole. Validation is cut from training, by whole drives; the test file decides nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from base import (
    ROOT,
    Progress,
    UserError,
    as_json,
    check_counts,
    duration_of,
    log,
    make_folder,
    new_task_folder,
    now,
    option,
    parse_config,
    provenance,
    required,
    run,
    write_json,
)
from pairs import Pairs
from report import one_line, write_report
from splits import Data, check_drafts, check_ids, load_data, shortened

if TYPE_CHECKING:          # torch is imported only after the flags are read
    from torch import nn

DRAFT_DROPOUT = 0.5        # share of training rows whose draft is hidden, so that the adapter can do without
WARM_UP = 0.05             # share of the steps in which the learning rate rises: post-norm encoders need it
MAX_GRADIENT_NORM = 1.0
SMALL_ADAPTER = 2_000_000  # parameters up to which a CPU measures all there is, online steps too
CPU_SAMPLES = 200          # pairs of a set that a larger adapter is measured on there, if nothing else is said
MAX_VOCAB_SIZE = 2**20     # four times the largest vocabulary in use: an id beyond is damage, not a word


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a TokenAdapter on token pairs and measure it, or measure a checkpoint (--checkpoint)."""

    test_benchmark: list[Path] = required("pair files to measure on, used once, at the end")
    train_benchmark: list[Path] | None = option(None, "pair files to train on; a must without --checkpoint")
    task_name: str | None = option(None, "name of the task; found in file and folder names if not given")
    conditioning: Literal["auto", "prefix+draft", "prefix", "draft"] = option(
        "auto", "what a proposal may see: verified tokens and the draft (auto, without a checkpoint), either alone")
    num_epochs: int = option(50, "passes over the training pairs; for prefix+draft half as many follow with drafts")
    batch_size: int = option(32, "pairs in each training step")
    learning_rate: float | None = option(None, "peak, after warm-up, before the cosine; 1e-4 for draft, else 1e-3")
    dropout: float | None = option(None, "of the adapter; 0.1 for draft, else 0.3")
    draft_vocab: bool = option(False, "score only target tokens met in training; the map is kept in the checkpoint")
    draft_text: float = option(0.5, "prefix conditionings: weight of learning the drafts' sentences as further text")
    refit: bool = option(True, "prefix conditionings: after selection train again, with the validation pairs")
    stream: bool = option(True, "drafters may learn from each test answer once it is verified")
    online: bool | None = option(None, "measure online gradient steps too; if not said: on a GPU or a small adapter")
    max_test_samples: int | None = option(
        None, f"pairs to measure on at most, -1 = all; if not said: all, {CPU_SAMPLES} with a large adapter on a CPU")
    early_stopping: int = option(10, "stop after this many epochs without a better validation, 0 = never")
    val_fraction: float = option(0.15, "share of the training pairs kept for validation, in whole drives")
    max_train_samples: int = option(-1, "use only the first pairs of the training files, -1 = all")
    max_seq_len: int = option(128, "tokens of draft and of target in use; positions beyond count as misses")
    vocab_size: int = option(0, "0 = as recorded in the pair files, else from their largest id")
    embed_dim: int = option(512, "width of the adapter; its feed-forward layers are four times as wide")
    num_layers: int = option(4, "layers of the adapter")
    num_heads: int = option(8, "attention heads of the adapter")
    checkpoint: Path | None = option(None, "measure this checkpoint by its own contract and train nothing")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(42, "for the weights, the order of the pairs and the choice of validation drives")
    task_dir: Path = option(ROOT / "task", "where the new task folder is made")
    task_folder: Path | None = option(None, "exactly this folder, instead of a new one named after the time")
    plots: bool = option(True, "draw the curves")

    def __post_init__(self):
        if self.train_benchmark is None and self.checkpoint is None:
            raise UserError("--train_benchmark is missing: name the pair files to train on, or measure a "
                            "--checkpoint")
        check_counts(self, ("num_epochs", "batch_size", "max_seq_len", "embed_dim", "num_layers", "num_heads"))
        if self.conditioning == "auto" and self.checkpoint is None:
            object.__setattr__(self, "conditioning", "prefix+draft")
        if self.draft_vocab and (self.checkpoint or self.conditioning == "draft"):
            raise UserError("--draft_vocab belongs to the training of a prefix conditioning: a checkpoint brings its "
                            "own map, and draft conditioning is the original suite's architecture")
        if self.max_test_samples is not None:
            check_counts(self, (), ("max_test_samples",))
        for name in ("early_stopping", "vocab_size", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise UserError(f"--seed must be below 2^63, got {self.seed}")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(f"--vocab_size must be at most {MAX_VOCAB_SIZE}, got {self.vocab_size}")
        if self.max_train_samples != -1 and self.max_train_samples < 2:
            raise UserError("--max_train_samples must be 2 or more (one to train, one to validate) or -1 for "
                            f"all, got {self.max_train_samples}")
        for name, of_draft, otherwise in (("learning_rate", 1e-4, 1e-3), ("dropout", 0.1, 0.3)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, of_draft if self.conditioning == "draft" else otherwise)
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be from 0 to below 1, got {self.dropout}")
        if not 0 <= self.draft_text < math.inf:
            raise UserError(f"--draft_text must be 0 or more, got {self.draft_text}")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction must be between 0 and 1, got {self.val_fraction}")
        if self.embed_dim % self.num_heads:
            raise UserError(f"--num_heads must divide --embed_dim, got {self.num_heads} and {self.embed_dim}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.task_name is not None and not re.fullmatch(r"\w[\w.-]*", self.task_name):
            raise UserError(f"--task_name may hold letters, digits, '_', '-' and '.', got {self.task_name!r}")


# ------------------------------------------------------------------------------------------------------- task
def choose_device(name: str):
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: this PyTorch ({torch.__version__}) sees {count} CUDA devices; "
                            "try --device cpu")
    return device


def device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def open_task(config: TrainConfig, data: Data) -> Path:
    """The exact folder that was asked for, or a new one named after the task."""
    if config.task_folder is None:
        return new_task_folder(config.task_dir, config.task_name or detect_task_name(data))
    if (config.task_folder / "RESULTS.md").exists():
        raise UserError(f"{config.task_folder} holds a finished task (RESULTS.md), nothing was changed; "
                        "choose another --task_folder")
    return make_folder(config.task_folder)


def detect_task_name(data: Data) -> str:
    """The window length, 1s or 500ms, from the file names, else from what they record, else their folders."""
    files = data.files["train"] + data.files["test"]
    paths = [Path(file["path"]).resolve() for file in files]
    recorded = [str(file[key]) for file in files for key in ("dataset_dir", "dataset_name") if key in file]
    texts = [*(path.name for path in paths), *recorded, *(str(path.parent) for path in paths)]
    return duration_of(*texts) or "task"


# --------------------------------------------------------------------------------------------------- training
def make_adapter(config: TrainConfig, data: Data, known: Pairs | None):
    """The checkpoint that was asked for, or a new adapter with the vocabulary that the pairs need.

    known: the pairs it is trained on, whose target tokens are all that --draft_vocab scores.
    """
    import torch

    from token_adapter import AdapterConfig, TokenAdapter, load_adapter

    if config.checkpoint:
        adapter = load_adapter(config.checkpoint)
        check_ids(data.largest_ids, adapter.config.vocab_size, "a checkpoint needs pairs of its tokenizer")
        if config.conditioning not in ("auto", adapter.config.conditioning):
            raise UserError(f"{config.checkpoint} was trained in {adapter.config.conditioning} conditioning, wanted "
                            f"--conditioning {config.conditioning}; leave the flag out to measure it by its own")
        if adapter.config.conditioning == "draft":
            check_drafts(data.test)
        log(f"checkpoint | {config.checkpoint} | {adapter.config.contract}")
        return adapter
    rounded = min(max(data.largest_ids)[0] // 64 * 64 + 64, MAX_VOCAB_SIZE)
    vocab_size = config.vocab_size or data.vocab_size or rounded
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"the pair files record a vocabulary of {vocab_size} ids, wanted 1 to {MAX_VOCAB_SIZE}; mend "
                        "them, or set --vocab_size")
    check_ids(data.largest_ids, vocab_size, "mend the file, or set --vocab_size to that of the models")
    if config.conditioning == "draft":
        check_drafts(data.test)
        check_drafts(known)
    torch.manual_seed(config.seed)
    outputs = torch.from_numpy(known.ids("target")).long() if config.draft_vocab else None
    return TokenAdapter(AdapterConfig(
        vocab_size=vocab_size, embed_dim=config.embed_dim, num_layers=config.num_layers,
        num_heads=config.num_heads, feedforward_dim=4 * config.embed_dim, max_seq_len=config.max_seq_len,
        conditioning=config.conditioning, dropout=config.dropout,
        draft_vocab=0 if outputs is None else len(outputs)), outputs)


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up to 1, then a cosine to 0 (Loshchilov and Hutter 2017, SGDR). Steps count from 0."""
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def train_epoch(adapter, tokens, optimizer, schedule, batch_size: int, generator, on_step,
                draft_text: float = 0.0) -> tuple:
    """One pass: (loss in nats a token, alpha), both of the pass itself: dropout on, weights on the move."""
    import torch
    import torch.nn.functional as F

    from acceptance import measure, score

    device, steps = tokens.device, math.ceil(len(tokens.lengths) / batch_size)
    # Kept on the device until the pass is over: reading a loss earlier would make the host wait for the GPU.
    hits = torch.zeros(len(tokens.lengths), tokens.width, dtype=torch.bool, device=device)
    losses, positions = torch.zeros(steps, device=device), []
    adapter.train()
    for step, (rows, width, scored) in enumerate(tokens.batches(batch_size, generator)):
        shown = None
        if adapter.config.conditioning == "prefix+draft":
            shown = torch.rand(len(rows), device=device) >= DRAFT_DROPOUT
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, labels = score(adapter, tokens, rows, width, 0, shown)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            whole = loss + draft_text * draft_text_loss(adapter, tokens, rows) if draft_text else loss
        whole.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        hits[rows, :width] = logits.detach().argmax(-1) == labels
        losses[step] = loss.detach()
        positions.append(scored)
        on_step()
    losses = losses.tolist()
    for step, value in enumerate(losses, 1):
        if not math.isfinite(value):
            raise UserError(f"the loss became {value} in step {step} of {steps}")
    return float(np.average(losses, weights=positions)), measure(hits.cpu().numpy(), tokens.lengths)["alpha"]


def draft_text_loss(adapter, tokens, rows):
    """Mean loss of predicting each draft's tokens from those before them, as if it were an answer of its own."""
    import torch
    import torch.nn.functional as F

    draft, lengths = tokens.drafts(rows, tokens.draft_width), tokens.draft_lengths[rows]
    labels = adapter.labels_of(draft)
    losses = F.cross_entropy(adapter.draft_as_answer(draft).transpose(1, 2), labels, reduction="none")
    inside = torch.arange(draft.shape[1], device=draft.device) < lengths[:, None]
    return (losses * inside).sum() / inside.sum().clamp(min=1)


def phases_of(config: TrainConfig) -> dict[str, int]:
    """What is trained one after the other, with how many epochs.

    prefix+draft learns the target's language first, without drafts, and only then to use them: an adapter that
    sees drafts from the start learns 1,000 of them by heart and is worse on unseen drives. When the drafts don't
    help on validation, the first phase's adapter is what is kept: prefix+draft is never the worse of the two there.
    """
    if config.conditioning == "prefix+draft":
        return {"prefix": config.num_epochs, "prefix+draft": max(1, config.num_epochs // 2)}
    return {config.conditioning: config.num_epochs}


def run_phase(adapter, name: str, config: TrainConfig, tokens, last_epoch: int, after_epoch, number: int) -> None:
    """Up to `last_epoch` epochs of one phase; after_epoch(epoch, loss, alpha, rate, seconds) -> whether to stop."""
    import torch

    adapter.condition(name)
    epochs = phases_of(config)[name]
    steps = epochs * math.ceil(len(tokens.lengths) / config.batch_size)
    of_draft = name == "draft"
    decayed = [weight for weight in adapter.parameters() if of_draft or weight.dim() > 1]
    others = [weight for weight in adapter.parameters() if not of_draft and weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01 if of_draft else 0.1}, {"params": others, "weight_decay": 0.0}],
        config.learning_rate, betas=(0.9, 0.999 if of_draft else 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    generator = torch.Generator().manual_seed(config.seed + number)
    torch.manual_seed(config.seed + number)
    progress = Progress(f"train | {name}", steps, unit="steps")
    for epoch in range(1, last_epoch + 1):
        start = time.monotonic()
        try:
            loss, alpha = train_epoch(
                adapter, tokens, optimizer, schedule, config.batch_size, generator,
                lambda: progress.update(schedule.last_epoch, f"epoch {epoch:2}/{epochs}"),  # noqa: B023
                0.0 if of_draft else config.draft_text)
            stop = after_epoch(epoch, loss, alpha, schedule.get_last_lr()[0], time.monotonic() - start)
        except UserError as error:
            raise UserError(f"{name}, epoch {epoch}: {error}; the best epoch before it, if any, is kept in "
                            f"best_model.pt; try a --learning_rate below {config.learning_rate}") from error
        if stop:
            break


@dataclasses.dataclass
class Trained:
    adapter: nn.Module                     # of the best epoch, trained again with the validation pairs if --refit
    selected: nn.Module                    # of the best epoch, never trained on the validation pairs
    prefix: nn.Module | None               # the ablation of prefix+draft: the same without ever seeing a draft
    history: list[dict]
    best_epoch: int                        # counted over all phases


def train(adapter, config: TrainConfig, data: Data, device, task: Path) -> Trained:
    """Select the epoch (and whether drafts help) on validation; then train again on all pairs up to there."""
    from acceptance import TokenTensors, measure, predict
    from token_adapter import save_adapter

    adapter.to(device)
    tokens = TokenTensors.of(data.train, config.max_seq_len, device)
    validation_tokens = TokenTensors.of(data.validation, config.max_seq_len, device)
    log(f"train | {adapter.num_parameters() / 1e6:.1f} M parameters | vocabulary {adapter.config.vocab_size} "
        f"| {device_name(device)}")
    history, best = [], {}                 # best: phase -> (alpha, epoch in the phase, adapter, epoch over all)

    for number, name in enumerate(phases_of(config)):
        best[name] = (-1.0, 0, None, 0)

        def after_epoch(epoch, loss, alpha, rate, seconds, name=name) -> bool:
            top1, top5, validation_loss = predict(adapter, validation_tokens, config.batch_size)
            if not math.isfinite(validation_loss):
                raise UserError(f"the validation loss became {validation_loss}")
            validation = measure(top1, validation_tokens.lengths, top5)
            history.append({
                "epoch": len(history) + 1, "phase": name, "train_loss": loss, "train_alpha": alpha,
                "validation_loss": validation_loss, "validation_alpha": validation["alpha"],
                "validation_top5": validation["top5"], "learning_rate": rate, "seconds": seconds})
            if validation["alpha"] > best[name][0]:
                best[name] = (validation["alpha"], epoch, copy.deepcopy(adapter), len(history))
                if validation["alpha"] == max(alpha for alpha, *_ in best.values()):
                    save_adapter(adapter, task / "best_model.pt", epoch=epoch, validation_alpha=validation["alpha"])
            return bool(config.early_stopping) and epoch - best[name][1] >= config.early_stopping

        run_phase(adapter, name, config, tokens, phases_of(config)[name], after_epoch, number)
        log(f"train | {name} | best validation in epoch {best[name][1]}, accepted {best[name][0]:.1%}")
        adapter.load_state_dict(best[name][2].state_dict())
    chosen = max(best, key=lambda name: best[name][0])
    trained = Trained(best[chosen][2], best[chosen][2], best["prefix"][2] if "prefix" in best else None, history,
                      best[chosen][3])
    if config.refit and config.conditioning != "draft":
        refit(trained, chosen, {name: epoch for name, (_, epoch, _, _) in best.items()}, config, data, device)
        save_adapter(trained.adapter, task / "best_model.pt", epoch=trained.best_epoch, refitted=True)
    return trained


def refit(trained: Trained, chosen: str, epochs: dict[str, int], config: TrainConfig, data: Data, device) -> None:
    """Train anew from the same start on train and validation pairs together, as long as was best without them."""
    from acceptance import TokenTensors

    adapter = make_adapter(config, data, data.all_train).to(device)
    tokens = TokenTensors.of(data.all_train, config.max_seq_len, device)
    log(f"train | again, with the validation pairs: {len(data.all_train)} pairs")
    for number, (name, epoch) in enumerate(epochs.items()):
        run_phase(adapter, name, config, tokens, epoch, lambda *_: False, number)
        if name == "prefix":
            trained.prefix = copy.deepcopy(adapter)
        if name == chosen:
            break
    trained.adapter = adapter


# ---------------------------------------------------------------------------------------------------- results
def samples_to_measure(adapter, config: TrainConfig, device) -> int:
    if config.max_test_samples is not None:
        return config.max_test_samples if config.max_test_samples != -1 else sys.maxsize
    return CPU_SAMPLES if device.type == "cpu" and adapter.num_parameters() > SMALL_ADAPTER else sys.maxsize


def evaluate(adapter, trained: Trained | None, data: Data, config: TrainConfig, device) -> dict:
    """Metrics on each set of pairs there is: {"train": ..., "test": ...}; on test with all drafters side by side.

    On validation it is the selected adapter, which never trained on those pairs.
    """
    import acceptance
    from drafting import commonest_tokens

    max_seq_len, samples = adapter.config.max_seq_len, samples_to_measure(adapter, config, device)
    metrics, test = {}, shortened(data.test, samples)
    for name, pairs in (("train", data.train), ("validation", data.validation), ("test", test)):
        if pairs:
            pairs = pairs if name == "validation" else shortened(pairs, samples)
            model = (trained.selected if name == "validation" else adapter).to(device)
            known = data.all_train if name == "test" else data.train
            commonest = commonest_tokens(known, max_seq_len) if known else None
            top1, top5, loss = acceptance.predict(
                model, acceptance.TokenTensors.of(pairs, max_seq_len, device), config.batch_size)
            metrics[name] = {"loss": loss, **acceptance.compare(top1, top5, pairs, commonest)}
    if len(test) < len(data.test):
        log(f"drafters | on {len(test)} of {len(data.test)} test pairs, the first clips of every sequence; "
            "--max_test_samples -1 measures all")
    online = config.online if config.online is not None else (
        device.type == "cuda" or adapter.num_parameters() < SMALL_ADAPTER)
    metrics["test"].update(acceptance.measure_drafters(
        adapter, test, data.all_train, trained and trained.prefix,
        trained and (trained.selected, data.train, data.validation), config.stream, online and config.stream,
        config.seed), whole_test=len(data.test))
    return metrics


def main() -> None:
    config = parse_config(TrainConfig)

    from drafting import remembered, save_memory  # brings torch: not before the flags are read

    start = time.monotonic()
    device = choose_device(config.device)
    data = load_data(config)
    adapter, trained = make_adapter(config, data, data.train), None
    task = open_task(config, data)
    if not config.checkpoint:
        trained = train(adapter, config, data, device, task)
        adapter = trained.adapter
        save_memory(remembered(data.all_train), task / "memory.npz")
    trained_s = time.monotonic() - start
    metrics = evaluate(adapter, trained, data, config, device)
    results = {
        "kind": "checkpoint" if config.checkpoint else "training",
        "task": task.resolve().name,
        "date": now(),
        "config": as_json(config),
        "adapter": {**dataclasses.asdict(adapter.config), "parameters": adapter.num_parameters()},
        "files": data.files,
        "split": data.split,
        "warnings": data.warnings,
        "history": trained.history if trained else [],
        "best_epoch": trained and trained.best_epoch,
        "refitted": bool(trained and trained.adapter is not trained.selected),
        "metrics": metrics,
        "seconds": {"until_trained": trained_s, "all": time.monotonic() - start},
        "provenance": {**provenance(), "folder": os.getcwd(), "device": device_name(device)},
    }
    write_json(task / "results.json", results)
    write_report(task, plots=config.plots)
    log(f"RESULT | {task} | {one_line(results)}")


if __name__ == "__main__":
    run(main)
