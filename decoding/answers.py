"""The target's answers for all clips: by the chosen drafter, and for a comparison by every other
way to decode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from base import Progress, log
from decoding.clips import Clips
from decoding.costs import NOISE_OVER_ROUNDING, ModelCosts, Pace, measure_costs, rounding
from decoding.decoder import Asked, Decoder
from decoding.journal import DecodingJournal
from decoding.limits import AUTO, MAX_NODES, MEASURED_SIZES, PLAIN, limits_of
from decoding.loop import Decoded
from decoding.record import RECORDED_ANSWERS, Record, Words
from decoding.rules import Sampling, rule_of
from decoding.verdict import as_they_are, judge
from drafting.contract import Drafter, NoDrafts
from machine.running import finishing
from machine.timing import timed
from vlm.contract import FirstAnswers

if TYPE_CHECKING:
    import torch

    from clips.dataset import Sample
    from vlm.contract import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the answers of a run are decoded."""

    drafter: str                     # the chosen one: its tokens are the answers
    gamma: str                       # auto, or a number
    tree: str                        # auto, or a number of nodes; 0: chains
    compare: bool                    # judge every drafter's answers, and transformers'
    max_new_tokens: int
    temperature: float
    seed: int
    fresh_sequences: bool = False    # each sequence begins with what training left


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one clip, and what the target sees of it."""

    sample: Sample
    number: int                      # of the question
    text: str
    pixels: torch.Tensor             # (n, 3, S, S)

    @property
    def place(self) -> tuple[str, int]:
        return self.sample.key, self.number


def untracked(figures: dict, step: int) -> None:
    """A run without a tracker."""


def figures_of(row: dict | None) -> dict:
    """The figures of an answer that an experiment tracker gets, by drafter; none where it has failed."""
    runs = row["runs"] if row else {}
    return {name: {"tokens": run["tokens"], "tau": run["tokens"] / len(run["accepted"]),
                   **{key: run[key] for key in ("draft_s", "prefill_s", "verify_s")}}
            for name, run in runs.items()}


class Answering:
    """The target and the drafters of a run at work; rows of decode.json go into the journal."""

    def __init__(self, model: VisionLanguageModel, drafters: dict[str, Drafter], clips: Clips,
                 settings: Settings, journal: DecodingJournal, track: Callable = untracked):
        """drafters: by name, the chosen one among them; with settings.compare also the one that
        proposes nothing. track(figures, step): called after each answer.
        """
        from vlm.roles import TARGET

        self.role, self.model, self.clips = TARGET, model, clips
        self.settings, self.journal, self.track = settings, journal, track
        pictures = TARGET.most_pictures(clips.samples, clips.view)
        self.target = model.open_target(clips.questions, pictures,
                                  settings.max_new_tokens + MAX_NODES)
        tree = settings.tree if self.target.takes_trees else "0"
        if tree != settings.tree:
            log("decode | this model verifies chains alone: --tree plays no part")
        self.limits = limits_of(settings.gamma, settings.max_new_tokens, model.eos_ids, tree)
        self.drafters = drafters
        self.decoders: dict[str, Decoder] = {}       # none until all costs and the noise are known
        self.costs: ModelCosts | None = None
        self.first_answers = FirstAnswers(TARGET.name, usable=bool(journal.answers))
        self.sequence: str | None = None             # with fresh sequences: the one at work
        self.words = Words(model.tokenizer)

    def run(self, drafts: dict[tuple[str, int], tuple[list[int], float]]) -> None:
        """Decode every question that has a draft and no answer. After a signal the answer in hand
        is finished.

        drafts: tokens and seconds of the draft model by clip and question.
        """
        answers = self.journal.answers
        of_others = len(answers.keys() - drafts.keys())          # of other processes' sequences
        progress = Progress("decode | answers", len(drafts), len(answers) - of_others, "answers")
        with finishing("the answer in hand is decoded") as stopping:
            for sample, pixels in self.clips.read(self.role, self.model, self.unanswered(drafts)):
                for number, text in enumerate(self.clips.questions):
                    question = Question(sample, number, text, pixels)
                    is_open = question.place in drafts and question.place not in self.journal.answers
                    if is_open and not stopping():
                        self._enter(sample.sequence)
                        self._try(question, *drafts[question.place])
                        progress.update(len(answers) - of_others)
                        self.track({"answer": figures_of(self.journal.answers.get(question.place))},
                                   len(self.journal.answers))
                if stopping():
                    return

    def unanswered(self, drafts: dict) -> list[Sample]:
        """The clips with a question that has a draft and no answer."""
        keys = {key for key, _ in drafts.keys() - self.journal.answers.keys()}
        return [sample for sample in self.clips.samples if sample.key in keys]

    def _try(self, question: Question, draft: list[int], draft_s: float) -> None:
        from vlm.contract import NotNumbers

        try:
            asked, vision_s = timed(lambda: self.ask(question, draft), self.model.runtime.device)
            if not self.decoders:
                self.get_ready(question, asked)
            row, others = self.answer(question, asked, vision_s)
        except NotNumbers as error:
            self.clips.fail(self.role, question.sample, str(error), question.number)
            self.first_answers.failed(str(error))
            return
        self.first_answers.usable = True
        row["eventgpt_s"] = draft_s
        self.journal.add({
            "answer": row, "key": question.sample.key, "question_idx": question.number,
            "other_tokens": others
        })

    def ask(self, question: Question, draft: list[int]) -> Asked:
        words = self.model.tokenizer(question.text, add_special_tokens=False).input_ids
        return Asked(self.model.encode(question.pixels, question.text), draft, words)

    # --------------------------------------------------------------------------------------- costs
    def get_ready(self, question: Question, asked: Asked) -> None:
        """Measure all costs and the noise on this question, then take up the answers of earlier
        starts.
        """
        from vlm.contract import NotNumbers

        costs = self.measure_model(question)
        # transformers' first call is slow and not to be timed
        if self.settings.compare and not self.settings.temperature:
            self.model.answer([question.pixels], [question.text], 2)
        tokens = Decoder(self.target, NoDrafts()).answer(asked, self.limits).tokens
        noise = NOISE_OVER_ROUNDING * rounding(self.target, asked.prompt, tokens)
        if not math.isfinite(noise):
            raise NotNumbers(self.model.runtime.dtype)
        costs_ms = {**costs.milliseconds(), "proposal": {}}
        for name, drafter in self.drafters.items():
            self.decoders[name] = self.new_decoder(drafter, asked, tokens)
            costs_ms["proposal"][name] = 1000 * drafter.costs.proposal_s
            if drafter.costs.adapter_step_s:
                costs_ms["adapter_step"] = 1000 * drafter.costs.adapter_step_s
        self.journal.add({"costs_ms": costs_ms, "noise": noise})
        log(f"decode | one token takes {costs_ms['verify'][1]:.2f} ms, verifying 9 "
            f"{costs_ms['verify'][9]:.2f} ms, a "
            f"proposal of {self.settings.drafter} "
            f"{costs_ms['proposal'][self.settings.drafter]:.2f} ms | tied: logits "
            f"within {self.journal.noise:.2g}")
        if self.settings.fresh_sequences:
            self._enter(question.sample.sequence)
        else:
            self.recall()

    def measure_model(self, question: Question) -> ModelCosts:
        if self.costs is None:
            self.costs = measure_costs(self.model, self.target, question.pixels, question.text,
                                       MEASURED_SIZES)
        return self.costs

    def new_decoder(self, drafter: Drafter, asked: Asked, answer: list[int]) -> Decoder:
        """The drafter at work on the target, its costs measured; the model's costs must be known.
        """
        assert self.costs, "the model's costs are measured first"
        decoder = Decoder(
            self.target, drafter,
            Pace(self.costs.verify[1]) if AUTO in (self.settings.gamma,
                                                   self.settings.tree) else None)
        decoder.measure(asked, answer, self.costs, self.model.runtime.device)
        return decoder

    def _enter(self, sequence: str) -> None:
        """With fresh sequences: forget the one before, at the first answer of the next."""
        if self.settings.fresh_sequences and self.decoders and sequence != self.sequence:
            for decoder in self.decoders.values():
                decoder.drafter.forget()
            self.sequence = sequence
            self.recall(sequence)

    def recall(self, sequence: str | None = None) -> None:
        """Let the drafters learn what earlier starts decoded, in the same order; of this sequence."""
        answers = self.journal.answers
        places = list(answers)
        if sequence is not None:                     # several processes may have given them
            places = [(sample.key, number) for sample in self.clips.samples
                      if sample.sequence == sequence for number in range(len(self.clips.questions))]
        for place in places:
            if (row := answers.get(place)) is None:
                continue
            for name, decoder in self.decoders.items():
                tokens = self.journal.other_tokens[place].get(name, row["tokens"])
                decoder.recall(decoded_of(row["runs"][name], tokens))

    # ------------------------------------------------------------------------------------- answers
    def answer(self, question: Question, asked: Asked,
               vision_s: float) -> tuple[dict, dict[str, list[int]]]:
        """(the row of decode.json, tokens of the drafters whose answer is another than the chosen
        one's).
        """
        settings, sample = self.settings, question.sample
        rule_seed = f"{sample.key}\0{question.number}"
        record = Record() if len(self.journal.answers) < RECORDED_ANSWERS else None
        runs = {
            name: decoder.answer(asked, self.limits,
                                 rule_of(settings.temperature, settings.seed, rule_seed),
                                 record if name == settings.drafter else None)
            for name, decoder in self.decoders.items()
        }
        tokens = runs[settings.drafter].tokens
        row = {
            "sample_id": sample.id, "sequence": sample.sequence, "clip": sample.clip,
            "question_idx": question.number, "query": question.text,
            "text": self.model.tokenizer.decode(tokens,
                                                skip_special_tokens=True).strip(), "tokens": tokens,
            "vision_s": vision_s, "runs": {name: as_row(run) for name, run in runs.items()}
        }
        if record:
            row["passes"] = record.passes
        if settings.compare:
            plain = runs[PLAIN].tokens
            for name, run in runs.items():
                row["runs"][name] |= self._judge(run.tokens, plain, asked, rule_seed)
            if not settings.temperature:         # its random numbers are others
                row["generate"] = self.generate(question, asked, plain)
        # last: a word is told once, so that the row with it must not fail any more
        row["words"] = self.words.new({*tokens, *(record.tokens() if record else ())})
        return row, {name: run.tokens for name, run in runs.items() if run.tokens != tokens}

    def _judge(self, ours: list[int], plain: list[int], asked: Asked, rule_seed: str = "") -> dict:
        noise = self.journal.noise
        assert noise is not None, "the noise is measured before the first answer"
        rule = rule_of(self.settings.temperature, self.settings.seed, rule_seed)
        scores = rule.scores if isinstance(rule, Sampling) else as_they_are
        return judge(ours, plain, self.target, asked.prompt, noise, scores)

    def generate(self, question: Question, asked: Asked, plain: list[int]) -> dict:
        """transformers' own answer, timed; our plain answer is held against it."""
        device = self.model.runtime.device

        def answer(length: int) -> list[int]:
            return self.model.answer([question.pixels], [question.text], length)[0].tokens

        tokens, all_s = timed(lambda: answer(self.settings.max_new_tokens), device)
        _, first_token_s = timed(lambda: answer(1), device)
        return {"tokens": len(tokens), "all_s": all_s, "first_token_s": first_token_s,
                **self._judge(plain, tokens, asked)}


def as_row(decoded: Decoded) -> dict:
    """A run of an answer in decode.json: its tokens are counted."""
    return {**dataclasses.asdict(decoded), "tokens": len(decoded.tokens)}


def decoded_of(run: dict, tokens: list[int]) -> Decoded:
    """A run of an answer as it was decoded."""
    names = {field.name for field in dataclasses.fields(Decoded)} - {"tokens"}
    return Decoded(tokens, **{name: run[name] for name in names if name in run})
