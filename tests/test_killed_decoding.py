"""Decoding that is killed, stopped and out of room at any moment: no answer lost, none twice, the
same figures.
"""

import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from drafting.memory import load_memory
from tests.conftest import Demo
from tests.warm import Warm

OFTEN_S = 0.005                # between looks at a file
PATIENCE_S = 120               # a run takes seconds: longer is a hang
CLIPS = 6
TIMES = {
    "draft_s", "opening_s", "prefill_s", "verify_s", "vision_s", "eventgpt_s", "all_s",
    "first_token_s"
}


@pytest.fixture(scope="module")
def task(demo) -> Path:
    return next(folder for folder in demo.tasks.glob("1s_2*"))


def flags_of(demo: Demo, task: Path, *more) -> list:
    return [
        "--task", task, "--dataset_dir", demo.test_1s, "--draft_model", demo.models / "eventgpt",
        "--target_model", demo.models / "video_llava", "--max_samples", CLIPS, "--max_new_tokens",
        40, "--num_workers", 1, "--device", "cpu", "--gamma", 4, "--tree", 8, "--no-plots", *more
    ]


def start(warm: Warm, flags: list, log: Path) -> int:
    return warm.start(flags, log, "speculative_decode.py")


def without_times(value):
    """The value without whatever depends on the clock."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def read(folder: Path) -> tuple:
    """What must be the same in every run of the same command."""
    results = json.loads((folder / "decode.json").read_text())
    same = {
        key: results[key]
        for key in ("answers", "failed", "totals", "target", "models", "drafter", "noise")
    }
    assert (folder / "DECODE.md").stat().st_size > 1000
    return without_times(same), load_memory(folder / "memory.npz")


def entries(journal: Path) -> list[dict]:
    """Each whole line of a journal behind the first, in order."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [json.loads(line) for line in lines[1:]]


def places(journal: Path) -> list[tuple]:
    """(kind, clip, question) of each draft and answer in the journal."""
    return [("draft" if "draft" in entry else "answer", entry["key"], entry["question_idx"])
            for entry in entries(journal) if "key" in entry]


def wait_for(journal: Path, number: int) -> None:
    """Until the journal has so many drafts and answers."""
    deadline = time.monotonic() + PATIENCE_S
    while len(places(journal)) < number:
        assert time.monotonic() < deadline, f"{len(places(journal))} drafts and answers"
        time.sleep(OFTEN_S)


@pytest.fixture(scope="module")
def undisturbed(demo, task, warm, tmp_path_factory) -> tuple[tuple, float]:
    """(what a run leaves that nobody stopped, the seconds that it took)."""
    folder, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    flags = flags_of(demo, task, "--compare", "--output_folder", folder / "out")
    assert warm.wait(start(warm, flags, folder / "log")) == 0, (folder / "log").read_text()
    seconds = time.monotonic() - began
    results = json.loads((folder / "out" / "decode.json").read_text())
    assert results["interrupted"] is False and [row["answers"] for row in results["starts"]] == [0]
    assert results["totals"]["verdicts"] == {"exact": CLIPS * 7} and results["format"] == 2
    return read(folder / "out"), seconds


# ------------------------------------------------------------------------------------------ kill -9
def kill_at_random(demo: Demo, task: Path, warm: Warm, folder: Path, undisturbed: tuple,
                   kills: int) -> dict:
    """Decodings that are killed up to 5 times and then left to end, until there were so many kills:
    the losses.
    """
    wanted, seconds = undisturbed
    moments, number = random.Random(0), 0
    counts = dict.fromkeys(("kills", "lost", "twice", "different", "halves"), 0)
    while counts["kills"] < kills:
        output, number = folder / f"out{number}", number + 1
        flags = flags_of(demo, task, "--compare", "--output_folder", output)
        before: list[tuple] = []
        for _ in range(min(5, kills - counts["kills"])):
            process = start(warm, flags, folder / "log")
            if not warm.killed_after(process, moments.uniform(0, seconds)):
                break
            counts["kills"] += 1
            now = places(output / ".journal.jsonl")
            if not now and (output / "DECODE.md").exists():
                # killed behind the end of its journal
                counts["halves"] += read(output) != wanted
                break
            counts["lost"] += len(set(before) - set(now))
            counts["twice"] += len(now) - len(set(now))
            before = now
        if not (output / "DECODE.md").exists() or (output / ".journal.jsonl").exists():
            assert warm.wait(start(warm, flags, folder / "log")) == 0, (folder / "log").read_text()
        counts["different"] += read(output) != wanted
        assert {path.name for path in output.iterdir()
                } == {".lock", "DECODE.md", "REPORT.html", "decode.json", "memory.npz"}
    return counts


