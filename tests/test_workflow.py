"""The whole workflow script, on the shortened demo that conftest.py ran."""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, names_of, run_workflow, wait_until_gone
from tests.recordings import write_sequence
from tests.stubbed import SCRIPT, STEPS, Stubbed

FILES = {"best_model.pt", "memory.npz", "results.json", "RESULTS.md", "training_curves.png",
         "loss_curve.png", "accuracy_curve.png", "drafters_by_position.png", "tau_over_gamma.png",
         "REPORT.html"}
DECODE_FILES = {"decode.json", "memory.npz", "thumbnails.json", "REPORT.html", "DECODE.md",
                "accepted_lengths.png", "stage_times.png",
                "drafter_speed_up.png"}
SMALL_TRAINING = "--embed_dim 32 --num_layers 1 --num_heads 2 --num_epochs 2 --no-refit --no-online"
LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] ")


@pytest.fixture(params=["1s", "500ms", "1s_draft", "500ms_draft"])
def task(request, demo):
    folder, = demo.tasks.glob(f"{request.param}_2*")
    return folder


def test_every_task_has_its_files_and_no_others(task):
    decodings = [path for path in task.iterdir() if re.fullmatch(r"decode_\d{8}_\d{6}", path.name)]
    assert set(names_of(task)) - {path.name for path in decodings} == FILES
    assert len(decodings) == (0 if "draft" in task.name else 1)
    for folder in decodings:
        assert set(names_of(folder)) == DECODE_FILES
        assert set(json.loads((folder / "decode.json").read_text())["totals"]["verdicts"]) == {"exact"}
    assert re.fullmatch(r"(1s|500ms)(_draft)?_\d{8}_\d{6}", task.name)
    assert json.loads((task / "results.json").read_text())["metrics"]["test"]["pairs"] > 0


def test_the_pictures_are_pictures(task):
    for path in task.rglob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGBA"))
        assert min(pixels.shape[:2]) >= 500 and len(np.unique(pixels.view(np.uint32))) > 20


def test_the_token_files_have_the_names_of_the_original(demo):
    assert {path.name for path in demo.tokens.glob("*.json")} == {
        "train_tokens_full.json", "test_tokens_1s.json", "train_tokens_500ms.json", "test_tokens_500ms.json"}


def test_the_log_is_whole_lines_and_ends_with_the_summary(demo):
    phases = [demo.log.index(text) for text in ("PHASE 1 | the 1s", "PHASE 2 | the 500ms", "SUMMARY")]
    assert phases == sorted(phases)
    assert "\r" not in demo.log and "Traceback" not in demo.log
    before = demo.log[:phases[2]]
    assert all(LINE.match(line) for line in before.splitlines()), before
    summary = demo.log[phases[2]:]
    files = (demo.tasks / "SUMMARY.md").read_text().replace("\\", "")
    for path in demo.tasks.glob("*_*"):
        assert path.name in summary and path.name in files
        assert f"{path.name}/RESULTS.md" in files and f"{path.name}/accuracy_curve.png" in files
    decoded = re.findall(r"/decode_\d+_\d+ +\| hybrid +\| 3 +\| 3 / 0 / 0 ", summary)
    assert len(decoded) == 2
    page = demo.tasks / "REPORT.html"
    assert f"RESULT | open {page} in a browser" in summary.splitlines()[-1] and page.stat().st_size > 10_000


def test_a_second_start_skips_everything_and_shows_the_same_summary(demo):
    assert demo.again.count("| skipped, ") == 11
    assert "| start |" not in demo.again
    strip = LINE.sub
    assert strip("", demo.again.split("SUMMARY")[1]) == strip("", demo.log.split("SUMMARY")[1])


def test_settings_and_arguments_are_checked_at_once(tmp_path):
    here = Path.cwd()
    for arguments, settings, message in (
            (("--what",), {}, "unknown argument --what"), ((), {}, "EVENTGPT is not set"),
            ((), {"EVENTGPT": "x", "TEST_1S": "nowhere.json"}, f"TEST_1S={here}/nowhere.json: no such file"),
            ((), {"EVENTGPT": "x", "DSEC_ROOT": "nowhere"}, f"DSEC_ROOT={here}/nowhere: no such folder"),
            ((), {"EVENTGPT": "x", "LOCK_WAIT_S": "soon"}, "LOCK_WAIT_S=soon: wanted whole seconds"),
            ((), {"EVENTGPT": "nowhere"}, f"EVENTGPT={here}/nowhere: no such folder")):
        done = run_workflow(tmp_path, *arguments, **settings)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "tokens").exists()


