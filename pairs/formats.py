"""Pair files: rows of three formats, told apart by their content, become Pairs.

    extraction    egpt_tokens, vl_tokens: what extract_tokens_train.py writes
    benchmark     eventgpt.output_tokens, videollava.output_tokens
    inference     egpt_token_ids, videollava_token_ids (or llava_token_ids)

A million pairs fit in memory: rows come one by one (pairs/rows.py), their tokens go into flat arrays.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from base import UserError, log
from pairs.pairs import Pairs, digest
from pairs.rows import JsonRows
from pairs.tokenizers import COPY, UNKNOWN, Tokenizers

DRAFT_MODEL, TARGET_MODEL = "eventgpt", "videollava"          # their names in files
FORMATS = ("extraction", "benchmark", "inference")
# Facts that a file may state of all its rows, and of each model.
RECORDED = {"vocab_size": int, "dataset_dir": str, "dataset_name": str, "same_tokenizer": bool}
MODEL_FACTS = {"name": str, "revision": str, "vocab_size": int, "bos_id": int, "tokenizer": str}
MAX_ANSWER = 2**15             # tokens; the models' contexts have 4096 positions
ONLY_INT = {int}               # no bool
KEY_KINDS = (int, float, str, type(None))      # of sample_idx and question_idx
MAX_DIGITS = 18                # of a clip number; a longer one is taken as a name
LLAMA_BOS = 1                  # of LLaMA's tokenizer; in Qwen's vocabulary 1 is a quotation mark
MAYBE_BOS = (f"starts with id {LLAMA_BOS}; if that is the tokenizer's BOS, drop such rows with "
             f"--bos_id {LLAMA_BOS}")
LOOP, NO_DRAFT, SHORT_TARGET = "one id repeated", "empty draft", "target under 4 tokens"
FLAGS = (LOOP, NO_DRAFT, SHORT_TARGET, MAYBE_BOS)


class Row(NamedTuple):
    """A usable row of a pair file."""

    draft: list[int]
    target: list[int]
    sequence: str
    clip: int | str
    copy: list[int]        # the draft in the target's tokens; [] where both have one tokenizer
    question: int          # its number; -1 where the row tells none


# ------------------------------------------------------------------------------------------ one row
def _question_of(row: dict) -> int:
    number = row.get("question_idx")
    return number if type(number) is int and 0 <= number < 2**31 else -1


def _answers(row: dict, form: str) -> tuple:
    """(draft tokens, draft text, target tokens, target text) of a row, None where it lacks them."""
    if form == "extraction":
        return row.get("egpt_tokens"), row.get("egpt_text"), row.get("vl_tokens"), row.get("vl_text")
    if form == "benchmark":
        answers = []
        for model in ("eventgpt", "videollava"):
            answer = row.get(model)
            answer = answer if isinstance(answer, dict) else {}
            answers += [answer.get("output_tokens"), answer.get("output_text")]
        return tuple(answers)
    target, text = row.get("videollava_token_ids"), row.get("videollava")
    if target is None:                                  # older files, whose target was LLaVA-1.5
        target, text = row.get("llava_token_ids"), row.get("llava-1.5-7b-hf")
    return row.get("egpt_token_ids"), row.get("egpt"), target, text


def _format_of(row: dict) -> str | None:
    """The format of a row that has tokens, told by its keys; None for a row without tokens."""
    for form in FORMATS:
        draft, _, target, _ = _answers(row, form)
        if draft is not None and target is not None:
            return form
    return None


def _why_unusable(tokens, text, bos_id: int | None) -> str | None:
    """The reason why one answer can't be used, or None."""
    if not isinstance(tokens, list):
        return "no token list"
    size = len(tokens)
    if size > MAX_ANSWER:
        return f"absurdly long (over {MAX_ANSWER} tokens)"
    if not ONLY_INT.issuperset(map(type, tokens)):
        return "token ids that are not whole numbers"
    if tokens and (min(tokens) < 0 or max(tokens) >= 2**31):
        return "negative or absurd token ids"
    if bos_id is not None and size > 1 and tokens[0] == bos_id:
        return "prompt included (starts with BOS)"
    # No token of the usual vocabularies spans white space: n words are n tokens at least.
    if isinstance(text, str) and len(text.split()) > size:
        return "fewer tokens than words in the text"
    return None


def _may_have_bos(tokens: list[int], bos_id: int | None) -> bool:
    """Whether the answer starts with LLaMA's BOS, and the model's own is not known."""
    return bos_id is None and len(tokens) > 1 and tokens[0] == LLAMA_BOS


def _is_degenerate(tokens: list[int]) -> bool:
    """One id makes up over half of an answer of 8 tokens or more: the model was in a loop."""
    size = len(tokens)
    if size < 8 or 2 * len(set(tokens)) > size + 2:        # quicker than counting
        return False
    return max(collections.Counter(tokens).values()) > size / 2


