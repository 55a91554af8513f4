"""Raw events: how they are read, split and painted."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from clips.event_files import read_events
from clips.events import EventPicture, event_frames, render_events
from clips.limits import MediaError

RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]


def save_events(path: Path, **columns) -> Path:
    np.save(path, {name: np.array(column, np.uint16) for name, column in columns.items()},
            allow_pickle=True)
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
    assert [frame.shape
            for frame in event_frames(read_events(path), 5, canvas=(4, 20))] == [(4, 20, 3)] * 5


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


# ------------------------------------------------------------------------- columns and their values
def columns(seed: int = 0, count: int = 2000) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"x": random.integers(0, 64, count).astype(np.uint16),
            "y": random.integers(0, 48, count).astype(np.uint16),
            "t": 25 * np.arange(count), "p": random.integers(0, 2, count).astype(np.uint8)}


def save(path: Path, received: dict[str, np.ndarray]) -> Path:
    """As the suffix says: a dict as .npy, .npz, or (.fields.npy) one array with named fields."""
    if path.name.endswith(".fields.npy"):
        array = np.empty(len(received["x"]), [(name, column.dtype) for name, column in received.items()])
        for name, column in received.items():
            array[name] = column
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **received)
    else:
        np.save(path, received, allow_pickle=True)
    return path


FILES = ("e.npy", "e.npz", "e.fields.npy")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("polarity", [np.int8, np.int64, bool, np.float32])
def test_every_spelling_of_polarity_paints_the_same_pictures(tmp_path, name, polarity):
    received = columns()
    wanted = event_frames(received)
    p = received["p"].astype(polarity)
    signs = {**received, "p": p if polarity is bool else 2 * p - 1}
    if polarity is np.float32:
        with pytest.raises(MediaError, match="p float32"):
            read_events(save(tmp_path / name, signs))
        return
    events = read_events(save(tmp_path / name, signs))
    assert set(events["p"].tolist()) == {0, 1}
    assert all(map(np.array_equal, event_frames(events), wanted))
    # Without a file too
    assert all(map(np.array_equal, event_frames(signs), wanted))
    only_darker = {**received, "p": np.full(2000, -1, np.int8)}
    assert not read_events(save(tmp_path / name, only_darker))["p"].any()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("values", "words"), [
    ([1, 2], r"from 1 to 2 \(1, 2, ...\)"), ([0, 1, 2], "from 0 to 2"),
    ([-1, 0, 1], "from -1 to 1"),
    ([-2, 1], "from -2 to 1"), ([0, 255], "from 0 to 255"), ([3], "from 3 to 3")])
def test_values_that_are_no_polarity_are_refused_by_name(tmp_path, name, values, words):
    received = columns()
    received["p"] = np.resize(np.array(values, np.int16), 2000)
    with pytest.raises(MediaError, match=rf"column p \(polarity\) has values {words}"):
        read_events(save(tmp_path / name, received))
    with pytest.raises(MediaError, match=r"column p \(polarity\)"):
        render_events(received["x"], received["y"], received["p"])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [np.int64, np.uint32])
def test_events_out_of_order_are_refused(tmp_path, name, kind):
    received = columns()
    received["t"] = received["t"].astype(kind)
    received["t"][1200] = 7
    with pytest.raises(MediaError, match="t is not sorted at event 1200"):
        read_events(save(tmp_path / name, received))


def test_an_archive_that_cheats_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "e.npz", **{name: np.zeros(2**22, np.int64) for name in "xytp"})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MediaError, match="it unpacks to"):
        patch.setattr("clips.event_files.MAX_EVENT_BYTES", 2**20)
        read_events(tmp_path / "e.npz")
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        for name in "xytp":
            head = io.BytesIO()
            header = {"descr": "<i8", "fortran_order": False, "shape": (2**50,)}
            np.lib.format.write_array_header_1_0(head, header)
            archive.writestr(f"{name}.npy", head.getvalue() + bytes(800))
    with pytest.raises(MediaError, match=r"e\.npz"):
        read_events(tmp_path / "e.npz")
    np.savez(tmp_path / "e.npz", x=np.array([{}], object), y=[1], t=[1], p=[1])
    with pytest.raises(MediaError, match=r"e\.npz"):
        read_events(tmp_path / "e.npz")
    np.savez(tmp_path / "e.npz", x=[1], y=[1], t=[1])
    with pytest.raises(MediaError, match="no column p"):
        read_events(tmp_path / "e.npz")
