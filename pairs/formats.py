"""Pairs of answers: the files that hold them, read and written row by row, and their tokens as flat arrays.

A million pairs fit: json.load of such a file takes some twenty times the memory of its tokens, so no file is ever in
memory as a whole, and no answer as a Python list for longer than it is looked at. Imports no torch.
"""

from __future__ import annotations

import array
import codecs
import collections
import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from base import Progress, UserError, drive_of, log
from machine.files import check_plain, not_json, write_whole

Which = Literal["draft", "target"]
FORMATS = ("extraction", "benchmark", "inference")
RECORDED = {"vocab_size": int, "dataset_dir": str, "dataset_name": str}      # what a file may say of all its rows
MAX_ANSWER = 2**15             # tokens; the models' contexts have 4096 positions
MAX_DIGITS = 18                # of a clip's number; a longer one is a name
BLOCK = 2**13                  # pairs that are worked on at a time where an array of all would be large
CHUNK = 2**20                  # bytes read at a time
CUT = 16                       # a value that is cut fails so close to the cut: -Infinity has 9 letters, \u12ab 6
AFTER = 3                      # letters wanted after a value: "12" may go on as "12e+3", of which "12" is valid alone
WHITE_SPACE = re.compile(r"[ \t\n\r]*")


# ---------------------------------------------------------------------------------------------------- tokens
@dataclasses.dataclass(frozen=True)
class Pairs:
    """N pairs of answers; the tokens of pair i are draft[draft_start[i]:][:draft_length[i]], the target's likewise.

    Generated tokens only: no prompt, no BOS; EOS where the model produced it. The flat arrays are those of all pairs
    that were read, and whatever is selected from them shares them: a flat array may hold tokens of other pairs.
    """

    draft: np.ndarray                # (all draft tokens,) int32
    draft_start: np.ndarray          # (N,) int64
    draft_length: np.ndarray         # (N,) int32
    target: np.ndarray               # (all target tokens,) int32
    target_start: np.ndarray         # (N,) int64
    target_length: np.ndarray        # (N,) int32
    sequence: list[str]              # N recording names ("" where the file says none), e.g. zurich_city_14_a
    clip: list[int | str]            # N clip numbers within the sequence
    files: list[dict]                # per file: path, format, rows, used, largest_id, dropped and flagged {reason: n}
    vocab_size: int | None = None    # of the models, where the files record it

    def __len__(self) -> int:
        return len(self.sequence)

    def lengths(self, which: Which) -> np.ndarray:
        """(N,) int64 tokens in each answer."""
        return getattr(self, f"{which}_length").astype(np.int64)

    def padded(self, which: Which, width: int) -> np.ndarray:
        """(N, width) int32: the answers cut at `width`, filled up with 0. Lengths say where each one ends.

        Takes five times its own size for a moment: for very many pairs go through `parts`.
        """
        flat, start, length = self._flat(which)
        inside = np.arange(width) < length[:, None]
        out = np.zeros((len(self), width), np.int32)
        out[inside] = flat[(start[:, None] + np.arange(width))[inside]]
        return out

    def answer(self, which: Which, number: int) -> list[int]:
        """The tokens of one answer."""
        flat, start, length = self._flat(which)
        return flat[start[number]:start[number] + length[number]].tolist()

    def answers(self, which: Which) -> Iterator[list[int]]:
        """The token lists of all pairs, one after the other."""
        return (tokens.tolist() for tokens in self.views(which))

    def views(self, which: Which) -> Iterator[np.ndarray]:
        """The same as int32 arrays that share the memory."""
        flat, start, length = self._flat(which)
        return (flat[first:first + count] for first, count in zip(start, length))

    def ids(self, which: Which) -> np.ndarray:
        """The distinct token ids of these answers, in order, int32."""
        found = np.zeros(0, np.int32)
        for part in self.parts():
            found = np.union1d(found, np.concatenate(list(part.views(which))))
        return found

    def select(self, rows: np.ndarray) -> Pairs:
        """The pairs at these row numbers, in that order. No token is copied."""
        rows = np.asarray(rows, np.int64)
        parts = {name: getattr(self, name)[rows]
                 for name in ("draft_start", "draft_length", "target_start", "target_length")}
        return dataclasses.replace(self, **parts, sequence=[self.sequence[i] for i in rows],
                                   clip=[self.clip[i] for i in rows])

    def parts(self, size: int = BLOCK) -> Iterator[Pairs]:
        """All pairs in their order, so many at a time."""
        return (self.select(np.arange(first, min(first + size, len(self)))) for first in range(0, len(self), size))

    def largest_ids(self) -> list[tuple[int, str]]:
        """(largest id, path) of each file they were read from, for an error that names the file."""
        return [(file["largest_id"], file["path"]) for file in self.files]

    def _flat(self, which: Which) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return getattr(self, which), getattr(self, f"{which}_start"), getattr(self, f"{which}_length")


