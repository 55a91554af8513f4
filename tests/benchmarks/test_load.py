"""The benchmark of very many pairs: its rows are those of extraction, every part is measured,
figures are as said.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchmark
from base import ROOT, UserError
from benchmarks import load
from benchmarks.load import Config
from pairs.formats import load_pairs
from pairs.rows import JsonRows
from tests.test_extract_tokens_train import ROW_KEYS

SIZES = (120, 480)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("load")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr(load.tempfile, "tempdir", None)  # what TMPDIR said before is remembered
        benchmark.measure("load", Config(pairs=[*SIZES], tokens=8, output=folder / "out.json"))
    assert os.listdir(folder) == ["out.json"]                              # the pair files are gone
    return json.loads((folder / "out.json").read_text())


def test_rows_are_those_of_extraction_and_all_of_them_can_be_used(tmp_path):
    written = load.write(tmp_path / "pairs.json", 1000, 12, seed=1)
    rows = JsonRows(tmp_path / "pairs.json")
    assert all(set(row) == ROW_KEYS for row in rows) and rows.beside["vocab_size"] == 32_064
    pairs = load_pairs([tmp_path / "pairs.json"])
    assert len(pairs) == 1000 and not pairs.files[0]["dropped"] and written["file_mib"] > 0
    assert set(pairs.lengths("target")) == {12} and len(set(pairs.lengths("draft"))) > 3
    assert pairs.clip[:101] == [*range(100), 0] and len(set(pairs.sequence)) == 10
    assert list(load.rows(5, 12, seed=1)) == list(load.rows(1000, 12, seed=1))[:5] != list(
        load.rows(5, 12, seed=2))


def test_every_part_of_every_size_is_measured(measured):
    assert list(measured["sizes"]) == [str(count) for count in SIZES]
    for count in SIZES:
        size = measured["sizes"][str(count)]
        for name, parts in {"write": ["write"], "ours": ["load", "split", "epoch", "evaluate"],
                            "plain": ["load"]}.items():
            assert list(size[name]["seconds"]) == list(size[name]["peak_mib"]) == parts
            assert all(value >= 0 for value in size[name]["seconds"].values())
        peaks = list(size["ours"]["peak_mib"].values())
        assert peaks == sorted(peaks)                        # each is that of all parts up to there
        assert 8 * 4 * count < size["ours"]["token_mib"] * 2**20 <= 2 * 8 * 4 * count
        assert 0 < size["ours"]["share_of_read"] < 1 and size["ours"]["peak_over_tokens"] >= 0
    assert all(value > 0 for value in measured["limits"].values()) and len(measured["wanted"]) == 4
    assert {"load", "split", "epoch", "evaluate", "write", "time",
            "memory"} == set(measured["exponents"])
    assert {"kind", "date", "device", "what", "config", "seconds", "provenance"} <= set(measured)


def test_the_table_can_be_shown_without_a_plain_way_and_with_one_size(measured, capsys):
    size = {**measured["sizes"]["480"], "plain": None}
    results = {**measured, "sizes": {"480": size}, "exponents": {}}
    load.show(results)
    assert "json.load: left out" in capsys.readouterr().out
    assert load.one_line(results).startswith("480 pairs: loaded in")


def test_a_plain_way_that_would_not_fit_is_left_out(tmp_path, monkeypatch):
    started = []

    def run(command: list, **_) -> None:
        started.append(command[3])
        Path(command[4]).write_text("x" * 100)
        (tmp_path / "result.json").write_text(
            json.dumps({
                "seconds": {"load": 1.0}, "peak_mib": {"load": 1.0}, "token_mib": 1.0,
                "read_s": 0.1, "json_s": 0.5
            }))

    monkeypatch.setattr(load.subprocess, "run", run)
    monkeypatch.setattr(load, "available_bytes", lambda: 100 * load.PLAIN_BYTES - 1)
    assert load.one_size(5, 50, 42, tmp_path)["plain"] is None and started == ["write", "ours"]
    monkeypatch.setattr(load, "available_bytes", lambda: 100 * load.PLAIN_BYTES)
    assert load.one_size(5, 50, 42, tmp_path)["plain"]["peak_over_tokens"] == 1.0


def test_growth_is_told_by_its_exponent():
    assert load.exponent(3.0, 300.0, 100) == pytest.approx(1)
    assert load.exponent(1.0, 10_000.0, 100) == pytest.approx(2)
    assert load.exponent(0.0, 1.0, 100) is None                     # so little that it was not seen


@pytest.mark.parametrize(("flags", "words"), [
    (["--pairs", "100", "1"], "--pairs must be 2 or more, got 1"),
    (["--tokens", "0"], "--tokens must be 1 or more"),
    (["--seed", "-1"], "--seed must be 0 or more"), (["--pairs", "10000000000"], "set TMPDIR to a folder")])
def test_a_mistake_is_one_line(flags, words, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmark.py", "load", "--output", tmp_path / "out.json", *flags],
        text=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and not done.stderr and len(done.stdout.splitlines()) == 1
    assert words in done.stdout


def test_a_configuration_is_checked_when_it_is_made():
    with pytest.raises(UserError, match="--pairs"):
        Config(pairs=[0])
