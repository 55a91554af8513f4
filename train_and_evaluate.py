"""Step 2: train a TokenAdapter on token pairs, then measure it on pairs of unseen drives.

    python train_and_evaluate.py --train_benchmark train_1s.json --test_benchmark test_1s.json
    python train_and_evaluate.py --resume task/1s_20260128_020530
    python train_and_evaluate.py --checkpoint task/1s_20260128_020530/best_model.pt --test_benchmark test.json

Reads pairs (pairs/formats.py). Writes a new folder task/{task_name}_{time}: best_model.pt, results.json,
the curves as PNG, and RESULTS.md last: a folder that has it is whole. Validation is cut from training,
by whole drives; the test file decides nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import (
    ROOT,
    UserError,
    as_json,
    check_counts,
    from_json,
    log,
    now,
    option,
    parse_config,
    provenance,
)
from drafting.table import styles
from machine.files import (
    check_format,
    new_task_folder,
    only_writer,
    read_json,
    reading,
    write_json,
)
from machine.ranks import this_process
from machine.running import goes_on_with, run
from machine.team import Team, Work
from machine.trackers import ABOUT, Name, check_tracker, tracking
from pairs.pairs import Pairs
from pairs.splits import MAX_VOCAB_SIZE, Data, ValidationSplit, conditioning_for, load_data
from reports.task_figures import FORMAT, REMEASURE, one_line, tracked_figures
from reports.task_report import write_report
from training.tasks import detect_task_name, open_task, train_in

if TYPE_CHECKING:          # torch is imported only after the flags are read
    import torch

    from token_adapter import TokenAdapter
    from training.evaluation import Measuring
    from training.phases import Settings

SMALL_ADAPTER = 2_000_000  # parameters up to which a CPU measures everything, online steps too
# pairs of a set that a larger adapter is measured on there, unless told otherwise
CPU_SAMPLES = 200


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a TokenAdapter on token pairs and measure it, or measure a checkpoint (--checkpoint).
    """

    test_benchmark: list[Path] | None = option(
        None, "pair files to measure on, used once, at the end; required")
    train_benchmark: list[Path] | None = option(
        None, "pair files to train on; required without --checkpoint")
    task_name: str | None = option(None,
                                   "name of the task; default: taken from file and folder names")
    conditioning: Literal["auto", "prefix+draft", "prefix", "draft"] = option(
        "auto",
        "what a proposal may see: verified tokens and the draft (auto, where there are drafts), or "
        "one of them")
    num_epochs: int = option(
        50, "passes over the training pairs; for prefix+draft half as many follow with drafts")
    batch_size: int = option(32, "pairs in each training step")
    learning_rate: float | None = option(
        None, "peak, after warm-up, before the cosine; default: 1e-4 for draft, else 1e-3")
    dropout: float | None = option(None, "of the adapter; default: 0.1 for draft, else 0.3")
    draft_vocab: bool = option(
        False, "score only target tokens that occur in training; the map is kept in the checkpoint")
    draft_text: float = option(
        0.5, "prefix conditionings: weight of learning the drafts' sentences as further text")
    refit: bool = option(
        True, "prefix conditionings: after selection train again, with the validation pairs")
    stream: bool = option(True, "drafters may learn from each test answer once it is verified")
    online: bool | None = option(
        None, "measure online gradient steps too; default: on a GPU or for a small adapter")
    max_test_samples: int | None = option(
        None, "pairs to measure on at most, -1 = all; default: all, "
        f"{CPU_SAMPLES} for a large adapter on a CPU")
    early_stopping: int = option(
        10, "stop after this many epochs without a better validation, 0 = never")
    val_fraction: float = option(
        0.15, "share of the training pairs kept for validation, in whole drives")
    max_train_samples: int = option(-1, "use only the first pairs of the training files, -1 = all")
    max_seq_len: int = option(
        128, "tokens of draft and of target in use, 2 or more; positions beyond count as misses")
    vocab_size: int = option(0, "0 = as recorded in the pair files, else from their largest id")
    bos_id: int | None = option(
        None,
        "drop rows with an answer that starts with this id, since it includes the prompt (1 for "
        "LLaMA's tokenizer); default: the ids that a pair file records, if any")
    embed_dim: int = option(512,
                            "width of the adapter; its feed-forward layers are four times as wide")
    num_layers: int = option(4, "layers of the adapter")
    num_heads: int = option(8, "attention heads of the adapter")
    resume: Path | None = option(
        None, "go on with the training of this task folder, with its own settings")
    checkpoint: Path | None = option(
        None, "measure this checkpoint by its own contract and train nothing")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(42, "for the weights, the order of the pairs and the choice of validation drives")
    task_dir: Path = option(ROOT / "task", "where the new task folder is made")
    task_folder: Path | None = option(
        None, "exactly this folder, instead of a new one named after the time")
    plots: bool = option(True, "draw the curves")
    tracker: Name = option("none", ABOUT)

    def __post_init__(self):
        check_tracker(self.tracker)
        if self.resume:
            self._check_resume()
            return
        if self.test_benchmark is None:
            raise UserError("--test_benchmark is missing: name the pair files to measure on")
        if self.train_benchmark is None and self.checkpoint is None:
            raise UserError("--train_benchmark is missing: name the pair files to train on, or "
                            "measure a --checkpoint")
        self._fill_in_defaults()
        self._check_counts()
        self._check_ranges()
        if self.draft_vocab and (self.checkpoint or self.conditioning == "draft"):
            raise UserError("--draft_vocab belongs to the training of a prefix conditioning: a "
                            "checkpoint brings its own map, and draft conditioning is the original "
                            "suite's architecture")
        if self.embed_dim % self.num_heads:
            raise UserError(f"--num_heads must divide --embed_dim, got {self.num_heads} and "
                            f"{self.embed_dim}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.task_name is not None and not re.fullmatch(r"\w[\w.-]*", self.task_name):
            raise UserError("--task_name may hold letters, digits, '_', '-' and '.', got "
                            f"{self.task_name!r}")

    def _check_resume(self) -> None:
        names = {field.name for field in dataclasses.fields(self)} - {"resume", "device", "plots"}
        given = sorted(name for name in names if getattr(self, name) != getattr(TrainConfig, name))
        if given:
            raise UserError(f"--resume goes on with the settings of {self.resume}: leave out --{given[0]}")

    def _fill_in_defaults(self) -> None:
        for name, of_draft, otherwise in (("learning_rate", 1e-4, 1e-3), ("dropout", 0.1, 0.3)):
            if getattr(self, name) is None:
                default = of_draft if self.conditioning == "draft" else otherwise
                object.__setattr__(self, name, default)

    def _check_counts(self) -> None:
        check_counts(self, ("num_epochs", "batch_size", "max_seq_len", "embed_dim", "num_layers",
                            "num_heads"))
        if self.max_test_samples is not None:
            check_counts(self, (), ("max_test_samples",))
        if self.max_seq_len < 2:
            raise UserError("--max_seq_len must be 2 or more (a token and the one that follows "
                            f"it), got {self.max_seq_len}")
        for name in ("early_stopping", "vocab_size", "seed", "bos_id"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise UserError(f"--seed must be below 2^63, got {self.seed}")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(f"--vocab_size must be at most {MAX_VOCAB_SIZE}, got {self.vocab_size}")
        if self.max_train_samples != -1 and self.max_train_samples < 2:
            raise UserError("--max_train_samples must be 2 or more (one to train, one to validate) "
                            f"or -1 for all, got {self.max_train_samples}")

    def _check_ranges(self) -> None:
        assert self.learning_rate is not None and self.dropout is not None          # filled in
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be from 0 to below 1, got {self.dropout}")
        if not 0 <= self.draft_text < math.inf:
            raise UserError(f"--draft_text must be 0 or more, got {self.draft_text}")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction must be between 0 and 1, got {self.val_fraction}")


# ------------------------------------------------------------------------------------------- task
def resumed(folder: Path, device: str, plots: bool) -> TrainConfig | None:
    """The settings of the task to go on with; None: it was finished, and has its page now.

    device, plots: the flags of this run; device "auto" leaves the task's own.
    """
    path = folder / "results.json"
    results = read_json(path)
    if not isinstance(results, dict) or results.get("kind") not in ("training", "checkpoint"):
        raise UserError(f"{path} is not the results.json of train_and_evaluate.py")
    check_format(path, results.get("format"), FORMAT)
    if not results.get("unfinished"):
        if not (folder / "RESULTS.md").exists():              # stopped while the page was made
            with reading(path, REMEASURE):
                write_report(folder, styles(), plots=plots)
        (folder / "resume.pt").unlink(missing_ok=True)
        with reading(path, REMEASURE):
            log(f"RESULT | {folder} | finished before: {one_line(results)}")
        return None
    given = {"device": device} if device != "auto" else {}
    with reading(path, "train anew"):
        start_folder = Path(results["provenance"]["folder"])
        known = from_json(TrainConfig, {**results["config"], **given}, start_folder)
    return dataclasses.replace(known, resume=None, task_folder=folder, plots=plots)


def new_task_of(config: TrainConfig, data: Data) -> Path:
    return new_task_folder(config.task_dir, config.task_name or detect_task_name(data))


# --------------------------------------------------------------------------------------- training
def open_data(config: TrainConfig) -> Data:
    assert config.test_benchmark
    split = None if config.checkpoint else ValidationSplit(config.val_fraction, config.seed)
    return load_data(config.train_benchmark, config.test_benchmark, split, config.max_train_samples,
                     config.bos_id)


def adapter_maker(config: TrainConfig, data: Data,
                  device: torch.device) -> Callable[[Pairs], TokenAdapter]:
    """A function that makes an adapter to train on given pairs, the same each time."""
    from token_adapter import AdapterConfig
    from training.adapters import new_adapter, of_tokenizers, scoring_targets_of, vocab_size_for

    assert config.dropout is not None
    sizes = AdapterConfig(
        vocab_size=vocab_size_for(data, config.vocab_size), embed_dim=config.embed_dim,
        num_layers=config.num_layers, num_heads=config.num_heads, feedforward_dim=4 * config.embed_dim,
        max_seq_len=config.max_seq_len, conditioning=config.conditioning, dropout=config.dropout)
    sizes = of_tokenizers(sizes, data)

    def make(pairs: Pairs) -> TokenAdapter:
        if config.draft_vocab:
            return scoring_targets_of(pairs, sizes, config.seed).to(device)
        return new_adapter(sizes, config.seed).to(device)

    return make


def settings_of(config: TrainConfig) -> Settings:
    from training.phases import Settings

    return Settings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)})


