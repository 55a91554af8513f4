"""Raw recordings become data set folders: every pixel, frame and window; what is broken is named."""

import dataclasses
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import clips.dsec as dsec
import extract_tokens_train
from base import ROOT, UserError
from clips import windows
from clips.dataset import INDEX_FILE, read_dataset
from clips.prepared import blocks_of
from clips.windows import Recipe, clips_of, window_starts
from machine.files import only_writer
from tests.conftest import wait_until_gone
from tests.recordings import (
    BAD,
    FIRST_US,
    GOOD,
    SIZE,
    SMALL,
    break_picture,
    number_of,
    painted,
    write_sequence,
)

# Seconds from the first picture to the last of DSEC's test sequences, and their windows of 500ms,
# 1s, 2s and 4s. The seconds are known to a tenth; zurich_city_14_c's published counts say that it
# is a hair shorter than its 59.5.
TEST_SEQUENCES = {
    "interlaken_00_a": (57.1, 227, 113, 56, 27), "interlaken_00_b": (80.8, 322, 160, 79, 39),
    "interlaken_01_a": (113.1, 451, 225, 112, 55), "thun_01_a": (9.8, 38, 18, 8, 3),
    "thun_01_b": (53.9, 214, 106, 52, 25), "zurich_city_12_a": (38.2, 151, 75, 37, 18),
    "zurich_city_13_a": (18.9, 74, 36, 17, 8), "zurich_city_13_b": (15.7, 61, 30, 14, 6),
    "zurich_city_14_a": (21.9, 86, 42, 20, 9), "zurich_city_14_b": (28.8, 114, 56, 27, 13),
    "zurich_city_14_c": (59.4999, 236, 117, 58, 28), "zurich_city_15_a": (61.9, 246, 122, 60, 29)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")
            if path.is_file() and path.name not in ("prepare_dsec.json", ".lock")}


def read_rows(folder: Path) -> list[dict]:
    return json.loads((folder / INDEX_FILE).read_text())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------ windows
def test_windows_of_the_test_sequences_are_counted_as_published():
    for sequence, (seconds, *wanted) in TEST_SEQUENCES.items():
        last_us = FIRST_US + round(seconds * 1e6)
        result = [len(window_starts(FIRST_US, last_us, ms * 1000, ms * 500))
                 for ms in (500, 1000, 2000, 4000)]
        assert result == wanted, sequence
    for ms, total in {500: 2220, 1000: 1100, 2000: 540, 4000: 260, 5000: 205, 8000: 122, 10_000: 93,
                      16_000: 52}.items():
        counts = [len(window_starts(0, round(seconds * 1e6), ms * 1000, ms * 500))
                  for seconds, *_ in TEST_SEQUENCES.values()]
        assert sum(counts) == total, ms


