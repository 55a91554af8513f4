"""How often proposals are right: one definition of every metric.

Every target position counts, position 0 too. A position without a proposal (past the draft's end in
plain copying, past --max_seq_len for an adapter, before a checkpoint's first position) is a miss
and never left out.

The expected tokens for each target pass follow Leviathan et al. 2023, "Fast Inference from
Transformers via Speculative Decoding", equation 1. It takes positions for independent; those of
answers by template are not.
"""

from collections.abc import Iterator

import numpy as np

GAMMAS = range(1, 11)
# of answers that are worked on at a time, padding included: 8,192 of 128 tokens
BLOCK_POSITIONS = 2**20


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens for each target pass when each of gamma proposals is right with probability alpha,
    independently.
    """
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def rows_of_block(width: int) -> int:
    """How many answers of up to `width` tokens are worked on at a time."""
    return max(1, BLOCK_POSITIONS // width)


def blocks(count: int, width: int) -> Iterator[slice]:
    """Rows 0 to count in slices: what is computed of a slice stays small beside the hits
    themselves.
    """
    size = rows_of_block(width)
    return (slice(first, first + size) for first in range(0, count, size))


def number_right(top1: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(N,) int64 right proposals within each answer; top1 (N, T) bool, lengths (N,)."""
    right = np.empty(len(lengths), np.int64)
    for rows in blocks(*top1.shape):
        right[rows] = (top1[rows] & (np.arange(top1.shape[1]) < lengths[rows, None])).sum(1)
    return right


class Tally:
    """Counts of right proposals by position, added block by block, and the metrics that follow from
    them.
    """

    def __init__(self, width: int):
        """width: tokens of the longest answer."""
        self.answers = self.run = 0
        self.count, self.right1, self.right5 = (np.zeros(width, np.int64) for _ in range(3))

    def add(self, lengths: np.ndarray, top1: np.ndarray, top5: np.ndarray | None = None) -> None:
        """lengths (B,): tokens of each answer; top1, top5 (B, T) bool: right at that position.
        Positions past T are misses; past an answer's end the hits are ignored."""
        width = min(top1.shape[1], len(self.count))
        inside = np.arange(width) < lengths[:, None]
        right = top1[:, :width] & inside
        self.answers += len(lengths)
        self.run += int(np.where(right.all(1), width, right.argmin(1)).sum())
        self.right1[:width] += right.sum(0)
        if top5 is not None:
            self.right5[:width] += (top5[:, :width] & inside).sum(0)
        # than 0, 1, ... tokens
        longer = len(lengths) - np.bincount(lengths, minlength=len(self.count) + 1).cumsum()
        self.count += longer[:len(self.count)]

    def metrics(self, with_top5: bool = True) -> dict:
        positions = int(self.count.sum())
        alpha = float(self.right1.sum() / positions)
        return {
            "alpha": alpha,
            "top5": float(self.right5.sum() / positions) if with_top5 else None,
            "first_token": float(self.right1[0] / self.answers),
            "mean_run": self.run / self.answers,
            "expected_tokens": {str(gamma): expected_tokens(alpha, gamma) for gamma in GAMMAS},
            "per_position": {
                "count": self.count.tolist(),
                "alpha": (self.right1 / self.count).tolist(),
                "top5": (self.right5 / self.count).tolist() if with_top5 else None,
            },
        }


def measure(top1: np.ndarray, lengths: np.ndarray, top5: np.ndarray | None = None) -> dict:
    """All metrics of one drafter on N answers of lengths (N,), uncut; top1, top5 (N, T) bool as for
    Tally.add.
    """
    tally = Tally(int(lengths.max()))
    for rows in blocks(*top1.shape):
        tally.add(lengths[rows], top1[rows], None if top5 is None else top5[rows])
    return tally.metrics(with_top5=top5 is not None)
