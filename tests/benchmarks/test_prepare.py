"""The benchmark of preparing: every part is measured, and its plain loop paints the same picture."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import benchmark
import clips.dsec as dsec
from base import ROOT, UserError
from benchmarks import prepare
from benchmarks.prepare import Config
from clips.events import render_events


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("prepare")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TMPDIR", str(folder))
        # What TMPDIR said before is remembered
        monkeypatch.setattr(prepare.tempfile, "tempdir", None)
        benchmark.measure("prepare",
                          Config(events=40_000, seconds=3, video_size="64x48",
                                 painted=20_000, workers=2,
                                            output=folder / "out.json"))
    assert os.listdir(folder) == ["out.json"]                               # the recording is gone
    return json.loads((folder / "out.json").read_text())


def test_every_part_is_measured(measured):
    paint, read, folder = measured["paint"], measured["read"], measured["prepare"]
    assert list(paint["events_per_s"]) == list(paint["share_of_copy"]) == ["time", "blue_over_red", "loop"]
    assert all(value > 0 for part in (*paint.values(), read, folder) for value in (
        part.values() if isinstance(part, dict) else [part]))
    # A parent and its workers
    assert folder["clips"] == 5 and folder["largest_process_mib"] < folder["peak_mib"]
    assert [row["what"] for row in measured["wanted"]] == ["peak memory of all processes, MiB"]
    assert prepare.one_line(measured).startswith("painted ")
    assert {"kind", "date", "device", "what", "config", "seconds", "provenance"} <= set(measured)


def test_the_loop_paints_the_same_picture():
    x, y, p, _ = next(prepare.synthetic_events(5000, 1, seed=0))
    assert np.array_equal(prepare.plain_loop(x, y, p),
                          render_events(x, y, p, (prepare.HEIGHT, prepare.WIDTH)))


def test_synthetic_events_come_in_parts_and_read_back(tmp_path, monkeypatch):
    columns_at_once = next(prepare.synthetic_events(5000, 2, seed=0))
    monkeypatch.setattr(prepare, "PART_EVENTS", 1300)
    parts = [*prepare.synthetic_events(5000, 2, seed=0)]
    assert len(parts) == 4 and np.array_equal(np.concatenate([part[3] for part in parts]), columns_at_once[3])
    prepare.write_events(tmp_path / "events.h5", iter(parts), t_offset=7_000_000_000, chunk=512)
    with dsec.EventFile(tmp_path / "events.h5") as events:
        columns = [np.concatenate(column) for column in zip(*events.slices(0, events.count))]
        assert events.place_of(7_000_000_000 + 1_000_000) == 2500
    for k in range(3):
        assert np.array_equal(columns[k], np.concatenate([part[k] for part in parts]))


@pytest.mark.parametrize(("flags", "words"), [
    (["--events", "10"], "--events must be 1000 or more, got 10"),
    (["--seconds", "0"], "--seconds must be 1"),
    (["--seed", "-1"], "--seed must be 0 or more"),
    (["--workers", "0"], "--workers must be 1 or more")])
def test_a_mistake_is_one_line(flags, words, tmp_path):
    command = [sys.executable, ROOT / "benchmark.py", "prepare", "--output", tmp_path / "out.json"]
    done = subprocess.run([*command, *flags], text=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and not done.stderr and len(done.stdout.splitlines()) == 1
    assert words in done.stdout


def test_a_recording_that_would_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "time_painting", lambda events, seed: {})
    with pytest.raises(UserError, match="set TMPDIR to a folder with more room"):
        prepare.measure(Config(events=10**13))
