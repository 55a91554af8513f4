"""Validation is whole drives, an overlap of train and test is said, and streams keep their order.
"""

import json

import numpy as np
import pytest

from base import drive_of
from pairs.formats import load_pairs
from pairs.splits import (
    ValidationSplit,
    clip_order,
    load_data,
    natural_key,
    shortened,
    split_validation,
)
from tests.conftest import write_pairs


@pytest.mark.parametrize("seed", range(5))
def test_validation_takes_whole_drives(files, seed):
    pairs = load_pairs([files["train"]])
    train_rows, validation_rows, split = split_validation(pairs, 0.3, seed)
    train, validation = ({drive_of(pairs.sequence[row]) for row in rows}
                         for rows in (train_rows, validation_rows))
    assert sorted([*train_rows, *validation_rows]) == list(range(80)) and split["by"] == "drive"
    assert (sorted(train), sorted(validation)) == (sorted(split["train"]), split["validation"])
    assert not train & validation


@pytest.mark.parametrize(("sequences", "by", "validation"), [
    (["zurich_00_a", "zurich_00_b"], "sequence", 20), (["thun_01_a"], "last block of rows", 3),
    ([""], "last block of rows", 3)])
def test_one_drive_is_cut_by_sequence_and_one_sequence_by_its_last_block(
        tmp_path, sequences, by, validation):
    pairs = load_pairs([write_pairs(tmp_path / "pairs.json", sequences)])
    train_rows, validation_rows, split = split_validation(pairs, 0.15, 42)
    assert split["by"] == by and len(validation_rows) == validation
    assert by == "sequence" or max(train_rows) < min(validation_rows)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_neither_side_of_the_split_is_ever_empty(files, tmp_path, fraction):
    for pairs in (load_pairs([files["train"]]),
                  load_pairs([write_pairs(tmp_path / "two.json", ["a_a"], 2)])):
        train_rows, validation_rows, _ = split_validation(pairs, fraction, 0)
        assert len(train_rows) and len(validation_rows)


@pytest.mark.parametrize(("test_sequence", "words"), [
    ("thun_01_a", ["share 1 sequences: thun_01_a", "share 1 drives"]),
    ("thun_01_c", ["share 1 drives: thun_01"]), ("", ["can't be seen"]), ("basel_03_a", [])])
def test_an_overlap_of_train_and_test_is_said_in_log_and_results(files, tmp_path, capsys,
                                                                 test_sequence, words):
    test = write_pairs(tmp_path / "test.json", [test_sequence])
    warnings = load_data([files["train"]], [test], ValidationSplit(0.15, 42)).warnings
    assert len(warnings) == len(words) and all(word in warning for word, warning in zip(words, warnings))
    assert capsys.readouterr().out.count("WARNING") == len(words)


@pytest.mark.parametrize("random_split", [True, False])
def test_without_sequence_names_a_random_split_is_seen_by_the_answers_it_repeats(tmp_path, random_split):
    """Neighbouring clips are often answered alike: here every answer occurs twice in a row."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(60):
        answer = rng.integers(3, 90, 30).tolist()
        rows += [{"sample_idx": len(rows) + k, "egpt_tokens": [4], "vl_tokens": answer} for k in range(2)]
    order = rng.permutation(120) if random_split else np.arange(120)
    for name, part in (("train", order[:90]), ("test", order[90:])):
        (tmp_path / name).write_text(json.dumps({"results": [rows[i] for i in part]}))
    data = load_data([tmp_path / "train"], [tmp_path / "test"], ValidationSplit(0.15, 42))
    assert sum("word for word" in warning for warning in data.warnings) == random_split


def test_what_is_shortened_keeps_the_first_clips_of_every_sequence(tmp_path):
    pairs = load_pairs([write_pairs(tmp_path / "test.json", ["basel_03_a", "bern_07_a"])])
    part = shortened(pairs, 8)
    assert part.sequence == ["basel_03_a"] * 4 + ["bern_07_a"] * 4 and part.clip == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("kind", ["numbers", "texts", "both"])
def test_clips_come_sequence_by_sequence_as_they_were_driven(kind):
    rng = np.random.default_rng(0)
    sequences = [["b_a", "a_a", "", "c"][i] for i in rng.integers(4, size=200)]
    numbers = rng.integers(0, 3 * 10**6, 200).tolist()
    clips = numbers
    if kind != "numbers":
        clips = [f"zurich_city_14_a_{n}" if n % 3 or kind == "texts" else n for n in numbers]
    first = {name: sequences.index(name) for name in set(sequences)}
    in_order = sorted(range(200), key=lambda i:
                      (first[sequences[i]], isinstance(clips[i], str), numbers[i]))
    assert clip_order(sequences, clips).tolist() == in_order
    assert clip_order([], []).tolist() == []


def test_names_are_ordered_by_the_value_of_their_numbers():
    names = ["", "0", 7, "9", "10", "0000000011", 12, "9" * 40, "1" + "0" * 40, "a", "a_9_b2", "a_9_b10",
             "a_0010_b1", "zurich_city_14_a_9", "zurich_city_14_a_10", "zurich_city_14_a_100"]
    mixed = np.random.default_rng(0).permutation(len(names))
    assert sorted((names[i] for i in mixed), key=natural_key) == names
    assert clip_order(["s"] * len(names), [names[i]
                                           for i in mixed]).tolist() == np.argsort(mixed).tolist()


def test_the_last_block_of_a_single_sequence_is_the_last_in_time(tmp_path):
    """Files whose clips were ordered as text hold _10 before _9."""
    rows = [{"sample_idx": i, "sequence": "thun_01_a", "clip": f"thun_01_a_{clip}", "egpt_tokens": [4],
             "vl_tokens": [5, 6, 7, 8]} for i, clip in enumerate(sorted(range(20), key=str))]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    pairs = load_pairs([tmp_path / "pairs.json"])
    train, validation, _ = split_validation(pairs, 0.25, 42)
    assert sorted(int(pairs.clip[row].split("_")[-1]) for row in validation) == [15, 16, 17, 18, 19]
    assert sorted([*train, *validation]) == list(range(20))


def test_a_sequence_is_shortened_to_its_share_even_when_its_clips_are_scattered(tmp_path):
    pairs = load_pairs([write_pairs(tmp_path / "test.json", ["basel_03_a", "bern_07_a"], 20)])
    mixed = pairs.select(np.random.default_rng(0).permutation(40)[:30])
    part = shortened(mixed, 10)
    assert len(part) == 10
    for name in ("basel_03_a", "bern_07_a"):
        ours, all_of_it = ([clip for one, clip in zip(found.sequence, found.clip) if one == name]
                           for found in (part, mixed))
        assert ours == all_of_it[:len(ours)] and abs(len(ours) - len(all_of_it) / 3) < 1
