"""What the programs share and no model: log, errors, progress, flags, provenance.

    python base.py requirements.txt     exit 2 if packages of this requirements file are missing

Imports neither torch nor transformers, av or matplotlib, so `--help` of every program stays quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PYTHON_WANTED = (3, 11)
STARTED = time.monotonic()

# Control characters (a terminal obeys them), line ends, changes of writing direction, lone
# surrogates.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# --------------------------------------------------------------------------------- log and errors
class UserError(Exception):
    """A mistake the user can correct; its message says what was given, what is wanted, what to do."""


def now() -> str:
    """Local time as every log line and result writes it: 2026-01-28 02:07:11."""
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"


def plain(text) -> str:
    """The text on one line; characters that hide or act are escaped: \\x1b, \\u202e, ..."""
    return UNSEEN.sub(lambda match: ascii(match[0])[1:-1], " ".join(str(text).splitlines()))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or the name of its class."""
    return next(filter(str.strip, str(error).splitlines()), type(error).__name__).strip()


_process_name = ""         # of a process beside the first of a launch, which logs trouble alone


def name_process(name: str) -> None:
    """Set this process' name; "" for the first of a launch, or the only one: it logs everything."""
    global _process_name
    _process_name = name


def is_named() -> bool:
    """Whether this is a process beside the first of a launch."""
    return bool(_process_name)


def log(message: str) -> None:
    """Print one whole, timestamped, flushed line, which text from files can't break or colour.

    A log that can't be written, because its disk is full or its reader is gone, does not end the
    work.
    """
    if _process_name:
        if not re.search(r"\b(ERROR|WARNING)\b", message):
            return
        message = f"{_process_name} | {message}"
    line = f"[{now()}] {plain(message)}"
    try:
        if Progress.on_terminal is None:
            print(line, flush=True)
        else:
            Progress.on_terminal.bar.write(line, file=sys.stdout)        # above the bar
    except BrokenPipeError:              # nobody reads it; Python would fail once more at the exit
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    except OSError:
        pass


@dataclasses.dataclass(frozen=True)
class WorkflowStep:
    """Where this process stands in a workflow of several steps, as the workflow tells it.

    Weights are seconds of each step in the demo: what counts is how they compare.
    """

    number: int
    steps: int
    ran_s: int                     # seconds of the steps that have run since the workflow's start
    ran_weight: int                # and their weights
    weight: int                    # of this step
    later_weight: int              # of all later steps

    @classmethod
    def of_environment(cls) -> WorkflowStep | None:
        """From WORKFLOW_STEP, the fields as whole numbers; None outside of a workflow."""
        words = os.environ.get("WORKFLOW_STEP", "").split()
        known = len(words) == len(dataclasses.fields(cls)) and all(map(str.isdecimal, words))
        return cls(*map(int, words)) if known else None

    def left_s(self, step_left_s: float) -> float | None:
        """Seconds until the whole workflow has ended; None before a first step has shown the pace.

        step_left_s: what this step's own rate foretells.
        """
        if not self.ran_weight:
            return None
        pace = self.ran_s / self.ran_weight
        here = max(step_left_s, pace * self.weight - (time.monotonic() - STARTED))
        return here + pace * self.later_weight


