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

FILES = {"best_model.pt", "memory.npz", "results.json", "RESULTS.md", "training_curves.png", "loss_curve.png",
         "accuracy_curve.png", "drafters_by_position.png", "tau_over_gamma.png"}
DECODE_FILES = {"decode.json", "memory.npz", "DECODE.md", "accepted_lengths.png", "stage_times.png",
                "drafter_speed_up.png"}
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
    for path in demo.tasks.glob("*_*"):
        assert path.name in summary and str(path / "RESULTS.md") in summary
        assert "accuracy_curve.png" in summary
    assert len(re.findall(r"decoding: 3 answers \| 3 exact \| hybrid \| tau \d", summary)) == 2


def test_a_second_start_skips_everything_and_shows_the_same_summary(demo):
    assert demo.again.count("| skipped, ") == 11
    assert "| start |" not in demo.again
    strip = LINE.sub
    assert strip("", demo.again.split("SUMMARY")[1]) == strip("", demo.log.split("SUMMARY")[1])


def test_settings_and_arguments_are_checked_at_once(tmp_path):
    for arguments, settings, message in (
            (("--what",), {}, "unknown argument --what"), ((), {}, "EVENTGPT is not set"),
            ((), {"EVENTGPT": "x", "TEST_1S": "nowhere.json"}, f"TEST_1S={Path.cwd()}/nowhere.json: no such file"),
            ((), {"EVENTGPT": "x", "DSEC_ROOT": "nowhere"}, f"DSEC_ROOT={Path.cwd()}/nowhere: no such folder"),
            ((), {"EVENTGPT": "x", "LOCK_WAIT_S": "soon"}, "LOCK_WAIT_S=soon: wanted whole seconds"),
            ((), {"EVENTGPT": "nowhere"}, f"EVENTGPT={Path.cwd()}/nowhere: no such folder")):
        done = run_workflow(tmp_path, *arguments, **settings)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "tokens").exists()


def test_a_failing_step_ends_the_workflow(tmp_path):
    done = run_workflow(tmp_path, EVENTGPT=str(ROOT / "demo" / "models" / "eventgpt"))
    assert done.returncode == 2
    assert "ERROR | no such data set folder" in done.stdout and done.stdout.count("ERROR |") == 1 and not done.stderr
    assert "] extract train 1s ended with status 2" in done.stdout


def test_a_missing_package_is_one_clear_line(tmp_path):
    empty = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    done = run_workflow(tmp_path, "--demo", VIRTUAL_ENV=str(empty), PYTHON=str(empty / "bin" / "python"))
    assert done.returncode == 2
    line, = done.stdout.splitlines()
    assert "ERROR | not installed: torch, transformers" in line and "pip install -r" in line


def test_a_kill_stops_the_step_and_the_same_command_goes_on(demo, tmp_path):
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHON": sys.executable, "DATA_ROOT": str(demo.data),
                   "TOKENS_DIR": str(tmp_path / "tokens"), "TASK_DIR": str(tmp_path / "task"),
                   "EXTRACT_FLAGS": "--batch_size 1 --max_new_tokens 80"}
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(["bash", str(ROOT / "run_full_workflow.sh"), "--demo"], env=environment,
                                   stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
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
    settings = {"EVENTGPT": str(ROOT / "demo" / "models" / "eventgpt"), "DSEC_ROOT": str(tmp_path / "dsec"),
                "PREPARE_FLAGS": "--allow_missing --video_size 64x48 --canvas 64x48",
                "EXTRACT_FLAGS": "--no-such-flag"}
    folders = [tmp_path / "data" / name for name in (
        "my_egpt_dsec_train/my_egpt_dsec_train_1s", "my_egpt_dsec_test/my_egpt_dsec_seq_1s")]
    first, second = (run_workflow(tmp_path, **settings) for _ in range(2))
    for folder, split in zip(folders, ("train", "test")):
        assert len(json.loads((folder / "EventGPT_Instruction_Subset.json").read_text())) == 1
        assert f"prepare {split} 1s | done in " in first.stdout and f"prepare {split} 1s | skipped, " in second.stdout
    for done in (first, second):
        assert done.returncode == 2 and "] extract train 1s ended with status 2" in done.stdout
    for name in ("EventGPT_Instruction_Subset.json", "prepare_dsec.json"):     # as of an older set, not ours
        (folders[1] / name).unlink()
    third = run_workflow(tmp_path, **settings)
    assert "prepare test" not in third.stdout and "extract train 1s | start" in third.stdout
    without = run_workflow(tmp_path, **{**settings, "DSEC_ROOT": ""})
    assert "prepare" not in without.stdout


def test_a_kill_stops_preparing_too(tmp_path):
    write_sequence(tmp_path / "dsec", "thun_00_a", "train", frames=90)
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHON": sys.executable,
                   "EVENTGPT": str(ROOT / "demo" / "models" / "eventgpt"), "DSEC_ROOT": str(tmp_path / "dsec"),
                   **{name: str(tmp_path / name.lower()) for name in ("DATA_ROOT", "TOKENS_DIR", "TASK_DIR")},
                   "PREPARE_FLAGS": "--sequences thun_00_a --stride 20 --video_size 64x48"}
    process = subprocess.Popen(["bash", str(ROOT / "run_full_workflow.sh")], env=environment, text=True,
                               stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data_root").rglob("0*.mp4")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 143 and "] RESUME | cd " in process.stdout.read()
    wait_until_gone(process.pid)
    assert not list((tmp_path / "data_root").rglob(".*.tmp.*")) and list((tmp_path / "data_root").rglob("0*.mp4"))


