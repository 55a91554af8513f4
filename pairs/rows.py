"""JSON files of rows, read and written as a stream where each row is a line of its own.

Three layouts, told apart by their first lines:

    ours          an object whose list "results" holds one row a line, as write_rows writes it
    JSON Lines    one object a line and nothing around them
    any other     a list of rows, or an object with the list "results", in any Unicode encoding

The first two need memory for one row at a time. Any other file goes through json.loads as a whole
and takes about eight times its size in memory (25 times when it is made to), so its size is bounded
by MAX_WHOLE.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from base import Progress, UserError
from machine.files import check_format, check_plain, not_json, write_whole

FORMAT = 1              # of the files that write_rows writes; a file without the number counts as 0
# bytes of a file that is not one row a line: about 100,000 rows of 50 + 50 tokens
MAX_WHOLE = 2**27
MAX_LINE = 2**24        # bytes of one row: two answers of 32,768 tokens with their texts take 1 MiB
MAX_AROUND = 2**26       # bytes before the rows, and behind them: settings, questions, failed clips
BEGIN_ROWS, END_ROWS = b' "results": [\n', b" ],\n"
BOM = b"\xef\xbb\xbf"          # a UTF-8 file may begin with it


class _OtherLayout(Exception):
    """The file is not one row a line, or it is damaged: json.loads decides which."""


class JsonRows:
    """Iterates over the rows of a JSON file; `beside` holds the other keys of the object.

    Keys before the rows are in `beside` from the first row on, keys behind them when the rows are
    exhausted. The size of the file when it is opened is final: what is appended later is not read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.beside: dict = {}
        self.has_rows = False                   # whether the file holds a list of rows at all

    def __iter__(self) -> Iterator:
        check_plain(self.path)
        try:
            with open(self.path, "rb") as file:
                yield from self._rows(file, os.fstat(file.fileno()).st_size)
        except FileNotFoundError as error:
            raise UserError(f"no such file: {self.path}") from error
        except OSError as error:
            raise UserError(f"can't read {self.path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # of the text: an integer of 5,000 digits too
            raise not_json(self.path, error) from error

    def _rows(self, file: BinaryIO, size: int) -> Iterator:
        count, progress = 0, Progress(f"data | {self.path}", size // 2**20 + 1, unit="MiB")
        try:
            for row in self._streamed(_lines(file, size, progress)):
                yield row
                count += 1
        except _OtherLayout as reason:
            if size > MAX_WHOLE:
                raise UserError(
                    f"{self.path} has {size / 2**20:.0f} MiB and can't be read row by row "
                    f"({reason}); wanted one row a line, as extract_tokens_train.py writes them or "
                    f"as JSON Lines, or at most {MAX_WHOLE // 2**20} MiB") from None
            file.seek(0)
            yield from self._whole(file.read(size))[count:]

    # ------------------------------------------------------------------------------- one row a line
    def _streamed(self, lines: Iterator[bytes]) -> Iterator:
        first = next(lines, b"").removeprefix(BOM)
        if first == b"{\n":
            return self._our_rows(first, lines)
        return self._json_lines(first, lines)

    def _our_rows(self, first: bytes, lines: Iterator[bytes]) -> Iterator:
        head = _up_to(BEGIN_ROWS, first, lines)
        self._take_beside(_around(head + b"]}"))
        self.has_rows = comma = True            # comma: another row must follow
        for number, line in enumerate(lines):
            if line == END_ROWS and not (comma and number):
                break
            text = line.rstrip(b" \r\n")
            row = _row(text.removesuffix(b","))
            if not comma:
                raise _OtherLayout("a comma is missing between two rows")
            comma = text.endswith(b",")
            yield row
        tail = _up_to(None, END_ROWS, lines)
        self._take_beside(_around(head + tail))

    def _json_lines(self, first: bytes, lines: Iterator[bytes]) -> Iterator:
        row = _row(first)
        second = next(lines, None)
        is_alone = second is None and self.path.suffix != ".jsonl"
        if not isinstance(row, dict) or "results" in row or is_alone:
            raise _OtherLayout("its first line is no row")
        self.has_rows = True
        yield row
        for number, line in enumerate(itertools.chain([second or b""], lines), 2):
            if line.strip():
                try:
                    row = _row(line)
                except _OtherLayout as error:
                    text = f"as JSON Lines it has an error in line {number}: {error}"
                    raise ValueError(text) from None
                yield row

    # ------------------------------------------------------------------------------- the whole file
    def _whole(self, content: bytes) -> list:
        # UTF-8, UTF-16 or UTF-32, told by its first bytes
        value = json.loads(content, object_pairs_hook=_once)
        if isinstance(value, dict):
            value = self._take_beside(value)
        self.has_rows = isinstance(value, list)
        return value if self.has_rows else []

    def _take_beside(self, value: dict):
        """Keep the keys of the object around the rows -> the value of "results"."""
        rows = value.pop("results", None)
        number = value.get("format")
        # others may mean anything by it
        check_format(self.path, number if type(number) is int else None, FORMAT)
        self.beside = value
        return rows


def _lines(file: BinaryIO, size: int, progress: Progress) -> Iterator[bytes]:
    """The lines of the first `size` bytes of the file."""
    left, number, next_update = size, 0, size
    while left > 0 and (line := file.readline(min(left, MAX_LINE + 1))):
        left, number = left - len(line), number + 1
        if len(line) > MAX_LINE:
            raise _OtherLayout(f"line {number} has more than {MAX_LINE // 2**20} MiB")
        if left <= next_update:
            progress.update((size - left) // 2**20)
            next_update = left - 2**16
        yield line


def _up_to(last: bytes | None, first: bytes, lines: Iterator[bytes]) -> bytes:
    """The first line and those that follow it, up to the line `last` or the end of the file."""
    text = bytearray(first)
    for line in lines:
        text += line
        if line == last:
            return bytes(text)
        if len(text) > MAX_AROUND:
            raise _OtherLayout(f"more than {MAX_AROUND // 2**20} MiB around the rows")
    if last is not None:
        raise _OtherLayout(f"no line {last.decode().strip()!r}")
    return bytes(text)


def _parsed(text: bytes, decode: Callable[[str], Any]):
    """The JSON value of a row, or of the object around the rows."""
    try:
        return decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise _OtherLayout(str(error)) from error


def _once(items: list[tuple]) -> dict:
    """An object with "results" once at most: of two, json would silently take the last."""
    if sum(key == "results" for key, _ in items) > 1:
        raise ValueError("the key 'results' occurs twice")
    return dict(items)


_row = functools.partial(_parsed, decode=json.JSONDecoder().decode)
_around = functools.partial(_parsed, decode=json.JSONDecoder(object_pairs_hook=_once).decode)


def write_rows(path: Path, head: dict, rows: Iterable[dict], failed: list[dict]) -> None:
    """Write a pair file as a stream: format number, head, one row a line in `results`, `failed`."""
    def write(temporary: Path) -> None:
        # A lone surrogate, which a file name may hold, is written as JSON's own escape: \\ud83d.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            head_text = json.dumps({"format": FORMAT, **head}, indent=1).removesuffix("\n}")
            file.write(head_text + ",\n" + BEGIN_ROWS.decode().rstrip())
            for number, row in enumerate(rows):
                file.write((",\n" if number else "\n") + json.dumps(row, ensure_ascii=False))
            file.write("\n" + END_ROWS.decode())
            file.write(' "failed": [' + ",\n".join(map(json.dumps, failed)) + "]\n}\n")

    write_whole(path, write)
