"""Small recordings in DSEC's true layout: events at known places, frames that show their number."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.prepare import write_events

T_OFFSET = 36_607_300_656          # us; one of DSEC's own: far beyond what uint32 holds
FIRST_US = T_OFFSET + 280          # the first picture
GOOD, BAD = "thun_01_a", "thun_01_b"                # two of DSEC's test list
SMALL = ("--canvas", "64x48", "--video_size", "64x48", "--workers", "1")
SIZE = (64, 48)                    # width, height of camera pictures
COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (40, 200, 200),
                    (200, 40, 200)])


@dataclasses.dataclass(frozen=True)
class Made:
    """A sequence's folder and files, and its events: x, y, p, t (us on the pictures' clock), by time."""

    folder: Path
    events: Path
    pictures: Path
    times: Path
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray
    t: np.ndarray

    def in_window(self, start_us: int, end_us: int) -> list[tuple[int, int, int]]:
        """(x, y, p) of the events with start <= t < end, looked at one by one."""
        return [(int(x), int(y), int(p)) for x, y, p, t in zip(self.x, self.y, self.p, self.t)
                if start_us <= int(t) < end_us]


def frame(number: int) -> np.ndarray:
    """The camera picture of this number: (48, 64, 3), a grey and a coloured half; repeats after 60."""
    picture = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    picture[:, :32] = 20 + 22 * (number % 10)
    picture[:, 32:] = COLOURS[number // 10 % 6]
    return picture


def number_of(picture: np.ndarray) -> int:
    """Which frame this is, compressed or resized as it may be."""
    width = picture.shape[1]
    left, right = (picture[:, a:b].reshape(-1, 3).mean(0) for a, b in (
        (width // 8, 3 * width // 8), (5 * width // 8, 7 * width // 8)))
    return round((left.mean() - 20) / 22) + 10 * int(np.abs(COLOURS - right).sum(1).argmin())


def write_sequence(root: Path, sequence: str, split: str = "test", frames: int = 46,
                   rate: int = 20_000,
                   flat: bool = False, seed: int = 0, corner: tuple[int, int] = SIZE) -> Made:
    """`frames` pictures 50 ms apart, `rate` events a second from T_OFFSET to 10 ms after the last one.

    flat: as DSEC's single zips unpack. corner: (width, height) within which the events are.
    """
    folder = root / split / sequence
    names = ([f"{sequence}_events_left/events.h5", f"{sequence}_images_rectified_left",
              f"{sequence}_image_timestamps.txt"] if flat else
             ["events/left/events.h5", "images/left/rectified", "images/timestamps.txt"])
    events, pictures, times = (folder / name for name in names)
    events.parent.mkdir(parents=True)
    pictures.mkdir(parents=True)
    for number in range(frames):
        Image.fromarray(frame(number)).save(pictures / f"{number:06d}.png")
    times.write_text("".join(f"{FIRST_US + 50_000 * number}\n" for number in range(frames)))

    random, length_us = np.random.default_rng(seed), 50_000 * (frames - 1) + 10_280
    count = rate * length_us // 1_000_000
    # Whole 250 ms steps from the first picture are borders of windows: an event lies on each of
    # them.
    borders = np.arange(280, length_us, 250_000)
    t = np.sort(np.concatenate([random.integers(0, length_us, count - len(borders)), borders]))
    x, y = (random.integers(0, side, count) for side in corner)
    p = random.integers(0, 2, count)
    third = count // 3                                        # written in parts, as one writes what is large
    write_events(events, [[column[part] for column in (x, y, p, t)] for part in (
        slice(0, third), slice(third, None))], T_OFFSET, chunk=1000)
    return Made(folder, events, pictures, times, x, y, p, t + T_OFFSET)


def break_picture(made: Made) -> None:
    """As a download that ended early."""
    path = made.pictures / "000007.png"
    path.write_bytes(path.read_bytes()[:60])


def painted(events: list[tuple[int, int, int]], canvas: tuple[int, int],
            blue_over_red: bool) -> np.ndarray:
    """The picture of these events as one would paint it by hand. canvas is (width, height)."""
    picture = np.full((canvas[1], canvas[0], 3), 255, np.uint8)
    if blue_over_red:
        events = sorted(events, key=lambda event: event[2] == 0)
    for x, y, p in events:
        picture[y, x] = (255, 0, 0) if p else (0, 0, 255)
    return picture
