"""Raw DSEC recordings: where their files lie, the times of their pictures, their events in slices.

    <root>/<split>/<sequence>/events/left/events.h5          the tree of DSEC's own guide, or,
                              images/left/rectified/*.png    as the files of its single zips
                              images/timestamps.txt          unpack:
    <root>/<split>/<sequence>/<sequence>_events_left/events.h5
                              <sequence>_images_rectified_left/*.png
                              <sequence>_image_timestamps.txt

The folder <split> may be missing, and flat files may lie in the sequence's folder itself or, with
the sequence in their name, beside it. Recordings are downloads: nothing in them is trusted.
MediaError says that a recording can't be used, MachineTrouble that the machine can't read it.
"""

import bisect
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from base import UserError
from clips.events import check_polarity
from clips.limits import MachineTrouble, MediaError, gone, machine_trouble
from machine.files import is_machine_trouble

SLICE = 2**20                      # events read at a time: 9 bytes each
MAX_CHUNK = 2**28  # bytes; HDF5 unpacks a chunk in one piece, of whatever size the file names
MAX_RATE = 2**28                   # events a second: ten times what DSEC's cameras can send
CHUNK_CACHE = 2**25                # bytes of unpacked chunks that HDF5 keeps for each column
MAX_TIMES = 2**24                  # bytes of a timestamps file: a million pictures, 14 hours
# Us from the first picture to the last: a wrong time would make too many windows
MAX_SPAN = 6 * 3600 * 10**6
BLOSC = 32001                      # the number of its filter in HDF5
# What h5py makes of a broken file
HDF5_ERRORS = (OSError, KeyError, RuntimeError, TypeError, ValueError)
# HDF5 names the system's error in its message alone
SYSTEM_ERROR = re.compile(r"errno = (\d+)")


def _sequences(text: str) -> tuple[str, ...]:
    """"thun_01:ab zurich_city_12:a" -> thun_01_a, thun_01_b, zurich_city_12_a."""
    drives = (part.split(":") for part in text.split())
    return tuple(f"{drive}_{letter}" for drive, letters in drives for letter in letters)


# DSEC's own split. dsec-det's download adds thun_02_a and zurich_city_16 to 21 to the same folders.
SEQUENCES = {
    "train": _sequences(
        "interlaken_00:cdefg thun_00:a zurich_city_00:ab zurich_city_01:abcdef zurich_city_02:abcde "
        "zurich_city_03:a zurich_city_04:abcdef zurich_city_05:ab zurich_city_06:a zurich_city_07:a "
        "zurich_city_08:a zurich_city_09:abcde zurich_city_10:ab zurich_city_11:abc"),
    "test": _sequences(
        "interlaken_00:ab interlaken_01:a thun_01:ab zurich_city_12:a zurich_city_13:ab zurich_city_14:abc "
        "zurich_city_15:a"),
}

EVENTS = ("events/left/events.h5", "{0}_events_left/events.h5",
          "events_left/events.h5", "events.h5")
PICTURES = ("images/left/rectified", "{0}_images_rectified_left", "images_rectified_left", "")
TIMES = ("images/timestamps.txt", "{0}_image_timestamps.txt", "image_timestamps.txt",
         "timestamps.txt")


# ------------------------------------------------------------------------------------------ finding
@dataclasses.dataclass(frozen=True)
class Recording:
    """One sequence: its event file, its pictures, and when they were taken (us, ascending)."""

    sequence: str
    events: Path
    pictures: list[Path]
    times: list[int]

    def between(self, start_us: int, end_us: int) -> list[Path]:
        """The pictures with start <= time < end."""
        return self.pictures[bisect.bisect_left(self.times, start_us):bisect.
                             bisect_left(self.times, end_us)]


def is_name(text: str) -> bool:
    """Whether this may be the name of a sequence: a plain file name, so that no path is made of
    it.
    """
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text))


def other_sequences(root: Path, split: str) -> list[str]:
    """Folders that DSEC's lists don't name, in the split's folder or else in the root itself."""
    folder = root / split if (root / split).is_dir() else root
    known = "|".join(itertools.chain(*SEQUENCES.values()))
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and is_name(path.name)
                  and not re.fullmatch(rf"({known})(_(events|images)_.*)?", path.name))