def test_a_failing_step_ends_the_workflow(tmp_path):
    done = run_workflow(tmp_path, EVENTGPT=str(ROOT / "demo" / "models" / "eventgpt"))
    assert done.returncode == 2
    assert "ERROR | no such data set folder" in done.stdout
    assert done.stdout.count("ERROR |") == 1 and not done.stderr
    assert "] extract train 1s ended with status 2" in done.stdout


def test_a_missing_package_is_one_clear_line(tmp_path):
    empty = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    python = str(empty / "bin" / "python")
    done = run_workflow(tmp_path, "--demo", VIRTUAL_ENV=str(empty), PYTHON=python)
    assert done.returncode == 2
    line, = done.stdout.splitlines()
    assert "ERROR | not installed: torch, transformers" in line and "pip install -r" in line


def test_a_kill_stops_the_step_and_the_same_command_goes_on(demo, tmp_path):
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHON": sys.executable,
                   "DATA_ROOT": str(demo.data), "TOKENS_DIR": str(tmp_path / "tokens"),
                   "TASK_DIR": str(tmp_path / "task"),
                   "EXTRACT_FLAGS": "--batch_size 1 --max_new_tokens 80"}
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(["bash", SCRIPT, "--demo"], env=environment, stdout=out,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   start_new_session=True)
    journal = tmp_path / "tokens" / ".train_tokens_full.json.journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):                     # the whole group is gone: no orphan
        os.killpg(process.pid, signal.SIGKILL)
    kept = journal.read_bytes().count(b"\n")
    assert kept > 5 and "] RESUME | cd " in log.read_text().splitlines()[-1]


def test_missing_data_sets_are_made_from_raw_recordings_and_others_are_left_alone(tmp_path):
    for split, sequence in (("train", "thun_00_a"), ("test", "thun_01_a")):
        write_sequence(tmp_path / "dsec", sequence, split, frames=23)
    settings = {"EVENTGPT": str(ROOT / "demo" / "models" / "eventgpt"),
                "DSEC_ROOT": str(tmp_path / "dsec"),
                "PREPARE_FLAGS": "--allow_missing --video_size 64x48 --canvas 64x48",
                "EXTRACT_FLAGS": "--no-such-flag"}
    folders = [tmp_path / "data" / name for name in (
        "my_egpt_dsec_train/my_egpt_dsec_train_1s", "my_egpt_dsec_test/my_egpt_dsec_seq_1s")]
    first, second = (run_workflow(tmp_path, **settings) for _ in range(2))
    for folder, split in zip(folders, ("train", "test")):
        assert len(json.loads((folder / "EventGPT_Instruction_Subset.json").read_text())) == 1
        assert f"prepare {split} 1s | done in " in first.stdout
        assert f"prepare {split} 1s | skipped, " in second.stdout
    for done in (first, second):
        assert done.returncode == 2 and "] extract train 1s ended with status 2" in done.stdout
    # An older set, not ours
    for name in ("EventGPT_Instruction_Subset.json", "prepare_dsec.json"):
        (folders[1] / name).unlink()
    third = run_workflow(tmp_path, **settings)
    assert "prepare test" not in third.stdout and "extract train 1s | start" in third.stdout
    without = run_workflow(tmp_path, **{**settings, "DSEC_ROOT": ""})
    assert "prepare" not in without.stdout


def test_a_kill_stops_preparing_too(tmp_path):
    write_sequence(tmp_path / "dsec", "thun_00_a", "train", frames=90)
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHON": sys.executable,
                   "EVENTGPT": str(ROOT / "demo" / "models" / "eventgpt"),
                   "DSEC_ROOT": str(tmp_path / "dsec"), "DATA_ROOT": str(tmp_path / "data_root"),
                   "TOKENS_DIR": str(tmp_path / "tokens"), "TASK_DIR": str(tmp_path / "task"),
                   "PREPARE_FLAGS": "--sequences thun_00_a --stride 20 --video_size 64x48"}
    process = subprocess.Popen(["bash", SCRIPT], env=environment, text=True, stdout=subprocess.PIPE,
                               stdin=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data_root").rglob("0*.mp4")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 143 and "] RESUME | cd " in process.stdout.read()
    wait_until_gone(process.pid)
    assert not list((tmp_path / "data_root").rglob(".*.tmp.*"))
    assert list((tmp_path / "data_root").rglob("0*.mp4"))


