"""Pictures: what is read is what was written, and what is broken says so."""

import numpy as np
import pytest
from PIL import Image

from clips.limits import MediaError
from clips.pictures import read_event_image, write_png


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "CMYK"])
def test_pictures_of_any_mode_become_rgb(tmp_path, mode):
    red_left = np.full((5, 8, 3), 255, np.uint8)
    red_left[:, :4] = (0, 0, 0)
    suffix = "tif" if mode == "CMYK" else "png"
    Image.fromarray(red_left).convert(mode).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_event_image(tmp_path / f"a.{suffix}"), red_left)


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_event_image(tmp_path / "a.png") == 255).all()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((2, 2), 128 * 257, np.uint16)).save(tmp_path / "a.png")
    assert (read_event_image(tmp_path / "a.png") == 128).all()


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_broken_pictures_are_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(MediaError, match=r"bad\.png"):
        read_event_image(tmp_path / "bad.png")


def test_a_cut_picture_and_a_missing_one_are_named(tmp_path):
    write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:len(data) // 2])
    with pytest.raises(MediaError, match="can't read"):
        read_event_image(tmp_path / "a.png")
    with pytest.raises(MediaError, match="no such picture"):
        read_event_image(tmp_path / "b.png")


def test_a_picture_of_absurd_size_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (20_000, 10)).save(tmp_path / "wide.png")
    with pytest.raises(MediaError, match="20000 x 10 px"):
        read_event_image(tmp_path / "wide.png")
