"""The clips of a decoding: their order, and files that change or vanish while it runs."""

import numpy as np
import pytest

from base import UserError
from clips.dataset import Sample
from decoding.clips import Clips, in_order
from vlm.roles import TARGET, View, content_of


class Model:
    """Takes whatever pictures it is given."""

    @staticmethod
    def prepare(pictures: list[np.ndarray]) -> list[np.ndarray]:
        return pictures


def test_clips_with_long_names_come_as_they_were_driven():
    samples = [Sample(number, str(number), "town", f"dashcam_front_{clip}")
               for number, clip in enumerate((10, 9, 100, 1, "02", 11))]
    names = [str(sample.clip).rpartition("_")[2] for sample in in_order(samples)]
    assert names == ["1", "02", "9", "10", "11", "100"]
    assert sorted(map(repr, in_order(samples, 3))) == sorted(map(repr, samples))


@pytest.mark.parametrize("present", [True, False])        # when the data set was read
@pytest.mark.parametrize("change", ["vanishes", "shrinks", "its folder vanishes"])
def test_a_file_that_changes_during_the_run_ends_it_and_fails_no_clip(tmp_path, present, change):
    video = tmp_path / "mp4" / "000001.mp4"
    video.parent.mkdir()
    video.write_bytes(b"not yet a video" * 9)
    sample = Sample(0, "0", "town", 1, video=video, present=frozenset([video] if present else []))
    clips = Clips([sample], ["?"], View(), 1, content_of([sample], [TARGET], View()))
    if change == "shrinks":
        video.write_bytes(b"not")
    else:
        video.unlink()
        if change == "its folder vanishes":
            video.parent.rmdir()
    with pytest.raises(UserError, match=r"was there when this run began|not those that were there"):
        list(clips.read(TARGET, Model(), clips.samples))
    assert not clips.failed


def test_a_file_that_was_damaged_all_along_fails_its_clip_alone(tmp_path):
    video = tmp_path / "000001.mp4"
    video.write_bytes(b"no video" * 9)
    sample = Sample(0, "0", "town", 1, video=video, present=frozenset([video]))
    clips = Clips([sample], ["?"], View(), 1, content_of([sample], [TARGET], View()))
    assert not list(clips.read(TARGET, Model(), clips.samples))
    assert [row["model"] for row in clips.failed] == [TARGET.name]
