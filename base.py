"""What the programs share and no model: log, errors, how they stop and go on, flags, provenance.

    python base.py requirements.txt     which packages of a requirements file can't be imported; exit 2 if any

Nothing here imports torch, transformers, av or matplotlib, so `--help` of every program stays quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import errno
import importlib.metadata
import importlib.util
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# Distributions whose import name differs from the name that pip knows.
IMPORT_NAMES = {"pillow": "PIL", "protobuf": "google.protobuf"}
# Errors of the machine, not of one file's content, and what the user can do about each.
MACHINE_TROUBLE = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EROFS: "choose another folder",
    errno.EACCES: "correct its permissions", errno.EPERM: "correct its permissions",
    errno.EMFILE: "raise the limit (ulimit -n)", errno.ENFILE: "close other programs",
    errno.ENOMEM: "free some memory", errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.ENOLCK: "choose a folder on another disk",
    **dict.fromkeys((errno.EIO, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN,
                     errno.ECONNRESET, errno.ECONNABORTED, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.EHOSTDOWN,
                     errno.EHOSTUNREACH), "check the disk or its network connection")}
ADVICE = {**MACHINE_TROUBLE, errno.ENAMETOOLONG: "choose a shorter name"}
# Control characters (a terminal obeys them), ends of lines, turns of the writing direction, halves of characters.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# --------------------------------------------------------------------------------- log and errors
class UserError(Exception):
    """What the user can put right: the message says what was found, what was wanted and what to do."""


def now() -> str:
    """Local time, as the log and every result say it: 2026-01-28 02:07:11."""
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"


def plain(text) -> str:
    """The text on one line, with nothing in it that hides or acts: such letters are shown as \\x1b, \\u202e, ..."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], " ".join(str(text).splitlines()))


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def log(message: str) -> None:
    """Print one whole, timestamped, flushed line; ids and paths from files can't break it in two or colour it.

    A log that can't be written, because its disk is full or its terminal gone, ends no work of hours.
    """
    with contextlib.suppress(OSError):
        print(f"[{now()}] {plain(message)}", flush=True)


SAME_STOP_S = 2.0                  # signals that come within so many seconds are one stop


class Stopped(SystemExit):
    """A signal asked the program to end: raised wherever it was, so that `finally` blocks run."""


_goes_on: list[str] = []           # the command that goes on with what has been begun


def goes_on_with(arguments: list[str]) -> None:
    """From now on a stopped program says that this command (without python) goes on; []: nothing is left to do."""
    _goes_on[:] = arguments


def run(main: Callable[[], None]) -> None:
    """Call main(). A UserError becomes one ERROR line and exit 2; a bug keeps its traceback.

    A package that is not installed and a file that can't be read or written count as the user's to put right. Signals
    leave through `finally`, so that no temporary file stays behind (Python's default would end the process at once),
    with exit 128 + number, and the RESUME line where the program can go on. HUP is left alone under nohup.
    """
    def stop(number: int, _) -> None:
        raise Stopped(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # not every terminal knows every letter
    try:
        main()
    except UserError as error:
        end(f"ERROR | {error}", 2)
    except ModuleNotFoundError as error:
        if error.name and (ROOT / error.name.split(".")[0]).with_suffix(".py").exists():
            raise  # a file of ours: a bug
        end(f"ERROR | the package {error.name!r} is not installed: {install_command('requirements.txt')}", 2)
    except OSError as error:
        if error.errno not in ADVICE and (not error.errno or not error.filename):
            raise  # not about a file
        where = f"{error.filename}: " if error.filename else ""
        then = f"then go on with: {going_on()}" if _goes_on else "then give the same command again"
        end(f"ERROR | {where}{error.strerror}; {ADVICE.get(error.errno, 'correct that')}, {then}", 2)
    except KeyboardInterrupt:
        end(f"RESUME | {going_on()}" if _goes_on else "ERROR | interrupted", 130)
    except Stopped as stopped:
        end(f"RESUME | {going_on()}" if _goes_on else "", stopped.code)


@contextlib.contextmanager
def finishing(what: str) -> Iterator[Callable[[], bool]]:
    """Inside, a signal to stop ends nothing: the function that is yielded says that one came; the exit then obeys it.

    One more, a while later, is obeyed at once (one stop may send several: HUP to all of a terminal, TERM from its
    shell). Signals that are ignored (HUP under nohup) stay so.
    """
    came: list[int] = []
    since = 0.0

    def later(number: int, frame) -> None:
        nonlocal since
        came.append(number)
        if len(came) > 1:
            if time.monotonic() > since + SAME_STOP_S:
                raise Stopped(128 + number)
            return
        since = time.monotonic()
        with contextlib.suppress(RuntimeError):              # it may have come in the middle of another log line
            log(f"stopping | {what} first; once more stops at once")

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, later) for number in numbers
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise Stopped(128 + came[0])


def going_on() -> str:
    return shlex.join([sys.executable, *_goes_on])


def end(line: str, code: int) -> typing.NoReturn:
    """The last line of the log, if there is one to say, and the exit."""
    if line:
        log(line)
    sys.exit(code)


