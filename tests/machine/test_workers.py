"""Worker processes: one that dies is an error and not a wait."""

import os

import pytest

from base import UserError
from machine.workers import cores, in_workers


def test_a_worker_that_dies_is_an_error_and_not_a_wait():
    with pytest.raises(UserError, match="a worker process died"):
        list(in_workers(os._exit, [1, 1, 1], 2))


def test_a_system_that_does_not_say_which_cores_may_be_used_counts_all(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores() == os.cpu_count()
