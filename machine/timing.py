"""Seconds of some work on a device, for costs and benchmarks alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

REPEATS = 7                        # a cost is the median of this many runs

Result = TypeVar("Result")


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """(the result of work(), seconds). The device has nothing left to do when the clock starts and
    when it stops.
    """
    wait_for(device)
    start = time.perf_counter()
    result = work()
    wait_for(device)
    return result, time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median of the seconds of `repeats` runs of work()."""
    return statistics.median(timed(work, device)[1] for _ in range(repeats))
