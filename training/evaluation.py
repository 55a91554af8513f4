"""What a trained adapter or a checkpoint is worth: metrics on train, validation and test pairs."""

from __future__ import annotations

import dataclasses
import sys

from acceptance.comparison import measure_adapter
from acceptance.evaluation import Selected, measure_drafters
from base import log
from drafting.parts import SimulationParts
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
    all_trees: bool = True             # simulate trees that ask the adapter too: slow on a CPU


def evaluate(adapter: TokenAdapter, trained: Trained | None, data: Data, how: Measuring) -> dict:
    """Metrics on each set of pairs: {"train": ..., "test": ...}; on test all drafters side by side.

    adapter: on its device. trained: None for a checkpoint. On validation the selected adapter is
    measured, which never trained on those pairs.
    """
    device = next(adapter.parameters()).device
    limit = how.max_pairs if how.max_pairs != -1 else sys.maxsize
    test = shortened(data.test, limit)
    metrics = {}
    selected, prefix = None, None
    if data.train:
        train = shortened(data.train, limit)
        metrics["train"] = measure_adapter(adapter, train, data.train, how.batch_size, "train")
    if trained:
        prefix, pairs = trained.prefix, data.training
        selected = Selected(trained.selected.to(device), pairs.train, pairs.validation)
        metrics["validation"] = measure_adapter(selected.adapter, pairs.validation, pairs.train,
                                                how.batch_size, "validation")
    metrics["test"] = measure_adapter(adapter, test, data.all_train, how.batch_size, "test")
    if len(test) < len(data.test):
        log(f"drafters | on {len(test)} of {len(data.test)} test pairs, the first clips of every "
            "sequence; --max_test_samples -1 measures all")
    parts = SimulationParts(adapter, test, data.all_train, prefix_adapter=prefix, streaming=how.stream,
                            online=how.online and how.stream, seed=how.seed)
    metrics["test"].update(measure_drafters(parts, selected, how.all_trees), whole_test=len(data.test))
    return metrics
