"""Several processes extract together: each clip once, nothing lost, the output of one process."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from pairs.journal import Journal
from pairs.journals import journals_of
from tests.conftest import Demo
from tests.launch import Launch, has_ended
from tests.warm import Warm

CLIPS = 8


def flags_of(demo: Demo, output: Path | str, *more) -> list:
    return ["--dataset_dir", demo.test_1s, "--output_file", output, "--draft_model",
            demo.models / "eventgpt", "--target_model", demo.models / "video_llava",
            "--max_new_tokens", 8, "--max_samples", CLIPS, "--device", "cpu", "--batch_size", 2,
            "--num_workers", 1, *more]


@pytest.fixture(scope="module")
def alone(demo, warm, tmp_path_factory) -> dict:
    """The output of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert warm.wait(warm.start(flags_of(demo, folder / "out.json"), folder / "log")) == 0
    return read(folder / "out.json")


def read(output: Path) -> dict:
    """What must be the same however many processes gave the answers."""
    values = json.loads(output.read_text())
    return {name: value for name, value in values.items() if name not in ("timestamp", "argv", "git_commit")}


def answers(output: Path) -> list[tuple]:
    """(model, clip, question) of each whole line of all journals."""
    lines = [line for path in journals_of(output) for line in path.read_bytes().split(b"\n")[:-1]]
    entries = [json.loads(line) for line in lines]
    return [(entry["model"], entry["key"], entry["question_idx"])
            for entry in entries if "text" in entry]


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "ERROR" in line]


# --------------------------------------------------------------------------------- one output, once
@pytest.mark.parametrize(("world", "clips"), [(2, CLIPS), (3, 1)])
def test_any_number_of_processes_writes_what_one_writes(demo, warm, alone, tmp_path, world, clips):
    """Also more processes than clips: some have no work. One line of progress speaks for all."""
    output, log = tmp_path / "out.json", tmp_path / "log"
    flags = flags_of(demo, output, "--max_samples", clips)
    assert Launch(warm, world, log).start(*flags).wait() == [0] * world, log.read_text()
    assert read(output)["results"] == alone["results"][:clips]
    assert clips < CLIPS or read(output) == alone
    text = log.read_text()
    assert text.count(f"eventgpt | {clips}/{clips} |") == text.count("RESULT") == 1, text
    assert {path.name for path in tmp_path.iterdir()} == {"log", "out.json", ".out.json.lock"}
    # The machine stopped while journals were removed: the mark says that the output is whole
    (tmp_path / ".out.json.merged.jsonl").write_text("")
    Journal.path_of(output, 2).write_text("")
    before = output.read_bytes()
    assert Launch(warm, world, log).start(*flags).wait() == [0] * world
    assert log.read_text().count("finished before") == 1 and output.read_bytes() == before
    if clips < CLIPS:
        assert Launch(warm, world, log).start(*flags, "--restart").wait() == [0] * world
        assert read(output)["results"] == alone["results"][:clips]
    assert {path.name for path in tmp_path.iterdir()} == {"log", "out.json", ".out.json.lock"}


# ----------------------------------------------------------------------------------------- kill -9
def kill_at_random(demo: Demo, warm: Warm, folder: Path, alone: dict, kills: int) -> dict:
    """Launches of two or three processes, of which one is killed; then one to three finish the work."""
    chance, found = random.Random(0), dict.fromkeys(("kills", "lost", "twice", "different"), 0)
    for number in range(kills):
        output, log = folder / f"out{number}.json", folder / "log"
        kept: set = set()
        for world in (chance.choice((2, 3)), 2):
            launch = Launch(warm, world, log).start(*flags_of(demo, output))
            moment = time.monotonic() + chance.uniform(0, 1.5)
            while time.monotonic() < moment and len(answers(output)) < CLIPS + 4:
                time.sleep(0.01)
            if not output.exists():
                launch.kill(chance.randrange(world))
                launch.wait()
                found["kills"] += 1
                now = answers(output)
                found["lost"] += len(kept - set(now)) * (not output.exists())
                found["twice"] += len(now) - len(set(now))
                kept = set(now)
            if found["kills"] >= kills:
                break
        last = Launch(warm, chance.choice((1, 2, 3)) if number else 1, log).start(*flags_of(demo, output))
        assert not any(last.wait()), log.read_text()
        found["different"] += read(output) != alone or bool(journals_of(output))
        if found["kills"] >= kills:
            break
    return found


