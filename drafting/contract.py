"""What every drafter promises, live and simulated. Imports no torch.

Both kinds of one drafter propose the same tokens: test_decoding.py compares their tau. Greedy
verification makes the comparison simple: proposals after a wrong token are discarded, and up to
there the proposed prefix is the true prefix.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

NOTHING = -1                   # "no proposal": equal to no token id
TOP = 5                        # proposals of a simulated drafter at each position, best first
MEASURED_TOKENS = 8            # length of the proposals that `measure` times

# Median seconds of work(), the device idle before and after.
Timer = Callable[[Callable[[], object]], float]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds that proposing takes; all 0 until measured: then no proposal is too expensive."""

    # One proposed token, the adapter's steps included: for reports.
    proposal_s: float = 0.0
    # One token more in a chain, its verification included: look-ups and a wider target pass, and an
    # adapter step where every token needs one.
    token_s: float = 0.0
    # One step of the adapter; 0 without an adapter that runs step by step.
    adapter_step_s: float = 0.0
    # One node more in a tree, its verification included.
    node_s: float = 0.0


class Drafter(Protocol):
    """A live drafter: it proposes tokens for one answer at a time and learns each answer once it is
    verified.

    The target's greedy answer doesn't depend on the drafter: a wrong proposal costs time and
    nothing else. Tokens are ids of the target's vocabulary. No method raises for ids outside an
    adapter's vocabulary.
    """

    costs: Costs
    # With --tree auto it proposes chains, even where it has second choices.
    prefers_chains: bool

    def begin(self, draft: list[int], question: Sequence[int] = ()) -> None:
        """Start an answer. draft: EventGPT's tokens for the same clip and question ([] for a
        drafter that reads no draft); question: the question's tokens. Neither holds BOS or prompt
        tokens."""

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        """Up to gamma tokens to follow the verified prefix (every token of the answer so far).

        price: tokens per second that decoding reaches so far; a proposal must beat it: the chain
        ends where the probability that the next token is reached and right is below price *
        costs.token_s. 0: proposing is free.
        """

    def learn(self, answer: list[int]) -> None:
        """The answer is verified, EOS included: use it for later answers."""

    def forget(self) -> None:
        """Take back what was learnt since this was called first; call it before the first `learn`."""

    def measure(self, draft: list[int], question: Sequence[int], answer: list[int], timer: Timer,
                verify_s: float = 0.0) -> Costs:
        """Measure the drafter's costs on the beginning of an answer, set `costs` and return them.

        answer: a verified prefix; verify_s: seconds by which a target pass grows with one token
        more. Learns nothing; `begin` must follow before the next answer.
        """


class SimulatedDrafter(Protocol):
    """The same drafter over answers that are known: `Pairs` in clip order, given when the drafter
    is made.
    """

    def predict(self, number: int) -> np.ndarray:
        """(T, TOP) int32 for the T target tokens of answer `number`: the best proposals at each
        position given the true tokens before it, best first, NOTHING where there are fewer."""

    def learn(self, number: int) -> None:
        """Answer `number` is verified: use it for later answers. Called once for each answer, in
        clip order.
        """


class NoDrafts:
    """The live drafter that proposes nothing; the base class of the others."""

    costs = Costs()
    prefers_chains = False

    def begin(self, draft: list[int], question: Sequence[int] = ()) -> None:
        pass

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        return []

    def learn(self, answer: list[int]) -> None:
        pass

    def forget(self) -> None:
        pass

    def measure(self, draft: list[int], question: Sequence[int], answer: list[int], timer: Timer,
                verify_s: float = 0.0) -> Costs:
        proposal_s = seconds_per_token(self, draft, question, answer, timer)
        self.costs = Costs(proposal_s, proposal_s + verify_s, node_s=proposal_s + verify_s)
        return self.costs


def seconds_per_token(drafter: Drafter, draft: list[int], question: Sequence[int],
                      answer: list[int], timer: Timer) -> float:
    """Seconds of one proposed token: a whole proposal, less its `begin`, over the tokens it holds.
    """
    def propose() -> int:
        drafter.begin(draft, question)
        return len(drafter.propose(answer, MEASURED_TOKENS))

    begin_s, count = timer(lambda: drafter.begin(draft, question)), max(1, propose())
    return max(0.0, timer(propose) - begin_s) / count


def matching(ours: list[int], theirs: list[int]) -> int:
    """Length of the prefix that both lists share."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs)))
