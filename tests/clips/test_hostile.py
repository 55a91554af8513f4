"""Media files that mean harm: bombs, pickles that want to run, play lists, files without an end."""

import contextlib
import os
import pickle
import signal
import struct
import time
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ImageFile

from clips import limits, videos
from clips.event_files import read_events
from clips.limits import MediaError
from clips.pictures import read_event_image, write_png
from clips.videos import read_video, write_video
from tests.clips.test_videos import make_video


@pytest.fixture(autouse=True)
def no_hang():
    """What hangs in Python ends here."""
    def ended(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Runs:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ----------------------------------------------------------------------------------------- pictures
def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("size", [(16_384, 16_384), (16_384, 1), (8_000, 8_000), (2**31 - 1, 2)])
def test_a_picture_too_large_or_narrow_is_refused_before_it_is_decoded(tmp_path, monkeypatch, size):
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    content = (tmp_path / "a.png").read_bytes()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(content[:8] + header + content[33:])

    def load(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MediaError, match=r"can't read the picture .*(px, wanted|exceeds limit)"):
        read_event_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_texts_and_profiles_that_unpack_to_very_much_are_refused(tmp_path, name):
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    content = (tmp_path / "a.png").read_bytes()
    front = b"a\0\1\0\0\0" if name == b"iTXt" else b"a\0\0"
    bomb = chunk(name, front + zlib.compress(bytes(2**26)))
    (tmp_path / "a.png").write_bytes(content[:33] + bomb + content[33:])
    assert (tmp_path / "a.png").stat().st_size < 2**17                        # 64 MiB of zeros
    with pytest.raises(MediaError, match="too large"):
        read_event_image(tmp_path / "a.png")


def test_a_drawing_in_postscript_starts_no_other_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path /
     "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(MediaError, match="cannot identify"):
        read_event_image(tmp_path / "a.png")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("read", [read_event_image, read_events, read_video])
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="no regular file"):
        read(tmp_path / "pipe")


# ------------------------------------------------------------------------------------------- videos
@pytest.fixture
def video(tmp_path) -> Path:
    write_video(tmp_path / "a.mp4", [np.full((48, 64, 3), 20 * k, np.uint8) for k in range(10)])
    return tmp_path / "a.mp4"


@pytest.mark.parametrize(("limit", "value", "words"), [
    ("MAX_FRAMES", 9, "10 frames, wanted 1 to 9"),
    ("MAX_PIXELS", 64 * 48 - 1, "64 x 48 px, wanted"),
    ("MAX_SIDE", 63, "64 x 48 px, wanted")])
def test_what_a_video_announces_is_bounded_before_it_is_decoded(video, monkeypatch, limit, value, words):
    def decode(*_):
        raise AssertionError("decoded")

    assert len(read_video(video)) == 8
    monkeypatch.setattr(videos if limit == "MAX_FRAMES" else limits, limit, value)
    monkeypatch.setattr(av.container.InputContainer, "demux", decode)
    with pytest.raises(MediaError, match=words):
        read_video(video)


def stream(path: Path, frames: list[np.ndarray]) -> bytes:
    """Frames as H.264 in no container."""
    with av.open(str(path), "w", format="h264") as file:
        out = file.add_stream("libx264", rate=20)
        out.height, out.width = frames[0].shape[:2]
        for frame in frames:
            file.mux(out.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(out.encode())
    return path.read_bytes()


def test_a_video_that_announces_nothing_is_counted_only_so_far(tmp_path, monkeypatch):
    path = tmp_path / "a.h264"
    stream(path, [np.full((48, 64, 3), 8 * k, np.uint8) for k in range(30)])
    assert len(read_video(path)) == 8
    monkeypatch.setattr(videos, "MAX_FRAMES", 9)
    with pytest.raises(MediaError, match="more than 9 frames"):
        read_video(path)


def test_frames_that_turn_out_larger_than_announced_are_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.h264"
    small, large = (stream(path, [np.zeros((48 * k, 64 * k, 3), np.uint8)] * 9) for k in (1, 4))
    path.write_bytes(small + large)
    with pytest.raises(MediaError, match="the frame size changes on the way"):
        read_video(path)
    monkeypatch.setattr(limits, "MAX_PIXELS", 100 * 100)
    seen = set()
    # Some versions end here, some go on
    with contextlib.suppress(av.error.FFmpegError):
        for frame in videos._decode(path, 0, time.monotonic() + 60):
            seen.add((frame.width, frame.height))
    assert seen == {(64, 48)}
    with pytest.raises(MediaError):
        read_video(path)


def test_decoding_ends_after_its_time(video, monkeypatch):
    monkeypatch.setattr(videos, "MAX_DECODING_S", -1)
    with pytest.raises(MediaError, match="s of decoding"):
        read_video(video)


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n",
                                  "ffconcat version 1.0\nfile {other}\n",
                                  "v=0\nm=video 5004 RTP/AVP 96\n"])
def test_a_play_list_that_names_other_files_is_no_video(video, tmp_path, text):
    (tmp_path / "list.mp4").write_text(text.format(other=video.name))
    with pytest.raises(MediaError, match=r"can't read the video .*list\.mp4"):
        read_video(tmp_path / "list.mp4")


