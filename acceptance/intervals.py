"""How far an acceptance rate can be trusted: bootstrap over sequences, and each drive left out in
turn.

Clips of one drive resemble each other: intervals over single answers would be far too narrow.
"""

import numpy as np

from pairs.pairs import numbered, numbered_drives

MIN_SEQUENCES = 8              # fewer say too little about their spread
CLIPS_TOGETHER = 20            # clips of a block, the unit then
BOOTSTRAPS = 2000
# group numbers of the bootstrap: all 2000 x 50,000 of a million clips are 800 MB
DRAWN_AT_A_TIME = 2**20


def interval(hits: np.ndarray, lengths: np.ndarray, sequences: list[str],
             other: np.ndarray | None = None) -> dict:
    """95 % interval of alpha, or of its difference to another drafter's on the same answers (paired
    bootstrap).

    hits, other: (N,) right proposals within each answer of lengths (N,). Whole sequences are
    resampled; with fewer than eight of them, blocks of 20 neighbouring clips. "left_out": the
    lowest and the highest value when any single drive is left out, None with one drive alone.
    """
    if other is not None:
        hits = hits - other
    drives, drive = numbered_drives(sequences)
    rest = _without_each(drive, hits, lengths) if len(drives) > 1 else None
    names, group = numbered(sequences)
    unit = "sequences"
    if len(names) < MIN_SEQUENCES:
        group, unit = np.arange(len(lengths)) // CLIPS_TOGETHER, f"blocks of {CLIPS_TOGETHER} clips"
    hits, positions = np.bincount(group, hits), np.bincount(group, lengths)
    low, high = np.quantile(_bootstrapped(hits, positions), (0.025, 0.975))
    return {"value": float(hits.sum() / positions.sum()), "low": float(low), "high": float(high), "by": unit,
            "left_out": None if rest is None else [float(rest.min()), float(rest.max())]}


def by_drive(hits: np.ndarray, lengths: np.ndarray, sequences: list[str]) -> dict:
    """alpha of each drive alone, and of all the others together when it is left out; hits as for
    `interval`.
    """
    drives, drive = numbered_drives(sequences)
    clips, alphas = np.bincount(drive), np.bincount(drive, hits) / np.bincount(drive, lengths)
    rest = _without_each(drive, hits, lengths) if len(drives) > 1 else None
    return {name: {"clips": int(clips[i]), "alpha": float(alphas[i]),
                   "without_it": None if rest is None else float(rest[i])} for i, name in enumerate(drives)}


def _without_each(drive: np.ndarray, hits: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(drives,) alpha of all other drives together when one is left out; drive (N,): each answer's
    drive number.
    """
    return (hits.sum() - np.bincount(drive, hits)) / (lengths.sum() - np.bincount(drive, lengths))


def _bootstrapped(hits: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(BOOTSTRAPS,) alphas of groups drawn with replacement; hits, positions (groups,)."""
    random, at_a_time = np.random.default_rng(0), max(1, DRAWN_AT_A_TIME // len(hits))
    alphas = []
    for first in range(0, BOOTSTRAPS, at_a_time):
        drawn = random.integers(len(hits), size=(min(at_a_time, BOOTSTRAPS - first), len(hits)))
        alphas.append(hits[drawn].sum(1) / positions[drawn].sum(1))
    return np.concatenate(alphas)
