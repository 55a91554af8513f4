"""What the programs share and no model: log, errors, flags, whole-file writes, task folders, pair files.

    python base.py requirements.txt     which packages of a requirements file can't be imported; exit 2 if any

Nothing here imports torch, transformers, av or matplotlib, so `--help` of every program stays quick.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import numpy as np
except ModuleNotFoundError:       # so that check_packages below can name it with the others
    np = None

ROOT = Path(__file__).resolve().parent

# Distributions whose import name differs from the name that pip knows.
IMPORT_NAMES = {"pillow": "PIL", "protobuf": "google.protobuf"}


# ----------------------------------------------------------------------------------- log and errors
class UserError(Exception):
    """What the user can put right: the message says what was found, what was wanted and what to do."""


def now() -> str:
    """Local time, as the log and every result say it: 2026-01-28 02:07:11."""
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"


def log(message: str) -> None:
    """Print one whole, timestamped, flushed line; ids and paths from files can't break it in two."""
    print(f"[{now()}] {' '.join(str(message).splitlines())}", flush=True)


def run(main: Callable[[], None]) -> None:
    """Call main(). A UserError becomes one ERROR line and exit 2; a bug keeps its traceback.

    A package that is not installed counts as the user's to put right. SIGTERM leaves through `finally`, so
    that no temporary file stays behind (Python's default would end the process at once).
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except UserError as error:
        log(f"ERROR | {error}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name and (ROOT / error.name.split(".")[0]).with_suffix(".py").exists():
            raise  # a file of ours: a bug
        log(f"ERROR | the package {error.name!r} is not installed: {install_command('requirements.txt')}")
        sys.exit(2)
    except KeyboardInterrupt:
        log("ERROR | interrupted")
        sys.exit(130)


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


# ---------------------------------------------------------------------------------- config -> flags
def option(default, help: str):
    """A config field with its help text; the default is what the program does when you say nothing."""
    return dataclasses.field(default=default, metadata={"help": help})


def required(help: str, positional: bool = False):
    """A config field that has no default: a flag that must be given, or a bare value if positional."""
    return dataclasses.field(metadata={"help": help, "positional": positional})


def check_counts(config, counts: tuple[str, ...], or_all: tuple[str, ...] = ()) -> None:
    """These flags must be 1 or more; those in `or_all` may also be -1, for all. A UserError names the first wrong."""
    for name in (*counts, *or_all):
        if getattr(config, name) < 1 and not (name in or_all and getattr(config, name) == -1):
            otherwise = ", or -1 for all" if name in or_all else ""
            raise UserError(f"--{name} must be 1 or more{otherwise}, got {getattr(config, name)}")


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


# -------------------------------------------------------------------------------------------- files
def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call write(temporary path), then rename: readers see the old file or the new one, never half of one.

    The temporary name keeps the suffix, because some writers (matplotlib) choose the format by it.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, results: dict) -> None:
    """What a program measured; a figure that is no number is a bug and is refused."""
    write_text(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


def make_folder(path: Path) -> Path:
    """Make the folder (and its parents) and prove that a file can be written there; a UserError if not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"can't write to the folder {path}: {error.strerror}; choose another folder or "
                        "mend its rights") from error
    return path


def new_task_folder(task_dir: Path, task_name: str) -> Path:
    """Make {task_dir}/{task_name}_{YYYYMMDD}_{HHMMSS}, always a new one."""
    make_folder(task_dir)
    while True:
        folder = task_dir / f"{task_name}_{datetime.datetime.now():%Y%m%d_%H%M%S}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        time.sleep(0.2)  # two runs started in the same second


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


