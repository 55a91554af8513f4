"""Picture files (PNG, JPEG, TIFF, ...) as arrays, and PNGs written."""

import io
import os
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from clips.limits import MediaError, check_bytes, check_size, reading_media
from machine.files import write_whole

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")    # damaged metadata

WHITE = (255, 255, 255)
# Told apart by content. Pillow's other readers are not needed, and one of them (EPS) starts another
# program.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
MAX_PICTURE_BYTES = 2**27          # a picture of MAX_PIXELS in 8-bit RGB, not compressed, and some more
MAX_PICTURE_S = 20                 # of reading and decoding; DSEC's pictures take 0.05
# A progressive JPEG has about ten scans. Each one is a pass over all pixels: 5,000 in 509 KiB take
# over a minute.
MAX_SCANS = 100
JPEG_CHUNK = 4096                  # bytes that Pillow decodes at a time: the clock is looked at in between
# Largest value of a grey picture that Pillow holds in more than 8 bits, by the layout in the file.
GREY_RANGE = {"I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535,
              "I;16R": 65535, "I;12": 4095}
# From a grey value in the file to Pillow's, where they differ
GREY_STEP = {"L;2": 85, "L;4": 17}


class TimedFile(io.FileIO):
    """A file that refuses to be read when its time is over, so that a decoder in a loop ends.

    It ends where it ended when it was opened: one that grows meanwhile is not followed.
    """

    def __init__(self, path: Path, seconds: float):
        super().__init__(path)
        self.size = os.fstat(self.fileno()).st_size
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def read(self, size: int | None = -1) -> bytes:
        if time.monotonic() > self.end:
            raise MediaError(f"it takes more than {self.seconds:g} s to decode")
        left = max(0, self.size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def read_event_image(path: Path) -> np.ndarray:
    """A picture of any mode -> (H, W, 3) uint8 RGB in [0, 255], upright; transparent parts are
    white.
    """
    # Readers of broken files raise OSError, SyntaxError, struct.error, KeyError, ...
    with reading_media("picture", path, Exception):
        check_bytes(path, MAX_PICTURE_BYTES)
        with TimedFile(path, MAX_PICTURE_S) as file, Image.open(file, formats=FORMATS) as picture:
            if file.size > MAX_PICTURE_BYTES:                      # it has grown since
                raise MediaError(f"it has {file.size} bytes, wanted {MAX_PICTURE_BYTES} at most")
            check_size(*picture.size)
            if picture.format == "JPEG":
                check_scans(path, file.size)
                picture.decodermaxblock = JPEG_CHUNK
            return to_rgb(picture)


def check_scans(path: Path, size: int) -> None:
    """A MediaError if a JPEG of so many bytes has more scans than any that is meant to be looked
    at.
    """
    with open(path, "rb") as file:
        scans = file.read(size).count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise MediaError(f"a JPEG of {scans} scans, wanted {MAX_SCANS} at most")


def to_rgb(picture: Image.Image) -> np.ndarray:
    layout = raw_mode(picture)
    transparent = picture.info.get("transparency")
    if picture.mode[0] in "IF":
        grey, clear = scaled_grey(picture, layout, transparent)
        picture = Image.fromarray(grey)
        if clear is not None:
            picture.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    elif layout == "RGB;16B" and transparent is not None:
        raise MediaError("16-bit colours of which one is transparent: Pillow reads only their upper 8 bits")
    elif layout in GREY_STEP and isinstance(transparent, int):
        picture.load()
        picture.info["transparency"] = transparent * GREY_STEP[layout]
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE),
                                        picture.convert("RGBA"))
    return np.array(picture.convert("RGB"))


def raw_mode(picture: Image.Image) -> str:
    """How pixels lie in the file, as Pillow tells its decoder: "I;16B", "L;4", ...; else the mode.
    """
    arguments = picture.tile[0].args if getattr(picture, "tile", None) else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else picture.mode


def scaled_grey(picture: Image.Image, layout: str,
                transparent) -> tuple[np.ndarray, np.ndarray | None]:
    """Grey of more than 8 bits -> ((H, W) uint8, (H, W) bool of the transparent pixels or None).

    convert("RGB") would clip the values instead of scaling them. Floats and 32-bit numbers are
    refused: their range is not in the file, so 1.0 may be white or nearly black.
    """
    if layout not in GREY_RANGE:
        raise MediaError(f"its grey values are {layout!r}, whose white is not known; wanted 8 or "
                         "16 bits a pixel without a sign")
    values = np.asarray(picture).astype(np.int32)
    grey = (values * 255 / GREY_RANGE[layout]).clip(0, 255).astype(np.uint8)
    tags = getattr(picture, "tag_v2", {})
    if tags.get(262) == 0:                         # TIFF's PhotometricInterpretation: 0 is white
        grey = 255 - grey
    return grey, values == transparent if isinstance(transparent, int) else None


def write_png(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB as a PNG, whole or not at all."""
    write_whole(path, lambda temporary: Image.fromarray(image).save(temporary, "PNG"))
