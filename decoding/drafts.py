"""The draft model's answers for all clips, before the target is loaded: only one model is in memory
at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from base import Progress, UserError, log
from decoding.clips import Clips
from decoding.costs import measure_costs
from decoding.decoder import Asked, Decoder
from decoding.journal import DecodingJournal
from decoding.limits import WANTED_DRAFT_MODEL, Limits
from decoding.loop import Decoded
from drafting.contract import NoDrafts
from drafting.table import LIVE, LIVE_NAMES
from machine.running import finishing
from machine.timing import timed
from vlm.contract import FirstAnswers

if TYPE_CHECKING:
    import torch

    from clips.dataset import Sample
    from vlm.contract import VisionLanguageModel


def missing_drafts(clips: Clips, journal: DecodingJournal) -> list[Sample]:
    """The clips with a question to which the journal has no draft."""
    return [
        sample for sample in clips.samples
        if any((sample.key, number) not in journal.drafts for number in range(len(clips.questions)))
    ]


def drafters_of(chosen: str, compare: bool, conditioning: str | None,
                has_draft_model: bool) -> tuple[str, ...]:
    """The names of the drafters of a run. Without a draft model none that reads its answers.

    compare: all of them, not only the chosen one; conditioning: of the adapter. Raises UserError if
    the chosen one reads drafts and there is no draft model.
    """
    names = LIVE_NAMES if compare else (chosen, )
    readers = [name for name in names if LIVE[name].reads_draft(conditioning)]
    if has_draft_model:
        if not readers:
            log(f"decode | {chosen} reads nothing of the draft model's answers, which are timed alone: "
                "--draft_model none saves that")
        return names
    if chosen in readers:
        others = [name for name in LIVE if not LIVE[name].reads_draft(conditioning)]
        raise UserError(f"--draft_model is missing: --drafter {chosen} reads EventGPT's answers (the "
                        f"adapter's conditioning is {conditioning}); {WANTED_DRAFT_MODEL}, or one of "
                        f"the drafters that read none: {', '.join(others)}")
    if readers:
        log("decode | no draft model: --compare leaves out the drafters that read its answers, "
            + ", ".join(readers))
    return tuple(name for name in names if name not in readers)


class Drafting:
    """The draft model at work: its answers, decoded plainly, and its costs go into the journal."""

    def __init__(self, model: VisionLanguageModel, clips: Clips, limits: Limits,
                 journal: DecodingJournal):
        from vlm.roles import DRAFT

        self.role, self.model, self.clips = DRAFT, model, clips
        self.limits, self.journal = limits, journal
        self.todo = missing_drafts(clips, journal)
        pictures = DRAFT.most_pictures(self.todo, clips.view)
        self.target = model.open_target(clips.questions, pictures, limits.max_new_tokens)
        self.decoder = Decoder(self.target, NoDrafts())
        self.first_answers = FirstAnswers(DRAFT.name, usable=bool(journal.drafts))

    def run(self) -> None:
        """Answer every question that has no draft. After a signal only the answer in hand is
        finished.
        """
        drafts, total = self.journal.drafts, len(self.clips.samples) * len(self.clips.questions)
        keys = {sample.key for sample in self.clips.samples}
        of_others = sum(key not in keys for key, _ in drafts)    # of other processes' sequences
        progress = Progress("decode | drafts", total, len(drafts) - of_others, "answers")
        with finishing("the answer in hand is decoded") as stopping:
            for sample, pixels in self.clips.read(self.role, self.model, self.todo):
                if self.journal.draft_costs_ms is None and not stopping():
                    costs = measure_costs(self.model,
                                          self.target,
                                          pixels,
                                          self.clips.questions[0],
                                          sizes=(1, ))
                    self.journal.add({"draft_costs_ms": costs.milliseconds()})
                for number, question in enumerate(self.clips.questions):
                    if (sample.key, number) not in self.journal.drafts and not stopping():
                        self._answer(sample, pixels, number, question)
                        progress.update(len(drafts) - of_others)
                if stopping():
                    return

    def _answer(self, sample: Sample, pixels: torch.Tensor, number: int, question: str) -> None:
        from vlm.contract import NotNumbers

        def answer() -> Decoded:
            return self.decoder.answer(Asked(self.model.encode(pixels, question), [], []),
                                       self.limits)

        try:
            decoded, seconds = timed(answer, self.model.runtime.device)
        except NotNumbers as error:
            self.clips.fail(self.role, sample, str(error), number)
            self.first_answers.failed(str(error))
            return
        self.first_answers.usable = True
        self.journal.add({
            "draft": decoded.tokens, "seconds": seconds, "key": sample.key, "question_idx": number,
            "text": self.model.tokenizer.decode(decoded.tokens, skip_special_tokens=True).strip()
        })
