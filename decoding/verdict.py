"""Whether an answer is that of plain decoding: exact, a tie within rounding, or WRONG."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from decoding.contracts import Target
from drafting.contract import matching


def as_they_are(logits: torch.Tensor, first: int) -> torch.Tensor:
    """The scores of greedy decoding."""
    return logits


def judge(ours: list[int], plain: list[int], target: Target, prompt: Any, noise: float,
          scores: Callable[[torch.Tensor, int], torch.Tensor] = as_they_are) -> dict:
    """The verdict; unless exact also position, gap and tokens of the first difference.

    scores(logits (n, V), first position): what the largest of is chosen; of sampling, logits with the
    noise of its seed (rules.py:Sampling.scores).

    A tie: rounding explains the whole difference. At the first difference both tokens lie within
    the noise below the target's largest logit, and so does each of ours from there on, given ours
    before it (the plain answer went elsewhere). gap: between the two largest logits at the first
    difference. A NaN, or noise that is NaN, is no tie.
    """
    if ours == plain:
        return {"verdict": "exact"}
    at = matching(ours, plain)
    difference = {"position": at, "gap": None, "ours": ours[at:at + 1], "plain": plain[at:at + 1]}
    # one goes on where the other ends: rounding does not explain it
    if at == min(len(ours), len(plain)):
        return {"verdict": "WRONG", **difference}
    target.ask(prompt)
    # row k decides our token at + k
    logits = scores(target.prefill(ours[:-1]).logits[at:].float(), at)
    chosen = logits.gather(1, torch.tensor(ours[at:], device=logits.device)[:, None])[:, 0]
    below_best = [
        *(logits.max(-1).values - chosen).tolist(),
        float(logits[0].max() - logits[0, plain[at]])
    ]
    first, second = logits[0].topk(2).values.tolist()
    if math.isfinite(first - second):
        difference["gap"] = first - second
    is_tie = all(below <= noise for below in below_best)
    return {"verdict": "tie" if is_tie else "WRONG", **difference}