def test_a_process_that_is_killed_loses_nothing(demo, warm, alone, tmp_path):
    found = kill_at_random(demo, warm, tmp_path, alone, kills=2)
    assert found == {"kills": 2, "lost": 0, "twice": 0, "different": 0}


@pytest.mark.faults
def test_fifty_kills_lose_nothing(demo, warm, alone, tmp_path, figures):
    found = kill_at_random(demo, warm, tmp_path, alone, kills=50)
    figures.append(("kill -9 of one of 2 or 3 processes that extract together", found["kills"],
                    f"rows lost {found['lost']}, twice {found['twice']}, output different "
                    f"{found['different']}"))
    assert found == {"kills": 50, "lost": 0, "twice": 0, "different": 0}


# -------------------------------------------------------------------- nodes with disks of their own
def test_nodes_without_a_shared_disk_merge_their_journals(demo, warm, alone, disk, tmp_path):
    """One node's disk is full at first, one node's clock is two days ahead."""
    nodes, log = [tmp_path / "node0", disk("size=4k")], tmp_path / "log"
    nodes[0].mkdir()
    flags = flags_of(demo, "out.json")
    codes = Launch(warm, 2, log).start(*flags, folders=nodes, ahead_s={1: 172_800}).wait()
    assert all(codes), codes
    assert any("rank 1 on " in line and "No space left" in line for line in errors(log)), codes
    disk("size=1m")
    codes = Launch(warm, 2, log).start(*flags, folders=nodes, ahead_s={1: 172_800}).wait()
    assert codes == [0, 0], log.read_text()
    assert "--merge" in log.read_text().splitlines()[-1] and not (nodes[0] / "out.json").exists()
    journals = [path for node in nodes for path in journals_of(node / "out.json")]
    assert len(journals) == 2
    merged, log = tmp_path / "merged.json", tmp_path / "merge.log"
    assert warm.wait(warm.start(flags_of(demo, merged, "--merge", journals[1]), log)) == 2
    assert "name the journals of all processes" in errors(log)[0]
    assert warm.wait(warm.start(flags_of(demo, merged, "--merge", *journals), log)) == 0
    assert read(merged)["results"] == alone["results"] and read(merged)["failed"] == []
    assert f"{2 * CLIPS} answers of 2 journals | 0 in two of them" in log.read_text()


# ------------------------------------------------------------------------------------------ refused
def test_a_process_with_other_flags_is_named(demo, warm, tmp_path):
    log = tmp_path / "log"
    codes = Launch(warm, 2, log).start(*flags_of(demo, tmp_path / "out.json"),
                                       of_rank={1: ["--num_frames", 4]}).wait()
    assert all(codes)
    [line] = errors(log)
    assert f"rank 1 on {os.uname().nodename} has another --num_frames than rank 0" in line
    assert "4 there, 8 here" in line


def test_a_journal_of_another_data_set_is_named(demo, warm, copy, tmp_path):
    output, log = tmp_path / "out.json", tmp_path / "log"
    process = warm.start([*flags_of(demo, output), "--dataset_dir", copy], log)
    while len(answers(output)) < 2:
        assert not has_ended(process), log.read_text()
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    warm.wait(process)
    Journal.path_of(output).rename(Journal.path_of(output, 1))
    log.unlink()
    assert warm.wait(warm.start(flags_of(demo, output), log)) == 2
    [line] = errors(log)
    assert "rank1.jsonl is the journal of an extraction with other settings (dataset_dir" in line
