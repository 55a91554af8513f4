"""Whether an answer is that of plain decoding: exact, a tie within rounding, or WRONG."""

from __future__ import annotations

import math
from typing import Any

import torch

from decoding.contracts import Target
from drafting.contract import matching


def judge(ours: list[int], plain: list[int], target: Target, prompt: Any, noise: float) -> dict:
    """The verdict; unless exact also position, gap and tokens of the first difference.

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
    logits = target.prefill(ours[:-1]).logits[at:].float()
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
