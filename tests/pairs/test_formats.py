"""Pair files of three formats become Pairs; unusable rows are counted by reason, odd facts cost
nothing.
"""

import json
import tracemalloc
from pathlib import Path

import pytest

import pairs.formats as pair_files
from base import UserError
from pairs.formats import load_pairs
from pairs.pairs import Pairs
from pairs.rows import write_rows

DRAFT, TARGET = [512, 278, 9088, 2], [450, 1820, 3161, 297]


def extraction(number: int, draft=DRAFT, target=TARGET, **more) -> dict:
    return {"sample_idx": number, "question_idx": 0, "egpt_tokens": draft, "egpt_text": "In the scene",
            "vl_tokens": target, "vl_text": "The key elements", **more}


def benchmark(number: int, draft=DRAFT, target=TARGET) -> dict:
    return {"sample_idx": number, "eventgpt": {"output_tokens": draft},
            "videollava": {"output_tokens": target}}


def inference(number: int, draft=DRAFT, target=TARGET) -> dict:
    return {"id": f"id-{number}", "egpt_token_ids": draft, "llava_token_ids": target,
            "event_data": f"interlaken_00_c/{number:06}.npy"}


def load(folder: Path, content) -> Pairs:
    path = folder / "pairs.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return load_pairs([path])


# --------------------------------------------------------------------------------------- pair files
@pytest.mark.parametrize(("content", "form"), [
    ({"results": [extraction(0), extraction(1)]}, "extraction"),
    ({"results": [benchmark(0), benchmark(1)]}, "benchmark"),
    ([inference(0), inference(1)], "inference"),
    ([extraction(0), extraction(1)], "extraction"),
])
def test_a_format_is_told_by_its_content(tmp_path, content, form):
    pairs = load(tmp_path, content)
    assert pairs.files[0]["format"] == form
    assert pairs.padded("draft", 4).tolist() == [DRAFT, DRAFT]
    assert pairs.padded("target", 4).tolist() == [TARGET, TARGET]


@pytest.mark.parametrize(("row", "reason"), [
    (extraction(1, draft=None), "no token list"),
    (extraction(1, target="450 1820"), "no token list"),
    (extraction(1, target=[450, 1.5]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, True]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, "1820"]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, None]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, float("nan")]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, float("inf")]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, -1]), "negative or absurd token ids"),
    (extraction(1, target=[450, 2**31]), "negative or absurd token ids"),
    (extraction(1, target=[29889, 2]), "fewer tokens than words in the text"),
    (extraction(1, target=[], vl_text=""), "empty target"),
    (extraction(0), "duplicate row"),
    ("not a row", "no token list"), ([[extraction(1)]], "no token list"), (None, "no token list"),
    (extraction(1, draft=[[5]]), "token ids that are not whole numbers"),
    (extraction(1, draft={"0": 5}), "no token list"),
    (extraction(1, target=[5] * (pair_files.MAX_ANSWER + 1)), "absurdly long (over 32768 tokens)"),
    (extraction(1, target=[29889, 2], vl_text="a full paragraph of words"),
     "fewer tokens than words in the text"),
])
def test_an_unusable_row_is_dropped_and_counted_by_its_reason(tmp_path, row, reason):
    pairs = load(tmp_path, {"results": [extraction(0), row, extraction(2)]})
    assert len(pairs) == 2
    assert pairs.files[0]["dropped"] == {reason: 1}


PROMPT = "prompt included (starts with BOS)"


@pytest.mark.parametrize(("recorded", "flag", "dropped"), [
    ({"videollava": {"bos_id": 1}}, None, [1]), ({"eventgpt": {"bos_id": 1}}, None, [2]), ({}, 1, [1, 2]),
    ({"videollava": {"bos_id": 2}}, 1, [1, 2]),
    ({"videollava": {"bos_id": 151643}}, None, []), ({}, None, []),
    ({"videollava": {"bos_id": "1"}}, None, [])])
