"""The pair file of an extraction: written whole at the end; an earlier one is continued.

A whole output without failed clips is finished. One with failed clips gives its answers to a new
journal, and the clips that failed are tried again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from base import UserError, log, now, provenance
from extraction.content import as_of, fingerprint, key_of
from extraction.ledger import Ledger, Survey
from pairs.journal import differences, is_entry
from pairs.journals import journals_of
from pairs.rows import JsonRows, write_rows
from pairs.tokenizers import COPY
from vlm.roles import BY_NAME, DRAFT, ROLES, TARGET, Role, View

if TYPE_CHECKING:                                # clips.dataset imports numpy
    from clips.dataset import Sample
    from vlm.vocabulary import Translation

REPLACE = "choose another --output_file, or --restart to replace it"
# Of an answer, in a row and in the journal.
FIELDS: tuple[Literal["tokens", "text", "finished"], ...] = ("tokens", "text", "finished")
NO_ANSWER = {"tokens": [], "text": "", "finished": False}      # of a draft model that was not asked


# ------------------------------------------------------------------------------- an earlier output
@dataclasses.dataclass(frozen=True)
class Earlier:
    """A whole output of these clips and questions that is there already."""

    path: Path
    pairs: int
    beside: dict                                 # what the file says beside its rows

    @property
    def failed(self) -> list[dict]:
        return self.beside["failed"]

    @property
    def models(self) -> dict[str, dict]:
        """The facts that were recorded of each model, by its name."""
        models = self.beside.get("models")
        if not isinstance(models, dict):
            return {}
        known = {name: facts for name, facts in models.items() if isinstance(facts, dict)}
        return {name: {**facts, "model": name} for name, facts in known.items()}

    def differs(self, settings: dict, survey: Survey) -> str:
        """In what it was made differently, in words.

        Clips that failed may have been mended since.
        """
        failed = self.failed if is_failed(self.beside.get("failed"), survey) else []
        wanted = {**settings, "total_samples": len(survey.samples)}
        if "dataset_content" in self.beside:         # outputs of earlier versions don't record it
            wanted["dataset_content"] = fingerprint(as_of(failed, survey.samples, survey.content))
        recorded = self.beside["settings"] if isinstance(self.beside.get("settings"), dict) else {}
        return differences({**self.beside, **recorded}, wanted)

    def check_again(self, settings: dict, survey: Survey) -> None:
        """A UserError unless its failed clips can be tried again with these settings, all resolved."""
        if differs := self.differs(settings, survey):
            raise UserError(f"{self.path} has {len(self.failed)} failed clips, which can be tried again "
                            f"with its own settings alone ({differs}): give those, or {REPLACE}")

    def entries(self, survey: Survey) -> Iterator[dict]:
        """The lines of a journal that goes on from here: facts of the models, then all answers."""
        yield from (facts for facts in self.models.values() if is_entry(facts))
        keys = {sample.key for sample in survey.samples}
        for row in JsonRows(self.path):
            yield from (self._entry(row, role, keys) for role in survey.roles)

    def _entry(self, row: dict, role: Role, keys: set[str]) -> dict:
        """The line of a journal with the answer of a role's model in this row."""
        entry: dict = {}
        with contextlib.suppress(LookupError, TypeError):
            entry = {"model": role.name, "key": key_of(row), "question_idx": row["question_idx"],
                     **{field: row[role.key(field)] for field in FIELDS}}
        if not is_entry(entry) or entry["key"] not in keys:
            raise UserError(f"{self.path} was changed: a row is not as it was written; {REPLACE}")
        return entry


def find_earlier(path: Path, settings: dict, survey: Survey) -> Earlier | None:
    """The output that is at this path already, if there is one that no journal stands beside.

    A journal beside an output is of a later run with --restart, which goes on; or the machine
    stopped between the writing of the output and the end of its journal, then going on writes it
    again. A UserError for an output that is not whole, or was made of other clips or with other
    settings.
    """
    if not path.exists() or journals_of(path):
        return None
    rows = JsonRows(path)
    try:
        pairs = sum(1 for _ in rows)             # what stands beside rows is known after them
    except UserError as error:
        raise UserError(f"{error}; nothing goes on from there: {REPLACE}") from error
    earlier, recorded = Earlier(path, pairs, rows.beside), rows.beside.get(f"{TARGET.name}_success")
    if differs := earlier.differs(settings, survey):
        raise UserError(f"{path} exists and was made differently ({differs}); {REPLACE}")
    if pairs != recorded or not is_failed(rows.beside.get("failed"), survey):
        raise UserError(f"{path} was changed: it holds {pairs} pairs and says that it has {recorded}; "
                        + REPLACE)
    return earlier


