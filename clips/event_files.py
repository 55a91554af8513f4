"""Files of raw events (np.save of a dict) as columns; nothing that a file names is called.
"""

import pickle
import re
from pathlib import Path

import numpy as np

from clips.limits import MediaError, check_file, check_size


class _Array:
    """Stands for an array while the file is read, which makes one in two steps; `value` is a dict or an ndarray."""

    def __init__(self, *_):
        self.value = None

    def fill(self, version: int, shape: tuple, dtype: np.dtype, fortran: bool, data) -> None:
        if dtype.hasobject and shape == () and isinstance(data, list) and len(data) == 1:
            self.value = data[0]                         # np.save puts the dict into an array of no dimensions
        else:
            self.value = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _dtype(name: str, *_) -> np.dtype:
    if not re.fullmatch(r"[biuf][1248]|[SU][1-9]\d{0,3}|O8?", name):
        raise MediaError(f"the file holds an array of {name!r}: refused")
    return np.dtype(name)


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype)[0]


class _ArraysOnly(pickle._Unpickler):
    """Unpickles dicts, lists, numbers, texts and NumPy arrays of numbers; nothing that the file names is called.

    Arrays are made by the functions above, because NumPy's own believe what a file says of lengths and pointers.
    It is the class in Python, because that in C grows its memo to any index that the file names. Only the operations
    that such values take are known to it; keys are names, for a tuple of tuples of tuples is hashed without end.
    """

    MADE = {"_reconstruct": _Array, "dtype": _dtype, "scalar": _scalar, "ndarray": "ndarray"}  # noqa: RUF012
    KNOWN = ("PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE "
             "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT UNICODE BINUNICODE "
             "SHORT_BINUNICODE BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 "
             "TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT")
    dispatch = {code: pickle._Unpickler.dispatch[code]  # noqa: RUF012
                for code in (getattr(pickle, name)[0] for name in KNOWN.split())}

    def find_class(self, module: str, name: str):
        if module.split(".")[0] != "numpy" or name not in self.MADE:
            raise MediaError(f"the file wants to load {module}.{name}: refused")
        return self.MADE[name]

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _Array):
            made.fill(*state)
        elif not isinstance(made, np.dtype) or state[1] not in ("<", "|", "="):
            raise MediaError("the file holds more than arrays and numbers, or in another order of bytes: refused")

    def set_items(self) -> None:
        self._set(self.pop_mark())

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: list) -> None:
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str) for key in items[::2]):
            raise MediaError("the file holds a dict whose keys are no names: refused")
        self.stack[-1].update(zip(items[::2], items[1::2]))

    dispatch |= {pickle.BUILD[0]: build, pickle.SETITEMS[0]: set_items, pickle.SETITEM[0]: set_item}


def read_events(path: Path) -> dict[str, np.ndarray]:
    """Raw events (np.save of a dict) -> {"x", "y", "t", "p"}: 1-D arrays of one length; x, y px, t us, p 0 or 1."""
    try:
        check_file(path)
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = header[version](file)
            if shape != () or not dtype.hasobject:
                raise MediaError(f"an array {shape} of {dtype}, wanted a dict with x, y, t and p")
            found = _ArraysOnly(file).load()
        found = found.value if isinstance(found, _Array) else found
        if not isinstance(found, dict):
            raise MediaError("wanted a dict with x, y, t and p")
        events = {name: found[name].value for name in "xytp"}
    except FileNotFoundError as error:
        raise MediaError(f"no such event file: {path}") from error
    except MediaError as error:
        raise MediaError(f"can't read the events of {path}: {error}") from error
    except Exception as error:      # a torn or hostile pickle can raise nearly anything
        raise MediaError(f"can't read the events of {path}: {type(error).__name__}: {error}") from error
    if (not all(isinstance(array, np.ndarray) and array.dtype.kind in "iu" for array in events.values())
            or len({array.shape for array in events.values()}) != 1 or events["x"].ndim != 1):
        raise MediaError(f"{path}: x, y, t and p must be whole-number columns of one length")
    if events["x"].size:
        if min(events["x"].min(), events["y"].min()) < 0:
            raise MediaError(f"{path}: negative pixel coordinates")
        check_size(int(events["x"].max()) + 1, int(events["y"].max()) + 1)
    return events