def test_kill_9_loses_nothing(demo, task, warm, undisturbed, tmp_path):
    counts = kill_at_random(demo, task, warm, tmp_path, undisturbed, kills=4)
    assert counts == {"kills": 4, "lost": 0, "twice": 0, "different": 0, "halves": 0}


@pytest.mark.faults
def test_kill_9_at_fifty_random_moments_loses_nothing(demo, task, warm, undisturbed, tmp_path,
                                                      figures):
    counts = kill_at_random(demo, task, warm, tmp_path, undisturbed, kills=50)
    figures.append(
        (f"kill -9 of a decoding ({CLIPS} clips, all drafters) at a random moment", counts["kills"],
         f"answers lost {counts['lost']}, answers twice {counts['twice']}, half outputs "
         f"{counts['halves']}, final figures different {counts['different']}"))
    assert counts == {"kills": 50, "lost": 0, "twice": 0, "different": 0, "halves": 0}


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize(("number", "code", "after"), [
    (signal.SIGTERM, 143, 3), (signal.SIGTERM, 143, CLIPS + 2), (signal.SIGINT, 130, CLIPS + 1)])
def test_a_stopped_run_says_the_command_that_goes_on(demo, task, warm, undisturbed, tmp_path,
                                                     number, code, after):
    output, log = tmp_path / "out", tmp_path / "log"
    flags = flags_of(demo, task, "--compare", "--output_folder", output)
    process = start(warm, [*flags, "--restart"], log)
    wait_for(output / ".journal.jsonl", after)
    os.kill(process, number)
    assert warm.wait(process) == code
    left = places(output / ".journal.jsonl")
    last = log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text() and " RESUME | " in last
    command = shlex.split(last.split(" RESUME | ")[1])
    # no --restart
    assert command == [sys.executable, "speculative_decode.py", *map(str, flags)]
    assert warm.wait(start(warm, command[2:], log)) == 0
    drafts = sum(place[0] == "draft" for place in left)
    assert f"going on: {drafts} drafts and {len(left) - drafts} answers are there already" in log.read_text(
    )
    assert len(left) >= after and read(output) == undisturbed[0]
    results = json.loads((output / "decode.json").read_text())
    assert results["interrupted"] is True
    assert [row["answers"] for row in results["starts"]] == [0, len(left) - drafts]
    assert sorted(path.name for path in output.iterdir()) == [
        ".lock", "DECODE.md", "REPORT.html", "decode.json", "memory.npz"
    ]


def test_without_an_output_folder_the_same_command_finds_its_journal_in_the_task_folder(
        demo, task, warm, undisturbed, tmp_path):
    own, log = tmp_path / "task", tmp_path / "log"
    shutil.copytree(task, own, ignore=shutil.ignore_patterns("decode_*"))
    before = {path.name for path in own.iterdir()}
    process = start(warm, flags_of(demo, own, "--compare"), log)
    while not (folders := list(own.glob(".decode_*"))):
        time.sleep(OFTEN_S)
    wait_for(folders[0] / "journal.jsonl", CLIPS + 2)
    second = start(warm, flags_of(demo, own, "--compare"), tmp_path / "second")
    assert warm.wait(second) == 2
    assert f"is being written by process {process} on " in (tmp_path / "second").read_text()
    os.kill(process, signal.SIGTERM)
    assert warm.wait(process) == 143
    # another decoding has another journal
    other = start(warm, flags_of(demo, own, "--drafter", "memory"), log)
    assert warm.wait(other) == 0 and len(list(own.glob("decode_2*"))) == 1 and len(
        list(own.glob(".decode_*"))) == 1
    assert warm.wait(start(warm, flags_of(demo, own, "--compare"), log)) == 0
    made = sorted(own.glob("decode_2*"))
    assert len(made) == 2 and not list(own.glob(".decode_*"))
    assert {path.name for path in own.iterdir()} == before | {folder.name for folder in made}
    assert read(made[1])[0]["answers"] == undisturbed[0][0]["answers"]


