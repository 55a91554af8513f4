"""How a program ends: its exit code, its last line, and what a signal does at which moment."""

import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

from base import ROOT
from machine.running import finishing, run, shell_command


def ran(body: str, *before: str, **how) -> subprocess.CompletedProcess:
    """Run a program whose main() has this body, as if started by the words before."""
    return subprocess.run([*before, sys.executable, "-c",
                           program(body)], cwd=ROOT, text=True, timeout=120,
                          **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how})


def program(body: str) -> str:
    imports = "import errno, gc, os, pathlib, signal, threading, time, base, machine.running\n"
    return (f"{imports}import machine.files as files\nfrom machine.running import *\n"
            f"def main():\n{textwrap.indent(textwrap.dedent(body), '    ')}\nrun(main)")


@pytest.mark.parametrize(("body", "code", "ending"), [
    ("raise base.UserError('found 1, wanted 2')", 2, "ERROR | found 1, wanted 2\n"),
    ("import no_such_package", 2, "requirements.txt\n"),
    ("import no_such_package.part", 2, "requirements.txt\n"),
    ("raise KeyboardInterrupt", 130, "ERROR | interrupted\n"),
    ("os.kill(os.getpid(), signal.SIGINT)", 130, "ERROR | interrupted\n"),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
    ("base.log('RESULT')", 0, "RESULT\n"),
    ("raise OSError(errno.EMFILE, 'Too many open files')", 2,
     "ulimit -n), then give the same command again\n"),
    ("raise MemoryError", 2, "ERROR | out of memory: free some, then give the same command again\n"),
])
def test_a_program_ends_with_its_exit_code_and_one_line(body, code, ending):
    ended = ran(body)
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.stdout.endswith(ending) and ended.stdout.count("\n") == bool(ending)


@pytest.mark.parametrize("name", ["pairs.fromats", "machine.no_such", "bsae_of", "token_adapter.nothing"])
def test_a_mistyped_module_of_ours_is_a_bug_and_no_package_to_install(name):
    ended = ran(f"import {name}")
    if name == "bsae_of":                         # not a room of ours: a package, for all that Python knows
        assert ended.returncode == 2 and "'bsae_of' is not installed" in ended.stdout
    else:
        assert ended.returncode == 1 and "ModuleNotFoundError" in ended.stderr and "ERROR" not in ended.stdout


@pytest.mark.parametrize("name", ["no_such_package", "pairs.fromats"])
def test_a_package_that_is_missing_while_a_program_imports_its_modules_is_one_line_too(name):
    code = f"import machine.running\nimport {name}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if name == "pairs.fromats":
        assert ended.returncode == 1 and "Traceback" in ended.stderr and not ended.stdout
    else:
        assert (ended.returncode, ended.stderr, ended.stdout.count("\n")) == (2, "", 1)
        assert "ERROR | the package 'no_such_package' is not installed" in ended.stdout


def test_a_module_that_python_itself_lacks_is_not_to_be_installed():
    ended = ran("raise ModuleNotFoundError('No module named _lzma', name='_lzma')")
    assert ended.returncode == 2 and "was built without '_lzma'" in ended.stdout and "pip" not in ended.stdout


def test_a_bug_keeps_its_traceback():
    def main():
        raise AssertionError("shape (3, 4)")

    with pytest.raises(AssertionError, match="shape"):
        run(main)


def test_an_error_without_a_file_says_what_it_is_about():
    ended = ran("raise OSError(errno.EMFILE, 'Too many open files')")
    assert "ERROR | the machine: Too many open files; raise the limit" in ended.stdout
    ended = ran("""
        import multiprocessing.synchronize as synchronize
        class SemLock:
            def __init__(*_): raise OSError(errno.EROFS, 'Read-only file system')
            _rand_name = staticmethod(lambda: 'x')
        synchronize._multiprocessing = type('', (), {'SemLock': SemLock, 'sem_unlink': None})
        import multiprocessing
        multiprocessing.get_context('spawn').Lock()""")
    assert ended.returncode == 2, ended.stderr
    words = "ERROR | /dev/shm (memory that worker processes share): Read-only file system; make it"
    assert words in ended.stdout


# ------------------------------------------------------------------------------------------- stop
SIGNALS = [("TERM", 143), ("HUP", 129), ("INT", 130), ("USR1", 138), ("USR2", 140), ("XCPU", 152)]


@pytest.mark.parametrize(("name", "code"), SIGNALS)
def test_a_stopped_program_cleans_up_and_says_how_to_resume(name, code):
    ended = ran(f"""
        goes_on_with(['train.py', '--name', 'a b'])
        try:
            os.kill(os.getpid(), signal.SIG{name})
        finally:
            base.log('cleaned')""")
    assert (ended.returncode, ended.stderr) == (code, "")
    cleaned, resume = ended.stdout.splitlines()
    assert "cleaned" in cleaned and resume.endswith(f"] RESUME | {sys.executable} train.py --name 'a b'")


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_step_of_the_workflow_leaves_it_to_the_workflow_to_say_how_to_resume(name):
    ended = ran(f"""
        goes_on_with(['train.py'])
        os.kill(os.getpid(), signal.SIG{name})""", "env", "RUN_BY_WORKFLOW=1")
    assert ended.returncode in (143, 130) and ended.stdout == ended.stderr == ""