def _place_of(row: dict) -> tuple[str, int | str]:
    """(sequence, clip) of a row, by its keys or its event path: interlaken_00_c/000000.npy."""
    path = row.get("event_data")
    path = path if isinstance(path, str) else ""
    sequence = row.get("sequence")
    if not isinstance(sequence, str):
        sequence = str(Path(path).parent) if "/" in path else ""
    clip = row.get("clip")
    if type(clip) is int and 0 <= clip < 10**MAX_DIGITS:
        return sys.intern(sequence), clip
    clip = str(clip) if isinstance(clip, (int, str)) else Path(path).stem
    is_number = clip.isascii() and clip.isdigit() and len(clip) <= MAX_DIGITS
    return sys.intern(sequence), int(clip) if is_number else clip


def _row_key(row: dict) -> int | None:
    """Equal for two rows about the same clip and question; None where a row doesn't tell."""
    if "sample_idx" in row:
        key: tuple = (row["sample_idx"], row.get("question_idx"))
        usable = isinstance(key[0], KEY_KINDS) and isinstance(key[1], KEY_KINDS)
    else:
        key = (row.get("id"),)
        usable = isinstance(key[0], str)
    return digest(repr(key).encode(errors="surrogatepass")) if usable else None


# ----------------------------------------------------------------------------------------- one file
class _File:
    """Iterates over the usable rows of a pair file; counts the others by reason, in `report`."""

    def __init__(self, path: Path, bos_id: int | None):
        """bos_id: as for load_pairs."""
        self.path, self.bos_id, self.rows = path, bos_id, JsonRows(path)
        # of the draft and the target model
        self.bos_ids: tuple[int | None, int | None] = (bos_id, bos_id)
        self.has_copies = False      # draft and target have tokenizers of their own
        self.identity = 0            # a checksum of what identifies each usable row: clip, question
        self.report: dict[str, Any] = {
            "path": str(path), "format": None, "rows": 0, "used": 0, "largest_id": -1,
            "dropped": collections.Counter(), "flagged": dict.fromkeys(FLAGS, 0)}

    def __iter__(self) -> Iterator[Row]:
        report, seen = self.report, set()
        # The format is that of the first row with tokens: until it is known, reasons are counted
        # for each format.
        early = {form: collections.Counter() for form in FORMATS}
        for row in self.rows:
            report["rows"] += 1
            row = row if isinstance(row, dict) else {}
            if report["rows"] == 1:
                self.has_copies = self.rows.beside.get("same_tokenizer") is False
            if report["rows"] == 1 and self.bos_id is None:
                models = _model_facts(self.rows.beside)
                self.bos_ids = (models.get(DRAFT_MODEL, {}).get("bos_id"),
                                models.get(TARGET_MODEL, {}).get("bos_id"))
            if report["format"] is None:
                report["format"] = _format_of(row)
                if report["format"] is None:
                    for form in FORMATS:
                        early[form][self._why_dropped(_answers(row, form))] += 1
                    continue
                report["dropped"].update(early[report["format"]])
            answers = _answers(row, report["format"])
            copy = row.get(COPY) if self.has_copies else []
            reason = self._why_dropped(answers) or _why_unusable(copy, None, None)
            key = None if reason else _row_key(row)
            if key is not None and key in seen:
                reason = "duplicate row"
            if reason:
                report["dropped"][reason] += 1
                continue
            seen.add(key)
            self._flag(draft=answers[0], target=answers[2])
            identity = repr((key, row.get("query"))).encode(errors="surrogatepass")
            self.identity = zlib.crc32(identity, self.identity)
            assert isinstance(copy, list)                    # else there was a reason to drop it
            yield Row(answers[0], answers[2], *_place_of(row), copy, _question_of(row))
        self._check_rows()
        self._record()

    def _why_dropped(self, answers: tuple) -> str | None:
        draft, draft_text, target, target_text = answers
        reason = _why_unusable(draft, draft_text, self.bos_ids[0])
        reason = reason or _why_unusable(target, target_text, self.bos_ids[1])
        return reason or (None if target else "empty target")

    def _flag(self, draft: list[int], target: list[int]) -> None:
        """Count what is suspicious about a row that is used."""
        flagged = self.report["flagged"]
        if _is_degenerate(draft) or _is_degenerate(target):
            flagged[LOOP] += 1
        if not draft:
            flagged[NO_DRAFT] += 1
        if len(target) < 4:
            flagged[SHORT_TARGET] += 1
        if _may_have_bos(draft, self.bos_ids[0]) or _may_have_bos(target, self.bos_ids[1]):
            flagged[MAYBE_BOS] += 1

    def _check_rows(self) -> None:
        """A UserError for a file without any row of a known format."""
        path, report, beside = self.path, self.report, self.rows.beside
        if not self.rows.has_rows:
            raise UserError(f"{path} holds no pairs: wanted a list of rows, an object with a list "
                            "'results', or JSON Lines")
        if not report["rows"]:
            errors, first = beside.get("errors"), ""
            if isinstance(errors, list) and errors:
                first = f"; it lists {len(errors)} errors, the first: {json.dumps(errors[0])[:200]}"
            raise UserError(f"{path} has no usable rows: its list of results is empty{first}")
        if report["format"] is None:
            raise UserError(
                f"{path} has no usable rows: none of its {report['rows']} rows has tokens under the keys of "
                "the formats extraction (egpt_tokens, vl_tokens), benchmark (eventgpt.output_tokens, "
                "videollava.output_tokens) or inference (egpt_token_ids, videollava_token_ids)")

    def _record(self) -> None:
        """Add the facts that the file states of all its rows to the report."""
        beside = self.rows.beside
        self.report["identity"] = self.identity
        self.report.update(_of_kinds(RECORDED, beside))
        self.report["models"] = models = _model_facts(beside)
        if models and DRAFT_MODEL not in models:       # extracted with --draft_model none
            self.report["flagged"][NO_DRAFT] = 0


