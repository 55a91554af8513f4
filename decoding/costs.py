"""What the parts of a decoding cost on this machine, how far rounding reaches, and the price of a
second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from decoding.contracts import Target
from decoding.loop import Decoded
from machine.timing import REPEATS, median_s

if TYPE_CHECKING:
    from vlm.contract import VisionLanguageModel

ROUNDING_TOKENS = 17               # compared between the ways to compute their logits
# Each of the two logits of a tie may be off either way: twice the rounding, and a margin of 2.
NOISE_OVER_ROUNDING = 4


@dataclasses.dataclass(frozen=True)
class ModelCosts:
    """Seconds of the parts of a model, each a median."""

    vision: float                    # with the prompt's embedding
    prefill: float
    verify: dict[int, float]         # tokens in one pass -> seconds of the pass

    @property
    def slope_s(self) -> float:
        """Seconds by which a pass grows with one token more."""
        longest = max(self.verify)
        return max(0.0,
                   (self.verify[longest] - self.verify[1]) / (longest - 1)) if longest > 1 else 0.0

    def milliseconds(self) -> dict:
        return milliseconds(dataclasses.asdict(self))


def milliseconds(seconds: dict) -> dict:
    return {
        key: milliseconds(value) if isinstance(value, dict) else 1000 * value
        for key, value in seconds.items()
    }


def measure_costs(model: VisionLanguageModel, target: Target, pixels: torch.Tensor, question: str,
                  sizes: Iterable[int]) -> ModelCosts:
    """Time vision, prefill and one pass over k tokens for each k in sizes, 1 included."""
    device = model.runtime.device
    target.ask(model.encode(pixels, question))
    target.prefill([])

    def verify(k: int) -> None:
        target.keep(0)
        target.verify([0] * k).best.tolist()

    # a GPU that has waited is slow for its first passes
    for _ in range(3 * REPEATS):
        verify(1)
    passes = {k: median_s(lambda k=k: verify(k), device) for k in sizes}  # type: ignore[misc]
    return ModelCosts(vision=median_s(lambda: model.encode(pixels, question), device),
                      prefill=median_s(lambda: target.prefill([]).best.tolist(), device),
                      verify=passes)


def rounding(target: Target, prompt: Any, tokens: list[int]) -> float:
    """The largest difference of a logit between four ways to compute it; NaN where one of them
    gives NaN.

    One token at a time, all together, in the prefill, and by transformers' own forward pass. This
    is the noise of the number format on this device; it decides what counts as a tie.
    """
    tokens = tokens[:ROUNDING_TOKENS]
    target.ask(prompt)
    target.prefill([])
    # Copies: a graph writes its next logits over these.
    singly = torch.cat([target.verify([token]).logits.float().clone() for token in tokens])
    target.keep(0)
    others = [
        target.verify(tokens).logits.float().clone(),
        target.prefill(tokens).logits[1:].float(),
        target.reference(tokens).float(),
    ]
    differences = torch.stack([(singly - other).abs().amax() for other in others])
    return float(differences.amax())                 # unlike Python's max, it keeps a NaN


@dataclasses.dataclass
class Pace:
    """The price of a second for --gamma auto: the tokens per second of all passes so far but the
    prefills.

    A prefill costs the same whatever is proposed, so neither its tokens nor its seconds count.
    Begins with one plain step. Renewal-reward theory: the stopping rule that gives most tokens a
    second compares each cost with that average.
    """

    seconds: float                     # of one plain step, for one token
    tokens: int = 1

    def price(self) -> float:
        return self.tokens / self.seconds

    def add(self, decoded: Decoded) -> None:
        self.seconds += decoded.seconds_after_prefill
        self.tokens += decoded.tokens_after_prefill