# ------------------------------------- killed, doubled, hung up; with programs that take a moment
STUB = """#!/usr/bin/env bash
# Stands for python: every program takes a moment and then writes its result.
[[ "$1" != base.py && "$1" != -c ]] || exit 0
[[ -z "${PYTHONSAFEPATH:-}" ]] || echo "SAFE" >> "${CALLS}"
[[ "$*" == *--output* || "$*" == *--task_folder* ]] && (IFS=$'\\x1f'; echo "$*" >> "${CALLS%/*}/words")
result=''
while (( $# )); do
  case "$1" in
    --output_file) result="$2" ;; --task_folder) result="$2/RESULTS.md" ;; --output_folder) result="$2/DECODE.md" ;;
    --output_dir) mkdir -p "$2/my_egpt_dsec_test/my_egpt_dsec_seq_"{1s,500ms}
                  result="$2/my_egpt_dsec_test/my_egpt_dsec_seq_500ms/EventGPT_Instruction_Subset.json" ;;
  esac
  shift
done
[[ -n "${result}" ]] || exit 0                 # the SUMMARY
stops=0
trap '(( ++stops > ${STUBBORN:-0} )) || continue; echo "stopped ${result}" >> "${CALLS}"; exit 143' TERM
echo "begin ${result}" >> "${CALLS}"
for (( i = 0; i < ${LOOPS:-6}; i++ )); do sleep 0.02; done
mkdir -p "$(dirname "${result}")"
echo x > "${result}"
echo "end ${result}" >> "${CALLS}"
"""
STEPS = 11                     # of the demo: its data; then twice two extractions, two trainings and a decoding


