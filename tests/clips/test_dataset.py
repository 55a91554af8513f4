"""The data set folder in all the forms it is met in."""

import json
from pathlib import Path

import numpy as np
import pytest

from base import UserError
from clips.dataset import draft_pictures, read_ahead, read_dataset, target_pictures
from clips.limits import MediaError
from clips.pictures import write_png
from clips.questions import read_questions
from clips.videos import write_video

FULL = {"id": "f835", "split": "s", "event_data": "town_00_a/000003.npy", "video_data": "town_00_a/000003",
        "mp4_data": "town_00_a/000003.mp4", "event_image": [f"town_00_a/000003_{k}.png" for k in range(5)],
        "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}]}


def picture(shade: int) -> np.ndarray:
    return np.full((16, 16, 3), shade, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A data set of one whole clip, town_00_a/000003, without an index file."""
    for k in range(5):
        path = tmp_path / "set" / "event_image" / "town_00_a" / f"000003_{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, picture(40 * k))
    (tmp_path / "set" / "mp4" / "town_00_a").mkdir(parents=True)
    write_video(tmp_path / "set" / "mp4" / "town_00_a" / "000003.mp4", [picture(10 * k) for k in range(10)])
    return tmp_path / "set"


def with_index(folder: Path, rows, name: str = "EventGPT_Instruction_Subset.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("row", [
    FULL,
    {key: FULL[key] for key in ("event_data", "event_image")},                     # made while rendering pictures
    {key: FULL[key] for key in ("id", "event_data", "conversations")},             # EventGPT's own release
    {**FULL, "event_image": []},                                                   # index older than the pictures
    {**FULL, "video_data": "town_00_a"},                                           # older: no clip in video_data
    {key: value for key, value in FULL.items() if key not in ("video_data", "mp4_data")},
    {key: value for key, value in FULL.items() if key not in ("event_data", "id")},
    {"event_image": FULL["event_image"]},
])
def test_every_form_of_a_row_finds_pictures_and_video(folder, row):
    sample, = read_dataset(with_index(folder, [row]))
    assert (sample.sequence, sample.clip, sample.trouble) == ("town_00_a", 3, None)
    assert draft_pictures(sample, "first")[0][0, 0, 0] == 0
    assert [int(shown[0, 0, 0]) for shown in draft_pictures(sample, "all")] == [0, 40, 80, 120, 160]
    assert len(target_pictures(sample, 8)) == 8


def test_without_an_index_the_paths_make_the_pairs(folder):
    (folder / "mp4" / "town_00_a" / "000001.mp4").write_bytes(b"")
    broken, whole = read_dataset(folder)
    assert (broken.clip, whole.clip) == (1, 3)
    assert len(draft_pictures(whole, "all")) == 5
    with pytest.raises(MediaError, match="no event picture"):
        draft_pictures(broken, "first")


def test_an_index_of_another_name_is_found_and_output_files_are_not(folder):
    with_index(folder, [{"event_data": "no/1.npy"}], "instruction_output.json")
    with_index(folder, [FULL], "my_egpt_dsec_instruction_subset.json")
    assert [sample.id for sample in read_dataset(folder)] == ["f835"]


def test_raw_events_serve_where_there_are_no_pictures(folder):
    (folder / "event_npy" / "town_00_a").mkdir(parents=True)
    events = {name: np.arange(25, dtype=np.uint16) % {"p": 2, "t": 25}.get(name, 5) for name in "xytp"}
    np.save(folder / "event_npy" / "town_00_a" / "000009.npy", events, allow_pickle=True)
    sample, = read_dataset(with_index(folder, [{"event_data": "town_00_a/000009.npy"}]))
    assert len(draft_pictures(sample, "first")) == 1
    assert len(draft_pictures(sample, "all")) == 5


@pytest.mark.parametrize("row", [
    {**FULL, "event_image": ["../../secret.png"]}, {**FULL, "event_data": "../../../etc/passwd.npy"},
    {**FULL, "video_data": "/etc/passwd"}, {**FULL, "event_data": "/etc/passwd"}])
def test_paths_that_leave_the_folder_are_refused(folder, row):
    sample, = read_dataset(with_index(folder, [row]))
    assert "leaves the data set folder" in sample.trouble


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    write_png(tmp_path / "secret.png", picture(7))
    (folder / "event_image" / "link.png").symlink_to(tmp_path / "secret.png")
    sample, = read_dataset(with_index(folder, [{**FULL, "event_image": ["link.png"]}]))
    assert "leaves the data set folder" in sample.trouble


@pytest.mark.parametrize("row", [None, 3, "x", [], {}, {"event_data": 5, "event_image": {"a": 1}}])
def test_rows_that_name_nothing_are_trouble_and_stop_nothing(folder, row):
    bad, good = read_dataset(with_index(folder, [row, FULL]))
    assert "names no" in bad.trouble
    assert good.trouble is None


def test_what_a_killed_writer_left_is_no_clip(folder):
    (folder / "EventGPT_Instruction_Subset.json").unlink(missing_ok=True)
    wanted = read_dataset(folder)
    for kind, name in (("event_image", ".000009_0.17.tmp.png"), ("mp4", ".000009.17.tmp.mp4")):
        (folder / kind / name).write_bytes(b"half")
    assert read_dataset(folder) == wanted


def test_a_mark_of_byte_order_is_no_part_of_a_question(tmp_path):
    (tmp_path / "questions.txt").write_bytes("\ufeffWhy?\n".encode())
    assert read_questions("x", tmp_path / "questions.txt", -1) == ["Why?"]


def test_missing_empty_and_broken_data_sets_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="no such data set folder"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no data set"):
        read_dataset(tmp_path)
    for content, message in (("[]", "found 0"), ("{}", "found dict"), ("{nonsense", "not JSON")):
        (tmp_path / "EventGPT_Instruction_Subset.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_dataset(tmp_path)


def test_reading_ahead_keeps_the_order_and_hands_bad_samples_over():
    def prepare(number: int) -> int:
        if number % 3 == 0:
            raise MediaError(f"bad {number}")
        return number * 10

    out = list(read_ahead(prepare, range(20), workers=4, ahead=6))
    assert [number for number, _ in out] == list(range(20))
    assert [str(result) for _, result in out] == [f"bad {n}" if n % 3 == 0 else str(n * 10) for n in range(20)]


def test_a_bug_while_reading_ahead_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda number: 1 // number, range(3), workers=2, ahead=2))
