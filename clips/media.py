"""Event pictures, raw events and videos as arrays, the pixels a CLIP tower wants, and the writers of both files.

Every reader raises MediaError with the reason when one file can't be used; the caller decides what that costs.
Reading is thread-safe and lets go of Python's lock while Pillow and FFmpeg work, so a few threads keep a GPU fed.
"""

import dataclasses
import itertools
import pickle
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from base import UserError
from machine.files import read_json, write_whole

Render = Literal["time", "blue_over_red"]            # how event pictures are painted: see EventPicture
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
# Beyond these a file is broken or hostile; DSEC has clips of 1440 x 1080 px and up to 320 frames.
MAX_SIDE = 16384           # px
MAX_PIXELS = 2**25         # in a picture or frame: 8K; a few such at once still fit into memory
MAX_RATIO = 100            # of the sides: the shorter one is what CLIP's resizing goes by
MAX_FRAMES = 100_000       # 83 minutes at 20 fps
MAX_DECODING_S = 600       # of one video; 100,000 frames of 1440 x 1080 px take about as long
# By content; Pillow's other readers have no business here, and one of them (EPS) starts another program.
PICTURES = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
# FFmpeg reads play lists too, which name other files and hosts; only single files of these containers are opened.
CONTAINERS = {"format_whitelist": "mov,matroska,avi,mpegts,h264,hevc", "protocol_whitelist": "file"}


class MediaError(Exception):
    """This picture, event file or video can't be used; the message says why."""


