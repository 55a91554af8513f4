"""Pictures: what is read is what was written, and what is broken says so."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clips import pictures
from clips.limits import MachineTrouble, MediaError
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
    write_png(tmp_path / "a.png",
              np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
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


# ------------------------------------------------------------ more than 8 bits, transparency, turns
STEPS = np.linspace(0, 65535, 8).astype(np.uint16)


def one_row(path: Path) -> list[int]:
    image = read_event_image(path)
    assert (image == image[..., :1]).all()
    return image[0, :, 0].tolist()


@pytest.mark.parametrize(("suffix", "order"), [("png", "<"), ("tif", "<"), ("tif", ">")])
def test_16_bit_grey_of_either_order_of_bytes_is_scaled(tmp_path, suffix, order):
    Image.fromarray(STEPS[None].astype(f"{order}u2")).save(tmp_path / f"a.{suffix}")
    assert one_row(tmp_path / f"a.{suffix}") == (STEPS // 257).tolist()


def test_16_bit_grey_with_a_transparent_value_is_scaled_and_that_value_is_white(tmp_path):
    for transparent, white in ((int(STEPS[3]), 3), (777, None)):
        Image.fromarray(STEPS[None]).save(tmp_path / "a.png", transparency=transparent)
        wanted = (STEPS // 257).tolist()
        if white is not None:
            wanted[white] = 255
        assert one_row(tmp_path / "a.png") == wanted


def test_a_tiff_whose_zero_is_white_is_inverted(tmp_path):
    Image.fromarray(STEPS[None]).save(tmp_path / "a.tif", tiffinfo={262: 0})
    data = bytearray((tmp_path / "a.tif").read_bytes())
    place = data.index(struct.pack("<HH", 262, 3)) + 8
    data[place:place + 2] = bytes(2)
    (tmp_path / "a.tif").write_bytes(data)
    assert one_row(tmp_path / "a.tif") == [255 - value for value in (STEPS // 257).tolist()]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_grey_whose_white_is_not_known_is_refused(tmp_path, kind):
    values = STEPS[None] / 65535 * (1 if kind is np.float32 else 255)
    Image.fromarray(values.astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match="whose white is not known"):
        read_event_image(tmp_path / "a.tif")


def small_png(path: Path, bits: int, transparent: int | None, colour: int = 0) -> None:
    """One row with all values that so many bits have; Pillow writes no PNG of 2 or 4 bits."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    values = [value % 2**bits for value in range(16)]
    row = int("".join(format(value, f"0{bits}b") for value in values), 2).to_bytes(2 * bits, "big")
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 1, bits, colour, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + (
        chunk(b"tRNS", struct.pack(">H", transparent)) if transparent is not None else b"") +
                     chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_grey_values_are_scaled_and_the_transparent_one_is_white(tmp_path, bits):
    step, values = 255 // (2**bits - 1), [value % 2**bits for value in range(16)]
    small_png(tmp_path / "a.png", bits, None)
    assert one_row(tmp_path / "a.png") == [step * value for value in values]
    small_png(tmp_path / "a.png", bits, 0)
    assert one_row(tmp_path / "a.png") == [step * value if value else 255 for value in values]


@pytest.mark.parametrize("transparency", [2, bytes([255, 255, 0, 255])])
def test_a_palette_with_transparent_entries_becomes_white_there(tmp_path, transparency):
    picture = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8))
    picture.putpalette([0, 0, 0, 80, 80, 80, 160, 160, 160, 240, 240, 240])
    picture.save(tmp_path / "a.png", transparency=transparency)
    assert one_row(tmp_path / "a.png") == [0, 80, 255, 240]


def test_a_picture_is_turned_as_its_metadata_says(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    exif = picture.getexif()
    # The camera was held with its right side down
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_event_image(tmp_path / "a.png"), np.rot90(np.asarray(picture), -1))


# ---------------------------------------------------------------------------------- bounds, trouble
def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(tmp_path):
    Image.new("L", (64, 64), 128).save(tmp_path / "a.jpg", progressive=True)
    data = (tmp_path / "a.jpg").read_bytes()
    assert read_event_image(tmp_path / "a.jpg").shape == (64, 64, 3)
    last = data.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(data[:last] + data[last:-2] * 5000 + data[-2:])
    with pytest.raises(MediaError, match="a JPEG of 50"):
        read_event_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("head", [b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"GIF89a\1\0\1\0\0\0\0"])
def test_a_picture_without_an_end_is_read_only_so_long(tmp_path, monkeypatch, head):
    monkeypatch.setattr(pictures, "MAX_PICTURE_S", 0.2)
    for size, words in ((20 * 2**30, "bytes, wanted"), (2**26, "takes more than 0.2 s")):
        with open(tmp_path / "a.png", "wb") as file:
            file.write(head)
            file.truncate(size)
        with pytest.raises(MediaError, match=words):
            read_event_image(tmp_path / "a.png")


def test_an_error_of_the_system_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    for error in (OSError(24, "Too many open files"), OSError(13, "Permission denied"),
                  OSError(116, "Stale file handle"),
                  MemoryError()):
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(pictures.Image, "open", fail)
        with pytest.raises(MachineTrouble, match=r"a\.png.*no fault of the clip"):
            read_event_image(tmp_path / "a.png")


def test_a_picture_that_grows_while_it_is_read_is_not_followed(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.jpeg")
    check = pictures.check_scans

    def grow(path, size):
        with open(path, "ab") as file:
            file.truncate(20 * 2**30)
        check(path, size)

    monkeypatch.setattr(pictures, "check_scans", grow)
    assert read_event_image(tmp_path / "a.jpeg").shape == (8, 8, 3)