@pytest.mark.parametrize(("name", "code"), SIGNALS)
def test_the_task_in_hand_is_finished_first_unless_a_second_signal_comes(name, code):
    for signals in (1, 2):
        ended = ran(f"""
        goes_on_with(['train.py'])
        machine.running.SAME_STOP_S = 0
        with finishing('this') as stopping:
            for _ in range({signals}):
                os.kill(os.getpid(), signal.SIG{name})
            base.log(f'finished {{stopping()}}')
        base.log('not reached')""")
        assert (ended.returncode, ended.stderr) == (code, "")
        lines = [line.split("] ")[1] for line in ended.stdout.splitlines()]
        assert lines == ["stopping | this first; once more stops at once",
                         *["finished True"] * (signals == 1), f"RESUME | {sys.executable} train.py"]


def test_the_signals_of_one_stop_count_as_one():
    """A closing terminal hangs up the workflow and its step; then the workflow sends TERM to the step."""
    ended = ran("""
        with finishing('this'):
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
            base.log('finished')""")
    assert ended.returncode == 129 and ended.stdout.endswith("finished\n")


def test_the_second_signal_of_one_stop_does_not_interrupt_the_clean_up():
    ended = ran("""
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            base.log('cleaned')""")
    assert ended.returncode == 129 and ended.stdout.endswith("cleaned\n")


def test_without_a_signal_nothing_is_stopped_and_the_handlers_before_hold_again():
    before = signal.getsignal(signal.SIGTERM)
    with finishing("this") as stopping:
        assert not stopping() and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hang_up_is_ignored_under_nohup():
    for body in ("os.kill(os.getpid(), signal.SIGHUP)", """
        with finishing('this') as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping()"""):
        ended = ran(f"{textwrap.dedent(body)}\nbase.log('RESULT')", "nohup")
        assert ended.returncode == 0 and ended.stdout.endswith("RESULT\n")


SWALLOWED = {
    "in a __del__ while garbage is collected": """
        class Noisy:
            def __del__(self): os.kill(os.getpid(), signal.SIGTERM); [None for _ in range(10**5)]
        cycle = Noisy(); cycle.self = cycle; del cycle
        gc.collect()""", "in the callback of a weak reference": """
        import weakref
        class Thing: pass
        thing = Thing()
        callback = weakref.finalize(thing, lambda: os.kill(os.getpid(), signal.SIGTERM))
        del thing""", "in a callback of C": """
        import ctypes
        @ctypes.CFUNCTYPE(ctypes.c_int)
        def callback(): os.kill(os.getpid(), signal.SIGTERM); return 0
        callback()""", "in a __del__, and in another when it is raised again": """
        class Slow:
            def __del__(self): os.kill(os.getpid(), signal.SIGTERM) if self.first else None; time.sleep(0.3)
        for first in (True, False):
            thing = Slow(); thing.first = first; del thing"""
}


@pytest.mark.parametrize("moment", SWALLOWED)
def test_a_stop_that_python_swallows_stops_all_the_same(moment):
    ended = ran(f"""
        goes_on_with(['train.py'])
        {SWALLOWED[moment]}
        for _ in range(200): time.sleep(0.05)
        base.log('RESULT')""")
    assert ended.returncode == 143 and ended.stderr == "", ended.stderr
    assert ended.stdout.count("\n") == 1
    assert ended.stdout.endswith(f"] RESUME | {sys.executable} train.py\n")


READING = """
    from concurrent.futures import ThreadPoolExecutor
    goes_on_with(['train.py'])
    with ThreadPoolExecutor(1) as threads:
        threads.submit(time.sleep, 600)
        with finishing('this') as stopping:
            base.log('reading')
            while not stopping(): time.sleep(0.01)
    base.log('RESULT')"""


def test_a_second_stop_does_not_wait_for_a_thread_that_reads():
    process = subprocess.Popen([sys.executable, "-c", program(READING)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE)
    assert "reading" in process.stdout.readline()
    process.terminate()
    assert "stopping" in process.stdout.readline()
    time.sleep(2.2)                                # the first stop waits for the thread, as it should
    assert process.poll() is None
    started = time.monotonic()
    process.terminate()
    assert process.wait(10) == 143 and time.monotonic() - started < 5
    assert process.stdout.read().endswith(f"] RESUME | {sys.executable} train.py\n")


def test_worker_processes_end_with_a_program_that_does_not_wait():
    ended = ran("""
        import multiprocessing
        worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,), daemon=True)
        worker.start()
        base.log(worker.pid)
        threading.Thread(target=time.sleep, args=(600,)).start()
        os.kill(os.getpid(), signal.SIGTERM)""")
    pid = int(ended.stdout.split("] ")[1])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ended.returncode == 143


# ----------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("word", ["a  b", "it's", '"', "$HOME `id` *?", "a\nb", "\x1b[31m", "\u202e",
                                  "\udcff", "", "é", "~", "a\\b\t'"])