def adapter_facts(adapter: TokenAdapter) -> dict:
    return {**dataclasses.asdict(adapter.config), "parameters": adapter.num_parameters()}


# -------------------------------------------------------------------------------------- measuring
def measuring_of(config: TrainConfig, adapter: TokenAdapter, device: torch.device) -> Measuring:
    from training.evaluation import Measuring

    is_small = adapter.num_parameters() < SMALL_ADAPTER
    on_gpu, max_pairs = device.type == "cuda", config.max_test_samples
    if max_pairs is None:
        max_pairs = CPU_SAMPLES if device.type == "cpu" and not is_small else -1
    online = on_gpu or is_small if config.online is None else config.online
    return Measuring(config.batch_size, max_pairs, config.stream, online, config.seed, on_gpu)


# ------------------------------------------------------------------------------------------ steps
def main() -> None:
    config = parse_config(TrainConfig)
    with Team.meet(this_process(together=True)) as team, contextlib.ExitStack() as locks:
        check_together(team, config)
        going_on, is_first = config.resume is not None, team.ranks.rank == 0
        if going_on:
            if not (config.resume / "results.json").is_file():
                raise UserError(f"{config.resume} is no task folder: it has no results.json; "
                                "wanted one whose training was stopped")
            if is_first:
                locks.enter_context(only_writer(config.resume))
                config = resumed(config.resume, config.device, config.plots)
            if team.from_first("state", lambda: "open" if config else "finished") == "finished":
                return
            if not is_first:
                config = resumed(config.resume, config.device, config.plots)
        if config:
            train_and_measure(config, going_on, locks, team)