def test_a_prompt_is_told_by_the_bos_that_is_recorded_or_given(tmp_path, recorded, flag, dropped):
    """Id 1 is LLaMA's BOS, and a quotation mark in Qwen's vocabulary."""
    rows = [
        extraction(0),
        extraction(1, target=[1, 450, 1820, 3161]),
        extraction(2, draft=[1, *[32000] * 9, 450])
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"models": recorded, "results": rows}))
    pairs = load_pairs([path], bos_id=flag)
    assert pairs.files[0]["used"] == 3 - len(dropped)
    assert pairs.files[0]["dropped"] == ({PROMPT: len(dropped)} if dropped else {})
    doubted = sum(count for flag, count in pairs.files[0]["flagged"].items() if "--bos_id 1" in flag)
    ids = [flag or recorded.get(name, {}).get("bos_id") for name in ("videollava", "eventgpt")]
    assert doubted == sum(type(bos_id) is not int for bos_id in ids)


@pytest.mark.parametrize(("row", "flag"), [
    (extraction(1, target=[10887] * 8), "one id repeated"),
    (extraction(1, target=[10887] * 80 + [450] * 20), "one id repeated"),
    (extraction(1, draft=[0] * 50, egpt_text=""), "one id repeated"),
    (extraction(1, draft=[], egpt_text=""), "empty draft"),
    (extraction(1, target=[10887, 2], vl_text="ms"), "target under 4 tokens"),
])
def test_a_suspicious_row_is_kept_and_flagged(tmp_path, capsys, row, flag):
    pairs = load(tmp_path, {"results": [extraction(0), row]})
    assert len(pairs) == 2 and pairs.files[0]["flagged"] == {flag: 1}
    assert "WARNING" in capsys.readouterr().out


@pytest.mark.parametrize(("draft", "target"), [
    ([512, 0, 278, 0, 2], [450, 1820, 3161, 297]),                  # id 0 is a token like any other
    (list(range(300, 350)), [450, 1820, 3161, 2]),           # the draft was cut, the target was not
    ([512, 278, 2], [450, 2, 1820, 3161, 2]),                            # EOS in the middle
    ([512, 278, 2], [450, *[22] * 3, 1820, 3161]),                       # a run
    ([512, 278, 2], [450, 32000, 32001, 3161])])                     # special tokens of Video-LLaVA
def test_what_is_odd_but_right_is_kept_as_it_is(tmp_path, capsys, draft, target):
    # with a gap: clips between them failed
    rows = [extraction(0), extraction(7, draft=draft, target=target)]
    pairs = load(
        tmp_path,
        {"results": rows, "errors": [{"sample_idx": 3, "error": "No result"}], "statistics": {}})
    assert pairs.answer("draft", 1) == draft and pairs.answer("target", 1) == target
    assert pairs.files[0]["dropped"] == {} and pairs.files[0]["flagged"] == {}


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is not JSON: it is empty"), (b'{"results": [', "is not JSON"),
    (b"\x1f\x8b\x08\0\0\0", "is not JSON: it looks like gzip; unpack it first"), (b"PK\3\4", "zip archive"),
    (b'"results"', "holds no pairs"), (b"null", "holds no pairs"), (b'{"results": null}', "holds no pairs"),
    (b"\xff\xfe", "is not JSON"),
    (b"[" * 10**5, "is not JSON"),
    (b"7", "holds no pairs"), (b'{"rows": []}', "holds no pairs"), (b'{"results": {}}', "holds no pairs"),
    (b'{"results": [], "errors": [{"sample_idx": 0}]}', "lists 1 errors"), (b"[{}]", "no usable rows"),
    (json.dumps([extraction(0, target=[1, 2])]).encode(), "all dropped"),
])
def test_a_file_without_usable_pairs_is_a_user_error_that_says_why(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, content)


@pytest.mark.parametrize("early", [
    {"eventgpt": {"output_tokens": [1.5]}}, {"egpt_tokens": [1.5]}, {}, "text"])
def test_rows_before_the_first_with_tokens_are_counted_as_their_format_counts_them(tmp_path, early):
    """Only in the benchmark format is the first of them one with odd ids."""
    pairs = load(tmp_path, {"results": [early, early, benchmark(0), benchmark(1)]})
    odd = isinstance(early, dict) and "eventgpt" in early
    reason = "token ids that are not whole numbers" if odd else "no token list"
    assert len(pairs) == 2 and pairs.files[0]["dropped"] == {reason: 2} and pairs.files[0]["rows"] == 4


