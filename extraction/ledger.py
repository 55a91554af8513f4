"""What one model has answered and what not: answers go into the journal, failed clips onto a list."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from base import Progress, log
from extraction.content import digests_of
from pairs.journal import Content, Journal

if TYPE_CHECKING:
    from clips.dataset import Sample
    from vlm.contract import Answer
    from vlm.roles import Role, View


@dataclasses.dataclass(frozen=True)
class Survey:
    """What an extraction asks about: clips, questions, and what the models see of the clips."""

    samples: list[Sample]
    questions: list[str]
    view: View
    content: Content                 # digests of the clips' files at the start of the run


class Ledger:
    """One model's part of an extraction. Takes its answers (extraction.answering.Results)."""

    def __init__(self, role: Role, survey: Survey, samples: list[Sample], journal: Journal):
        """samples: those of the survey that this model is asked about."""
        self.role, self.survey, self.samples, self.journal = role, survey, samples, journal
        self.usable = [sample for sample in samples if not sample.trouble]
        unusable = [sample for sample in samples if sample.trouble]
        self.failed = [self._failure(sample, sample.trouble) for sample in unusable]
        wanted = len(self.usable) * len(survey.questions)
        self.done = wanted - sum(len(self.missing(sample)) for sample in self.usable)
        self.progress = Progress(f"extract | {role.name}", wanted, self.done, "answers")

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
        """The answer to the question of this number: tokens, text, finished."""
        return self.journal.read(self.role.name, sample.key, number)

    def tokens_of(self, sample: Sample, number: int) -> list[int]:
        return self.answer(sample, number)["tokens"]

    # ----------------------------------------------------------------------------------- the model
    @property
    def facts(self) -> dict:
        """What was recorded last of the model; empty before that."""
        return self.journal.models.get(self.role.name, {})

    def record(self, facts: dict) -> None:
        self.journal.append([facts])

    # --------------------------------------------------------------------------------- its answers
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

    def _failure(self, sample: Sample, reason: str | None) -> dict:
        """A row of `failed`; content: digests of the clip's files, which tell whether it was mended."""
        return {"sample_idx": sample.index, "sample_id": sample.id, "sequence": sample.sequence,
                "clip": sample.clip, "model": self.role.name, "reason": reason,
                "content": digests_of(sample, self.survey.content)}