def is_failed(value: object, survey: Survey) -> bool:
    """Whether this is a list of failed clips, as an output holds it."""
    return isinstance(value, list) and all(is_failure(row, survey) for row in value)


def is_failure(row: object, survey: Survey) -> bool:
    if not isinstance(row, dict) or not row.keys() >= {"sample_id", "sequence", "clip"}:
        return False
    content, number = row.get("content"), row.get("sample_idx")
    return type(number) is int and number in range(len(survey.samples)) and (
        content is None or (isinstance(content, dict) and content.keys() == survey.content.keys()))


def may_succeed_now(earlier: Earlier, survey: Survey) -> bool:
    """Whether it is worth loading the models again: the files of a clip that failed can be read."""
    by_key = {sample.key: sample for sample in survey.samples if not sample.trouble}
    for row in earlier.failed:
        sample, role = by_key.get(key_of(row)), BY_NAME.get(str(row.get("model")), survey.roles[0])
        if sample and is_readable(sample, role, survey.view):
            return True
    return False


def is_readable(sample: Sample, role: Role, view: View) -> bool:
    from clips.limits import MediaError

    try:
        role.pictures(sample, view)
        return True
    except MediaError:
        return False


# ----------------------------------------------------------------------------------------- writing
def vocab_size_of(models: dict[str, dict], translation: Translation | None) -> int:
    """Every token id is below it; ids of drafts only where both models share a tokenizer."""
    sizes = {name: facts["vocab_size"] for name, facts in models.items()}
    return sizes[TARGET.name] if translation else max(sizes.values())


def translated(draft: dict, translation: Translation | None) -> dict:
    """The key of a row with the draft's text in the target's tokens, where the tokenizers differ."""
    return {COPY: translation.of_text(draft["text"], draft["finished"])} if translation else {}


def write_output(path: Path, head: dict, survey: Survey,
                 ledgers: dict[Literal["draft", "target"], Ledger],
                 translation: Translation | None = None) -> None:
    """Write the output file, whole: a head, one row a line in `results`, then `failed`.

    head: what the program records of the run: dataset_dir, settings.
    ledgers: role -> what its model has answered.
    translation: of the drafts, where both models have tokenizers of their own.
    """
    samples, questions = survey.samples, survey.questions
    pairs = ledgers[TARGET.role].answered()
    failed = [row for ledger in ledgers.values() for row in ledger.failed]
    success = {f"{role.name}_success": 0 for role in ROLES.values()}
    success |= {f"{role.name}_success": len(ledgers[role.role].answered()) * len(questions)
                for role in survey.roles}
    models = {role.name: ledgers[role.role].facts for role in survey.roles}
    head = {"timestamp": now(), **head, "dataset_content": fingerprint(survey.content),
            "total_samples": len(samples), "num_questions": len(questions), "questions": questions,
            **success, "vocab_size": vocab_size_of(models, translation), "models": models,
            **({"same_tokenizer": translation is None} if len(models) > 1 else {}), **provenance()}

    def rows() -> Iterator[dict]:
        for sample in pairs:
            for number, question in enumerate(questions):
                answers = {role: NO_ANSWER for role in ROLES.values()}
                for role in survey.roles:
                    answers[role] = ledgers[role.role].answer(sample, number)
                yield {"sample_idx": sample.index, "question_idx": number, "sample_id": sample.id,
                       "sequence": sample.sequence, "clip": sample.clip, "query": question,
                       **{role.key(field): answer[field]
                          for role, answer in answers.items() for field in FIELDS},
                       **translated(answers[DRAFT], translation)}

    write_rows(path, head, rows(), failed)
    log(f"RESULT | {path} | {len(pairs) * len(questions)} pairs of {len(samples)} clips x "
        f"{len(questions)} questions | {len(failed)} failed")