# ------------------------------------- killed, doubled, hung up; with programs that take a moment
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_killed_in_each_phase_it_goes_on_and_leaves_no_orphan(tmp_path, number):
    if number == signal.SIGKILL and not shutil.which("setpriv"):
        pytest.skip("without setpriv (util-linux) a step outlives a script that gets kill -9")
    stubbed = Stubbed(tmp_path)
    for phase in range(STEPS):         # the stopped step is done again, then the next one is stopped
        begun = len(stubbed.lines("begin"))
        process = stubbed.start()
        stubbed.wait_until_begun(begun + 1 + (phase > 0), process)
        process.send_signal(number)
        assert process.wait(60) == (-number if number == signal.SIGKILL else 143)
        wait_until_gone(process.pid)
    assert stubbed.start().wait(60) == 0, stubbed.log.read_text()
    results = stubbed.lines("end")
    assert len(results) == len(set(results)) == STEPS and len(stubbed.lines("stopped")) == STEPS
    chosen = (tmp_path / "task" / ".workflow").read_text().splitlines()
    assert len(chosen) == len({line.split("=")[0] for line in chosen}) == 6


def test_each_step_is_told_its_place_among_all_and_what_the_others_weigh(tmp_path):
    stubbed = Stubbed(tmp_path)
    assert stubbed.start(DEMO_FLAGS="").wait(60) == 0
    rows = [list(map(int, line.split())) for line in (tmp_path / "steps").read_text().splitlines()]
    assert [row[:2] for row in rows] == [[number, STEPS] for number in range(1, STEPS + 1)]
    weights = [row[4] for row in rows]
    for number, (_, _, _, ran, weight, later) in enumerate(rows):
        assert (ran, later) == (sum(weights[:number]), sum(weights[number + 1:])) and weight > 0


def test_two_workflows_in_one_folder_do_not_trample_each_other(tmp_path):
    stubbed = Stubbed(tmp_path)
    first = stubbed.start()
    stubbed.wait_until_begun(2, first)
    second = stubbed.start(LOCK_WAIT_S="0")                      # does not wait; names the holder
    assert second.wait(60) == 2 and first.poll() is None
    words = (
        rf"ERROR \| another workflow is at work in .*/task \(process {first.pid} on .* since 20\d\d-.*: "
        "wait for it")
    assert re.search(words, stubbed.log.read_text())
    third = stubbed.start(LOCK_WAIT_S="60")                      # waits, and finds everything done
    assert [first.wait(60), third.wait(60)] == [0, 0]
    results = stubbed.lines("begin")
    assert len(results) == len(set(results)) == STEPS
    assert stubbed.log.read_text().count("| skipped, ") == STEPS


def test_a_task_folder_that_was_moved_goes_on_where_it_is(tmp_path):
    stubbed = Stubbed(tmp_path)
    assert stubbed.start().wait(60) == 0
    (tmp_path / "task").rename(tmp_path / "moved")
    assert stubbed.start(TASK_DIR=str(tmp_path / "moved")).wait(60) == 0
    assert len(stubbed.lines("begin")) == STEPS and not (tmp_path / "task").exists()


def test_paths_are_meant_from_where_the_workflow_was_called(tmp_path):
    stubbed, before = Stubbed(tmp_path), set(ROOT.iterdir())
    settings = stubbed.environment(DATA_ROOT="data", TOKENS_DIR="my tokens", TASK_DIR="task")
    done = subprocess.run(["bash", SCRIPT, "--demo"], env=settings, cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "my tokens").iterdir())) == 4 and set(ROOT.iterdir()) == before


def run_on_own_data(stubbed: Stubbed, *arguments: str, **settings: str) -> list[str]:
    """Run the script on two folders of clips, from their folder; the lines that it logged."""
    for name in ("train clips", "test"):
        (stubbed.folder / name).mkdir(exist_ok=True)
    own = {"TRAIN_DATA": "train clips", "TEST_DATA": "test", "EVENTGPT": "none", **settings}
    done = subprocess.run(["bash", SCRIPT, *arguments], env=stubbed.environment(**own),
                          cwd=stubbed.folder, capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).splitlines()


