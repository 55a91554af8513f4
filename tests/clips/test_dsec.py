"""Raw recordings: the lists, the layouts, the reader, and every way in which a download can be broken."""

import json
import re
import shutil

import h5py
import numpy as np
import pytest

import clips.dsec as dsec
from base import UserError
from clips.dataset import INDEX_FILE
from clips.limits import MachineTrouble, MediaError
from tests.recordings import BAD, FIRST_US, GOOD, SMALL, T_OFFSET, break_picture


def test_dsecs_lists_are_whole_and_apart():
    train, test = dsec.SEQUENCES["train"], dsec.SEQUENCES["test"]
    assert len(set(train)) == len(train) == 41 and len(set(test)) == len(test) == 12
    assert not set(train) & set(test) and {"interlaken_00_c", "thun_00_a", "zurich_city_11_c"} <= set(train)
    assert not any("zurich_city_1" in name and int(name[12:14]) > 11 for name in train)


def test_the_made_up_file_is_as_dsec_says(good_root):
    with h5py.File(good_root[1].events) as file:
        t, table = file["events/t"][()].astype(int), file["ms_to_idx"][()].astype(int)
        kinds = {name: (file[f"events/{name}"].dtype.str, list(file[f"events/{name}"]._filters))
                 for name in "xypt"}
        assert int(file["t_offset"][()]) == T_OFFSET
    wanted = {"x": "<u2", "y": "<u2", "p": "|u1", "t": "<u4"}
    assert kinds == {name: (kind, ["32001"]) for name, kind in wanted.items()}
    assert table[0] == 0 and len(table) == t[-1] // 1000 + 1
    for ms, place in enumerate(table):
        assert t[place] >= 1000 * ms and (place == 0 or t[place - 1] < 1000 * ms)


def test_events_are_found_to_the_microsecond(good_root):
    sequence = good_root[1]
    with dsec.EventFile(sequence.events) as events:
        for time_us in (0, T_OFFSET - 1, T_OFFSET, FIRST_US, FIRST_US + 250_000, FIRST_US + 250_001,
                        int(sequence.t[777]),
                        int(sequence.t[-1]), int(sequence.t[-1]) + 1, FIRST_US + 2**33):
            assert events.place_of(time_us) == np.searchsorted(sequence.t, time_us), time_us


def test_a_missing_blosc_filter_is_one_clear_line(prepare, good_root, monkeypatch):
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: False)
    with pytest.raises(UserError, match=r"lacks the Blosc filter \(32001\)"):
        prepare(root=good_root[0])


# ---------------------------------------------------------------------------------------- bad input
def cut_events(sequence):
    sequence.events.write_bytes(sequence.events.read_bytes()[:-5000])


def no_hdf5(sequence):
    sequence.events.write_bytes(b"<html>404 not found</html>" * 100)


