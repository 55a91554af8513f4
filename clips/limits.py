"""What is wrong with one clip and what is wrong with the machine; the bounds that every media file
must keep.

MediaError      one picture, event file or video can't be used: the clip fails, the run goes on.
MachineTrouble  a UserError: the file was there and is gone, or the machine has no memory, no
                descriptors, no rights or a failing disk. No clip is to blame; the program ends with
                this one ERROR line and keeps its work.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from base import UserError, first_line
from machine.files import check_plain, is_machine_trouble

# A file beyond these bounds is broken or hostile; DSEC has clips of 1440 x 1080 px.
MAX_SIDE = 16384           # px
MAX_PIXELS = 2**25         # in a picture or frame: 8K; a few such at once still fit into memory
MAX_RATIO = 100            # of the sides: CLIP's resizing goes by the shorter one


class MediaError(Exception):
    """This picture, event file or video can't be used; the message says why."""


class MachineTrouble(UserError):
    """A file can't be read for a reason that lies in the machine, not in the file."""


@contextlib.contextmanager
def still_there(path: Path, listed: bool = True) -> Iterator[None]:
    """Inside, a file is read; MachineTrouble if it was there when the run began (listed) and is
    gone.
    """
    try:
        yield
    except MediaError:
        if listed and not path.exists():
            raise gone(path) from None
        raise


def gone(path: Path) -> MachineTrouble:
    return MachineTrouble(f"{path} was there when this run began and is gone: is its disk still "
                          "mounted? Bring it back, then give the same command again")


@contextlib.contextmanager
def reading_media(kind: str, path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Inside, a media file is read: `errors` become a MediaError, or MachineTrouble where they are that.

    kind: "picture", "video", ... for the message. A MediaError from inside gets kind and path in
    front.
    """
    expected: tuple[type[Exception], ...] = (*errors, OSError, MemoryError)
    try:
        if path.exists() and not path.is_file():         # a pipe or a device would be read for ever
            raise MediaError("it is no regular file")
        yield
    except MediaError as error:
        if is_machine_trouble(error):
            raise machine_trouble(path, error) from error
        raise MediaError(f"can't read the {kind} {path}: {error}") from error
    except expected as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise MediaError(f"no such {kind}: {path}") from error
        if is_machine_trouble(error):
            raise machine_trouble(path, error) from error
        text = first_line(error)
        if not isinstance(error, OSError):
            text = f"{type(error).__name__}: {text}"
        raise MediaError(f"can't read the {kind} {path}: {text}") from error


def machine_trouble(path: Path, error: BaseException) -> MachineTrouble:
    reason = getattr(error, "strerror", None) or first_line(error)
    return MachineTrouble(f"can't read {path}: {reason}. This is no fault of the clip: mend it, "
                          "then give the same command again")


def is_file(path: Path) -> bool:
    """Whether this is a file that can be found; a name that no disk can hold is none.

    Raises MachineTrouble where the machine can't tell.
    """
    try:
        return path.is_file()
    except OSError as error:                         # Path.is_file() forgives missing files alone
        if is_machine_trouble(error):
            raise machine_trouble(path, error) from error
        return False


def check_bytes(path: Path, limit: int) -> int:
    """The file's size; a MediaError if it has more than `limit` bytes."""
    size = os.stat(path).st_size
    if size > limit:
        raise MediaError(f"it has {size} bytes, wanted {limit} at most")
    return size


def check_input(path: Path, limit: int) -> None:
    """A UserError if a file that the user names has more than `limit` bytes, or is no file."""
    check_plain(path)
    if path.is_file() and (size := path.stat().st_size) > limit:
        raise UserError(f"{path} has {size} bytes, wanted {limit} at most: is it the right file?")


def check_size(width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(f"{width} x {height} px, wanted 1 to {MAX_SIDE} px a side")
    if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
        raise MediaError(f"{width} x {height} px, wanted {MAX_PIXELS} px at most, sides up to 1 : "
                         f"{MAX_RATIO}")
