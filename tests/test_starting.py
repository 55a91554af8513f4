"""Where and how the workflow is started and stopped: links, copies, shells, environments, quotes,
signals.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, wait_until_gone
from tests.stubbed import SCRIPT, STEPS, Stubbed


def started(stubbed: Stubbed, *command: str, cwd: Path = ROOT,
            **settings: str) -> subprocess.CompletedProcess:
    """Start the stubbed workflow by this command, with these settings in the environment."""
    return subprocess.run(command, env=stubbed.environment(**settings), cwd=cwd,
                          capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def test_it_runs_through_a_link_and_from_a_batch_systems_copy(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "egpt").symlink_to("hop")                # a relative link to a link
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
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is a copy without the suite" in done.stderr


def test_sh_runs_it_and_sourcing_it_is_one_line_that_leaves_the_shell_alive(tmp_path):
    stubbed = Stubbed(tmp_path)
    done = started(stubbed, "sh", SCRIPT, "--demo")
    assert done.returncode == 0, done.stderr
    done = started(stubbed, "bash", "-c", f"source {SCRIPT} --help; echo alive $?")
    assert done.stdout == "alive 2\n"
    assert done.stderr == "ERROR | run this script, don't source it\n"


def test_what_is_wrong_is_said_before_anything_is_installed(tmp_path):
    """No environment is active here, and PYTHON can't even start."""
    for arguments, settings, message in (
            ([], {}, "EVENTGPT is not set"), (["--only", "2s"], {}, "unknown argument --only 2s"),
            (["--until"], {}, "unknown argument --until"),
            (["--demo"], {"TRAIN_FLAGS": "--task_name 'a b"}, "TRAIN_FLAGS has a quote that is not")):
        environment = {"PATH": os.environ["PATH"], "PYTHON": "/nowhere/python", **settings}
        done = subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True,
                              text=True, timeout=60)
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
    words = f"Python 3.9.2 found ({old}), wanted Python 3.11 or newer: activate a newer"
    assert words in done.stderr