def find_recording(root: Path, split: str, sequence: str) -> Recording:
    """The files of a sequence, checked; a MediaError tells everything that is missing, or what is
    wrong.
    """
    folders = [folder for folder in (root / split / sequence, root / sequence) if folder.is_dir()]
    beside = [folder for folder in (root / split, root) if folder.is_dir()]

    def first_fit(names: tuple[str, ...], fits) -> Path | None:
        inside = [folder / name.format(sequence) for folder in folders for name in names]
        full = [name.format(sequence) for name in names if name.startswith("{0}")]
        outside = [folder / name for folder in beside for name in full]
        return next((path for path in inside + outside if fits(path)), None)

    events, times = first_fit(EVENTS, Path.is_file), first_fit(TIMES, Path.is_file)
    folder = first_fit(PICTURES, lambda folder: any(folder.glob("[0-9]" * 6 + ".png")))
    if not (events or times or folder) and not folders:
        raise MediaError("not there")
    parts = {"events/left/events.h5": events, "images/left/rectified/*.png": folder,
             "images/timestamps.txt": times}
    missing = [name for name, path in parts.items() if not path]
    if missing:
        archives = itertools.chain(*(place.glob(f"{sequence}_*_left.zip")
                                     for place in folders + beside))
        zips = sorted(path.name for path in archives)
        raise MediaError(f"half downloaded: no {', no '.join(missing)}"
                         + (f"; unpack {', '.join(zips)}" if zips else ""))
    assert events and folder and times
    pictures, times_us = list_pictures(folder), read_times(times)
    if len(pictures) != len(times_us):
        raise MediaError(f"{len(pictures)} pictures in {folder}, but {len(times_us)} timestamps in "
                         f"{times}: which belong together is not known; download both again")
    if times_us[-1] - times_us[0] > MAX_SPAN:
        raise MediaError(f"{times} goes from {times_us[0]} to {times_us[-1]} us, over "
                         f"{MAX_SPAN / 3.6e9:g} hours")
    return Recording(sequence, events, pictures, times_us)


def list_pictures(folder: Path) -> list[Path]:
    """000000.png, 000001.png, ... in order, without a gap."""
    numbers = sorted(
        int(path.stem) for path in folder.iterdir() if re.fullmatch(r"[0-9]{6}\.png", path.name))
    for before, number in itertools.pairwise(numbers):
        if number != before + 1:
            raise MediaError(f"half downloaded: {folder} goes from {before:06d}.png to {number:06d}.png")
    return [folder / f"{number:06d}.png" for number in numbers]


def read_times(path: Path) -> list[int]:
    """One whole number (us) a line, each larger than the one before."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TIMES + 1)
        if len(content) > MAX_TIMES:
            raise MediaError(f"{path} has more than {MAX_TIMES} bytes: that is no list of timestamps")
        lines = content.decode("ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        if is_machine_trouble(error):
            raise machine_trouble(path, error) from error
        raise MediaError(f"can't read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"[0-9]{1,18}", line):
            raise MediaError(f"{path}, entry {number}: {line[:40]!r} is no time in microseconds")
    times = [int(line) for line in lines]
    for number, (before, after) in enumerate(itertools.pairwise(times), start=2):
        if after <= before:
            raise MediaError(f"{path} is not sorted: entry {number} is {after}, after {before}")
    return times


# ------------------------------------------------------------------------------------------- events
def broken(path: Path, what: str, error: Exception) -> MediaError | MachineTrouble:
    """What to raise of an error of HDF5: its file is broken, or the machine can't read it."""
    named = SYSTEM_ERROR.search(str(error))
    cause = OSError(int(named[1]), os.strerror(int(named[1]))) if named else error
    if is_machine_trouble(cause):
        return machine_trouble(path, cause)
    if not path.exists():
        return gone(path)
    return MediaError(f"{what}: {error}")


def check_reader() -> None:
    """Both packages are there and HDF5 can unpack Blosc; otherwise ModuleNotFoundError or
    UserError.
    """
    import h5py
    import hdf5plugin

    if not h5py.h5z.filter_avail(BLOSC):
        raise UserError(f"HDF5 lacks the Blosc filter ({BLOSC}) although hdf5plugin {hdf5plugin.version} is "
                        "installed: install h5py and hdf5plugin anew with pip, not from two places")


