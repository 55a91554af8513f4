"""A plain folder of videos is a data set; what tells its drives, and what it is not."""

import json
from pathlib import Path

import pytest

from base import UserError
from clips.dataset import INDEX_FILE, read_dataset, target_pictures
from clips.places import check_pattern
from clips.videos import write_video
from tests.clips.test_dataset import picture
from vlm.roles import DRAFT, TARGET, View


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def keys_of(folder: Path, pattern: str | None = None) -> list[str]:
    return [sample.key for sample in read_dataset(folder, (), pattern)]


def test_videos_of_every_container_are_clips_in_natural_order_by_their_folders(tmp_path, capsys):
    folder = folder_of(
        tmp_path, "b/clip_10.MP4", "b/clip_9.mkv", "a/x/3.avi", "notes.txt", "b/.hidden.mp4"
    )
    samples = read_dataset(folder)
    assert [sample.key for sample in samples] == ["a/x/3", "b/clip_9", "b/clip_10"]
    assert [sample.video.name for sample in samples] == ["3.avi", "clip_9.mkv", "clip_10.MP4"]
    assert [sample.clip for sample in samples] == [3, "clip_9", "clip_10"]
    assert all(sample.video in sample.present and not sample.event_images for sample in samples)
    printed = capsys.readouterr().out
    assert "3 clips from a folder of videos" in printed and "WARNING" not in printed


def test_frames_are_read_whatever_the_file_is_called(tmp_path):
    write_video(tmp_path / "Street View.mp4", [picture(20 * k) for k in range(5)])
    (sample,) = read_dataset(tmp_path)
    assert [frame.shape for frame in target_pictures(sample, 2)] == [(16, 16, 3)] * 2


def test_a_draft_model_may_see_the_frames_that_the_target_sees(tmp_path):
    write_video(tmp_path / "1.mp4", [picture(20 * k) for k in range(5)])
    (sample,) = read_dataset(tmp_path)
    frames, events = View(2, draft_sees="frames"), View(2)
    seen = zip(DRAFT.pictures(sample, frames), TARGET.pictures(sample, frames), strict=True)
    assert all((ours == theirs).all() for ours, theirs in seen)
    assert DRAFT.files(sample, frames) == TARGET.files(sample, events) == [sample.video]
    assert (DRAFT.most_pictures([sample], frames), DRAFT.most_pictures([sample], events)) == (2, 1)
    assert DRAFT.files(sample, events) == [None]


def test_two_containers_of_one_name_are_two_clips(tmp_path):
    assert keys_of(folder_of(tmp_path, "a/7.mp4", "a/7.mkv", "a/8.mp4")) == [
        "a/7.mkv",
        "a/7",
        "a/8",
    ]


def test_a_flat_folder_warns_that_it_tells_no_drives(tmp_path, capsys):
    assert keys_of(folder_of(tmp_path, "1.mp4", "2.mp4")) == ["1", "2"]
    assert "WARNING" in (printed := capsys.readouterr().out) and "--sequence_pattern" in printed


def test_a_pattern_tells_the_sequences_of_a_flat_folder(tmp_path, capsys):
    folder = folder_of(tmp_path, "thun_a_0001.mp4", "thun_b_0001.mp4", "other.mp4")
    samples = read_dataset(folder, (), r"^(.*)_\d+$")
    assert [(sample.sequence, sample.clip) for sample in samples] == [
        ("", "other"),
        ("thun_a", "thun_a_0001"),
        ("thun_b", "thun_b_0001"),
    ]
    assert "finds nothing in 1 of 3 clips, of which the first is 'other'" in capsys.readouterr().out


def test_a_pattern_reads_the_whole_path_of_a_clip_in_any_layout(tmp_path):
    folder = folder_of(
        tmp_path / "set", "mp4/day1/thun_00_a/000017.mp4", "mp4/day2/thun_00_a/000017.mp4"
    )
    assert keys_of(folder) == ["day1/thun_00_a/17", "day2/thun_00_a/17"]
    assert keys_of(folder, r"^(day\d)/") == ["day1/thun_00_a/000017", "day2/thun_00_a/000017"]
    assert keys_of(folder, r"(thun_.._.)") == [
        "thun_00_a/day1/thun_00_a/000017",
        "thun_00_a/day2/thun_00_a/000017",
    ]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("thun_.*", "has 0 groups in parentheses, wanted one"),
        ("(a)(b)", "has 2 groups"),
        ("(thun", "is no regular expression: missing"),
    ],
)
def test_a_pattern_without_one_group_is_refused(pattern, reason):
    with pytest.raises(UserError, match=reason):
        check_pattern(pattern)


def test_a_pattern_that_matches_nothing_is_refused_with_a_path(tmp_path):
    folder = folder_of(tmp_path, "a/1.mp4", "a/2.mp4")
    with pytest.raises(
        UserError, match=r"'\^\(b\)' finds nothing in the 2 clips of .* first is 'a/1'"
    ):
        read_dataset(folder, (), "^(b)")


def test_a_folder_without_videos_or_of_several_data_sets_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no video \(.mp4"):
        read_dataset(folder_of(tmp_path / "empty", "readme.txt"))
    (tmp_path / "root" / "set_1s").mkdir(parents=True)
    (tmp_path / "root" / "set_1s" / INDEX_FILE).write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"holds some .set_1s/Event.*: name one of them"):
        read_dataset(folder_of(tmp_path / "root", "set_1s/mp4/a/1.mp4"))


def test_a_link_out_of_the_folder_costs_its_clip(tmp_path):
    folder_of(tmp_path / "else", "1.mp4")
    folder = folder_of(tmp_path / "set", "2.mp4")
    (folder / "1.mp4").symlink_to(tmp_path / "else" / "1.mp4")
    bad, good = read_dataset(folder)
    assert "--allow_links" in bad.trouble and good.trouble is None