# --------------------------------------------------------------------------------------- raw events
def event_file(path: Path, operations: bytes) -> Path:
    """As np.save makes one, with these operations of a pickle in it."""
    np.save(path, {"x": 1}, allow_pickle=True)
    path.write_bytes(path.read_bytes()[:128] + b"\x80\x04" + operations + b".")
    return path


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\x01btR"
OBJECTS, BYTES = (b"cnumpy\ndtype\n(X" + struct.pack("<I", 2) + name + b"\x89\x88tR"
                  for name in (b"O8", b"u1"))
NESTED = b"K\x01" + b"\x940h\0h\0\x86" * 0 + b"".join(b"q%ch%ch%c\x86" % (k, k, k) for k in range(1, 40))


@pytest.mark.parametrize(("name", "operations"), {
    "a memo that would take 16 GiB": b"}r\xff\xff\xff\x7f",
    "a text that would take 2 GiB": b"X\xff\xff\xff\x7f",
    "a thousand objects of which there is one": ARRAY + b"(K\x01(M\xe8\x03t" + OBJECTS + b"\x89]NatRb",
    "objects in an array of numbers": ARRAY + b"(K\x01(K\x09t" + BYTES + b"\x89]Natb",
    "bytes as objects": ARRAY + b"(K\x01(K\x01t" + OBJECTS + b"\x89C\x08" + b"\x41" * 8 + b"tb",
    "a key that is hashed for ever": b"}(" + NESTED + b"K\x01u",
    "numbers said to be objects": BYTES + b"(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb",
    "a call of numpy": b"cnumpy\nload\n(X\x0b\0\0\0/etc/passwdtR",
    "an attribute of the unpickler's own": b"cnumpy\n_reconstruct.__init__\n)R",
    "a set": b"(K\x01\x91", "an object made by its class": b"cnumpy\nndarray\n)\x81"}.items())
def test_pickles_that_cheat_are_refused(tmp_path, name, operations):
    with pytest.raises(MediaError, match="can't read the event file"):
        read_events(event_file(tmp_path / "e.npy", operations))


@pytest.mark.parametrize("protocol", [3, 4])
def test_event_files_of_every_age_are_read(tmp_path, protocol):
    columns = {name: np.arange(9, dtype=kind)
               for name, kind in (("x", "u2"), ("y", "u2"), ("t", "i8"))}
    columns["p"] = np.arange(9, dtype="u1") % 2
    more = {"time_start": np.int64(2**40), "duration_ms": 0.5, "indices": [1],
            "name": "é", "no": None,
            "yes": True}
    array = np.array({**columns, **more}, dtype=object)
    np.save(tmp_path / "e.npy", array, allow_pickle=True)
    (tmp_path / "e.npy").write_bytes((tmp_path / "e.npy").read_bytes()[:128] +
                                     pickle.dumps(array, protocol))
    events = read_events(tmp_path / "e.npy")
    for name, column in columns.items():
        assert np.array_equal(events[name], column) and events[name].dtype == column.dtype
    older = (tmp_path / "e.npy").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    if protocol == 3:                              # names in lines, not behind their length
        (tmp_path / "e.npy").write_bytes(older)
        assert np.array_equal(read_events(tmp_path / "e.npy")["t"], columns["t"])


def test_an_event_file_without_an_end_is_not_read(tmp_path):
    np.save(tmp_path / "e.npy", {"x": 1}, allow_pickle=True)
    with open(tmp_path / "e.npy", "r+b") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(MediaError, match="has 21474836480 bytes, wanted"):
        read_events(tmp_path / "e.npy")


@pytest.mark.parametrize("operations", [b"]\x94" * 2**20, b"(" * 2**21], ids=["lists", "marks"])
def test_a_pickle_of_very_many_objects_is_refused(tmp_path, operations):
    with pytest.raises(MediaError, match="far more objects"):
        read_events(event_file(tmp_path / "e.npy", operations))


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.ts", "a.mp4"])
def test_a_video_that_goes_on_with_nothing_ends_in_time(tmp_path, monkeypatch, name):
    """20 GiB of zeros, for which no disk is needed, behind a video or behind the first bytes of one."""
    monkeypatch.setattr(videos, "MAX_WAIT_S", 0.5)
    heads = {"a.mkv": b"\x1a\x45\xdf\xa3\x93\x42\x82\x88matroska",
             "a.avi": b"RIFF\0\0\0\0AVI LIST\0\0\0\x7fmovi",
             "a.ts": b"\x47\x40\0\x10" + bytes(184), "a.mp4": b"\0\0\0\x18ftypisom\0\0\0\0isommp42"}
    make_video(tmp_path / f"whole_{name}", 10)
    for head in (heads[name], (tmp_path / f"whole_{name}").read_bytes()):
        with open(tmp_path / name, "wb") as file:
            file.write(head)
            file.truncate(20 * 2**30)
        start = time.monotonic()
        with contextlib.suppress(MediaError):               # or the frames in front of the zeros
            assert len(read_video(tmp_path / name)) == 8
        assert time.monotonic() - start < 20