def torn_chunk(sequence):
    with h5py.File(sequence.events) as file:
        chunk = file["events/x"].id.get_chunk_info(5)
    with open(sequence.events, "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size))


def without(name):
    def damage(sequence):
        with h5py.File(sequence.events, "r+") as file:
            del file[name]
    return damage


def replaced(name, change, **how):
    def damage(sequence):
        with h5py.File(sequence.events, "r+") as file:
            values = change(file[name][()])
            del file[name]
            file.create_dataset(name, data=values, **how)
    return damage


def falling(t):
    t[9000:9010] = t[9000:9010][::-1] + np.arange(10, dtype=np.uint32)[::-1] * 9
    return t


def wrapped(t):
    """As a recorder whose 32 bits overflow in the middle of the window would write it."""
    return t.astype(np.uint32) - np.uint32(600_000)


def late_start(t):
    return t + np.uint32(3_000_000)


def unknown_filter(sequence):
    with h5py.File(sequence.events, "r+") as file:
        values = file["events/p"][()]
        del file["events/p"]
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_chunk((1000,))
        # Prophesee's own, which DSEC doesn't use
        how.set_filter(0x8ECF, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((len(values),))
        h5py.h5d.create(file["events"].id, b"p", h5py.h5t.NATIVE_UINT8, space, how)


def points_elsewhere(sequence):
    other = sequence.events.with_name("other.h5")
    shutil.copy(sequence.events, other)
    with h5py.File(sequence.events, "r+") as file:
        del file["events/x"]
        file["events/x"] = h5py.ExternalLink(str(other), "events/x")


def huge_chunk(sequence):
    with h5py.File(sequence.events, "r+") as file:
        del file["events/x"]
        file.create_dataset("events/x", (2**33,), np.uint16, chunks=(2**30,), compression="gzip")


def far_offset(sequence):
    """One number in a chunk of 3.7 GiB: a few bytes in the file, all of it in memory."""
    with h5py.File(sequence.events, "r+") as file:
        del file["t_offset"]
        file.create_dataset("t_offset", (1,), np.int64, maxshape=(None,), chunks=(2**29 - 2**25,),
                            compression="gzip",
                            fillvalue=0)


def times(change):
    return lambda sequence: sequence.times.write_text(change(sequence.times.read_text().splitlines()))


def no_pictures(sequence):
    shutil.rmtree(sequence.pictures)
    (sequence.folder / f"{BAD}_images_rectified_left.zip").write_bytes(b"PK")


WHOLE, CLIP = rf"LEFT OUT \| {BAD} \| ", rf"LEFT OUT \| {BAD}/000000 \| "
BAD_INPUT = [
    (cut_events, WHOLE + r".*events\.h5 is cut short or no HDF5 file"),
    (no_hdf5, WHOLE + r".*events\.h5 is cut short or no HDF5 file"),
    (torn_chunk, CLIP + r".*events\.h5: can't read /events/x from \d+ to \d+"),
    (unknown_filter, WHOLE + r".*events/p is packed with HDF5's filter 36559, which is not there"),
    (points_elsewhere, WHOLE + r".*events/x points at another file: refused"),
    (huge_chunk, WHOLE + r".*events/x has chunks of 1073741824 numbers: refused"),
    (far_offset, WHOLE + r".*t_offset has chunks of 503316480 numbers: refused"),
    (replaced("events/p", lambda p: p + np.uint8(1)),
     CLIP + r".*events/p: column p \(polarity\) has values from 1"),
    (replaced("events/p",
              lambda p: np.where(np.arange(len(p)) % 9, 2 * p.astype(np.int8) - 1, 0)), CLIP +
     r".*events/p has values from -1 to 1|.*events/p: column p \(polarity\) has values from -1 to 1"
     ), (without("t_offset"), WHOLE + r".*t_offset is missing, so the times .* can't be joined"),
    (without("ms_to_idx"), WHOLE + r".*ms_to_idx is missing"),
    (without("events"), WHOLE + r".*events/x is missing"),
    (replaced("t_offset", lambda _: np.array([1.5])),
     WHOLE + r".*t_offset is float64 \(1,\), wanted one whole"),
    (replaced("events/x", lambda x: x[:-1]), WHOLE + r".*x, y, p and t have different lengths"),
    (replaced("events/y", lambda y: y.astype(float)), WHOLE + r".*events/y is float64"),
    (replaced("events/x", lambda x: x + np.uint16(60)),
     CLIP + r"events from pixel \(60, 0\) to \(123, 47\) don't"),
    (replaced("events/t", falling), CLIP + r".*timestamps are not sorted at event 90\d\d"),
    (replaced("events/t", wrapped), CLIP + r".*(not sorted|ms_to_idx does not fit)"),
    (replaced("events/t",
              lambda t: t * np.uint32(2)), CLIP + r".*ms_to_idx does not fit the events' times"),
    (replaced("ms_to_idx",
              lambda table: table + np.uint64(50)), CLIP + r".*ms_to_idx does not fit"),
    (replaced("ms_to_idx",
              lambda table: table[::-1]), CLIP + r".*ms_to_idx (is broken|does not fit)"),
    (replaced("t_offset", lambda offset: offset + 10_000_000), CLIP + "no events"),
    (replaced("t_offset", lambda offset: offset - 10_000_000), CLIP + "no events"),
    (replaced("t_offset", lambda _: np.int64(0)), CLIP + "no events"),
    (break_picture, CLIP + r"can't read the picture .*000007\.png"),
    (lambda sequence: (sequence.pictures / "000007.png").unlink(),
     WHOLE + r"half downloaded: .* 000006\.png to 000008\.png"),
    (lambda sequence:
     (sequence.pictures / "000025.png").unlink(), WHOLE + r"25 pictures in .*, but 26 timestamps in"),
    (no_pictures, WHOLE +
     rf"half downloaded: no images/left/rectified/\*\.png; unpack {BAD}_images_rectified_left"),
    (lambda sequence: sequence.events.unlink(), WHOLE + r"half downloaded: no events/left/events\.h5$"),
    (lambda sequence: shutil.rmtree(sequence.folder / "images"),
     WHOLE + r"half downloaded: no images/.*, no images/timest"),
    (lambda sequence: shutil.rmtree(sequence.folder), WHOLE + "not there$"),
    (times(lambda lines: "\n".join(lines[:5] + lines[4:-1])),
     WHOLE + r".*timestamps\.txt is not sorted: entry 6"),
    (times(lambda lines: "\n".join(["# us", *lines[2:]])),
     WHOLE + r".*timestamps\.txt, entry 1: '#' is no time"),
    (times(lambda lines: "\n".join([*lines[:-1], "9" * 17])),
     WHOLE + r".*timestamps\.txt goes from .* over 6 hours"),
    (times(lambda _: "é"), WHOLE + r"can't read .*timestamps\.txt"),
]


@pytest.mark.parametrize("damage, line", BAD_INPUT, ids=range(len(BAD_INPUT)))
def test_what_is_broken_is_named_and_the_rest_is_made(prepare, mixed_root, capsys, damage, line):
    root, _, bad = mixed_root
    damage(bad)
    flags = (*SMALL, "--sequences", BAD, GOOD)
    with pytest.raises(UserError, match="is not whole: "):
        prepare(*flags, root=root)
    logged = capsys.readouterr().out
    assert re.search(line, logged, re.M), logged
    assert re.search(rf"missing \| {BAD} \| ", logged)
    folder = root.parent / "data" / "my_egpt_dsec_test" / "my_egpt_dsec_seq_1s"
    assert not (folder / INDEX_FILE).exists() and (folder / "mp4" / GOOD / "000000.mp4").is_file()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files
                if BAD in str(path) and "/000000" in str(path)] and len(files) >= 6
    _, logged = prepare(*flags, "--allow_missing", root=root)
    rows = {(row["sequence"], row["clip"]) for row in json.loads((folder / INDEX_FILE).read_text())}
    assert (GOOD, 0) in rows and (BAD, 0) not in rows
    assert json.loads((folder / "prepare_dsec.json").read_text())["left_out"][0]["sequence"] == BAD
    assert "RESULT" in logged and not [path for path in folder.rglob("*.tmp*")]


def test_a_gap_in_the_recording_leaves_out_the_windows_within_it(prepare, mixed_root):
    root, _, bad = mixed_root
    times(lambda lines: "\n".join(lines[:9] + [str(int(line) + 5_000_000) for line in lines[9:]]))(bad)
    folder, logged = prepare(*SMALL, "--sequences", BAD, GOOD, "--allow_missing", root=root)
    for clip, reason in {1: "no pictures", 8: "no pictures", 9: "no events", 10: "no events"}.items():
        assert f"LEFT OUT | {BAD}/{clip:06d} | {reason}" in logged
    assert [row["clip"] for row in json.loads((folder / INDEX_FILE).read_text())] == [0, 0]
    assert f"missing | {BAD} | 10 clips: 000001, 000002, " in logged
    assert ", 000010 | the first: no pictures" in logged


# ---------------------------------------------------------------------------- polarity, the machine
@pytest.mark.parametrize("kind", [np.int8, np.int16])
def test_polarity_of_minus_one_and_one_paints_the_same_pictures(prepare, mixed_root, tmp_path, kind):
    root, good, _ = mixed_root
    flags = (*SMALL, "--sequences", GOOD)
    folder, _ = prepare(*flags, root=root)
    wanted = {path.name: path.read_bytes() for path in (folder / "event_image" / GOOD).iterdir()}
    replaced("events/p", lambda p: 2 * p.astype(kind) - 1)(good)
    other, _ = prepare(*flags, root=root, output=tmp_path / "other")
    assert {path.name: path.read_bytes()
            for path in (other / "event_image" / GOOD).iterdir()} == wanted


def test_a_file_of_minus_one_and_zero_is_refused_even_where_no_slice_has_both(mixed_root, monkeypatch):
    good = mixed_root[1]
    monkeypatch.setattr(dsec, "SLICE", 1000)
    replaced("events/p", lambda p: np.where(np.arange(len(p)) < 1000, -1, 0).astype(np.int8))(good)
    with dsec.EventFile(good.events) as events, pytest.raises(MediaError, match="events/p has -1 and 0"):
        list(events.slices(0, 3000))


def test_an_error_of_the_system_is_no_fault_of_the_recording(mixed_root, monkeypatch):
    good = mixed_root[1]

    def fail(*_, **__):
        raise OSError("Can't synchronously read data (file read failed: errno = 5, error message = "
                      "'Input/output error')")

    with dsec.EventFile(good.events) as events:
        monkeypatch.setattr(h5py.Dataset, "__getitem__", fail)
        with pytest.raises(MachineTrouble, match=r"events\.h5: Input/output error"):
            list(events.slices(0, 10))
    monkeypatch.setattr(h5py, "File", fail)
    with pytest.raises(MachineTrouble, match=r"events\.h5: Input/output error"):
        dsec.EventFile(good.events)


def test_pictures_that_go_away_on_the_way_end_the_run(prepare, mixed_root, monkeypatch):
    from clips import windows

    root, good, _ = mixed_root
    draw = windows.draw_events

    def draw_and_unmount(*arguments):
        shutil.rmtree(good.pictures, ignore_errors=True)
        return draw(*arguments)

    monkeypatch.setattr(windows, "draw_events", draw_and_unmount)
    with pytest.raises(MachineTrouble,
                       match=r"000000\.png was there when this run began and is gone"):
        prepare(*SMALL, "--sequences", GOOD, "--allow_missing", root=root)


def test_a_list_of_times_that_grows_while_it_is_read_is_bounded(tmp_path):
    (tmp_path / "timestamps.txt").symlink_to("/dev/zero")
    with pytest.raises(MediaError, match="is no list of timestamps"):
        dsec.read_times(tmp_path / "timestamps.txt")
