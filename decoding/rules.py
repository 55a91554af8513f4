"""Rules that verify proposals: greedy decoding, and sampling at a temperature. Both are lossless.

A rule is called with (answer so far, depths of k positions, what the target says after each) and
returns the token that follows each position: the answer's end is position 0 at depth 0, a proposal
of a chain or a tree lies as deep as its path is long. It returns NO_TOKEN where logits are not
finite. The loop follows these tokens through the proposals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from decoding.contracts import NO_TOKEN, Following

Rule = Callable[[list[int], list[int], Following], list[int]]


def greedy(answer: list[int], depths: list[int], following: Following) -> list[int]:
    """The token that greedy decoding chooses after each position."""
    return following.best.tolist()


class Sampling:
    """Lossless sampling at a temperature: one seed gives one answer, whatever is proposed and how
    much of it.

    The Gumbel-max trick: the argmax of logits / temperature + Gumbel noise is a draw from the
    softmax. The noise belongs to the position in the answer, so the draw does not depend on
    proposals; a proposal is accepted if it equals the draw. Its chance of that is the target's
    probability of it, as in speculative sampling (Leviathan et al. 2023; Chen et al. 2023) from a
    drafter that puts all its weight on one token. In a tree all nodes of one depth share a draw.
    """

    def __init__(self, temperature: float, seed: int):
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)
        self.noise: dict[int, torch.Tensor] = {}         # position -> (V,) float64
        # positions of this answer that have been given noise
        self.positions = 0
        self.is_begun = False                            # whether this answer has a token

    def __call__(self, answer: list[int], depths: list[int], following: Following) -> list[int]:
        if not answer and self.is_begun:                 # a new answer
            self.noise, self.positions = {}, 0
        self.noise = {
            position: row for position, row in self.noise.items() if position >= len(answer)
        }
        logits = following.logits.double()
        noise = torch.stack([self._noise_at(len(answer) + depth, logits) for depth in depths])
        is_number = logits.amax(-1).isfinite()           # the largest of logits with a NaN is NaN
        drawn = (logits / self.temperature + noise).argmax(-1).where(is_number, NO_TOKEN).tolist()
        self.is_begun = bool(answer) or NO_TOKEN not in drawn    # else the pass may be asked again
        return drawn

    def scores(self, logits: torch.Tensor, first: int) -> torch.Tensor:
        """Logits (n, V) of the positions from `first` on -> (n, V) float64, whose largest is the draw,
        in the unit of logits. For a rule that has drawn nothing yet.
        """
        logits = logits.double()
        noise = [self._noise_at(first + row, logits) for row in range(len(logits))]
        return logits + self.temperature * torch.stack(noise)

    def _noise_at(self, position: int, like: torch.Tensor) -> torch.Tensor:
        """Gumbel noise (V,), on the device of the logits `like` (n, V).

        Made in the order of the positions, so that it doesn't depend on how many are asked for at
        once; drawn on the host, so that a seed means the same on every device.
        """
        while self.positions <= position:
            uniform = torch.rand(like.shape[-1], dtype=torch.float64, generator=self.generator)
            self.noise[self.positions] = -torch.log(-torch.log(uniform.to(like.device)))
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