class Stubbed:
    """The workflow script with programs that take a moment."""

    def __init__(self, folder: Path):
        self.folder, self.calls, self.log = folder, folder / "calls", folder / "log"
        (folder / "python").write_text(STUB)
        (folder / "python").chmod(0o755)
        self.calls.touch()

    def environment(self, **settings: str) -> dict:
        return {**os.environ, "VIRTUAL_ENV": str(self.folder), "PYTHON": str(self.folder / "python"),
                       "CALLS": str(self.calls), "DATA_ROOT": str(self.folder / "data"),
                       "TOKENS_DIR": str(self.folder / "tokens"), "TASK_DIR": str(self.folder / "task"), **settings}

    def start(self, **settings: str) -> subprocess.Popen:
        with open(self.log, "a") as out:
            return subprocess.Popen(
                ["bash", str(ROOT / "run_full_workflow.sh"), "--demo"], env=self.environment(**settings), stdout=out,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)

    def lines(self, word: str) -> list[str]:
        return [line.split(" ", 1)[1] for line in self.calls.read_text().splitlines() if line.startswith(word)]

    def wait_until_begun(self, steps: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 60
        while len(self.lines("begin")) < steps:
            assert time.monotonic() < deadline and process.poll() is None, self.log.read_text()
            time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_killed_in_each_phase_it_goes_on_and_leaves_no_orphan(tmp_path, number):
    if number == signal.SIGKILL and not shutil.which("setpriv"):
        pytest.skip("without setpriv (util-linux) a step outlives a script that gets kill -9")
    stubbed = Stubbed(tmp_path)
    for phase in range(STEPS):                 # what was stopped is done again, then the next phase is stopped
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


def test_two_workflows_in_one_folder_do_not_trample_each_other(tmp_path):
    stubbed = Stubbed(tmp_path)
    first = stubbed.start()
    stubbed.wait_until_begun(2, first)
    second = stubbed.start(LOCK_WAIT_S="0")                      # does not wait, and says who is there
    assert second.wait(60) == 2 and first.poll() is None
    words = rf"ERROR \| another workflow is at work in .*/task \(process {first.pid} on .* since 20\d\d-.*: wait for it"
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
    done = subprocess.run(["bash", str(ROOT / "run_full_workflow.sh"), "--demo"], env=settings, cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "my tokens").iterdir())) == 4 and set(ROOT.iterdir()) == before


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
    assert line.count("\n") == 1 and f"ERROR | can't write to {place}/.workflow.lock: make room" in line


@pytest.mark.parametrize("nohup", ["nohup", ""])
def test_the_end_of_the_terminal_is_survived_under_nohup_and_stops_it_otherwise(tmp_path, nohup):
    stubbed, (ours, theirs) = Stubbed(tmp_path), pty.openpty()
    command = f"{nohup} bash {ROOT / 'run_full_workflow.sh'} --demo >> {stubbed.log} 2>&1 & sleep 600"
    shell = subprocess.Popen(["setsid", "--ctty", "bash", "-c", command], env=stubbed.environment(), stdin=theirs,
                             stdout=theirs, stderr=theirs)
    os.close(theirs)
    stubbed.wait_until_begun(2, shell)
    os.close(ours)                                               # the window is closed: all in it are hung up
    assert shell.wait(60) != 0
    wait_until_gone(shell.pid)
    assert len(stubbed.lines("end")) == (STEPS if nohup else 1)
    assert stubbed.log.read_text().count("RESUME | cd ") == (not nohup)


# ------------------------------------------------------------------------------ started in odd ways
def started(stubbed: Stubbed, *command: str, cwd: Path = ROOT, **settings: str) -> subprocess.CompletedProcess:
    """A start of the stubbed workflow in a way of its own; the settings count as the user's."""
    return subprocess.run(command, env=stubbed.environment(**settings), cwd=cwd, capture_output=True, text=True,
                          timeout=120, stdin=subprocess.DEVNULL)


SCRIPT = str(ROOT / "run_full_workflow.sh")


def test_it_runs_through_a_link_and_from_a_batch_systems_copy(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "egpt").symlink_to("hop")                            # a link to a link, relative
    (tmp_path / "bin" / "hop").symlink_to(SCRIPT)
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    for number, (command, cwd, settings) in enumerate((
            ([str(tmp_path / "bin" / "egpt")], tmp_path, {}), (["bash", str(copy)], ROOT, {}),
            (["bash", str(copy)], tmp_path, {"SLURM_SUBMIT_DIR": str(ROOT)}),
            (["bash", str(copy)], tmp_path, {"SUITE": str(ROOT)}))):
        (tmp_path / str(number)).mkdir()
        stubbed = Stubbed(tmp_path / str(number))
        done = started(stubbed, *command, "--demo", cwd=cwd, **settings)
        assert done.returncode == 0, done.stderr
        assert len(stubbed.lines("end")) == STEPS
    done = started(stubbed, "bash", str(copy), "--demo", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is a copy without the suite" in done.stderr


def test_sh_runs_it_and_sourcing_it_is_one_line_that_leaves_the_shell_alive(tmp_path):
    stubbed = Stubbed(tmp_path)
    done = started(stubbed, "sh", SCRIPT, "--demo")
    assert done.returncode == 0, done.stderr
    done = started(stubbed, "bash", "-c", f"source {SCRIPT} --help; echo alive $?")
    assert done.stdout == "alive 2\n" and done.stderr == "ERROR | run this script, don't source it\n"


def test_what_is_wrong_is_said_before_anything_is_installed(tmp_path):
    """No environment is active here, and PYTHON can't even start."""
    for arguments, settings, message in (
            ([], {}, "EVENTGPT is not set"), (["--only", "2s"], {}, "unknown argument --only 2s"),
            (["--until"], {}, "unknown argument --until"),
            (["--demo"], {"TRAIN_FLAGS": "--task_name 'a b"}, "TRAIN_FLAGS has a quote that is not closed")):
        done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=60,
                              env={"PATH": os.environ["PATH"], "PYTHON": "/nowhere/python", **settings})
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert message in done.stderr and "nowhere" not in done.stderr


