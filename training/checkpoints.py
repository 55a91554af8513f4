"""What training keeps on the disk while it runs: best_model.pt, and resume.pt to go on from.

Both are written whole, and together take no more than a tenth of the time. resume.pt holds all that
the next step depends on (weights, optimizer, random numbers, the best so far): 2 epochs and 2
resumed ones equal 4, bit for bit on a CPU. It is removed when the task is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from base import UserError, log
from drafting.checkpoints import save_adapter
from machine.files import check_format, reading
from machine.tensors import check_weights, read_tensors, write_tensors
from pairs.splits import Data
from pairs.tokenizers import UNKNOWN
from token_adapter import TokenAdapter

FORMAT = 1       # of resume.pt; one without the number counts as 0: its fingerprint has fewer parts
ANEW = "delete it to begin this training anew"
# What resume.pt holds: the best epochs; and of the last epoch, all that the next one depends on.
KINDS = {"data": (dict, list), "history": list, "best": dict, "phase": str, "epoch": int, "over": bool,
         "adapter": dict, "optimizer": dict, "done": int, "order": torch.Tensor, "random": list}
SAVING_SHARE = 0.05   # of the time may go into writing each file: 350 MB a second where that is all
# of the weights in resume.pt: itself, two moments, the best of two phases, tied ones twice
MAX_COPIES = 8


class Writing:
    """Tells when a file may be written again, so that writing takes only its share of the time."""

    due = 0.0

    def __init__(self, writes: bool = True):
        """writes: False for a process beside the first of a training, which leaves that to it."""
        self.writes = writes

    def is_due(self) -> bool:
        return self.writes and time.monotonic() >= self.due

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around one writing."""
        start = time.monotonic()
        yield
        end = time.monotonic()
        self.due = end + (end - start) / SAVING_SHARE


class Checkpoint(Writing):
    """best_model.pt: written at once while that costs next to nothing, else when it is due."""

    def __init__(self, path: Path, writes: bool = True):
        super().__init__(writes)
        self.path = path
        self.waiting: tuple[TokenAdapter, dict] | None = None

    def offer(self, adapter: TokenAdapter, **facts) -> None:
        """Queue this adapter for writing, instead of a queued one; don't modify it before that."""
        self.waiting = adapter, facts
        self.write_if_due()

    def write_if_due(self) -> None:
        if self.is_due():
            self.write()

    def write(self) -> None:
        if self.waiting and self.writes:
            adapter, facts = self.waiting
            with self.timed():
                save_adapter(adapter, self.path, **facts)
            self.waiting = None


# -------------------------------------------------------------------------------------- fingerprint
@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Checksums of all the data that training depends on."""

    parts: dict[str, int]          # by the name that an error message gives to each part
    # of format 0, which missed the names and so the split that follows from them
    format_0: list[int]

    @classmethod
    def of(cls, data: Data) -> Fingerprint:
        parts: dict[str, int] = {}
        format_0: list[int] = []
        training = data.training
        for which, pairs in (("train", training.all_train), ("test", data.test)):
            starts = (pairs.draft_start, pairs.target_start, pairs.target_length)
            parts |= {f"{which} tokens": zlib.crc32(pairs.target.data, zlib.crc32(pairs.draft.data)),
                      f"{which} rows": _checksum([zlib.crc32(part.data)
                                                  for part in (*starts, pairs.draft_length)]),
                      f"{which} sequence names": _checksum(pairs.sequence),
                      f"{which} clip names": _checksum(pairs.clip),
                      f"{which} questions": _checksum([file["identity"] for file in pairs.files])}
            format_0 += [zlib.crc32(part.data) for part in (pairs.draft, pairs.target, *starts)]
        split = [data.split, zlib.crc32(training.validation.target_start.data)]
        parts |= {"split": _checksum(split), "vocabulary size": _checksum(data.vocab_size)}
        if data.tokenizers != UNKNOWN:        # files of earlier versions don't tell
            parts["tokenizers"] = _checksum(dataclasses.astuple(data.tokenizers))
        return cls(parts, format_0)

    def differences(self, before: dict | list) -> list[str]:
        """The names of the parts in which the data of a file differs from ours."""
        if isinstance(before, list):
            return [] if before == self.format_0 else ["tokens or rows"]
        return sorted(name for name in self.parts.keys() | before.keys()
                      if self.parts.get(name) != before.get(name))


def _checksum(value) -> int:
    return zlib.crc32(json.dumps(value).encode())


# ------------------------------------------------------------------------------------------- resume
class Resume(Writing):
    """resume.pt of a task folder; `saved`: its content when the program started."""

    def __init__(self, path: Path, data: Fingerprint, num_parameters: int, writes: bool = True):
        """num_parameters: of the adapter; a file larger than its training can write is refused."""
        super().__init__(writes)
        self.path, self.data = path, data
        self.max_bytes = 2**26 + MAX_COPIES * 4 * num_parameters
        self.saved: dict | None = None

    def read(self) -> None:
        if not self.path.exists():
            log(f"train | {self.path} is not there yet: training begins anew")
            return
        saved = read_tensors(self.path, self.max_bytes, f"can't be used: {{reason}}; {ANEW}")
        with reading(self.path, ANEW):
            if any(not isinstance(saved[name], kind) for name, kind in KINDS.items()):
                raise TypeError(f"wanted {', '.join(KINDS)}")
            check_format(self.path, saved.get("format"), FORMAT)
            changed = self.data.differences(saved["data"])
        if changed:
            raise UserError(f"the pair files are not those that {self.path.parent} began with (other "
                            f"{', '.join(changed)}); restore those, or train into a new task folder")
        self.saved = {**saved, "file": self.path}
        log(f"train | going on after epoch {saved['epoch']} of {saved['phase']}")

    def of(self, phase: str) -> dict | None:
        """The saved state, if it is of this phase."""
        return self.saved if self.saved and self.saved["phase"] == phase else None

    def write(self, **state) -> None:
        with self.timed():
            write_tensors(self.path, {"format": FORMAT, "data": self.data.parts, **state})


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """What training keeps up to date in a task folder."""

    checkpoint: Checkpoint
    resume: Resume
    show: Callable[[list[dict]], None]     # called with the history whenever resume.pt was written
    # called with an epoch's figures and its number
    track: Callable[[dict, int], None] = lambda figures, step: None


def load_weights(model: TokenAdapter, state: dict) -> None:
    """load_state_dict, but with a ValueError for weights of another model."""
    check_weights(state, integers=("output_ids",), wanted=model.state_dict())
    model.load_state_dict(state)


def random_state() -> list:
    """The states of PyTorch's generators that training draws from."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_gpus]


def set_random_state(states: list) -> None:
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:1 + torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
