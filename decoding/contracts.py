"""What the decoding loop needs of a target model. Imports no torch.

vlm.steps.Prompted is the target of a real model; the tests have one of a few lines. Drafters:
drafting/contract.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

NO_TOKEN = -1              # in Following.best, where the largest logit is not finite


class Following(Protocol):
    """What the target says after each of n known positions. Valid until the next call of the
    target.
    """

    @property
    def logits(self) -> torch.Tensor:
        """(n, V) in the target's dtype, on its device."""

    @property
    def best(self) -> torch.Tensor:
        """(n,) int64 on the target's device: ids of the largest logits; NO_TOKEN where that is NaN
        or infinite.
        """


class Target(Protocol):
    """A target model at batch 1 on one prompt at a time. It knows the prompt and the tokens that it
    was given since.

    Tokens are ids from 0 to vocab_size - 1. Calls must come from one thread, in the order ask,
    prefill, then any number of keep and verify.
    """

    vocab_size: int
    takes_trees: bool          # False: it is given chains alone

    def ask(self, prompt: Any) -> None:
        """Set the prompt of the next answer. prompt: as the model's encode gives it."""

    def prefill(self, proposed: list[int], parents: list[int] | None = None) -> Following:
        """Read the prompt and the proposals -> what follows the prompt and each proposal: n =
        len(proposed) + 1. parents: as for verify; position 0 is the prompt's last token.
        """

    def verify(self, tokens: list[int], parents: list[int] | None = None) -> Following:
        """Append these tokens, at least one -> what follows each of them: n = len(tokens).

        parents: the tokens form a tree: tokens[j] follows tokens[parents[j]], parents[j] < j, and
        parents[0] is -1; keep_path comes next. None: a chain. A loop that proposes chains alone
        never gives parents.
        """

    def keep_path(self, path: list[int]) -> None:
        """Keep this path alone of the last pass over a tree, from position 0 on, as if it had been
        a chain.
        """

    def keep(self, tokens: int) -> None:
        """Forget everything but the prompt and the first `tokens` tokens of the answer.

        Values of forgotten positions must not reach later answers, NaN included.
        """

    def reference(self, tokens: list[int]) -> torch.Tensor:
        """Logits (n, V) after each of these tokens behind the prompt, by transformers in one pass."""

    def not_numbers(self) -> Exception:
        """The error for an answer that needs a token where the logits are not finite; it names the
        dtype.

        Proposals of the same pass may have spoilt them: weight 0 times NaN is NaN. Ask again
        without them first.
        """
