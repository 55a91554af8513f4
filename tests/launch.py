"""Several processes of one launch, each a fork of the warm one, as torchrun would start them."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from tests.warm import Warm

PATIENCE_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment_of(rank: int, world: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world,
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


class Launch:
    """The processes of a launch; the first that fails ends the others, as torchrun does."""

    def __init__(self, warm: Warm, world: int, log: Path, program: str = "extract_tokens_train.py"):
        self.warm, self.world, self.log, self.program = warm, world, log, program
        self.processes: dict[int, int] = {}          # rank -> process number
        self.codes: dict[int, int] = {}

    def start(self, *flags, of_rank: dict[int, list] | None = None,
              folders: list[Path] | None = None,
              ahead_s: dict[int, float] | None = None) -> "Launch":
        """flags: of all; of_rank: further ones of single ranks; folders: where each rank starts."""
        port = free_port()
        for rank in range(self.world):
            more: dict = {"folder": folders[rank]} if folders else {}
            self.processes[rank] = self.warm.start(
                [*flags, *(of_rank or {}).get(rank, [])], self.log, self.program,
                environment=environment_of(rank, self.world, port),
                ahead_s=(ahead_s or {}).get(rank, 0), **more)
        return self

    def wait(self) -> list[int]:
        """The exit codes by rank, when all have ended."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self.codes) < self.world:
            for rank in self.processes.keys() - self.codes.keys():
                if has_ended(self.processes[rank]):
                    self.codes[rank] = self.warm.wait(self.processes[rank])
                    if self.codes[rank]:
                        self.signal_others(rank)
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        return [self.codes[rank] for rank in range(self.world)]

    def check_running(self) -> None:
        """Assert that no process has ended: what the caller waits for may still come."""
        assert not any(map(has_ended, self.processes.values())), self.log.read_text()

    def signal_others(self, rank: int) -> None:
        time.sleep(0.1)                              # torchrun looks ten times a second
        for other in self.processes.keys() - self.codes.keys() - {rank}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[other], signal.SIGTERM)

    def kill(self, rank: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank], signal.SIGKILL)


def has_ended(process: int) -> bool:
    """Whether it is a zombie: the warm process has not waited for it yet."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
