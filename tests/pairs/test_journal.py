"""The journal of an extraction: found again, torn, damaged, under other settings, on a full disk; and its lock."""

import errno
import json
import os
import tracemalloc

import pytest

import pairs.journal as module
from base import UserError
from extract_tokens_train import SETTINGS
from pairs.journal import Journal, entry_of, line_of

ALIKE = {**dict.fromkeys(SETTINGS, 1), "num_frames": 8}


def answer_of(key: str, number: int, tokens: list[int], model: str = "eventgpt") -> dict:
    return {"model": model, "key": key, "question_idx": number, "tokens": tokens, "text": "é", "finished": True}


def test_a_journal_finds_each_answer_again_under_other_settings_too(tmp_path):
    settings = ALIKE
    with Journal(tmp_path / "out.json", settings, restart=False) as journal:
        journal.append([{"model": "eventgpt", "vocab_size": 64, "name": "x"}])
        journal.append([answer_of(f"town/{i}", q, [i, q] * (i + 1)) for i in range(4) for q in range(2)])
        journal.append([answer_of("town/1", 0, [7])])                              # the later one counts
        assert journal.read("eventgpt", "town/3", 1)["tokens"] == [3, 1] * 4
    for frames in (8, 16, 100_000, 4):               # of the target alone, which has not answered; other first lines
        settings = {**settings, "num_frames": frames}
        with Journal(tmp_path / "out.json", settings, restart=False) as journal:
            assert len(journal) == 8 + (frames == 4) and journal.models["eventgpt"]["vocab_size"] == 64
            assert journal.read("eventgpt", "town/3", 1) == answer_of("town/3", 1, [3, 1] * 4)
            assert journal.read("eventgpt", "town/1", 0)["tokens"] == [7]
            assert journal.has("eventgpt", "town/0", 1) and not journal.has("eventgpt", "town/0", 2)
            assert not journal.has("videollava", "town/0", 1)
            assert journal.has("eventgpt", "town/9", 0) == (frames == 4)
            if frames == 100_000:
                journal.append([answer_of("town/9", 0, [9])])
                assert journal.read("eventgpt", "town/9", 0)["tokens"] == [9]
    first = (tmp_path / ".out.json.journal.jsonl").read_bytes().splitlines(keepends=True)[0]
    assert entry_of(first) == {"settings": settings, "clips": {}}


def test_a_journal_keeps_no_answer_in_memory(tmp_path):
    with Journal(tmp_path / "out.json", ALIKE, restart=False) as journal:
        journal.append([answer_of(f"town/{i}", 0, list(range(300, 700))) for i in range(500)])
        size = journal.path.stat().st_size
    tracemalloc.start()
    with Journal(tmp_path / "out.json", ALIKE, restart=False) as journal:
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(journal) == 500 and held < size / 5


def kept(folder, content: dict | None = None, **changed) -> Journal:
    """A journal, opened and closed again."""
    with Journal(folder / "out.json", {**ALIKE, **changed}, False, content) as journal:
        return journal


@pytest.fixture
def five(tmp_path):
    """The journal of five answers, with the digests of the clips' files."""
    keys = [f"town/{i}" for i in range(9)]
    content = {"eventgpt": {key: f"e {key}" for key in keys}, "videollava": dict.fromkeys(keys, "v")}
    with Journal(tmp_path / "out.json", ALIKE, False, content) as journal:
        journal.append([{"model": "eventgpt", "vocab_size": 64, "name": "x", "revision": "a"}])
        journal.append([answer_of(f"town/{i}", 0, [i] * 9) for i in range(5)])
    return journal.path, content


# ------------------------------------------------------------------------------------------ what is torn or damaged
def test_whatever_is_cut_off_costs_that_line_and_no_other(five, tmp_path, capsys):
    path, content = five
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(ends[0], len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = sum(end <= cut for end in ends)
        assert len(kept(tmp_path, content)) == max(0, lines - 2)
        assert path.read_bytes() == whole[:ends[lines - 1]]
    assert "1 torn or damaged lines: dropped, to be done again" in capsys.readouterr().out


@pytest.mark.parametrize("junk", [b"null\n", b"5\n", b"[1]\n", b"{}\n", b'{"model": "eventgpt"}\n', b"\xff\n",
                                  b"\0" * 40, b"[" * 10**5 + b"\n", b'{"model": [], "vocab_size": 3}\n', b'"half'])
def test_a_damaged_line_is_dropped_and_those_behind_it_stay(five, tmp_path, junk):
    path, content = five
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], junk, *([b"\n"] if not junk.endswith(b"\n") else []), *lines[3:]]))
    journal = kept(tmp_path, content)
    assert len(journal) == 5 and path.read_bytes() == b"".join(lines)
    path.write_bytes(b"".join([*lines, junk]))
    assert len(kept(tmp_path, content)) == 5 and path.read_bytes() == b"".join(lines)


def test_a_digit_that_changed_on_the_disk_is_noticed(five, tmp_path):
    path, content = five
    whole = path.read_bytes()
    with Journal(tmp_path / "out.json", ALIKE, False, content) as journal:
        path.write_bytes(whole.replace(b"[3, 3, 3", b"[3, 8, 3"))
        with pytest.raises(UserError, match="changed since it was written"):
            journal.read("eventgpt", "town/3", 0)
        assert journal.read("eventgpt", "town/2", 0)["tokens"] == [2] * 9
    journal = kept(tmp_path, content)
    assert len(journal) == 4 and not journal.has("eventgpt", "town/3", 0)
    lines = whole.splitlines(keepends=True)
    edited = [*lines[:3], json.dumps({**entry_of(lines[3]), "tokens": [9]}).encode() + b"\n", *lines[4:]]
    path.write_bytes(b"".join(edited))
    assert len(kept(tmp_path, content)) == 4                     # by hand, without a checksum


