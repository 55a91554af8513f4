"""Step 2: train a TokenAdapter on token pairs, then measure it once on pairs of drives it never saw.

    python train_and_evaluate.py --train_benchmark train_1s.json --test_benchmark test_1s.json
    python train_and_evaluate.py --resume task/1s_20260128_020530
    python train_and_evaluate.py --checkpoint task/1s_20260128_020530/best_model.pt --test_benchmark test.json

Reads pairs in any of the three formats of pairs.load_pairs. Writes into a new folder task/{task_name}_{time}:
best_model.pt (when validation improves, a large one some seconds later), results.json, the curves as PNG, and
RESULTS.md last: a folder that has it is whole. Validation is cut from training, by whole drives; the test file
decides nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from base import (
    ROOT,
    UserError,
    as_json,
    check_counts,
    duration_of,
    from_json,
    log,
    now,
    option,
    parse_config,
    provenance,
)
from drafting.table import styles
from machine.files import make_folder, new_task_folder, only_writer, read_json, reading, write_json
from machine.running import goes_on_with, run
from pairs.splits import MAX_VOCAB_SIZE, Data, load_data, shortened
from reports.task_figures import REMEASURE, one_line
from reports.task_report import write_report

if TYPE_CHECKING:          # torch is imported only after the flags are read
    from training.loop import Trained

SMALL_ADAPTER = 2_000_000  # parameters up to which a CPU measures all there is, online steps too
CPU_SAMPLES = 200          # pairs of a set that a larger adapter is measured on there, if nothing else is said


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a TokenAdapter on token pairs and measure it, or measure a checkpoint (--checkpoint)."""

    test_benchmark: list[Path] | None = option(None, "pair files to measure on, used once, at the end; a must")
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
    resume: Path | None = option(None, "go on with the training of this task folder; its own settings hold")
    checkpoint: Path | None = option(None, "measure this checkpoint by its own contract and train nothing")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(42, "for the weights, the order of the pairs and the choice of validation drives")
    task_dir: Path = option(ROOT / "task", "where the new task folder is made")
    task_folder: Path | None = option(None, "exactly this folder, instead of a new one named after the time")
    plots: bool = option(True, "draw the curves")

    def __post_init__(self):
        if self.resume:
            names = {field.name: field.default for field in dataclasses.fields(self)}.keys() - {
                "resume", "device", "plots"}
            given = sorted(name for name in names if getattr(self, name) != getattr(TrainConfig, name))
            if given:
                raise UserError(f"--resume goes on with the settings of {self.resume}: leave out --{given[0]}")
            return
        if self.test_benchmark is None:
            raise UserError("--test_benchmark is missing: name the pair files to measure on")
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
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.task_name is not None and not re.fullmatch(r"\w[\w.-]*", self.task_name):
            raise UserError(f"--task_name may hold letters, digits, '_', '-' and '.', got {self.task_name!r}")


# ------------------------------------------------------------------------------------------------------- task
def resumed(config: TrainConfig) -> TrainConfig | None:
    """The settings of the task to go on with; None: everything was measured, and now the page is there too."""
    path = config.resume / "results.json"
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") not in ("training", "checkpoint"):
        raise UserError(f"{path} is not the results.json of train_and_evaluate.py")
    if not found.get("unfinished"):
        if not (config.resume / "RESULTS.md").exists():              # it was stopped while the page was made
            with reading(path, REMEASURE):
                write_report(config.resume, styles(), plots=config.plots)
        (config.resume / "resume.pt").unlink(missing_ok=True)
        with reading(path, REMEASURE):
            log(f"RESULT | {config.resume} | finished before: {one_line(found)}")
        return None
    given = {"device": config.device} if config.device != "auto" else {}
    with reading(path, "train anew"):
        known = from_json(TrainConfig, {**found["config"], **given}, Path(found["provenance"]["folder"]))
    return dataclasses.replace(known, resume=None, task_folder=config.resume, plots=config.plots)


def open_task(config: TrainConfig, data: Data, locks: contextlib.ExitStack) -> Path:
    """The exact folder that was asked for, or a new one named after the task; its lock joins `locks`."""
    if config.task_folder is None:
        task = new_task_folder(config.task_dir, config.task_name or detect_task_name(data))
        locks.enter_context(only_writer(task))
        return task
    task = make_folder(config.task_folder)
    locks.enter_context(only_writer(task))
    if (task / "RESULTS.md").exists():
        raise UserError(f"{task} holds a finished task (RESULTS.md), nothing was changed; choose another "
                        "--task_folder")
    if (task / "resume.pt").exists():
        raise UserError(f"{task} holds an unfinished training: go on with --resume {task}, or choose another "
                        "--task_folder")
    return task


def detect_task_name(data: Data) -> str:
    """The window length, 1s or 500ms, from the file names, else from what they record, else their folders."""
    files = data.files["train"] + data.files["test"]
    paths = [Path(file["path"]).resolve() for file in files]
    recorded = [str(file[key]) for file in files for key in ("dataset_dir", "dataset_name") if key in file]
    texts = [*(path.name for path in paths), *recorded, *(str(path.parent) for path in paths)]
    return duration_of(*texts) or "task"


