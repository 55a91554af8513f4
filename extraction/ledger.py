"""What one model has answered and what not: answers go into the journal, failed clips onto a list."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from base import Progress, log
from extraction.content import digests_of
from machine.team import Alone, Work
from pairs.journal import Content
from pairs.journals import Journals, Merged
from vlm.roles import ROLES

if TYPE_CHECKING:
    from collections.abc import Callable

    from clips.dataset import Sample
    from vlm.contract import Answer
    from vlm.roles import Role, View


@dataclasses.dataclass(frozen=True)
class Survey:
    """What an extraction asks about: clips, questions, and what the models see of the clips."""

    samples: list[Sample]
    questions: list[str]
    view: View
    # Digests of the clips' files at the start of the run, of each model that answers.
    content: Content

    @property
    def roles(self) -> list[Role]:
        """The roles that answer: without a draft model the target alone."""
        return [role for role in ROLES.values() if role.name in self.content]


class Ledger:
    """One model's part of an extraction. Takes its answers (extraction.answering.Results).

    Where several processes share the work, each has a ledger; they know of each other's answers
    when the ledger is made, and after `gather`.
    """

    def __init__(self, role: Role, survey: Survey, samples: list[Sample], journal: Merged,
                 team: Work | None = None):
        """samples: those of the survey that this model is asked about; all processes have the same."""
        self.role, self.survey, self.samples, self.journal = role, survey, samples, journal
        self.team = team or Alone()
        self.usable = [sample for sample in samples if not sample.trouble]
        unusable = [sample for sample in samples if sample.trouble]
        self.failed = [self._failure(sample, sample.trouble) for sample in unusable]
        self.here: list[dict] = []                   # clips that failed in this process
        self.elsewhere: set[str] = set()             # keys of samples that other processes answered
        self._share("before", [])
        wanted = len(self.usable) * len(survey.questions)
        self.start = wanted - sum(len(self.missing(sample)) for sample in self.usable)
        self.done, self.shown = 0, 0                 # answers of this process; of all, as shown
        self.progress = Progress(f"extract | {role.name}", wanted, self.start, "answers")

    # --------------------------------------------------------------------------- several processes
    def _share(self, when: str, failed: list[dict],
               update: Callable[[], object] = lambda: None) -> list[dict]:
        """Learn which samples the other processes have answered -> the rows of all that failed."""
        answered = "".join("01"[not self.missing(sample)] for sample in self.usable)
        mine = json.dumps([f"{int('1' + answered, 2):x}", failed]).encode()
        shares = self.team.gather(f"{self.role.name}/{when}", mine, update)
        rows = []
        for share in shares[:self.team.ranks.rank] + shares[self.team.ranks.rank + 1:]:
            bits, others = json.loads(share)
            flags = f"{int(bits, 16):b}"[1:]
            self.elsewhere |= {
                sample.key for sample, flag in zip(self.usable, flags) if flag == "1"}
            rows += others
        return [*failed, *rows]

    def gather(self) -> None:
        """Wait until all processes are through, and take up what they have answered and lost."""
        rows = self._share("after", self.here, self.show)
        if self.team.ranks.world > 1:
            rows.sort(key=lambda row: row["sample_idx"])
            self._show(len(self.answered()) * len(self.survey.questions), len(rows))
        self.failed += rows

    def show(self) -> None:
        """Report progress: that of all processes, in the first."""
        if known := self.team.report(self.role.name, self.done, len(self.here)):
            self._show(self.start + known[0], known[1])

    def _show(self, done: int, failed: int) -> None:
        failed += len(self.failed)
        if done > self.shown or not self.shown:
            self.progress.update(done, f"{failed} clips failed" if failed else "")
        self.shown = done

    # ----------------------------------------------------------------------------- what is there
    def missing(self, sample: Sample) -> list[int]:
        """The numbers of the questions about this sample that have no answer yet."""
        if sample.key in self.elsewhere:
            return []
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
        self._append([facts])

    def _append(self, entries: list[dict]) -> None:
        assert isinstance(self.journal, Journals), "journals that are merged are only read"
        self.journal.append(entries)

    # --------------------------------------------------------------------------------- its answers
    def keep(self, answered: list[tuple[Sample, list[Answer]]]) -> None:
        """Write the answers that are missing into the journal."""
        rows = [{"model": self.role.name, "key": sample.key, "question_idx": number,
                 **dataclasses.asdict(answers[number])}
                for sample, answers in answered for number in self.missing(sample)]
        if rows:
            self._append(rows)
        self.done += len(rows)
        self.show()

    def lose(self, sample: Sample, reason: str) -> None:
        """Put a clip on the list of those that failed."""
        row = self._failure(sample, reason)
        if self.team.ranks.world > 1:                # for a merge on another host
            self._append([{"model": self.role.name, "key": sample.key, "failed": row}])
        self.here.append(row)
        log(f"extract | {self.role.name} | WARNING | clip {sample.key} failed: {reason}")

    def _failure(self, sample: Sample, reason: str | None) -> dict:
        """A row of `failed`; content: digests of the clip's files, which tell whether it was mended."""
        return {"sample_idx": sample.index, "sample_id": sample.id, "sequence": sample.sequence,
                "clip": sample.clip, "model": self.role.name, "reason": reason,
                "content": digests_of(sample, self.survey.content)}
