"""Experiment trackers: figures of a run go to TensorBoard, Weights & Biases, trackio or MLflow while it
works, through accelerate's wrappers.

Which project, account and server: the tracker's own settings (WANDB_MODE=offline, MLFLOW_TRACKING_URI, ...).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from base import UserError, log, plain

Name = Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]
ABOUT = ("send figures while it works to tensorboard (in the task folder), wandb, trackio or mlflow, "
         "which must be installed")
PROJECT = "eventgpt-drafts-video-llava"
# Tracker -> packages of which one must be installed; the first is named in the advice.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",),
            "mlflow": ("mlflow",)}


def check_tracker(name: str) -> None:
    """A UserError unless the tracker is installed. Imports nothing."""
    packages = PACKAGES.get(name, ())
    if packages and not any(map(importlib.util.find_spec, packages)):
        raise UserError(f"--tracker {name}: the package {packages[0]} is not installed; install it "
                        f"(pip install {packages[0]}) or leave the flag out")


class Tracker:
    """A tracker at work, or none. A tracker that fails costs its figures and never the run."""

    def __init__(self, name: str, inner: Any = None):
        self.name, self.inner = name, inner

    def log(self, values: dict, step: int | None = None) -> None:
        """Send the finite numbers of a (nested) dict under names like "test/hybrid/alpha"."""
        numbers = dict(flat(values))
        if numbers:
            self._try(lambda inner: inner.log(numbers, step=step))

    def finish(self) -> None:
        self._try(lambda inner: inner.finish())
        self.inner = None

    def _try(self, work) -> None:
        if self.inner is None:
            return
        try:
            work(self.inner)
        except Exception as error:             # of the network, of a server, of a full disk
            log(f"tracker | WARNING | {self.name} failed and gets nothing more: "
                f"{type(error).__name__}: {plain(error)[:300]}")
            self.inner = None


NO_TRACKER = Tracker("none")


@contextlib.contextmanager
def tracking(name: str, folder: Path, run_name: str, settings: dict) -> Iterator[Tracker]:
    """The tracker with a run of its own, begun before the work and finished after it.

    folder: where TensorBoard's files go, below `tensorboard`; settings: of the run. Raises UserError
    where the tracker can't begin.
    """
    if name == "none":
        yield NO_TRACKER
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import clear_environment

    # accelerate's loggers refuse to work without a state; in an environment of several processes it
    # would wait for the others, which have no tracker.
    if not PartialState._shared_state:
        with clear_environment():
            PartialState(cpu=True)
    arguments: dict[str, tuple[tuple, dict]] = {
        "tensorboard": ((run_name, str(folder / "tensorboard")), {}),
        "wandb": ((PROJECT,), {"name": run_name, "dir": str(folder)}),
        "trackio": ((PROJECT,), {"name": run_name}),
        "mlflow": ((PROJECT,), {"run_name": run_name})}
    try:
        inner = LOGGER_TYPE_TO_CLASS[name](*arguments[name][0], **arguments[name][1])
        inner.start()
        inner.store_init_configuration({key: value if type(value) in (bool, int, float) else str(value)
                                        for key, value in settings.items() if value is not None})
    except Exception as error:                 # of an account, of the network, of a server
        raise UserError(f"--tracker {name} can't begin: {type(error).__name__}: {plain(error)[:300]}; "
                        "correct its settings, or leave the flag out") from error
    tracker = Tracker(name, inner)
    try:
        yield tracker
    finally:
        tracker.finish()


def flat(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """("a/b", number) of every finite number in nested dicts."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        yield re.sub(r"[^\w./ -]", "", name), value        # what MLflow takes
