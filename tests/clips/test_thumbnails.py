"""Small pictures are small, whole, and nothing but pictures."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from clips.thumbnails import EVENT_WIDTH, FRAME_WIDTH, STRIP_FRAMES, event_picture, film_strip
from reports.html import PICTURE


def opened(uri: str) -> Image.Image:
    assert PICTURE.fullmatch(uri)
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), 20 * number, np.uint8) for number in range(count)]


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (128, 96)), (3, (388, 96)), (8, (518, 194)), (12, (518, 194))]
)
def test_a_film_strip_shows_frames_from_the_first_to_the_last(count, shape):
    strip = opened(film_strip(frames(count)))
    assert strip.size == shape
    last_row, last_column = divmod(min(count, STRIP_FRAMES) - 1, 4)
    place = last_column * (FRAME_WIDTH + 2) + 60, last_row * 98 + 40
    assert (
        abs(strip.getpixel((60, 40))[0]) < 6
        and abs(strip.getpixel(place)[0] - 20 * (count - 1)) < 6
    )


def test_a_strip_of_noise_stays_small():
    noise = np.random.default_rng(0).integers(0, 255, (8, 480, 640, 3), dtype=np.uint8)
    assert len(film_strip(list(noise))) < 60_000


@pytest.mark.parametrize("shape", [(1, 1), (480, 640), (5000, 2), (2, 5000)])
def test_a_picture_of_any_shape_becomes_a_small_one(shape):
    picture = opened(event_picture([np.zeros((*shape, 3), np.uint8)]))
    assert picture.width == EVENT_WIDTH and picture.height <= 2 * EVENT_WIDTH
