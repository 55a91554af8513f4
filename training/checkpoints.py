"""What training keeps on the disk while it runs: best_model.pt, and resume.pt to go on from when it was stopped.

Both are written whole, and no more often than a twentieth of the time allows. resume.pt holds all that the next step
depends on (weights, optimizer, random numbers, the best so far): 2 epochs and 2 resumed ones are the same as 4, bit
for bit on a CPU. It goes when the task is whole.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from base import UserError, log
from machine.files import reading
from pairs.formats import Pairs
from token_adapter import TokenAdapter, read_tensors, save_adapter, write_tensors

ANEW = "delete it to begin this training anew"
# What resume.pt holds: the best epochs; and of the last one, what the next depends on.
KINDS = {"data": list, "history": list, "best": dict, "phase": str, "epoch": int, "over": bool, "adapter": dict,
         "optimizer": dict, "done": int, "order": torch.Tensor, "random": list}
SAVING_SHARE = 0.05        # of the time may go into writing each: 350 MB a second where that is all


class Writing:
    """When the next writing is due: after one, only when it has cost its share of the time."""

    due = 0.0

    def is_due(self) -> bool:
        return time.monotonic() >= self.due

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around one writing."""
        start = time.monotonic()
        yield
        end = time.monotonic()
        self.due = end + (end - start) / SAVING_SHARE


class Checkpoint(Writing):
    """best_model.pt: written at once while that costs next to nothing, else some seconds later at most."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, None

    def offer(self, adapter: TokenAdapter, **facts) -> None:
        """To be written instead of what was; until then the adapter may only change for a better offer."""
        self.waiting = adapter, facts
        self.write_if_due()

    def write_if_due(self) -> None:
        if self.is_due():
            self.write()

    def write(self) -> None:
        if self.waiting:
            adapter, facts = self.waiting
            with self.timed():
                save_adapter(adapter, self.path, **facts)
            self.waiting = None


def fingerprint(*all_pairs: Pairs | None) -> list[int]:
    """Tells other pairs from those that a training began with."""
    return [zlib.crc32(part) for pairs in all_pairs if pairs
            for part in (pairs.draft, pairs.target, pairs.draft_start, pairs.target_start, pairs.target_length)]


class Resume(Writing):
    """Where it is kept, and what was found there."""

    def __init__(self, path: Path, data: list[int]):
        """data: the fingerprint of the pairs."""
        self.path, self.data = path, data
        self.found: dict | None = None

    def read(self) -> None:
        if not self.path.exists():
            log(f"train | {self.path} is not there yet: training begins anew")
            return
        found = read_tensors(self.path, f"can't be used: {{}}; {ANEW}")
        with reading(self.path, ANEW):
            if any(not isinstance(found[name], kind) for name, kind in KINDS.items()):
                raise TypeError(f"wanted {', '.join(KINDS)}")
            before = found["data"]
        if before != self.data:
            raise UserError(f"the pair files are not those that {self.path.parent} began with; bring those back, or "
                            "train into a new task folder")
        self.found = {**found, "file": self.path}
        log(f"train | going on after epoch {found['epoch']} of {found['phase']}")

    def of(self, phase: str) -> dict | None:
        """What was found, if it was found in this phase."""
        return self.found if self.found and self.found["phase"] == phase else None

    def write(self, **state) -> None:
        with self.timed():
            write_tensors(self.path, {"data": self.data, **state})

    def remove(self) -> None:
        """The task is whole."""
        self.path.unlink(missing_ok=True)


def load_weights(model: TokenAdapter, state: dict) -> None:
    """load_state_dict, but a ValueError where that raises a RuntimeError, as it does without memory."""
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    if {name: weight.shape for name, weight in state.items()} != wanted:
        raise ValueError("the weights have other names or shapes")
    model.load_state_dict(state)


def random_state() -> list:
    """Of PyTorch's generators that training draws from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(states: list) -> None:
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:1 + torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
