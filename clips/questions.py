"""The questions that are asked about every clip: one query, or those of a file."""

from pathlib import Path

from base import UserError
from machine.files import check_plain, read_json


def read_questions(query: str, questions_file: Path | None, num_questions: int) -> list[str]:
    """The questions to ask about every clip, in rank order: the query, or those of a file (-1: all of them)."""
    if questions_file is None:
        if num_questions > 1:
            raise UserError(f"--num_questions {num_questions} needs --questions_file")
        return [check_text("--query", query)]
    check_plain(questions_file)
    if questions_file.suffix == ".json":
        entries = read_json(questions_file)
    else:                             # plain lines, each with or without "count<TAB>" in front
        try:
            entries = [line.split("\t")[-1].strip() for line in questions_file.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"can't read {questions_file}: {error}") from error
        entries = [line for line in entries if line]
    entries = entries if isinstance(entries, list) else []
    questions = [entry.get("question") if isinstance(entry, dict) else entry for entry in entries]
    if not questions or not all(isinstance(question, str) and question.strip() for question in questions):
        raise UserError(f"{questions_file}: wanted a list of questions (strings, or objects with 'question')")
    questions = questions[:num_questions if num_questions > 0 else None]
    return [check_text(questions_file, question) for question in questions]


def check_text(where: object, question: str) -> str:
    """The question; a UserError if no tokenizer can read it (halves of characters, bytes that are no UTF-8)."""
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {question!a} is no text in UTF-8; wanted a question") from error
    return question
