"""Files of tensors (.pt): written whole, read with weights_only=True and a bound on their size.

torch.save writes an uncompressed zip archive: one pickle, and the bytes of each tensor as a record
of its own.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import torch

from base import UserError, first_line
from machine.files import check_plain, write_whole

ZIP_START = b"PK\3\4"        # of the first record
MAX_DIRECTORY = 2**24          # bytes of the archive's directory: about 250,000 tensors
MAX_PICKLE = 2**24             # bytes of the pickle: names, shapes, plain facts
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# words of PyTorch's advice to run what a file holds
ADVICE = ("weights_only", "weights only", "trust")


def write_tensors(path: Path, value: dict) -> None:
    """torch.save into one file, whole or not at all; the disk's own error when it is full."""
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            try:
                torch.save(value, file)
            except RuntimeError as error:      # PyTorch raises one of its own over that of the disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    write_whole(path, write)


def read_tensors(path: Path, max_bytes: int, problem: str):
    """What torch.save wrote, on the CPU.

    A UserError "{path} {problem}" if the file is larger than max_bytes or can't be read; problem:
    words with the place {reason}.
    """
    check_plain(path)
    try:
        _check_archive(path, max_bytes)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # a torn or hostile archive of pickles can raise nearly anything
        raise UserError(f"{path} {problem.format(reason=_reason(error))}") from error


def _reason(error: Exception) -> str:
    """The error in a line, without advice to load the file in an unsafe way."""
    line = first_line(error)[:200]
    if isinstance(error, pickle.UnpicklingError) or any(word in line.lower() for word in ADVICE):
        return "it holds more than tensors and plain values, or damaged ones"
    return line


class _BoundedReads(io.FileIO):
    """Refuses to read a directory of gigabytes at once, as zipfile would."""

    def read(self, size: int | None = -1) -> bytes:
        if size and size > MAX_DIRECTORY:
            raise ValueError(f"a directory of {size} bytes")
        return super().read(size)


def _check_archive(path: Path, max_bytes: int) -> None:
    """A ValueError unless this is an uncompressed zip archive, no larger inside than outside."""
    size = path.stat().st_size
    if not size:
        raise ValueError("it is empty")
    if size > max_bytes:
        raise ValueError(f"it has {size / 2**20:.0f} MiB, wanted at most {max_bytes / 2**20:.0f}")
    with _BoundedReads(path) as file:
        # zipfile looks at the end alone; PyTorch reads what doesn't begin so in its form of before 1.6.
        begins_as_zip = file.read(len(ZIP_START)) == ZIP_START
        if not begins_as_zip or not zipfile.is_zipfile(file):
            raise ValueError("it is no zip archive, as torch.save writes them since PyTorch 1.6, "
                             "or its end is gone")
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("it has compressed records, which PyTorch never writes")
    if sum(record.file_size for record in records) > size:
        raise ValueError("its records are larger than the file")
    if any(record.file_size > MAX_PICKLE for record in records if record.filename.endswith(".pkl")):
        raise ValueError(f"its pickle has more than {MAX_PICKLE // 2**20} MiB")


# ------------------------------------------------------------------------------------------ weights
def check_weights(state: dict, integers: tuple[str, ...] = (), wanted: dict | None = None) -> None:
    """A ValueError unless all values are whole tensors of floats, or of int64 under `integers`.

    wanted: tensors whose names and shapes it must have.
    """
    for name, tensor in state.items():
        if not isinstance(name, str) or not _is_whole(tensor):
            raise ValueError(f"{name!s:.60} is no whole tensor in memory")
        kinds = (torch.long,) if name in integers else FLOATS
        if tensor.dtype not in kinds:
            raise ValueError(f"{name} must be {' or '.join(map(str, kinds))}, got {tensor.dtype}")
    if wanted is None:
        return
    missing, unknown = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or unknown:
        raise ValueError(f"missing {some_of(missing)}; not known {some_of(unknown)}")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name} has the shape {tuple(state[name].shape)}, wanted "
                             f"{tuple(tensor.shape)}")


def _is_whole(tensor) -> bool:
    """A tensor whose numbers are all there: a file can also make one of any size from a single
    number or none.
    """
    return (isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


def some_of(names) -> str:
    """The first names, for an error message."""
    names = sorted(map(str, names))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"
