"""What a decoding's journal holds comes back as it was; anything else in it is dropped or refused.
"""

import json

import pytest

from base import UserError
from decoding.journal import DecodingJournal, hidden_folder, is_entry, journal_of, open_journal
from decoding.together import discard_together
from drafting.memory import load_memory, save_memory
from machine.team import Alone

SETTINGS, CONTENT = {"gamma": "auto"}, {"eventgpt": {"town/1": "a"}, "videollava": {"town/1": "b"}}
RUN = {
    "tokens": 2, "proposed": [1], "accepted": [1], "draft_s": 0.1, "opening_s": 0.1,
    "prefill_s": 0.2, "verify_s": 0.0
}
ROW = {"tokens": [4, 2], "text": "a", "runs": {"memory": RUN}}
ENTRIES = [
    {"model": "eventgpt", "facts": {"revision": "content " + "a" * 20}},
    {"draft": [4, 5], "seconds": 0.5, "key": "town/1", "question_idx": 0},
    {"draft_costs_ms": {"vision": 1.0}}, {"costs_ms": {"vision": 2.0}, "noise": 0.25},
    {"answer": ROW, "key": "town/1", "question_idx": 0, "other_tokens": {"copy": [4, 3]}},
    {"folder": "decode_2"}]


def fill(path) -> None:
    with DecodingJournal(path, SETTINGS, CONTENT) as journal:
        for entry in ENTRIES:
            journal.add(entry)


def test_entries_come_back_as_they_were(tmp_path):
    fill(tmp_path / "j")
    with DecodingJournal(tmp_path / "j", SETTINGS, CONTENT) as journal:
        assert journal.drafts == {("town/1", 0): ([4, 5], 0.5)
                                  } and journal.answers == {("town/1", 0): ROW}
        assert journal.other_tokens == {("town/1", 0): {"copy": [4, 3]}
                                        } and journal.folder == "decode_2"
        assert (journal.costs_ms, journal.noise, journal.draft_costs_ms) == ({"vision": 2.0}, 0.25,
                                                                             {"vision": 1.0})
        journal.add({"costs_ms": {"vision": 3.0}, "noise": 0.5})
        # verdicts keep one threshold
        assert journal.costs_ms == {"vision": 3.0} and journal.noise == 0.25
        assert [entry["answers"] for entry in journal.starts] == [0, 1]


def test_each_damaged_byte_costs_its_line_alone_or_is_one_error(tmp_path):
    fill(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    first = whole.index(b"\n")
    for at in range(0, len(whole), 7):
        (tmp_path / "j").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        try:
            with DecodingJournal(tmp_path / "j", SETTINGS, CONTENT) as journal:
                assert len(journal.drafts) + len(journal.answers) >= 1 and at > first
        except UserError as error:
            assert at <= first, error


def test_a_newer_format_is_one_clear_error(tmp_path):
    fill(tmp_path / "j")
    lines = (tmp_path / "j").read_text().splitlines()
    head = json.loads(lines[0])
    from machine.journal import line_of

    head.pop("crc")
    (tmp_path / "j").write_bytes(line_of({**head, "format": 99}))
    with pytest.raises(UserError, match=r"format 99.*newer version"):
        DecodingJournal(tmp_path / "j", SETTINGS, CONTENT)


@pytest.mark.parametrize(
    "entry",
    [{}, {"draft": [4, "5"], "seconds": 0.5, "key": "a", "question_idx": 0},
    {"draft": [4], "seconds": 0.5, "key": "a", "question_idx": 0, "text": 5}, {"draft": [4]}, {
        "answer": {**ROW, "tokens": [True]}, "key": "a", "question_idx": 0, "other_tokens": {}
    }, {"answer": {"tokens": [1]}, "key": "a", "question_idx": 0, "other_tokens": {}}, {
        "answer": {**ROW, "runs": {"memory": {"tokens": 1}}}, "key": "a", "question_idx": 0,
        "other_tokens": {}
    }, {"seconds": 1.0, "draft": [4]}, {"costs_ms": {}, "noise": None}])
def test_what_is_no_entry(entry):
    assert not is_entry(entry)
    assert all(map(is_entry, ENTRIES))


def test_a_journal_that_holds_nothing_is_not_kept(tmp_path):
    folder = hidden_folder(tmp_path, SETTINGS)
    with pytest.raises(KeyError), open_journal(folder, SETTINGS, CONTENT) as journal:
        assert journal_of(folder).exists()
        raise KeyError
    assert not folder.exists()
    with pytest.raises(KeyError), open_journal(folder, SETTINGS, CONTENT) as journal:
        journal.add(ENTRIES[1])
        raise KeyError
    assert journal_of(folder).exists()
    with DecodingJournal(journal_of(folder, 2), SETTINGS, CONTENT) as journal:
        journal.add(ENTRIES[1])
    discard_together(Alone(), folder)                # --restart: what processes of all ranks left
    assert {path.name for path in folder.iterdir()} == {".lock"}
    with open_journal(folder, SETTINGS, CONTENT) as journal:
        assert not journal.drafts
    assert not folder.exists()


@pytest.mark.parametrize(("settings", "content", "message"), [
    ({"gamma": 4}, CONTENT, r"another decoding \(gamma: "),
    (SETTINGS, {**CONTENT, "eventgpt": {"town/1": "c"}}, "files of 1 clips have changed")])
def test_what_another_process_left_is_taken_up_only_of_the_same_decoding(
        tmp_path, settings, content, message):
    fill(tmp_path / "other")
    with DecodingJournal(tmp_path / "same", SETTINGS, CONTENT) as journal:
        journal.take_up([tmp_path / "other"])
        assert journal.drafts and journal.answers
    with DecodingJournal(tmp_path / "own", settings, content) as journal, \
            pytest.raises(UserError, match=message):
        journal.take_up([tmp_path / "other"])


def test_a_memory_has_a_format_and_one_without_goes_on_loading(tmp_path):
    import numpy as np

    save_memory([[3, 4], [5]], tmp_path / "now.npz")
    with np.load(tmp_path / "now.npz") as arrays:
        content = dict(arrays)
    assert content.pop("format") == 1
    np.savez(tmp_path / "older.npz", **content)
    assert load_memory(tmp_path / "older.npz") == load_memory(tmp_path / "now.npz") == [[3, 4], [5]]
    np.savez(tmp_path / "newer.npz", **content, format=np.int32(99))
    with pytest.raises(UserError, match=r"format 99.*newer version"):
        load_memory(tmp_path / "newer.npz")