def check_together(team: Work, config: TrainConfig) -> None:
    """All processes were given the same flags, and flags that several can follow."""
    if team.ranks.world > 1 and config.checkpoint:
        raise UserError(f"--checkpoint is measured by one process, here are {team.ranks.world}")
    team.agree({f"--{name}": json.dumps(value) for name, value in as_json(config).items()
                if name != "device"})


def train_and_measure(config: TrainConfig, going_on: bool, locks: contextlib.ExitStack,
                      team: Work) -> None:
    """going_on: in config.task_folder, whose lock is held; else in a new one, locked by `locks`.

    Processes beside the first train with it, write nothing, and are through after training.
    """
    # these bring torch: not before the flags are read
    import torch

    from drafting.memory import remembered, save_memory
    from machine.device import choose_device, device_name, gpu_of
    from training.adapters import open_checkpoint
    from training.checkpoints import Fingerprint, Resume
    from training.evaluation import evaluate
    from training.phases import train
    from training.together import group_of

    start, trained, make_adapter = time.monotonic(), None, None
    device = choose_device(team.ranks.device(config.device, torch.cuda.device_count()))
    data, is_first = open_data(config), team.ranks.rank == 0
    team.differ("the GPU", gpu_of(device))
    if not config.checkpoint:
        config = dataclasses.replace(config, conditioning=conditioning_for(config.conditioning, data),
                                     draft_text=config.draft_text * data.drafts_are_text)
    if config.checkpoint:
        adapter = open_checkpoint(config.checkpoint, data, config.conditioning).to(device)
    else:
        make_adapter = adapter_maker(config, data, device)
        adapter = make_adapter(data.training.train)
    task = Path(team.from_first("task", lambda: str(config.task_folder if going_on else open_task(
        config.task_folder, functools.partial(new_task_of, config, data), locks))))
    facts: dict[str, Any] = {
        "format": FORMAT,
        "kind": "checkpoint" if config.checkpoint else "training",
        "task": task.resolve().name,
        "config": as_json(config),
        "adapter": adapter_facts(adapter),
        "files": data.files,
        "split": data.split,
        "warnings": data.warnings,
        "provenance": {**provenance(), "folder": os.getcwd(), "device": device_name(device)},
    }
    tracker = locks.enter_context(tracking(config.tracker if is_first else "none", task,
                                           task.resolve().name, facts["config"]))
    if make_adapter:
        known = Fingerprint.of(data)
        team.agree({f"pair files: {name}": str(value) for name, value in known.parts.items()})
        resume = Resume(task / "resume.pt", known, adapter.num_parameters(), is_first)
        if going_on:
            resume.read()
        with group_of(team, device, config.batch_size) as group:
            trained = train_in(task, facts, adapter, resume, tracker.log, lambda files: train(
                settings_of(config), adapter, data, files, make_adapter, group))
        if not is_first:
            return
        adapter = trained.adapter
        save_memory(remembered(data.training.all_train), task / "memory.npz")
    trained_s = time.monotonic() - start
    metrics = evaluate(adapter, trained, data, measuring_of(config, adapter, device))
    results = {
        **facts,
        "date": now(),
        "adapter": adapter_facts(adapter),
        "history": trained.history if trained else [],
        "best_epoch": trained and trained.best_epoch,
        "refitted": bool(trained and trained.adapter is not trained.selected),
        "metrics": metrics,
        "seconds": {"until_trained": trained_s, "all": time.monotonic() - start},
    }
    write_json(task / "results.json", results)
    tracker.log({"test": tracked_figures(metrics["test"])})
    write_report(task, styles(), plots=config.plots)
    (task / "resume.pt").unlink(missing_ok=True)
    goes_on_with([])
    log(f"RESULT | {task} | {one_line(results)}")


if __name__ == "__main__":
    run(main, together=True)
