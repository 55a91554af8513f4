"""Speculative decoding of one answer: the rules that verify proposals, the decode loop, and what its parts cost.

Whatever a drafter (drafting/contract.py) proposes, the answer is the target's own.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from drafting.contract import Drafter, matching

REPEATS = 7                        # a cost is the median of so many


# ------------------------------------------------------------------------------------------------ decode loop
@dataclasses.dataclass
class Decoded:
    """One answer and how it came about; pass 0 is the prefill."""

    tokens: list[int]
    proposed: list[int] = dataclasses.field(default_factory=list)     # tokens proposed to each pass of the target
    accepted: list[int] = dataclasses.field(default_factory=list)     # and how many of them were right
    draft_s: float = 0.0             # seconds in the drafter, learning included
    prefill_s: float = 0.0           # in the prefill
    verify_s: float = 0.0            # in all other passes


def greedy(answer: list[int], proposed: list[int], following) -> list[int]:
    """The right proposals and the target's own next token: just what greedy decoding would have said.

    following.best (k + 1,): what the target says after the prefix and after each proposal.
    """
    best = following.best.tolist()
    return best[:matching(proposed, best) + 1]


class Sampling:
    """Lossless sampling (Leviathan et al. 2023; Chen et al. 2023) at a temperature; proposals are single tokens.

    With all of the drafter's weight on one token, it is kept with the target's chance of it; if it is not, the token
    comes from the target's distribution without it. Together that is the target's own distribution.
    """

    def __init__(self, temperature: float, seed: int):
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, answer: list[int], proposed: list[int], following) -> list[int]:
        chances, emitted = F.softmax(following.logits.double().cpu() / self.temperature, -1), []
        for row, token in zip(chances, [*proposed, None]):
            if token is not None and float(torch.rand((), generator=self.generator)) < float(row[token]):
                emitted.append(token)
                continue
            if token is not None:
                row[token] = 0.0
            return [*emitted, int(torch.multinomial(row, 1, generator=self.generator))]
        raise AssertionError("the last row always ends the loop")


def decode(target, drafter: Drafter, max_new_tokens: int, eos: int, gamma: int,
           price: Callable[[], float] = lambda: 0.0, rule: Callable = greedy) -> Decoded:
    """One answer by speculative decoding: the target's own, whatever the drafter proposes.

    target: prefill(proposed) and verify(tokens) -> what follows the last known token and each proposal (`best`
    (k + 1,) ids, `logits` (k + 1, V)); keep(n): forget all but the prompt and n tokens of the answer; vocab_size. eos
    and the length end the answer exactly where they end plain decoding. gamma: proposals a pass at most; price: asked
    before each pass, the tokens that a second is worth, 0 if drafting costs nothing.
    """
    found = Decoded([])
    while True:
        start, answer = time.perf_counter(), found.tokens
        room = min(gamma, max_new_tokens - len(answer) - 1)            # the last token is always the target's own
        proposed = drafter.propose(answer, room, price()) if room > 0 else []
        proposed = list(itertools.takewhile(lambda token: 0 <= token < target.vocab_size, proposed))
        between = time.perf_counter()
        if answer:
            target.keep(len(answer) - 1)
            following = target.verify([answer[-1], *proposed])
        else:
            following = target.prefill(proposed)
        emitted = rule(answer, proposed, following)
        if eos in emitted:
            emitted = emitted[:emitted.index(eos) + 1]
        end = time.perf_counter()
        found.draft_s += between - start
        if answer:
            found.verify_s += end - between
        else:
            found.prefill_s = end - between
        found.proposed.append(len(proposed))
        found.accepted.append(matching(emitted, proposed))
        found.tokens = answer + emitted
        if found.tokens[-1] == eos or len(found.tokens) >= max_new_tokens:
            start = time.perf_counter()
            drafter.learn(found.tokens)
            found.draft_s += time.perf_counter() - start
            return found


# ------------------------------------------------------------------------------------------- checks and costs
def judge(ours: list[int], plain: list[int], target, embeds, noise: float) -> dict:
    """exact; else tie or WRONG, with the first difference and the gap between the target's two best logits there.

    A tie is when rounding explains all of it: at the first difference both tokens lie within the noise of the
    target's best, and so does each of ours from there on, given ours before it (the plain answer went elsewhere).
    """
    if ours == plain:
        return {"verdict": "exact"}
    at = matching(ours, plain)
    found = {"position": at, "gap": None, "ours": ours[at:at + 1], "plain": plain[at:at + 1]}
    if at == min(len(ours), len(plain)):                        # one goes on where the other ends: no rounding does
        return {"verdict": "WRONG", **found}
    target.ask(embeds)
    logits = target.prefill(ours[:-1]).logits[at:].float()                    # what the target says from there on
    said = logits.gather(1, torch.tensor(ours[at:], device=logits.device)[:, None])[:, 0]
    lacking = [*(logits.max(-1).values - said).tolist(), float(logits[0].max() - logits[0, plain[at]])]
    first, second = logits[0].topk(2).values.tolist()
    found["gap"] = first - second if math.isfinite(first - second) else None
    return {"verdict": "tie" if all(lack <= noise for lack in lacking) else "WRONG", **found}     # NaN is no tie


def timed(work: Callable, device) -> tuple:
    """(what work() returns, seconds), with the device done before and after."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - start


