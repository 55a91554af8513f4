"""Files: written whole or not at all, read within bounds, one writer at a time; task folders."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from base import Progress, UserError, log, now, plain
from machine.running import MACHINE_TROUBLE

MIB = 2**20
# No write takes so long: a temporary file that is older belongs to nobody, on whichever host it was
# made.
TEMPORARY_AGE_S = 24 * 3600
# What flock says on a disk without locks: Lustre without -o flock, NFS with nolock, some FUSE
# mounts.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
# What a RuntimeError says where Python has no thread, or PyTorch no memory, left.
OUT_OF_RESOURCES = re.compile("can't start new thread|DefaultCPUAllocator")


# -------------------------------------------------------------------------------------------- write
def host() -> str:
    """This host's name, fit for a file name."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40] or "host"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename: readers see the old file or the new one, both whole.

    The temporary file's name keeps the suffix, because some writers (matplotlib) choose the format
    by it, and names host and process, because a folder may be shared. Files that killed processes
    left are removed first: a checkpoint is large.
    """
    remove_abandoned(path)
    temporary = path.with_name(f".{path.stem}.{host()}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        # A failed write names no file
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove temporary files for `path` that are a day old, or whose process on this host is gone."""
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    pattern = re.compile(rf"\.{stem}\.(?:(.+)\.)?(\d+)\.tmp{suffix}")
    for name in os.listdir(path.parent):
        if match := pattern.fullmatch(name):
            with contextlib.suppress(OSError):
                gone = match[1] == host() and not is_running(int(match[2]))
                if gone or time.time() - path.with_name(name).stat().st_mtime > TEMPORARY_AGE_S:
                    path.with_name(name).unlink()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:              # another user's
        return True
    return process > 0


def sync_folder(folder: Path) -> None:
    """fsync the folder, where that is possible: else a power cut may undo a new name in it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, results: dict, rows: str | None = None) -> None:
    """Write results as JSON, without NaN and infinity (json_text).

    rows: the name of a list in it that holds one value a line, so that long lists of numbers stay
    short.
    """
    if rows is None:
        write_text(path, json_text(results, path, indent=1) + "\n")
        return
    text = json_text({**results, rows: []}, path, indent=1)
    before, name, after = text.partition(f"\n {json.dumps(rows)}: [")
    lines = ",\n  ".join(json_text(row, path) for row in results[rows])
    write_text(path, f"{before}{name}\n  {lines}\n {after}\n")


def json_text(value, path: Path, indent: int | None = None) -> str:
    """The value as JSON for the file `path`. NaN and infinity become null, with a WARNING."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        places: list[str] = []
        finite = without_nan(value, "", places)
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        log(f"WARNING | {path}: no finite numbers, written as null: {', '.join(places[:5])}{more}")
        return json.dumps(finite, indent=indent, allow_nan=False)


def without_nan(value, place: str, places: list[str]):
    """The value with None for NaN and infinity; `places` gets their places ("metrics.test[3]")."""
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place)
        return None
    if isinstance(value, dict):
        return {key: without_nan(part, f"{place}.{key}".lstrip("."), places)
                for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part, f"{place}[{row}]", places) for row, part in enumerate(value)]
    return value


# --------------------------------------------------------------------------------------------- read
def check_plain(path: Path, follow: bool = True) -> None:
    """Raise UserError if the path exists and is no file: reading a pipe would block.

    follow: whether a link to a file will do.
    """
    if (path.exists() and not path.is_file()) or (path.is_symlink() and not follow):
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        if path.is_symlink():
            kind = "a link"
        raise UserError(f"{path} is {kind}, wanted a file; remove it, or choose another name")


@contextlib.contextmanager
def reading(path: Path, otherwise: str) -> Iterator[None]:
    """Turn errors inside the block into a UserError that blames the values in this file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} does not hold what belongs there ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]}); {otherwise}") from error


def read_within(path: Path, max_bytes: int = 128 * MIB) -> bytes:
    """The content of a file of at most max_bytes, even if it grows meanwhile; otherwise a UserError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""
    if max(size, len(content)) > max_bytes:
        raise UserError(f"{path} has {max(size, len(content)) / MIB:,.0f} MiB, wanted at most "
                        f"{max_bytes / MIB:,.0f} MiB: it is not the file that belongs there")
    return content


