"""Training, validation and test pairs: whole drives apart, in stream order, with warnings about
what is doubtful.

Validation is cut from training; the test pairs decide nothing. Imports no torch: `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from base import UserError, drive_of, log
from pairs.formats import load_pairs
from pairs.pairs import Pairs, digest, numbered, numbered_drives
from pairs.tokenizers import Tokenizers

MAX_VOCAB_SIZE = 2**20         # four times the largest vocabulary in use: an id beyond it is damage
# Of target answers of LONG_ANSWER or more tokens, 3 % recur word for word in another drive of the
# real 1s pairs and none in the demo's; under a random split 22 to 39 % do.
REPEATED_SHARE, LONG_ANSWER = 0.1, 20


@dataclasses.dataclass(frozen=True)
class ValidationSplit:
    """How validation pairs are cut from the training pairs."""

    fraction: float                  # of the training pairs
    seed: int                        # of the order in which drives are considered


class Training(NamedTuple):
    """The pairs of a training."""

    train: Pairs                     # without the validation pairs
    all_train: Pairs                 # with them
    validation: Pairs


@dataclasses.dataclass(frozen=True)
class Data:
    train: Pairs | None              # without the validation pairs
    all_train: Pairs | None          # with them
    validation: Pairs | None         # None when nothing is trained
    test: Pairs                      # in clip order
    split: dict | None               # which drives went where
    files: dict                      # {"train": [report of each file], "test": [...]}
    warnings: list[str]              # sentences: why the figures are doubtful
    vocab_size: int | None           # as recorded in the files
    largest_ids: list                # (largest id, path) of each file

    @property
    def training(self) -> Training:
        """The pairs of a training; an error where nothing is trained."""
        assert self.train and self.all_train and self.validation
        return Training(self.train, self.all_train, self.validation)

    @property
    def tokenizers(self) -> Tokenizers:
        """Those of all files."""
        known = self.test.tokenizers
        return self.all_train.tokenizers.joined(known) if self.all_train else known

    @property
    def drafts_are_text(self) -> bool:
        """Whether the drafts of training are text in the target's tokens."""
        known = self.all_train.tokenizers if self.all_train else self.tokenizers
        return bool(self.all_train and self.all_train.has_drafts) and known.are_same is not False

    @property
    def largest_draft_ids(self) -> list[tuple[int, str]]:
        """(largest id of a draft, path) of each file."""
        files = [*self.files["train"], *self.files["test"]]
        return [(file["largest_draft_id"], file["path"]) for file in files]


def load_data(train_paths: list[Path] | None, test_paths: list[Path],
              split: ValidationSplit | None = None, max_train_samples: int = -1,
              bos_id: int | None = None) -> Data:
    """Read, check and split the pairs, and log what is doubtful about them.

    split: None when nothing is trained. max_train_samples: use only the first pairs of the training
    files; -1: all.
    bos_id: as for load_pairs.
    """
    train = load_pairs(train_paths, bos_id) if train_paths else None
    test = load_pairs(test_paths, bos_id)
    if train:
        train.tokenizers.check(test.tokenizers, train.files[0]["path"], test.files[0]["path"])
    both = [pairs for pairs in (train, test) if pairs]
    files = {"train": train.files if train else [], "test": test.files}
    warnings = overlap_warnings(train, test) if train else []
    warnings += [f"{count} of {file['used']} rows of {file['path']}: {flag}"
                 for pairs in both for file in pairs.files
                 for flag, count in file["flagged"].items() if 2 * count > file["used"]]
    for warning in warnings:
        log(f"data | WARNING | {warning}")
    vocab_size = max((pairs.vocab_size for pairs in both if pairs.vocab_size), default=None)
    largest_ids = [largest for pairs in both for largest in pairs.largest_ids()]
    test = in_clip_order(test)
    all_train = validation = description = None
    if train and max_train_samples != -1:
        train = train.select(np.arange(min(max_train_samples, len(train))))
    if train and split:
        train_rows, validation_rows, description = split_validation(train, split.fraction, split.seed)
        all_train, validation = train, train.select(validation_rows)
        train = train.select(train_rows)
        log(f"split | train {len(train)} validation {len(validation)} test {len(test)} | "
            f"validation by {description['by']}: {', '.join(description['validation'])}")
    return Data(train, all_train or train, validation, test, description, files, warnings,
                vocab_size, largest_ids)


# -------------------------------------------------------------------------------------------- order
def natural_key(name: int | str) -> str:
    """Sorts names as people count, numbers by value: clip_9 before clip_10.

    Each number gets its length in front: "clip_9" -> "clip_0000019".
    """
    def with_length(number: re.Match) -> str:
        digits = number[0].lstrip("0")
        return f"{len(digits):06}{digits}"

    return re.sub("[0-9]+", with_length, str(name))


def clip_order(sequences: list[str], clips: list[int | str]) -> np.ndarray:
    """(N,) row numbers in stream order.

    Sequences come in the order of their first rows, the clips of each in natural order.
    """
    by_clip = np.argsort(_sortable(clips), kind="stable")
    first_rows: dict[str, int] = {}
    rank = np.array([first_rows.setdefault(name, len(first_rows)) for name in sequences], np.int64)
    return by_clip[np.argsort(rank[by_clip], kind="stable")]


