"""Extraction that is killed, stopped and out of room at any moment: nothing lost, nothing twice,
the same output.
"""

import json
import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Demo
from tests.warm import Warm

OFTEN_S = 0.005                # between looks at a file
PATIENCE_S = 120               # a run takes seconds: longer is a hang


def flags_of(demo: Demo, output: Path, *more) -> list:
    return [
        "--dataset_dir", demo.test_1s, "--output_file", output, "--draft_model",
        demo.models / "eventgpt", "--target_model", demo.models / "video_llava", "--max_new_tokens",
        16, "--device", "cpu", "--batch_size", 2, "--num_workers", 2, *more
    ]


@pytest.fixture(scope="module")
def undisturbed(demo, warm, tmp_path_factory) -> tuple[dict, float]:
    """(the output of a run that nobody stopped, the seconds that it took)."""
    folder, start = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    assert warm.wait(warm.start(flags_of(demo, folder / "out.json"), folder / "log")) == 0
    return read(folder / "out.json"), time.monotonic() - start


def read(output: Path) -> dict:
    """What must be the same in every run of the same command."""
    return {
        key: value for key, value in json.loads(output.read_text()).items()
        if key not in ("timestamp", "argv")
    }


def answers(output: Path) -> list[tuple]:
    """(model, clip, question) of each whole line of the journal, in order."""
    journal = output.with_name(f".{output.name}.journal.jsonl")
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    entries = [json.loads(line) for line in lines]
    return [(entry["model"], entry["key"], entry["question_idx"]) for entry in entries if "key" in entry]


