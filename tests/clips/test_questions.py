"""Files of questions: every known form is read alike, anything else is refused with the known forms."""

import json

import pytest

from base import UserError
from clips import questions
from clips.questions import read_questions

QUESTIONS = ["What is this, and why?", "Where is \u201cit\u201d?"]


def json_lines(key: str) -> str:
    return "".join(
        json.dumps({"question_id": 1, key: [text, "And then?"] if key == "turns" else text}) + "\n"
        for text in QUESTIONS)


FORMS = {
    "lines.txt": "\n".join(QUESTIONS),
    "counts.txt": "".join(f"{k}\t{text}\n" for k, text in enumerate(QUESTIONS)),
    "list.json": json.dumps(QUESTIONS),
    "objects.json": json.dumps([{"question": text} for text in QUESTIONS], indent=1),
    **{f"{key}.jsonl": json_lines(key) for key in ("question", "text", "prompt", "turns")},
    "lines.json": json_lines("text"), "lines_as.txt": json_lines("question"),
    "array_as.txt": json.dumps(QUESTIONS),
    "indented_as.txt": json.dumps([{"text": text} for text in QUESTIONS], indent=2),
    "table.csv": f'id,question,count\n1,"{QUESTIONS[0]}",3\n2,{QUESTIONS[1]},1\n',
    "table.tsv": f"Text\tid\n{QUESTIONS[0]}\t1\n{QUESTIONS[1]}\t2\n"}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", FORMS)
def test_every_known_form_gives_the_questions(tmp_path, name, mark):
    (tmp_path / name).write_text(mark + FORMS[name], "utf-8")
    assert read_questions("x", tmp_path / name, -1) == QUESTIONS
    assert read_questions("x", tmp_path / name, 1) == QUESTIONS[:1]


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", json_lines("question") + "{half"), ("a.txt", '{"question": "Why?"}\nno JSON\n'),
    ("a.jsonl", '{"answer": "Because."}\n'), ("a.json", '{"questions": ["Why?"]}'),
    ("a.json", '[{"turns": []}]'),
    ("a.json", "[1]"), ("a.json", '[" "]'), ("a.csv", "id,answer\n1,Because.\n"),
    ("a.csv", 'question\n"open'),
    ("a.csv", "question,id\n,1\n"), ("a.txt", "id,question\n1,Why?\n"),
    ("a.txt", "question\nWhy?\n"),
    ("a.txt", ""), ("a.json", "[]"), ("a.csv", ""), ("a.yaml", "- Why?\n"), ("a.parquet", "PAR1")])
def test_anything_else_is_refused_with_the_known_forms(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"(JSON Lines whose objects have|end in \.txt)"):
        read_questions("x", tmp_path / name, -1)


def test_a_question_may_begin_with_a_bracket(tmp_path):
    (tmp_path / "a.txt").write_text("[In German] Was ist das?\n")
    assert read_questions("x", tmp_path / "a.txt", -1) == ["[In German] Was ist das?"]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.csv"])
def test_a_file_without_an_end_is_not_read(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(UserError,
                       match=f"has {20 * 2**30} bytes, wanted {questions.MAX_QUESTIONS_BYTES} at most"):
        read_questions("x", tmp_path / name, -1)


def test_bytes_of_another_encoding_are_one_clear_error(tmp_path):
    (tmp_path / "a.txt").write_bytes("Was hei\u00dft das?".encode("latin-1"))
    with pytest.raises(UserError, match="can't read"):
        read_questions("x", tmp_path / "a.txt", -1)