def test_two_folders_of_videos_are_a_workflow_without_draft_model_or_drafts(tmp_path):
    stubbed = Stubbed(tmp_path)
    log = run_on_own_data(stubbed, SEQUENCE_PATTERN=r"^(.* \w)_\d+$")
    assert [Path(path).name for path in stubbed.lines("end")] == [
        "train_tokens_own.json", "test_tokens_own.json", "RESULTS.md", "DECODE.md"], log
    words = [line.split("\x1f") for line in (tmp_path / "words").read_text().splitlines()]
    for line, data in zip([words[0], words[1], words[3]], ["train clips", "test", "test"]):
        given = dict(zip(line[1::2], line[2::2]))
        assert given["--dataset_dir"] == str(tmp_path / data) and given["--draft_model"] == "none"
        assert given["--sequence_pattern"] == r"^(.* \w)_\d+$"
    assert "--conditioning" not in words[2]
    assert sum("skipped" in line for line in run_on_own_data(stubbed)) == 4


def test_own_data_with_a_draft_model_also_trains_in_draft_conditioning(tmp_path):
    stubbed = Stubbed(tmp_path)
    (tmp_path / "eventgpt").mkdir()
    run_on_own_data(stubbed, "--until", "train", EVENTGPT="eventgpt")
    assert [re.sub(r"_\d+_\d+$", "", Path(path).parent.name) for path in stubbed.lines("end")] == [
        "tokens", "tokens", "own_draft", "own"]


@pytest.mark.parametrize(("settings", "processes"), [
    ({"CUDA_VISIBLE_DEVICES": "0,GPU-b, 5"}, 3), ({"CUDA_VISIBLE_DEVICES": ""}, 1),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "EXTRACT_FLAGS": "--device cuda:1"}, 1),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "NUM_PROCESSES": "4"}, 4)])
def test_each_visible_gpu_has_a_process_that_extracts(tmp_path, settings, processes):
    run_on_own_data(Stubbed(tmp_path), **settings)
    lines = [line.split("\x1f") for line in (tmp_path / "words").read_text().splitlines()]
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    extractions = [line[len(launcher) * (processes > 1):] for line in lines[:2]]
    assert all(line[0] == "extract_tokens_train.py" for line in extractions)
    assert all(line[:5] == launcher for line in lines[:2]) == (processes > 1)
    assert [line[0] for line in lines[2:]] == ["train_and_evaluate.py", "speculative_decode.py"]


@pytest.mark.parametrize(("settings", "reason"), [
    ({"NUM_PROCESSES": "0"}, "wanted 1 or more"),
    ({"TEST_DATA": ""}, "wanted two folders of clips"), ({"TEST_DATA": "nowhere"}, "wanted two folders"),
    ({"DSEC_ROOT": "test"}, "leave out DSEC_ROOT"), ({"EVENTGPT": "nowhere"}, "no such folder")])
def test_own_data_that_can_not_be_run_is_one_line(tmp_path, settings, reason):
    line, = run_on_own_data(Stubbed(tmp_path), **settings)
    assert "ERROR | " in line and reason in line


@pytest.mark.parametrize("out", ["/dev/full", "&-"])
def test_a_log_that_cannot_be_written_ends_no_workflow(tmp_path, out):
    stubbed = Stubbed(tmp_path)
    command = f"bash {ROOT / 'run_full_workflow.sh'} --demo >{out} 2>{out}"
    subprocess.run(["bash", "-c", command], env=stubbed.environment(), check=True, timeout=60)
    assert len(stubbed.lines("end")) == STEPS


@pytest.mark.parametrize("options", ["ro", "size=4k"])
def test_a_task_folder_that_cannot_be_written_is_one_clear_error(tmp_path, disk, options):
    place, stubbed = disk("size=4k"), Stubbed(tmp_path)
    if options == "ro":
        disk("ro")
    else:
        (place / "full").write_bytes(bytes(4096))
    assert stubbed.start(TASK_DIR=str(place)).wait(60) == 2
    line = stubbed.log.read_text()
    assert line.count("\n") == 1
    assert f"ERROR | can't write to {place}/.workflow.lock: make room" in line