def test_what_a_file_says_beside_its_rows_counts_wherever_it_stands(tmp_path):
    reasons = {
        "vocab_size": 32064, "dataset_dir": "data/set_1s",
        "models": {"eventgpt": {"name": "x", "prompt": "y"}}
    }
    for content in ({**reasons, "results": [extraction(0)]}, {"results": [extraction(0)], **reasons}):
        pairs = load(tmp_path, content)
        assert pairs.vocab_size == 32064 and pairs.files[0]["dataset_dir"] == "data/set_1s"
        assert pairs.files[0]["models"] == {"eventgpt": {"name": "x"}}


def test_questions_about_one_clip_are_no_duplicates(tmp_path):
    rows = [extraction(0), {**extraction(0), "question_idx": 1}]
    assert len(load(tmp_path, {"results": rows})) == 2


def test_sequence_and_clip_come_from_the_row_or_from_its_event_path(tmp_path):
    pairs = load(tmp_path, [inference(7)])
    assert (pairs.sequence, pairs.clip) == (["interlaken_00_c"], [7])
    pairs = load(tmp_path, [extraction(0, sequence="thun_01_a", clip=3), extraction(1)])
    assert (pairs.sequence, pairs.clip[0]) == (["thun_01_a", ""], 3)


@pytest.mark.parametrize("odd", [
    {"sequence": ["a"]}, {"sequence": "\ud83d"}, {"clip": {"a": [1]}}, {"clip": "9" * 5000}, {"clip": None},
    {"sample_idx": [[]]}, {"egpt_text": {"a": 1}}, {"event_data": 5}])
def test_odd_facts_beside_good_tokens_cost_nothing(tmp_path, odd):
    pairs = load(tmp_path, {"results": [{**extraction(0), **odd}, extraction(1)]})
    assert len(pairs) == 2 and all(isinstance(name, str) for name in pairs.sequence)
    assert all(isinstance(clip, (int, str)) for clip in pairs.clip)


def test_what_a_file_says_beside_its_rows_is_taken_only_in_its_own_kind(tmp_path):
    for odd in (float("nan"), "32064", True, None, [1], {"a": 1}, 2.5):
        pairs = load(
            tmp_path, {
                "vocab_size": odd, "dataset_dir": odd, "models": {"eventgpt": {"vocab_size": odd}},
                "results": [extraction(0)]
            })
        assert pairs.vocab_size is None and pairs.files[0]["models"]["eventgpt"] == {}
        assert type(pairs.files[0].get("dataset_dir", "")) is str
    assert "dataset_dir" not in load(tmp_path,
                                     {"dataset_dir": 5, "results": [extraction(0)]}).files[0]


def test_half_a_character_in_a_name_is_written_and_read_again(tmp_path):
    write_rows(tmp_path / "rows.json", {"a": 1}, [extraction(0, sample_id="\ud83d \u00e9")], [])
    assert json.loads(
        (tmp_path / "rows.json").read_text("utf-8"))["results"][0]["sample_id"] == "\ud83d \u00e9"
    assert len(load_pairs([tmp_path / "rows.json"])) == 1


# ------------------------------------------------------------------------------------------- memory
def test_reading_takes_a_small_multiple_of_the_tokens(tmp_path):
    """Doubling the rows doubles what is held; json.load holds 20 times the tokens."""
    tokens, held = [*range(300, 350)], []
    for count in (1000, 2000):
        rows = [
            extraction(i, [*tokens, i], tokens, sequence=f"town_{i // 100}_a", clip=i)
            for i in range(count)
        ]
        write_rows(tmp_path / "rows.json", {"vocab_size": 9}, rows, [])
        del rows
        tracemalloc.start()
        pairs = load_pairs([tmp_path / "rows.json"])
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(pairs) == count
        assert held[-1] < 3 * (pairs.draft.nbytes + pairs.target.nbytes)
    assert held[1] < 2.2 * held[0]
