"""Videos: which frames are read, and what is said of broken ones."""

from pathlib import Path

import numpy as np
import pytest

from clips.limits import MediaError
from clips.videos import read_video, write_video


def grey_frames(count: int) -> list[np.ndarray]:
    """Frame k is evenly grey k x 5: recognisable after compression."""
    return [np.full((48, 64, 3), 5 * k, np.uint8) for k in range(count)]


def greys(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 5) for frame in frames]


@pytest.mark.parametrize("total, indices", [
    (10, [0, 1, 2, 3, 5, 6, 7, 9]), (20, [0, 2, 5, 8, 10, 13, 16, 19]), (3, [0, 0, 0, 0, 1, 1, 1, 2]), (1, [0] * 8)])
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


def make_video(path: Path, frames: int, codec: str = "libx264", options: dict | None = None) -> None:
    import av

    with av.open(str(path), "w", options=options or {}) as file:
        stream = file.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in grey_frames(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
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
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        read_video(tmp_path / "sound.mp4")
