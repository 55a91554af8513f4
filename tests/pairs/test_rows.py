"""Files of rows are read as json.load reads them, one row at a time where a row is a line."""

import json
import threading
import tracemalloc
from pathlib import Path

import pytest

import pairs.rows as rows_module
from base import UserError
from pairs.rows import FORMAT, MAX_WHOLE, JsonRows, write_rows
from tests.pairs.test_formats import extraction

ROW = {
    "a": [1, 22, 333, -4, 0.5, 1e300, -2.5e-7, 1e22, None, True,
          False], "b": {"c": [[], {}, [[]]], "d": ""},
    "text": 'quote " back \\ slash / tab \t line \n \u00e9 \u6f22\u5b57 \U0001f697 \ud83d \x7f',
    "e": [{"results": [1]}]
}
ODD = ('[NaN, Infinity, -Infinity, 0, -0, 12345678901234567890, 1E5, '
       '"\\u00e9\\ud83d\\ude97\\ud83d", "]", "},{"]')
TEXTS = {
    "list": json.dumps([ROW, 7, "x", None, ROW]), "numbers": "[12, 3.5e1,4 ,  5.0\n,1e-3, 123]", "odd": ODD,
    "keys before": json.dumps({"vocab_size": 32064, "models": {"x": ROW}, "results": [ROW, 1]}),
    "keys after": json.dumps({"results": [ROW, 2.5], "vocab_size": 32064, "errors": [ROW]}, indent=2),
    "indent 1": json.dumps({"a": 1, "results": [ROW, {}], "vocab_size": 32064}, indent=1),
    "a row a line, then rows over several":
        '{\n "results": [\n{"a": 1},\n{"b":\n2}, {"c": 3}\n ],\n "x": 5\n}\n',
    "a row a line, keys behind": '{\n "results": [\n{"a": 1}\n ],\n "x": {"y": [1,\n2]}\n}\n',
    "keys on both sides": json.dumps({"a": 1, "results": [[], {}], "b": {"results": [3]}, "c": "results"}),
    "one value": "12345", "nothing beside": '{"results":[]}', "empty": "{}", "empty list": " [ ] ",
    "no list": '{"results": {"a": 1}, "b": 2.5}', "a string": '  "a list of rows"  '}


