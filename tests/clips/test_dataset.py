"""The data set folder in all the forms it is met in."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from base import UserError
from clips.dataset import draft_pictures, read_ahead, read_dataset, target_pictures
from clips.limits import MachineTrouble, MediaError
from clips.pictures import write_png
from clips.videos import write_video

FULL = {"id": "f835", "split": "s", "event_data": "town_00_a/000003.npy",
        "video_data": "town_00_a/000003",
        "mp4_data": "town_00_a/000003.mp4",
        "event_image": [f"town_00_a/000003_{k}.png" for k in range(5)],
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
    write_video(tmp_path / "set" / "mp4" / "town_00_a" / "000003.mp4",
                [picture(10 * k) for k in range(10)])
    return tmp_path / "set"


def with_index(folder: Path, rows, name: str = "EventGPT_Instruction_Subset.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("row", [
    FULL,
    {key: FULL[key] for key in ("event_data", "event_image")},  # made while rendering pictures
    # EventGPT's own release
    {key: FULL[key] for key in ("id", "event_data", "conversations")},
    {**FULL, "event_image": []},  # index older than the pictures
    {**FULL, "video_data": "town_00_a"},  # older: no clip in video_data
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
    events = {name: np.arange(25, dtype=np.uint16) % {"p": 2, "t": 25}.get(name, 5)
              for name in "xytp"}
    np.save(folder / "event_npy" / "town_00_a" / "000009.npy", events, allow_pickle=True)
    sample, = read_dataset(with_index(folder, [{"event_data": "town_00_a/000009.npy"}]))
    assert len(draft_pictures(sample, "first")) == 1
    assert len(draft_pictures(sample, "all")) == 5


@pytest.mark.parametrize("row", [
    {**FULL, "event_image": ["../../secret.png"]},
    {**FULL, "event_data": "../../../etc/passwd.npy"},
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
    assert [str(result) for _, result in out] == [f"bad {n}" if n % 3 == 0 else str(n * 10)
                                                  for n in range(20)]


def test_a_bug_while_reading_ahead_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda number: 1 // number, range(3), workers=2, ahead=2))


# ---------------------------------------------------------- links, order, what is gone, the machine
def moved_out(folder: Path, elsewhere: Path, kind: str) -> None:
    """As sets on clusters are: the sequence lies on another disk, a link leads there."""
    elsewhere.mkdir(exist_ok=True)
    (folder / kind / "town_00_a").rename(elsewhere / kind)
    (folder / kind / "town_00_a").symlink_to(elsewhere / kind)


@pytest.mark.parametrize("index", [True, False])
def test_links_to_named_folders_are_followed_and_others_are_not(folder, tmp_path, index):
    if index:
        with_index(folder, [FULL])
    wanted = draft_pictures(read_dataset(folder)[0], "all")
    for kind in ("event_image", "mp4"):
        moved_out(folder, tmp_path / "disk", kind)
    (tmp_path / "other").mkdir()
    if index:
        assert "--allow_links" in read_dataset(folder, [tmp_path / "other"])[0].trouble
    else:
        with pytest.raises(UserError, match="holds no data set"):
            read_dataset(folder)
    sample, = read_dataset(folder, [tmp_path / "other", tmp_path / "disk"])
    assert np.array_equal(draft_pictures(sample, "all"), wanted) and len(target_pictures(sample, 8)) == 8
    with pytest.raises(UserError, match=r"--allow_links .*nowhere: no such folder"):
        read_dataset(folder, [tmp_path / "nowhere"])


@pytest.mark.parametrize("name", ["../../disk/a.png", "{disk}/a.png",
                                  "town_00_a/../../../disk/a.png"])
def test_an_allowed_folder_is_reached_by_links_alone(folder, tmp_path, name):
    (tmp_path / "disk").mkdir()
    write_png(tmp_path / "disk" / "a.png", picture(0))
    row = {**FULL, "event_image": [name.format(disk=tmp_path / "disk")]}
    sample, = read_dataset(with_index(folder, [row]), [tmp_path / "disk"])
    assert "leaves the data set folder" in sample.trouble


@pytest.mark.parametrize("row", [
    {"id": "a", "event_data": f"town_00_a/{'x' * 300}.npy"},
    {"id": "a", "event_data": "town_00_a/3.npy", "event_image": [f"town_00_a/{'x' * 300}.png"]},
    {"id": "a", "video_data": f"town_00_a/{'x' * 300}", "mp4_data": f"town_00_a/{'x' * 300}.mp4"}])
def test_a_name_that_no_disk_can_hold_costs_its_clip_alone(folder, row):
    (sample,) = read_dataset(with_index(folder, [row]))
    for read, which in ((draft_pictures, "all"), (target_pictures, 2)):
        with pytest.raises(MediaError):
            read(sample, which)


def test_links_in_a_circle_are_walked_once(folder):
    (folder / "mp4" / "town_00_a" / "again").symlink_to(folder / "mp4")
    (folder / "mp4" / "circle").symlink_to("circle")
    assert [sample.key for sample in read_dataset(folder)] == ["town_00_a/3"]


def test_clips_come_in_the_order_of_their_numbers(folder):
    for name in ("dashcam_front_9", "dashcam_front_10", "dashcam_front_2", "dashcam_front_100"):
        (folder / "mp4" / "town_00_a" / f"{name}.mp4").write_bytes(b"x")
    for name in ("town_10_a", "town_2_a"):
        (folder / "mp4" / name).mkdir()
        (folder / "mp4" / name / "1.mp4").write_bytes(b"x")
    assert [str(sample.clip) for sample in read_dataset(folder) if sample.sequence == "town_00_a"
            ] == ["3", *(f"dashcam_front_{number}" for number in (2, 9, 10, 100))]
    assert list(dict.fromkeys(sample.sequence for sample in read_dataset(folder))) == [
        "town_00_a", "town_2_a", "town_10_a"]


@pytest.mark.parametrize("index", [True, False])
def test_files_that_were_there_and_are_gone_are_no_fault_of_a_clip(folder, index):
    rows = [FULL, {"event_data": "town_00_a/000004.npy"}]            # the second has no file
    samples = read_dataset(with_index(folder, rows) if index else folder)
    (folder / "event_image").rename(folder / "unmounted")
    with pytest.raises(MachineTrouble,
                       match=r"000003_0\.png was there when this run began and is gone"):
        draft_pictures(samples[0], "first")
    (folder / "mp4" / "town_00_a" / "000003.mp4").unlink()
    with pytest.raises(MachineTrouble, match=r"000003\.mp4 was there"):
        target_pictures(samples[0], 8)
    for missing in samples[1:]:
        with pytest.raises(MediaError, match="no event picture"):
            draft_pictures(missing, "first")
        with pytest.raises(MediaError, match="no such video"):
            target_pictures(missing, 8)


def test_events_that_were_there_and_are_gone_are_no_fault_of_a_clip(folder):
    (folder / "event_npy" / "town_00_a").mkdir(parents=True)
    (folder / "event_npy" / "town_00_a" / "000009.npy").write_bytes(b"x")
    sample, = read_dataset(with_index(folder, [{"event_data": "town_00_a/000009.npy"}]))
    (folder / "event_npy" / "town_00_a" / "000009.npy").unlink()
    with pytest.raises(MachineTrouble, match=r"000009\.npy was there"):
        draft_pictures(sample, "first")


def test_trouble_of_the_machine_ends_reading_ahead():
    def prepare(number: int) -> int:
        if number == 3:
            raise MachineTrouble("no descriptors")
        return number

    reader = read_ahead(prepare, range(9), workers=2, ahead=3)
    with pytest.raises(MachineTrouble):
        list(reader)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"),
                                   OSError(5, "Input/output error"),
                                   OSError(116, "Stale file handle")])
def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch, index, error):
    if index:
        with_index(folder, [FULL])
    real = os.scandir

    def scandir(path):
        if "mp4" in Path(path).parts:
            raise error
        return real(path)

    def is_file(path):
        if "mp4" in path.parts:
            raise error
        return path.name in ("EventGPT_Instruction_Subset.json",) and index

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(UserError,
                       match=rf"can't read the folder .*mp4.* of the data set: {error.strerror}"):
        read_dataset(folder)


def test_a_folder_that_may_be_entered_and_not_listed_is_read(folder, monkeypatch):
    with_index(folder, [FULL])
    monkeypatch.setattr(
        os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    sample, = read_dataset(folder)
    assert len(draft_pictures(sample, "all")) == 5 and len(target_pictures(sample, 8)) == 8


def test_an_index_without_an_end_is_not_read(folder):
    with open(folder / "EventGPT_Instruction_Subset.json", "wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(UserError, match=r"has 20,480 MiB, wanted at most 128 MiB"):
        read_dataset(folder)
