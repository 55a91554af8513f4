"""The questions that are asked about every clip: one query, or those of a file.

    questions.txt      one a line, each with or without "count<TAB>" in front
    questions.json     a list of texts, or of objects with question, text, prompt or turns (the first of them)
    questions.jsonl    such an object or text a line, as public question sets have it
    questions.csv      a table (also .tsv) with a column of one of these names
"""

import csv
import io
import json
from pathlib import Path

from base import UserError
from clips.limits import check_input
from machine.files import read_json, read_within

MAX_QUESTIONS_BYTES = 2**26
KEYS = ("question", "text", "prompt", "turns")
JSON_STARTS = ("{", "[{", '["')            # a question may begin with a bracket
FORMS = ("wanted lines of text, a JSON list, JSON Lines whose objects have one of question, text, "
         "prompt or turns, or a CSV table with a column of one of these names")


def read_questions(query: str, questions_file: Path | None, num_questions: int) -> list[str]:
    """The questions to ask about every clip, in rank order: the query, or a file's (-1: all of them)."""
    if questions_file is None:
        if num_questions > 1:
            raise UserError(f"--num_questions {num_questions} needs --questions_file")
        return [check_text("--query", query)]
    check_input(questions_file, MAX_QUESTIONS_BYTES)
    suffix = questions_file.suffix.lower()
    if suffix == ".json" and not is_json_lines(questions_file):
        entries = read_json(questions_file)
        if not isinstance(entries, list):
            raise UserError(f"{questions_file}: found {type(entries).__name__}; {FORMS}")
    elif suffix in (".csv", ".tsv"):
        entries = read_table(questions_file)
    elif suffix in (".txt", ".jsonl", ".ndjson", ".json", ""):
        entries = read_lines(questions_file)
    else:
        raise UserError(f"{questions_file}: files of questions end in .txt, .json, .jsonl, .csv or .tsv")
    questions = [question_of(questions_file, number, entry)
                 for number, entry in enumerate(entries, start=1)]
    if not questions:
        raise UserError(f"{questions_file} holds no question; {FORMS}")
    questions = questions[:num_questions if num_questions > 0 else None]
    return [check_text(questions_file, question) for question in questions]


def read_text(path: Path) -> str:
    """The file's text without a byte-order mark."""
    try:
        return io.TextIOWrapper(io.BytesIO(read_within(path, MAX_QUESTIONS_BYTES)), "utf-8-sig").read()
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path}: {error}") from error


def is_json_lines(path: Path) -> bool:
    """Whether a file called .json holds one object a line."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    return len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines)


def read_lines(path: Path) -> list:
    """The lines of a text file: texts, or the values of JSON Lines."""
    text = read_text(path)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() in (".jsonl", ".ndjson") or "".join(text[:200].split()).startswith(JSON_STARTS):
        try:
            values = [json.loads(line) for line in lines]
            return values[0] if len(values) == 1 and isinstance(values[0], list) else values
        except (ValueError, RecursionError) as error:
            try:
                return as_list(json.loads(text))             # one JSON value over several lines
            except (ValueError, RecursionError):
                raise UserError(f"{path} looks like JSON Lines and is none: {error}; {FORMS}") from error
    if lines and looks_like_table(text):
        raise UserError(f"{path} looks like a table ({lines[0][:60]!r}): name it .csv or .tsv; {FORMS}")
    return [line.split("\t")[-1].strip() for line in lines]


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def looks_like_table(text: str) -> bool:
    """Whether a text begins with the names of columns, one of which holds questions."""
    head = text.lstrip().splitlines()[0]
    return any(column.strip().strip('"').lower() in KEYS
               for column in head.replace("\t", ",").split(","))


def read_table(path: Path) -> list[str]:
    """The column of questions of a CSV or TSV file."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        lines = io.StringIO(read_text(path))
        rows = list(filter(None, csv.reader(lines, delimiter=separator, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path} is no CSV table: {error}; {FORMS}") from error
    columns = [name.strip().lower() for name in rows[0]] if rows else []
    key = next((key for key in KEYS[:3] if key in columns), None)
    if key is None:
        names = ", ".join(columns)[:200] or "of an empty file"
        raise UserError(f"{path}: found the columns {names}; {FORMS}")
    place = columns.index(key)
    return [row[place] if place < len(row) else "" for row in rows[1:]]


def question_of(path: Path, number: int, entry) -> str:
    """The question of one entry: a text, or what an object has under one of KEYS."""
    if isinstance(entry, dict):
        key = next((key for key in KEYS if key in entry), None)
        if key is None:
            names = ", ".join(map(str, entry))[:200]
            raise UserError(f"{path}, entry {number} has only {names or 'nothing'}; {FORMS}")
        entry = entry[key]
        if key == "turns":
            entry = entry[0] if isinstance(entry, list) and entry else None
    if not isinstance(entry, str) or not entry.strip():
        raise UserError(f"{path}, entry {number}: wanted a question, found {str(entry)[:60]!r}; {FORMS}")
    return entry


def check_text(where: object, question: str) -> str:
    """The question; a UserError if it is no UTF-8 (a part of a character), which no tokenizer reads."""
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {question!a} is no text in UTF-8; wanted a question") from error
    return question
