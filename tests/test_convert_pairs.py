"""Token ids under any keys become a pair file that training reads; else the keys that there are are named."""

import json
import sys
from pathlib import Path

import pytest

import convert_pairs
from base import UserError
from pairs.convert import Conversion, Keys
from pairs.formats import load_pairs


def convert(monkeypatch, path: Path, *flags: str):
    monkeypatch.setattr(sys, "argv", ["convert_pairs.py", "--in", str(path), *flags])
    convert_pairs.main()
    return load_pairs([path.with_name(f"{path.stem}_pairs.json")])


ROW = {"models": {"small": {"ids": [5, 6]}, "large": [7, 8, 9, 2]}, "sequence": "thun_00_a", "clip": 3}


@pytest.mark.parametrize("layout", ["list", "results", "lines", "inside"])
def test_rows_of_every_layout_become_the_same_pairs(tmp_path, monkeypatch, layout):
    rows = [ROW, {**ROW, "clip": 4}]
    text = {"list": json.dumps(rows), "results": json.dumps({"results": rows}),
            "lines": "\n".join(map(json.dumps, rows)), "inside": json.dumps({"data": rows})}[layout]
    path, before = tmp_path / ("a.jsonl" if layout == "lines" else "a.json"), "data." * (layout == "inside")
    path.write_text(text)
    pairs = convert(monkeypatch, path, "--draft_key", f"{before}models.small.ids", "--target_key",
                    f"{before}models.large", "--vocab_size", "10")
    assert list(pairs.answers("draft")) == [[5, 6]] * 2 and pairs.clip == [3, 4]
    assert list(pairs.answers("target")) == [[7, 8, 9, 2]] * 2
    assert pairs.sequence == ["thun_00_a"] * 2 and pairs.vocab_size == 10


def test_a_list_of_answers_gives_as_many_pairs_each_with_its_own_place(tmp_path, monkeypatch):
    row = {"d": [[1], [2, 3]], "t": [{"ids": [4, 5]}, {"ids": [6, 7, 8]}], "where": ["bern_0_a", "thun_1_a"]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    pairs = convert(monkeypatch, tmp_path / "a.json", "--draft_key", "d", "--target_key", "t.ids",
                    "--sequence_key", "where")
    assert list(pairs.answers("draft")) == [[1], [2, 3]]
    assert list(pairs.answers("target")) == [[4, 5], [6, 7, 8]]
    assert pairs.sequence == row["where"]


def test_rows_that_give_no_pair_are_counted_by_reason_and_never_shift_others(tmp_path):
    rows = [{"d": [1], "t": [2, 3]}, {"d": [1], "t": [2, "3"]}, {"d": [[1], [2]], "t": [[3]]}, {"d": [1]},
            {"d": [{"i": 1}, {}], "t": [2]}, {"d": [1], "t": [True]}, {"d": [1], "t": [-1]}, 7,
            {"d": [1], "t": json.loads("[" * 900 + "]" * 900)}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(rows))
    conversion = Conversion(path, Keys("t", "d"))
    assert [pair["vl_tokens"] for pair in conversion] == [[2, 3]]
    assert conversion.dropped == {"t holds no token ids": 4, "2 drafts and 1 targets": 1, "no t": 2,
                                  "d holds no token ids": 1}


@pytest.mark.parametrize(("text", "words"), [
    (json.dumps([ROW]), r"1 x no ids; keys with token ids: models\.small\.ids \(2 ids\), "
                        r"models\.large \(4 ids\); others: sequence, clip"),
    ("[]", "holds no rows"), ("3", "holds no rows"), ("", "is not JSON"), ("[" * 10**5, "is not JSON")])
def test_a_file_without_a_pair_is_one_line_with_the_keys_that_it_has(tmp_path, monkeypatch, text, words):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        convert(monkeypatch, path, "--target_key", "ids")
    assert list(tmp_path.iterdir()) == [path]


def test_the_input_is_never_written_over(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps([ROW]))
    with pytest.raises(UserError, match="would write over the input"):
        convert(monkeypatch, tmp_path / "a.json", "--target_key", "t", "--out", str(tmp_path / "a.json"))
    pairs = convert(monkeypatch, tmp_path / "a.json", "--target_key", "models.large")
    assert list(pairs.answers("draft")) == [[]]
