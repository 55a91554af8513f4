"""One drafter at work on a target, answer after answer."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from decoding.contracts import Target
from decoding.costs import ModelCosts, Pace
from decoding.limits import Limits
from decoding.loop import Decoded, decode, free_of_cost
from decoding.record import Record
from decoding.rules import Rule, greedy
from drafting.contract import Costs, Drafter
from machine.timing import median_s


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question about one clip."""

    prompt: Any                      # for the target, as the model's encode gives it
    draft: list[int]                 # EventGPT's answer; [] where no drafter of the run reads it
    question: list[int]              # its tokens alone


@dataclasses.dataclass
class Decoder:
    """A drafter and the target. The drafter's memory and the pace go on from answer to answer."""

    target: Target
    drafter: Drafter
    pace: Pace | None = None         # None: proposals are not weighed against their costs

    def measure(self, asked: Asked, answer: list[int], costs: ModelCosts,
                device: torch.device) -> Costs:
        """Measure what proposals cost this drafter on the beginning of a verified answer; it learns
        nothing.
        """
        def timer(work) -> float:
            return median_s(work, device)

        return self.drafter.measure(asked.draft, asked.question, answer[:1], timer, costs.slope_s)

    def answer(self, asked: Asked, limits: Limits, rule: Rule = greedy,
               record: Record | None = None) -> Decoded:
        """Decode one answer; the drafter has learnt it then. record: gets the proposals."""
        if limits.may_choose and self.drafter.prefers_chains:
            limits = dataclasses.replace(limits, nodes=0)
        start = time.perf_counter()
        self.drafter.begin(asked.draft, asked.question)
        begin_s = time.perf_counter() - start
        self.target.ask(asked.prompt)
        decoded = decode(self.target, self.drafter, limits,
                         self.pace.price if self.pace else free_of_cost, rule, record)
        decoded.add_opening_s(begin_s)
        if self.pace:
            self.pace.add(decoded)
        return decoded

    def recall(self, decoded: Decoded) -> None:
        """Take up an answer of an earlier start of this run, as if it had just been decoded."""
        self.drafter.learn(decoded.tokens)
        if self.pace:
            self.pace.add(decoded)
