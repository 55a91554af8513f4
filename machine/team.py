"""The processes of one launch: they agree at the start, share work, and wait for each other.

    with Team.meet(ranks) as team:                   # Alone where there is one process
        team.agree({"flags": ...})                   # one that differs ends all, named
        for block in team.blocks("drafts", clips):   # each block goes to one process
            ...
        answers = team.gather("drafts", mine)        # waits for all

They share a key-value store (torch.distributed's TCPStore), which torchrun keeps, or else the first
process. No collective is involved, and no time-out: a process may wait for hours, as long as those
that it waits for are heard of. What must outlive a process belongs into its files, not here.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import hashlib
import heapq
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from base import ROOT, UserError, first_line
from machine.ranks import TORCHRUN, Ranks, meeting_place
from machine.running import Stopped, stopped_at_once

if TYPE_CHECKING:                  # torch is imported where there are several processes
    from torch.distributed import Store

MEETING_S = 600                    # a process that has not come until then will not come
BEAT_S, SILENCE_S = 2.0, 300.0     # each process says that it is there; a silent one is dead
SPEAK_S = 2.0                      # within it the first process has said why all end
LOOK_S = 0.05                      # between two looks at the store; later up to 20 times that
# Guided self-scheduling (Polychronopoulos and Kuck 1987): a block is a quarter of a process' share
# of what is left, so that the last blocks are small and no process holds up the others.
PART_OF_SHARE = 4
SMALLEST_BLOCK = 16                # smaller ones cost more than they balance, unless work is little
LAUNCHER_NAMES = ("torchrun", "torch.distributed.run", "accelerate")     # programs in Python
KEPT = "what this run has finished is kept, give the same command again"
Item = TypeVar("Item")


class Work(Protocol):
    """How processes share work: one that is Alone, or a Team."""

    ranks: Ranks

    def agree(self, facts: dict[str, str]) -> None:
        """A UserError in all processes, but one line in the log, unless all call it with equal values."""

    def gather(self, key: str, value: bytes,
               meanwhile: Callable[[], object] = lambda: None) -> list[bytes]:
        """The values of all processes by rank, when the last has given its own.

        meanwhile: called now and then until that.
        """

    def from_first(self, key: str, value: Callable[[], str]) -> str:
        """What value() is in the first process; in the others it is not called."""

    def blocks(self, key: str, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Blocks of these items, equal in all processes; each block goes to the next that asks."""

    def differ(self, what: str, value: str) -> None:
        """A UserError in all processes unless this value is another in each, or empty."""

    def outlast(self) -> None:
        """Wait, in the first process, until all others have left the block of `meet`."""

    def report(self, key: str, *numbers: int) -> tuple[int, ...]:
        """Tell this process' numbers; the sums over all processes as far as they have told."""


class Alone:
    """A process without others."""

    ranks = Ranks()

    def agree(self, facts: dict[str, str]) -> None:
        pass

    def gather(self, key: str, value: bytes,
               meanwhile: Callable[[], object] = lambda: None) -> list[bytes]:
        return [value]

    def from_first(self, key: str, value: Callable[[], str]) -> str:
        return value()

    def differ(self, what: str, value: str) -> None:
        pass

    def outlast(self) -> None:
        pass

    def blocks(self, key: str, items: Sequence[Item]) -> Iterator[list[Item]]:
        if items:
            yield list(items)

    def report(self, key: str, *numbers: int) -> tuple[int, ...]:
        return numbers


