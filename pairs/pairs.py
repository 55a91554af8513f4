"""Pairs: draft and target tokens of many clips as flat arrays; their sequences and drives."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from base import drive_of
from pairs.tokenizers import UNKNOWN, Tokenizers

Which = Literal["draft", "target", "copy"]
BLOCK = 2**13    # pairs that are worked on at a time where an array over all of them would be large


@dataclasses.dataclass(frozen=True)
class Pairs:
    """N pairs of answers.

    The draft of pair i is draft[draft_start[i]:][:draft_length[i]], its target likewise.

    Generated tokens only: no prompt, no BOS; EOS where the model produced it. The flat arrays hold
    all tokens that were read, and every selection shares them: a flat array may hold tokens of
    pairs that are not selected.
    """

    draft: np.ndarray                # (all draft tokens,) int32
    draft_start: np.ndarray          # (N,) int64
    draft_length: np.ndarray         # (N,) int32
    target: np.ndarray               # (all target tokens,) int32
    target_start: np.ndarray         # (N,) int64
    target_length: np.ndarray        # (N,) int32
    sequence: list[str]              # (N) recordings, e.g. zurich_city_14_a; "" where unknown
    clip: list[int | str]            # (N) clip numbers, or names, within the sequence
    files: list[dict]                # of each file: path, format, rows, used, largest_id, ...
    vocab_size: int | None = None    # of the models, where the files record it
    tokenizers: Tokenizers = UNKNOWN
    # The drafts in the target's tokens, where both models have tokenizers of their own: what copying
    # proposes. None: the drafts themselves.
    copy: np.ndarray | None = None
    copy_start: np.ndarray | None = None
    copy_length: np.ndarray | None = None
    question: np.ndarray | None = None         # (N,) int32 number of each question; -1 or None: unknown

    @classmethod
    def of(cls, drafts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]],
           sequence: Sequence[str] = (), clip: Sequence[int | str] = ()) -> Pairs:
        """Pairs of token ids that are at hand, in lists or arrays; drafts may be empty.

        sequence: the recording of each pair, by which drives are told apart; clip: its number there.
        """
        assert len(drafts) == len(targets), (len(drafts), len(targets))
        return cls(*flat_of(drafts), *flat_of(targets), list(sequence) or [""] * len(targets),
                   list(clip) or [*range(len(targets))], [])

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def has_drafts(self) -> bool:
        """Whether any draft holds a token: pairs of the target alone have empty drafts."""
        return bool(self.draft_length.any())

    def lengths(self, which: Which) -> np.ndarray:
        """(N,) int64 number of tokens in each answer."""
        return self._flat(which)[2].astype(np.int64)

    def padded(self, which: Which, width: int) -> np.ndarray:
        """(N, width) int32: the answers cut at `width`, padded with 0; lengths tell the ends.

        Takes five times its own size for a moment: iterate over `parts` for very many pairs.
        """
        flat, start, length = self._flat(which)
        inside = np.arange(width) < length[:, None]
        out = np.zeros((len(self), width), np.int32)
        out[inside] = flat[(start[:, None] + np.arange(width))[inside]]
        return out

    def answer(self, which: Which, number: int) -> list[int]:
        """The tokens of pair `number`."""
        flat, start, length = self._flat(which)
        return flat[start[number]:start[number] + length[number]].tolist()

    def answers(self, which: Which) -> Iterator[list[int]]:
        """The token lists of all pairs, in order."""
        return (tokens.tolist() for tokens in self.views(which))

    def views(self, which: Which) -> Iterator[np.ndarray]:
        """The tokens of all pairs, in order, as int32 views of the flat array."""
        flat, start, length = self._flat(which)
        return (flat[first:first + count] for first, count in zip(start, length))

    def ids(self, which: Which) -> np.ndarray:
        """The distinct token ids of these answers, ascending, int32."""
        ids = np.zeros(0, np.int32)
        for part in self.parts():
            ids = np.union1d(ids, np.concatenate(list(part.views(which))))
        return ids

    def select(self, rows: np.ndarray) -> Pairs:
        """The pairs at these row numbers, in that order. No token is copied."""
        rows = np.asarray(rows, np.int64)
        parts = {f"{which}_{name}": getattr(self, f"{which}_{name}")[rows]
                 for which in ("draft", "target", *["copy"] * (self.copy is not None))
                 for name in ("start", "length")}
        question = None if self.question is None else self.question[rows]
        return dataclasses.replace(self, **parts, sequence=[self.sequence[i] for i in rows],
                                   clip=[self.clip[i] for i in rows], question=question)

    def parts(self, size: int = BLOCK) -> Iterator[Pairs]:
        """All pairs in order, at most `size` at a time."""
        return (self.select(np.arange(first, min(first + size, len(self))))
                for first in range(0, len(self), size))

    def largest_ids(self) -> list[tuple[int, str]]:
        """(largest id, path) of each file, for an error message that names the file."""
        return [(file["largest_id"], file["path"]) for file in self.files]

    def _flat(self, which: Which) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if which == "copy" and self.copy is None:
            which = "draft"
        return tuple(getattr(self, name) for name in (which, f"{which}_start", f"{which}_length"))


def flat_of(answers: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(all tokens, start of each answer, length of each answer)."""
    length = np.array([len(answer) for answer in answers], np.int32)
    tokens = [np.asarray(answer, np.int32) for answer in answers]
    start = np.cumsum(length, dtype=np.int64) - length
    return np.concatenate([np.zeros(0, np.int32), *tokens]), start, length


def numbered(names: list[str]) -> tuple[list[str], np.ndarray]:
    """(the distinct names, sorted as text; (N,) int64 index of each row's name among them)."""
    distinct = sorted(set(names))
    number = {name: i for i, name in enumerate(distinct)}
    return distinct, np.fromiter(map(number.__getitem__, names), np.int64, len(names))


def numbered_drives(sequences: list[str]) -> tuple[list[str], np.ndarray]:
    """(the distinct drives, sorted as text; (N,) int64 index of each row's drive among them)."""
    names, sequence = numbered(sequences)
    drives, drive = numbered([drive_of(name) for name in names])
    return drives, drive[sequence]


def digest(data: bytes | memoryview) -> int:
    """A 64-bit hash: the chance that any two of a million different inputs collide is 3 in 10^8."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