def numbered(names: list[str]) -> tuple[list[str], np.ndarray]:
    """(the distinct names, sorted; (N,) int64: which of them each row has)."""
    distinct = sorted(set(names))
    number = {name: i for i, name in enumerate(distinct)}
    return distinct, np.fromiter(map(number.__getitem__, names), np.int64, len(names))


def numbered_drives(sequences: list[str]) -> tuple[list[str], np.ndarray]:
    """The same of the drives that these recordings belong to."""
    names, sequence = numbered(sequences)
    drives, drive = numbered([drive_of(name) for name in names])
    return drives, drive[sequence]


def digest(data: bytes | np.ndarray) -> int:
    """64 bits that stand for these bytes: that any two of a million different ones meet has a chance of 3 in 10^8."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# ------------------------------------------------------------------------------------------- JSON as a stream
class JsonRows:
    """The rows of a JSON file, one at a time: a list, or the list under the key "results" of an object.

    What else the object says, before or after its rows, is in `beside` once the rows have been walked through.
    """

    def __init__(self, path: Path, chunk: int | None = None):
        self.path, self.chunk = path, chunk or CHUNK
        self.beside: dict = {}
        self.has_rows = False                   # whether there is a list of rows at all
        self.decode = json.JSONDecoder().raw_decode
        self.to_text = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.ended = "", 0, False            # what was read last, and how far it is used
        self.bytes_read = 0
        self.before, self.lines, self.newline = 0, 0, -1         # letters and lines given up, the last line's start

    def __iter__(self) -> Iterator:
        check_plain(self.path)
        try:
            with open(self.path, "rb") as self.file:
                size = os.fstat(self.file.fileno()).st_size // 2**20 + 1
                self.progress = Progress(f"data | {self.path}", size, unit="MiB")
                yield from self._rows()
        except FileNotFoundError as error:
            raise UserError(f"no such file: {self.path}") from error
        except OSError as error:
            raise UserError(f"can't read {self.path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:            # of the text alone: an int of 5,000 digits too
            raise not_json(self.path, error) from error

    def _rows(self) -> Iterator:
        kind = self._next()
        if kind == "\ufeff":
            raise self._error("Unexpected UTF-8 BOM (decode using utf-8-sig)", self.at)
        if kind == "[":
            yield from self._items()
        elif kind == "{":
            for key in self._keys():
                if key != "results":
                    self.beside[key] = self._value()
                elif self.has_rows:
                    raise self._error("the key 'results' stands there twice", self.at)
                elif self._next() == "[":
                    yield from self._items()
                else:
                    self._value()
        else:
            self._value()
        if self._next():
            raise self._error("Extra data", self.at)

    def _items(self) -> Iterator:
        self.has_rows = True
        self.at += 1
        if self._next() == "]":
            self.at += 1
            return
        while True:
            yield self._value()
            if self._goes_on("]"):
                return

    def _keys(self) -> Iterator[str]:
        """Each key of an object, with its value next; whoever asks takes that before the next key."""
        self.at += 1
        if self._next() == "}":
            self.at += 1
            return
        while True:
            if self._next() != '"':
                raise self._error("Expecting property name enclosed in double quotes", self.at)
            key = self._value()
            if self._next() != ":":
                raise self._error("Expecting ':' delimiter", self.at)
            self.at += 1
            yield key
            if self._goes_on("}"):
                return

    def _goes_on(self, end: str) -> bool:
        """Step over the comma or the end that must come now: whether it was the end."""
        found = self._next()
        if found not in (",", end):
            raise self._error("Expecting ',' delimiter", self.at)
        self.at += 1
        return found == end

    def _next(self) -> str:
        """The next letter that is no white space, "" at the end of the file."""
        while True:
            self.at = WHITE_SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at:self.at + 1]
            self._read()

    def _value(self):
        """The value that stands next, however long; a cut one is tried again with more of the file."""
        self._next()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - CUT
                if self.ended or not cut:
                    raise self._error(error.msg, error.pos) from error
            except ValueError as error:
                raise self._error(str(error), self.at) from error
            else:
                if self.ended or len(self.text) - end >= AFTER:
                    self.at = end
                    return value
            self._read()

    def _read(self) -> None:
        """Give up what was used and read on: as much again as is left, so that one long value is tried few times."""
        self.lines += self.text.count("\n", 0, self.at)
        newline = self.text.rfind("\n", 0, self.at)
        self.newline = self.newline if newline == -1 else self.before + newline
        self.before += self.at
        self.text, self.at = self.text[self.at:], 0
        chunk, waiting = self.file.read(max(self.chunk, len(self.text))), len(self.to_text.getstate()[0])
        try:
            self.text += self.to_text.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(f"'utf-8' codec can't decode byte 0x{error.object[error.start]:02x} in position "
                             f"{self.bytes_read - waiting + error.start}: {error.reason}") from error
        self.bytes_read, self.ended = self.bytes_read + len(chunk), not chunk
        if self.bytes_read // 2**20 < self.progress.total:
            self.progress.update(self.bytes_read // 2**20)

    def _error(self, message: str, at: int) -> ValueError:
        """An error that says where in the file, in json's words."""
        newline = self.text.rfind("\n", 0, at)
        newline = self.newline if newline == -1 else self.before + newline
        line = self.lines + self.text.count("\n", 0, at) + 1
        return ValueError(f"{message}: line {line} column {self.before + at - newline} (char {self.before + at})")