def _model_facts(beside: dict) -> dict[str, dict]:
    """{"eventgpt": {"name": ..., ...}, ...}, as far as the file records them in the right types."""
    models = beside.get("models")
    if not isinstance(models, dict):
        return {}
    return {which: _of_kinds(MODEL_FACTS, facts)
            for which, facts in models.items() if isinstance(facts, dict)}


def _of_kinds(kinds: dict[str, type], facts: dict) -> dict:
    """The facts under these keys that are of the right type."""
    return {key: facts[key] for key, kind in kinds.items() if type(facts.get(key)) is kind}


# ---------------------------------------------------------------------------------------- all files
class _Answers:
    """The answers of one model, one after the other in arrays that grow in place."""

    def __init__(self):
        self.flat, self.length = array.array("i"), array.array("i")

    def append(self, tokens: list[int]) -> None:
        self.flat.fromlist(tokens)
        self.length.append(len(tokens))

    def largest(self, first: int) -> int:
        """The largest token from position `first` on, -1 if there is none."""
        # A stored view would forbid growing
        return int(np.asarray(self.flat)[first:].max(initial=-1))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(flat, start, length) as numpy views: nothing can be appended afterwards."""
        length = np.asarray(self.length)
        return np.asarray(self.flat), np.cumsum(length, dtype=np.int64) - length, length


def load_pairs(paths: list[Path], bos_id: int | None = None) -> Pairs:
    """Read pair files of any of the three formats into one set of pairs.

    Unusable rows are dropped, suspicious ones kept; `files` counts both by reason. bos_id: drop
    rows with an answer that starts with this id, since it includes the prompt; None: the ids that
    the file records for its models. Where it records none, rows that start with LLaMA's BOS are
    kept and flagged. Raises UserError for a file without any usable row.
    """
    draft, target, copy = _Answers(), _Answers(), _Answers()
    sequence, clip, files, tokenizers = [], [], [], UNKNOWN
    question = array.array("i")
    for path in paths:
        file, first = _File(path, bos_id), (len(draft.flat), len(target.flat), len(copy.flat))
        for row in file:
            draft.append(row.draft)
            target.append(row.target)
            copy.append(row.copy)
            sequence.append(row.sequence)
            clip.append(row.clip)
            question.append(row.question)
            file.report["used"] += 1
        report = _finished(file.report)
        own = tokenizers_of(report)
        if files:
            tokenizers.check(own, files[-1]["path"], str(path))
        tokenizers = tokenizers.joined(own)
        largest = [answers.largest(start) for answers, start in zip((draft, target, copy), first)]
        report["largest_draft_id"] = largest[0]
        report["largest_id"] = max(largest[file.has_copies:])
        files.append(report)
    sizes = [report["vocab_size"] for report in files if "vocab_size" in report]
    copies = copy.arrays() if tokenizers.are_same is False else ()
    pairs = Pairs(*draft.arrays(), *target.arrays(), sequence, clip, files, max(sizes, default=None),
                  tokenizers, *copies)
    return dataclasses.replace(pairs, question=np.asarray(question, np.int32))


def tokenizers_of(report: dict) -> Tokenizers:
    """What a file's report tells of the tokenizers of its pairs."""
    draft, target = (report["models"].get(name, {}).get("tokenizer", "")
                     for name in (DRAFT_MODEL, TARGET_MODEL))
    return Tokenizers(draft, target, report.get("same_tokenizer"))


def _finished(report: dict) -> dict:
    """Log a file's report -> the same with plain dicts; a UserError if no row could be used."""
    path, used = report["path"], report["used"]
    reasons = ", ".join(f"{count} x {reason}" for reason, count in report["dropped"].items())
    if not used:
        raise UserError(f"{path} has no usable rows: {report['rows']} rows, all dropped ({reasons})")
    log(f"data | {path} | {report['format']} | {used} of {report['rows']} rows used"
        + (f" | dropped {reasons}" if reasons else ""))
    flagged = {flag: count for flag, count in report["flagged"].items() if count}
    for flag, count in flagged.items():
        log(f"data | WARNING | {path} | {count} of {used} rows: {flag}")
    return {**report, "dropped": dict(report["dropped"]), "flagged": flagged}