@pytest.mark.parametrize("nohup", ["nohup", ""])
def test_the_end_of_the_terminal_is_survived_under_nohup_and_stops_it_otherwise(tmp_path, nohup):
    stubbed, (ours, theirs) = Stubbed(tmp_path), pty.openpty()
    command = f"{nohup} bash {SCRIPT} --demo >> {stubbed.log} 2>&1 & sleep 600"
    shell = subprocess.Popen(["setsid", "--ctty", "bash", "-c", command], env=stubbed.environment(),
                             stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    stubbed.wait_until_begun(2, shell)
    os.close(ours)                             # the window is closed: every process in it gets HUP
    assert shell.wait(60) != 0
    wait_until_gone(shell.pid)
    assert len(stubbed.lines("end")) == (STEPS if nohup else 1)
    assert stubbed.log.read_text().count("RESUME | cd ") == (not nohup)


@pytest.mark.faults
def test_the_real_workflow_killed_in_each_phase_goes_on(tmp_path, figures):
    settings = {"DEMO_FLAGS": "--train_clips 24 --test_clips 20",
                "EXTRACT_FLAGS": "--max_new_tokens 24", "TRAIN_FLAGS": SMALL_TRAINING,
                "DECODE_FLAGS": "--max_samples 3 --max_new_tokens 24 --num_workers 1",
                "VIRTUAL_ENV": sys.prefix, "PYTHON": sys.executable}
    stubbed, moments = Stubbed(tmp_path), random.Random(0)
    numbers, killed = [signal.SIGTERM, signal.SIGKILL], 0
    while True:
        before = stubbed.log.read_text().count("| start |") if stubbed.log.exists() else 0
        process = stubbed.start(**settings)
        deadline = time.monotonic() + 300
        steps = before + (killed > 0)
        while stubbed.log.read_text().count("| start |") <= steps and process.poll() is None:
            assert time.monotonic() < deadline, stubbed.log.read_text()
            time.sleep(0.01)
        # Somewhere in the step that has just begun
        time.sleep(moments.uniform(0, 4))
        if process.poll() is not None:
            break
        process.send_signal(numbers[killed % 2])
        process.wait(60)
        wait_until_gone(process.pid)
        killed += 1
    log = stubbed.log.read_text()
    assert process.returncode == 0 and "Traceback" not in log, log
    tasks = [path.parent for path in (tmp_path / "task").glob("*/RESULTS.md")]
    decodings = list((tmp_path / "task").glob("*/decode_*/DECODE.md"))
    figures.append(("kill of the demo workflow, TERM and KILL in turn, a step further each time",
                    killed, f"orphans 0, resumed each time: {len(tasks)} of 4 tasks, "
                    f"{len(decodings)} of 2 decodings"))
    assert (len(tasks), len(decodings)) == (4, 2) and killed >= 5


@pytest.mark.faults
def test_two_real_workflows_on_one_data_root_do_not_trample_each_other(tmp_path, demo, figures):
    """Of other tasks, but the same data and tokens: what one makes the other waits for."""
    settings = {"DEMO_FLAGS": "--train_clips 24 --test_clips 20", "VIRTUAL_ENV": sys.prefix,
                "PYTHON": sys.executable, "TRAIN_FLAGS": SMALL_TRAINING, "DECODE_FLAGS": "--max_samples 2",
                "EXTRACT_FLAGS": "--max_new_tokens 80 --batch_size 16 --num_workers 2"}
    stubbed = Stubbed(tmp_path)
    both = [stubbed.start(**settings, TASK_DIR=str(tmp_path / name)) for name in ("one", "two")]
    codes = [process.wait(600) for process in both]
    said = stubbed.log.read_text()
    assert codes == [0, 0] and "Traceback" not in said and "ERROR" not in said, said
    assert said.count("waiting for it to end") >= 2
    tokens = [json.loads((folder / "train_tokens_full.json").read_text())["results"]
              for folder in (demo.tokens, tmp_path / "tokens")]
    same = tokens[0] == tokens[1]
    figures.append(("two demo workflows at once on one data root and one folder of tokens", 2,
                    f"both ended well, tokens {'as' if same else 'NOT as'} those of one alone"))
    assert same
