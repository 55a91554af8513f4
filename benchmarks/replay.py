"""Recorded answers replayed by a Video-LLaVA with random weights: transformers' modes, and our loop
with each drafter.

Every pass is computed; only the chosen token is replaced by the recorded one. Part of `python
benchmark.py decode`.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from base import Progress, log
from benchmarks.decode_table import TREE
from benchmarks.limits import memory
from decoding.contracts import NO_TOKEN
from decoding.costs import ModelCosts, Pace, measure_costs
from decoding.decoder import Asked, Decoder
from decoding.limits import AUTO, MAX_NODES, MEASURED_SIZES, limits_of
from decoding.rules import rule_of
from drafting.contract import Drafter, NoDrafts
from drafting.tree import Branching
from machine.timing import median_s, timed
from vlm import peers
from vlm.peers import QUERY, QUESTION, SEED

if TYPE_CHECKING:
    from vlm.video_llava import VideoLlava

WARM_UPS = 2                         # answers that every way runs before it is timed
# proposals of transformers' prompt lookup with --gamma auto: its own default
LOOKUP_TOKENS = 10
PROPOSED = 8                         # tokens of the proposals that are timed alone


# ------------------------------------------------------------------------------ transformers' way
def transformers_modes(model: VideoLlava, gamma: str,
                       may_compile: bool) -> dict[str, dict]:
    """Name of each mode of generate -> its arguments."""
    # Prompt lookup finds the ":" of "USER:" and proposes what follows, <video>; the model refuses
    # more of these than there are features (ValueError). A suppressed token is not proposed.
    suppressed = [model.model.config.video_token_index]
    tokens = LOOKUP_TOKENS if gamma == AUTO else int(gamma)
    return {
        "generate": {}, "generate, static cache": {
            "cache_implementation": "static", "disable_compile": not may_compile
        }, "generate, prompt lookup": {
            "prompt_lookup_num_tokens": tokens, "suppress_tokens": suppressed
        }
    }


def run_mode(name: str, mode: dict, model: VideoLlava, pixels: torch.Tensor,
             answers: list[list[int]]) -> dict:
    """{"rows": tokens and seconds of each answer, "memory_mib", "compiled", "warm_up_s"} of one
    mode of generate.
    """
    device, before = model.runtime.device, memory(model.runtime.device)

    def row_of(answer: list[int]) -> dict:
        first, first_s = timed(lambda: peers.generate(model, pixels, answer, 1, **mode), device)
        tokens, all_s = timed(lambda: peers.generate(model, pixels, answer, len(answer), **mode),
                              device)
        assert tokens == answer and first == answer[:1], f"{name} gave {tokens} for {answer}"
        return {
            "tokens": len(answer), "first_token_s": first_s, "decode_s": all_s - first_s,
            "end_s": all_s
        }

    # the longest: a static cache that grows later compiles again
    def warm_up() -> None:
        for answer in sorted(answers, key=len, reverse=True)[:WARM_UPS]:
            row_of(answer)

    try:
        _, warm_up_s = timed(warm_up, device)
    # no compiler, no headers, a bug in it
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        if mode.get("disable_compile", True):
            raise
        log(f"benchmark | WARNING | {name}: the step can't be compiled here and runs uncompiled: "
            f"{error!s:.300}"
            )
        mode["disable_compile"] = True
        _, warm_up_s = timed(warm_up, device)
    compiled = hasattr(model.model, "_compiled_call") and not mode.get("disable_compile", True)
    progress, rows = Progress(f"benchmark | {name}", len(answers), unit="answers"), []
    for answer in answers:
        rows.append(row_of(answer))
        progress.update(len(rows))
    for attribute in {"_compiled_call", "_previous_max_cache_length"} & vars(model.model).keys():
        delattr(model.model, attribute)              # our loop must not carry what this mode left
    if compiled:
        torch._dynamo.reset()
    return {"rows": rows, "compiled": compiled, "warm_up_s": warm_up_s,
            "memory_mib": {"before": before["held"], "peak": memory(device)["peak"]}}


# ---------------------------------------------------------------------------------------- our way
def replay(recorded: list[int], temperature: float = 0.0):
    """A rule for decode(): it waits for the target's choice, greedy or drawn at a temperature, then
    takes the recorded tokens.
    """
    choose = rule_of(temperature, SEED, str(recorded))

    def rule(answer: list[int], depths: list[int], following) -> list[int]:
        choose(answer, depths, following)
        true = [*recorded[len(answer):], *[NO_TOKEN] * len(depths)]
        return [true[depth] for depth in depths]

    return rule


class Untaught(NoDrafts):
    """A drafter that learns nothing: warming it up leaves it as it was."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter

    def begin(self, draft: list[int], question: Sequence[int] = ()) -> None:
        self.drafter.begin(draft, question)

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        return self.drafter.propose(prefix, gamma, price)


class UntaughtTree(Untaught):
    """The same of a drafter that has second choices."""

    drafter: Branching

    def __init__(self, drafter: Branching):
        super().__init__(drafter)

    def place_after(self, prefix: list[int]):
        return self.drafter.place_after(prefix)

    def next_place(self, place, token: int):
        return self.drafter.next_place(place, token)

    def choices(self, place, reached: float, price: float, upcoming) -> list[tuple[float, int]]:
        return self.drafter.choices(place, reached, price, upcoming)


