"""What is trained on, validated on and tested on: pairs in stream order, whole drives apart, and what is doubtful.

Validation is cut from training; the test pairs decide nothing. Imports no torch, so that `--help` stays quick.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from base import UserError, drive_of, log
from pairs.formats import Pairs, digest, load_pairs, numbered, numbered_drives

MAX_VOCAB_SIZE = 2**20               # four times the largest vocabulary in use: an id beyond is damage, not a word
REPEATED, LONG_ANSWER = 0.1, 20      # of answers that long, 3 % recur word for word in another drive's of the real
                                     # 1s pairs and none of the demo's; in a random split 22 to 39 % do


@dataclasses.dataclass(frozen=True)
class Data:
    train: Pairs | None              # without the validation pairs
    all_train: Pairs | None          # with them
    validation: Pairs | None         # None when nothing is trained
    test: Pairs
    split: dict | None               # which drives went where
    files: dict                      # {"train": [report of each file], "test": [...]}
    warnings: list[str]              # what makes the figures doubtful
    vocab_size: int | None           # as recorded in the files
    largest_ids: list                # (largest id, path) of each file


def load_data(config) -> Data:
    """Read, check and split the pairs, and log what is doubtful about them.

    config: a TrainConfig; of its fields train_benchmark, test_benchmark, checkpoint, max_train_samples, val_fraction
    and seed are read.
    """
    train = load_pairs(config.train_benchmark) if config.train_benchmark else None
    test = load_pairs(config.test_benchmark)
    read = [pairs for pairs in (train, test) if pairs]
    files = {"train": train.files if train else [], "test": test.files}
    warnings = overlap_warnings(train, test) if train else []
    warnings += [f"{n} of {file['used']} rows of {file['path']}: {flag}" for pairs in read for file in pairs.files
                 for flag, n in file["flagged"].items() if 2 * n > file["used"]]
    for warning in warnings:
        log(f"data | WARNING | {warning}")
    vocab_size = max((pairs.vocab_size for pairs in read if pairs.vocab_size), default=None)
    largest_ids = [found for pairs in read for found in pairs.largest_ids()]
    test = in_clip_order(test)
    all_train = validation = split = None
    if train and config.max_train_samples != -1:
        train = train.select(np.arange(min(config.max_train_samples, len(train))))
    if train and not config.checkpoint:
        train_rows, validation_rows, split = split_validation(train, config.val_fraction, config.seed)
        all_train, train, validation = train, train.select(train_rows), train.select(validation_rows)
        log(f"split | train {len(train)} validation {len(validation)} test {len(test)} | validation by "
            f"{split['by']}: {', '.join(split['validation'])}")
    return Data(train, all_train or train, validation, test, split, files, warnings, vocab_size, largest_ids)


def clip_order(sequences: list[str], clips: list[int | str]) -> np.ndarray:
    """(N,) row numbers as a stream brings them: sequences as they appear, the clips of each as they were driven."""
    names, seen = [str(clip).zfill(12) for clip in clips], {}
    by_clip = np.array(sorted(range(len(clips)), key=names.__getitem__), np.int64)
    appeared = np.array([seen.setdefault(name, len(seen)) for name in sequences], np.int64)
    return by_clip[np.argsort(appeared[by_clip], kind="stable")]


def in_clip_order(pairs: Pairs) -> Pairs:
    return pairs.select(clip_order(pairs.sequence, pairs.clip))


def split_validation(pairs: Pairs, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """(train rows, validation rows, description): whole drives, else sequences, else the last block of rows.

    Clips overlap their neighbours by half and the segments of a drive show one road: a random split would be
    marked with answers that were trained on. Drives come in seeded order, and one is taken when that brings
    the share closer to `fraction`.
    """
    if len(pairs) < 2:
        raise UserError("the training files hold 1 usable pair, wanted 2 or more: to train and to validate")
    for by, (names, group) in (("drive", numbered_drives(pairs.sequence)), ("sequence", numbered(pairs.sequence))):
        if len(names) < 2:
            continue
        sizes, taken, rows, wanted = np.bincount(group), [], 0, fraction * len(pairs)
        for i in np.random.default_rng(seed).permutation(len(names)):
            more = rows + sizes[i]
            if more < len(pairs) and abs(more - wanted) < abs(rows - wanted):
                taken.append(i)
                rows = more
        taken = taken or [sizes.argmin()]
        chosen, apart = np.isin(group, taken), set(taken)
        labels = [name or "(no sequence name)" for name in names]
        return np.flatnonzero(~chosen), np.flatnonzero(chosen), {
            "by": by, "validation": sorted(labels[i] for i in taken),
            "train": [label for i, label in enumerate(labels) if i not in apart]}
    size = min(max(1, round(fraction * len(pairs))), len(pairs) - 1)
    rows = np.arange(len(pairs))
    return rows[:-size], rows[-size:], {"by": "last block of rows", "validation": [f"the last {size} pairs"],
                                        "train": [f"the first {len(pairs) - size} pairs"]}


def overlap_warnings(train: Pairs, test: Pairs) -> list[str]:
    """What train and test have in common, as sentences."""
    paths = [{str(Path(file["path"]).resolve()) for file in pairs.files} for pairs in (train, test)]
    sequences = [set(pairs.sequence) - {""} for pairs in (train, test)]
    drives = [{drive_of(name) for name in names} for names in sequences]
    warnings = []
    for kind, (ours, theirs) in (("files", paths), ("sequences", sequences), ("drives", drives)):
        if ours & theirs:
            warnings.append(f"train and test share {len(ours & theirs)} {kind}: "
                            f"{', '.join(sorted(ours & theirs))}")
    if "" in train.sequence or "" in test.sequence:
        warnings.append("rows without a sequence name: whether train and test share a drive can't be seen")
        known, long = _digests_of_long(train), _digests_of_long(test)
        repeated = np.isin(long, known).sum() / max(len(long), 1)
        if repeated > REPEATED:
            warnings.append(
                f"{repeated:.0%} of {len(long)} test answers of {LONG_ANSWER} or more tokens are training answers "
                "word for word, far more than separate drives have in common: most likely a random split, which "
                "inflates acceptance")
    return warnings


def _digests_of_long(pairs: Pairs) -> np.ndarray:
    """uint64, one for each target answer of LONG_ANSWER or more tokens: answers themselves would be too many."""
    return np.fromiter((digest(tokens) for tokens in pairs.views("target") if len(tokens) >= LONG_ANSWER), np.uint64)


def shortened(pairs: Pairs, samples: int) -> Pairs:
    """At most so many pairs: of every sequence its first clips, in proportion, so that neighbours stay neighbours."""
    if len(pairs) <= samples:
        return pairs
    _, sequence = numbered(pairs.sequence)
    size, order = np.bincount(sequence), np.argsort(sequence, kind="stable")
    before = np.empty(len(pairs))                            # pairs of the same sequence before each
    before[order] = np.arange(len(pairs)) - (np.cumsum(size) - size)[sequence[order]]
    share_before = before / size[sequence]
    return pairs.select(np.sort(np.argsort(share_before, kind="stable")[:samples]))


def check_ids(largest_ids: list[tuple[int, str]], size: int, advice: str) -> None:
    largest, path = max(largest_ids)
    if largest >= size:
        raise UserError(f"{path} holds the token id {largest}, wanted ids below the vocabulary size {size}; "
                        f"{advice}")


def check_drafts(pairs: Pairs) -> None:
    if not pairs.draft_length.any():
        raise UserError(f"{pairs.files[0]['path']} holds no draft token at all, and draft conditioning sees nothing "
                        "else; wanted drafts, or --conditioning prefix")