def test_the_python_of_an_environment_is_used_even_where_path_does_not_name_it(tmp_path):
    stubbed = Stubbed(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "python").rename(tmp_path / "bin" / "python")
    environment = {key: value for key, value in stubbed.environment().items() if key != "PYTHON"}
    done = subprocess.run(["bash", SCRIPT, "--demo"], env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0 and len(stubbed.lines("end")) == STEPS


def test_flags_keep_their_quotes_are_never_globbed_and_the_printed_command_can_be_pasted(tmp_path):
    stubbed = Stubbed(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "Where1").touch()
    query = "What's  on\tthe road? * $HOME"
    done = started(stubbed, SCRIPT, "--demo", "--only", "1s", "--until", "extract",
                   cwd=tmp_path / "here", EXTRACT_FLAGS=f'--query "{query}" --a Where?',
                   DEMO_FLAGS="--b 'x y' --c Where*")
    assert done.returncode == 0, done.stderr
    words = [line.split("\x1f") for line in (tmp_path / "words").read_text().splitlines()]
    assert words[0][-4:] == ["--b", "x y", "--c", "Where*"]
    assert words[1][-4:] == words[2][-4:] == ["--query", query, "--a", "Where?"]
    printed = re.search(r"extract train 1s \| start \| (.*)", done.stdout)[1]
    pasted = subprocess.run(["bash", "-c", f"printf '%s\\x1f' {printed}"], capture_output=True,
                            text=True).stdout
    assert pasted.rstrip("\x1f").split("\x1f")[1:] == words[1]


@pytest.mark.parametrize(("arguments", "results"), [
    (["--only", "1s"], 6), (["--only", "500ms", "--until", "train"], 5),
    (["--until", "extract"], 5), (["--until", "train"], 9)])
def test_only_and_until_leave_out_the_rest(tmp_path, arguments, results):
    stubbed = Stubbed(tmp_path)
    done = started(stubbed, SCRIPT, "--demo", *arguments)
    assert done.returncode == 0 and len(stubbed.lines("end")) == results
    if "--only" in arguments:
        other = {"1s": "500ms", "500ms": "1s"}[arguments[1]]
        results = "\n".join(stubbed.lines("end"))
        assert f"tokens_{other}" not in results and f"task/{other}" not in results
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
    environment = {"PATH": os.environ["PATH"], "CALLS": str(stubbed.calls),
                   "VIRTUAL_ENV": str(stubbed.folder)}
    done = subprocess.run(["bash", "-c", resume], cwd="/", env=environment, capture_output=True,
                          text=True, timeout=120)
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
        process = subprocess.Popen(["bash", SCRIPT, "--demo"], env=stubbed.environment(), stdout=out,
                                   stderr=out, stdin=subprocess.DEVNULL, restore_signals=True)
    stubbed.wait_until_begun(2, process)
    os.close(reader)
    assert process.wait(120) == 0 and len(stubbed.lines("end")) == STEPS


def test_a_disk_without_locks_is_a_warning_and_no_other_workflow(tmp_path):
    (tmp_path / "flock").write_text("#!/bin/sh\necho 'flock: 9: No locks available' >&2\nexit 71\n")
    (tmp_path / "flock").chmod(0o755)
    stubbed = Stubbed(tmp_path)
    done = started(stubbed, SCRIPT, "--demo", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0 and "another workflow" not in done.stdout + done.stderr
    assert "WARNING | no locks on the disk of" in done.stdout
    assert "(No locks available)" in done.stdout


PROGRAMS = [path.stem for path in sorted(ROOT.glob("*.py")) if "\n    run(main)" in path.read_text()]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_finds_its_modules_in_safe_path_mode(program):
    """python -P and PYTHONSAFEPATH leave the script's own folder out of sys.path."""
    done = subprocess.run([sys.executable, "-P", str(ROOT / f"{program}.py"), "--help"],
                          capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0 and program in done.stdout, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_in_an_environment_without_packages_is_no_traceback(program):
    done = subprocess.run([sys.executable, "-S", "-E", str(ROOT / f"{program}.py"), "--help"],
                          capture_output=True, text=True, timeout=60, cwd="/", env={})
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or (done.returncode == 2 and done.stdout.count("\n") == 1
                                    and "is not installed: " in done.stdout)


# ------------------------------------------------------------------------------- .venv of our own
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
    """A function that sources env.sh in a copy of the suite, without an active environment."""
    (tmp_path / "suite" / "machine").mkdir(parents=True)
    for name in ("env.sh", "machine/steps.sh", "base.py"):
        shutil.copy(ROOT / name, tmp_path / "suite" / name)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / "suite" / name).write_text("tqdm\n")
    (tmp_path / "python3").write_text(PIP)
    (tmp_path / "python3").chmod(0o755)

    def start(requirements="requirements.txt", **settings: str) -> subprocess.CompletedProcess:
        code = f"set -euo pipefail; source ./env.sh {requirements}; echo $PYTHON"
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HALF": str(tmp_path / "half"), **settings}
        return subprocess.run(["bash", "-c", code], cwd=tmp_path / "suite", env=environment,
                              capture_output=True, text=True, timeout=60)
    return start


def test_a_half_made_environment_is_made_whole_by_the_next_start(suite, tmp_path):
    half, venv = tmp_path / "half", tmp_path / "suite" / ".venv"
    half.touch()
    failed = suite()
    assert failed.returncode == 2 and "python3-venv installed?" in failed.stderr and venv.exists()
    half.unlink()
    (tmp_path / "half.net").touch()
    failed = suite()
    assert failed.returncode == 2 and "pip could not install" in failed.stderr
    (tmp_path / "half.net").unlink()
    assert suite().returncode == 0 and suite().stdout == f"{venv}/bin/python\n"
    # The last start installs nothing
    assert (tmp_path / "half.installs").read_text().count("\n") == 2


@pytest.mark.parametrize("damage", ["python gone", "marker gone", "requirements changed",
                                    "stopped while changed"])
def test_what_the_marker_stands_for_is_looked_at(suite, tmp_path, damage):
    venv, installs = tmp_path / "suite" / ".venv", tmp_path / "half.installs"
    assert suite("requirements-dev.txt").returncode == 0
    if damage == "python gone":
        (venv / "bin" / "python").unlink()
    elif damage == "marker gone":
        (venv / "requirements-dev.txt.installed").unlink()
    else:
        # Which the other includes
        (tmp_path / "suite" / "requirements.txt").write_text("tqdm>=4\n")
    # And then changed back
    if damage == "stopped while changed":
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
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert "set VENV to a folder" in failed.stderr
    finished = suite(VENV=str(tmp_path / "elsewhere"))
    assert finished.stdout.endswith(f"{tmp_path}/elsewhere/bin/python\n")
