"""Speculative decoding simulated: a drafter streams over known answers, and its hits say how many
passes remain.
"""

import time

import numpy as np

from acceptance.intervals import by_drive, interval
from acceptance.metrics import blocks, expected_tokens, measure, number_right
from drafting.contract import SimulatedDrafter
from drafting.tree import Branching, build_tree
from pairs.pairs import Pairs

SIMULATED_GAMMAS = (1, 2, 3, 5, 8, 12)
QUESTION_GAMMA, MAX_QUESTIONS = 8, 100         # of figures by question
PASSES_SHOWN = (5, 10, 15, 20, 30)


def simulate(top1: np.ndarray, lengths: np.ndarray, gamma: int) -> dict:
    """Greedy speculative decoding of N answers with gamma proposals a pass, computed from the hits
    alone.

    top1 (N, T) bool: the proposal for that position, given the true tokens before it, is right.
    Nothing else matters: after a wrong proposal the rest of a round is discarded. The prefill is a
    pass too, with the opening proposals verified inside it; each pass emits its accepted proposals
    and one token of the target's own, unless the answer ends before that.
    """
    passes, histogram = np.zeros(len(lengths), np.int64), np.zeros(gamma + 1, np.int64)
    for rows in blocks(*top1.shape):
        passes[rows] = _passes(top1[rows], lengths[rows], gamma, histogram)
    return {"tau": float(lengths.sum() / passes.sum()), "tau_mean": float((lengths / passes).mean()),
            "accepted_lengths": histogram.tolist(), "passes": passes}


def _passes(top1: np.ndarray, lengths: np.ndarray, gamma: int, histogram: np.ndarray) -> np.ndarray:
    """(B,) passes of each answer; all advance together. Accepted lengths are counted into
    `histogram`.
    """
    inside = np.arange(top1.shape[1]) < lengths[:, None]
    right = np.pad(top1 & inside, ((0, 0), (0, 1)))
    run = np.zeros(right.shape, np.int64)  # right proposals in a row from each position on
    for position in range(top1.shape[1] - 1, -1, -1):
        run[:, position] = np.where(right[:, position], run[:, position + 1] + 1, 0)
    rows = np.arange(len(lengths))
    at = np.zeros(len(lengths), np.int64)
    passes = at.copy()
    while (going := at < lengths).any():
        # Past the width that was proposed for, nothing is accepted and each pass emits one token.
        accepted = np.where(going, np.minimum(run[rows, np.minimum(at, top1.shape[1])], gamma), 0)
        histogram += np.bincount(accepted[going], minlength=gamma + 1)
        at = np.where(going, at + accepted + 1, at)
        passes += going
    return passes


def by_question(top1: np.ndarray, lengths: np.ndarray, question: np.ndarray | None) -> dict:
    """Number of each question -> answers, alpha and tau; {} where fewer than two are known."""
    numbers = np.unique(question[question >= 0]) if question is not None else np.zeros(0, np.int32)
    if not 2 <= len(numbers) <= MAX_QUESTIONS:
        return {}
    figures = {}
    for number in numbers.tolist():
        rows = np.flatnonzero(question == number)
        hits = number_right(top1[rows], lengths[rows])
        figures[str(number)] = {"answers": len(rows), "alpha": float(hits.sum() / lengths[rows].sum()),
                                "tau": simulate(top1[rows], lengths[rows], QUESTION_GAMMA)["tau"]}
    return figures


def stream(drafter: SimulatedDrafter, pairs: Pairs) -> dict:
    """Let a drafter propose for every answer in clip order and learn each answer afterwards; all
    its figures.

    "top1": (N, T) bool hits, for further figures; everything else goes to results.json.
    """
    lengths = pairs.lengths("target")
    top1 = np.zeros((len(pairs), int(lengths.max())), bool)
    top5, start = top1.copy(), time.monotonic()
    for number, target in enumerate(pairs.views("target")):
        right = drafter.predict(number) == target[:, None]
        top1[number, :len(target)], top5[number, :len(target)] = right[:, 0], right.any(1)
        drafter.learn(number)
    seconds = time.monotonic() - start
    simulated = {}
    for gamma in SIMULATED_GAMMAS:
        decoding = simulate(top1, lengths, gamma)
        passes = decoding.pop("passes")
        decoding["more_passes_than"] = {str(n): float((passes > n).mean()) for n in PASSES_SHOWN}
        simulated[str(gamma)] = decoding
    metrics, hits = measure(top1, lengths, top5), number_right(top1, lengths)
    return {"top1": top1, **metrics, "simulated": simulated,
            "expected_by_gamma": {str(gamma): expected_tokens(metrics["alpha"], gamma)
                                  for gamma in SIMULATED_GAMMAS},
            "interval": interval(hits, lengths, pairs.sequence),
            "questions": by_question(top1, lengths, pairs.question),
            "drives": by_drive(hits, lengths, pairs.sequence), "seconds_per_answer": seconds / len(pairs)}


def simulate_trees(drafter: Branching, pairs: Pairs, nodes: int, streaming: bool = True) -> dict:
    """Speculative decoding of these answers with a tree of so many nodes a pass.

    drafter: a live drafter that can branch; it builds each tree as in decoding. streaming: it learns
    each answer.

    "tau": tokens a pass, the prefill a pass too; "nodes" and "depth" of a tree on average;
    "seconds_per_node".
    """
    passes = tokens = built = depth = 0
    seconds = 0.0
    for number, target in enumerate(pairs.answers("target")):
        drafter.begin(pairs.answer("draft", number))
        at = 0
        while at < len(target):
            start = time.perf_counter()
            tree = build_tree(drafter, target[:at], nodes)
            seconds += time.perf_counter() - start
            at += tree.accepted(target[at:]) + 1
            passes, built, depth = passes + 1, built + len(tree.tokens), depth + tree.depth()
        if streaming:
            drafter.learn(target)
        tokens += len(target)
    return {"tau": tokens / passes, "passes": passes, "nodes": built / passes, "depth": depth / passes,
            "seconds_per_node": seconds / max(built, 1)}
