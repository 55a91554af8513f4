"""The journal file: found again, torn, damaged, joined, endless, growing, on a full disk, gone."""

import errno
import os
import shutil
import threading

import pytest

import machine.journal as module
from base import UserError
from machine.journal import FORMAT, JournalFile, line_of, value_of

HEAD = {"settings": {"seed": 1}}


def is_entry(value: dict) -> bool:
    return type(value.get("n")) is int


def opened(path, head=HEAD, values=()) -> tuple[JournalFile, list[dict]]:
    """An open journal file with this first line, and the values that it holds."""
    file = JournalFile(path, is_entry)
    entries = [value for _, value in file.lines()]
    if file.begin(head, values):
        entries = [value for _, value in file.lines()]
    return file, entries


def numbers(path, head=HEAD) -> list[int]:
    """The numbers in a journal that is opened, and closed again."""
    file, values = opened(path, head)
    file.close()
    return [value["n"] for value in values]


@pytest.fixture
def five(tmp_path):
    """A journal of the numbers 0 to 4."""
    path = tmp_path / "five"
    file, _ = opened(path)
    file.append([{"n": n, "pad": "é" * 9} for n in range(5)])
    file.close()
    return path


def lines_of(path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


# ------------------------------------------------------------------------------------- found again
def test_values_are_found_again_where_append_said(tmp_path):
    file, values = opened(tmp_path / "journal")
    assert values == []
    places = file.append([{"n": n} for n in range(3)]) + file.append([{"n": 3}])
    assert [file.read(place)["n"] for place in places] == [0, 1, 2, 3]
    file.close()
    reopened = JournalFile(tmp_path / "journal", is_entry)
    assert list(reopened.lines()) == [(place, {"n": n}) for n, place in enumerate(places)]
    assert not reopened.begin(HEAD)
    assert reopened.append([{"n": 4}])[0] > places[-1]
    reopened.close()


def test_another_first_line_keeps_the_values(five):
    before = lines_of(five)
    assert numbers(five) == [0, 1, 2, 3, 4] and lines_of(five) == before
    assert numbers(five, {"settings": {"seed": 2}}) == [0, 1, 2, 3, 4]
    first = value_of(lines_of(five)[0])
    assert first == {"format": FORMAT, "run": first["run"], "settings": {"seed": 2}}
    assert first["run"] != value_of(before[0])["run"]


def test_a_journal_may_begin_with_values(tmp_path):
    file, values = opened(tmp_path / "journal", values=({"n": n} for n in range(3)))
    file.close()
    assert [value["n"] for value in values] == [0, 1, 2] == numbers(tmp_path / "journal")


def test_a_journal_of_the_first_format_goes_on_and_becomes_one_of_this(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b'{"settings": {"seed": 1}, "crc": 3284556262}\n{"n": 7, "crc": 295416032}\n')
    # As that version wrote them
    assert value_of(lines_of(path)[0]) and value_of(lines_of(path)[1])
    file, values = opened(path)
    assert values == [{"n": 7}]
    file.append([{"n": 8}])
    file.close()
    assert value_of(lines_of(path)[0])["format"] == FORMAT
    assert all("of" in value_of(line) for line in lines_of(path)[1:])
    assert numbers(path) == [7, 8]


@pytest.mark.parametrize("number", [FORMAT + 1, 10**30])
def test_a_newer_format_is_refused_and_left_alone(tmp_path, number):
    path = tmp_path / "journal"
    path.write_bytes(line_of({"format": number, **HEAD}) + b"who knows\n")
    before = path.read_bytes()
    with pytest.raises(UserError,
                       match=f"format {number}, this version reads formats up to {FORMAT}"):
        numbers(path)
    assert path.read_bytes() == before


# -------------------------------------------------------------------------- torn and damaged lines
def test_whatever_is_cut_off_costs_that_line_and_no_other(five, capsys):
    content, lines = five.read_bytes(), lines_of(five)
    ends = [sum(map(len, lines[:number + 1])) for number in range(len(lines))]
    for cut in range(ends[0], len(content) + 1):
        five.write_bytes(content[:cut])
        good = sum(end <= cut for end in ends)
        assert numbers(five) == list(range(good - 1))
        assert five.read_bytes() == content[:ends[good - 1]]
    printed = capsys.readouterr().out
    assert "1 lines are dropped, to be done again: 1 torn or damaged, 0 of another run" in printed


JUNK = [b"null\n", b"5\n", b"[1]\n", b"{}\n", b'{"n": 9}\n', b"\xff\n", b"\0" * 40, b"[" * 10**5 + b"\n",
        line_of({"n": "9"}, 1), line_of({"n": 9}), b'"half']


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_a_damaged_line_is_dropped_and_those_behind_it_stay(five, junk):
    lines = lines_of(five)
    ending = b"" if junk.endswith(b"\n") else b"\n"
    five.write_bytes(b"".join([*lines[:3], junk, ending, *lines[3:]]))
    assert numbers(five) == [0, 1, 2, 3, 4]
    assert [value_of(line).get("n") for line in lines_of(five)[1:]] == [0, 1, 2, 3, 4]
    lines = lines_of(five)
    five.write_bytes(b"".join([*lines, junk]))
    assert numbers(five) == [0, 1, 2, 3, 4] and lines_of(five) == lines


def test_a_digit_that_changed_on_the_disk_is_noticed(five):
    file, _ = opened(five)
    places = [place for place, _ in JournalFile(five, is_entry).lines()]
    five.write_bytes(five.read_bytes().replace(b'{"n": 3', b'{"n": 8'))
    with pytest.raises(UserError, match="changed since it was written"):
        file.read(places[3])
    assert file.read(places[2])["n"] == 2
    file.close()
    assert numbers(five) == [0, 1, 2, 4]


def test_a_damaged_first_line_is_no_reason_to_throw_hours_away(five):
    five.write_bytes(b"x" + five.read_bytes())
    before = five.read_bytes()
    with pytest.raises(UserError, match="first line of this journal is damaged"):
        numbers(five)
    assert five.read_bytes() == before
    for start in (b"", b'{"se', b'{"settings": {"max_new', b'{"form', b'{"format": 2, "ru', bytes(50)):
        five.write_bytes(start)                                  # the machine stopped while it began
        assert numbers(five) == []
        assert value_of(five.read_bytes())["settings"] == {"seed": 1}


@pytest.mark.parametrize("foreign", [
    b"precious", b"precious\n", b'{"settings": 5}\n', bytes(9) + b"\nprecious\n"])
def test_what_is_no_journal_is_left_alone(tmp_path, foreign):
    path = tmp_path / "journal"
    path.write_bytes(foreign)
    with pytest.raises(UserError, match="first line of this journal is damaged"):
        numbers(path)
    assert path.read_bytes() == foreign


@pytest.mark.parametrize("kind", ["a link", "a folder", "a pipe"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "journal"
    make = {"a link": lambda: path.symlink_to(tmp_path / "else"), "a folder": path.mkdir,
            "a pipe": lambda: os.mkfifo(path)}[kind]
    make()
    with pytest.raises(UserError, match=f"is {kind}"):
        JournalFile(path, is_entry)
    assert not (tmp_path / "else").exists()


# ----------------------------------------------------------------------------- lines of other runs
@pytest.fixture
def other(tmp_path):
    """A journal of the same command, run elsewhere: the numbers 10 to 12."""
    path = tmp_path / "other"
    file, _ = opened(path)
    file.append([{"n": n} for n in range(10, 13)])
    file.close()
    return path


def test_lines_of_another_run_of_the_same_command_are_not_believed(five, other, capsys):
    mine, theirs = lines_of(five), lines_of(other)
    for lines in ([*mine, *theirs], [*mine, *theirs[1:]], [mine[0], *theirs[1:], *mine[1:]],
                  [*mine[:3], theirs[2], *mine[3:]]):
        five.write_bytes(b"".join(lines))
        assert numbers(five) == [0, 1, 2, 3, 4]
        mine = lines_of(five)                             # written anew, with another first line
        assert len(mine) == 6 and numbers(five) == [0, 1, 2, 3, 4] and lines_of(five) == mine
    assert "of another run" in capsys.readouterr().out


def test_the_first_line_of_another_run_costs_nothing(five, other):
    joined = lines_of(other)[0] + b"".join(lines_of(five)[1:])
    five.write_bytes(joined)
    with pytest.raises(UserError, match="none of its 5 lines belongs to its first line"):
        numbers(five)
    assert five.read_bytes() == joined


def test_a_copy_that_went_on_under_other_settings_is_another_run(five, tmp_path):
    copy = tmp_path / "copy"
    shutil.copy(five, copy)
    file, _ = opened(copy, {"settings": {"seed": 2}})
    file.append([{"n": 5}])
    file.close()
    five.write_bytes(five.read_bytes() + b"".join(lines_of(copy)[1:]))
    assert numbers(five) == [0, 1, 2, 3, 4]


def test_a_first_line_that_stands_there_twice_costs_nothing(five):
    mine = lines_of(five)
    five.write_bytes(b"".join([*mine[:2], mine[0], *mine[2:]]))
    assert numbers(five) == [0, 1, 2, 3, 4]


def test_a_second_first_line_in_the_first_format_ends_what_is_believed(tmp_path):
    """Its lines have no mark of their run: those behind another first line may be of other settings."""
    path = tmp_path / "journal"
    path.write_bytes(b"".join(map(line_of, [HEAD, {"n": 1}, {"settings": {"seed": 9}}, {"n": 2}, {"n": 3}])))
    assert numbers(path) == [1]


# ----------------------------------------------------------------------------- endless and growing
def test_a_journal_that_its_writer_cuts_while_another_reads_it_ends_there(tmp_path):
    file, _ = opened(tmp_path / "journal")
    places = file.append([{"n": n, "pad": "x" * 50_000} for n in range(5)])
    file.close()
    reader = JournalFile(tmp_path / "journal", is_entry)
    values, rest = reader.lines(), []
    assert next(values)[1]["n"] == 0
    os.truncate(tmp_path / "journal", places[3])
    thread = threading.Thread(target=lambda: rest.extend(values), daemon=True)
    thread.start()
    thread.join(20)                                  # it may not read on for ever
    assert [value["n"] for _, value in rest] == [1, 2]


def test_an_endless_line_takes_no_memory(five, monkeypatch):
    """Real bounds are megabytes; the file of 20 GiB is sparse, so that a line of it is zeros."""
    monkeypatch.setattr(module, "MAX_LINE", 200)
    size = five.stat().st_size
    os.truncate(five, size + 10_000)
    assert numbers(five) == [0, 1, 2, 3, 4] and five.stat().st_size == size
    lines = lines_of(five)
    for junk in (b"x" * 5_000, b"x" * 150_000, bytes(150_000)):
        five.write_bytes(b"".join([*lines[:3], junk, b"\n", *lines[3:]]))
        assert numbers(five) == [0, 1, 2, 3, 4]
        lines = lines_of(five)
    size = len(b"".join(lines[:3]))
    five.write_bytes(b"".join(lines[:3]))
    os.truncate(five, size + 3_000_000)                          # a hole, and good lines behind it
    with open(five, "ab") as file:
        file.write(b"\n" + b"".join(lines[3:]))
    assert numbers(five) == [0, 1, 2, 3, 4]


def test_an_endless_first_line_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FIRST_LINE", 200)
    path = tmp_path / "journal"
    path.touch()
    os.truncate(path, 300)
    with pytest.raises(UserError, match="first line of this journal is damaged"):
        numbers(path)


@pytest.mark.faults
@pytest.mark.parametrize("where", ["the first line", "a line"])
def test_twenty_gib_without_an_end_of_line(five, where):
    import resource

    if where == "the first line":
        five.write_bytes(b"")
    os.truncate(five, 20 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if where == "the first line":
        with pytest.raises(UserError, match="first line of this journal is damaged"):
            numbers(five)
    else:
        assert numbers(five) == [0, 1, 2, 3, 4]
    # MiB
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10 < 2000
    os.truncate(five, 0)


def test_a_journal_that_grows_while_it_is_read_has_an_end(five):
    file, numbers = JournalFile(five, is_entry), []
    for _, value in file.lines():
        numbers.append(value["n"])
        assert len(numbers) < 9
        with open(five, "ab") as reopened:
            reopened.write(lines_of(five)[1])
    assert numbers == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------- the disk
@pytest.mark.parametrize("how", ["half a write", "no fsync"])
def test_a_full_disk_leaves_whole_lines_and_the_next_start_goes_on(five, monkeypatch, how):
    before = five.read_bytes()

    class Full:
        """A file on a disk that takes ten more bytes."""

        def __init__(self, file):
            self.file, self.room = file, 10

        def write(self, data) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.room = 0
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file, _ = opened(five)
    if how == "half a write":
        file.writer = Full(file.writer)
    else:
        monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        file.append([{"n": 7, "pad": "x" * 50}])
    monkeypatch.undo()
    file.close()
    assert caught.value.filename == str(five) and five.read_bytes() == before
    file, _ = opened(five)
    file.append([{"n": 7, "pad": "x" * 50}])
    file.close()
    assert numbers(five) == [0, 1, 2, 3, 4, 7]


@pytest.mark.parametrize("written", [False, True])
def test_a_signal_in_the_middle_of_a_write_leaves_no_half_line(five, monkeypatch, written):
    before = five.read_bytes()

    class Stopped:
        """A file during whose writing Ctrl-C is pressed."""

        def __init__(self, file):
            self.file = file

        def write(self, data) -> int:
            self.file.write(data if written else data[:10])
            if not written:
                raise KeyboardInterrupt
            return len(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def stopped(*_):
        raise KeyboardInterrupt

    file, _ = opened(five)
    file.writer = Stopped(file.writer)
    monkeypatch.setattr(module.os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        file.append([{"n": 7}])
    monkeypatch.undo()
    file.close()
    # Answers are kept once more by the caller, and not twice
    assert five.read_bytes() == before
    assert numbers(five) == [0, 1, 2, 3, 4]


def test_after_a_write_that_failed_the_next_one_stands_in_its_place(five, monkeypatch):
    file, _ = opened(five)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(module.os, "fsync", full)
        file.append([{"n": 7, "pad": "x" * 50}])
    [place] = file.append([{"n": 8}])
    assert file.read(place) == {"n": 8}
    file.close()
    assert numbers(five) == [0, 1, 2, 3, 4, 8]


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced", "folder removed", "folder renamed"])
def test_a_journal_that_is_not_in_its_place_any_more_is_noticed(tmp_path, how):
    folder = tmp_path / "folder"
    folder.mkdir()
    file, _ = opened(folder / "journal")
    file.append([{"n": 1}])
    file.check_place()
    if how == "removed":
        (folder / "journal").unlink()
    elif how == "renamed":
        (folder / "journal").rename(folder / "other")
    elif how == "replaced":
        shutil.copy(folder / "journal", folder / "other")
        os.replace(folder / "other", folder / "journal")
    elif how == "folder removed":
        shutil.rmtree(folder)
    else:
        folder.rename(tmp_path / "other")
    file.append([{"n": 2}])
    with pytest.raises(UserError, match="was removed or renamed while this run writes it"):
        file.check_place()
    file.close()
    if how == "folder renamed":
        (tmp_path / "other").rename(folder)
        assert numbers(folder / "journal") == [1, 2]
