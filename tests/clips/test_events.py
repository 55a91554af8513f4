"""Raw events: how they are read, split and painted."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from clips.event_files import read_events
from clips.events import EventPicture, event_frames, render_events
from clips.limits import MediaError

RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


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
