"""What drafters are made from. Factories of drafters take all of it and pick what they need.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairs.pairs import Pairs
    from token_adapter import TokenAdapter


class Shared:
    """Things that several drafters share are made once, when the first drafter asks for them."""

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        made = self.__dict__.setdefault("_made", {})
        if name not in made:
            made[name] = make()
        return made[name]


@dataclasses.dataclass
class LiveParts(Shared):
    """Parts of live drafters: all that a trained task leaves behind."""

    adapter: TokenAdapter | None = None
    # target answers of training, which a memory begins with
    training_answers: Sequence[list[int]] = ()
    # of earlier decodings, which count as much as fresh ones
    verified_answers: Sequence[list[int]] = ()
    memory_share: float = 0.5                      # of the memory in the hybrid
    # a draft -> its text in the target's tokens; None: both models share a tokenizer
    translate: Callable[[list[int]], list[int]] | None = None


@dataclasses.dataclass
class SimulationParts(Shared):
    """Parts of simulated drafters. Adapters are on their device."""

    adapter: TokenAdapter
    pairs: Pairs                                   # the answers to propose for, in clip order
    training: Pairs | None = None  # the pairs that the adapter was trained on; None: a checkpoint
    # their targets, where the pairs are not at hand
    training_answers: Sequence[list[int]] | None = None
    prefix_adapter: TokenAdapter | None = None     # the ablation that sees no draft
    # results name of a hybrid -> share
    memory_share: dict[str, float] = dataclasses.field(default_factory=dict)
    streaming: bool = True                         # drafters may learn from verified answers
    online: bool = False                           # by gradient steps too
    seed: int = 0                                  # of the control with shuffled drafts
