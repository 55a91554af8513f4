"""What one model has answered and what not: its answers go into the journal, the clips that failed onto a list."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from base import Progress, UserError, log
from extraction.content import digests_of
from pairs.journal import Content, Journal

if TYPE_CHECKING:
    from clips.dataset import Sample
    from vlm.contract import Answer
    from vlm.roles import Role, View


@dataclasses.dataclass(frozen=True)
class Survey:
    """What an extraction asks about: clips, questions, and what the models are shown of the clips."""

    samples: list[Sample]
    questions: list[str]
    view: View
    content: Content                 # digests of the clips' files at the start of the run


class Ledger:
    """One model's part of an extraction: takes answers (extraction.answering.Results), knows what is missing."""

    def __init__(self, role: Role, survey: Survey, samples: list[Sample], journal: Journal):
        """samples: those that this model is asked about."""
        self.role, self.survey, self.journal = role, survey, journal
        self.samples = samples
        self.usable = [sample for sample in samples if not sample.trouble]
        self.failed = [self._failure(sample, sample.trouble) for sample in samples if sample.trouble]
        questions = len(survey.questions)
        self.done = sum(questions - len(self.missing(sample)) for sample in self.usable)
        self.progress = Progress(f"extract | {role.name}", len(self.usable) * questions, self.done, "answers")

    def missing(self, sample: Sample) -> list[int]:
        """The numbers of the questions about this sample that have no answer yet."""
        return [number for number in range(len(self.survey.questions))
                if not self.journal.has(self.role.name, sample.key, number)]

    def unanswered(self) -> list[Sample]:
        """Usable samples with a question that has no answer."""
        return [sample for sample in self.usable if self.missing(sample)]

    def answered(self) -> list[Sample]:
        """Samples with an answer to every question."""
        return [sample for sample in self.usable if not self.missing(sample)]

    def answer(self, sample: Sample, number: int) -> dict:
        """The model's answer to the question of this number: tokens, text, finished."""
        return self.journal.read(self.role.name, sample.key, number)

    def tokens_of(self, sample: Sample, number: int) -> list[int]:
        return self.answer(sample, number)["tokens"]

    # ------------------------------------------------------------------------------------------ the model
    @property
    def facts(self) -> dict:
        """What was recorded last of the model; empty before that."""
        return self.journal.models.get(self.role.name, {})

    def record(self, facts: dict) -> None:
        self.journal.append([facts])

    # ------------------------------------------------------------------------------------- taking answers
    def keep(self, answered: list[tuple[Sample, list[Answer]]]) -> None:
        """Write the answers that are missing into the journal."""
        rows = [{"model": self.role.name, "key": sample.key, "question_idx": number,
                 **dataclasses.asdict(answers[number])}
                for sample, answers in answered for number in self.missing(sample)]
        if rows:
            self.journal.append(rows)
        self.done += len(rows)
        self.progress.update(self.done, f"{len(self.failed)} clips failed" if self.failed else "")

    def lose(self, sample: Sample, reason: str) -> None:
        """Put a clip on the list of those that failed."""
        self.failed.append(self._failure(sample, reason))
        log(f"extract | {self.role.name} | WARNING | clip {sample.key} failed: {reason}")

    def _failure(self, sample: Sample, reason: str) -> dict:
        return {"sample_idx": sample.index, "sample_id": sample.id, "sequence": sample.sequence,
                "clip": sample.clip, "model": self.role.name, "reason": reason,
                "content": digests_of(sample, self.survey.content)}


# ------------------------------------------------------------------------------------------- weights
def check_revision(journal: Journal, role: Role, name: str, revision: str) -> None:
    """A UserError unless the weights of this folder or hub id are those that have answered so far."""
    from vlm.contract import same_weights

    recorded = journal.models.get(role.name, {}).get("revision")
    if not journal.has_any(role.name) or same_weights(recorded, revision):
        return
    if recorded not in (None, earlier_revision(Path(name))):
        raise UserError(f"{journal.path} has answers of other weights of {name} ({recorded} there, "
                        f"{revision} now); choose another --output_file, or start afresh with --restart")
    log(f"extract | {role.name} | WARNING | {journal.path} does not tell the content of the weights "
        f"that gave its answers ({recorded}): they are taken for those of {name} now")


def earlier_revision(folder: Path) -> str | None:
    """The revision as earlier versions recorded it: names and sizes of the weight files. None for a hub id."""
    if not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return f"local {digest.hexdigest()[:12]}"
