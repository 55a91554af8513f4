"""The journal of an extraction: its answers found again, under other settings, of other files, of
other formats.
"""

import json
import tracemalloc

import pytest

from base import UserError
from machine.journal import line_of, value_of
from pairs.journal import Journal, Setting, differences
from pairs.journals import discard, merged_mark

NAMES = ("dataset_dir", "max_new_tokens", "questions", "quantization", "dtype")
BOTH, TARGET = ("eventgpt", "videollava"), ("videollava",)


def settings_of(**changed) -> dict[str, Setting]:
    """num_frames is a setting that the target alone depends on."""
    values = {**dict.fromkeys(NAMES, 1), "num_frames": 8, **changed}
    return {name: Setting(value, TARGET if name == "num_frames" else BOTH) for name, value in values.items()}


def values_of(settings: dict[str, Setting]) -> dict:
    return {name: setting.value for name, setting in settings.items()}


ALIKE = settings_of()


def answer_of(key: str, number: int, tokens: list[int], model: str = "eventgpt") -> dict:
    return {
        "model": model, "key": key, "question_idx": number, "tokens": tokens, "text": "é",
        "finished": True
    }


def test_a_journal_finds_each_answer_again_under_other_settings_too(tmp_path):
    with Journal(tmp_path / "out.json", ALIKE) as journal:
        journal.append([{"model": "eventgpt", "vocab_size": 64, "name": "x"}])
        journal.append([answer_of(f"town/{i}", q, [i, q] * (i + 1)) for i in range(4) for q in range(2)])
        journal.append([answer_of("town/1", 0, [7])])                              # the later one counts
        assert journal.read("eventgpt", "town/3", 1)["tokens"] == [3, 1] * 4
    # Of the target alone, which has not answered; other first lines
    for frames in (8, 16, 100_000, 4):
        settings = settings_of(num_frames=frames)
        with Journal(tmp_path / "out.json", settings) as journal:
            assert len(journal) == 8 + (frames
                                        == 4) and journal.models["eventgpt"]["vocab_size"] == 64
            assert journal.read("eventgpt", "town/3", 1) == answer_of("town/3", 1, [3, 1] * 4)
            assert journal.read("eventgpt", "town/1", 0)["tokens"] == [7]
            assert journal.has("eventgpt", "town/0", 1) and not journal.has("eventgpt", "town/0", 2)
            assert not journal.has("videollava", "town/0", 1) and not journal.has_any("videollava")
            assert journal.has("eventgpt", "town/9", 0) == (frames == 4)
            if frames == 100_000:
                journal.append([answer_of("town/9", 0, [9])])
                assert journal.read("eventgpt", "town/9", 0)["tokens"] == [9]
    first = value_of((tmp_path / ".out.json.journal.jsonl").read_bytes().splitlines(keepends=True)[0])
    assert first == {"format": 2, "run": first["run"], "settings": values_of(settings), "clips": {}}


def test_a_journal_keeps_no_answer_in_memory(tmp_path):
    with Journal(tmp_path / "out.json", ALIKE) as journal:
        journal.append([answer_of(f"town/{i}", 0, list(range(300, 700))) for i in range(500)])
        size = journal.path.stat().st_size
    tracemalloc.start()
    with Journal(tmp_path / "out.json", ALIKE) as journal:
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(journal) == 500 and held < size / 5


def reopened(folder, content: dict | None = None, **changed) -> Journal:
    """A journal, opened and closed again."""
    with Journal(folder / "out.json", settings_of(**changed), content) as journal:
        return journal


@pytest.fixture
def five(tmp_path):
    """The journal of five answers, with the digests of the clips' files."""
    keys = [f"town/{i}" for i in range(9)]
    content = {"eventgpt": {key: f"e {key}" for key in keys}, "videollava": dict.fromkeys(keys, "v")}
    with Journal(tmp_path / "out.json", ALIKE, content) as journal:
        journal.append([{"model": "eventgpt", "vocab_size": 64, "name": "x", "revision": "a"}])
        journal.append([answer_of(f"town/{i}", 0, [i] * 9) for i in range(5)])
    return journal.path, content


