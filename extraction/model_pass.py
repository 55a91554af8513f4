"""Each model's pass over the clips: load it, answer what is missing, check parity, unload it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from base import UserError, log
from clips.dataset import Sample
from extraction.answering import Answering, Job
from extraction.ledger import Ledger, Survey
from machine.device import Runtime
from machine.files import read_within
from machine.team import Work
from pairs.journals import Journals, Merged
from vlm.contract import VisionLanguageModel, same_weights
from vlm.roles import BY_NAME, Role

BATCHES_OF_SHARE = 8               # of one process in a team, at least, in which it takes its share


@dataclasses.dataclass(frozen=True)
class Models:
    """Where each role's model is, and how it runs."""

    names: dict[Literal["draft", "target"], str]   # role that answers -> folder or hub id
    runtime: Runtime

    def check(self, survey: Survey, max_new_tokens: int) -> None:
        """A UserError for all that would end either pass and can be known without loading weights."""
        for role in survey.roles:
            role.check(self.names[role.role], survey.questions, survey.view, max_new_tokens)

    def check_weights(self, journals: Merged) -> None:
        """A UserError unless the models that have answered so far have the same weights now."""
        answering = [role for role in BY_NAME.values() if role.role in self.names]
        for role in answering:
            name = self.names[role.role]
            if any(part.has_any(role.name) for part in journals.parts):
                check_weights(journals, role, name, role.revision(name))


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long answers may be, and how many clips are answered at a time and compared."""

    max_new_tokens: int
    num_workers: int                 # threads that read clips ahead
    batch_size: int | None = None    # clips at a time; None: as many as the free memory holds
    parity_check: int = 0            # clips whose answers are compared with those given one by one


def answer_all(survey: Survey, models: Models, journal: Journals, pace: Pace,
               team: Work) -> dict[Literal["draft", "target"], Ledger]:
    """Let each model in turn answer what the journals lack. Role -> what its model has answered.

    The target is asked about those clips alone that the draft has answered. team: the processes
    that share the clips; all are through with the one model before one begins with the other.
    """
    models.check_weights(journal)
    ledgers, samples = {}, survey.samples
    for role in survey.roles:
        ledgers[role.role] = ledger = Ledger(role, survey, samples, journal, team)
        dealt = deal(ledger)
        first = next(dealt, None)                    # a process without work loads no model
        compares = pace.parity_check and "parity" not in ledger.facts and team.ranks.rank == 0
        if first or compares:
            run_model(ledger, models, pace, itertools.chain([first] if first else [], dealt))
        ledger.gather()
        samples = answered_by(ledger)
    return ledgers


def deal(ledger: Ledger) -> Iterator[Sample]:
    """Samples of the ledger without answers, those that fall to this process: block by block, as it
    asks.
    """
    role, view = ledger.role, ledger.survey.view
    # Clips of as many pictures side by side: they can share a batch.
    todo = sorted(ledger.unanswered(), key=lambda sample: role.most_pictures([sample], view))
    return itertools.chain.from_iterable(ledger.team.blocks(role.name, todo))


def run_model(ledger: Ledger, models: Models, pace: Pace, dealt: Iterator[Sample]) -> None:
    """Load the model of a ledger and let it answer about the samples that are dealt to it."""
    role, name = ledger.role, models.names[ledger.role.role]
    log(f"extract | {role.name} | loading {name}")
    model = role.load(name, models.runtime)
    facts = {"model": role.name, **model.facts(name), "prompt": model.prompt_text("{query}")}
    check_weights(ledger.journal, role, name, facts["revision"])
    answer(ledger, model, facts, pace, dealt)


def answer(ledger: Ledger, model: VisionLanguageModel, facts: dict, pace: Pace,
           dealt: Iterator[Sample]) -> None:
    """Let a loaded model answer what is dealt, compare some answers, record facts, unload it."""
    role, view, questions = ledger.role, ledger.survey.view, ledger.survey.questions
    todo, world = ledger.unanswered(), ledger.team.ranks.world
    size = pace.batch_size or model.clips_that_fit(
        questions, pace.max_new_tokens, role.most_pictures(todo, view))
    # A process holds some batches that wait or are at work: in a team they are no more than half of
    # its share, so that one that starts early leaves work to the others.
    share = len(todo) if world == 1 else len(todo) // (BATCHES_OF_SHARE * world)
    at_once = max(1, min(size, share))
    facts["batch_size"] = size
    ledger.record(facts)
    log(f"extract | {role.name} | {at_once} clips at a time, {pace.num_workers} threads reading ahead")
    read = functools.partial(role.pictures, view=view)
    job = Job(role.name, read, questions, pace.max_new_tokens, pace.num_workers)
    answering = Answering(model, job, at_once, ledger)
    answering.first_answers.usable = ledger.start > 0        # in an earlier start
    answering.run(dealt)
    final = dict(facts)
    if answering.size < at_once:                             # memory was short
        final["batch_size"] = answering.size
    readable = [sample for sample in ledger.answered() if sample.key not in ledger.elsewhere]
    if compared := readable[:pace.parity_check * (ledger.team.ranks.rank == 0)]:
        final["parity"] = answering.parity(compared, ledger.tokens_of)
    if final != facts:
        ledger.record(final)
    answering.unload()


def answered_by(ledger: Ledger) -> list[Sample]:
    """The samples with an answer to every question; a UserError if there is none."""
    role, samples, failed = ledger.role, ledger.samples, ledger.failed
    answered = ledger.answered()
    total = len(samples)
    assert len(answered) + len(failed) == total, f"{len(answered)} + {len(failed)} of {total}"
    log(f"extract | {role.name} | {len(answered)} of {total} clips answered, {len(failed)} failed")
    if not answered:
        raise UserError(f"{role.name}: none of {total} clips could be answered; the first reason: "
                        f"{failed[0]['reason']}")
    return answered


# ----------------------------------------------------------------------------------------- weights
def check_weights(journals: Merged, role: Role, name: str, revision: str) -> None:
    """A UserError unless these weights of a folder or hub id are those that answered so far."""
    for journal in journals.parts:
        recorded = journal.models.get(role.name, {}).get("revision")
        if not journal.has_any(role.name) or same_weights(recorded, revision):
            continue
        if recorded not in (None, earlier_revision(Path(name))):
            raise UserError(f"{journal.path} has answers of other weights of {name} ({recorded} "
                            f"there, {revision} now); choose another --output_file, or start afresh with "
                            "--restart")
        log(f"extract | {role.name} | WARNING | {journal.path} does not tell the content of the "
            f"weights that gave its answers ({recorded}): they are taken for those of {name} now")


def earlier_revision(folder: Path) -> str | None:
    """The revision as earlier versions recorded it: names and sizes of files. None for a hub id."""
    if not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256(read_within(folder / "config.json"))
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return f"local {digest.hexdigest()[:12]}"
