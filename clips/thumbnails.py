"""Small pictures of a clip for a page, as data: URIs: a film strip of frames, an event picture."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

STRIP_FRAMES, FRAME_WIDTH = 8, 128  # frames of a strip, of which four stand in a row
IN_A_ROW = 4
EVENT_WIDTH = 168
QUALITY = 55  # of the JPEG: a strip of eight frames takes about 15 KB
TALLEST = 2  # heights of a picture over its width that are shown whole


def small(picture: np.ndarray, width: int) -> Image.Image:
    """(H, W, 3) uint8 RGB -> a picture of this width; one that is very tall is cut."""
    height, full_width = picture.shape[:2]
    shown = Image.fromarray(picture[: TALLEST * full_width])
    return shown.resize(
        (width, max(1, round(width * min(height, TALLEST * full_width) / full_width))),
        Image.Resampling.BILINEAR,
        reducing_gap=2.0,
    )


def film_strip(frames: list[np.ndarray]) -> str:
    """At most STRIP_FRAMES of the frames, oldest first, in rows; a data: URI."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, STRIP_FRAMES).astype(int))
    pictures = [small(frames[number], FRAME_WIDTH) for number in chosen]
    height, gap = max(picture.height for picture in pictures), 2
    rows = -(-len(pictures) // IN_A_ROW)
    across = min(IN_A_ROW, len(pictures))
    strip = Image.new(
        "RGB", (across * (FRAME_WIDTH + gap) - gap, rows * (height + gap) - gap), "white"
    )
    for place, picture in enumerate(pictures):
        row, column = divmod(place, IN_A_ROW)
        strip.paste(picture, (column * (FRAME_WIDTH + gap), row * (height + gap)))
    return data_uri(strip)


def event_picture(pictures: list[np.ndarray]) -> str:
    """The first event picture; a data: URI."""
    return data_uri(small(pictures[0], EVENT_WIDTH))


def data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
