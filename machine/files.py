"""Files: written whole or not at all, read with care, one writer at a time, and the folders that hold them."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from base import MACHINE_TROUBLE, UserError, log, now, plain

# What a RuntimeError says where Python has no thread, or PyTorch no memory, left.
OUT_OF_RESOURCES = re.compile("can't start new thread|DefaultCPUAllocator")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call write(temporary path), then rename: readers see the old file or the new one, never half of one.

    The temporary name keeps the suffix, because some writers (matplotlib) choose the format by it. What a process
    that was killed here has left goes first: a checkpoint is large.
    """
    left = re.compile(rf"\.{re.escape(path.stem)}\.(\d+)\.tmp{re.escape(path.suffix)}")
    for name in os.listdir(path.parent):
        if (found := left.fullmatch(name)) and not is_running(int(found[1])):
            with contextlib.suppress(OSError):
                path.with_name(name).unlink()
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):       # a failed write doesn't say of which file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:              # another user's
        return True
    return process > 0


def sync_folder(folder: Path) -> None:
    """A new name in a folder outlives a power cut only when the folder is synced too, where it can be."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, results: dict) -> None:
    """What a program measured; a figure that is no number is a bug and is refused."""
    write_text(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


def check_plain(path: Path, follow: bool = True) -> None:
    """A UserError if this is there but no file: a pipe would be waited for. follow: whether a link to one will do."""
    if (path.exists() and not path.is_file()) or (path.is_symlink() and not follow):
        kind = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "a pipe or a device"
        raise UserError(f"{path} is {kind}, wanted a file; remove it, or choose another name")


@contextlib.contextmanager
def reading(path: Path, otherwise: str) -> Iterator[None]:
    """Inside, what this file says is used: a UserError if its values are not of the kinds that belong there."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} does not hold what belongs there ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]}); {otherwise}") from error


def read_json(path: Path):
    """The file's JSON value; a UserError that says what is wrong with it otherwise."""
    check_plain(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise not_json(path, error) from error


def check_format(path: Path, number, known: int) -> int:
    """The format number of a file, 0 where it has none. Raises UserError for a number above `known`."""
    if number is None:
        return 0
    if type(number) is not int or number < 0:
        raise UserError(f"{path} has format {number!r}, wanted a whole number from 0 to {known}")
    if number > known:
        raise UserError(f"{path} has format {number}, this version reads formats up to {known}: "
                        "it was written by a newer version of the suite; use that version or a later one")
    return number


def is_machine_trouble(error: BaseException) -> bool:
    """Whether the machine is in trouble (no memory, no descriptors, a disk that is gone, no permission).

    Such an error says nothing about the clip that was being read: the run should stop, and the same command go on
    once the machine is well. The causes of the error count too, so a reader may wrap it (`raise MediaError from
    error`). Running out of memory is the machine's trouble, so readers must bound what a file can ask for.
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


def not_json(path: Path, error: Exception) -> UserError:
    """What to say of a file that can't be read as JSON; the usual mix-ups are named."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return UserError(f"{path} is not JSON: it is empty")
    if start[:2] == b"\x1f\x8b":
        return UserError(f"{path} is not JSON: it looks like gzip; unpack it first (gunzip)")
    if start[:2] == b"PK":
        return UserError(f"{path} is not JSON: it looks like a zip archive; unpack it first (unzip)")
    return UserError(f"{path} is not JSON: {error}")


@contextlib.contextmanager
def only_writer(path: Path, wait: bool | None = None) -> Iterator[None]:
    """Hold the lock of this file or folder; its text says who does. flock ends with its process: none is stale.

    wait: --wait of the program, if it has one. Where another process holds it: a UserError, or else it is waited for.
    """
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    check_plain(lock, follow=False)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = plain(os.pread(descriptor, 200, 0).decode(errors="replace")) or "another process"
            if not wait:
                otherwise = "" if wait is None else ", or use --wait"
                raise UserError(f"{path} is being written by {holder}; wait for it{otherwise}") from None
            log(f"{path} is being written by {holder}: waiting for it to end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:                  # some network file systems have no locks
            raise UserError(f"can't lock {lock}: {error.strerror}; choose a folder on another disk") from error
        if not lock.exists() or not os.path.samestat(os.fstat(descriptor), lock.stat()):
            raise UserError(f"{lock} was removed while another process wrote; give the same command again")
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} since {now()}".encode(), 0)
        except OSError as error:
            error.filename = str(lock)            # a failed write doesn't say of which file
            raise
        yield
    finally:
        os.close(descriptor)


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