def write_rows(path: Path, head: dict, rows: Iterable[dict], failed: list[dict]) -> None:
    """A pair file, whole, as a stream: the head (never empty), one row a line in `results`, then `failed`."""
    def write(temporary: Path) -> None:
        # Half a character, as a name may hold one, gets JSON's own escape: \\ud83d.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(head, indent=1).removesuffix("\n}") + ',\n "results": [')
            for number, row in enumerate(rows):
                file.write((",\n" if number else "\n") + json.dumps(row, ensure_ascii=False))
            file.write("\n ],\n \"failed\": [" + ",\n".join(json.dumps(entry) for entry in failed) + "]\n}\n")

    write_whole(path, write)


# ------------------------------------------------------------------------------------------------- pair files
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


def _format_of(row: dict) -> str | None:
    """Which of the three formats a row with tokens is in, told by its keys."""
    for form in FORMATS:
        draft, _, target, _ = _answers(row, form)
        if draft is not None and target is not None:
            return form
    return None


def _why_unusable(tokens, text) -> str | None:
    """Why one answer can't be used, or None."""
    if not isinstance(tokens, list):
        return "no token list"
    if len(tokens) > MAX_ANSWER:
        return f"absurdly long (over {MAX_ANSWER} tokens)"
    if not {int}.issuperset(map(type, tokens)):
        return "token ids that are not whole numbers"
    if tokens and (min(tokens) < 0 or max(tokens) >= 2**31):
        return "negative or absurd token ids"
    if tokens[:1] == [1] and len(tokens) > 1:
        return "prompt included (starts with BOS)"
    # A LLaMA token never spans white space, so a text of n words has at least n tokens.
    if isinstance(text, str) and len(text.split()) > len(tokens):
        return "fewer tokens than words in the text"
    return None


def _why_dropped(draft, draft_text, target, target_text) -> str | None:
    return (_why_unusable(draft, draft_text) or _why_unusable(target, target_text)
            or (None if target else "empty target"))


def _is_degenerate(tokens: list[int]) -> bool:
    """One id makes up most of the answer, as in a decoding loop gone wrong; real answers stay far below."""
    few = len(set(tokens)) <= len(tokens) / 2 + 1            # soon told, and true of every such answer
    return few and len(tokens) >= 8 and max(collections.Counter(tokens).values()) > len(tokens) / 2


def _where(row: dict) -> tuple[str, int | str]:
    """(sequence, clip) of a row, from its own keys or from its event path: interlaken_00_c/000000.npy."""
    where = row.get("event_data")
    where = where if isinstance(where, str) else ""
    sequence = row.get("sequence")
    if not isinstance(sequence, str):
        sequence = str(Path(where).parent) if "/" in where else ""
    clip = row.get("clip")
    clip = str(clip) if isinstance(clip, (int, str)) else Path(where).stem
    return sys.intern(sequence), int(clip) if clip.isascii() and clip.isdigit() and len(clip) <= MAX_DIGITS else clip


def _row_key(row: dict) -> int | None:
    """What two rows about the same clip and question have in common; None where a row doesn't say."""
    key = (row.get("sample_idx"), row.get("question_idx")) if "sample_idx" in row else (row.get("id"),)
    kinds = (int, float, str, type(None)) if "sample_idx" in row else str
    return digest(repr(key).encode(errors="surrogatepass")) if all(isinstance(part, kinds) for part in key) else None