def test_an_environment_of_an_older_python_is_named_with_advice_that_works(tmp_path):
    old = tmp_path / "bin" / "python"
    old.parent.mkdir()
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(["bash", SCRIPT, "--demo"], capture_output=True, text=True, timeout=60,
                          env={"PATH": os.environ["PATH"], "VIRTUAL_ENV": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"Python 3.9.2 found ({old}), wanted Python 3.11 or newer: activate a newer" in done.stderr


def test_the_python_of_an_environment_is_used_even_where_path_does_not_name_it(tmp_path):
    stubbed = Stubbed(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "python").rename(tmp_path / "bin" / "python")
    environment = {key: value for key, value in stubbed.environment().items() if key != "PYTHON"}
    done = subprocess.run(["bash", SCRIPT, "--demo"], env={**environment, "PYTHONSAFEPATH": "1"},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(stubbed.lines("end")) == STEPS
    assert "SAFE" not in stubbed.calls.read_text()


def test_flags_keep_their_quotes_are_never_globbed_and_the_printed_command_can_be_pasted(tmp_path):
    stubbed = Stubbed(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "Where1").touch()
    query = "What's  on\tthe road? * $HOME"
    done = started(stubbed, SCRIPT, "--demo", "--only", "1s", "--until", "extract", cwd=tmp_path / "here",
                   EXTRACT_FLAGS=f'--query "{query}" --a Where?', DEMO_FLAGS="--b 'x y' --c Where*")
    assert done.returncode == 0, done.stderr
    words = [line.split("\x1f") for line in (tmp_path / "words").read_text().splitlines()]
    assert words[0][-4:] == ["--b", "x y", "--c", "Where*"]
    assert words[1][-4:] == words[2][-4:] == ["--query", query, "--a", "Where?"]
    printed = re.search(r"extract train 1s \| start \| (.*)", done.stdout)[1]
    pasted = subprocess.run(["bash", "-c", f"printf '%s\\x1f' {printed}"], capture_output=True, text=True).stdout
    assert pasted.rstrip("\x1f").split("\x1f")[1:] == words[1]


@pytest.mark.parametrize(("arguments", "results"), [
    (["--only", "1s"], 6), (["--only", "500ms", "--until", "train"], 5), (["--until", "extract"], 5),
    (["--until", "train"], 9)])
def test_only_and_until_leave_out_the_rest(tmp_path, arguments, results):
    stubbed = Stubbed(tmp_path)
    done = started(stubbed, SCRIPT, "--demo", *arguments)
    assert done.returncode == 0 and len(stubbed.lines("end")) == results
    if "--only" in arguments:
        other = {"1s": "500ms", "500ms": "1s"}[arguments[1]]
        assert not any(f"tokens_{other}" in line or f"/{other}" in line for line in stubbed.lines("end"))
    if arguments[-1] == "extract":
        assert done.stdout.splitlines()[-1].endswith(f"RESULT | tokens in {tmp_path / 'tokens'}")


@pytest.mark.parametrize("name", ["INT", "USR1", "USR2", "XCPU"])
def test_every_warning_of_a_batch_system_stops_it_with_one_command_that_resumes(tmp_path, name):
    stubbed = Stubbed(tmp_path)
    process = stubbed.start(EXTRACT_FLAGS="--query 'a  b'", LOOPS="100")
    stubbed.wait_until_begun(2, process)
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert process.wait(60) == 143
    lines = stubbed.log.read_text().splitlines()
    resume = lines[-1].split("] RESUME | ")[1]
    assert sum("RESUME" in line for line in lines) == 1
    done = subprocess.run(["bash", "-c", resume], cwd="/", capture_output=True, text=True, timeout=120,
                          env={"PATH": os.environ["PATH"], "CALLS": str(stubbed.calls),
                               "VIRTUAL_ENV": str(stubbed.folder)})
    assert done.returncode == 0, done.stderr
    results = stubbed.lines("end")
    assert len(results) == len(set(results)) == STEPS


def test_a_second_stop_reaches_the_step_and_leaves_no_orphan(tmp_path):
    stubbed = Stubbed(tmp_path)
    process = stubbed.start(LOOPS="500", STUBBORN="1")
    stubbed.wait_until_begun(1, process)
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 143 and len(stubbed.lines("stopped")) == 1
    wait_until_gone(process.pid)
    assert stubbed.log.read_text().count("RESUME") == 1


def test_the_reader_of_the_log_may_go(tmp_path):
    stubbed = Stubbed(tmp_path)
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as out:
        process = subprocess.Popen(["bash", SCRIPT, "--demo"], env=stubbed.environment(), stdout=out, stderr=out,
                                   stdin=subprocess.DEVNULL, restore_signals=True)
    stubbed.wait_until_begun(2, process)
    os.close(reader)
    assert process.wait(120) == 0 and len(stubbed.lines("end")) == STEPS


def test_a_disk_without_locks_is_a_warning_and_no_other_workflow(tmp_path):
    (tmp_path / "flock").write_text("#!/bin/sh\necho 'flock: 9: No locks available' >&2\nexit 71\n")
    (tmp_path / "flock").chmod(0o755)
    stubbed = Stubbed(tmp_path)
    done = started(stubbed, SCRIPT, "--demo", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0 and "another workflow" not in done.stdout + done.stderr
    assert "WARNING | no locks on the disk of" in done.stdout and "(No locks available)" in done.stdout


# ------------------------------------------------------------------------------ .venv of our own
PIP = """#!/usr/bin/env bash
# Stands for the python3 of the system: makes an environment of stubs, or half of one.
case "$*" in
  "-c "*) exit 0 ;;
  "-m venv --clear"*) rm -rf "${4:?}" ;;
esac
if [[ "$*" == "-m venv"* ]]; then
  folder="${@: -1}"; mkdir -p "${folder}/bin"; cp "$0" "${folder}/bin/python"
  [[ ! -e "${HALF}" ]] || exit 1                        # no ensurepip
  touch "${folder}/pip"
elif [[ "$*" == "-m pip --version" ]]; then
  [[ -e "$(dirname "$0")/../pip" ]]
elif [[ "$*" == "-m pip install"* ]]; then
  echo "$*" >> "${HALF}.installs"
  [[ ! -e "${HALF}.net" ]]
fi
"""


@pytest.fixture
def suite(tmp_path):
    """A function that starts env.sh of a copy of the suite without an environment; -> what came of it."""
    (tmp_path / "suite" / "machine").mkdir(parents=True)
    for name in ("env.sh", "machine/steps.sh", "base.py"):
        shutil.copy(ROOT / name, tmp_path / "suite" / name)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / "suite" / name).write_text("tqdm\n")
    (tmp_path / "python3").write_text(PIP)
    (tmp_path / "python3").chmod(0o755)

    def start(requirements="requirements.txt", **settings: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "-c", f"set -euo pipefail; source ./env.sh {requirements}; echo $PYTHON"],
                              cwd=tmp_path / "suite", capture_output=True, text=True, timeout=60,
                              env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HALF": str(tmp_path / "half"), **settings})
    return start


def test_a_half_made_environment_is_made_whole_by_the_next_start(suite, tmp_path):
    half, venv = tmp_path / "half", tmp_path / "suite" / ".venv"
    half.touch()
    failed = suite()
    assert failed.returncode == 2 and "is python3-venv installed?" in failed.stderr and venv.exists()
    half.unlink()
    (tmp_path / "half.net").touch()
    failed = suite()
    assert failed.returncode == 2 and "pip could not install" in failed.stderr
    (tmp_path / "half.net").unlink()
    assert suite().returncode == 0 and suite().stdout == f"{venv}/bin/python\n"
    assert (tmp_path / "half.installs").read_text().count("\n") == 2              # the last start installs nothing


@pytest.mark.parametrize("damage", ["python gone", "marker gone", "requirements changed", "stopped while changed"])
def test_what_the_marker_stands_for_is_looked_at(suite, tmp_path, damage):
    venv, installs = tmp_path / "suite" / ".venv", tmp_path / "half.installs"
    assert suite("requirements-dev.txt").returncode == 0
    if damage == "python gone":
        (venv / "bin" / "python").unlink()
    elif damage == "marker gone":
        (venv / "requirements-dev.txt.installed").unlink()
    else:
        (tmp_path / "suite" / "requirements.txt").write_text("tqdm>=4\n")         # which the other includes
    if damage == "stopped while changed":                                         # and then changed back
        (tmp_path / "half.net").touch()
        assert suite("requirements-dev.txt").returncode == 2
        (tmp_path / "half.net").unlink()
        (tmp_path / "suite" / "requirements.txt").write_text("tqdm\n")
    before = installs.read_text().count("\n")
    assert suite("requirements-dev.txt").returncode == 0
    assert installs.read_text().count("\n") == before + 1


def test_where_no_environment_can_be_made_one_line_says_so(suite, tmp_path):
    (tmp_path / "suite" / ".venv").write_text("a file")
    failed = suite()
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "set VENV to a folder" in failed.stderr
    assert suite(VENV=str(tmp_path / "elsewhere")).stdout.endswith(f"{tmp_path}/elsewhere/bin/python\n")


@pytest.mark.faults
def test_the_real_workflow_killed_in_each_phase_goes_on(tmp_path, figures):
    settings = {"DEMO_FLAGS": "--train_clips 24 --test_clips 20", "EXTRACT_FLAGS": "--max_new_tokens 24",
                "TRAIN_FLAGS": "--embed_dim 32 --num_layers 1 --num_heads 2 --num_epochs 2 --no-refit --no-online",
                "DECODE_FLAGS": "--max_samples 3 --max_new_tokens 24 --num_workers 1", "VIRTUAL_ENV": sys.prefix,
                "PYTHON": sys.executable}
    stubbed, numbers, killed, moments = Stubbed(tmp_path), [signal.SIGTERM, signal.SIGKILL], 0, random.Random(0)
    while True:
        before = stubbed.log.read_text().count("| start |") if stubbed.log.exists() else 0
        process = stubbed.start(**settings)
        deadline = time.monotonic() + 300
        while stubbed.log.read_text().count("| start |") <= before + (killed > 0) and process.poll() is None:
            assert time.monotonic() < deadline, stubbed.log.read_text()
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 4))                        # somewhere in the step that has just begun
        if process.poll() is not None:
            break
        process.send_signal(numbers[killed % 2])
        process.wait(60)
        wait_until_gone(process.pid)
        killed += 1
    assert process.returncode == 0 and "Traceback" not in stubbed.log.read_text(), stubbed.log.read_text()
    tasks = [path.parent for path in (tmp_path / "task").glob("*/RESULTS.md")]
    decodings = list((tmp_path / "task").glob("*/decode_*/DECODE.md"))
    figures.append(("kill of the demo workflow, TERM and KILL in turn, a step further each time", killed,
                    f"orphans 0, it went on each time: {len(tasks)} of 4 tasks, {len(decodings)} of 2 decodings"))
    assert (len(tasks), len(decodings)) == (4, 2) and killed >= 5


@pytest.mark.faults
def test_two_real_workflows_on_one_data_root_do_not_trample_each_other(tmp_path, demo, figures):
    """Of other tasks, but the same data and tokens: what one makes the other waits for."""
    settings = {"DEMO_FLAGS": "--train_clips 24 --test_clips 20", "VIRTUAL_ENV": sys.prefix, "PYTHON": sys.executable,
                "EXTRACT_FLAGS": "--max_new_tokens 80 --batch_size 16 --num_workers 2",
                "DECODE_FLAGS": "--max_samples 2",
                "TRAIN_FLAGS": "--embed_dim 32 --num_layers 1 --num_heads 2 --num_epochs 2 --no-refit --no-online"}
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
