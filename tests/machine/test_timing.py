"""A cost is the median of several runs, so one slow run changes nothing."""

import time

import torch

from machine.timing import REPEATS, median_s, timed


def test_the_result_comes_back_with_its_seconds():
    result, seconds = timed(lambda: time.sleep(0.02) or "done", torch.device("cpu"))
    assert result == "done" and 0.02 <= seconds < 1


def test_one_slow_run_does_not_change_the_median():
    waits = iter([0.3] + [0.0] * (REPEATS - 1))
    assert median_s(lambda: time.sleep(next(waits)), torch.device("cpu")) < 0.1
