"""Pairs as tensors on a device, and the adapter's hits on them by its own contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from drafting.adapter import logit_chunks
from drafting.contract import TOP
from pairs.pairs import Pairs
from token_adapter import NOT_SCORED, TokenAdapter

GPU_LOGITS = 2**28  # of one batch, 1 GiB: small batches on a GPU are launching and little else


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTensors:
    """N pairs on a device, as flat as Pairs holds them; a batch is padded when it is needed.

    On a CPU the flat tokens are those of the pairs themselves. Answers are cut at max_seq_len.
    """

    flat: dict[str, torch.Tensor]    # {"draft", "target"}: all tokens of the files, int32
    start: dict[str, torch.Tensor]   # where each answer begins in them, (N,) int64
    draft_lengths: torch.Tensor      # (N,) int64, cut
    target_lengths: torch.Tensor     # (N,) int64, cut
    lengths: np.ndarray              # (N,) int64 target tokens, uncut
    width: int                       # of the longest target, cut
    draft_width: int                 # of the longest draft, cut; at least 1

    @classmethod
    def of(cls, pairs: Pairs, max_seq_len: int, device: torch.device) -> TokenTensors:
        flat, start, cut = {}, {}, {}
        for which in ("draft", "target"):
            tokens = getattr(pairs, which)
            tokens = tokens if len(tokens) else np.zeros(1, np.int32)     # an index 0 must exist
            flat[which] = torch.from_numpy(tokens).to(device)
            start[which] = torch.from_numpy(getattr(pairs, f"{which}_start")).to(device)
            cut[which] = torch.from_numpy(pairs.lengths(which)).clamp(max=max_seq_len)
        return cls(flat, start, cut["draft"].to(device), cut["target"].to(device),
                   pairs.lengths("target"), int(cut["target"].max()),
                   max(int(cut["draft"].max()), 1))

    @property
    def device(self) -> torch.device:
        return self.draft_lengths.device

    def targets(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """(B, width) int64 tokens of these rows (B,) int64, NOT_SCORED past an answer's end."""
        return self._padded("target", self.target_lengths, rows, width, NOT_SCORED)

    def drafts(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """(B, width) int64, filled up with 0."""
        return self._padded("draft", self.draft_lengths, rows, width, 0)

    def _padded(self, which: str, lengths: torch.Tensor, rows: torch.Tensor, width: int,
                fill: int) -> torch.Tensor:
        at = torch.arange(width, device=self.device)
        inside = at < lengths[rows, None]
        at = (self.start[which][rows, None] + at).where(inside, 0)
        return self.flat[which][at].long().where(inside, fill)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator:
        """Yield (rows (B,) int64 on the device, width, positions) with targets of like length side
        by side.

        A batch is as wide as its own longest target. With a generator, equal lengths are mixed anew
        each time and the batches come in random order. Lengths are read on the host: the device is
        never waited for.
        """
        def shuffled(n: int) -> torch.Tensor:
            return torch.arange(n) if generator is None else torch.randperm(n, generator=generator)

        lengths = torch.from_numpy(self.lengths).clamp(max=self.width)
        order = shuffled(len(lengths))
        order = order[torch.argsort(lengths[order], stable=True)]
        lengths, order = lengths[order], order.to(self.device)
        for number in shuffled(-(-len(lengths) // batch_size)):
            batch = slice(int(number) * batch_size, (int(number) + 1) * batch_size)
            yield order[batch], int(lengths[batch][-1]), int(lengths[batch].sum())


def hidden_and_labels(adapter: TokenAdapter, tokens: TokenTensors, rows: torch.Tensor,
                      width: int) -> tuple:
    """(x (B, T, D) before the output layer, labels (B, T) int64), T = width - the adapter's first
    position.

    Labels are columns of the logits, NOT_SCORED past the end and for ids that the adapter doesn't
    score.
    """
    target, first = tokens.targets(rows, width), adapter.config.first_position
    labels = adapter.labels_of(target[:, first:])
    if not adapter.config.sees_prefix:
        return adapter.hidden(tokens.drafts(rows, width - first)), labels
    prefix = target[:, :-1].clamp(min=0)  # past the end any id will do
    if adapter.config.conditioning == "prefix":
        return adapter.hidden(tokens.drafts(rows, 0), None, prefix), labels
    return adapter.hidden(tokens.drafts(rows, tokens.draft_width), tokens.draft_lengths[rows],
                          prefix), labels


def predict(adapter: TokenAdapter, tokens: TokenTensors,
            batch_size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The adapter's hits by its own contract: top1, top5 (N, T) bool, and the loss in nats a token
    that it scores.
    """
    top1, top5, loss, scored = hits_of(adapter, tokens, batch_size)
    return top1, top5, loss / max(scored, 1)


@torch.inference_mode()
def hits_of(adapter: TokenAdapter, tokens: TokenTensors,
            batch_size: int) -> tuple[np.ndarray, np.ndarray, float, int]:
    """top1, top5 (N, T) bool, the sum of the losses in nats, and the tokens that it is of.

    In float32 on every device, whatever it was trained in; on a GPU batches are as large as their
    logits allow. Logits that are no numbers are misses, and make the loss NaN.
    """
    adapter.eval()
    if tokens.device.type == "cuda":
        batch_size = max(batch_size, GPU_LOGITS // (tokens.width * adapter.config.outputs))
    first = adapter.config.first_position
    top1 = torch.zeros(len(tokens.lengths), tokens.width, dtype=torch.bool, device=tokens.device)
    top5 = top1.clone()
    loss = torch.zeros((), dtype=torch.float64, device=tokens.device)
    scored = torch.zeros((), dtype=torch.long, device=tokens.device)
    for rows, width, _ in tokens.batches(batch_size):
        if width <= first:
            continue
        x, labels = hidden_and_labels(adapter, tokens, rows, width)
        hits, remaining = [], labels.flatten()
        for logits in logit_chunks(adapter, x):
            label, remaining = remaining[:len(logits)], remaining[len(logits):]
            best, columns = logits.topk(min(TOP, logits.shape[-1]))
            hits.append((columns == label[:, None]) & best.isfinite())
            loss += F.cross_entropy(logits, label, reduction="sum")
        right = torch.cat(hits).view(*labels.shape, -1)
        top1[rows, first:width], top5[rows, first:width] = right[:, :, 0], right.any(-1)
        scored += (labels != NOT_SCORED).sum()
    return top1.cpu().numpy(), top5.cpu().numpy(), float(loss), int(scored)