# ---------------------------------------------------------------------------------------------------- results
def samples_to_measure(adapter, config: TrainConfig, device) -> int:
    if config.max_test_samples is not None:
        return config.max_test_samples if config.max_test_samples != -1 else sys.maxsize
    return CPU_SAMPLES if device.type == "cpu" and adapter.num_parameters() > SMALL_ADAPTER else sys.maxsize


def evaluate(adapter, trained: Trained | None, data: Data, config: TrainConfig, device) -> dict:
    """Metrics on each set of pairs there is: {"train": ..., "test": ...}; on test with all drafters side by side.

    On validation it is the selected adapter, which never trained on those pairs.
    """
    from acceptance.comparison import measure_adapter
    from acceptance.evaluation import Selected, measure_drafters
    from drafting.table import SimulationParts

    samples = samples_to_measure(adapter, config, device)
    metrics, test = {}, shortened(data.test, samples)
    for name, pairs in (("train", data.train), ("validation", data.validation), ("test", test)):
        if pairs:
            pairs = pairs if name == "validation" else shortened(pairs, samples)
            model = (trained.selected if name == "validation" else adapter).to(device)
            known = data.all_train if name == "test" else data.train
            metrics[name] = measure_adapter(model, pairs, known, config.batch_size, name)
    if len(test) < len(data.test):
        log(f"drafters | on {len(test)} of {len(data.test)} test pairs, the first clips of every sequence; "
            "--max_test_samples -1 measures all")
    online = config.online if config.online is not None else (
        device.type == "cuda" or adapter.num_parameters() < SMALL_ADAPTER)
    parts = SimulationParts(adapter, test, data.all_train, prefix_adapter=trained and trained.prefix,
                            streaming=config.stream, online=online and config.stream, seed=config.seed)
    selected = trained and Selected(trained.selected, data.train, data.validation)
    metrics["test"].update(measure_drafters(parts, selected), whole_test=len(data.test))
    return metrics


def main() -> None:
    config = parse_config(TrainConfig)
    with contextlib.ExitStack() as locks:
        going_on = config.resume is not None
        if going_on:
            if not (config.resume / "results.json").is_file():
                raise UserError(f"{config.resume} is no task folder: it has no results.json; wanted one whose "
                                "training was stopped")
            locks.enter_context(only_writer(config.resume))
            config = resumed(config)
        if config:
            train_and_measure(config, going_on, locks)


def train_and_measure(config: TrainConfig, going_on: bool, locks: contextlib.ExitStack) -> None:
    """Make the task folder, whose lock joins `locks`; going on, config.task_folder, whose lock is held already."""
    from drafting.memory import remembered, save_memory
    from machine.device import choose_device, device_name
    from training.checkpoints import Resume, fingerprint  # bring torch: not before the flags are read
    from training.loop import make_adapter, train

    start = time.monotonic()
    device = choose_device(config.device)
    data = load_data(config)
    adapter, trained = make_adapter(config, data, data.train), None
    task = config.task_folder if going_on else open_task(config, data, locks)
    facts = {
        "kind": "checkpoint" if config.checkpoint else "training",
        "task": task.resolve().name,
        "config": as_json(config),
        "adapter": {**dataclasses.asdict(adapter.config), "parameters": adapter.num_parameters()},
        "files": data.files,
        "split": data.split,
        "warnings": data.warnings,
        "provenance": {**provenance(), "folder": os.getcwd(), "device": device_name(device)},
    }
    resume = Resume(task / "resume.pt", fingerprint(data.all_train, data.test))
    if going_on:
        resume.read()

    def unfinished(history: list[dict]) -> None:
        write_json(task / "results.json", {**facts, "date": now(), "unfinished": True, "history": history})

    if not config.checkpoint:
        unfinished(resume.found["history"] if resume.found else [])
        goes_on_with([sys.argv[0], "--resume", str(task)])
        log(f"train | {adapter.num_parameters() / 1e6:.1f} M parameters | vocabulary {adapter.config.vocab_size} "
            f"| {device_name(device)}")
        trained = train(adapter, config, data, device, task, resume, unfinished)
        adapter = trained.adapter
        save_memory(remembered(data.all_train), task / "memory.npz")
    trained_s = time.monotonic() - start
    metrics = evaluate(adapter, trained, data, config, device)
    results = {
        **facts,
        "date": now(),
        "adapter": {**dataclasses.asdict(adapter.config), "parameters": adapter.num_parameters()},
        "history": trained.history if trained else [],
        "best_epoch": trained and trained.best_epoch,
        "refitted": bool(trained and trained.adapter is not trained.selected),
        "metrics": metrics,
        "seconds": {"until_trained": trained_s, "all": time.monotonic() - start},
    }
    write_json(task / "results.json", results)
    write_report(task, styles(), plots=config.plots)
    resume.remove()
    goes_on_with([])
    log(f"RESULT | {task} | {one_line(results)}")


if __name__ == "__main__":
    run(main)