def test_a_damaged_first_line_is_no_reason_to_throw_hours_away(five, tmp_path):
    path, content = five
    path.write_bytes(b"x" + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(UserError, match="first line of this journal is damaged"):
        kept(tmp_path, content)
    assert path.read_bytes() == before
    for start in (b"", b'{"se', b'{"settings": {"max_new', bytes(50)):       # the machine stopped while it began
        path.write_bytes(start)
        assert len(kept(tmp_path, content)) == 0
        assert entry_of(path.read_bytes())["settings"] == ALIKE


@pytest.mark.parametrize("foreign", [b"precious", b"precious\n", b'{"settings": 5}\n'])
def test_what_is_no_journal_is_left_alone(tmp_path, foreign):
    path = Journal.path_of(tmp_path / "out.json")
    path.write_bytes(foreign)
    with pytest.raises(UserError, match="first line of this journal is damaged"):
        kept(tmp_path)
    assert path.read_bytes() == foreign
    for make, kind in ((lambda: path.symlink_to(tmp_path / "else"), "a link"), (path.mkdir, "a folder"),
                       (lambda: os.mkfifo(path), "a pipe")):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        with pytest.raises(UserError, match=f"is {kind}"):
            Journal(tmp_path / "out.json", ALIKE, restart=True)
    assert not (tmp_path / "else").exists()


# ------------------------------------------------------------------------------------------ other data, other model
def test_answered_clips_whose_files_changed_are_refused_and_named(five, tmp_path):
    path, content = five
    before = path.read_bytes()
    other = {**content, "eventgpt": {**content["eventgpt"], "town/3": "new", "town/4": "new"}}
    with pytest.raises(UserError, match=r"files of 2 answered clips have changed, the first: town/3 \(eventgpt"):
        kept(tmp_path, other)
    assert path.read_bytes() == before


def test_a_clip_that_was_mended_or_added_does_not_stop_the_journal(five, tmp_path):
    path, content = five
    other = {"eventgpt": {**content["eventgpt"], "town/8": "mended", "town/9": "added"},
             "videollava": dict.fromkeys(content["videollava"], "seen by no answer yet")}
    assert len(kept(tmp_path, other)) == 5
    assert json.loads(path.read_bytes().splitlines()[0])["clips"] == other
    few = {model: {"town/0": found["town/0"]} for model, found in other.items()}        # --max_samples 1
    assert len(kept(tmp_path, few)) == 5
    with pytest.raises(UserError, match="first: town/3"):              # what it knew of the others has stayed
        kept(tmp_path, {**other, "eventgpt": {**other["eventgpt"], "town/3": "new"}})


def test_a_journal_without_digests_is_gone_on_with(five, tmp_path):
    path, content = five
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([line_of({"settings": json.loads(first)["settings"]}), *rest]))
    assert len(kept(tmp_path, content)) == 5
    assert json.loads(path.read_bytes().splitlines()[0])["clips"] == content


def test_other_weights_at_the_same_path_are_refused(five, tmp_path):
    journal = kept(tmp_path, five[1])
    journal.check_model("eventgpt", {"name": "x", "revision": "a"})
    journal.check_model("videollava", {"name": "y", "revision": "b"})
    with pytest.raises(UserError, match=r"other weights of x \(a there, b now\)"):
        journal.check_model("eventgpt", {"name": "x", "revision": "b"})


# ------------------------------------------------------------------------------------------------------- the disk
@pytest.mark.parametrize("how", ["half a write", "no fsync"])
def test_a_full_disk_leaves_whole_lines_and_the_next_start_goes_on(five, tmp_path, monkeypatch, how):
    path, content = five
    before = path.read_bytes()

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

    with pytest.raises(OSError, match="No space") as caught, \
            Journal(tmp_path / "out.json", ALIKE, False, content) as journal:
        if how == "half a write":
            journal.file = Full(journal.file)
        else:
            monkeypatch.setattr(module.os, "fsync", full)
        journal.append([answer_of("town/7", 0, [7] * 50)])
    monkeypatch.undo()
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    with Journal(tmp_path / "out.json", ALIKE, False, content) as journal:
        journal.append([answer_of("town/7", 0, [7] * 50)])
        assert len(journal) == 6 and journal.read("eventgpt", "town/7", 0)["tokens"] == [7] * 50


@pytest.mark.parametrize("written", [False, True])
def test_a_signal_in_the_middle_of_a_write_leaves_no_half_line(five, tmp_path, monkeypatch, written):
    path, content = five
    before = path.read_bytes()

    class Stopped:
        """A file during whose writing Ctrl-C is pressed."""

        def write(self, data) -> int:
            journal.kept.write(data if written else data[:10])
            if not written:
                raise KeyboardInterrupt
            return len(data)

        def __getattr__(self, name):
            return getattr(journal.kept, name)

    def stopped(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "out.json", ALIKE, False, content) as journal:
        journal.kept, journal.file = journal.file, Stopped()
        monkeypatch.setattr(module.os, "fsync", stopped)
        journal.append([answer_of("town/7", 0, [7] * 50)])
    assert (path.read_bytes() == before) != written and path.read_bytes().startswith(before)
    assert len(kept(tmp_path, content)) == 5 + written