def wait_for_answers(output: Path, number: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(answers(output)) < number:
        assert time.monotonic() < deadline, f"{len(answers(output))} answers"
        time.sleep(OFTEN_S)


# ----------------------------------------------------------------------------------------- kill -9
def kill_at_random(demo: Demo, warm: Warm, folder: Path, undisturbed: tuple, kills: int,
                   each: int) -> dict:
    """Extractions that are killed `each` times and then left to end, until there were so many
    kills: the losses.
    """
    wanted, seconds = undisturbed
    moments = random.Random(0)
    counts = dict.fromkeys(("kills", "lost", "twice", "different", "halves"), 0)
    number = 0
    while counts["kills"] < kills:
        output, answers_before, number = folder / f"out{number}.json", [], number + 1
        for _ in range(min(each, kills - counts["kills"])):
            process = warm.start(flags_of(demo, output), folder / "log")
            if not warm.killed_after(process, moments.uniform(0, seconds)):
                break
            counts["kills"] += 1
            if output.exists():
                # Killed between its renaming and the end
                counts["halves"] += read(output) != wanted
                continue
            now = answers(output)
            counts["lost"] += len(set(answers_before) - set(now))
            counts["twice"] += len(now) - len(set(now))
            answers_before = now
        assert warm.wait(warm.start(flags_of(demo, output),
                                    folder / "log")) == 0, (folder / "log").read_text()
        counts["different"] += read(output) != wanted
        assert not output.with_name(f".{output.name}.journal.jsonl").exists()
    return counts


def test_kill_9_loses_nothing(demo, warm, undisturbed, tmp_path):
    counts = kill_at_random(demo, warm, tmp_path, undisturbed, kills=3, each=3)
    assert counts == {"kills": 3, "lost": 0, "twice": 0, "different": 0, "halves": 0}


@pytest.mark.faults
def test_kill_9_at_a_hundred_random_moments_loses_nothing(demo, warm, undisturbed, tmp_path, figures):
    counts = kill_at_random(demo, warm, tmp_path, undisturbed, kills=100, each=5)
    rows = len(undisturbed[0]["results"])
    figures.append(
        (f"kill -9 of an extraction ({rows} clips, two models) at a random moment", counts["kills"],
         f"rows lost {counts['lost']}, duplicate rows {counts['twice']}, half outputs "
         f"{counts['halves']}, "
         f"final JSON different {counts['different']}"))
    assert counts == {"kills": 100, "lost": 0, "twice": 0, "different": 0, "halves": 0}


# ----------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_stopped_run_says_the_command_that_goes_on(demo, warm, undisturbed, tmp_path, number, code):
    output, log = tmp_path / "out.json", tmp_path / "log"
    process = warm.start(flags_of(demo, output, "--restart"), log)
    wait_for_answers(output, 6)
    os.kill(process, number)
    assert warm.wait(process) == code
    answers_before = answers(output)
    last = log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text() and " RESUME | " in last
    command = shlex.split(last.split(" RESUME | ")[1])
    # No --restart
    assert command == [sys.executable, "extract_tokens_train.py", *map(str, flags_of(demo, output))]
    assert warm.wait(warm.start(command[2:], log)) == 0
    assert f"going on: {len(answers_before)} answers are there already" in log.read_text()
    assert len(answers_before) >= 6 and read(output) == undisturbed[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.json.lock", "log", "out.json"]


def test_the_second_writer_waits_for_the_first_and_finds_its_work_done(demo, warm, tmp_path):
    output = tmp_path / "out.json"
    first = warm.start(flags_of(demo, output), tmp_path / "first")
    wait_for_answers(output, 2)
    impatient = warm.start(flags_of(demo, output), tmp_path / "impatient")
    assert warm.wait(impatient) == 2
    assert f"is being written by process {first} on " in (tmp_path / "impatient").read_text()
    second = warm.start(flags_of(demo, output, "--wait"), tmp_path / "second")
    assert [warm.wait(first), warm.wait(second)] == [0, 0]
    text = (tmp_path / "second").read_text()
    assert f"is being written by process {first}" in text and "finished before: 20 pairs" in text


def test_an_output_without_the_end_of_its_journal_is_written_again(demo, warm, undisturbed,
                                                                   tmp_path):
    """The machine stopped after the output was renamed into place; or --restart had thrown it away
    and begun.
    """
    output = tmp_path / "out.json"
    process = warm.start(flags_of(demo, output), tmp_path / "log")
    wait_for_answers(output, 6)
    os.kill(process, signal.SIGKILL)
    warm.wait(process)
    output.write_text('{"settings": "of a run before"}')
    assert warm.wait(warm.start(flags_of(demo, output), tmp_path / "log")) == 0
    assert read(output) == undisturbed[0]


# -------------------------------------------------------------------------------------------- disk
@pytest.mark.parametrize(("kib", "when"), [(8, "the journal is written"), (20, "the output is written")])
def test_with_room_the_command_goes_on_that_met_a_full_disk(demo, warm, undisturbed, disk, tmp_path,
                                                            kib, when):
    output, log = disk(f"size={kib}k") / "out.json", tmp_path / "log"
    assert warm.wait(warm.start(flags_of(demo, output), log)) == 2
    text, answers_before = log.read_text(), answers(output)
    assert "Traceback" not in text and text.count("ERROR |") == 1
    last = text.splitlines()[-1]
    command = shlex.join(["extract_tokens_train.py", *map(str, flags_of(demo, output))])
    assert f"No space left on device; make room, then resume with: {sys.executable} {command}" in last
    assert (len(answers_before) == 40) == (when == "the output is written") and not output.exists()
    assert (".out.json.journal.jsonl" if len(answers_before) < 40 else str(output)) in last
    assert {path.name
            for path in output.parent.iterdir()} == {".out.json.lock", ".out.json.journal.jsonl"}
    disk("size=1m")
    assert warm.wait(warm.start(flags_of(demo, output), log)) == 0
    # And so it is on another file system than the data
    assert read(output) == undisturbed[0]
    assert f"going on: {len(answers_before)} answers are there already" in log.read_text()


def test_a_read_only_disk_is_one_error_before_any_work(demo, warm, disk, tmp_path):
    place = disk("size=64k")
    (place / "out.json").write_text("old")
    disk("ro")
    assert warm.wait(warm.start(flags_of(demo, place / "out.json", "--restart"), tmp_path / "log")) == 2
    text = (tmp_path / "log").read_text()
    assert "can't write to the folder" in text and "Read-only file system" in text and "Traceback" not in text
    assert (place / "out.json").read_text() == "old" and os.listdir(place) == ["out.json"]


def test_a_log_on_a_full_disk_stops_no_work(demo, warm, undisturbed, disk, tmp_path):
    place = disk("size=4k")
    (place / "log").write_text("x" * 4096)
    assert warm.wait(warm.start(flags_of(demo, tmp_path / "out.json"), place / "log")) == 0
    assert read(tmp_path / "out.json") == undisturbed[0]