# ---------------------------------------------------------------------------------------- settings
def test_only_settings_that_an_answer_depends_on_are_compared(five, tmp_path):
    path, content = five
    # The target has not answered yet
    assert len(reopened(tmp_path, content, num_frames=4)) == 5
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"other settings.*dtype: 1 there, 2 now"):
        reopened(tmp_path, content, dtype=2)
    assert path.read_bytes() == before
    with Journal(tmp_path / "out.json", settings_of(num_frames=4), content) as journal:
        journal.append([answer_of("town/0", 0, [9], "videollava")])
    with pytest.raises(UserError, match="num_frames: 4 there, 8 now"):
        reopened(tmp_path, content)


def test_a_damaged_journal_of_other_settings_is_not_even_mended(five, tmp_path):
    path, content = five
    path.write_bytes(path.read_bytes() + b'"half')
    before = path.read_bytes()
    with pytest.raises(UserError, match="other settings"):
        reopened(tmp_path, content, dtype=2)
    assert path.read_bytes() == before


def test_a_journal_of_the_first_format_goes_on(five, tmp_path):
    """As versions before the format number wrote it: no mark of the run in any line."""
    path, content = five
    lines = [value_of(line) for line in path.read_bytes().splitlines(keepends=True)]
    head = {"settings": lines[0]["settings"], "clips": lines[0]["clips"]}
    rest = [{key: value for key, value in line.items() if key != "of"} for line in lines[1:]]
    path.write_bytes(b"".join(map(line_of, [head, *rest])))
    with Journal(tmp_path / "out.json", ALIKE, content) as journal:
        assert len(journal) == 5 and journal.models["eventgpt"]["revision"] == "a"
        assert journal.read("eventgpt", "town/3", 0)["tokens"] == [3] * 9
    assert len(reopened(tmp_path, content)) == 5


def test_a_newer_journal_is_one_clear_line(five, tmp_path):
    path, content = five
    path.write_bytes(line_of({"format": 3, "settings": {}}))
    with pytest.raises(UserError,
                       match=r"format 3, this version reads formats up to 2.*newer version"):
        reopened(tmp_path, content)


@pytest.mark.parametrize("head", [
    {"task": "t"}, {"settings": [], "clips": {}}, {"settings": {}, "clips": {"a": 1}}])
def test_another_kind_of_journal_is_refused(tmp_path, head):
    path = Journal.path_of(tmp_path / "out.json")
    path.write_bytes(line_of({"format": 2, **head}))
    with pytest.raises(UserError, match="is no journal of an extraction"):
        reopened(tmp_path)


# ---------------------------------------------------------------------------------- rows of others
def test_answers_of_a_joined_journal_of_other_settings_are_not_believed(five, tmp_path, capsys):
    path, content = five
    (tmp_path / "other").mkdir()
    with Journal(tmp_path / "other" / "out.json", settings_of(dtype=2), content) as journal:
        journal.append([answer_of(f"town/{i}", 0, [66]) for i in range(3, 9)])
    path.write_bytes(path.read_bytes() + journal.path.read_bytes())
    with Journal(tmp_path / "out.json", ALIKE, content) as journal:
        assert len(journal) == 5 and journal.read("eventgpt", "town/3", 0)["tokens"] == [3] * 9
    assert "0 torn or damaged, 7 of another run" in capsys.readouterr().out


def test_reading_an_answer_checks_whose_it_is(five, tmp_path):
    with Journal(tmp_path / "out.json", ALIKE, five[1]) as journal:
        places = journal.places["eventgpt", 0]
        journal.places["videollava", 0] = journal.places["eventgpt", 1] = places
        for model, number in (("videollava", 0), ("eventgpt", 1)):
            with pytest.raises(UserError, match="is not where it was written"):
                journal.read(model, "town/3", number)
        places["town/3"] = places["town/4"]
        with pytest.raises(UserError, match="is not where it was written"):
            journal.read("eventgpt", "town/3", 0)


@pytest.mark.parametrize("junk", [{"model": "eventgpt"}, {"model": [], "vocab_size": 3}, {"settings": {}},
                                  {**answer_of("town/9", 0, []), "tokens": [True]},
                                  {**answer_of("town/9", 0, []), "text": None}])