# ------------------------------------------------------------------------------------------ pictures
def read_event_image(path: Path) -> np.ndarray:
    """A picture of any mode and size -> (H, W, 3) uint8 RGB in [0, 255]. Transparent parts become white."""
    try:
        check_file(path)
        with Image.open(path, formats=PICTURES) as picture:
            check_size(*picture.size)
            if picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture.convert("RGBA"))
            elif picture.mode.startswith(("I", "F")):       # 16-bit grey: convert("RGB") would clip, not scale
                picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
            return np.array(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise MediaError(f"no such picture: {path}") from error
    except MediaError as error:
        raise MediaError(f"can't read the picture {path}: {error}") from error
    except Exception as error:      # readers of broken files raise OSError, SyntaxError, struct.error, KeyError, ...
        raise MediaError(f"can't read the picture {path}: {type(error).__name__}: {error}") from error


def write_png(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB as a PNG, whole or not at all."""
    write_whole(path, lambda temporary: Image.fromarray(image).save(temporary, "PNG"))


def check_file(path: Path) -> None:
    """A pipe or a device would be read for ever."""
    if path.exists() and not path.is_file():
        raise MediaError("it is no regular file")


def check_size(width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(f"{width} x {height} px, wanted 1 to {MAX_SIDE} px a side")
    if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
        raise MediaError(f"{width} x {height} px, wanted {MAX_PIXELS} px at most, sides up to 1 : {MAX_RATIO}")


# ---------------------------------------------------------------------------------------- raw events
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


class EventPicture:
    """A white picture that events are painted on, part by part in time order: p == 0 blue, else red.

    time: the last event of a pixel wins, as in EventGPT's own inference. blue_over_red: a pixel that has any p == 0
    is blue, as in the pictures from which the published pairs were made.
    """

    # Events painted at a time: their places, 8 bytes each, stay in the processor's cache. Measured on one core: 480
    # million events a second, and 160 million when 10 million events were painted at once.
    BLOCK = 2**16
    COLOURS = np.array([WHITE, RED, BLUE], np.uint8)

    def __init__(self, height: int, width: int, render: Render = "time"):
        self.height, self.width, self.render = height, width, render
        # time: one mark a pixel, 1 red or 2 blue. blue_over_red: two a pixel, whether it saw red and blue.
        self.marks = np.zeros(height * width * (1 if render == "time" else 2), np.uint8)

    def paint(self, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> None:
        """x, y, p: 1-D whole numbers of one length, oldest first."""
        if not len(x):
            return
        (left, top), (right, bottom) = ((int(end(x)), int(end(y))) for end in (np.min, np.max))
        if left < 0 or top < 0 or right >= self.width or bottom >= self.height:
            raise MediaError(f"events from pixel ({left}, {top}) to ({right}, {bottom}) don't fit into a picture of "
                             f"{self.width} x {self.height}")
        for start in range(0, len(x), self.BLOCK):
            block = slice(start, start + self.BLOCK)
            place = y[block].astype(np.intp)
            place *= self.width
            place += x[block].astype(np.intp, copy=False)
            blue = p[block] == 0
            if self.render == "time":      # NumPy assigns repeated indices in order: the last one stays
                self.marks[place] = blue + np.uint8(1)
            else:
                place *= 2
                place += blue
                self.marks[place] = 1

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        marks = self.marks
        if self.render != "time":
            marks = np.maximum(marks[0::2], 2 * marks[1::2])
        return self.COLOURS[marks].reshape(self.height, self.width, 3)


def render_events(x: np.ndarray, y: np.ndarray, p: np.ndarray, canvas: tuple[int, int] | None = None,
                  render: Render = "time") -> np.ndarray:
    """Events in time order -> (H, W, 3) uint8 RGB, as EventPicture paints them.

    canvas is (H, W); without one the picture ends at the largest coordinates, as in EventGPT's own inference.
    """
    if not len(x):
        raise MediaError("no events to draw")
    picture = EventPicture(*(canvas or (int(y.max()) + 1, int(x.max()) + 1)), render)
    picture.paint(x, y, p)
    return picture.image()


def equal_parts(total: int, count: int) -> list[tuple[int, int]]:
    """(start, end) of `count` parts with equally many of `total` events; the last one takes the remainder."""
    if total < count:
        raise MediaError(f"{total} events, wanted at least {count}" if total else "no events")
    size = total // count
    return list(itertools.pairwise([*(size * k for k in range(count)), total]))


def event_frames(events: dict[str, np.ndarray], count: int = 5,
                 canvas: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Split by event COUNT into `count` parts (the last takes the remainder) and render each one."""
    return [render_events(*(events[name][start:end] for name in "xyp"), canvas)
            for start, end in equal_parts(len(events["x"]), count)]


# -------------------------------------------------------------------------------------------- videos
def read_video(path: Path, num_frames: int = 8) -> list[np.ndarray]:
    """`num_frames` uniformly sampled frames (H, W, 3) uint8 RGB, all of one size, oldest first.

    Frame k is number int(k (n - 1) / (num_frames - 1)) of n, as np.linspace(0, n - 1, num_frames) truncated; a
    shorter video repeats frames. Every frame is decoded and counted, because a container may announce 0 frames
    (mkv, webm, ts) or more than are there: FFmpeg ends such a file without an error.
    """
    import av

    try:
        check_file(path)
        with av.open(str(path), options=CONTAINERS) as container:
            if not container.streams.video:
                raise MediaError("it has no video stream")
            announced = container.streams.video[0].frames
        total = announced or sum(1 for _ in _decode(path))
        if not 0 < total <= MAX_FRAMES:
            raise MediaError(f"{total} frames, wanted 1 to {MAX_FRAMES}")
        wanted = np.linspace(0, total - 1, num_frames).astype(int).tolist()
        chosen, seen = {}, 0
        for seen, frame in enumerate(_decode(path), start=1):
            if seen - 1 in wanted:
                chosen[seen - 1] = frame.to_ndarray(format="rgb24")
        if seen < total:
            raise MediaError(f"it is cut short: {seen} of {total} frames could be decoded")
        if len({frame.shape for frame in chosen.values()}) > 1:
            raise MediaError("the frame size changes on the way")
    except FileNotFoundError as error:
        raise MediaError(f"no such video: {path}") from error
    except MediaError as error:
        raise MediaError(f"can't read the video {path}: {error}") from error
    except (av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError) as error:
        raise MediaError(f"can't read the video {path}: {error}") from error
    return [chosen[index] for index in wanted]


def _decode(path: Path) -> Iterator:
    """Yield every frame of the first video stream, undecoded pixels still in the codec's own format."""
    import av

    end, seen = time.monotonic() + MAX_DECODING_S, 0
    with av.open(str(path), options=CONTAINERS) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise MediaError("FFmpeg knows no decoder for its video")
        check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}        # of frames that turn out larger
        stream.thread_type = "NONE"              # several clips are read at once: threads within one cost more
        for packet in container.demux(stream):
            for frame in packet.decode():
                seen += 1
                yield frame
            if seen > MAX_FRAMES or time.monotonic() > end:
                raise MediaError(f"more than {MAX_FRAMES} frames, or {MAX_DECODING_S} s of decoding")


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int = 20, crf: int = 28, threads: int = 0) -> None:
    """Write (H, W, 3) uint8 RGB frames as H.264 (yuv420p), whole or not at all. Sides must be even.

    threads: 0 leaves the number to FFmpeg, which makes the bytes depend on the machine's cores.
    """
    import av

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = None
            for frame in frames:
                if stream is None:
                    # mbtree off: on processors with AVX-512 it gives other bytes from call to call.
                    stream = container.add_stream("libx264", rate=fps, options={
                        "crf": str(crf), "preset": "fast", "x264-params": "mbtree=0"})
                    stream.codec_context.thread_count = threads
                    stream.height, stream.width = frame.shape[:2]
                    stream.pix_fmt = "yuv420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            assert stream is not None, f"no frames for {path}"
            container.mux(stream.encode())

    write_whole(path, write)


