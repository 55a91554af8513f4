"""The words of decoded answers: which were proposed and by whom, which are the target's own.

Made from decode.json alone. Files of format 1 hold no proposals: which tokens were accepted is
known there, but not whose they were.
"""

from __future__ import annotations

import collections
import dataclasses
import re

ACCEPTED, MISS, FULL, NONE, OWN = "accepted", "miss", "full", "none", "own"
KINDS = {
    ACCEPTED: "proposed and accepted",
    MISS: "the target's own, after a miss: something else had been proposed",
    FULL: "the target's own, after all proposals of the path were accepted",
    NONE: "the target's own: nothing had been proposed",
    OWN: "the target's own; what had been proposed is not recorded",
}
MAX_NODES = 256  # proposed to one pass: more than any drafter proposes
SEVERAL, UNKNOWN = "several", "unknown"
PLAIN_WORDS = {"the", "and", "with", "are", "was", "has", "have", "there", "this", "that", "its"}


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One proposed token. by: who proposed it -> its probability, True where there is none."""

    text: str
    by: dict[str, float | bool]


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of an answer."""

    text: str
    kind: str  # one of KINDS
    number: int  # of the pass that brought it; 0: the prefill
    by: dict[str, float | bool]  # of an accepted token
    instead: tuple[Proposal, ...] = ()  # proposed in its place, after a miss

    @property
    def who(self) -> str:
        """Who proposed an accepted token."""
        if len(self.by) == 1:
            return next(iter(self.by))
        return SEVERAL if self.by else UNKNOWN


@dataclasses.dataclass
class Pass:
    """The proposals of one pass: nodes of a tree, a parent before its children."""

    nodes: list[Proposal]
    parents: list[int]  # -1: the answer so far
    path: list[int]  # nodes that were accepted, in order

    def children(self, parent: int) -> list[int]:
        return [node for node, above in enumerate(self.parents) if above == parent]


def words_of(results: dict) -> dict[str, str]:
    """The text of each token that decode.json names, by its id."""
    return results.get("words") or {}


def passes_of(answer: dict, run: dict, words: dict[str, str]) -> list[Pass]:
    """The proposals of each pass with the path that was accepted; [] where they are not recorded."""
    passes, at = [], 0
    for row, accepted in zip(answer.get("passes") or [], run["accepted"]):
        tokens = row["tokens"]
        if len(tokens) > MAX_NODES:
            raise ValueError(f"{len(tokens)} proposals of one pass, wanted {MAX_NODES} at most")
        parents = row.get("parents") or list(range(-1, len(tokens) - 1))
        by = row.get("by") or {}
        nodes = [
            Proposal(
                words.get(str(token), f"#{token}"),
                {who: column[node] for who, column in by.items() if column[node] is not None},
            )
            for node, token in enumerate(tokens)
        ]
        children: dict[tuple[int, int], int] = {}
        for node, (token, parent) in enumerate(zip(tokens, parents)):
            if parent >= node:
                raise ValueError("a proposal stands before the one that it follows")
            children.setdefault((parent, token), node)
        path, node = [], -1
        for token in answer["tokens"][at : at + accepted]:
            node = children[node, token]
            path.append(node)
        passes.append(Pass(nodes, parents, path))
        at += accepted + 1
    return passes


def tokens_of(answer: dict, run: dict, words: dict[str, str]) -> list[Token]:
    """The tokens of an answer in order, each with its part in the decoding.

    run: the run of the drafter whose tokens they are.
    """
    passes, tokens = passes_of(answer, run, words), []
    ids = answer["tokens"]
    for number, (proposed, accepted) in enumerate(zip(run["proposed"], run["accepted"])):
        recorded = passes[number] if number < len(passes) else None
        for place in range(accepted):
            by = recorded.nodes[recorded.path[place]].by if recorded else {}
            tokens.append(Token(text_of(ids[len(tokens)], words), ACCEPTED, number, by))
        # an answer may end with an accepted token: its end mark
        if len(tokens) < len(ids):
            kind, instead = own_kind(recorded, proposed)
            tokens.append(Token(text_of(ids[len(tokens)], words), kind, number, {}, instead))
    if len(tokens) != len(ids):
        raise ValueError(f"{len(ids)} tokens, but passes that bring {len(tokens)}")
    return tokens


def own_kind(recorded: Pass | None, proposed: int) -> tuple[str, tuple[Proposal, ...]]:
    """The kind of the token that the target adds to a pass, and what was proposed in its place."""
    if not proposed:
        return NONE, ()
    if recorded is None:
        return OWN, ()
    end = recorded.path[-1] if recorded.path else -1
    instead = tuple(recorded.nodes[node] for node in recorded.children(end))
    return (MISS, instead) if instead else (FULL, ())


def text_of(token: int, words: dict[str, str]) -> str:
    return words.get(str(token), f"#{token}")


def counted(answers: list[list[Token]]) -> dict[str, int]:
    """How many tokens of each kind; accepted ones by who proposed them ("accepted, memory")."""
    counts = collections.Counter(
        f"{ACCEPTED}, {token.who}" if token.kind == ACCEPTED else token.kind
        for tokens in answers
        for token in tokens
    )
    return dict(counts)


# --------------------------------------------------------------------------------------- misses
def whole_words(tokens: list[Token]) -> list[str]:
    """For each token the word that it is a part of, in small letters; "" for signs."""
    text = "".join(token.text for token in tokens)
    word_at: dict[int, str] = {}
    for match in re.finditer(r"\w+", text):
        word_at |= dict.fromkeys(range(*match.span()), match[0].casefold())
    words, at = [], 0
    for token in tokens:
        words.append(
            next(
                (word_at[place] for place in range(at, at + len(token.text)) if place in word_at),
                "",
            )
        )
        at += len(token.text)
    return words


def missed_words(tokens: list[Token], draft_text: str) -> list[tuple[str, bool]]:
    """(word, whether the draft model's own answer holds it) of each miss inside a word that says
    something: three letters and more, none of PLAIN_WORDS.
    """
    draft = set(re.findall(r"\w+", draft_text.casefold()))
    return [
        (word, word in draft)
        for token, word in zip(tokens, whole_words(tokens))
        if token.kind == MISS and len(word) > 2 and word not in PLAIN_WORDS
    ]
