"""Videos: which frames are read, and what is said of broken ones."""

import contextlib
import itertools
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

from clips.limits import MachineTrouble, MediaError
from clips.videos import read_video, write_video


def grey_frames(count: int) -> list[np.ndarray]:
    """Frame k is evenly grey k x 5: recognisable after compression."""
    return [np.full((48, 64, 3), 5 * k, np.uint8) for k in range(count)]


def greys(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 5) for frame in frames]


@pytest.mark.parametrize("total, indices", [
    (10, [0, 1, 2, 3, 5, 6, 7, 9]), (20, [0, 2, 5, 8, 10, 13, 16, 19]),
    (3, [0, 0, 0, 0, 1, 1, 1, 2]),
    (1, [0] * 8)])
def test_eight_frames_are_sampled_uniformly(tmp_path, total, indices):
    write_video(tmp_path / "a.mp4", grey_frames(total))
    frames = np.stack(read_video(tmp_path / "a.mp4", 8))
    assert frames.shape == (8, 48, 64, 3) and frames.dtype == np.uint8
    assert greys(frames) == indices


@pytest.mark.parametrize("container", ["mkv", "ts", "avi"])
def test_containers_that_announce_no_frames_are_counted(tmp_path, container):
    import av

    with av.open(str(tmp_path / f"a.{container}"), "w") as file:
        stream = file.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in grey_frames(12):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    assert greys(read_video(tmp_path / f"a.{container}", 4)) == [0, 3, 7, 11]


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("a.webm", "libvpx-vp9", {}), ("a.mkv", "libx265", {}), ("a.avi", "ffv1", {}),
    ("a.h264", "libx264", {}), ("a.mov", "libx264", {}),
    ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"})])
def test_other_containers_and_codecs_are_counted_by_decoding(tmp_path, name, codec, options):
    make_video(tmp_path / name, 12, codec, options)
    assert greys(read_video(tmp_path / name, 4)) == [0, 3, 7, 11]


