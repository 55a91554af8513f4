"""Windows of a DSEC recording as clips: the event pictures and the video of each one.

Windows start at a sequence's first picture and then every stride, as long as they end by its last
picture. Events are read and painted in slices, so memory depends neither on the recording nor on
the window.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from base import UserError, log
from clips.dsec import EventFile, Recording
from clips.events import EventPicture, Render, equal_parts
from clips.limits import MAX_SIDE, MediaError, still_there
from clips.pictures import read_event_image, write_png
from clips.videos import write_video

MAX_SHARED_FRAMES = 40             # decoded frames that wait for the next clip: 187 MB at 1440 x 1080


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the files of a data set folder depend on, spelled like the flags of prepare_dsec.py."""

    split: Literal["train", "test"]
    duration: str                      # 500ms, 1s, 2s, ...
    stride: str = "half"               # half of the duration, none (no overlap), or milliseconds
    event_images: int = 5              # event pictures a clip, with equally many events
    render: Render = "time"
    canvas: str = "640x480"            # width x height of event pictures
    video_size: str = "1440x1080"      # width x height of videos

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d{0,5}(ms|s)", self.duration):
            raise UserError("--duration must be milliseconds or seconds like 500ms or 2s, got "
                            f"{self.duration!r}")
        if not re.fullmatch(r"half|none|[1-9]\d{0,8}", self.stride):
            raise UserError(f"--stride must be half, none or milliseconds (1 or more), got {self.stride!r}")
        for name, step in (("canvas", 1), ("video_size", 2)):
            match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", getattr(self, name))
            sides = [int(side) for side in match.groups()] if match else [0]
            if not all(0 < side <= MAX_SIDE and side % step == 0 for side in sides):
                even = " and even (H.264 needs it)" if step == 2 else ""
                raise UserError(f"--{name} must be WIDTHxHEIGHT of 1 to {MAX_SIDE} px a "
                                f"side{even}, got {getattr(self, name)!r}")
        if not 1 <= self.event_images <= 10:
            raise UserError(f"--event_images must be from 1 to 10, got {self.event_images}")

    @property
    def duration_us(self) -> int:
        unit = "ms" if self.duration.endswith("ms") else "s"
        return int(self.duration.removesuffix(unit)) * {"ms": 1000, "s": 1_000_000}[unit]

    @property
    def stride_us(self) -> int:
        named = {"half": self.duration_us // 2, "none": self.duration_us}
        return named[self.stride] if self.stride in named else int(self.stride) * 1000


def size_of(text: str) -> tuple[int, int]:
    """"640x480" -> (640, 480), width and height."""
    width, height = text.split("x")
    return int(width), int(height)


@dataclasses.dataclass(frozen=True)
class Clip:
    """One window of a recording, start <= time < end, and the pictures taken in it."""

    sequence: str
    number: int
    start_us: int
    end_us: int
    events: Path
    frames: list[Path]

    @property
    def name(self) -> str:
        return f"{self.sequence}/{self.number:06d}"

    def picture_names(self, count: int) -> list[str]:
        """Relative to event_image/."""
        return [f"{self.name}_{k}.png" for k in range(count)]

    def files(self, event_images: int) -> list[str]:
        """Relative to the data set folder."""
        return [f"mp4/{self.name}.mp4", *(f"event_image/{name}"
                                          for name in self.picture_names(event_images))]


def window_starts(first_us: int, last_us: int, duration_us: int, stride_us: int) -> range:
    """Start times: the first picture, then every stride, as long as a window ends by the last picture."""
    return range(first_us, last_us - duration_us + 1, stride_us)


def clips_of(recording: Recording, recipe: Recipe) -> list[Clip]:
    length_us = recipe.duration_us
    starts = window_starts(recording.times[0], recording.times[-1], length_us, recipe.stride_us)
    if not starts:
        log(f"prepare | {recording.sequence} is shorter than {recipe.duration}: no clips")
    return [Clip(recording.sequence, number, start, start + length_us, recording.events,
                 recording.between(start, start + length_us))
            for number, start in enumerate(starts)]


# --------------------------------------------------------------------------------- one clip's files
def draw_events(events: EventFile, clip: Clip, recipe: Recipe) -> list[np.ndarray]:
    """The clip's event pictures, (H, W, 3) uint8 RGB each; at most one slice of its events is in memory."""
    first, last = events.between(clip.start_us, clip.end_us)
    width, height = size_of(recipe.canvas)
    pictures = []
    for start, end in equal_parts(last - first, recipe.event_images):
        picture = EventPicture(height, width, recipe.render)
        for x, y, p in events.slices(first + start, first + end):
            picture.paint(x, y, p)
        pictures.append(picture.image())
    return pictures


def read_frame(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A camera picture -> (H, W, 3) uint8 RGB of this width and height."""
    with still_there(path):
        frame = read_event_image(path)
    if frame.shape[1::-1] != size:
        frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    return frame


def make_clip(events: EventFile, clip: Clip, folder: Path, recipe: Recipe,
              read_frame: Callable) -> None:
    """Write the clip's video, then its event pictures; its events are read before that."""
    if not clip.frames:
        raise MediaError("no pictures")
    pictures = draw_events(events, clip, recipe)
    # One thread: other clips keep the other cores busy, and the bytes don't depend on their number.
    write_video(folder / "mp4" / f"{clip.name}.mp4", map(read_frame, clip.frames), threads=1)
    for name, picture in zip(clip.picture_names(recipe.event_images), pictures):
        write_png(folder / "event_image" / name, picture)


def make_block(clips: list[Clip], folder: Path, recipe: Recipe) -> list[str | None]:
    """Make neighbouring clips of one sequence; -> why each could not be made, None if it was.

    Frames that two of them share are decoded once. Measured on one core with 1 s windows at full
    size: a sixth less time; reading the events once too would save another 3 % and hold half a
    window of them in memory.
    """
    shared = max((len({*a.frames} & {*b.frames}) for a, b in itertools.pairwise(clips)), default=0)
    cache = functools.lru_cache(shared if shared <= MAX_SHARED_FRAMES else 0)
    cached_frame = cache(functools.partial(read_frame, size=size_of(recipe.video_size)))
    reasons: list[str | None] = []
    try:
        with EventFile(clips[0].events) as events:
            for clip in clips:
                try:
                    make_clip(events, clip, folder, recipe, cached_frame)
                    reasons.append(None)
                except MediaError as error:
                    reasons.append(str(error))
    except MediaError as error:                    # the event file changed since it was checked
        return [str(error)] * len(clips)
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error}") from error
    return reasons