def digest_of_file(path: Path) -> str:
    """16 hex digits of the content, which may be larger than the memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def read_json(path: Path, max_bytes: int = 128 * MIB):
    """The JSON value of a file of at most max_bytes; otherwise a UserError that says what is wrong.

    Python's objects take up to 24 times the bytes of their text ("{},"): 128 MiB stay below 4 GiB
    of memory.
    """
    check_plain(path)
    try:
        return json.loads(read_within(path, max_bytes).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:      # of json, of the UTF-8 decoder
        raise not_json(path, error) from error


def not_json(path: Path, error: Exception) -> UserError:
    """The UserError for a file that can't be read as JSON; the usual mix-ups are named."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return UserError(f"{path} is not JSON: it is empty")
    if start[:2] == b"\x1f\x8b":
        return UserError(f"{path} is not JSON: it looks like gzip; unpack it first (gunzip)")
    if start[:2] == b"PK":
        return UserError(f"{path} is not JSON: it looks like a zip archive; unpack it first")
    return UserError(f"{path} is not JSON: {error}")


def check_format(path: Path, number, known: int) -> int:
    """The format number of a file, 0 where it has none. Raises UserError if it is above `known`."""
    if number is None:
        return 0
    if type(number) is not int or number < 0:
        raise UserError(f"{path} has format {number!r}, wanted a whole number from 0 to {known}")
    if number > known:
        raise UserError(f"{path} has format {number}, this version reads formats up to {known}: "
                        "a newer version of the suite wrote it; use that version or a later one")
    return number


def is_machine_trouble(error: BaseException) -> bool:
    """Whether the machine is in trouble: no memory, no descriptors, no permission, a disk that is gone.

    Such an error says nothing about the clip that was being read: the run should stop, and the same
    command go on once the machine is well. Its causes count too, so a reader may wrap it (`raise
    MediaError from error`). Running out of memory is the machine's trouble: readers must bound what
    a file can ask for.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in MACHINE_TROUBLE)
        or (isinstance(error, RuntimeError) and OUT_OF_RESOURCES.search(str(error)))
        for error in chain)


# --------------------------------------------------------------------------------------------- lock
@contextlib.contextmanager
def only_writer(path: Path, wait: bool | None = None) -> Iterator[None]:
    """Hold the lock of this file or folder. The lock file names the holder; flock ends with it.

    wait: the program's --wait, if it has one: whether to wait for another process that holds the
    lock, or raise UserError. A lock that is removed while it is held, alone or with its folder,
    ends the work (Progress.checks).
    """
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    check_plain(lock, follow=False)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    def check_held() -> None:
        if not is_same_file(descriptor, lock):
            raise UserError(f"{lock} was removed or renamed, perhaps with its folder, while this "
                            f"process wrote {path}; put the folder back, make sure that no other "
                            "process writes there, and give the same command again")

    try:
        take_lock(descriptor, lock, path, wait)
        if not is_same_file(descriptor, lock):
            raise UserError(f"{lock} was removed while another process wrote; repeat the command")
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {host()} since {now()}".encode(), 0)
        except OSError as error:
            error.filename = str(lock)            # a failed write names no file
            raise
        Progress.checks.append(check_held)
        try:
            yield
        finally:
            Progress.checks.remove(check_held)
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, lock: Path, path: Path, wait: bool | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = plain(os.pread(descriptor, 200, 0).decode(errors="replace")) or "another process"
        if not wait:
            otherwise = "" if wait is None else ", or use --wait"
            message = f"{path} is being written by {holder}: wait for it{otherwise}"
            raise UserError(message) from None
        log(f"{path} is being written by {holder}: waiting for it to end")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            error.filename = str(lock)
            raise
        log(f"WARNING | the disk of {lock} has no locks ({error.strerror}): make sure that no "
            f"other process writes {path}")


def is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


# ------------------------------------------------------------------------------------------ folders
def make_folder(path: Path) -> Path:
    """Make the folder (and its parents) and write a file there; a UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{host()}.{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"can't write to the folder {path}: {error.strerror}; choose another, or "
                        "correct its permissions") from error
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