# --------------------------------------------------------------------------------------- CLIP pixels
@dataclasses.dataclass(frozen=True)
class PixelSettings:
    """How pictures become a CLIP tower's input; the defaults are those of OpenAI's CLIP at 224 px."""

    resize: int = 224              # px, the shortest edge after resizing (bicubic)
    crop: int = 224                # px, the centre square that is kept
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale: float = 1 / 255

    @staticmethod
    def read(file: Path | None, image_size: int) -> "PixelSettings":
        """From a preprocessor_config.json (old style: plain numbers; new: dicts); without one, CLIP's defaults."""
        found = read_json(file) if file and file.is_file() else {}
        found = found if isinstance(found, dict) else {}
        size, crop = found.get("size", image_size), found.get("crop_size", image_size)
        size = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
        crop = crop.get("height") if isinstance(crop, dict) else crop
        resample = found.get("resample", Image.Resampling.BICUBIC)
        fits = type(crop) is type(size) is int and crop == image_size and crop <= size <= 8 * crop
        if not fits or resample != Image.Resampling.BICUBIC:
            raise UserError(f"{file}: size {size}, crop_size {crop} and resample {resample} can't be used: "
                            f"wanted bicubic (3) and the vision tower's {image_size} px")
        mean, std = found.get("image_mean", PixelSettings.mean), found.get("image_std", PixelSettings.std)
        rescale = found.get("rescale_factor", 1 / 255)
        numbers = all(isinstance(three, (list, tuple)) and len(three) == 3 and all(map(_is_number, three))
                      for three in (mean, std))
        if not numbers or 0 in std or not _is_number(rescale):
            raise UserError(f"{file}: wanted three numbers as image_mean, three as image_std (none of them 0), "
                            "and one as rescale_factor")
        return PixelSettings(size, crop, tuple(mean), tuple(std), rescale)


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6          # which is no NaN


def clip_pixels(images: Iterable[np.ndarray], settings: PixelSettings) -> np.ndarray:
    """(H, W, 3) uint8 RGB pictures -> (number, 3, S, S) float32, resized, centre-cropped and normalised.

    Pillow's bicubic, as in CLIP's own preprocessing; torchvision's resampling gives other pixels.
    """
    # In this order and precision it repeats the reference processors bit for bit; there are only 256 values.
    scaled = (np.arange(256, dtype=np.uint8).astype(np.float64) * settings.rescale).astype(np.float32)
    tables = [(scaled - np.float32(mean)) / np.float32(std) for mean, std in zip(settings.mean, settings.std)]
    pixels = []
    for image in images:
        height, width = image.shape[:2]
        short = min(height, width)
        size = [int(settings.resize * side / short) if side != short else settings.resize for side in (width, height)]
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left, top = ((side - settings.crop) // 2 for side in size)
        square = np.asarray(resized.crop((left, top, left + settings.crop, top + settings.crop)))
        pixels.append([table[square[..., channel]] for channel, table in enumerate(tables)])
    return np.array(pixels)