class Progress:
    """Steady work: a bar on a terminal, elsewhere a log line each 10 s; and a log line at the end.

    [2026-01-28 02:07:11] extract | 120/5208 | ok 118 failed 2 | 1.21 samples/s | eta 1:10:05
    """

    EVERY_S = 10.0
    on_terminal: Progress | None = None    # whose bar the terminal shows; one at a time
    checks: typing.ClassVar[list] = []     # called each 10 s; each raises if the work is in vain

    def __init__(self, step: str, total: int, done: int = 0, unit: str = "samples"):
        self.step, self.total, self.start_done, self.unit = step, total, done, unit
        self.start = self.last = time.monotonic()
        self.workflow = WorkflowStep.of_environment()
        Progress.close_bar()
        with contextlib.suppress(OSError):
            out = sys.stdout                   # None where the shell closed it
            if out and out.isatty() and not _process_name and min(os.get_terminal_size(out.fileno())) > 1:
                self.open_bar()

    def update(self, done: int, facts: str = "") -> None:
        """Report that `done` of the total are done; facts: what else the line says."""
        now = time.monotonic()
        shown = Progress.on_terminal is self
        if shown:
            with contextlib.suppress(OSError):
                self.bar.set_description_str(self.title(done, now), refresh=False)
                self.bar.set_postfix_str(plain(facts), refresh=False)
                self.bar.update(done - self.bar.n)
        if done < self.total and now - self.last < self.EVERY_S:
            return
        self.last = now
        for check in self.checks:
            check()
        if shown and done < self.total:
            return
        if shown:
            Progress.close_bar()
        rate = self.rate(done, now)
        eta = datetime.timedelta(seconds=round((self.total - done) / rate)) if rate > 0 else "?"
        pace = f"{rate:.2f} {self.unit}/s"
        parts = (self.step, f"{done}/{self.total}", facts, pace, f"eta {eta}")
        log(" | ".join(filter(None, parts)))

    def rate(self, done: int, now: float) -> float:
        """Units per second since this work began."""
        return (done - self.start_done) / max(now - self.start, 1e-9)

    def title(self, done: int, now: float) -> str:
        """What stands before the bar: in a workflow the number of the step and the time left of all."""
        if self.workflow is None:
            return plain(self.step)
        rate = self.rate(done, now)
        left_s = self.workflow.left_s((self.total - done) / rate) if rate > 0 else None
        left = "" if left_s is None else f", about {datetime.timedelta(seconds=round(left_s))} left of all"
        return f"step {self.workflow.number} of {self.workflow.steps}{left} | {plain(self.step)}"

    def open_bar(self) -> None:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            tqdm.monitor_interval = 0              # no thread of its own
            tqdm.set_lock(threading.RLock())       # no lock between processes: it needs /dev/shm
            self.bar = tqdm(desc=self.title(self.start_done, self.start), total=self.total,
                            initial=self.start_done, unit=f" {self.unit}", file=sys.stdout, leave=False,
                            dynamic_ncols=True)
            Progress.on_terminal = self

    @staticmethod
    def close_bar() -> None:
        """Take the bar off the terminal, if there is one."""
        if Progress.on_terminal is not None:
            with contextlib.suppress(OSError):
                Progress.on_terminal.bar.close()
            Progress.on_terminal = None


# -------------------------------------------------------------------------------- config -> flags
def option(default, help: str, answers: str | None = None):
    """A config field with its help text; the default applies when the flag is not given.

    answers: whose answers depend on the flag: "draft", "target" or "both". A run that goes on with
    recorded answers compares these fields.
    """
    return dataclasses.field(default=default, metadata={"help": help, "answers": answers})


def required(help: str, positional: bool = False, answers: str | None = None):
    """A config field without default: a flag that must be given, or a bare value if positional."""
    return dataclasses.field(metadata={"help": help, "positional": positional, "answers": answers})


# A larger value is a slip of the hand, which would show only when the memory is full.
LARGEST = {"num_frames": 1000, "embed_dim": 16_384, "num_layers": 256, "num_heads": 1024,
           "max_seq_len": 32_768}


def check_counts(config, counts: tuple[str, ...], or_all: tuple[str, ...] = ()) -> None:
    """Raise UserError unless these flags are 1 or more; those in `or_all` may be -1, for all."""
    for name in (*counts, *or_all):
        value = getattr(config, name)
        if value > LARGEST.get(name, value):
            raise UserError(f"--{name} must be at most {LARGEST[name]}, got {value}")
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
        if isinstance(kind, types.UnionType):          # int | None -> int
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        how: dict = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            how = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is list:
            how = {"type": typing.get_args(kind)[0], "nargs": "+"}
        must = field.default is dataclasses.MISSING
        note = f" (default: {field.default})"
        if must or field.default is None or kind is bool:
            note = ""
        how["help"] = (field.metadata.get("help", "") + note).replace("%", "%%")
        if field.metadata.get("positional"):
            parser.add_argument(field.name, **how)
        else:
            how["default"] = None if must else field.default
            # in_ is --in: a field can't be named like a word of Python
            flag = field.name.rstrip("_")
            if flag != field.name:
                how["metavar"] = flag.upper()
            parser.add_argument(f"--{flag}", dest=field.name, required=must, **how)
    return cls(**vars(parser.parse_args(argv)))


