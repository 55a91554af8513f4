"""Processes of one launch, here threads with one store: they agree, share work, wait."""

import threading
import time

import pytest
import torch.distributed as dist

from base import UserError
from machine import team as team_module
from machine.ranks import Ranks
from machine.running import Stopped
from machine.team import Alone, Team, bounds_of, open_store, share_of

team_module.SPEAK_S = 0.1


def together(work, world: int = 3) -> list:
    """What work(team) returns or raises in each process, by rank."""
    store, results = dist.HashStore(), [None] * world

    def process(rank: int) -> None:
        team = Team(Ranks(rank, world, rank, world, "torchrun"), store)
        try:
            results[rank] = work(team)
        except BaseException as error:
            team._tell_end(error)
            results[rank] = error
        finally:
            team.ended.set()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.mark.parametrize(
    ("total", "world"), [(0, 2), (1, 3), (20, 2), (1500, 2), (52_000, 16), (100, 64)])
def test_every_item_is_in_one_block_and_the_last_blocks_are_small(total, world):
    bounds = bounds_of(total, world)
    assert [number for start, end in bounds for number in range(start, end)] == list(range(total))
    if total > 16 * world:
        first, last = (end - start for start, end in (bounds[0], bounds[-1]))
        assert first <= total / (4 * world) + 1 and last <= 16


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_group_goes_whole_to_one_process(world):
    items = [(name, number) for name, size in {"a": 9, "b": 1, "c": 5, "d": 4}.items()
             for number in range(size)]
    shares = [share_of(items, lambda item: item[0], Ranks(rank, world)) for rank in range(world)]
    assert sorted(item for share in shares for item in share) == items
    assert len([name for share in shares for name in {name for name, _ in share}]) == 4
    assert max(map(len, shares)) == {1: 19, 2: 10, 3: 9, 8: 9}[world]


def test_each_item_goes_to_one_process_and_a_slow_one_gets_fewer():
    def work(team):
        items = []
        for block in team.blocks("clips", range(60)):
            items += block
            time.sleep(len(block) * (0.02 if team.ranks.rank else 0.002))
        return items

    shares = together(work)
    assert sorted(item for share in shares for item in share) == list(range(60))
    assert len(shares[0]) > len(shares[1])
    assert list(Alone().blocks("clips", range(5))) == [[0, 1, 2, 3, 4]]
    assert not list(Alone().blocks("clips", []))


def test_all_learn_what_each_says_and_what_the_first_says():
    def work(team):
        said = team.gather("names", str(team.ranks.rank).encode())
        return said, team.from_first("state", lambda: f"of {team.ranks.rank}")

    assert together(work) == [([b"0", b"1", b"2"], "of 0")] * 3


def test_one_that_differs_ends_all_and_the_first_says_which():
    results = together(lambda team: team.agree({"version of the code": "ab"[team.ranks.rank == 2]}))
    assert isinstance(results[0], UserError) and "rank 2 on " in str(results[0])
    assert "another version of the code than rank 0" in str(results[0])
    assert "b there, a here" in str(results[0])
    assert all(isinstance(result, Stopped) and result.code == 2 for result in results[1:])


def test_two_processes_on_one_gpu_end_all():
    results = together(
        lambda team: team.differ("the GPU", ["host a", "host b", "host a"][team.ranks.rank]))
    assert "ranks 0 and 2 would share the GPU host a" in str(results[0])
    assert together(lambda team: team.differ("the GPU", "")) == [None] * 3


def test_nobody_waits_for_one_that_has_failed(monkeypatch):
    def work(team):
        if team.ranks.rank == 1:
            raise OSError(28, "No space left on device")
        return team.gather("answers", b"")

    results = together(work)
    assert isinstance(results[0], UserError) and "rank 1 on " in str(results[0])
    assert "No space left on device" in str(results[0]) and isinstance(results[2], Stopped)


def test_nobody_waits_for_one_that_has_died(monkeypatch):
    monkeypatch.setattr(team_module, "SILENCE_S", 0.5)
    monkeypatch.setattr(team_module, "BEAT_S", 0.05)

    def work(team):
        if team.ranks.rank == 1:
            team.ended.set()                   # no beat any more, and no word of why
            return None
        return team.gather("answers", b"")

    results = together(work)
    assert "rank 1 has not been heard of" in str(results[0])


def test_a_port_that_is_no_number_is_a_mistake_of_the_user(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "x")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    with pytest.raises(UserError, match=r"can't meet the others at .*: invalid literal"):
        open_store(Ranks(0, 2, 0, 2, "mpirun"))


def test_a_report_sums_what_all_have_told():
    def work(team):
        team.report("answers", 10 + team.ranks.rank, 1)
        team.gather("told", b"")
        team.told.clear()
        return team.report("answers", 10 + team.ranks.rank, 1)

    assert together(work) == [(33, 3), (), ()] and Alone().report("answers", 4, 0) == (4, 0)