def test_windows_follow_the_rule_for_any_length():
    random = np.random.default_rng(0)
    for duration in (200_000, 500_000, 1_000_000, 16_000_000):
        lengths = [*random.integers(0, 60_000_000, 200), duration, duration - 1, 2 * duration]
        for length in map(int, lengths):
            starts = window_starts(FIRST_US, FIRST_US + length, duration, duration // 2)
            assert len(starts) == max(0, (length - duration) // (duration // 2) + 1)
            assert all(start >= FIRST_US and start + duration <= FIRST_US + length
                       for start in starts)


# ------------------------------------------------------------------------------------------ content
@pytest.mark.parametrize("render", ["time", "blue_over_red"])
@pytest.mark.parametrize("duration, count", [("500ms", 8), ("1s", 3)])
def test_every_pixel_of_every_event_picture_is_as_painted_by_hand(prepare, good_root, duration, count,
                                                                  render):
    root, good_folder = good_root
    # The small pictures with --canvas, the large ones without: the canvas is fixed, whatever the
    # events fill.
    canvas, length_us = {"500ms": ((64, 48), 500_000), "1s": ((640, 480), 1_000_000)}[duration]
    small = ["--canvas", "64x48"] if duration == "500ms" else []
    folder, logged = prepare("--render", render, "--video_size", "64x48", "--workers", "1",
                           "--sequences",
                           GOOD, *small,
                           root=root, duration=duration)
    assert len(list((folder / "event_image" / GOOD).iterdir())) == 5 * count
    for clip in range(count):
        start = FIRST_US + clip * length_us // 2
        events = good_folder.in_window(start, start + length_us)
        size = len(events) // 5
        for k in range(5):
            part = events[k * size:(k + 1) * size] if k < 4 else events[4 * size:]
            result = pixels(folder / "event_image" / GOOD / f"{clip:06d}_{k}.png")
            assert result.shape == (canvas[1], canvas[0], 3)
            assert np.array_equal(result, painted(part, canvas, render == "blue_over_red")), (clip, k)
    assert f"{count} clips of 1 sequences | 0 sequences and 0 clips left out" in logged


@pytest.mark.parametrize("duration, frames", [("500ms", 10), ("1s", 20), ("2s", 40)])
def test_every_frame_of_every_video_is_the_right_picture(prepare, good_root, duration, frames):
    root, _ = good_root
    folder, _ = prepare(*SMALL, "--sequences", GOOD, root=root, duration=duration)
    for clip, path in enumerate(sorted((folder / "mp4" / GOOD).iterdir())):
        with av.open(str(path)) as video:
            stream = video.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt,
                    stream.average_rate) == ("h264", "yuv420p", 20)
            assert (stream.width, stream.height) == SIZE
            numbers = [number_of(picture.to_ndarray(format="rgb24"))
                       for picture in video.decode(stream)]
        first = clip * frames // 2
        assert numbers == list(range(first, first + frames)), path


def test_rows_have_the_published_fields_and_sequence_and_clip(prepare, good_root):
    folder, _ = prepare(*SMALL, "--sequences", GOOD, root=good_root[0])
    rows = read_rows(folder)
    assert [row["event_data"] for row in rows] == [f"{GOOD}/{clip:06d}.npy" for clip in range(3)]
    assert rows[1] == {
        "id": rows[1]["id"], "split": "my_egpt_dsec_seq_1s", "event_data": f"{GOOD}/000001.npy",
        "video_data": f"{GOOD}/000001", "mp4_data": f"{GOOD}/000001.mp4",
        "event_image": [f"{GOOD}/000001_{k}.png" for k in range(5)],
        "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}],
        "sequence": GOOD, "clip": 1}
    samples = read_dataset(folder)
    assert [(sample.key, sample.trouble) for sample in samples] == [(f"{GOOD}/{clip}", None)
                                                                    for clip in range(3)]
    assert len({sample.id for sample in samples}) == 3 and all(sample.video.is_file() for sample in samples)


def test_both_layouts_and_any_number_of_workers_give_the_same_files(prepare, good_root, tmp_path):
    wanted = contents(prepare(*SMALL, "--sequences", GOOD, root=good_root[0])[0])
    assert len(wanted) == 3 * 6 + 1 and len(set(wanted.values())) == len(wanted)
    flat = write_sequence(tmp_path / "flat", GOOD, flat=True)
    # Without the split's folder
    shutil.move(flat.folder, tmp_path / "bare" / GOOD)
    # All in the split's folder
    loose = write_sequence(tmp_path / "loose", GOOD, flat=True)
    for path in loose.folder.iterdir():
        path.rename(path.parent.parent / path.name)
    write_sequence(tmp_path / "flat", GOOD, flat=True)
    for root in ("flat", "bare", "loose"):
        flags = (*SMALL[:-1], "2" if root == "flat" else "1")
        folder, logged = prepare(*flags, "--sequences", GOOD, root=tmp_path / root,
                               output=tmp_path / f"from_{root}")
        assert contents(folder) == wanted, root
        assert "not in DSEC's" not in logged


def test_stride_pictures_canvas_and_video_size_do_what_they_say(prepare, good_root):
    folder, _ = prepare("--sequences", GOOD, "--stride", "none", "--event_images", "2",
                        "--canvas", "70x50",
                        "--video_size", "32x24", "--workers", "1", root=good_root[0], duration="500ms")
    assert len(read_rows(folder)) == 4
    assert sorted(path.name for path in (folder / "event_image" / GOOD).iterdir())[:3] == [
        "000000_0.png", "000000_1.png", "000001_0.png"]
    good_folder, start = good_root[1], FIRST_US + 500_000
    events = good_folder.in_window(start, start + 500_000)
    second = painted(events[len(events) // 2:], (70, 50), False)
    assert np.array_equal(pixels(folder / "event_image" / GOOD / "000001_1.png"), second)
    with av.open(str(folder / "mp4" / GOOD / "000001.mp4")) as video:
        pictures = [picture.to_ndarray(format="rgb24") for picture in video.decode(video=0)]
    assert [number_of(picture)
            for picture in pictures] == [*range(10, 20)] and pictures[0].shape == (24, 32, 3)
    other, _ = prepare(*SMALL, "--sequences", GOOD, "--stride", "125", root=good_root[0],
                       output=folder.parent)
    assert len(read_rows(other)) == 11                                      # (2.25 - 1) / 0.125 + 1


def test_slices_smaller_than_a_part_change_nothing(prepare, good_root, tmp_path, monkeypatch):
    wanted = contents(prepare(*SMALL, "--sequences", GOOD, root=good_root[0])[0])
    monkeypatch.setattr(dsec, "SLICE", 777)
    assert contents(prepare(*SMALL, "--sequences", GOOD, root=good_root[0],
                            output=tmp_path / "sliced")[0]) == wanted


def test_events_are_read_no_more_than_a_slice_at_a_time(prepare, good_root, monkeypatch):
    sizes, read = [], dsec.EventFile._read
    monkeypatch.setattr(dsec, "SLICE", 1000)
    monkeypatch.setattr(dsec.EventFile, "_read", lambda self, column, start, end: sizes.append(
        end - start) or read(self, column, start, end))
    prepare(*SMALL, "--sequences", GOOD, root=good_root[0])
    # One before it: do times fall?
    assert max(sizes) <= 1001 and len(sizes) > 100


def test_the_folder_goes_straight_through_extraction(prepare, good_root, tmp_path, monkeypatch):
    folder, _ = prepare("--sequences", GOOD, "--video_size", "64x48", "--workers", "1",
                        root=good_root[0])
    models, output = ROOT / "demo" / "models", tmp_path / "pairs.json"
    monkeypatch.setattr(sys, "argv", [
        "extract_tokens_train.py", "--dataset_dir", str(folder), "--output_file", str(output),
        "--draft_model",
        str(models / "eventgpt"), "--target_model", str(models / "video_llava"),
        "--max_new_tokens", "8",
        "--device", "cpu"])
    extract_tokens_train.main()
    result = json.loads(output.read_text())
    assert result["failed"] == [] and result["total_samples"] == 3
    assert [(row["sequence"], row["clip"], row["sample_id"]) for row in result["results"]] == [
        (row["sequence"], row["clip"], row["id"]) for row in read_rows(folder)]
    assert all(row["egpt_tokens"] and row["vl_tokens"] for row in result["results"])


# ---------------------------------------------------------------------------------- what is missing
def test_what_was_mended_is_made_and_the_index_written(prepare, mixed_root):
    root, _, bad = mixed_root
    picture = (bad.pictures / "000007.png").read_bytes()
    break_picture(bad)
    with pytest.raises(UserError, match="0 sequences and 1 clips left out, 1 clips are there"):
        prepare(*SMALL, "--sequences", BAD, GOOD, root=root)
    (bad.pictures / "000007.png").write_bytes(picture)
    folder, logged = prepare(*SMALL, "--sequences", BAD, GOOD, root=root)
    assert [row["sequence"]
            for row in read_rows(folder)] == [GOOD, BAD] and "2 clips, 1 of them are there" in logged
    assert json.loads((folder / "prepare_dsec.json").read_text())["left_out"] == []


def test_exit_codes_and_the_last_line(mixed_root, tmp_path):
    root, _, bad = mixed_root
    break_picture(bad)

    def call(*flags):
        return subprocess.run(
            [sys.executable, ROOT / "prepare_dsec.py", "--dsec_root", root, "--output_root",
             tmp_path / "out",
             "--split", "test", "--duration", "1s", *SMALL, "--sequences", BAD, GOOD, *flags],
            text=True, capture_output=True)

    done = call()
    assert done.returncode == 2 and not done.stderr
    last = done.stdout.splitlines()[-1]
    assert "ERROR | " in last and "add --allow_missing" in last
    done = call("--allow_missing")
    assert done.returncode == 0 and "RESULT | " in done.stdout.splitlines()[-1]


def test_sequences_that_are_not_there_are_all_named(prepare, mixed_root, capsys):
    with pytest.raises(UserError, match="10 sequences and 0 clips left out, 2 clips are there"):
        prepare(*SMALL, root=mixed_root[0])
    logged = capsys.readouterr().out
    for name in TEST_SEQUENCES:
        assert (f"missing | {name} | the whole sequence: not there" in logged) == (name not in (GOOD, BAD))


def test_nothing_at_all_is_an_error_even_when_things_may_be_missing(prepare, mixed_root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of 12 test sequences can be used; wanted in"):
        prepare("--allow_missing", root=tmp_path / "empty")
    _, good, bad = mixed_root
    break_picture(good), break_picture(bad)
    with pytest.raises(UserError, match="not one clip could be made"):
        prepare(*SMALL, "--allow_missing", root=mixed_root[0])


def test_a_sequence_shorter_than_the_window_is_no_fault(prepare, mixed_root, good_root):
    shutil.copytree(good_root[1].folder, mixed_root[0] / "test" / "thun_02_a")
    folder, logged = prepare(*SMALL, "--sequences", GOOD, "thun_02_a", root=mixed_root[0], duration="2s")
    assert f"{GOOD} is shorter than 2s: no clips" in logged and len(read_rows(folder)) == 1


# --------------------------------------------------------------------------------- extras and names
def test_folders_beyond_the_list_are_named_and_used_only_when_asked_for(prepare, mixed_root):
    root, good, _ = mixed_root
    for name in ("test", "thun_02_a", "zurich_city_16_a"):
        shutil.copytree(good.folder, root / "test" / name)
    folder, logged = prepare(*SMALL, "--sequences", GOOD, root=root)
    assert "not used unless --sequences names them: test, thun_02_a, zurich_city_16_a" in logged
    assert [row["sequence"] for row in read_rows(folder)] == [GOOD]
    folder, logged = prepare(*SMALL, "--sequences", GOOD, "thun_02_a", root=root)
    assert "names them: test, zurich_city_16_a" in logged
    assert [row["sequence"] for row in read_rows(folder)] == [GOOD, "thun_02_a"]


@pytest.mark.parametrize("flags, words", [
    (("--sequences", "../thun_01_a"), "'../thun_01_a' is no name of a sequence"),
    (("--sequences", ".."), "'..' is no name"), (("--sequences", "/etc"), "'/etc' is no name"),
    (("--sequences", "interlaken_00_c"), "belongs to DSEC's train list"),
    (("--stride", "0"), "--stride must be half, none or milliseconds"),
    (("--stride", "-5"), "--stride must be"),
    (("--event_images", "0"), "--event_images must be from 1 to 10, got 0"),
    (("--canvas", "640"), "--canvas must be WIDTHxHEIGHT"),
    (("--canvas", "0x5"), "--canvas must be"),
    (("--video_size", "641x480"), "and even"), (("--video_size", "99998x480"), "1 to 16384 px"),
    (("--workers", "0"), "--workers must be 1 or more"),
    (("--render", "red"), "invalid choice: 'red'"),
    (("--duration", "0s"), "must be milliseconds or seconds"),
    (("--duration", "1m"), "--duration must be"),
    (("--duration", "../1s"), "--duration must be"),
    (("--dsec_root", "nowhere"), "nowhere: no such folder")])
def test_a_wrong_flag_is_one_clear_error(prepare, mixed_root, flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        prepare(*flags, root=mixed_root[0])
    assert not (mixed_root[0].parent / "data").exists()


def test_a_link_that_leads_out_of_the_folder_is_not_written_through(prepare, mixed_root, tmp_path):
    out = tmp_path / "data" / "my_egpt_dsec_test" / "my_egpt_dsec_seq_1s" / "mp4"
    prepare(*SMALL, "--sequences", BAD, root=mixed_root[0])
    (tmp_path / "elsewhere").mkdir()
    (out / GOOD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link that leads out of"):
        prepare(*SMALL, "--sequences", GOOD, root=mixed_root[0])
    assert not list((tmp_path / "elsewhere").iterdir())


# -------------------------------------------------------------------------- going on, other folders
def test_running_again_changes_nothing_and_says_so(prepare, good_root):
    folder, _ = prepare(*SMALL, "--sequences", GOOD, root=good_root[0])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*.*")}
    _, logged = prepare(*SMALL, "--sequences", GOOD, root=good_root[0])
    assert "3 clips, 3 of them are there" in logged and "nothing to do, all was there" in logged
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*.*")} == before


def test_only_clips_that_lack_a_file_are_made_again(prepare, good_root):
    folder, _ = prepare(*SMALL, "--sequences", GOOD, root=good_root[0])
    wanted = contents(folder)
    (folder / "mp4" / GOOD / "000001.mp4").unlink()
    (folder / "event_image" / GOOD / "000002_3.png").write_bytes(b"")
    (folder / "mp4" / GOOD / ".000001.123.tmp.mp4").write_bytes(b"half a video of a killed run")
    mtime_ns = (folder / "mp4" / GOOD / "000000.mp4").stat().st_mtime_ns
    _, logged = prepare(*SMALL, "--sequences", GOOD, root=good_root[0])
    assert "3 clips, 1 of them are there" in logged and contents(folder) == wanted
    assert (folder / "mp4" / GOOD / "000000.mp4").stat().st_mtime_ns == mtime_ns


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_goes_on_after_a_kill(prepare, tmp_path, how):
    root, flags = tmp_path / "dsec", (*SMALL[:-1], "2", "--sequences", GOOD, "--stride", "25")
    write_sequence(root, GOOD, frames=60)
    command = [sys.executable, ROOT / "prepare_dsec.py", "--dsec_root", root, "--output_root",
               tmp_path / "data",
               "--split", "test", "--duration", "1s", *flags]
    folder = tmp_path / "data" / "my_egpt_dsec_test" / "my_egpt_dsec_seq_1s"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("mp4/*/0*.mp4"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(30) == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    wait_until_gone(process.pid)                                            # no worker stays behind
    left = contents(folder)
    assert INDEX_FILE not in left and len(left) < 78 * 6
    if how == signal.SIGTERM:
        assert not list(folder.rglob("*.tmp.*"))
    mtimes_ns = {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
             for path in folder.glob("mp4/*/0*.mp4")}
    _, logged = prepare(*flags, root=root)
    assert re.search(r"prepare \| .* \| 79 clips, [1-9]\d* of them are there", logged)
    assert len(contents(folder)) == 79 * 6 + 1 and not list(folder.rglob("*.tmp.*"))
    done = sorted(name for name, path in ((name, folder / name) for name in mtimes_ns)
                  if path.stat().st_mtime_ns == mtimes_ns[name])
    assert len(done) >= len(mtimes_ns) - 2  # but for those that lacked a picture


def test_a_folder_of_other_settings_or_another_program_is_left_alone(prepare, good_root, tmp_path):
    folder, _ = prepare(*SMALL, "--sequences", GOOD, root=good_root[0])
    before = contents(folder)
    with pytest.raises(UserError, match="--render time there, blue_over_red now"):
        prepare(*SMALL, "--sequences", GOOD, "--render", "blue_over_red", root=good_root[0])
    (folder / "prepare_dsec.json").unlink()
    with pytest.raises(UserError, match=r"holds event_image, mp4, .* but no prepare_dsec\.json"):
        prepare(*SMALL, "--sequences", GOOD, root=good_root[0])
    assert contents(folder) == before


def test_two_at_once_do_not_write_one_folder(prepare, good_root):
    folder, _ = prepare(*SMALL, "--sequences", GOOD, root=good_root[0])
    with only_writer(folder, wait=False), pytest.raises(UserError, match="is being written by process"):
        prepare(*SMALL, "--sequences", GOOD, root=good_root[0])


def test_a_full_disk_ends_the_run_at_once(prepare, good_root, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(windows, "write_video", full)
    with pytest.raises(UserError, match=r"can't write to .*No space left on device"):
        prepare(*SMALL, "--sequences", GOOD, root=good_root[0])


def test_blocks_are_neighbours_of_one_sequence_and_frames_are_decoded_once(prepare, good_root,
                                                                           monkeypatch):
    recording = dsec.find_recording(good_root[0], "test", GOOD)
    clips = clips_of(recording, Recipe("test", "500ms"))
    others = [dataclasses.replace(clip, sequence=BAD) for clip in clips]
    blocks = blocks_of(clips + others, 1)
    assert [len(block)
            for block in blocks] == [8, 8] and [*itertools.chain(*blocks)] == clips + others
    assert [len(block) for block in blocks_of(clips, 4)] == [2] * 4
    read, paths = windows.read_event_image, []
    monkeypatch.setattr(windows, "read_event_image", lambda path: paths.append(path.name)
                        or read(path))
    prepare(*SMALL, "--sequences", GOOD, root=good_root[0], duration="500ms")
    assert paths == [f"{number:06d}.png" for number in range(45)]


# ----------------------------------------------------------------------------------------- packages
@pytest.mark.parametrize("package", ["h5py", "hdf5plugin"])
def test_a_missing_package_is_one_clear_line(good_root, package, tmp_path):
    code = (f"import sys; sys.modules[{package!r}] = None; import machine.running, prepare_dsec\n"
            f"sys.argv = ['prepare_dsec.py', '--dsec_root', {str(good_root[0])!r}, '--split', 'test', "
            f"'--duration', '1s', "
            f"'--output_root', {str(tmp_path / 'data')!r}]\nmachine.running.run(prepare_dsec.main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and not done.stderr
    line, = done.stdout.splitlines()
    assert f"ERROR | the package '{package}' is not installed: " in line and "pip install -r" in line
    assert not (tmp_path / "data").exists()