def as_json(config) -> dict:
    """A config dataclass as JSON values (paths become strings)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(cls, values: dict, folder: Path):
    """The config of these JSON values, made by as_json; relative paths start at this folder.

    A field that is missing, because an older version wrote the file, takes its default.
    """
    def restored(kind, value):
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if value is not None and list[Path] in kinds:
            return [folder / path for path in value]
        return folder / value if value is not None and Path in kinds else value

    hints = typing.get_type_hints(cls)
    return cls(**{name: restored(hints[name], values[name]) for name in hints if name in values})


# ------------------------------------------------------------------------------------------- runs
def provenance() -> dict:
    """How a result was made: command, git commit, versions."""
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True,
                                text=True, check=True, timeout=10).stdout.strip()
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "tokenizers", "bitsandbytes", "av", "pillow", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"argv": sys.argv, "git_commit": commit, "versions": versions}


# ------------------------------------------------------------------------------------------ names
def drive_of(sequence: str) -> str:
    """The drive of a sequence: zurich_city_14_a, _b and _c are segments of zurich_city_14."""
    return re.sub(r"_[a-z]$", "", sequence)


def duration_of(*texts: str) -> str | None:
    """The window length in the first text that has one: "data/my_dsec_seq_500ms" -> "500ms"."""
    for text in texts:
        lengths = re.findall(r"(?<![A-Za-z0-9.])\d+(?:ms|s)(?![A-Za-z0-9])", text)
        if lengths:
            return lengths[-1]
    return None


# --------------------------------------------------------------------------------------- packages
def install_command(requirements: str) -> str:
    return f"{sys.executable} -m pip install -r {ROOT / requirements}"


def missing_package(error: ModuleNotFoundError) -> str:
    """The ERROR line for a package that is not installed; "" for a module of ours: that is a bug."""
    name = (error.name or "").split(".")[0]
    if not name or (ROOT / f"{name}.py").exists() or (ROOT / name / "__init__.py").exists():
        return ""
    if name in sys.stdlib_module_names:
        return f"ERROR | this Python ({sys.executable}) was built without {name!r}: use another"
    return f"ERROR | the package {name!r} is not installed: {install_command('requirements.txt')}"


def check_packages(requirements: str) -> None:
    """Raise UserError with the packages of a requirements file that are missing in any version."""
    missing, files = [], [ROOT / requirements]
    for file in files:
        for line in file.read_text().splitlines():
            name = re.split(r"[^A-Za-z0-9_.-]", line)[0]
            if line.startswith("-r "):
                files.append(ROOT / line[3:].strip())
            elif name and not is_installed(name):
                missing.append(name)
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; "
                        f"install with: {install_command(requirements)}")


def is_installed(distribution: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(distribution))
    with contextlib.suppress(ModuleNotFoundError):           # on PYTHONPATH alone, without metadata
        return importlib.util.find_spec(distribution.replace("-", "_")) is not None
    return False


def check_python() -> None:
    """An ERROR line instead of the traceback that an older Python would end in, sooner or later."""
    if sys.version_info < PYTHON_WANTED:
        wanted = ".".join(map(str, PYTHON_WANTED))
        version = sys.version.split()[0]
        log(f"ERROR | this is Python {version} ({sys.executable}), wanted {wanted} or newer")
        sys.exit(2)


def end_with_a_line(kind, error, trace) -> None:
    """sys.excepthook: a package that a program's first imports miss is one ERROR line and exit 2."""
    if issubclass(kind, ModuleNotFoundError) and (line := missing_package(error)):
        log(line)
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


check_python()
sys.excepthook = end_with_a_line


def main() -> None:
    if len(sys.argv) != 2 or not (ROOT / sys.argv[1]).is_file():
        raise UserError("usage: python base.py requirements.txt")
    check_packages(sys.argv[1])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        log(f"ERROR | {error}")
        sys.exit(2)
