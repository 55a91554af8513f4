"""Rules that verify proposals: greedy decoding, and sampling at a temperature. Both are lossless.

A rule is called with (answer so far, proposed tokens, what the target says after the answer and
after each proposal) and returns the tokens to append: the proposals that are right, then one token
of the target's own. It returns NO_TOKEN in place of a token that would come from logits that are
not finite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from decoding.contracts import NO_TOKEN, Following
from drafting.contract import matching
from drafting.tree import Tree

Rule = Callable[[list[int], list[int], Following], list[int]]


def greedy(answer: list[int], proposed: list[int], following: Following) -> list[int]:
    """The proposals that greedy decoding would have chosen too, and its next token."""
    best = following.best.tolist()
    return best[:matching(proposed, best) + 1]


def greedy_path(tree: Tree, following: Following) -> tuple[list[int], list[int]]:
    """The nodes that greedy decoding would have chosen too, and their tokens with its next token behind them.

    following: what the target says at position 0, before the tree, and after each node (node j is position j + 1).
    """
    best = following.best.tolist()
    children = {(parent, token): node for node, (token, parent) in reversed([*enumerate(zip(tree.tokens, tree.parents))])}
    path, tokens, node = [], [], -1
    while True:
        token = best[node + 1]
        tokens.append(token)
        if (node, token) not in children:
            return path, tokens
        node = children[node, token]
        path.append(node)


class Sampling:
    """Lossless sampling at a temperature: one seed gives one answer, whatever is proposed and how
    much of it.

    The Gumbel-max trick: the argmax of logits / temperature + Gumbel noise is a draw from the
    softmax. The noise belongs to the position in the answer, so the draw does not depend on
    proposals; a proposal is accepted if it equals the draw. Its chance of that is the target's
    probability of it, as in speculative sampling (Leviathan et al. 2023; Chen et al. 2023) from a
    drafter that puts all its weight on one token.
    """

    def __init__(self, temperature: float, seed: int):
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)
        self.noise: dict[int, torch.Tensor] = {}         # position -> (V,) float64
        # positions of this answer that have been given noise
        self.positions = 0
        self.is_begun = False                            # whether this answer has a token

    def __call__(self, answer: list[int], proposed: list[int], following: Following) -> list[int]:
        if not answer and self.is_begun:                 # a new answer
            self.noise, self.positions, self.is_begun = {}, 0, False
        self.noise = {
            position: row for position, row in self.noise.items() if position >= len(answer)
        }
        logits = following.logits.double().cpu()
        noise = torch.stack(
            [self._noise_at(len(answer) + k, logits.shape[-1]) for k in range(len(logits))])
        is_number = logits.amax(-1).isfinite()           # the largest of logits with a NaN is NaN
        drawn = (logits / self.temperature + noise).argmax(-1).where(is_number, NO_TOKEN).tolist()
        emitted = drawn[:matching(proposed, drawn) + 1]
        self.is_begun = self.is_begun or NO_TOKEN not in emitted
        return emitted

    def _noise_at(self, position: int, vocab_size: int) -> torch.Tensor:
        """Made in the order of the positions, so that it doesn't depend on how many are asked for
        at once.
        """
        while self.positions <= position:
            uniform = torch.rand(vocab_size, dtype=torch.float64, generator=self.generator)
            self.noise[self.positions] = -torch.log(-torch.log(uniform))
            self.positions += 1
        return self.noise[position]


def rule_of(temperature: float, seed: int, answer_name: str) -> Rule:
    """Greedy at temperature 0; else sampling with a seed of this answer's own, so that a run can go
    on anywhere.
    """
    if not temperature:
        return greedy
    digest = hashlib.blake2b(f"{seed}\0{answer_name}".encode(errors="surrogateescape"),
                             digest_size=8).digest()
    return Sampling(temperature, int.from_bytes(digest, "little") >> 1)