def make_video(path: Path, frames: int, codec: str = "libx264", options: dict | None = None,
               codec_options: dict | None = None, dropped: set[int] = frozenset()) -> None:
    """options: of the container. dropped: frames that are not there, their time is."""
    import av

    with av.open(str(path), "w", options=options or {}) as file:
        stream = file.add_stream(codec, rate=20, options=codec_options or {})
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, picture in enumerate(grey_frames(frames)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            if number not in dropped:
                file.mux(stream.encode(frame))
        file.mux(stream.encode())


def test_a_video_whose_index_stands_in_front_and_whose_end_is_gone_is_named(tmp_path):
    """It announces all of its frames: FFmpeg gives some of them, and in the end an error or none."""
    make_video(tmp_path / "a.mp4", 40, options={"movflags": "faststart"})
    data = (tmp_path / "a.mp4").read_bytes()
    assert len(read_video(tmp_path / "a.mp4")) == 8
    (tmp_path / "a.mp4").write_bytes(data[:-len(data) // 3])
    with pytest.raises(MediaError, match=r"a\.mp4"):
        read_video(tmp_path / "a.mp4")


def test_what_is_left_of_a_cut_stream_that_announces_nothing_is_used(tmp_path):
    """Nobody can tell that there was more."""
    make_video(tmp_path / "a.ts", 40)
    data = (tmp_path / "a.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(data[:len(data) // 2])
    frames = greys(read_video(tmp_path / "a.ts", 4))
    assert frames[0] == 0 and frames == sorted(frames) and frames[-1] < 39


def test_a_payload_that_was_overwritten_gives_frames_of_the_right_size_or_an_error(tmp_path):
    write_video(tmp_path / "a.mp4", grey_frames(20))
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"mdat") + 700                     # behind the encoder's own text
    data[at:at + 400] = bytes(400)
    (tmp_path / "a.mp4").write_bytes(data)
    try:
        assert {frame.shape for frame in read_video(tmp_path / "a.mp4")} == {(48, 64, 3)}
    except MediaError as error:
        assert "a.mp4" in str(error)


def test_broken_videos_are_named(tmp_path):
    write_video(tmp_path / "good.mp4", grey_frames(30))
    data = (tmp_path / "good.mp4").read_bytes()
    broken = {"empty": b"", "text": b"no video", "half": data[:len(data) // 2], "tail": data[:-100]}
    for name, content in broken.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        with pytest.raises(MediaError, match=rf"{name}\.mp4"):
            read_video(tmp_path / f"{name}.mp4")
    with pytest.raises(MediaError, match="no such video"):
        read_video(tmp_path / "none.mp4")


def test_a_file_without_a_video_stream_is_named(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp",
                                           layout="mono")
        sound.sample_rate = 16000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        read_video(tmp_path / "sound.mp4")


# ------------------------------------------------- announced and shown: edit lists, fragments, gaps
def remux(source: Path, target: Path, first: int, end: int) -> None:
    """Trim as `ffmpeg -ss -t -c copy` does: frames before `first` stay in the file and are not shown."""
    import av

    with av.open(str(source)) as file, av.open(str(target), "w") as out:
        stream = file.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in file.demux(stream):
            if packet.dts is not None and packet.pts < end * packet.duration:
                packet.dts, packet.pts = (time - first * packet.duration
                                          for time in (packet.dts, packet.pts))
                packet.stream = copy
                out.mux(packet)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
@pytest.mark.parametrize(("end", "indices"), [(40, [12, 21, 30, 39]), (30, [12, 17, 23, 29])])
def test_a_clip_trimmed_without_encoding_shows_its_frames_alone(tmp_path, name, end, indices):
    import av

    make_video(tmp_path / "whole.mp4", 40)
    remux(tmp_path / "whole.mp4", tmp_path / name, 12, end)
    with av.open(str(tmp_path / name)) as file:
        assert file.streams.video[0].frames == end               # announced; 12 fewer are shown
    assert greys(read_video(tmp_path / name, 4)) == indices


@pytest.mark.parametrize("flags",
                         ["frag_keyframe", "frag_keyframe+empty_moov",
                          "frag_keyframe+default_base_moof"])
def test_all_fragments_are_read_whatever_the_head_announces(tmp_path, flags):
    make_video(tmp_path / "a.mp4", 40, options={"movflags": flags}, codec_options={"g": "8"})
    assert greys(read_video(tmp_path / "a.mp4", 4)) == [0, 13, 26, 39]


def test_an_avi_that_announces_frames_which_were_dropped_is_whole(tmp_path):
    import av

    make_video(tmp_path / "a.avi", 24, "mjpeg", dropped={5, 6, 11, 23})
    with av.open(str(tmp_path / "a.avi")) as file:
        assert file.streams.video[0].frames > 20
    assert greys(read_video(tmp_path / "a.avi", 4)) == [0, 8, 15, 22]


@pytest.mark.parametrize("announced", [6, 60])
def test_the_count_in_the_head_of_an_avi_is_not_believed(tmp_path, announced):
    make_video(tmp_path / "a.avi", 24, "mjpeg")
    data = (tmp_path / "a.avi").read_bytes()
    place = data.index(b"strh") + 8 + 32                                    # dwLength
    assert int.from_bytes(data[place:place + 4], "little") == 24
    (tmp_path / "a.avi").write_bytes(data[:place] + announced.to_bytes(4, "little") + data[place + 4:])
    assert greys(read_video(tmp_path / "a.avi", 4)) == [0, 7, 15, 23]


@pytest.mark.parametrize(("name", "options"), [
    ("a.mp4", {}), ("a.mp4", {"movflags": "faststart"}), ("a.mov", {"movflags": "faststart"}),
    ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}), ("a.avi", {}), ("a.mkv", {}),
    ("a.webm", {})])
def test_a_file_whose_end_is_gone_is_refused_in_every_container_that_can_tell(tmp_path, name, options):
    make_video(tmp_path / name, 40, "libvpx-vp9" if name.endswith("webm") else "libx264", options)
    data = (tmp_path / name).read_bytes()
    assert len(read_video(tmp_path / name)) == 8
    for share in (0.99, 0.75, 0.3):
        (tmp_path / name).write_bytes(data[:int(share * len(data))])
        with pytest.raises(MediaError, match="can't read the video"):
            read_video(tmp_path / name)


def test_an_mp4_is_cut_where_its_index_names_frames_beyond_the_end(tmp_path):
    """Its box of frames goes "to the end of the file", so that the box can't tell."""
    make_video(tmp_path / "a.mp4", 40, options={"movflags": "faststart"})
    data = (tmp_path / "a.mp4").read_bytes()
    place = data.index(b"mdat") - 4
    data = data[:place] + bytes(4) + data[place + 4:]
    (tmp_path / "a.mp4").write_bytes(data)
    assert len(read_video(tmp_path / "a.mp4")) == 8
    (tmp_path / "a.mp4").write_bytes(data[:-len(data) // 4])
    with pytest.raises(MediaError, match="its index names frames up to"):
        read_video(tmp_path / "a.mp4")


# ------------------------------------------------- how a stream wants to be shown, and which stream
MATRICES = [(a, b, c, d) for a, b, c, d in itertools.product((-1, 0, 1), repeat=4)
            if abs(a) == abs(d) and abs(b) == abs(c) and abs(a) + abs(b) == 1]


def turned_by_hand(picture: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Pixel (x, y) goes to (a x + c y, b x + d y), moved back into the picture."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    turned = np.empty((np.ptp(down) + 1, np.ptp(across) + 1, 3), np.uint8)
    turned[down - down.min(), across - across.min()] = picture
    return turned


def with_matrix(path: Path, numbers: tuple[float, ...]) -> None:
    """Write a, b, c, d into the matrix of an MP4's track."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(number * 2**16) for number in numbers)
    data[place:place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", MATRICES)
def test_frames_are_turned_and_mirrored_as_the_metadata_says(tmp_path, matrix):
    path, random = tmp_path / "a.mp4", np.random.default_rng(0)
    small = random.integers(0, 255, (3, 4, 3), dtype=np.uint8)
    write_video(path, [np.kron(np.roll(small, k, 0), np.ones((16, 16, 1), np.uint8))
                       for k in range(3)])
    plain = read_video(path, 3)
    with_matrix(path, matrix)
    for turned, picture in zip(read_video(path, 3), plain):
        assert np.array_equal(turned, turned_by_hand(picture, *matrix))
    if matrix == (0, -1, 1, 0):  # a quarter turn to the left, as FFmpeg writes it for 90
        assert np.array_equal(turned, np.rot90(picture))


def test_a_turn_that_is_no_quarter_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", grey_frames(3))
    with_matrix(tmp_path / "a.mp4", (0.7, 0.7, -0.7, 0.7))
    with pytest.raises(MediaError, match="wanted quarter turns"):
        read_video(tmp_path / "a.mp4")


def two_streams(path: Path, first: list[np.ndarray], second: list[np.ndarray],
                codec: str = "libx264") -> None:
    import av

    with av.open(str(path), "w") as file:
        streams = [file.add_stream(name, rate=20) for name in (codec, "libx264")]
        for stream in streams:
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if stream.name == "mjpeg" else "yuv420p"
        for stream, frames in zip(streams, (first, second)):
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())


def test_a_cover_picture_is_no_video(tmp_path):
    cover = [np.full((48, 64, 3), 250, np.uint8)]
    # Matroska doesn't mark it as a cover
    two_streams(tmp_path / "a.mkv", cover, grey_frames(12), "mjpeg")
    assert greys(read_video(tmp_path / "a.mkv", 4)) == [0, 3, 7, 11]
    two_streams(tmp_path / "a.mp4", cover, grey_frames(12), "mjpeg")        # MP4 does, in udta
    data = (tmp_path / "a.mp4").read_bytes()
    start = data.rindex(b"moov") + 4
    boxes, place = [], start
    while place < len(data):
        length = int.from_bytes(data[place:place + 4], "big")
        boxes.append(data[place:place + length])
        place += length
    # Then it is the first video stream
    boxes.sort(key=lambda box: {b"mvhd": 0, b"udta": 1}.get(box[4:8], 2))
    (tmp_path / "a.mp4").write_bytes(data[:start] + b"".join(boxes))
    assert greys(read_video(tmp_path / "a.mp4", 4)) == [0, 3, 7, 11]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_of_two_videos_the_first_is_taken(tmp_path, name):
    two_streams(tmp_path / name, grey_frames(12), grey_frames(24)[::-1])
    assert greys(read_video(tmp_path / name, 4)) == [0, 3, 7, 11]


# --------------------------------------------------------------------------- trouble of the machine
def test_an_error_of_the_system_is_no_fault_of_the_video(tmp_path, monkeypatch):
    import av

    write_video(tmp_path / "a.mp4", grey_frames(3))
    for error in (OSError(24, "Too many open files"), OSError(5, "Input/output error"),
                  MemoryError()):
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(av, "open", fail)
        with pytest.raises(MachineTrouble, match=r"a\.mp4"):
            read_video(tmp_path / "a.mp4")


def test_an_error_number_that_only_ffmpeg_uses_is_the_videos_fault(tmp_path, monkeypatch):
    import av

    write_video(tmp_path / "a.mp4", grey_frames(3))
    for number in (5, 11, 12):                                     # EIO, EAGAIN, ENOMEM of a broken file
        def fail(*_, number=number, **__):
            av.error.err_check(-number)

        monkeypatch.setattr(av, "open", fail)
        with pytest.raises(MediaError, match="can't read the video"):
            read_video(tmp_path / "a.mp4")


def test_no_descriptors_left_is_no_fault_of_the_video(tmp_path):
    write_video(tmp_path / "a.mp4", grey_frames(3))
    read_video(tmp_path / "a.mp4")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        files = []
        with contextlib.suppress(OSError):
            while True:
                files.append(open(os.devnull))          # noqa: SIM115
        with pytest.raises(MachineTrouble, match="Too many open files"):
            read_video(tmp_path / "a.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            file.close()