class Team:
    """One of several processes."""

    def __init__(self, ranks: Ranks, store: Store):
        self.ranks, self.store = ranks, store
        self.told: dict[str, float] = {}             # key of a report -> when
        self.heard: dict[int, tuple[int, float]] = {}            # rank -> its last beat, when
        self.calls = itertools.count()
        self.ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    # ------------------------------------------------------------------------------------- meeting
    @staticmethod
    @contextlib.contextmanager
    def meet(ranks: Ranks) -> Iterator[Work]:
        """Wait for the others of the launch; a process that fails inside the block tells them."""
        if ranks.world == 1:
            yield Alone()
            return
        team = Team(ranks, open_store(ranks))
        try:
            team.agree({"number of processes": str(ranks.world),
                        "version of the code": code_digest(), **library_versions()})
            yield team
            team._leave()
        except BaseException as error:
            team._tell_end(error)
            raise
        finally:
            team.ended.set()

    def _leave(self) -> None:
        """Say that this process needs nothing more; one that keeps the store waits for the others."""
        if self.ranks.rank:
            self._ask(lambda: self.store.set(f"left/{self.ranks.rank}", b""))
        elif not agent_has_store():
            self.outlast()

    def outlast(self) -> None:
        assert self.ranks.rank == 0, "the first process is the last"
        for rank in range(1, self.ranks.world):
            self._wait(f"left/{rank}", rank)

    def _tell_end(self, error: BaseException) -> None:
        with contextlib.suppress(RuntimeError):            # the store may be gone
            reason = "" if isinstance(error, SystemExit) else first_line(error)
            self.store.set(f"ended/{self.ranks.rank}", f"{self.ranks.name}: {reason or 'stopped'}")
            if self.ranks.rank == 0 and not agent_has_store():
                time.sleep(2 * LOOK_S)                     # the store ends with this process

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not self.ended.wait(BEAT_S):
                self.store.add(f"beat/{self.ranks.rank}", 1)

    # ----------------------------------------------------------------------------------- agreement
    def agree(self, facts: dict[str, str]) -> None:
        mine = json.dumps({"host": os.uname().nodename, "facts": facts}).encode()
        known = [json.loads(value) for value in self.gather(self._new("agree"), mine)]
        for rank, other in enumerate(known):
            names = known[0]["facts"].keys() | other["facts"].keys()
            for name in sorted(names):
                values = known[0]["facts"].get(name), other["facts"].get(name)
                if values[0] != values[1]:
                    self._refuse(
                        f"rank {rank} on {other['host']} has another {name} than rank 0 on "
                        f"{known[0]['host']}: {values[1]} there, {values[0]} here; start all "
                        "processes from one copy of the code, with one command")

    def differ(self, what: str, value: str) -> None:
        values = [text.decode() for text in self.gather(self._new("differ"), value.encode())]
        for rank, text in enumerate(values):
            if text and text in values[:rank]:
                self._refuse(f"ranks {values.index(text)} and {rank} would share {what} {text}: "
                             "start one process for each, or name another --device")

    def _refuse(self, message: str) -> None:
        """End all processes; the first says why."""
        if self.ranks.rank == 0:
            raise UserError(message)
        time.sleep(SPEAK_S)                    # a launcher ends all when the first of them ends
        raise Stopped(2)

    def _new(self, name: str) -> str:
        """A key that is new at each call, and the same in all processes that call in one order."""
        return f"{name}/{next(self.calls)}"

    # ------------------------------------------------------------------------------------- waiting
    def gather(self, key: str, value: bytes,
               meanwhile: Callable[[], object] = lambda: None) -> list[bytes]:
        self._ask(lambda: self.store.set(f"{key}/{self.ranks.rank}", value))
        return [self._wait(f"{key}/{rank}", rank, meanwhile) for rank in range(self.ranks.world)]

    def from_first(self, key: str, value: Callable[[], str]) -> str:
        if self.ranks.rank == 0:
            text = value()
            self._ask(lambda: self.store.set(key, text))
            return text
        return self._wait(key, 0).decode()

    def _wait(self, key: str, rank: int, meanwhile: Callable[[], object] = lambda: None) -> bytes:
        """The value of a key that this rank sets, when it is there; ends if the rank has ended."""
        looks = 0
        while not self._ask(lambda: self.store.check([key])):
            looks += 1
            self._check_alive(rank)
            meanwhile()
            time.sleep(LOOK_S * min(20, 1 + looks // 20))
        return self._ask(lambda: self.store.get(key))

    def _check_alive(self, rank: int) -> None:
        ended = f"ended/{rank}"
        if self._ask(lambda: self.store.check([ended])):
            line = self._ask(lambda: self.store.get(ended)).decode()
            self._refuse(f"{line}; {KEPT}")
        beat = self._ask(lambda: self.store.add(f"beat/{rank}", 0))
        last, when = self.heard.get(rank, (-1, 0.0))
        if beat != last:
            self.heard[rank] = beat, time.monotonic()
        elif time.monotonic() > when + SILENCE_S:
            self._refuse(f"rank {rank} has not been heard of for {SILENCE_S / 60:.0f} minutes: it "
                         f"died, or its host did; {KEPT}")

    def _ask(self, question: Callable[[], Item]) -> Item:
        """What the store answers; a UserError where it is gone."""
        try:
            return question()
        except RuntimeError as error:          # DistNetworkError, DistStoreError
            if self.ranks.rank and not agent_has_store():
                raise Stopped(2) from error    # it ended with the first process, which said why
            raise UserError(f"the other processes can't be reached ({first_line(error)}); "
                            f"{KEPT}") from error

    # ------------------------------------------------------------------------------------- dealing
    def blocks(self, key: str, items: Sequence[Item]) -> Iterator[list[Item]]:
        bounds = bounds_of(len(items), self.ranks.world)
        while (number := self._ask(lambda: self.store.add(f"deal/{key}", 1)) - 1) < len(bounds):
            yield list(items[slice(*bounds[number])])

    def report(self, key: str, *numbers: int) -> tuple[int, ...]:
        if time.monotonic() < self.told.get(key, -1) + 0.5:
            return ()
        self.told[key] = time.monotonic()
        names = [f"report/{key}/{rank}" for rank in range(self.ranks.world)]
        mine = names.pop(self.ranks.rank)
        self._ask(lambda: self.store.set(mine, json.dumps(numbers)))
        if self.ranks.rank:                    # the first alone shows them
            return ()
        there = self._ask(lambda: [name for name in names if self.store.check([name])])
        known = [numbers, *self._ask(lambda: [json.loads(self.store.get(name)) for name in there])]
        return tuple(map(sum, zip(*known)))


def bounds_of(total: int, world: int) -> list[tuple[int, int]]:
    """(start, end) of each block in which so many items are dealt to so many processes."""
    smallest = max(1, min(SMALLEST_BLOCK, total // (4 * PART_OF_SHARE * world)))
    bounds, start = [], 0
    while start < total:
        end = min(total, start + max(smallest, (total - start) // (PART_OF_SHARE * world)))
        bounds.append((start, end))
        start = end
    return bounds


def share_of(items: Sequence[Item], group: Callable[[Item], str], ranks: Ranks) -> list[Item]:
    """The items of whole groups that fall to this process, in their order.

    The largest group first, each to the process with the fewest items (Graham 1969, LPT).
    """
    sizes = collections.Counter(map(group, items))
    loads, mine = [(0, rank) for rank in range(ranks.world)], set()
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, rank))
        if rank == ranks.rank:
            mine.add(name)
    return [item for item in items if group(item) in mine]


# --------------------------------------------------------------------------------------- the store
def open_store(ranks: Ranks) -> Store:
    """The store of this launch."""
    # A store that is gone is an error that we report; PyTorch would add its C++ stack for each try.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed as dist

    from machine.device import see_own_gpu

    see_own_gpu(ranks)
    timeout = datetime.timedelta(seconds=MEETING_S)
    try:
        if ranks.launcher != "torchrun":
            host, port = meeting_place(ranks, os.environ)
            numbers = ranks.rank, ranks.world, ranks.local_rank, ranks.local_world
            os.environ.update({"MASTER_ADDR": host, "MASTER_PORT": str(port),
                               **dict(zip(TORCHRUN, map(str, numbers)))})
        with stopped_at_once():
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(f"{ranks.name} of {ranks.world} can't meet the others at {place}: "
                        f"{first_line(error)}; wanted the first process there, and its port "
                        "free") from error
    return dist.PrefixStore(f"team/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def agent_has_store() -> bool:
    """Whether torchrun keeps the store, so that it outlives the first process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"


def code_digest() -> str:
    """A digest of the project's own sources."""
    digest = hashlib.blake2b(digest_size=6)
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]):
        if not file.is_relative_to(ROOT / "tests"):
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """The versions of what answers and weights may depend on."""
    from base import provenance

    versions = provenance()["versions"]
    return {f"version of {name}": version for name, version in versions.items() if name != "python"}


def launch_command() -> list[str]:
    """What followed "python" in the command that started this program, alone or under torchrun.

    Empty where several processes were started by another than their parent process.
    """
    if TORCHRUN[1] not in os.environ:
        return sys.argv
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
        is_launcher = any(name in " ".join(words[1:4]) for name in LAUNCHER_NAMES)
        if is_launcher and os.path.basename(sys.argv[0]) in map(os.path.basename, words):
            return words[1:]
    return []
