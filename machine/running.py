"""How a program runs, stops and ends: ERROR for what the user can correct, RESUME after a stop."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from base import ROOT, UNSEEN, Progress, UserError, is_named, log, missing_package
from machine.ranks import this_process

# Errors of the machine, not of one file's content, and what the user can do about each.
MACHINE_TROUBLE = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EROFS: "make it writable, or choose another folder",
    errno.EACCES: "correct its permissions", errno.EPERM: "correct its permissions",
    errno.EMFILE: "raise the limit (ulimit -n)", errno.ENFILE: "close other programs",
    errno.ENOMEM: "free some memory", errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.ENOLCK: "choose a folder on another disk",
    **dict.fromkeys((errno.EIO, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.ESTALE,
                     errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED, errno.ESHUTDOWN,
                     errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
                    "check the disk or its network connection")}
ADVICE = {**MACHINE_TROUBLE, errno.ENAMETOOLONG: "choose a shorter name"}

# Slurm announces the end of a job with USR1, USR2 or XCPU.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2,
                signal.SIGXCPU)
# Signals within so many seconds are one stop: a closing terminal sends HUP to all, its shell then
# TERM.
SAME_STOP_S = 2.0
WORKER_GRACE_S = 2.0               # for a worker process to remove its temporary files
# Set in the environment of the workflow's steps: the workflow itself prints the command that
# resumes it.
IN_WORKFLOW = "RUN_BY_WORKFLOW"

_resume_command: list[str] = []    # without python; empty: nothing to resume


# --------------------------------------------------------------------------------------------- stop
class Stopped(SystemExit):
    """A signal asked the program to end; raised in the main thread, so that `finally` blocks run."""


class Stop:
    """Handler of the stop signals: raises Stopped, or waits while a task is being finished.

    Signals that are ignored (HUP under nohup) stay so.
    """

    since = float("-inf")          # time of the last stop, whichever handler received it

    def __init__(self, task: str = ""):
        self.task, self.number = task, 0

    def __call__(self, number: int, _) -> None:
        if time.monotonic() < Stop.since + SAME_STOP_S:
            return
        Stop.since = time.monotonic()
        if self.number or not self.task:
            raise Stopped(128 + number)
        self.number = number
        with contextlib.suppress(RuntimeError):        # the signal may interrupt another log line
            log(f"stopping | {self.task} first; once more stops at once")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        Stop.since = float("-inf")
        before = {number: signal.signal(number, self) for number in STOP_SIGNALS
                  if signal.getsignal(number) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def finishing(task: str) -> Iterator[Callable[[], bool]]:
    """Defer stop signals inside the block. Yields a function that tells whether one came.

    The program then stops on leaving the block. A second signal, more than SAME_STOP_S later, is
    obeyed at once.
    """
    stop = Stop(task)
    with stop.installed():
        yield lambda: bool(stop.number)
    if stop.number:
        raise Stopped(128 + stop.number)


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """Inside the block a stop signal ends the process at once, as by default.

    For foreign code that waits without a look at Python's signal handlers, where nothing is open.
    """
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS
              if isinstance(signal.getsignal(number), Stop)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_again(unraisable) -> None:
    """sys.unraisablehook: raise a stop again a moment after Python dropped it inside a __del__."""
    stopped = unraisable.exc_value
    if not isinstance(stopped, Stopped):
        sys.__unraisablehook__(unraisable)
        return

    def stop(*_) -> None:
        raise Stopped(stopped.code)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def end_without_package(kind, error, trace) -> None:
    """sys.excepthook: a package may be missing while a program imports modules, before run()."""
    line = missing_package(error) if isinstance(error, ModuleNotFoundError) else ""
    if line:
        end(line, 2)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = end_without_package


# ------------------------------------------------------------------------------------------- resume
def goes_on_with(arguments: list[str]) -> None:
    """Set the command (without python) for the RESUME line of a stopped run; []: all is done."""
    _resume_command[:] = arguments


def shell_command(words: list[str]) -> str:
    """A command to log and paste: quoted for bash, control characters as $'\\x1b'."""
    def quote(word: str) -> str:
        if not UNSEEN.search(word):
            return shlex.quote(word)
        letters = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
                   for byte in os.fsencode(word))
        return f"$'{''.join(letters)}'"

    return " ".join(map(quote, words))


def resume_command() -> str:
    """The command that resumes this run; "" if there is none, or if the workflow prints its own."""
    if not _resume_command or IN_WORKFLOW in os.environ:
        return ""
    return shell_command([sys.executable, *_resume_command])


def then_resume() -> str:
    command = resume_command()
    return f"then resume with: {command}" if command else "then give the same command again"


# ---------------------------------------------------------------------------------------------- run
def run(main: Callable[[], None], together: bool = False) -> None:
    """Call main(). A UserError becomes one ERROR line and exit 2; a bug keeps its traceback.

    together: whether the program shares its work among the processes that a launcher started; a
    program that can't is not started as several.

    A missing package, a file that can't be read or written, and trouble of the machine are the
    user's to correct. A stop signal leaves through `finally` blocks, which remove temporary files
    (Python's default ends the process at once): exit 128 + number, after a RESUME line where the
    run can be resumed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")      # not every terminal has every letter
    sys.unraisablehook = raise_again
    try:
        this_process(together)
        with Stop().installed():
            try:
                main()
            finally:
                Progress.close_bar()
    except UserError as error:
        end(f"ERROR | {error}", 2)
    except ModuleNotFoundError as error:
        if not (line := missing_package(error)):
            raise
        end(line, 2)
    except MemoryError:
        end(f"ERROR | out of memory: free some, {then_resume()}", 2)
    except OSError as error:
        if error.errno not in ADVICE and (not error.errno or not error.filename):
            raise  # not about a file
        advice = ADVICE.get(error.errno, "correct that")
        end(f"ERROR | {place_of(error)}: {error.strerror}; {advice}, {then_resume()}", 2)
    except (KeyboardInterrupt, Stopped) as stop:
        code = int(getattr(stop, "code", 128 + signal.SIGINT))
        if resume_command():
            end(f"RESUME | {resume_command()}", code, wait=False)
        interrupted = code == 128 + signal.SIGINT and IN_WORKFLOW not in os.environ
        end("ERROR | interrupted" * interrupted, code, wait=False)


def place_of(error: OSError) -> str:
    """What an error of the operating system is about: its file, or the line of ours that met it."""
    if error.filename:
        return str(error.filename)
    frames = traceback.extract_tb(error.__traceback__)
    if any("multiprocessing" in Path(frame.filename).parts for frame in frames):
        return "/dev/shm (memory that worker processes share)"
    for frame in reversed(frames):
        if Path(frame.filename).is_relative_to(ROOT) and frame.filename != __file__:
            return f"{Path(frame.filename).relative_to(ROOT)}, line {frame.lineno}"
    return "the machine"


def end(line: str, code: int, wait: bool = True) -> typing.NoReturn:
    """Print the last log line, if any, and exit. wait: as Python does, for threads at work."""
    if line:
        if code == 2 and is_named():
            time.sleep(SAME_STOP_S)      # if the first process has met the same, its line will do
        log(line)
    if not wait and any(not thread.daemon for thread in threading.enumerate()[1:]):
        if "multiprocessing" in sys.modules:
            end_workers(sys.modules["multiprocessing"].active_children())
        os._exit(code)
    sys.exit(code)


def end_workers(workers: list) -> None:
    """Terminate worker processes. A new one loses the signal if it comes inside its fork: kill it then."""
    for process in workers:
        process.terminate()
    for process in workers:
        process.join(WORKER_GRACE_S)
        process.kill()
