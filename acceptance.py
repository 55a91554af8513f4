"""How often proposals are right: one definition of every metric, and the baselines that stand beside them.

Every target position counts, position 0 too. One for which nothing is proposed (past the draft's end in plain
copying, past --max_seq_len for anything, before a checkpoint's first position) is a miss and never left out.

The expected tokens for each target pass follow Leviathan et al. 2023, "Fast Inference from Transformers via
Speculative Decoding", equation 1. It takes positions for independent; those of answers by template are not.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from base import Pairs

GAMMAS = range(1, 11)
TOP = 5
NOTHING = -1                   # where a baseline proposes nothing: equal to no id
PAST_END = -100                # label past the target's end: cross_entropy leaves it out, and no id equals it


# ---------------------------------------------------------------------------------------------------- metrics
def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens for each target pass when each of gamma proposals is right with chance alpha, independently."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def measure(top1: np.ndarray, lengths: np.ndarray, top5: np.ndarray | None = None) -> dict:
    """All metrics of one drafter on N answers.

    top1, top5: (N, T) bool, proposal right at that position; past an answer's end they are not looked at.
    lengths: (N,) tokens in each target, uncut: those past T count as misses. One of them reaches T.
    """
    width = top1.shape[1]
    inside = np.arange(width) < lengths[:, None]
    positions, count = int(lengths.sum()), inside.sum(0)
    top1 = top1 & inside
    top5 = None if top5 is None else top5 & inside
    run = np.where(top1.all(1), width, top1.argmin(1))
    alpha = float(top1.sum() / positions)
    return {
        "alpha": alpha,
        "top5": None if top5 is None else float(top5.sum() / positions),
        "first_token": float(top1[:, 0].mean()),
        "mean_run": float(run.mean()),
        "expected_tokens": {str(gamma): expected_tokens(alpha, gamma) for gamma in GAMMAS},
        "per_position": {
            "count": count.tolist(),
            "alpha": (top1.sum(0) / count).tolist(),
            "top5": None if top5 is None else (top5.sum(0) / count).tolist(),
        },
    }


# -------------------------------------------------------------------------------------------------- baselines
def direct_copy(pairs: Pairs, width: int) -> np.ndarray:
    """(N, width) int32: the draft's own tokens as proposals; NOTHING past its end."""
    inside = np.arange(width) < pairs.lengths("draft")[:, None]
    return np.where(inside, pairs.padded("draft", width), NOTHING)


def commonest_tokens(pairs: Pairs, max_seq_len: int) -> np.ndarray:
    """(max_seq_len, TOP) int32: the commonest target tokens at each position, then NOTHING.

    Column 0 is the constant string: proposed for every clip alike, it shows how much of an alpha is template.
    """
    target, lengths = pairs.padded("target", max_seq_len), pairs.lengths("target")
    commonest = np.full((max_seq_len, TOP), NOTHING, np.int32)
    for position in range(min(max_seq_len, lengths.max())):
        counts = np.bincount(target[lengths > position, position])
        best = np.argsort(-counts, kind="stable")[:TOP]
        best = best[counts[best] > 0]
        commonest[position, :len(best)] = best
    return commonest


def compare(top1: np.ndarray, top5: np.ndarray, pairs: Pairs, commonest: np.ndarray | None) -> dict:
    """The adapter's hits (N, T) on these pairs, with both baselines over the same T positions."""
    width, lengths = top1.shape[1], pairs.lengths("target")
    target = pairs.padded("target", width)
    adapter = measure(top1, lengths, top5)
    copied = measure(direct_copy(pairs, width) == target, lengths)
    constant = None
    if commonest is not None:
        right = commonest[:width] == target[:, :, None]
        constant = measure(right[:, :, 0], lengths, right.any(-1))
    return {
        "pairs": len(pairs),
        "positions": int(lengths.sum()),
        "positions_past_max_seq_len": int(np.maximum(lengths - width, 0).sum()),
        "improvement": adapter["alpha"] - copied["alpha"],
        "adapter": adapter,
        "direct_copy": copied,
        "constant_string": constant,
    }


# ----------------------------------------------------------------------------------------- adapter on tensors
@dataclasses.dataclass(frozen=True)
class TokenTensors:
    """N pairs on a device, made once; T is the longest target, at most max_seq_len."""

    draft: torch.Tensor              # (N, T) int32, filled up with 0
    target: torch.Tensor             # (N, T) int32, PAST_END after its end
    lengths: np.ndarray              # (N,) int64 target tokens, uncut

    @classmethod
    def of(cls, pairs: Pairs, max_seq_len: int, device: torch.device) -> "TokenTensors":
        lengths = pairs.lengths("target")
        width = min(max_seq_len, int(lengths.max()))
        target = np.where(np.arange(width) < lengths[:, None], pairs.padded("target", width), PAST_END)
        draft = pairs.padded("draft", width)
        return cls(torch.from_numpy(draft).to(device), torch.from_numpy(target).to(device), lengths)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator:
        """Yield (rows (B,) int64 on the device, width, positions) with targets of like length side by side.

        A batch is as wide as its own longest target. With a generator, equal lengths are mixed anew each time
        and the batches come in random order. Lengths are read on the host: the device is never waited for.
        """
        def shuffled(n: int) -> torch.Tensor:
            return torch.arange(n) if generator is None else torch.randperm(n, generator=generator)

        lengths = torch.from_numpy(self.lengths).clamp(max=self.target.shape[1])
        order = shuffled(len(lengths))
        order = order[torch.argsort(lengths[order], stable=True)]
        chunks, rows = lengths[order].split(batch_size), order.to(self.draft.device).split(batch_size)
        for number in shuffled(len(chunks)).tolist():
            yield rows[number], int(chunks[number][-1]), int(chunks[number].sum())


def score(adapter, tokens: TokenTensors, rows: torch.Tensor, width: int, first: int) -> tuple:
    """(logits (B, width - first, V), labels (B, width - first) int64); `first` is the adapter's position."""
    draft = tokens.draft[rows, :width - first].long()
    return adapter(draft), tokens.target[rows, first:width].long()


@torch.inference_mode()
def predict(adapter, tokens: TokenTensors, batch_size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The adapter's hits by its own contract: top1, top5 (N, T) bool, and the loss in nats for each proposal.

    In float32 on every device, whatever it was trained in.
    """
    adapter.eval()
    first = adapter.config.first_position
    top1 = torch.zeros_like(tokens.target, dtype=torch.bool)
    top5 = top1.clone()
    loss = torch.zeros((), dtype=torch.float64, device=tokens.target.device)
    proposals = 0
    for rows, width, positions in tokens.batches(batch_size):
        if width <= first:
            continue
        logits, labels = score(adapter, tokens, rows, width, first)
        best = logits.topk(min(TOP, logits.shape[-1])).indices == labels[:, :, None]
        top1[rows, first:width], top5[rows, first:width] = best[:, :, 0], best.any(-1)
        loss += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAST_END,
                                reduction="sum")
        proposals += positions - first * len(rows)
    return top1.cpu().numpy(), top5.cpu().numpy(), float(loss) / max(proposals, 1)
