"""Speculative decoding of one answer. Whatever a drafter proposes, the answer is the target's own.

The loop knows target and drafter by their Protocols alone: decoding/contracts.py and
drafting/contract.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from decoding.contracts import NO_TOKEN, Target
from decoding.limits import Limits
from decoding.record import Record
from decoding.rules import Rule, greedy
from drafting.contract import Drafter
from drafting.tree import MAX_DEPTH, Branching, Tree, build_tree


@dataclasses.dataclass
class Decoded:
    """One answer and how it came about. Pass 0 is the prefill, which verifies the opening
    proposals.
    """

    tokens: list[int]
    # tokens proposed to each pass of the target
    proposed: list[int] = dataclasses.field(default_factory=list)
    # and how many of them were right
    accepted: list[int] = dataclasses.field(default_factory=list)
    draft_s: float = 0.0             # seconds in the drafter, learning included
    opening_s: float = 0.0           # of these before the prefill
    prefill_s: float = 0.0           # in the prefill
    verify_s: float = 0.0            # in all other passes

    @property
    def tokens_after_prefill(self) -> int:
        """Tokens that other passes than the prefill have brought."""
        return max(0, len(self.tokens) - (self.accepted[0] + 1 if self.accepted else 0))

    @property
    def seconds_after_prefill(self) -> float:
        return self.draft_s - self.opening_s + self.verify_s

    def add_opening_s(self, seconds: float) -> None:
        """Add time of the drafter before the prefill."""
        self.draft_s += seconds
        self.opening_s += seconds

    def add_pass(self, proposed: Tree, emitted: list[int], draft_s: float, target_s: float) -> None:
        """Add a pass of the target: the proposals, the tokens it emitted, seconds of drafter and
        target.
        """
        if self.tokens:
            self.draft_s += draft_s
            self.verify_s += target_s
        else:
            self.add_opening_s(draft_s)
            self.prefill_s = target_s
        self.proposed.append(len(proposed.tokens))
        self.accepted.append(proposed.accepted(emitted))
        self.tokens = self.tokens + emitted


def free_of_cost() -> float:
    """The price of a second where proposing costs nothing."""
    return 0.0


def decode(target: Target,
           drafter: Drafter,
           limits: Limits,
           price: Callable[[], float] = free_of_cost,
           rule: Rule = greedy,
           record: Record | None = None) -> Decoded:
    """Decode one answer to the prompt that the target was asked, and let the drafter learn it.

    The answer ends exactly where plain decoding ends it. price: called before each pass; tokens per
    second that decoding reaches so far, 0 if proposing is free. Raises target.not_numbers() where a
    token of the answer would come from logits that are not finite; such logits after a refused
    proposal change nothing. record: gets the proposals, outside of the measured seconds.
    """
    decoded = Decoded([])
    branching = drafter if limits.nodes > 0 and isinstance(drafter, Branching) else None
    while not limits.are_reached(decoded.tokens):
        start = time.perf_counter()
        if branching is not None:
            proposed = proposed_tree(branching, decoded.tokens, limits, price(), target.vocab_size)
        else:
            proposed = proposed_chain(drafter, decoded.tokens, limits, price(), target.vocab_size)
        drafted = time.perf_counter()
        emitted = verified(target, decoded.tokens, proposed, limits, rule)
        if NO_TOKEN in emitted and proposed.tokens:
            # Logits that are no numbers behind one proposal can spoil those before it in the same
            # pass.
            proposed = Tree()
            emitted = verified(target, decoded.tokens, proposed, limits, rule)
        if NO_TOKEN in emitted:
            raise target.not_numbers()
        verified_at = time.perf_counter()
        if record is not None:
            record.add(decoded.tokens, proposed)
        decoded.add_pass(proposed, emitted, drafted - start, verified_at - drafted)
    if record is not None:
        record.attribute(drafter)
    start = time.perf_counter()
    drafter.learn(decoded.tokens)
    decoded.draft_s += time.perf_counter() - start
    return decoded


def proposed_chain(drafter: Drafter, answer: list[int], limits: Limits, price: float,
                   vocab_size: int) -> Tree:
    """The chain that the drafter proposes, up to the first id that the target does not have."""
    # the last token is the target's own
    room = min(limits.gamma, limits.max_new_tokens - len(answer) - 1)
    return Tree.chain(drafter.propose(answer, room, price) if room > 0 else []).below(vocab_size)


def proposed_tree(drafter: Branching, answer: list[int], limits: Limits, price: float,
                  vocab_size: int) -> Tree:
    """The tree that the drafter proposes, as deep as the answer has room.

    A node must be reached with the probability that its time is worth: price * costs.node_s.
    """
    room = min(MAX_DEPTH, limits.max_new_tokens - len(answer) - 1)
    if room < 1:
        return Tree()
    least = price * drafter.costs.node_s
    return build_tree(drafter, answer, limits.nodes, room, price, least).below(vocab_size)


def verified(target: Target, answer: list[int], proposed: Tree, limits: Limits,
             rule: Rule) -> list[int]:
    """One pass of the target over the proposals -> the tokens to append, cut at EOS.

    The prefill of a new answer, else a pass over its last token and the proposals.
    """
    tree = [] if proposed.is_chain() else [proposed.positions()]
    if answer:
        target.keep(len(answer) - 1)
        following = target.verify([answer[-1], *proposed.tokens], *tree)
    else:
        following = target.prefill(proposed.tokens, *tree)
    path, tokens = proposed.follow(rule(answer, proposed.depths(), following))
    if tree:
        target.keep_path([0, *(node + 1 for node in path)])
    return limits.cut(tokens)