class Progress:
    """Steady work as log lines: at most one each 10 s, and one at the end.

    [2026-01-28 02:07:11] extract | 120/5208 | ok 118 failed 2 | 1.21 samples/s | eta 1:10:05
    """

    EVERY_S = 10.0

    def __init__(self, step: str, total: int, done: int = 0, unit: str = "samples"):
        self.step, self.total, self.first, self.unit = step, total, done, unit
        self.start = self.last = time.monotonic()

    def update(self, done: int, facts: str = "") -> None:
        now = time.monotonic()
        if done < self.total and now - self.last < self.EVERY_S:
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        eta = datetime.timedelta(seconds=round((self.total - done) / rate)) if rate > 0 else "?"
        parts = [self.step, f"{done}/{self.total}", facts, f"{rate:.2f} {self.unit}/s", f"eta {eta}"]
        log(" | ".join(part for part in parts if part))


# -------------------------------------------------------------------------------- config -> flags
def option(default, help: str):
    """A config field with its help text; the default is what the program does when you say nothing."""
    return dataclasses.field(default=default, metadata={"help": help})


def required(help: str, positional: bool = False):
    """A config field that has no default: a flag that must be given, or a bare value if positional."""
    return dataclasses.field(metadata={"help": help, "positional": positional})


# More than that is a slip of the hand, which would be found out only when the memory is full.
MOST = {"num_frames": 1000, "embed_dim": 16_384, "num_layers": 256, "num_heads": 1024, "max_seq_len": 32_768}


def check_counts(config, counts: tuple[str, ...], or_all: tuple[str, ...] = ()) -> None:
    """These flags must be 1 or more; those in `or_all` may also be -1, for all. A UserError names the first wrong."""
    for name in (*counts, *or_all):
        value = getattr(config, name)
        if value > MOST.get(name, value):
            raise UserError(f"--{name} must be at most {MOST[name]}, got {value}")
        if value < 1 and not (name in or_all and value == -1):
            otherwise = ", or -1 for all" if name in or_all else ""
            raise UserError(f"--{name} must be 1 or more{otherwise}, got {value}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_config(cls, argv: list[str] | None = None):
    """Read a config dataclass from the command line: one --flag per field, spelled like the field.

    bool -> --plots / --no-plots, Literal -> choices, list[T] -> one or more values, T | None -> T.
    Checks belong into the dataclass's __post_init__ and raise UserError.
    """
    parser = _Parser(description=cls.__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):                                          # int | None -> int
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        how: dict = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            how = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is list:
            how = {"type": typing.get_args(kind)[0], "nargs": "+"}
        must = field.default is dataclasses.MISSING
        note = "" if must or field.default is None or kind is bool else f" (default: {field.default})"
        how["help"] = (field.metadata.get("help", "") + note).replace("%", "%%")
        if field.metadata.get("positional"):
            parser.add_argument(field.name, **how)
        else:
            how["default"] = None if must else field.default
            parser.add_argument(f"--{field.name}", required=must, **how)
    return cls(**vars(parser.parse_args(argv)))


def as_json(config) -> dict:
    """A config dataclass as JSON values (paths become strings)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(cls, values: dict, folder: Path):
    """The config that as_json made these values of; its relative paths start at this folder."""
    def back(kind, value):
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if value is not None and list[Path] in kinds:
            return [folder / path for path in value]
        return folder / value if value is not None and Path in kinds else value

    return cls(**{name: back(kind, values.get(name)) for name, kind in typing.get_type_hints(cls).items()})


# ------------------------------------------------------------------------------------------- runs
def provenance() -> dict:
    """What a result must say about how it was made: command, git commit, versions."""
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True,
                                check=True, timeout=10).stdout.strip()
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "tokenizers", "bitsandbytes", "av", "pillow", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"argv": sys.argv, "git_commit": commit, "versions": versions}


# ------------------------------------------------------------------------------------------ names
def drive_of(sequence: str) -> str:
    """zurich_city_14_a, _b and _c are segments of one drive, zurich_city_14: they may not be split apart."""
    return re.sub(r"_[a-z]$", "", sequence)


def duration_of(*texts: str) -> str | None:
    """The window length that the first of these texts names: "data/my_egpt_dsec_seq_500ms" -> "500ms"."""
    for text in texts:
        found = re.findall(r"(?<![A-Za-z0-9.])\d+(?:ms|s)(?![A-Za-z0-9])", text)
        if found:
            return found[-1]
    return None


# --------------------------------------------------------------------------------------- packages
def install_command(requirements: str) -> str:
    return f"{sys.executable} -m pip install -r {ROOT / requirements}"


def check_packages() -> None:
    """Name every package of a requirements file that can't be found; versions are not checked."""
    if len(sys.argv) != 2:
        raise UserError("usage: python base.py requirements.txt")
    missing, files = [], [ROOT / sys.argv[1]]
    for file in files:
        for line in file.read_text().splitlines():
            if line.startswith("-r "):
                files.append(ROOT / line[3:].strip())
                continue
            name = re.match(r"[A-Za-z0-9_.-]*", line).group()
            module = IMPORT_NAMES.get(name, name)
            with contextlib.suppress(ModuleNotFoundError):         # of a parent package: google.protobuf
                if not name or importlib.util.find_spec(module):
                    continue
            missing.append(name)
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; install with: {install_command(sys.argv[1])}")


if __name__ == "__main__":
    run(check_packages)