def milliseconds(seconds: dict) -> dict:
    return {key: milliseconds(value) if isinstance(value, dict) else 1000 * value for key, value in seconds.items()}


def median_s(work: Callable, device) -> float:
    return statistics.median(timed(work, device)[1] for _ in range(REPEATS))


def measure_costs(target, model, pixels, question: str, device, sizes) -> dict:
    """Seconds of vision (with the prompt's embedding), prefill, and one pass over k tokens for each k in sizes."""
    embeds = model.prompt_embeds(pixels, question)
    target.ask(embeds)
    target.prefill([])

    def one(k: int) -> None:
        target.keep(0)
        target.verify([0] * k).best.tolist()

    for _ in range(3 * REPEATS):                     # a GPU that has waited is slow for its first passes
        one(1)
    verify = {k: median_s(lambda k=k: one(k), device) for k in sizes}
    return {"vision": median_s(lambda: model.prompt_embeds(pixels, question), device),
            "prefill": median_s(lambda: target.prefill([]).best.tolist(), device), "verify": verify}


def rounding(target, model, embeds, tokens: list[int]) -> float:
    """The largest difference of a logit between four ways to reckon it: one by one, together, in the prefill, and by
    transformers' own forward. This is the noise of the number format on this device; it decides what a tie is.
    """
    target.ask(embeds)
    tokens = tokens[:17]
    target.prefill([])
    # Copies: a graph writes its next logits over these.
    one_by_one = torch.cat([target.verify([token]).logits.float().clone() for token in tokens])
    target.keep(0)
    others = [target.verify(tokens).logits.float().clone(), target.prefill(tokens).logits[1:].float()]
    decoder, head = model.decoder
    with torch.inference_mode():
        whole = torch.cat([embeds, target.steps.embed(tokens)], 1)
        others.append(head(decoder(inputs_embeds=whole).last_hidden_state[0, -len(tokens):]).float())
    return float(max((one_by_one - other).abs().max() for other in others))


@dataclasses.dataclass
class Pace:
    """--gamma auto: what a second is worth, in tokens, by what it brought so far; begins with plain steps.

    Renewal-reward: the stopping rule that gives most tokens a second compares each cost with that very average.
    """

    seconds: float                     # of one plain step, for one token
    tokens: int = 1

    def price(self) -> float:
        return self.tokens / self.seconds

    def add(self, found: Decoded) -> None:
        self.seconds += found.draft_s + found.verify_s
        self.tokens += len(found.tokens)
