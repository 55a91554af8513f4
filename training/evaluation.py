"""What a trained adapter or a checkpoint is worth: metrics on train, validation and test pairs."""

from __future__ import annotations

import dataclasses
import math
import sys

import acceptance.metrics as acceptance
from base import UserError, log
from drafting.simulated import commonest_tokens
from pairs.pairs import Pairs
from pairs.splits import Data, shortened
from token_adapter import TokenAdapter
from training.phases import Trained


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How an adapter is measured; see the flags of train_and_evaluate.py."""

    batch_size: int
    max_pairs: int                     # of a set; -1: all
    stream: bool                       # drafters may learn from each answer once it is verified
    online: bool                       # measure online gradient steps too
    seed: int                          # of the control that shuffles drafts


def evaluate(adapter: TokenAdapter, trained: Trained | None, data: Data, how: Measuring) -> dict:
    """Metrics on each set of pairs: {"train": ..., "test": ...}; on test all drafters side by side.

    adapter: on its device. trained: None for a checkpoint. On validation the selected adapter is
    measured, which never trained on those pairs.
    """
    device = next(adapter.parameters()).device
    limit = how.max_pairs if how.max_pairs != -1 else sys.maxsize
    test = shortened(data.test, limit)
    metrics = {}
    if data.train:
        metrics["train"] = _metrics_on(shortened(data.train, limit), adapter, data.train, how)
    if data.validation:
        selected = trained.selected.to(device)
        metrics["validation"] = _metrics_on(data.validation, selected, data.train, how)
    metrics["test"] = _metrics_on(test, adapter, data.all_train, how)
    for name, figures in metrics.items():
        if not trained and not math.isfinite(figures["loss"]):
            raise UserError(f"the checkpoint's logits are not finite numbers on the {name} pairs: its "
                            "weights are too large; train again")
    if len(test) < len(data.test):
        log(f"drafters | on {len(test)} of {len(data.test)} test pairs, the first clips of every "
            "sequence; --max_test_samples -1 measures all")
    metrics["test"].update(acceptance.measure_drafters(
        adapter, test, data.all_train, trained and trained.prefix,
        trained and (trained.selected, data.train, data.validation), how.stream,
        how.online and how.stream, how.seed), whole_test=len(data.test))
    return metrics


def _metrics_on(pairs: Pairs, adapter: TokenAdapter, known: Pairs | None, how: Measuring) -> dict:
    """Metrics of the adapter on these pairs; known: those that give the constant string."""
    max_seq_len = adapter.config.max_seq_len
    commonest = commonest_tokens(known, max_seq_len) if known else None
    tokens = acceptance.TokenTensors.of(pairs, max_seq_len, next(adapter.parameters()).device)
    top1, top5, loss = acceptance.predict(adapter, tokens, how.batch_size)
    return {"loss": loss, **acceptance.compare(top1, top5, pairs, commonest)}
