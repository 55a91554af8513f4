"""Rows of other layouts become rows of a pair file: tokens are found by dotted keys."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from base import UserError
from pairs.formats import MAX_ANSWER
from pairs.rows import JsonRows

MAX_ID = 2**31 - 1
MAX_KEYS = 12                  # named in an error message
MAX_KEY = 500                  # characters of a dotted key
MAX_DEPTH = 20                 # of the keys that an error message names, of lists around token ids


class Unusable(Exception):
    """A row from which no pairs can be made; the message is the reason that is counted."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """Where a row holds what: dotted keys, "eventgpt.output.ids". Lists on the way stand for all of
    their elements; None: the row doesn't hold it.
    """

    target: str
    draft: str | None = None
    sequence: str | None = None
    clip: str | None = None


class Conversion:
    """Iterates over the rows of the pair file; counts as it goes.

    A row of the input becomes one pair for each answer in it. In a JSON file that is one object without
    a list "results", the rows are the list of objects where the keys begin; else it is a single row.
    """

    def __init__(self, path: Path, keys: Keys):
        self.path, self.keys = path, keys
        self.rows = self.pairs = 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self.found: dict[str, str] = {}          # dotted key of the first row -> what it holds

    def __iter__(self) -> Iterator[dict]:
        for row in self._input():
            if not self.rows:
                self.found = dict(keys_of(row))
            self.rows += 1
            try:
                for pair in self._pairs_of(row):
                    yield {"sample_idx": self.pairs, **pair}
                    self.pairs += 1
            except Unusable as reason:
                self.dropped[str(reason)] += 1
            except RecursionError:
                self.dropped["nested too deeply"] += 1
        if not self.pairs:
            raise self._nothing()

    def _input(self) -> Iterator[Any]:
        rows = JsonRows(self.path)
        yield from rows
        if rows.has_rows or not rows.beside:
            return
        first, _, rest = self.keys.target.partition(".")
        inside = rows.beside.get(first)
        if not (rest and isinstance(inside, list) and all(isinstance(row, dict) for row in inside)):
            yield rows.beside
            return
        self.keys = Keys(**{name: key and key.removeprefix(f"{first}.")
                            for name, key in dataclasses.asdict(self.keys).items()})
        yield from inside

    def _pairs_of(self, row: Any) -> list[dict]:
        targets = answers_at(row, self.keys.target)
        drafts = answers_at(row, self.keys.draft) if self.keys.draft else [[] for _ in targets]
        if len(drafts) != len(targets):
            raise Unusable(f"{len(drafts)} drafts and {len(targets)} targets")
        places = self._places_of(row, len(targets))
        return [{**place, "question_idx": number, "egpt_tokens": draft, "vl_tokens": target}
                for number, (place, draft, target) in enumerate(zip(places, drafts, targets))]

    def _places_of(self, row: Any, answers: int) -> list[dict]:
        """Sequence and clip of each answer of a row, as far as it has them: one for all, or each its own."""
        places: list[dict] = [{} for _ in range(answers)]
        for name in ("sequence", "clip", "event_data"):
            key = getattr(self.keys, name, None)
            try:
                values = list(values_at(row, (key or name).split(".")))
            except Unusable:
                if key:
                    raise
                continue
            if len(values) == 1 and isinstance(values[0], list):
                values = values[0]
            if len(values) not in (1, answers):
                if key:
                    raise Unusable(f"{len(values)} values of {key:.60} for {answers} answers")
                continue
            for number, place in enumerate(places):
                value = values[number % len(values)]
                if isinstance(value, (str, int)):
                    place[name] = value
        return places

    def _nothing(self) -> UserError:
        """The error for a file that gives no pair: what was wrong, and which keys hold token ids."""
        if not self.rows:
            return UserError(f"{self.path} holds no rows: wanted a list of objects, an object, or JSON "
                             "Lines")
        with_ids = [f"{key} ({what})" for key, what in self.found.items() if what != "other"]
        others = [key for key, what in self.found.items() if what == "other"]
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.dropped.most_common(3))
        return UserError(f"{self.path} gives no pairs: {self.rows} rows, {reasons}; keys with token ids: "
                         f"{some(with_ids)}; others: {some(others)}")


def some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_KEYS} more" if len(names) > MAX_KEYS else ""
    return ", ".join(f"{name:.60}" for name in names[:MAX_KEYS]) + more or "none"


# --------------------------------------------------------------------------------------------- keys
def values_at(value: Any, keys: list[str]) -> Iterator[Any]:
    """All values under these keys; a list stands for its elements, a number of it for one of them.

    Raises Unusable where a key is missing, in one element of a list too: answers must not shift.
    """
    if not keys:
        yield value
    elif isinstance(value, dict):
        for end in range(len(keys), 0, -1):                  # a key may hold dots itself
            if ".".join(keys[:end]) in value:
                yield from values_at(value[".".join(keys[:end])], keys[end:])
                return
        raise Unusable(f"no {'.'.join(keys):.60}")
    elif isinstance(value, list):
        if keys[0].isdecimal() and len(keys[0]) < 10 and int(keys[0]) < len(value):
            yield from values_at(value[int(keys[0])], keys[1:])
        else:
            for part in value:
                yield from values_at(part, keys)
    else:
        raise Unusable(f"no {'.'.join(keys):.60}")


def answers_at(row: Any, key: str) -> list[list[int]]:
    """The token lists of a row under this key. Raises Unusable where there are none."""
    values = values_at(row, key.split("."))
    answers = [answer for value in values for answer in answers_of(value, key)]
    if not answers:
        raise Unusable(f"{key:.60} is an empty list")
    return answers


def answers_of(value: Any, key: str, depth: int = 0) -> list[list[int]]:
    """The token lists in a list of token ids, or in a list of such lists; a single id is one token."""
    if is_id(value):
        return [[value]]
    if not isinstance(value, list) or depth > MAX_DEPTH:
        raise Unusable(f"{key:.60} holds no token ids")
    if all(map(is_id, value)):
        if len(value) > MAX_ANSWER:
            raise Unusable(f"{key:.60} has more than {MAX_ANSWER} tokens")
        return [value]
    if not all(isinstance(part, list) for part in value):
        raise Unusable(f"{key:.60} holds no token ids")
    return [answer for part in value for answer in answers_of(part, key, depth + 1)]


def is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_ID


def keys_of(value: Any, before: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """(dotted key, what it holds) of a row: "12 ids", "3 lists of ids", or "other"."""
    if isinstance(value, dict) and depth < MAX_DEPTH:
        for key, part in value.items():
            yield from keys_of(part, f"{before}.{key}" if before else str(key), depth + 1)
        return
    if isinstance(value, list) and value and isinstance(value[0], dict) and depth < MAX_DEPTH:
        yield from keys_of(value[0], before, depth + 1)
        return
    try:
        answers = answers_of(value, before) if isinstance(value, list) and value else []
    except Unusable:
        answers = []
    holds_lists = len(answers) > 1 or (answers and answers[0] is not value)
    kind = f"{len(answers)} lists of ids" if holds_lists else f"{len(value)} ids" if answers else "other"
    yield before, kind
