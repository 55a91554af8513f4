"""Files of raw events as columns. What a file names is never called or imported.

    clip.npy    np.save of a dict with x, y, t and p, as EventGPT's data sets have it (a pickle),
                or of one array with these four fields
    clip.npz    np.savez of x, y, t and p
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from clips.events import check_polarity
from clips.limits import MediaError, check_bytes, check_size, reading_media

COLUMNS = "xytp"
MAX_EVENT_BYTES = 2**31         # 165 million events of 13 bytes: 6 s of the busiest DSEC sequence
MAX_LINE = 2**16                   # bytes of a text line inside a pickle
MAX_READS = 10**6  # of a pickle: each may make an object; EventGPT's files take hundreds
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0,
                  (2, 0): np.lib.format.read_array_header_2_0}


def read_events(path: Path) -> dict[str, np.ndarray]:
    """Raw events -> {"x", "y", "t", "p"}: 1-D arrays of one length; px, px, us, never falling, 0
    or 1.
    """
    # A torn or hostile pickle can raise nearly anything.
    with reading_media("event file", path, Exception):
        size = check_bytes(path, MAX_EVENT_BYTES)
        with open(path, "rb") as file:
            columns = read_npz(file) if file.read(2) == b"PK" else read_npy(file, size)
        missing = [name for name in COLUMNS if not isinstance(columns.get(name), np.ndarray)]
        if missing:
            raise MediaError(f"it has no column {', '.join(missing)}; wanted x, y, t and p")
        return check_events({name: columns[name] for name in COLUMNS})


def check_events(events: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns with p as 0 and 1; a MediaError for values without a meaning."""
    kinds = {name: column.dtype.kind for name, column in events.items()}
    if (events["x"].ndim != 1 or len({column.shape for column in events.values()}) != 1
            or not all(kind in "iu" or (name == "p" and kind == "b")
                       for name, kind in kinds.items())):
        columns = ", ".join(f"{name} {column.dtype} {column.shape}"
                            for name, column in events.items())
        raise MediaError(f"x, y, t and p must be whole-number columns of one length, found {columns}")
    x, y, t = (events[name] for name in "xyt")
    if x.size:
        if min(x.min(), y.min()) < 0:
            raise MediaError("negative pixel coordinates")
        check_size(int(x.max()) + 1, int(y.max()) + 1)
    falls = t[1:] < t[:-1]                    # not np.diff: unsigned differences never fall
    if falls.any():
        raise MediaError(f"t is not sorted at event {int(falls.argmax()) + 1}; wanted events in time order")
    return {**events, "p": check_polarity(events["p"])}


# ---------------------------------------------------------------------------------- NumPy's formats
def read_npz(file) -> dict[str, np.ndarray]:
    """The columns of an .npz file; how far its records unpack is known before they are."""
    columns = {}
    with zipfile.ZipFile(file) as archive:
        names = [name for name in COLUMNS if f"{name}.npy" in archive.namelist()]
        records = {name: archive.getinfo(f"{name}.npy") for name in names}
        unpacked = sum(record.file_size for record in records.values())
        if unpacked > MAX_EVENT_BYTES:
            raise MediaError(f"it unpacks to {unpacked} bytes, wanted {MAX_EVENT_BYTES} at most")
        for name, record in records.items():
            with archive.open(record) as data:
                shape, dtype = read_header(data)
                columns[name] = np.frombuffer(data.read(), dtype).reshape(shape)
    return columns


def read_npy(file, size: int) -> dict:
    """The columns of an .npy file that holds a dict, or one array with named fields."""
    file.seek(0)
    shape, dtype = read_header(file)
    if dtype.names and len(shape) == 1 and not dtype.hasobject:
        array = np.frombuffer(file.read(size - file.tell()), dtype).reshape(shape)  # it may be growing
        return {name: np.ascontiguousarray(array[name]) for name in COLUMNS if name in dtype.names}
    if shape != () or not dtype.hasobject:
        raise MediaError(f"an array {shape} of {dtype}, wanted a dict with x, y, t and p")
    value = _ArraysOnly(_BoundedFile(file, size)).load()
    value = value.value if isinstance(value, _Array) else value
    if not isinstance(value, dict):
        raise MediaError("wanted a dict with x, y, t and p")
    return {name: item.value if isinstance(item, _Array) else item for name, item in value.items()}