def _usable_rows(path: Path, report: dict) -> Iterator[tuple[list[int], list[int], str, int | str]]:
    """Yield (draft, target, sequence, clip) for each usable row of one file; count the others in `report`."""
    rows, seen = JsonRows(path), set()
    # The format is that of the first row with tokens: until it is there, reasons are counted for each.
    early = {form: collections.Counter() for form in FORMATS}
    for row in rows:
        report["rows"] += 1
        row = row if isinstance(row, dict) else {}
        if report["format"] is None:
            report["format"] = _format_of(row)
            if report["format"] is None:
                for form in FORMATS:
                    early[form][_why_dropped(*_answers(row, form))] += 1
                continue
            report["dropped"].update(early[report["format"]])
        draft, _, target, _ = answers = _answers(row, report["format"])
        if why := _why_dropped(*answers):
            report["dropped"][why] += 1
            continue
        if (key := _row_key(row)) is not None:
            if key in seen:
                report["dropped"]["duplicate row"] += 1
                continue
            seen.add(key)
        report["flagged"]["one id repeated"] += _is_degenerate(draft) or _is_degenerate(target)
        report["flagged"]["empty draft"] += not draft
        report["flagged"]["target under 4 tokens"] += len(target) < 4
        yield draft, target, *_where(row)
    _check_and_record(path, rows, report)


def _check_and_record(path: Path, rows: JsonRows, report: dict) -> None:
    """What only the end of a file tells: whether it holds pairs at all, and what it says beside them."""
    if not rows.has_rows:
        raise UserError(f"{path} holds no pairs: wanted a list of rows or an object with a list 'results'")
    if not report["rows"]:
        errors, first = rows.beside.get("errors"), ""
        if isinstance(errors, list) and errors:
            first = f"; it lists {len(errors)} errors, the first: {json.dumps(errors[0])[:200]}"
        raise UserError(f"{path} has no usable rows: its list of results is empty{first}")
    if report["format"] is None:
        raise UserError(f"{path} has no usable rows: none of its {report['rows']} rows has tokens under the keys "
                        "of the formats extraction (egpt_tokens, vl_tokens), benchmark (eventgpt.output_tokens, "
                        "videollava.output_tokens) or inference (egpt_token_ids, videollava_token_ids)")
    report.update({key: rows.beside[key] for key, kind in RECORDED.items() if type(rows.beside.get(key)) is kind})
    models = rows.beside.get("models") if isinstance(rows.beside.get("models"), dict) else {}
    kinds = {"name": str, "revision": str, "vocab_size": int}
    report["models"] = {which: {key: found[key] for key, kind in kinds.items() if type(found.get(key)) is kind}
                        for which, found in models.items() if isinstance(found, dict)}


def _largest(tokens: array.array, first: int) -> int:
    """The largest token from `first` on, -1 if there is none."""
    return int(np.asarray(tokens)[first:].max(initial=-1))       # not kept: an array that numpy looks at can't grow


def load_pairs(paths: list[Path]) -> Pairs:
    """Read pair files of any of the three formats (told apart by content) into one set of pairs.

    Rows that can't be used are dropped, suspicious ones kept; both are counted by reason, logged and returned
    in `files`. Raises UserError for a file without any usable row.
    """
    # These grow in place, by a sixteenth at a time, and numpy then looks at them without a copy.
    draft, target, draft_length, target_length = (array.array("i") for _ in range(4))
    sequence, clip, files, sizes = [], [], [], []
    for path in paths:
        report = {"path": str(path), "format": None, "rows": 0, "used": 0, "largest_id": -1,
                  "dropped": collections.Counter(), "flagged": collections.Counter()}
        first = len(draft), len(target)
        for one_draft, one_target, one_sequence, one_clip in _usable_rows(path, report):
            draft.fromlist(one_draft)
            target.fromlist(one_target)
            draft_length.append(len(one_draft))
            target_length.append(len(one_target))
            sequence.append(one_sequence)
            clip.append(one_clip)
            report["used"] += 1
        report["largest_id"] = max(_largest(draft, first[0]), _largest(target, first[1]))
        reasons = ", ".join(f"{n} x {why}" for why, n in report["dropped"].items())
        if not report["used"]:
            raise UserError(f"{path} has no usable rows: {report['rows']} rows, all dropped ({reasons})")
        log(f"data | {path} | {report['format']} | {report['used']} of {report['rows']} rows used"
            + (f" | dropped {reasons}" if reasons else ""))
        for flag, n in report["flagged"].items():
            if n:
                log(f"data | WARNING | {path} | {n} of {report['used']} rows: {flag}")
        if isinstance(report.get("vocab_size"), int):
            sizes.append(report["vocab_size"])
        flagged = {flag: n for flag, n in report["flagged"].items() if n}
        files.append({**report, "dropped": dict(report["dropped"]), "flagged": flagged})
    answers = []
    for flat, length in ((draft, draft_length), (target, target_length)):
        length = np.asarray(length)
        answers += [np.asarray(flat), np.cumsum(length, dtype=np.int64) - length, length]
    return Pairs(*answers, sequence, clip, files, max(sizes, default=None))