class EventFile:
    """events.h5, open: finds the events of a time and reads them in slices of bounded size.

    with EventFile(path) as events:
        for x, y, p in events.slices(*events.between(start_us, end_us)): ...
    """

    def __init__(self, path: Path):
        import h5py
        import hdf5plugin  # noqa: F401  (it registers Blosc with HDF5)

        self.path = path
        self.lowest = 1                  # polarity so far: -1 or 0 stands for darker
        try:
            # No lock: recordings may lie on a read-only or a network disk.
            self.file = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE, locking=False)
        except OSError as error:
            raise broken(path, f"{path} is cut short or no HDF5 file", error) from error
        try:
            self.columns = {name: self._column(f"events/{name}") for name in "xypt"}
            self.ms_to_idx = self._column("ms_to_idx")
            self.t_offset = self._t_offset()
            self.count = len(self.columns["t"])
            if len({len(column) for column in self.columns.values()}) != 1:
                raise MediaError(f"{path}: events/x, y, p and t have different lengths")
        except (MediaError, MachineTrouble):
            self.file.close()
            raise
        except HDF5_ERRORS as error:
            self.file.close()
            raise broken(path, f"can't read {path}", error) from error

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def _column(self, name: str):
        """A one-dimensional dataset of whole numbers in this very file, packed with known filters.
        """
        import h5py

        column = self._dataset(name)
        if column.ndim != 1 or column.dtype.kind not in "iu":
            raise MediaError(f"{self.path}: {name} is {column.dtype} {column.shape}, wanted whole "
                             "numbers in one dimension")
        filters = column.id.get_create_plist()
        for number in (filters.get_filter(k)[0] for k in range(filters.get_nfilters())):
            if not h5py.h5z.filter_avail(number):
                raise MediaError(f"{self.path}: {name} is packed with HDF5's filter {number}, "
                                 "which is not there")
        return column

    def _dataset(self, name: str):
        import h5py

        dataset = self.file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise MediaError(f"{self.path}: {name} is missing")
        # HDF5 lets a file point at others; nothing but this one is to be read.
        if dataset.file.id != self.file.id or dataset.external or dataset.is_virtual:
            raise MediaError(f"{self.path}: {name} points at another file: refused")
        if dataset.chunks and (numbers := math.prod(dataset.chunks)) * dataset.dtype.itemsize > MAX_CHUNK:
            raise MediaError(f"{self.path}: {name} has chunks of {numbers} numbers: refused")
        return dataset

    def _t_offset(self) -> int:
        """As a Python number: a time in uint32 plus a number of this size overflows."""
        try:
            offset = self._dataset("t_offset")
            if offset.size == 1 and offset.dtype.kind in "iu":
                return int(np.ravel(offset[()])[0])
        except MediaError as error:
            raise MediaError(f"{error}, so the times of events and pictures can't be joined") from error
        raise MediaError(f"{self.path}: t_offset is {offset.dtype} {offset.shape}, wanted one whole number")

    def _read(self, column, start: int, end: int) -> np.ndarray:
        try:
            return column[start:end]
        except HDF5_ERRORS as error:
            what = f"{self.path}: can't read {column.name} from {start} to {end}"
            raise broken(self.path, what, error) from error

    def between(self, start_us: int, end_us: int) -> tuple[int, int]:
        """(first, last + 1) of the events with start <= time < end, on the pictures' clock."""
        first, last = self.place_of(start_us), self.place_of(end_us)
        if last - first > MAX_RATE * (end_us - start_us) / 1e6:
            raise MediaError(f"{self.path}: {last - first} events in {(end_us - start_us) / 1e6:g} "
                             "s: refused")
        return first, last

    def place_of(self, time_us: int) -> int:
        """The first event at or after this time; the number of events where there is none."""
        time_us -= self.t_offset
        if time_us <= 0:
            return 0
        ms = time_us // 1000
        around = [int(place) for place in self._read(self.ms_to_idx, ms, ms + 2)]
        first, last = (around + [self.count] * 2)[:2]
        if not 0 <= first <= last <= self.count or last - first > SLICE:
            raise MediaError(f"{self.path}: ms_to_idx is broken at {ms} ms: {around} of {self.count} events")
        begin = max(first - 1, 0)          # one event more on either side shows whether the table is right
        times = self._read(self.columns["t"], begin, last + 1).astype(np.int64)
        place = begin + int(np.searchsorted(times, time_us))
        if not first <= place <= last:
            raise MediaError(f"{self.path}: ms_to_idx does not fit the events' times at {ms} ms")
        return place

    def slices(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield x, y, p of at most SLICE events each, oldest first; p is 0 or 1.

        That times never fall and what polarities there are is checked.
        """
        for start in range(first, last, SLICE):
            end, begin = min(start + SLICE, last), max(start - 1, 0)
            times = self._read(self.columns["t"], begin, end)
            if (falls := times[1:] < times[:-1]).any():
                at = begin + 1 + int(falls.argmax())
                raise MediaError(f"{self.path}: timestamps are not sorted at event {at} (or they "
                                 "passed 2^32 us)")
            x, y, p = (self._read(self.columns[name], start, end) for name in "xyp")
            yield x, y, self._polarity(p)

    def _polarity(self, p: np.ndarray) -> np.ndarray:
        """p as 0 and 1; the same two values must stand for them in all parts of the file."""
        low = int(p.min()) if len(p) else 1
        self.lowest = min(self.lowest, low)
        if low == 0 and self.lowest < 0:
            raise MediaError(f"{self.path}: events/p has -1 and 0, wanted 0 and 1 or -1 and 1")
        try:
            return check_polarity(p)
        except MediaError as error:
            raise MediaError(f"{self.path}: events/p: {error}") from error
