"""What was proposed to each pass of an answer, and by whom: for decode.json and its page.

Kept while the clock stands still: a pass adds a reference, the rest is worked out after the last
pass. Imports no torch.
"""

from __future__ import annotations

import dataclasses

from drafting.contract import Drafter
from drafting.tree import Attributing, Sources, Tree

RECORDED_ANSWERS = 1000  # the first of a decoding: about 10 KB each in decode.json
PROPOSING = 0.1  # probability from which a source counts as a proposer of a token
DIGITS = 3  # of recorded probabilities


@dataclasses.dataclass
class Record:
    """The proposals of one answer, rejected ones included."""

    proposals: list[tuple[list[int], Tree]] = dataclasses.field(default_factory=list)
    # as decode.json holds them, after `attribute`
    passes: list[dict] = dataclasses.field(default_factory=list)

    def add(self, prefix: list[int], proposed: Tree) -> None:
        """A pass verifies these proposals after the prefix."""
        self.proposals.append((prefix, proposed))

    def attribute(self, drafter: Drafter) -> None:
        """Work out who proposed what; the drafter has not learnt the answer yet."""
        for prefix, proposed in self.proposals:
            row: dict = {"tokens": proposed.tokens}
            if not proposed.is_chain():
                row["parents"] = proposed.parents
            if proposed.tokens and isinstance(drafter, Attributing):
                row["by"] = proposers(drafter.sources(prefix, proposed))
            self.passes.append(row)

    def tokens(self) -> set[int]:
        """Every token that was proposed."""
        return {token for _, proposed in self.proposals for token in proposed.tokens}


def proposers(sources: Sources) -> Sources:
    """The sources with None where one is no proposer of a token: it gave less than PROPOSING, and
    another gave more. Probabilities are rounded.
    """
    best = [max(map(float, filter(None, column)), default=0.0) for column in zip(*sources.values())]

    def shown(value: float | bool | None, most: float) -> float | bool | None:
        if value is None or value is True:
            return value
        return round(value, DIGITS) if value >= min(PROPOSING, most) else None

    columns = {
        name: [shown(value, most) for value, most in zip(column, best)]
        for name, column in sources.items()
    }
    return {name: column for name, column in columns.items() if set(column) != {None}}


class Words:
    """The text of single tokens, as it stands inside a sentence."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.seen: set[int] = set()
        # Decoded alone, a word loses the blank before it.
        self.before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
        self.start = len(self._decoded([]))

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(
            [*self.before, *tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def new(self, tokens: set[int]) -> dict[str, str]:
        """{token: text} of those that were in no earlier call, with the blank before a word."""
        unseen = sorted(tokens - self.seen)
        self.seen |= tokens
        return {str(token): self._decoded([token])[self.start :] for token in unseen}