def test_a_line_that_is_no_answer_is_dropped(five, tmp_path, junk):
    path, content = five
    with Journal(tmp_path / "out.json", ALIKE, content) as journal:
        journal.file.append([junk])
        journal.append([answer_of("town/5", 0, [5])])
    journal = reopened(tmp_path, content)
    assert len(journal) == 6 and not journal.has("eventgpt", "town/9", 0)
    assert json.dumps(junk)[:-1] + ', "of"' not in path.read_text()


# -------------------------------------------------------------------------------------- other data
def test_answered_clips_whose_files_changed_are_refused_and_named(five, tmp_path):
    path, content = five
    before = path.read_bytes()
    other = {**content, "eventgpt": {**content["eventgpt"], "town/3": "new", "town/4": "new"}}
    with pytest.raises(
            UserError,
            match=r"files of 2 answered clips have changed, the first: town/3 \(eventgpt"):
        reopened(tmp_path, other)
    assert path.read_bytes() == before


def test_a_clip_that_was_mended_or_added_does_not_stop_the_journal(five, tmp_path):
    path, content = five
    other = {"eventgpt": {**content["eventgpt"], "town/8": "mended", "town/9": "added"},
             "videollava": dict.fromkeys(content["videollava"], "seen by no answer yet")}
    assert len(reopened(tmp_path, other)) == 5
    assert json.loads(path.read_bytes().splitlines()[0])["clips"] == other
    # --max_samples 1
    few = {model: {"town/0": digests["town/0"]} for model, digests in other.items()}
    assert len(reopened(tmp_path, few)) == 5
    # What it knew of the others has stayed
    with pytest.raises(UserError, match="first: town/3"):
        reopened(tmp_path, {**other, "eventgpt": {**other["eventgpt"], "town/3": "new"}})


def test_a_journal_without_digests_is_gone_on_with(five, tmp_path):
    path, content = five
    answers = [value_of(line) for line in path.read_bytes().splitlines(keepends=True)[1:]]
    answers = [{key: value for key, value in answer.items() if key != "of"} for answer in answers]
    path.write_bytes(b"".join(map(line_of, [{"settings": values_of(ALIKE)}, *answers])))
    assert len(reopened(tmp_path, content)) == 5
    assert json.loads(path.read_bytes().splitlines()[0])["clips"] == content


# -------------------------------------------------------------------------- begun, and thrown away
def test_a_journal_may_begin_with_the_answers_of_an_output(tmp_path):
    entries = [{"model": "eventgpt", "vocab_size": 64}, *(answer_of(f"town/{i}", 0, [i]) for i in range(3))]
    with Journal(tmp_path / "out.json", ALIKE, entries=iter(entries)) as journal:
        assert len(journal) == 3 and journal.read("eventgpt", "town/2", 0)["tokens"] == [2]
        assert journal.models["eventgpt"]["vocab_size"] == 64
    assert len(reopened(tmp_path)) == 3


def test_answers_that_break_off_leave_no_journal_behind(tmp_path):
    def entries():
        yield answer_of("town/0", 0, [1])
        raise UserError("the output is damaged")

    with pytest.raises(UserError, match="the output is damaged"):
        Journal(tmp_path / "out.json", ALIKE, entries=entries())
    assert list(tmp_path.iterdir()) == []


def test_a_discarded_journal_is_gone_and_a_link_is_not_followed(five, tmp_path):
    path, _ = five
    mark = merged_mark(tmp_path / "out.json")        # of an output before; journals to come need it gone
    mark.write_text("")
    discard(tmp_path / "out.json")
    discard(tmp_path / "out.json")
    assert not path.exists() and not mark.exists()
    path.symlink_to(tmp_path / "else")
    with pytest.raises(UserError, match="is a link"):
        discard(tmp_path / "out.json")
    with pytest.raises(UserError, match="is a link"):
        Journal(tmp_path / "out.json", ALIKE)


def test_a_setting_that_earlier_versions_lacked_had_its_default_then():
    wanted = {"seed": 1, "draft_sees": "events", "fresh_sequences": False}
    assert differences({"seed": 1}, wanted) == ""
    assert differences({}, {"draft_sees": "frames"}) == 'draft_sees: "events" there, "frames" now'