# --------------------------------------------------------------------------------------- pair files
@dataclasses.dataclass(frozen=True)
class Pairs:
    """N pairs of answers as flat arrays: the tokens of pair i are draft[draft_start[i]:draft_start[i + 1]].

    Generated tokens only: no prompt, no BOS; EOS where the model produced it. Flat int32, because a million
    pairs as Python lists would take gigabytes.
    """

    draft: np.ndarray                # (all draft tokens,) int32
    draft_start: np.ndarray          # (N + 1,) int64
    target: np.ndarray               # (all target tokens,) int32
    target_start: np.ndarray         # (N + 1,) int64
    sequence: list[str]              # N recording names ("" where the file says none), e.g. zurich_city_14_a
    clip: list[int | str]            # N clip numbers within the sequence
    files: list[dict]                # per file: path, format, rows, used, dropped and flagged {reason: n}
    vocab_size: int | None = None    # of the models, where the files record it

    def __len__(self) -> int:
        return len(self.sequence)

    def lengths(self, which: typing.Literal["draft", "target"]) -> np.ndarray:
        """(N,) int64 tokens in each answer."""
        return np.diff(getattr(self, f"{which}_start"))

    def padded(self, which: typing.Literal["draft", "target"], width: int) -> np.ndarray:
        """(N, width) int32: the answers cut at `width`, filled up with 0. Lengths say where each one ends."""
        flat, start = getattr(self, which), getattr(self, f"{which}_start")
        lengths = np.minimum(np.diff(start), width)
        inside = np.arange(width) < lengths[:, None]
        out = np.zeros((len(self), width), np.int32)
        out[inside] = flat[(start[:-1, None] + np.arange(width))[inside]]
        return out

    def answers(self, which: typing.Literal["draft", "target"]) -> Iterator[list[int]]:
        """The token lists of all pairs, one after the other."""
        flat, start = getattr(self, which), getattr(self, f"{which}_start")
        return (flat[a:b].tolist() for a, b in itertools.pairwise(start))

    def select(self, rows: np.ndarray) -> Pairs:
        """The pairs at these row numbers, in that order."""
        parts = {}
        for which in ("draft", "target"):
            flat, start = getattr(self, which), getattr(self, f"{which}_start")
            chosen = [flat[start[i]:start[i + 1]] for i in rows]
            parts[which] = np.concatenate(chosen) if chosen else flat[:0]
            parts[f"{which}_start"] = _starts([len(answer) for answer in chosen])
        return dataclasses.replace(self, **parts, sequence=[self.sequence[i] for i in rows],
                                   clip=[self.clip[i] for i in rows])

    def largest_ids(self) -> list[tuple[int, str]]:
        """(largest id, path) of each file they were read from, for an error that names the file."""
        found, first = [], 0
        for file in self.files:
            last = first + file["used"]
            draft = self.draft[self.draft_start[first]:self.draft_start[last]]
            target = self.target[self.target_start[first]:self.target_start[last]]
            found.append((int(max(draft.max(initial=-1), target.max(initial=-1))), file["path"]))
            first = last
        return found


def _starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def drive_of(sequence: str) -> str:
    """zurich_city_14_a, _b and _c are segments of one drive, zurich_city_14: they may not be split apart."""
    return re.sub(r"_[a-z]$", "", sequence)


def read_json(path: Path):
    """The file's JSON value; a UserError that says what is wrong with it otherwise."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path} is not JSON: {error}") from error


def _answers(row: dict, form: str) -> tuple:
    """(draft tokens, draft text, target tokens, target text) of one row; None where the row lacks them."""
    if form == "extraction":
        return row.get("egpt_tokens"), row.get("egpt_text"), row.get("vl_tokens"), row.get("vl_text")
    if form == "benchmark":
        answers = []
        for model in ("eventgpt", "videollava"):
            answer = row.get(model) if isinstance(row.get(model), dict) else {}
            answers += [answer.get("output_tokens"), answer.get("output_text")]
        return tuple(answers)
    target, text = row.get("videollava_token_ids"), row.get("videollava")
    if target is None:                                  # older files, whose target was LLaVA-1.5
        target, text = row.get("llava_token_ids"), row.get("llava-1.5-7b-hf")
    return row.get("egpt_token_ids"), row.get("egpt"), target, text


def _format_of(rows: list) -> str | None:
    """Which of the three formats the first row with tokens is in, told by its keys."""
    for row in rows:
        for form in ("extraction", "benchmark", "inference"):
            if isinstance(row, dict) and None not in (_answers(row, form)[0], _answers(row, form)[2]):
                return form
    return None


def _why_unusable(tokens, text) -> str | None:
    """Why one answer can't be used, or None."""
    if not isinstance(tokens, list):
        return "no token list"
    if not all(type(token) is int for token in tokens):
        return "token ids that are not whole numbers"
    if tokens and (min(tokens) < 0 or max(tokens) >= 2**31):
        return "negative or absurd token ids"
    if tokens[:1] == [1] and len(tokens) > 1:
        return "prompt included (starts with BOS)"
    # A LLaMA token never spans white space, so a text of n words has at least n tokens.
    if isinstance(text, str) and len(text.split()) > len(tokens):
        return "fewer tokens than words in the text"
    return None


def _is_degenerate(tokens: list[int]) -> bool:
    """One id makes up most of the answer, as in a decoding loop gone wrong; real answers stay far below."""
    return len(tokens) >= 8 and max(collections.Counter(tokens).values()) > len(tokens) / 2