def test_a_journal_of_other_settings_or_clips_is_refused_and_stays(demo, task, warm, tmp_path):
    output, log, data = tmp_path / "out", tmp_path / "log", tmp_path / "data"
    shutil.copytree(demo.test_1s, data)
    flags = flags_of(demo, task, "--compare", "--output_folder", output, "--dataset_dir", data)
    process = start(warm, flags, log)
    wait_for(output / ".journal.jsonl", CLIPS + 2)
    os.kill(process, signal.SIGTERM)
    assert warm.wait(process) == 143
    journal = (output / ".journal.jsonl").read_bytes()
    assert warm.wait(start(warm, [*flags, "--max_new_tokens", 30], log)) == 2
    assert "is the journal of another decoding (max_new_tokens: 40 there, 30 now)" in log.read_text(
    )
    answered = [key for kind, key, _ in places(output / ".journal.jsonl") if kind == "answer"]
    for video in data.glob("mp4/**/*.mp4"):
        if f"{video.parent.name}/{int(video.stem)}" in answered:
            video.write_bytes(video.read_bytes() + b"\0")
    assert warm.wait(start(warm, flags, log)) == 2
    assert f"the files of {len(answered)} clips have changed, the first: {answered[0]}" in log.read_text(
    )
    assert (output / ".journal.jsonl").read_bytes() == journal
    assert warm.wait(start(warm, [*flags, "--restart"], log)) == 0


# --------------------------------------------------------------------------------------------- disk
@pytest.mark.parametrize("kib", [6, 40])
def test_with_room_the_command_goes_on_that_met_a_full_disk(demo, task, warm, undisturbed, disk,
                                                            tmp_path, kib):
    place, log = disk(f"size={kib}k"), tmp_path / "log"
    flags = flags_of(demo, task, "--compare", "--output_folder", place / "out")
    assert warm.wait(start(warm, flags, log)) == 2
    text, left = log.read_text(), places(place / "out" / ".journal.jsonl")
    assert "Traceback" not in text and text.count("ERROR |") == 1
    command = shlex.join(["speculative_decode.py", *map(str, flags)])
    advice = f"No space left on device; make room, then resume with: {sys.executable} {command}"
    assert advice in text.splitlines()[-1]
    assert (len(left) == 2 * CLIPS) == (kib == 40) and not (place / "out" / "DECODE.md").exists()
    disk("size=2m")
    assert warm.wait(start(warm, flags, log)) == 0
    assert read(place / "out") == undisturbed[0]


def test_an_exception_at_the_end_costs_no_answer(demo, task, warm, undisturbed, tmp_path):
    """decode.json can't be written: a folder stands in its place."""
    output, log = tmp_path / "out", tmp_path / "log"
    flags = flags_of(demo, task, "--compare", "--output_folder", output)
    (output / "decode.json").mkdir(parents=True)
    assert warm.wait(start(warm, flags, log)) != 0
    assert len(places(output / ".journal.jsonl")) == 2 * CLIPS
    (output / "decode.json").rmdir()
    began = time.monotonic()
    assert warm.wait(start(warm, flags, log)) == 0
    assert time.monotonic() - began < undisturbed[1] and read(output) == undisturbed[0]
    # nothing is left to be loaded for
    assert "VideoLlava" not in log.read_text().split("going on")[1]