def test_a_command_that_is_logged_can_be_pasted(word, tmp_path):
    echo = "import os, sys; os.write(1, os.fsencode(sys.argv[1]))"
    command = shell_command([sys.executable, "-c", echo, word])
    ended = ran(f"base.log({command!r})")
    pasted = re.fullmatch(r"\[.{19}\] (.*)\n", ended.stdout)[1]
    assert subprocess.run(["bash", "-c", pasted], capture_output=True,
                          check=True).stdout == os.fsencode(word)


# ---------------------------------------------------------------------------------- log, progress
@pytest.mark.parametrize("out", ["/dev/full", "a pipe that nobody reads"])
@pytest.mark.parametrize("code", [0, 2])
def test_a_log_that_cannot_be_written_ends_no_work(tmp_path, out, code):
    reader, writer = os.pipe()
    os.close(reader)
    with open(out, "w") if out == "/dev/full" else os.fdopen(writer, "w") as file:
        ended = ran(f"""
        base.log('x')
        pathlib.Path({str(tmp_path / 'done')!r}).touch()
        base.log('x')
        if {code}: raise base.UserError('the end')""", stdout=file)
    assert (ended.returncode, ended.stderr) == (code, "") and (tmp_path / "done").exists()


def test_without_a_standard_output_the_work_goes_on(tmp_path):
    body = f"""
        progress = base.Progress('x', 1)
        progress.update(1)
        pathlib.Path({str(tmp_path / 'done')!r}).touch()"""
    command = f"{sys.executable} -c {shlex.quote(program(body))} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command],
                          cwd=ROOT).returncode == 0 and (tmp_path / "done").exists()


STEADY = """
    base.Progress.EVERY_S = 0
    progress = base.Progress('extract', 3)
    for done in range(1, 4):
        time.sleep(0.15)
        progress.update(done, 'ok 1')
        if done == 2: base.log('a line between')
    base.log('RESULT')"""


def on_a_terminal(body: str, lines: int = 24, **environment: str) -> str:
    """What the program prints on a terminal of so many lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", program(body)], cwd=ROOT, stdout=theirs,
                               stderr=subprocess.STDOUT, env={**os.environ, **environment})
    os.close(theirs)
    printed = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:
            break
        printed += part
    process.wait()
    return printed.decode()


def test_progress_is_a_bar_on_a_terminal_and_log_lines_in_a_file():
    printed = on_a_terminal(STEADY)
    assert "extract:  33%|" in printed and "ok 1]" in printed
    lines = [line.rpartition("\r")[2] for line in printed.replace("\r\n", "\n").splitlines()]
    texts = [line.split("] ", 1)[1] for line in lines if line.startswith("[")]
    assert texts[1].startswith("extract | 3/3 | ok 1")
    assert (texts[0], texts[2]) == ("a line between", "RESULT")
    assert not re.search(r"%\|[^\r\n]*RESULT", printed)
    in_a_file = ran(STEADY).stdout
    assert "\r" not in in_a_file and in_a_file.count("extract | ") == 3


def test_in_a_workflow_the_bar_tells_the_step_and_the_time_left_of_all():
    # 40 s for a weight of 20 so far: this step, of 1, is nearly done, and 120 s of others follow
    printed = on_a_terminal(STEADY, WORKFLOW_STEP="3 11 40 20 1 60")
    assert re.search(r"step 3 of 11, about 0:02:0\d left of all \| extract:  33%\|", printed)
    assert "step 1 of 11 | extract:" in on_a_terminal(STEADY, WORKFLOW_STEP="1 11 0 0 9 60")
    assert "step" not in on_a_terminal(STEADY, WORKFLOW_STEP="1 of 11")
    in_a_file = ran(STEADY, env={**os.environ, "WORKFLOW_STEP": "3 11 40 20 1 60"}).stdout
    assert "extract | 3/3" in in_a_file and "step" not in in_a_file


def test_progress_works_without_tqdm_and_on_a_terminal_of_unknown_size(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise ModuleNotFoundError('No module named tqdm', name='tqdm')")
    for printed in (on_a_terminal(STEADY, PYTHONPATH=str(tmp_path)), on_a_terminal(STEADY, lines=0)):
        assert printed.count("extract | ") == 3


@pytest.mark.parametrize("error", ["base.UserError('x')", "AssertionError('x')"])
def test_an_error_takes_the_bar_off_the_terminal(error):
    printed = on_a_terminal(f"""
        progress = base.Progress('extract', 3)
        progress.update(1)
        raise {error}""")
    after = printed.rpartition("%|")[2].replace("\r\n", "\n").split("\r")[-1]
    assert (after.startswith("[")
            and after.endswith("] ERROR | x\n")) or after.startswith("Traceback")