def _usable_rows(path: Path, report: dict) -> Iterator[tuple[list[int], list[int], str, int | str]]:
    """Yield (draft, target, sequence, clip) for each usable row of one file; count the others in `report`."""
    data = read_json(path)
    rows = data if isinstance(data, list) else data.get("results") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no pairs: wanted a list of rows or an object with a list 'results'")
    if not rows:
        errors = data.get("errors") if isinstance(data, dict) else None
        first = ""
        if isinstance(errors, list) and errors:
            first = f"; it lists {len(errors)} errors, the first: {json.dumps(errors[0])[:200]}"
        raise UserError(f"{path} has no usable rows: its list of results is empty{first}")
    report.update(rows=len(rows), format=_format_of(rows))
    if isinstance(data, dict):
        recorded = ("vocab_size", "dataset_dir", "dataset_name")
        report.update({key: data[key] for key in recorded if key in data})
        models = data.get("models") if isinstance(data.get("models"), dict) else {}
        report["models"] = {which: {key: found[key] for key in ("name", "revision", "vocab_size") if key in found}
                            for which, found in models.items() if isinstance(found, dict)}
    if report["format"] is None:
        raise UserError(f"{path} has no usable rows: none of its {len(rows)} rows has tokens under the keys "
                        "of the formats extraction (egpt_tokens, vl_tokens), benchmark (eventgpt.output_tokens, "
                        "videollava.output_tokens) or inference (egpt_token_ids, videollava_token_ids)")
    seen = set()
    for row in rows:
        row = row if isinstance(row, dict) else {}
        draft, draft_text, target, target_text = _answers(row, report["format"])
        why = _why_unusable(draft, draft_text) or _why_unusable(target, target_text)
        if not why and not target:
            why = "empty target"
        if why:
            report["dropped"][why] += 1
            continue
        key = (row.get("sample_idx"), row.get("question_idx")) if "sample_idx" in row else row.get("id")
        if isinstance(key, (str, tuple)) and repr(key) in seen:
            report["dropped"]["duplicate row"] += 1
            continue
        seen.add(repr(key))
        report["flagged"]["one id repeated"] += _is_degenerate(draft) or _is_degenerate(target)
        report["flagged"]["empty draft"] += not draft
        report["flagged"]["target under 4 tokens"] += len(target) < 4
        where = row.get("event_data")                   # interlaken_00_c/000000.npy
        where = where if isinstance(where, str) else ""
        sequence = row.get("sequence")
        if not isinstance(sequence, str):
            sequence = str(Path(where).parent) if "/" in where else ""
        clip = str(row.get("clip", Path(where).stem))
        yield draft, target, sequence, int(clip) if clip.isascii() and clip.isdigit() else clip


def load_pairs(paths: list[Path]) -> Pairs:
    """Read pair files of any of the three formats (told apart by content) into one set of pairs.

    Rows that can't be used are dropped, suspicious ones kept; both are counted by reason, logged and returned
    in `files`. Raises UserError for a file without any usable row.
    """
    draft, target = np.zeros(0, np.int32), np.zeros(0, np.int32)
    draft_lengths, target_lengths, sequence, clip, files, sizes = [], [], [], [], [], []
    for path in paths:
        report = {"path": str(path), "format": None, "rows": 0, "used": 0,
                  "dropped": collections.Counter(), "flagged": collections.Counter()}
        drafts, targets = [], []
        for one_draft, one_target, one_sequence, one_clip in _usable_rows(path, report):
            drafts.append(np.array(one_draft, np.int32))
            targets.append(np.array(one_target, np.int32))
            sequence.append(sys.intern(one_sequence))
            clip.append(one_clip)
        report["used"] = len(targets)
        reasons = ", ".join(f"{n} x {why}" for why, n in report["dropped"].items())
        if not targets:
            raise UserError(f"{path} has no usable rows: {report['rows']} rows, all dropped ({reasons})")
        log(f"data | {path} | {report['format']} | {report['used']} of {report['rows']} rows used"
            + (f" | dropped {reasons}" if reasons else ""))
        for flag, n in report["flagged"].items():
            if n:
                log(f"data | WARNING | {path} | {n} of {report['used']} rows: {flag}")
        draft_lengths += map(len, drafts)
        target_lengths += map(len, targets)
        draft, target = np.concatenate([draft, *drafts]), np.concatenate([target, *targets])
        if isinstance(report.get("vocab_size"), int):
            sizes.append(report["vocab_size"])
        flagged = {flag: n for flag, n in report["flagged"].items() if n}
        files.append({**report, "dropped": dict(report["dropped"]), "flagged": flagged})
    return Pairs(draft, _starts(draft_lengths), target, _starts(target_lengths), sequence, clip, files,
                 max(sizes, default=None))


def duration_of(*texts: str) -> str | None:
    """The window length that the first of these texts names: "data/my_egpt_dsec_seq_500ms" -> "500ms"."""
    for text in texts:
        found = re.findall(r"(?<![A-Za-z0-9.])\d+(?:ms|s)(?![A-Za-z0-9])", text)
        if found:
            return found[-1]
    return None


# ----------------------------------------------------------------------------------------- packages
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