def _sortable(clips: list[int | str]) -> np.ndarray:
    """(N,) keys in natural order: the numbers themselves where all clips are numbers."""
    if all(type(clip) is int for clip in clips):
        return np.array(clips, np.int64)
    keys = [natural_key(clip) for clip in clips]
    rank = {key: i for i, key in enumerate(sorted(set(keys)))}
    return np.array([rank[key] for key in keys], np.int64)


def in_clip_order(pairs: Pairs) -> Pairs:
    return pairs.select(clip_order(pairs.sequence, pairs.clip))


# -------------------------------------------------------------------------------------------- split
def split_validation(pairs: Pairs, fraction: float,
                     seed: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """(train rows, validation rows, description): whole drives, else whole sequences, else the last
    block of clips.

    Clips overlap their neighbours by half and the segments of a drive show one road: validation by
    a random split would be marked with answers that were trained on. Drives come in seeded order,
    and one is taken when it brings the share closer to `fraction`.
    """
    if len(pairs) < 2:
        raise UserError("the training files hold 1 usable pair, wanted 2 or more: to train and to "
                        "validate")
    for by, number in (("drive", numbered_drives), ("sequence", numbered)):
        names, group = number(pairs.sequence)
        if len(names) < 2:
            continue
        chosen = _groups_near(np.bincount(group), fraction * len(pairs), seed)
        in_validation = np.isin(group, chosen)
        labels = [name or "(no sequence name)" for name in names]
        return np.flatnonzero(~in_validation), np.flatnonzero(in_validation), {
            "by": by, "validation": sorted(labels[i] for i in chosen),
            "train": [label for i, label in enumerate(labels) if i not in set(chosen)]}
    size = min(max(1, round(fraction * len(pairs))), len(pairs) - 1)
    rows = clip_order(pairs.sequence, pairs.clip)
    return np.sort(rows[:-size]), np.sort(rows[-size:]), {
        "by": "last block of rows", "validation": [f"the last {size} pairs"],
        "train": [f"the first {len(pairs) - size} pairs"]}


def _groups_near(sizes: np.ndarray, wanted: float, seed: int) -> list[int]:
    """Groups in seeded order whose sizes sum up to about `wanted`: at least one, never all."""
    chosen, rows = [], 0
    for i in np.random.default_rng(seed).permutation(len(sizes)):
        more = rows + sizes[i]
        if more < sizes.sum() and abs(more - wanted) < abs(rows - wanted):
            chosen.append(i)
            rows = more
    return chosen or [sizes.argmin()]


def shortened(pairs: Pairs, samples: int) -> Pairs:
    """At most `samples` pairs: the first clips of every sequence, in proportion."""
    if len(pairs) <= samples:
        return pairs
    _, sequence = numbered(pairs.sequence)
    size, order = np.bincount(sequence), np.argsort(sequence, kind="stable")
    before = np.empty(len(pairs))                     # number of earlier pairs of the same sequence
    before[order] = np.arange(len(pairs)) - (np.cumsum(size) - size)[sequence[order]]
    share_before = before / size[sequence]
    return pairs.select(np.sort(np.argsort(share_before, kind="stable")[:samples]))


# ------------------------------------------------------------------------------------------- checks
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
        if repeated > REPEATED_SHARE:
            warnings.append(
                f"{repeated:.0%} of {len(long)} test answers of {LONG_ANSWER} or more tokens are "
                "training answers word for word, far more than separate drives have in common: "
                "most likely a random split, which inflates acceptance")
    return warnings


def _digests_of_long(pairs: Pairs) -> np.ndarray:
    """uint64, for each target answer of LONG_ANSWER or more tokens; the answers themselves would
    take too much.
    """
    long = (tokens for tokens in pairs.views("target") if len(tokens) >= LONG_ANSWER)
    return np.fromiter((digest(tokens.data) for tokens in long), np.uint64)


def check_ids(largest_ids: list[tuple[int, str]], size: int, advice: str) -> None:
    """A UserError if a file holds an id outside a vocabulary of this size."""
    largest, path = max(largest_ids)
    if largest >= size:
        raise UserError(f"{path} holds the token id {largest}, wanted ids below the vocabulary "
                        f"size {size}; {advice}")


def check_drafts(pairs: Pairs, conditioning: str) -> None:
    """A UserError if no pair has a draft and the conditioning reads it."""
    if conditioning != "prefix" and not pairs.has_drafts:
        raise UserError(f"{pairs.files[0]['path']} holds no draft token at all, which "
                        f"{conditioning} conditioning reads; wanted pairs with drafts, or "
                        "--conditioning prefix")


Conditioning = Literal["auto", "prefix+draft", "prefix", "draft"]


def conditioning_for(wanted: Conditioning, data: Data) -> Conditioning:
    """The conditioning to train in: as wanted; auto: prefix+draft, or prefix where no pair has drafts.

    Raises UserError where the one that is wanted reads drafts and there are none.
    """
    both = [pairs for pairs in (data.all_train, data.test) if pairs]
    if wanted == "auto":
        without = next((pairs for pairs in both if not pairs.has_drafts), None)
        if without is None:
            return "prefix+draft"
        log(f"train | {without.files[0]['path']} holds no drafts: --conditioning prefix, which reads "
            "none")
        return "prefix"
    for pairs in both:
        check_drafts(pairs, wanted)
    return wanted
