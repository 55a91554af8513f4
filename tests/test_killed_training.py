"""Training that is killed, and out of room, at any moment: it goes on to the same numbers, bit for
bit.
"""

import errno
import json
import random
import time
from pathlib import Path

import pytest
import torch

import reports.task_report as report
import train_and_evaluate
from base import UserError
from drafting.checkpoints import load_adapter
from machine.running import run
from tests.conftest import Demo, names_of
from tests.warm import Warm

TIMES = {"date", "seconds", "seconds_per_answer", "seconds_per_node", "step_ms", "provenance", "task",
         "task_folder"}


def flags_of(demo: Demo, task: Path) -> list:
    """A training of both phases, refitted: as by default, but small."""
    return [
        "--train_benchmark", demo.tokens / "train_tokens_full.json", "--test_benchmark",
        demo.tokens / "test_tokens_1s.json", "--task_folder", task, "--embed_dim", 32,
        "--num_layers", 1, "--num_heads", 2, "--num_epochs", 16, "--learning_rate", 3e-3,
        "--early_stopping", 0, "--device", "cpu", "--no-online"
    ]


def start(warm: Warm, demo: Demo, task: Path, log: Path) -> int:
    """As the workflow does it: what was begun goes on."""
    flags = ["--resume", task, "--device", "cpu"] if (task / "resume.pt").exists() else flags_of(
        demo, task)
    return warm.start(flags, log, "train_and_evaluate.py")


def results_of(task: Path) -> tuple[dict, dict, list[str]]:
    """What must be the same in every run: numbers but for times, weights, and names of files."""
    def without_times(value):
        if isinstance(value, dict):
            return {key: without_times(part) for key, part in value.items() if key not in TIMES}
        return [*map(without_times, value)] if isinstance(value, list) else value

    results = json.loads((task / "results.json").read_text())
    return without_times(results), load_adapter(task / "best_model.pt").state_dict(), names_of(task)


def same(ours: tuple, theirs: tuple) -> bool:
    return ours[::2] == theirs[::2] and all(
        torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


@pytest.fixture(scope="module")
def undisturbed(demo, warm, tmp_path_factory) -> tuple[tuple, float]:
    """(what came of a run that nobody stopped, the seconds that it took)."""
    folder, begun = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    assert warm.wait(start(warm, demo, folder / "task",
                           folder / "log")) == 0, (folder / "log").read_text()
    return results_of(folder / "task"), time.monotonic() - begun


def epochs_of(task: Path) -> list[int]:
    """Those of which results.json, unfinished or not, knows."""
    if not (task / "results.json").exists():
        return []
    results = json.loads((task / "results.json").read_text())
    return [epoch["epoch"] for epoch in results["history"]]


# ------------------------------------------------------------------------------------------ kill -9
def kill_at_random(demo: Demo, warm: Warm, folder: Path, undisturbed: tuple, kills: int,
                   each: int) -> dict:
    """Trainings that are killed `each` times and then left to end, until there were so many kills:
    the losses.
    """
    wanted, seconds = undisturbed
    counts = dict.fromkeys(("kills", "lost", "twice", "unusable", "different"), 0)
    moments, number = random.Random(1), 0
    while counts["kills"] < kills:
        task, log, epochs_before, number = folder / f"task{number}", folder / "log", 0, number + 1
        for _ in range(min(each, kills - counts["kills"])):
            process = start(warm, demo, task, log)
            if not warm.killed_after(process, moments.uniform(0, seconds)):
                break
            counts["kills"] += 1
            epochs = epochs_of(task)
            counts["lost"] += max(0, epochs_before - len(epochs))
            counts["twice"] += epochs != [*range(1, len(epochs) + 1)]
            epochs_before = max(epochs_before, len(epochs))
            try:
                counts["unusable"] += bool(epochs) and not load_adapter(task / "best_model.pt")
            except UserError:
                counts["unusable"] += 1
            if (task / "RESULTS.md").exists():
                break
        if not (task / "RESULTS.md").exists() or (task / "resume.pt").exists():
            assert warm.wait(start(warm, demo, task, log)) == 0, log.read_text()
        counts["different"] += not same(results_of(task), wanted)
    assert "Traceback" not in (folder / "log").read_text()
    return counts


def test_kill_9_changes_nothing(demo, warm, undisturbed, tmp_path):
    counts = kill_at_random(demo, warm, tmp_path, undisturbed, kills=3, each=3)
    assert counts == {"kills": 3, "lost": 0, "twice": 0, "unusable": 0, "different": 0}


@pytest.mark.faults
def test_kill_9_at_fifty_random_moments_changes_nothing(demo, warm, undisturbed, tmp_path, figures):
    counts = kill_at_random(demo, warm, tmp_path, undisturbed, kills=50, each=5)
    epochs = len(undisturbed[0][0]["history"])
    figures.append(
        (f"kill -9 of a training ({epochs} epochs, then again on all pairs) at a random moment",
         counts["kills"],
         f"epochs lost {counts['lost']}, told twice {counts['twice']}, unusable checkpoints "
         f"{counts['unusable']}, numbers, weights or names of files different "
         f"{counts['different']}"))
    assert counts == {"kills": 50, "lost": 0, "twice": 0, "unusable": 0, "different": 0}


# --------------------------------------------------------------------------------------------- disk
@pytest.mark.parametrize(("kib", "there"), [
    (100, {"results.json"}), (250, {"results.json", "best_model.pt"})])
def test_with_room_a_training_goes_on_that_met_a_full_disk(demo, warm, undisturbed, disk, tmp_path,
                                                           kib, there):
    task, log = disk(f"size={kib}k") / "task", tmp_path / "log"
    assert warm.wait(start(warm, demo, task, log)) == 2
    last = log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text() and log.read_text().count("ERROR |") == 1
    assert f"{task}/" in last and "No space left on device; make room, then resume with: " in last
    assert set(names_of(task)) == there and json.loads(
        (task / "results.json").read_text())["unfinished"]
    disk("size=20m")
    assert warm.wait(start(warm, demo, task, log)) == 0
    assert same(results_of(task), undisturbed[0])


@pytest.mark.parametrize("what", ["draw_task", "write_text"])
def test_what_is_measured_is_kept_when_the_page_finds_no_room(demo, undisturbed, tmp_path,
                                                              monkeypatch, capsys, what):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def ends_with(code: int, *flags) -> None:
        monkeypatch.setattr("sys.argv", ["train_and_evaluate.py", *map(str, flags)])
        if code:
            with pytest.raises(SystemExit, match=str(code)):
                run(train_and_evaluate.main)
        else:
            train_and_evaluate.main()

    with monkeypatch.context() as patch:
        patch.setattr(report, what, full)
        ends_with(2, *flags_of(demo, tmp_path / "task"))
    assert "resume with: " in capsys.readouterr().out.splitlines()[-1]
    assert "unfinished" not in json.loads((tmp_path / "task" / "results.json").read_text())
    ends_with(0, "--resume", tmp_path / "task")
    assert "epoch" not in capsys.readouterr().out                       # nothing is trained again
    assert same(results_of(tmp_path / "task"), undisturbed[0])
