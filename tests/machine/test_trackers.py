"""A tracker gets a run's figures, costs nothing when it fails, and is missed before any work."""

import importlib
import importlib.util
import json
import math
import sys

import pytest

import train_and_evaluate
from base import UserError
from decoding.answers import figures_of
from machine.trackers import PACKAGES, PROJECT, Tracker, check_tracker, flat, tracking
from reports.decode_figures import tracked_figures
from tests.test_train_and_evaluate import run_main

# wandb and trackio are called alike
LIKE_WANDB = """
import json
FILE = {file!r}

def note(*what):
    open(FILE, "a").write(json.dumps(what) + "\\n")

class Run:
    def log(self, values, step=None):
        note("log", step, values)
    def finish(self):
        note("finish")

def init(**how):
    note("init", how)
    return Run()

class config:
    def update(values, allow_val_change):
        note("settings", values)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function that installs a package of this name -> a function that reads what it was told."""
    def install(name: str):
        file = tmp_path / "calls.jsonl"
        (tmp_path / "packages").mkdir()
        (tmp_path / "packages" / f"{name}.py").write_text(LIKE_WANDB.format(file=str(file)))
        monkeypatch.syspath_prepend(tmp_path / "packages")
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return lambda: [json.loads(line) for line in file.read_text().splitlines()]

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_tells_its_settings_then_its_figures_then_that_it_is_over(name, fake, tmp_path):
    received = fake(name)
    with tracking(name, tmp_path, "my run", {"epochs": 2, "files": ["a"], "none": None}) as tracker:
        tracker.log({"loss": 1.5, "test": {"hybrid, online": {"alpha": 0.5, "tau": None}}, "text": "x"}, 3)
        tracker.log({"loss": math.nan, "is_best": True})
    begun, settings, figures, over = received()
    assert begun[1]["project"] == PROJECT and begun[1]["name"] == "my run"
    assert settings == ["settings", {"epochs": 2, "files": "['a']"}]
    assert figures == ["log", 3, {"loss": 1.5, "test/hybrid online/alpha": 0.5}] and over == ["finish"]


def test_one_of_several_processes_waits_for_no_other(fake, tmp_path, monkeypatch):
    from accelerate import PartialState

    told = fake("wandb")
    PartialState._reset_state()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    with tracking("wandb", tmp_path, "run", {}) as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert ["log", 1, {"loss": 1.0}] in told() and PartialState().num_processes == 1


def test_training_tells_each_epoch_and_the_figures_on_test_pairs(fake, monkeypatch, tmp_path, files):
    received = fake("wandb")
    _, results = run_main(monkeypatch, tmp_path / "task", files["train"], files["test"], "--num_epochs",
                          "2", "--tracker", "wandb")
    epochs = [call[1:] for call in received() if call[0] == "log" and call[1]]
    assert [(step, row["validation_alpha"]) for step, row in epochs] == [
        (row["epoch"], row["validation_alpha"]) for row in results["history"]]
    last = received()[-2][2]
    adapter = results["metrics"]["test"]["drafters"]["adapter"]
    assert last["test/adapter/alpha"] == adapter["alpha"]
    assert last["test/adapter/tau/8"] == adapter["simulated"]["8"]["tau"]
    assert received()[-1] == ["finish"]


def test_decoding_tells_each_answer_and_the_totals_by_drafter():
    run = {"tokens": 6, "accepted": [2, 2], "draft_s": 0.1, "prefill_s": 0.2, "verify_s": 0.3}
    assert dict(flat({"answer": figures_of({"runs": {"hybrid": run}})})) == {
        "answer/hybrid/tokens": 6, "answer/hybrid/tau": 3.0, "answer/hybrid/draft_s": 0.1,
        "answer/hybrid/prefill_s": 0.2, "answer/hybrid/verify_s": 0.3}
    assert figures_of(None) == {}                        # the clip has failed
    runs = {"none": {**run, "tau": 1.0}, "hybrid": {**run, "tau": 3.0, "verify_s": 0.05}}
    totals = {"answers": 2, "runs": runs, "vision_s": 0.1, "generate": None}
    figures = dict(flat(tracked_figures({"totals": totals})))
    assert figures["answers"] == 2 and figures["tau/hybrid"] == 3.0
    assert figures["over/hybrid/plain"] == pytest.approx(0.4 / 0.15) and "over/none/plain" not in figures


def test_tensorboard_writes_into_the_task_folder(tmp_path):
    pytest.importorskip("tensorboard")
    with tracking("tensorboard", tmp_path, "run", {"epochs": 2}) as tracker:
        tracker.log({"loss": 1.5}, 1)
    assert list((tmp_path / "tensorboard" / "run").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_that_is_not_installed_is_one_line_before_any_work(name, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"--tracker {name}: the package {name} is not installed"):
        run_main(monkeypatch, tmp_path, "nowhere.json", "nowhere.json", "--tracker", name)
    assert not list(tmp_path.iterdir())
    check_tracker("none")
    with pytest.raises(UserError, match="--tracker"):
        monkeypatch.setattr(sys, "argv", ["train_and_evaluate.py", "--tracker", "paper"])
        train_and_evaluate.main()


def test_a_tracker_that_fails_costs_its_figures_and_never_the_run(fake, tmp_path, capsys):
    class Failing:
        def log(self, values, step):
            raise ConnectionError("the server\nis gone")

    tracker = Tracker("wandb", Failing())
    tracker.log({"loss": 1})
    tracker.log({"loss": 2})
    tracker.finish()
    assert capsys.readouterr().out.count("WARNING | wandb failed and gets nothing more") == 1
    fake("wandb")
    (tmp_path / "packages" / "wandb.py").write_text("def init(**how): raise ValueError('no account')")
    with pytest.raises(UserError, match=r"--tracker wandb can't begin: ValueError: no account"), tracking(
            "wandb", tmp_path, "run", {}):
        pass
