"""Pictures, raw events and videos: what is read is what was written, and what is broken says so."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clips.media import (
    EventPicture,
    MediaError,
    PixelSettings,
    clip_pixels,
    event_frames,
    read_event_image,
    read_events,
    read_video,
    render_events,
    write_png,
    write_video,
)

RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


def grey_frames(count: int) -> list[np.ndarray]:
    """Frame k is evenly grey k x 5: recognisable after compression."""
    return [np.full((48, 64, 3), 5 * k, np.uint8) for k in range(count)]


def greys(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 5) for frame in frames]


# ------------------------------------------------------------------------------------------ pictures
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


# ---------------------------------------------------------------------------------------- raw events
def save_events(path: Path, **columns) -> Path:
    np.save(path, {name: np.array(column, np.uint16) for name, column in columns.items()}, allow_pickle=True)
    return path


def test_the_last_event_of_a_pixel_wins():
    image = render_events(np.array([0, 2, 0]), np.array([0, 1, 0]), np.array([1, 0, 0]))
    assert image.shape == (2, 3, 3)
    assert image[0, 0].tolist() == BLUE and image[1, 2].tolist() == BLUE and image[0, 1].tolist() == WHITE
    assert render_events(np.array([0, 0]), np.array([0, 0]), np.array([0, 1]))[0, 0].tolist() == RED


@pytest.mark.parametrize("render", ["time", "blue_over_red"])
def test_painting_in_parts_gives_what_a_loop_over_the_events_gives(render):
    random, picture = np.random.default_rng(0), EventPicture(70, 90, render)
    by_hand = np.full((70, 90, 3), 255, np.uint8)
    count = EventPicture.BLOCK + 20_000                  # 14 events a pixel
    x, y, p = (random.integers(0, end, count).astype(np.uint16) for end in (90, 70, 2))
    p[x > 80] = 1
    for start, end in ((0, 40), (40, 40), (40, count)):
        picture.paint(x[start:end], y[start:end], p[start:end])
    for column, row, sign in zip(x.tolist(), y.tolist(), p.tolist()):
        if render == "time" or by_hand[row, column].tolist() != BLUE:
            by_hand[row, column] = RED if sign else BLUE
    assert np.array_equal(picture.image(), by_hand)
    assert np.array_equal(render_events(x, y, p, (70, 90), render), by_hand)


def test_events_outside_the_canvas_are_an_error_and_not_painted_elsewhere():
    inside = np.array([0, 1])
    for x, y in (([0, 3], [0, 0]), ([0, 0], [0, 2]), ([-1, 0], [0, 0]), ([0, 0], [-1, 0])):
        picture = EventPicture(2, 3)
        with pytest.raises(MediaError, match="don't fit into a picture of 3 x 2"):
            picture.paint(np.array(x), np.array(y), inside)
        assert not picture.marks.any()


def test_events_are_split_by_count_and_the_last_part_takes_the_rest(tmp_path):
    path = save_events(tmp_path / "e.npy", x=range(13), y=[0] * 13, t=[0] * 13, p=[1] * 13)
    frames = event_frames(read_events(path), 5)
    assert [frame.shape[1] for frame in frames] == [2, 4, 6, 8, 13]
    assert [int((frame[..., 1] == 0).sum()) for frame in frames] == [2, 2, 2, 2, 5]
    assert [frame.shape for frame in event_frames(read_events(path), 5, canvas=(4, 20))] == [(4, 20, 3)] * 5


def test_too_few_events_are_an_error(tmp_path):
    path = save_events(tmp_path / "e.npy", x=[1, 2], y=[0, 0], t=[0, 0], p=[1, 1])
    with pytest.raises(MediaError, match="2 events, wanted at least 5"):
        event_frames(read_events(path), 5)


def test_an_event_file_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    np.save(tmp_path / "e.npy", {"x": Evil()}, allow_pickle=True)
    with pytest.raises(MediaError, match="refused"):
        read_events(tmp_path / "e.npy")
    assert not (tmp_path / "executed").exists()


def test_odd_event_files_are_named(tmp_path):
    odd = tmp_path / "odd.npy"
    for content in (b"", b"junk", pickle.dumps({"x": 1})):
        odd.write_bytes(content)
        with pytest.raises(MediaError, match=r"odd\.npy"):
            read_events(odd)
    np.save(odd, np.arange(4))
    with pytest.raises(MediaError, match="wanted a dict"):
        read_events(odd)
    for columns in ({"x": [1], "y": [1], "t": [1]}, {"x": [1, 2], "y": [1], "t": [1], "p": [1]}):
        with pytest.raises(MediaError, match=r"odd\.npy"):
            read_events(save_events(odd, **columns))
    with pytest.raises(MediaError, match="no such event file"):
        read_events(tmp_path / "none.npy")


# -------------------------------------------------------------------------------------------- videos
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


# --------------------------------------------------------------------------------------- CLIP pixels
@pytest.mark.parametrize("height, width", [(1080, 1440), (480, 640), (100, 99), (224, 224), (300, 225), (33, 45)])
def test_pixels_equal_those_of_transformers(height, width):
    from transformers import CLIPImageProcessorPil, VideoLlavaImageProcessor

    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = clip_pixels([picture], PixelSettings())[0]
    processed = VideoLlavaImageProcessor()([picture], return_tensors="np")
    theirs = next(value for key, value in processed.items() if key.startswith("pixel_values"))[0]
    assert np.array_equal(ours, theirs)
    theirs = CLIPImageProcessorPil()([picture], return_tensors="np")["pixel_values"][0]
    assert np.abs(ours - theirs).max() <= 1e-6


def test_pixel_settings_are_read_from_both_styles_and_bad_ones_refused(tmp_path):
    from base import UserError

    file = tmp_path / "preprocessor_config.json"
    for text in ('{"size": 56, "crop_size": 56}', '{"size": {"shortest_edge": 56}, "crop_size": {"height": 56}}'):
        file.write_text(text)
        assert PixelSettings.read(file, 56) == PixelSettings(56, 56)
    assert PixelSettings.read(None, 56) == PixelSettings(56, 56)
    file.write_text('{"size": 56, "crop_size": 60}')
    with pytest.raises(UserError, match="crop_size 60"):
        PixelSettings.read(file, 56)