def read_header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the .npy data that begins here; the file is left at its first number."""
    version = np.lib.format.read_magic(file)
    if version not in HEADER_READERS:
        raise MediaError(f"it is .npy of version {version}, wanted 1.0 or 2.0")
    shape, fortran, dtype = HEADER_READERS[version](file)
    if fortran and len(shape) > 1:
        raise MediaError(f"an array {shape} in Fortran's order, wanted columns")
    return shape, dtype


class _BoundedFile:
    """Reads no more than the file has left; Python would allocate any length that a pickle names.
    """

    def __init__(self, file, size: int):
        self.file, self.size, self.reads = file, size, 0

    def read(self, count: int) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise MediaError("it holds far more objects than x, y, t and p")
        if not 0 <= count <= self.size - self.file.tell():
            raise MediaError("it is cut short")
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise MediaError("it is cut short, or holds a text without an end")
        return line


class _Array:
    """An array while it is unpickled, in two steps; then `value` is a dict or an ndarray."""

    def __init__(self, *_):
        self.value = None

    def fill(self, version: int, shape: tuple, dtype: np.dtype, fortran: bool, data) -> None:
        if dtype.hasobject and shape == () and isinstance(data, list) and len(data) == 1:
            self.value = data[0]             # np.save puts the dict into an array of no dimensions
        else:
            self.value = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _dtype(name: str, *_) -> np.dtype:
    if not re.fullmatch(r"[biuf][1248]|[SU][1-9]\d{0,3}|O8?", name):
        raise MediaError(f"the file holds an array of {name!r}: refused")
    return np.dtype(name)


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype)[0]


# The class in Python; the types of the standard library know the one in C alone.
_Unpickler: Any = pickle._Unpickler


class _ArraysOnly(_Unpickler):
    """Unpickles dicts, lists, numbers, texts and NumPy arrays of numbers; calls nothing by its name.

    Arrays are made by the functions above, because NumPy's own trust the lengths and pointers in a
    file. This is the class in Python, because the one in C grows its memo to any index that the
    file names. It knows only the operations that such values take; keys must be names, because a
    tuple of tuples of tuples is hashed without end.
    """

    MAKERS = {"_reconstruct": _Array, "dtype": _dtype, "scalar": _scalar,  # noqa: RUF012
              "ndarray": "ndarray"}
    OPERATIONS = ("PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
                  "GLOBAL STACK_GLOBAL REDUCE NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 "
                  "LONG LONG1 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINSTRING "
                  "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 "
                  "TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT")
    dispatch = {code: _Unpickler.dispatch[code]  # noqa: RUF012
                for code in (getattr(pickle, name)[0] for name in OPERATIONS.split())}

    def find_class(self, module: str, name: str):
        if module.split(".")[0] != "numpy" or name not in self.MAKERS:
            raise MediaError(f"the file wants to load {module}.{name}: refused")
        return self.MAKERS[name]

    def frame(self) -> None:
        """Frames only save calls; without them every read is counted and bounded."""
        self.read(8)

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Array):
            target.fill(*state)
        elif not isinstance(target, np.dtype) or state[1] not in ("<", "|", "="):
            raise MediaError("the file holds more than arrays and numbers, or in another order of "
                             "bytes: refused")

    def set_items(self) -> None:
        self._set(self.pop_mark())

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: list) -> None:
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str) for key in items[::2]):
            raise MediaError("the file holds a dict whose keys are no names: refused")
        self.stack[-1].update(zip(items[::2], items[1::2]))

    dispatch |= {pickle.FRAME[0]: frame, pickle.BUILD[0]: build, pickle.SETITEMS[0]: set_items,
                 pickle.SETITEM[0]: set_item}
