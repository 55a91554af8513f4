"""Pair files are read as a stream just as json.load reads them; formats and their odd rows; pairs share memory."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import pairs.formats as pair_files
from base import UserError
from pairs.formats import JsonRows, Pairs, load_pairs, write_rows

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


# ------------------------------------------------------------------------------------------- JSON as a stream
ROW = {"a": [1, 22, 333, -4, 0.5, 1e300, -2.5e-7, 1e22, None, True, False], "b": {"c": [[], {}, [[]]], "d": ""},
       "text": 'quote " back \\ slash / tab \t line \n é ü 漢字 🚗 \ud83d \x7f', "e": [{"results": [1]}]}
ODD = '[NaN, Infinity, -Infinity, 0, -0, 12345678901234567890, 1E5, 1e+5, "\\u00e9\\ud83d\\ude97\\ud83d", "]", "},{"]'
TEXTS = {
    "list": json.dumps([ROW, 7, "x", None, ROW]),
    "list, plain letters": json.dumps([ROW] * 3, ensure_ascii=False).encode("utf-8", "replace").decode(),
    "numbers": "[12, 3.5e1,4 ,  5.0\n,1e-3, 123]", "odd": ODD, "odd, white space": ODD.replace(", ", "\r\n\t , "),
    "keys before": json.dumps({"vocab_size": 32064, "models": {"x": ROW}, "results": [ROW, 1]}),
    "keys after": json.dumps({"results": [ROW, 2.5], "vocab_size": 32064, "errors": [ROW]}, indent=2),
    "keys on both sides": json.dumps({"a": 1, "results": [[], {}], "b": {"results": [3]}, "c": "results"}),
    "one value": "12345", "nothing beside": '{"results":[]}', "empty": "{}", "empty list": " [ ] ",
    "no list": '{"results": {"a": 1}, "b": 2.5}', "a string": '  "a list of rows"  '}


def both_ways(path: Path, chunk: int) -> tuple:
    """((rows, beside), the same by json.load), or ((error,), (error,))."""
    rows = JsonRows(path, chunk)
    try:
        streamed = list(rows), rows.beside
    except UserError as error:
        streamed = (str(error),)
    try:
        value = json.loads(path.read_bytes().decode())
        beside = {key: part for key, part in value.items() if key != "results"} if isinstance(value, dict) else {}
        found = value.get("results") if isinstance(value, dict) else value
        return streamed, (found if isinstance(found, list) else [], beside)
    except (ValueError, RecursionError) as error:
        return streamed, (f"{path} is not JSON: {error if path.stat().st_size else 'it is empty'}",)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_stream_gives_what_json_load_gives_however_it_is_cut(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode())
    for chunk in (*range(1, 51), 2**20):
        streamed, whole = both_ways(path, chunk)
        assert len(whole) == 2 and repr(streamed) == repr(whole), chunk          # repr: NaN is not itself


def test_one_long_value_is_tried_only_a_few_times(tmp_path, monkeypatch):
    path, tried = tmp_path / "rows.json", []
    path.write_text(json.dumps({"results": [{"text": "word " * 20_000, "tokens": list(range(10_000))}]}))
    rows = JsonRows(path, 100)
    decode = rows.decode
    rows.decode = lambda text, at: tried.append(len(text)) or decode(text, at)
    assert len(list(rows)) == 1
    assert len(tried) < 20 and sum(tried) < 4 * path.stat().st_size


def test_a_text_that_lacks_a_letter_gets_the_error_of_json_load(tmp_path):
    text = '{"n": -1.5,\n "results": [{"a": [1, "é\\u00e9"]},\n true, 2], "x": null}'
    broken = [text[:i] + text[i + 1:] for i in range(len(text))] + [text[:i] for i in range(len(text))]
    path = tmp_path / "rows.json"
    for content in [*broken, text + "]", text + " 7", "7 8", "[1 2]", '{"a" 1}', "{1: 2}", "[1}", '["a\nb"]']:
        path.write_bytes(content.encode())
        for chunk in (1, 5, 2**20):
            streamed, whole = both_ways(path, chunk)
            assert streamed == whole, content
    # Python 3.13 has words of its own for these, one letter further to the left.
    for content in ("[1, 2, ]", '{"a": 1, }', '{"results": [1, ], "a": 2}'):
        path.write_text(content)
        assert all(len(found) == 1 and "is not JSON" in found[0] for found in both_ways(path, 3))


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
@pytest.mark.parametrize(("content", "words"), [
    (b'["\xc3\xa9", "ab\xff"]', "decode byte 0xff in position 10: invalid start byte"),
    (b'["\xc3', "decode byte 0xc3 in position 2: unexpected end of data"),
    (b'\xef\xbb\xbf[1]', r"Unexpected UTF-8 BOM \(decode using utf-8-sig\): line 1 column 1 \(char 0\)"),
    (b"[" + b"1" * 5000 + b"]", r"Exceeds the limit .*: line 1 column 2 \(char 1\)"),
    (b'{"results": [1], "results": [2]}', "'results' stands there twice"),
    (b"[" * 10**5, "is not JSON: maximum recursion depth"), (b"[1] []", r"Extra data: line 1 column 5 \(char 4\)")])
def test_what_cannot_be_read_is_one_clear_error(tmp_path, content, words, chunk):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(JsonRows(path, max(chunk, len(content) // 100)))


def test_a_file_that_is_not_there_or_is_a_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(JsonRows(tmp_path / "none.json"))
    with pytest.raises(UserError, match="is a folder, wanted a file"):
        list(JsonRows(tmp_path))


def test_what_was_written_as_a_stream_is_read_as_one(tmp_path):
    rows, failed = [extraction(i, sequence="thun_01_a", clip=i) for i in range(3)], [{"sample_idx": 9, "reason": "é"}]
    write_rows(tmp_path / "rows.json", {"vocab_size": 9}, iter(rows), failed)
    found = JsonRows(tmp_path / "rows.json")
    assert list(found) == rows and found.beside == {"vocab_size": 9, "failed": failed}
    assert json.loads((tmp_path / "rows.json").read_text()) == {"vocab_size": 9, "results": rows, "failed": failed}
    write_rows(tmp_path / "none.json", {"vocab_size": 9}, iter([]), [])
    assert json.loads((tmp_path / "none.json").read_text()) == {"vocab_size": 9, "results": [], "failed": []}


# ----------------------------------------------------------------------------------------------------- memory
def test_reading_takes_a_small_multiple_of_the_tokens(tmp_path, monkeypatch):
    """Doubling the rows doubles what is held; json.load holds 20 times the tokens."""
    monkeypatch.setattr(pair_files, "CHUNK", 2**14)
    tokens, held = [*range(300, 350)], []
    for count in (1000, 2000):
        rows = [extraction(i, [*tokens, i], tokens, sequence=f"town_{i // 100}_a", clip=i) for i in range(count)]
        write_rows(tmp_path / "rows.json", {"vocab_size": 9}, rows, [])
        del rows
        tracemalloc.start()
        pairs = load_pairs([tmp_path / "rows.json"])
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(pairs) == count
        assert held[-1] < 3 * (pairs.draft.nbytes + pairs.target.nbytes)
    assert held[1] < 2.2 * held[0]


def test_what_is_selected_shares_the_tokens(tmp_path):
    pairs = load(tmp_path, [extraction(i, [5, i + 9], [7] * (i + 1), egpt_text="", vl_text="") for i in range(6)])
    part = pairs.select([4, 1, 1])
    assert all(np.shares_memory(getattr(part, which), getattr(pairs, which)) for which in ("draft", "target"))
    assert part.draft is pairs.draft and list(part.answers("target")) == [[7] * 5, [7] * 2, [7] * 2]
    assert part.answer("draft", 0) == [5, 13] and part.clip == [pairs.clip[4], pairs.clip[1], pairs.clip[1]]
    assert all(np.shares_memory(tokens, pairs.draft) for tokens in part.views("draft"))
    assert part.select([2, 0]).padded("target", 3).tolist() == [[7, 7, 0], [7, 7, 7]]
    assert part.ids("draft").tolist() == [5, 10, 13] and part.ids("target").tolist() == [7]
    assert len(pairs.select([])) == 0 and pairs.select([]).padded("draft", 2).shape == (0, 2)
    assert [len(one) for one in pairs.parts(4)] == [4, 2] and part.largest_ids() == pairs.largest_ids()


# ------------------------------------------------------------------------------------------------- pair files
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
    (extraction(1, target=[1, 450, 1820, 3161]), "prompt included (starts with BOS)"),
    (extraction(1, target=[29889, 2]), "fewer tokens than words in the text"),
    (extraction(1, target=[], vl_text=""), "empty target"),
    (extraction(0), "duplicate row"),
    ("not a row", "no token list"), ([[extraction(1)]], "no token list"), (None, "no token list"),
    (extraction(1, draft=[[5]]), "token ids that are not whole numbers"),
    (extraction(1, draft={"0": 5}), "no token list"),
    (extraction(1, target=[1, *[32000] * 576, 450, 2]), "prompt included (starts with BOS)"),
    (extraction(1, target=[5] * (pair_files.MAX_ANSWER + 1)), "absurdly long (over 32768 tokens)"),
    (extraction(1, target=[29889, 2], vl_text="a full paragraph of words"), "fewer tokens than words in the text"),
])
def test_an_unusable_row_is_dropped_and_counted_by_its_reason(tmp_path, row, reason):
    pairs = load(tmp_path, {"results": [extraction(0), row, extraction(2)]})
    assert len(pairs) == 2
    assert pairs.files[0]["dropped"] == {reason: 1}


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
    ([512, 0, 278, 0, 2], [450, 1820, 3161, 297]),                       # id 0 is a token like any other
    (list(range(300, 350)), [450, 1820, 3161, 2]),                       # the draft was cut, the target was not
    ([512, 278, 2], [450, 2, 1820, 3161, 2]),                            # EOS in the middle
    ([512, 278, 2], [450, *[22] * 3, 1820, 3161]),                       # a run
    ([512, 278, 2], [450, 32000, 32001, 3161])])                         # special tokens of Video-LLaVA
def test_what_is_odd_but_right_is_kept_as_it_is(tmp_path, capsys, draft, target):
    rows = [extraction(0), extraction(7, draft=draft, target=target)]    # with a gap: clips between them failed
    pairs = load(tmp_path, {"results": rows, "errors": [{"sample_idx": 3, "error": "No result"}], "statistics": {}})
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


@pytest.mark.parametrize("early", [{"eventgpt": {"output_tokens": [1.5]}}, {"egpt_tokens": [1.5]}, {}, "text"])
def test_rows_before_the_first_with_tokens_are_counted_as_their_format_counts_them(tmp_path, early):
    """Only in the benchmark format is the first of them one with odd ids."""
    pairs = load(tmp_path, {"results": [early, early, benchmark(0), benchmark(1)]})
    odd = isinstance(early, dict) and "eventgpt" in early
    reason = "token ids that are not whole numbers" if odd else "no token list"
    assert len(pairs) == 2 and pairs.files[0]["dropped"] == {reason: 2} and pairs.files[0]["rows"] == 4


def test_what_a_file_says_beside_its_rows_counts_wherever_it_stands(tmp_path):
    said = {"vocab_size": 32064, "dataset_dir": "data/set_1s", "models": {"eventgpt": {"name": "x", "prompt": "y"}}}
    for content in ({**said, "results": [extraction(0)]}, {"results": [extraction(0)], **said}):
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


def test_several_files_become_one_set_and_select_keeps_rows_whole(tmp_path):
    for name, target in (("a", [4, 5, 6, 7]), ("b", [8, 9, 10, 11, 12])):
        content = {"vocab_size": 32064, "results": [extraction(0, target=target)]}
        (tmp_path / name).write_text(json.dumps(content))
    pairs = load_pairs([tmp_path / "a", tmp_path / "b"])
    assert pairs.vocab_size == 32064 and pairs.lengths("target").tolist() == [4, 5]
    assert [(largest, Path(name).name) for largest, name in pairs.largest_ids()] == [(9088, "a"), (9088, "b")]
    turned = pairs.select(np.array([1, 0]))
    assert turned.padded("target", 6).tolist() == [[8, 9, 10, 11, 12, 0], [4, 5, 6, 7, 0, 0]]
    assert turned.padded("target", 2).tolist() == [[8, 9], [4, 5]]


@pytest.mark.parametrize("odd", [
    {"sequence": ["a"]}, {"sequence": "\ud83d"}, {"clip": {"a": [1]}}, {"clip": "9" * 5000}, {"clip": None},
    {"sample_idx": [[]]}, {"egpt_text": {"a": 1}}, {"event_data": 5}])
def test_odd_facts_beside_good_tokens_cost_nothing(tmp_path, odd):
    pairs = load(tmp_path, {"results": [{**extraction(0), **odd}, extraction(1)]})
    assert len(pairs) == 2 and all(isinstance(name, str) for name in pairs.sequence)
    assert all(isinstance(clip, (int, str)) for clip in pairs.clip)


def test_what_a_file_says_beside_its_rows_is_taken_only_in_its_own_kind(tmp_path):
    for odd in (float("nan"), "32064", True, None, [1], {"a": 1}, 2.5):
        pairs = load(tmp_path, {"vocab_size": odd, "dataset_dir": odd, "models": {"eventgpt": {"vocab_size": odd}},
                                "results": [extraction(0)]})
        assert pairs.vocab_size is None and pairs.files[0]["models"]["eventgpt"] == {}
        assert type(pairs.files[0].get("dataset_dir", "")) is str
    assert "dataset_dir" not in load(tmp_path, {"dataset_dir": 5, "results": [extraction(0)]}).files[0]


def test_half_a_character_in_a_name_is_written_and_read_again(tmp_path):
    write_rows(tmp_path / "rows.json", {"a": 1}, [extraction(0, sample_id="\ud83d \u00e9")], [])
    assert json.loads((tmp_path / "rows.json").read_text("utf-8"))["results"][0]["sample_id"] == "\ud83d \u00e9"
    assert len(load_pairs([tmp_path / "rows.json"])) == 1
