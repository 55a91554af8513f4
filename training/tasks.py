"""The folder of a training: opened under its lock, unfinished until its results are there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from base import UserError, duration_of, log, now
from machine.files import make_folder, only_writer, write_json
from machine.running import goes_on_with
from machine.team import launch_command

if TYPE_CHECKING:          # torch is imported only after the flags are read
    from pairs.splits import Data
    from token_adapter import TokenAdapter
    from training.checkpoints import Resume
    from training.phases import Trained


def open_task(given: Path | None, new_task: Callable[[], Path], locks: contextlib.ExitStack) -> Path:
    """The folder that was asked for, or a new one; its lock joins `locks`."""
    if given is None:
        task = new_task()
        locks.enter_context(only_writer(task))
        return task
    task = make_folder(given)
    locks.enter_context(only_writer(task))
    if (task / "RESULTS.md").exists():
        raise UserError(f"{task} holds a finished task (RESULTS.md), nothing was changed; choose "
                        "another --task_folder")
    if (task / "resume.pt").exists():
        raise UserError(f"{task} holds an unfinished training: go on with --resume {task}, or "
                        "choose another --task_folder")
    return task


def detect_task_name(data: Data) -> str:
    """The window length (1s, 500ms) that file names, file contents or folders tell."""
    files = data.files["train"] + data.files["test"]
    paths = [Path(file["path"]).resolve() for file in files]
    recorded = [file[key] for file in files for key in ("dataset_dir", "dataset_name") if key in file]
    texts = [*(path.name for path in paths), *recorded, *(str(path.parent) for path in paths)]
    return duration_of(*texts) or "task"


def train_in(task: Path, facts: dict, adapter: TokenAdapter, resume: Resume, track: Callable,
             work: Callable[..., Trained]) -> Trained:
    """Train into this task folder, whose results.json says meanwhile that it is unfinished.

    track(figures, step): called after each epoch; work(files): trains the adapter and keeps these files
    up to date.
    """
    from training.checkpoints import Checkpoint, TaskFiles

    def show(history: list[dict]) -> None:
        if not resume.writes:
            return
        unfinished = {**facts, "date": now(), "unfinished": True, "history": history}
        write_json(task / "results.json", unfinished)

    show(resume.saved["history"] if resume.saved else [])
    goes_on_with(resume_of(launch_command(), task))
    log(f"train | {adapter.num_parameters() / 1e6:.1f} M parameters | vocabulary "
        f"{adapter.config.vocab_size} | {facts['provenance']['device']}")
    return work(TaskFiles(Checkpoint(task / "best_model.pt", resume.writes), resume, show, track))


def resume_of(command: list[str], task: Path) -> list[str]:
    """The command that goes on in this task folder, with the same launcher."""
    ends = [at for at, word in enumerate(command) if word.endswith(Path(sys.argv[0]).name)]
    return [*command[:ends[-1] + 1], "--resume", str(task)] if ends else []
