"""A journal file: JSON values, appended one a line, that outlive a crash at any moment.

    {"format": 2, "run": "9f3c...", ..., "crc": 1234}  first line: what all further lines belong to
    {..., "of": 1234, "crc": 5678}                     of: the checksum of the first line

    file = JournalFile(path, is_entry)
    places = list(file.lines())         # (offset, value) of an earlier run; file.head: the first line
    file.begin({"settings": ...})       # drops what is torn, damaged or of another run
    offsets = file.append([{...}, {...}])
    value = file.read(offsets[0])

Knows nothing of what the values mean. Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from base import UserError, log
from machine.files import check_format, check_plain, write_whole

FORMAT = 2                     # format 1 had neither a format number, nor "run", nor "of"
CRC = b', "crc": '             # in front of each line's checksum, its last item
BEGINNINGS = (b'{"format": ', b'{"settings": ')              # of a first line: now, and in format 1
# Longer lines are damage. An answer of 2^15 tokens takes 3 MiB, the digests of a million clips 100
# MiB.
MAX_LINE, MAX_FIRST_LINE = 2**24, 2**28
START_AFRESH = "start afresh with --restart"


@dataclasses.dataclass
class Counts:
    """What a pass over a journal file has met."""

    good: int = 0                  # lines that belong to the first line
    damaged: int = 0
    foreign: int = 0               # whole lines that belong to another first line
    end: int = 0                   # bytes up to the end of the last good line
    bad_inside: bool = False       # whether a bad line stands in front of a good one


class JournalFile:
    """One journal on the disk, written by one process at a time (machine.files.only_writer)."""

    writer: io.FileIO              # both are opened by `begin`
    reader: BinaryIO

    def __init__(self, path: Path, is_entry: Callable[[dict], bool]):
        """is_entry: whether a value is of a kind that this journal holds behind its first line."""
        check_plain(path, follow=False)
        self.path, self.is_entry = path, is_entry
        self.head: dict = {}                  # the first line's value; empty: there is none yet
        self.checksum = 0                     # of the first line
        self.counts = Counts()
        self.opened = contextlib.ExitStack()

    # ------------------------------------------------------------------------------------- opening
    def lines(self) -> Iterator[tuple[int, dict]]:
        """Read the first line into `head`, then yield (offset, value) of each good line.

        Changes nothing on the disk. Raises UserError where nothing tells what the lines belong to.
        """
        self.head, self.counts = {}, Counts()
        if not self.path.exists():
            return
        with open(self.path, "rb", buffering=2**16) as file:
            size = os.fstat(file.fileno()).st_size            # what is appended later is not read
            first = file.readline(min(size, MAX_FIRST_LINE))
            if not self._read_first(first, size):
                return
            offset = self.counts.end = len(first)
            while offset < size:
                line = file.readline(min(size - offset, MAX_LINE))      # a longer line: in parts
                if not line:               # its writer cut off what it had not finished
                    break
                if (value := self._judge(line, offset)) is not None:
                    yield offset, value
                offset += len(line)
                if len(line) == MAX_LINE:
                    offset = file.seek(next_data(file, offset, size))
        if self.counts.foreign and not self.counts.good:
            raise UserError(
                f"{self.path}: none of its {self.counts.foreign} lines belongs to its first line, "
                f"which is of another run; put the right first line back, or {START_AFRESH}")

    def _read_first(self, line: bytes, size: int) -> bool:
        """Take the first line; False for one that the machine did not finish."""
        head = value_of(line)
        if head is None or "of" in head:
            if len(line) == size and is_unfinished(line):
                return False
            raise UserError(f"{self.path}: the first line of this journal is damaged, so nobody "
                            f"knows what its lines belong to; {START_AFRESH}")
        check_format(self.path, head.get("format"), FORMAT)
        self.head, self.checksum = head, checksum_of(line)
        return True

    def _judge(self, line: bytes, offset: int) -> dict | None:
        """The value of a line that belongs to the first; None for any other, which is counted."""
        counts, value = self.counts, value_of(line)
        if value is None:
            counts.damaged += 1
        elif not self._belongs(value):
            counts.foreign += 1
        elif not self.is_entry(value):
            counts.damaged += 1
        else:
            counts.good += 1
            counts.bad_inside = counts.damaged + counts.foreign > 0
            counts.end = offset + len(line)
            return value
        return None

    def _belongs(self, value: dict) -> bool:
        """Whether a line is of this run; takes the mark that says so out of its value."""
        if "format" in self.head:
            return value.pop("of", None) == self.checksum
        # Format 1 marks no line. A second first line shows that files were joined: the rest is
        # another run's.
        return not self.counts.foreign and "of" not in value and "settings" not in value

    def begin(self, head: dict, values: Iterable[dict] = ()) -> bool:
        """Give the file this first line, drop the bad lines, and open it; first read all `lines`.

        values: further lines, for a file that did not exist before; the file is written whole.
        Returns whether the offsets that `lines` gave have changed and must be read again.
        """
        if bad := self.counts.damaged + self.counts.foreign:
            log(f"journal | WARNING | {self.path} | {bad} lines are dropped, to be done again: "
                f"{self.counts.damaged} torn or damaged, {self.counts.foreign} of another run")
        there = {key: value for key, value in self.head.items() if key != "run"}
        anew = there != {"format": FORMAT, **head} or self.counts.bad_inside
        if anew:
            self._write_anew(head, values)
        else:
            os.truncate(self.path, self.counts.end)
        # Without a buffer: what a full disk refuses must not be tried again, later, by close().
        self.writer = self.opened.enter_context(open(self.path, "ab", buffering=0))  # noqa: SIM115
        self.open_reader()
        return anew

    def open_reader(self) -> None:
        """Open the file for `read` alone, after all `lines` were read."""
        self.reader = self.opened.enter_context(open(self.path, "rb"))  # noqa: SIM115

    def _write_anew(self, head: dict, values: Iterable[dict]) -> None:
        """Replace the file by one with this first line, its good lines and these values."""
        # "run" tells the journals of two runs of one command apart: they may differ in the models'
        # weights.
        first = line_of({"format": FORMAT, "run": secrets.token_hex(8), **head})

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                file.write(first)
                for _, value in self.lines():
                    file.write(line_of(value, checksum_of(first)))
                for value in values:
                    file.write(line_of(value, checksum_of(first)))

        write_whole(self.path, write)
        self.head, self.checksum = value_of(first) or {}, checksum_of(first)

    # ---------------------------------------------------------------------------------------- open
    def append(self, values: list[dict]) -> list[int]:
        """Put the values on the disk, all or none; returns the offset of each line.

        Call check_place afterwards.
        """
        lines = [line_of(value, self.checksum) for value in values]
        assert max(map(len, lines), default=0) <= MAX_LINE, max(map(len, lines))
        offsets, offset = [], self.writer.tell()
        self._write(b"".join(lines))
        for line in lines:
            offsets.append(offset)
            offset += len(line)
        return offsets

    def _write(self, data: bytes) -> None:
        """Write all of it, or nothing where a full disk or a signal interrupts."""
        end, left = self.writer.tell(), memoryview(data)
        try:
            while left:
                left = left[self.writer.write(left):]
            os.fsync(self.writer.fileno())
        except BaseException as error:
            with contextlib.suppress(OSError):       # else the next start cuts it off
                self.writer.truncate(end)
                self.writer.seek(end)
            if isinstance(error, OSError):
                error.filename = str(self.path)          # a failed write doesn't say of which file
            raise

    def check_place(self) -> None:
        """A UserError when the path has another file or none: what is written would be lost."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(self.writer.fileno()), os.stat(self.path)):
                return
        raise UserError(f"{self.path} was removed or renamed while this run writes it: put it (or "
                        "its folder) back and give the same command again, which goes on with it")

    def read(self, offset: int) -> dict:
        """The value of the line at this offset."""
        self.reader.seek(offset)
        value = value_of(self.reader.readline(MAX_LINE))
        if value is None or value.pop("of", None) != self.checksum:
            raise UserError(f"{self.path}: a line has changed since it was written; "
                            "the same command, given again, drops it")
        return value

    def close(self) -> None:
        self.opened.close()