def untaught(drafter: Drafter) -> Untaught:
    return UntaughtTree(drafter) if isinstance(drafter, Branching) else Untaught(drafter)


class Ours:
    """Our loop on the model, with every drafter on each answer in turn."""

    def __init__(self, model: VideoLlava, pixels: torch.Tensor,
                 drafters: dict[str, Drafter], gamma: str, tree: str, longest: int):
        """tree: of the drafters whose name ends in TREE; longest: tokens of the longest answer."""
        self.model, self.pixels, self.device = model, pixels, model.runtime.device
        self.gamma, self.tree, self.temperature = gamma, tree, 0.0
        self.question = [token % model.tokenizer.words for token in QUESTION]
        self.memory_before = memory(self.device)["held"]
        self.target = model.open_target([QUERY], len(pixels), longest + MAX_NODES)
        self.costs: ModelCosts = measure_costs(model, self.target, pixels, QUERY,
                                               MEASURED_SIZES)
        self.decoders = {name: Decoder(self.target, drafter) for name, drafter in drafters.items()}

    def warm_up(self, recorded: list[tuple[list[int], list[int]]]) -> None:
        """Run the first answers by every drafter, then measure its costs; no drafter learns
        anything.
        """
        embeds = self.model.prompt_embeds(self.pixels, QUERY)
        for name, decoder in self.decoders.items():
            for draft, answer in recorded[:WARM_UPS]:
                warming = Decoder(self.target, untaught(decoder.drafter))
                self.row_of(name, warming, embeds, draft, answer)
            draft, answer = recorded[0]
            decoder.measure(Asked(embeds, draft, self.question), answer, self.costs, self.device)
            if AUTO in (self.gamma, self.tree if name.endswith(TREE) else ""):
                decoder.pace = Pace(self.costs.verify[1])

    def run(self, recorded: list[tuple[list[int], list[int]]], only_part: tuple[str, ...],
            part: int) -> dict:
        """{drafter: {"rows"}}. only_part: drafters that run the first `part` answers alone."""
        progress = Progress("benchmark | ours", len(recorded), unit="answers")
        runs: dict[str, dict] = {name: {"rows": []} for name in self.decoders}
        for number, (draft, answer) in enumerate(recorded):
            embeds, vision_s = timed(lambda: self.model.prompt_embeds(self.pixels, QUERY),
                                     self.device)
            for name, decoder in self.decoders.items():
                if number < part or name not in only_part:
                    row = self.row_of(name, decoder, embeds, draft, answer)
                    runs[name]["rows"].append(
                        {**row, "vision_s": vision_s, "end_s": vision_s + row["end_s"]})
            progress.update(number + 1)
        return runs

    def row_of(self, name: str, decoder: Decoder, embeds: torch.Tensor, draft: list[int],
               answer: list[int]) -> dict:
        asked = Asked(embeds, draft, self.question)
        tree = self.tree if name.endswith(TREE) else "0"
        limits = limits_of(self.gamma, len(answer), eos_ids=(), tree=tree)
        decoded, seconds = timed(lambda: decoder.answer(asked, limits, replay(answer, self.temperature)),
                                 self.device)
        assert decoded.tokens == answer, f"{name} gave {decoded.tokens} for {answer}"
        return {
            "tokens": len(answer), "passes": len(decoded.accepted),
            "proposed": sum(decoded.proposed), "accepted": sum(decoded.accepted),
            "draft_s": decoded.draft_s, "verify_s": decoded.verify_s,
            "prefill_s": decoded.prefill_s, "decode_s": seconds - decoded.prefill_s,
            "end_s": seconds
        }

    def proposing_ms(self, draft: list[int], answer: list[int]) -> dict:
        """Milliseconds of 8 proposals, the median along an answer that grows by 5 tokens; of one
        step of the adapter.

        Only of drafters that take time; the step is None without an adapter that runs step by step.
        """
        ends = range(min(5, len(answer)), max(6, len(answer) - 7), 5)
        propose_ms = {}
        for name in ("adapter", "hybrid", "memory"):
            drafter = self.decoders[name].drafter
            drafter.begin(draft, self.question)
            proposals = [functools.partial(drafter.propose, answer[:end], PROPOSED) for end in ends]
            seconds = [timed(propose, self.device)[1] for propose in proposals]
            propose_ms[name] = 1000 * statistics.median(seconds)
        return {"propose_8": propose_ms, "adapter_step": self._adapter_step_ms(draft)}

    def _adapter_step_ms(self, draft: list[int]) -> float | None:
        """By the difference of long and short proposals of the adapter, each token of which takes a
        step.
        """
        drafter = self.decoders["adapter"].drafter
        drafter.begin(draft, self.question)
        many = len(drafter.propose([], PROPOSED))
        if not drafter.costs.adapter_step_s or many < 3:
            return None
        long_s, short_s = (median_s(functools.partial(drafter.propose, [], tokens), self.device)
                           for tokens in (many, 2))
        return 1000 * (long_s - short_s) / (many - 2)

    def memory_mib(self) -> dict:
        return {"before": self.memory_before, "peak": memory(self.device)["peak"],
                "keys_and_values": self.target.steps.bytes / 2**20}
