"""Intervals of alpha."""

import numpy as np
import pytest

from acceptance.intervals import interval


def test_intervals_hold_the_value_and_pairing_takes_the_common_part_out():
    random = np.random.default_rng(0)
    lengths = np.full(200, 50)
    # blocks differ
    good = random.random((200, 50)) < np.repeat(random.uniform(0.4, 0.9, 10), 20)[:, None]
    better = good | (random.random((200, 50)) < 0.05)
    names = [f"town_{i // 20:02}_a" for i in range(200)]
    bounds = interval(good.sum(1), lengths, names)
    both = interval(better.sum(1), lengths, names, good.sum(1))
    assert bounds["low"] < bounds["value"] < bounds["high"] and bounds["by"] == "sequences"
    assert 0 < both["low"] < both["value"] < both["high"]
    assert both["high"] - both["low"] < 0.3 * (bounds["high"] - bounds["low"])
    assert interval(good.sum(1), lengths, [""] * 200)["by"] == "blocks of 20 clips"


def test_beside_an_interval_stands_the_range_when_one_drive_at_a_time_is_left_out():
    lengths = np.full(6, 10)
    names = ["bern_00_a", "bern_00_b", "bern_00_b", "thun_01_a", "basel_02_a", "basel_02_a"]
    hits = np.array([9, 9, 9, 2, 5, 5])
    assert interval(hits, lengths, names)["left_out"] == pytest.approx([12 / 30, 37 / 50])
    assert interval(hits[:3], lengths[:3], names[:3])["left_out"] is None
