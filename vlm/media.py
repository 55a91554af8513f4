"""Event pictures, raw events and videos as arrays, the pixels a CLIP tower wants, and the writers of both files.

Every reader raises MediaError with the reason when one file can't be used; the caller decides what that costs.
Reading is thread-safe and lets go of Python's lock while Pillow and FFmpeg work, so a few threads keep a GPU fed.
"""

import dataclasses
import itertools
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

import base

Render = Literal["time", "blue_over_red"]            # how event pictures are painted: see EventPicture
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
MAX_SIDE = 16384           # px; DSEC has 1440 x 1080; beyond this a header is broken or hostile
MAX_FRAMES = 100_000       # 83 minutes at 20 fps


class MediaError(Exception):
    """This picture, event file or video can't be used; the message says why."""


# ------------------------------------------------------------------------------------------ pictures
def read_event_image(path: Path) -> np.ndarray:
    """A picture of any mode and size -> (H, W, 3) uint8 RGB in [0, 255]. Transparent parts become white."""
    try:
        with Image.open(path) as picture:
            check_size(*picture.size)
            if picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture.convert("RGBA"))
            elif picture.mode.startswith(("I", "F")):       # 16-bit grey: convert("RGB") would clip, not scale
                picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
            return np.array(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise MediaError(f"no such picture: {path}") from error
    # Pillow raises a SyntaxError for a broken PNG chunk and a ValueError for some broken headers.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"can't read the picture {path}: {error}") from error


def write_png(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB as a PNG, whole or not at all."""
    base.write_whole(path, lambda temporary: Image.fromarray(image).save(temporary, "PNG"))


def check_size(width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(f"{width} x {height} px, wanted 1 to {MAX_SIDE} px a side")


# ---------------------------------------------------------------------------------------- raw events
class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, scalars and plain containers; anything else in the file is refused, not executed."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise MediaError(f"the file wants to load {module}.{name}: refused")


def read_events(path: Path) -> dict[str, np.ndarray]:
    """Raw events (np.save of a dict) -> {"x", "y", "t", "p"}: 1-D arrays of one length; x, y px, t us, p 0 or 1."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = header[version](file)
            if shape != () or not dtype.hasobject:
                raise MediaError(f"{path} holds an array {shape} of {dtype}, wanted a dict with x, y, t and p")
            found = _ArraysOnly(file).load()
            found = found.item() if isinstance(found, np.ndarray) else found
        events = {name: np.asarray(found[name]) for name in "xytp"}
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(f"no such event file: {path}") from error
    except Exception as error:      # a torn or hostile pickle can raise nearly anything
        raise MediaError(f"can't read the events of {path}: {type(error).__name__}: {error}") from error
    lengths = {array.shape for array in events.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1 or any(a.dtype.kind not in "iu" for a in events.values()):
        raise MediaError(f"{path}: x, y, t and p must be whole-number columns of one length")
    if events["x"].size:
        check_size(int(events["x"].max()) + 1, int(events["y"].max()) + 1)
        if min(events["x"].min(), events["y"].min()) < 0:
            raise MediaError(f"{path}: negative pixel coordinates")
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
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path} has no video stream")
            announced = container.streams.video[0].frames
        total = announced or sum(1 for _ in _decode(path))
        if not 0 < total <= MAX_FRAMES:
            raise MediaError(f"{path} has {total} frames, wanted 1 to {MAX_FRAMES}")
        wanted = np.linspace(0, total - 1, num_frames).astype(int).tolist()
        chosen, seen = {}, 0
        for seen, frame in enumerate(_decode(path), start=1):
            if seen - 1 in wanted:
                chosen[seen - 1] = frame.to_ndarray(format="rgb24")
        if seen < total:
            raise MediaError(f"{path} is cut short: {seen} of {total} frames could be decoded")
    except FileNotFoundError as error:
        raise MediaError(f"no such video: {path}") from error
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise MediaError(f"can't read the video {path}: {error}") from error
    if len({frame.shape for frame in chosen.values()}) > 1:
        raise MediaError(f"{path}: the frame size changes on the way")
    return [chosen[index] for index in wanted]


def _decode(path: Path):
    """Yield every frame of the first video stream, undecoded pixels still in the codec's own format."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        check_size(stream.codec_context.width, stream.codec_context.height)
        stream.thread_type = "NONE"              # several clips are read at once: threads within one cost more
        yield from container.decode(stream)


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

    base.write_whole(path, write)


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
        found = base.read_json(file) if file and file.is_file() else {}
        size, crop = found.get("size", image_size), found.get("crop_size", image_size)
        size = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
        crop = crop.get("height") if isinstance(crop, dict) else crop
        resample = found.get("resample", Image.Resampling.BICUBIC)
        if crop != image_size or resample != Image.Resampling.BICUBIC or not isinstance(size, int):
            raise base.UserError(f"{file}: size {size}, crop_size {crop} and resample {resample} can't be used: "
                                 f"wanted bicubic (3) and the vision tower's {image_size} px")
        return PixelSettings(size, crop, tuple(found.get("image_mean", PixelSettings.mean)),
                             tuple(found.get("image_std", PixelSettings.std)),
                             found.get("rescale_factor", 1 / 255))


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
