"""Where an answer ends, and how much is proposed for it. Imports no torch."""

from __future__ import annotations

import dataclasses

from base import UserError

AUTO = "auto"                      # --gamma: as many as are worth their cost
# The drafter that proposes nothing; all others are compared with it
PLAIN = "none"
WANTED_DRAFT_MODEL = ("wanted the folder of the draft model; EventGPT's is linked from "
                      "https://github.com/XduSyL/EventGPT")
# With --gamma auto: verifying 17 tokens costs little more than one
MAX_GAMMA = 16
MAX_NODES = 64                     # of a tree, verified in one pass with the last token
# Numbers of tokens whose passes are timed: those of chains, and some of trees.
MEASURED_SIZES = (*range(1, MAX_GAMMA + 2), 33, MAX_NODES + 1)


def check_gamma(gamma: str) -> None:
    """A UserError unless this is a value of --gamma."""
    if gamma != AUTO and gamma not in map(str, range(1, MAX_GAMMA + 1)):
        raise UserError(f"--gamma must be {AUTO} or from 1 to {MAX_GAMMA}, got {gamma[:40]}")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where an answer ends, and how many tokens are proposed to a pass at most."""

    max_new_tokens: int              # 1 or more
    eos_ids: tuple[int, ...]
    gamma: int                       # of a chain
    nodes: int = 0                   # of a tree; 0: chains
    may_choose: bool = False         # whether a drafter that prefers chains proposes chains instead

    def cut(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first EOS, which is kept."""
        end = next((at for at, token in enumerate(tokens) if token in self.eos_ids), len(tokens))
        return tokens[:end + 1]

    def are_reached(self, answer: list[int]) -> bool:
        return len(answer) >= self.max_new_tokens or answer[-1:] in ([eos] for eos in self.eos_ids)


def check_tree(tree: str) -> None:
    """A UserError unless this is a value of --tree."""
    if tree != AUTO and tree not in map(str, range(MAX_NODES + 1)):
        raise UserError(f"--tree must be {AUTO} or from 0 (chains) to {MAX_NODES} nodes, got "
                        f"{tree[:40]}")


def limits_of(gamma: str, max_new_tokens: int, eos_ids: tuple[int, ...], tree: str = "0") -> Limits:
    """gamma, tree: values of --gamma and --tree."""
    return Limits(max_new_tokens, eos_ids, MAX_GAMMA if gamma == AUTO else int(gamma),
                  MAX_NODES if tree == AUTO else int(tree), may_choose=tree == AUTO)
