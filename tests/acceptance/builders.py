"""Pairs and an adapter whose hits are known."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from pairs.pairs import Pairs
from tests.conftest import flat
from token_adapter import CONTRACTS, ORIGINAL_CONTRACT

VOCAB_SIZE = 11
CONTRACT = CONTRACTS["draft"]


def pairs_of(drafts: list[list[int]], targets: list[list[int]]) -> Pairs:
    return Pairs(*flat(drafts), *flat(targets), [""] * len(drafts), list(range(len(drafts))), [])


def random_pairs(contract: str) -> Pairs:
    """30 pairs of 1 to 9 tokens: a target token is the draft's plus 3, or that of the place before.
    """
    rng = np.random.default_rng(0)
    drafts = [list(map(int, rng.permutation(VOCAB_SIZE)[:rng.integers(1, 10)])) for _ in range(30)]
    answers = [[(token + 3) % VOCAB_SIZE for token in draft] for draft in drafts]
    if contract == ORIGINAL_CONTRACT:
        answers = [[5, *answer[:-1]] for answer in answers]
    return pairs_of(drafts, answers)


class Oracle(nn.Module):
    """Knows that a target token is the draft's plus 3, and proposes the one `late` places further
    on.
    """

    def __init__(self, contract: str = CONTRACT, late: int = 0):
        super().__init__()
        self.late = late
        self.config = SimpleNamespace(first_position=int(contract == ORIGINAL_CONTRACT),
                                      sees_prefix=False, conditioning="draft")
        self.sure = nn.Parameter(torch.tensor(9.0))

    def labels_of(self, ids):
        return ids

    def hidden(self, draft):
        known = torch.roll((draft + 3) % VOCAB_SIZE, -self.late, dims=1)
        return self.sure * nn.functional.one_hot(known, VOCAB_SIZE)

    def output(self):
        return nn.Identity(), torch.eye(VOCAB_SIZE), torch.zeros(VOCAB_SIZE)

    forward = hidden
