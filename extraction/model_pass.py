"""One model's pass over the clips: load it, let it answer what is missing, compare with one by one, unload it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from base import UserError, log
from extraction.answering import Answering, Job
from extraction.ledger import Ledger, check_revision

if TYPE_CHECKING:
    from clips.dataset import Sample
    from machine.device import Runtime
    from vlm.contract import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long answers may be, how many clips are answered at a time, and how many answers are compared."""

    max_new_tokens: int
    num_workers: int                 # threads that read clips ahead
    batch_size: int | None = None    # clips at a time; None: as many as the free memory holds
    parity_check: int = 0            # clips whose answers are compared with those given one by one


def answer_missing(ledger: Ledger, name: str, runtime: Runtime, pace: Pace) -> list[Sample]:
    """Let the ledger's model, of this folder or hub id, answer what is missing. Returns the samples that it answered.

    Loads nothing where no answer and no comparison is missing. A UserError when no clip has an answer at the end.
    """
    role, samples = ledger.role, ledger.samples
    todo = ledger.unanswered()
    if todo or (pace.parity_check and "parity" not in ledger.facts):
        log(f"extract | {role.name} | loading {name}")
        model = role.load(name, runtime)
        facts = {"model": role.name, **model.facts(name), "prompt": role.prompt("{query}")}
        check_revision(ledger.journal, role, name, facts["revision"])
        answer(ledger, model, facts, todo, pace)
    answered = ledger.answered()
    assert len(answered) + len(ledger.failed) == len(samples), \
        f"{len(answered)} + {len(ledger.failed)} of {len(samples)} clips"
    log(f"extract | {role.name} | {len(answered)} of {len(samples)} clips answered, {len(ledger.failed)} failed")
    if not answered:
        raise UserError(f"{role.name}: none of {len(samples)} clips could be answered; the first reason: "
                        f"{ledger.failed[0]['reason']}")
    return answered


def answer(ledger: Ledger, model: VisionLanguageModel, facts: dict, todo: list[Sample], pace: Pace) -> None:
    """Answer these samples, compare some answers, and record the facts of the model. Unloads the model."""
    from vlm.batches import clips_that_fit

    role, view, questions = ledger.role, ledger.survey.view, ledger.survey.questions
    todo = sorted(todo, key=lambda sample: role.most_pictures([sample], view))     # as many pictures side by side
    size = pace.batch_size or clips_that_fit(
        model, questions, pace.max_new_tokens, role.most_pictures(todo, view))
    ledger.record({**facts, "batch_size": size})
    log(f"extract | {role.name} | {min(size, len(todo))} clips at a time, {pace.num_workers} threads reading ahead")
    job = Job(role.name, functools.partial(role.pictures, view=view), questions, pace.max_new_tokens,
              pace.num_workers)
    at_once = max(1, min(size, len(todo)))
    answering = Answering(model, job, at_once, ledger)
    answering.run(todo)
    if answering.size < at_once:              # memory was short
        size = answering.size
    facts = {**facts, "batch_size": size}
    answered = ledger.answered()[:pace.parity_check]
    if answered:
        facts["parity"] = answering.parity(answered, ledger.tokens_of)
    if facts != ledger.facts:
        ledger.record(facts)
    answering.unload()