def both_ways(path: Path) -> tuple:
    """((rows, beside), the same by json.load), or ((error,), (error,))."""
    rows = JsonRows(path)
    try:
        streamed = list(rows), rows.beside
    except UserError as error:
        streamed = (str(error),)
    try:
        value = json.loads(path.read_bytes().decode())
        beside = {key: part for key, part in value.items()
                  if key != "results"} if isinstance(value, dict) else {}
        results = value.get("results") if isinstance(value, dict) else value
        return streamed, (results if isinstance(results, list) else [], beside)
    except (ValueError, RecursionError) as error:
        return streamed, (f"{path} is not JSON: {error if path.stat().st_size else 'it is empty'}",)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_rows_are_those_of_json_load_in_any_layout(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    streamed, whole = both_ways(path)
    assert len(whole) == 2 and repr(streamed) == repr(whole)               # repr: NaN is not itself


def our_file(path: Path, count: int = 3) -> list[dict]:
    rows = [extraction(i, sequence="thun_01_a", clip=i) for i in range(count)]
    write_rows(path, {"vocab_size": 9, "questions": ["a", "b"]}, iter(rows),
               [{"sample_idx": 9, "reason": "\u00e9"}])
    return rows


def test_what_was_written_as_a_stream_is_read_as_one(tmp_path, monkeypatch):
    path, failed = tmp_path / "rows.json", [{"sample_idx": 9, "reason": "\u00e9"}]
    rows, head = our_file(path), {"format": FORMAT, "vocab_size": 9, "questions": ["a", "b"]}
    monkeypatch.setattr(rows_module, "MAX_WHOLE", 0)                # it needs no reading as a whole
    reader = JsonRows(path)
    iterator = iter(reader)
    assert next(iterator) == rows[0] and reader.beside == head          # known before the first row
    assert list(iterator) == rows[1:] and reader.beside == {**head, "failed": failed} and reader.has_rows
    assert json.loads(path.read_text()) == {**head, "results": rows, "failed": failed}
    write_rows(path, {}, iter([]), [])
    reader = JsonRows(path)
    assert list(reader) == [] and reader.beside == {"format": FORMAT, "failed": []} and reader.has_rows


def test_a_file_that_lacks_a_letter_gets_the_error_of_json_load(tmp_path):
    path = tmp_path / "rows.json"
    our_file(path, 2)
    text = path.read_text()
    other = '{"n": -1.5,\n "results": [{"a": [1, "\u00e9\\u00e9"]},\n true, 2], "x": null}'
    broken = [text[:i] + text[i + 1:]
              for i in range(len(text))] + [text[:i] for i in range(len(text))]
    broken += [other[:i] + other[i + 1:] for i in range(len(other))]
    for content in [
            *broken, text + "]", text + " 7", "7 8", "[1 2]", '{"a" 1}', "{1: 2}", "[1}",
            '["a\nb"]', "[1,]"
    ]:
        path.write_bytes(content.encode())
        streamed, whole = both_ways(path)
        assert streamed == whole, content


@pytest.mark.parametrize(("content", "words"), [
    (b'["\xc3\xa9", "ab\xff"]', "decode byte 0xff in position 10: invalid start byte"),
    (b"[" + b"1" * 5000 + b"]", "Exceeds the limit"),
    (b'{"results": [1], "results": [2]}', "'results' occurs twice"),
    (b'{\n "results": [1],\n "results": [\n{}\n ],\n "failed": []\n}\n', "'results' occurs twice"),
    (b'{\n "results": [\n{}\n ],\n "results": [5]\n}\n', "'results' occurs twice"),
    (b"[" * 10**5, "is not JSON: maximum recursion depth"),
    (b"[1] []", r"Extra data: line 1 column 5 \(char 4\)"),
    (b'{"a": 1}\n{"b": 2\n', "as JSON Lines it has an error in line 2"),
    (b'{\n "format": 2,\n "results": [\n{}\n ],\n "failed": []\n}\n',
     "has format 2, this version reads formats up to 1"),
    (b'{"results": [{}], "format": 99}', "has format 99, this version reads formats up to 1")])
def test_what_cannot_be_read_is_one_clear_error(tmp_path, content, words):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(JsonRows(path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_byte_order_mark_and_other_unicode_encodings_are_read(tmp_path, encoding):
    path = tmp_path / "rows.json"
    rows = our_file(path)
    path.write_bytes(path.read_text().encode(encoding))
    assert list(JsonRows(path)) == rows


@pytest.mark.parametrize("number", [None, 0, 1, "benchmark", 1.5])
def test_an_older_file_and_a_foreign_format_key_are_read(tmp_path, number):
    for text in (json.dumps({
            "format": number, "results": [{"a": 1}]
    }), f'{{\n "format": {json.dumps(number)},\n "results": [\n{{"a": 1}}\n ],\n "failed": []\n}}\n'
                 ):
        (tmp_path / "rows.json").write_text(text)
        assert list(JsonRows(tmp_path / "rows.json")) == [{"a": 1}]


# --------------------------------------------------------------------------------------- JSON Lines
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_json_lines_are_read_row_by_row(tmp_path, monkeypatch, start, end):
    path, rows = tmp_path / "rows.json", [extraction(i) for i in range(4)]
    path.write_bytes(start + ("\n".join(map(json.dumps, rows)) + end).encode())
    monkeypatch.setattr(rows_module, "MAX_WHOLE", 0)
    reader = JsonRows(path)
    assert list(reader) == rows and reader.has_rows and reader.beside == {}


def test_a_single_json_line_is_told_by_its_suffix(tmp_path):
    for name, expected in (("rows.jsonl", [{"a": 1}]), ("rows.json", [])):
        (tmp_path / name).write_text('{"a": 1}\n')
        reader = JsonRows(tmp_path / name)
        assert list(reader) == expected and reader.has_rows == bool(expected)


# ------------------------------------------------------------------------------------------- bounds
def test_a_file_that_is_not_a_row_a_line_has_a_bounded_size(tmp_path):
    path = tmp_path / "sparse.json"
    for start in (b"", b"[", b'{\n "results": [\n', b'{"a": 1}\n{"b": 2}\n'):
        path.write_bytes(start)
        with open(path, "r+b") as file:
            file.truncate(20 * 2**30)
        tracemalloc.start()
        with pytest.raises(UserError, match=r"20480 MiB and can't be read row by row|is not JSON"):
            list(JsonRows(path))
        assert tracemalloc.get_traced_memory()[1] < 2**28
        tracemalloc.stop()
    assert MAX_WHOLE <= 2**27


def test_a_row_has_a_bounded_length(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    our_file(path)
    monkeypatch.setattr(rows_module, "MAX_LINE", 50)
    assert len(list(JsonRows(path))) == 3                                    # read as a whole
    monkeypatch.setattr(rows_module, "MAX_WHOLE", 50)
    with pytest.raises(UserError, match=r"line \d has more than 0 MiB"):
        list(JsonRows(path))


def test_a_file_that_grows_while_it_is_read_is_read_to_its_size_at_the_start(tmp_path):
    path, stop = tmp_path / "rows.jsonl", threading.Event()
    path.write_text('{"a": 1}\n' * 1000)

    def grow() -> None:
        while not stop.is_set():
            with open(path, "a") as file:
                file.write('{"a": 2}\n' * 1000)

    reader = iter(JsonRows(path))
    next(reader)
    writer = threading.Thread(target=grow)
    writer.start()
    try:
        assert sum(row["a"] for row in reader) == 999
    finally:
        stop.set()
        writer.join()


def test_a_file_that_is_not_there_or_is_a_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(JsonRows(tmp_path / "none.json"))
    with pytest.raises(UserError, match="is a folder, wanted a file"):
        list(JsonRows(tmp_path))