def next_data(file: BinaryIO, offset: int, size: int) -> int:
    """The first offset from here on that is in no hole of a sparse file of any size."""
    position = os.lseek(file.fileno(), 0, os.SEEK_CUR)         # the buffered reader counts on it
    try:
        return os.lseek(file.fileno(), offset, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else offset  # nothing but a hole; or not known
    finally:
        os.lseek(file.fileno(), position, os.SEEK_SET)


# ------------------------------------------------------------------------------------------- lines
def line_of(value: dict, of: int | None = None) -> bytes:
    """A line with its checksum. of: the checksum of the first line; None: this is a first line."""
    text = json.dumps(value if of is None else {**value, "of": of}).encode()[:-1]
    return text + CRC + b"%d}\n" % zlib.crc32(text)


def value_of(line: bytes) -> dict | None:
    """The object that a line holds, without its checksum; None if it is torn or damaged.

    No text can hold CRC: JSON writes its quotes with a backslash.
    """
    if not line.endswith(b"}\n"):             # quick, where a damaged line has gigabytes
        return None
    text, _, checksum = line.rpartition(CRC)
    if checksum != b"%d}\n" % zlib.crc32(text):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    value.pop("crc", None)
    return value


def checksum_of(line: bytes) -> int:
    """The checksum at the end of a good line."""
    return int(line.rpartition(CRC)[2][:-2])


def is_unfinished(line: bytes) -> bool:
    """Whether this is a first line that the machine did not finish: nothing was appended to it."""
    begun = any(line.startswith(beginning[:len(line)]) for beginning in BEGINNINGS)
    return not line.endswith(b"\n") and (begun or not line.strip(b"\0"))
