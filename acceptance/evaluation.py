"""All drafters side by side on the test answers: the figures of results.json."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator

import numpy as np
import torch

from acceptance.intervals import interval
from acceptance.metrics import number_right
from acceptance.simulation import simulate_trees, stream
from base import log
from drafting.adapter import Adapter
from drafting.hybrid import MEMORY_SHARES, Hybrid
from drafting.memory import Memory, number_remembered, remembered, training_counts
from drafting.ngrams import NGrams
from drafting.parts import LiveParts, SimulationParts
from drafting.table import LIVE, SIMULATED
from drafting.tree import Branching
from pairs.pairs import Pairs
from token_adapter import TokenAdapter

# paired with the adapter
COMPARED = ("copy of the draft", "n-gram", "prefix", "adapter, drafts shuffled")
TIMED_STEPS, WARM_UP_STEPS = 30, 10
TREE_NODES = (16, 32, 64)            # of the trees that are simulated


def measure_drafters(parts: SimulationParts, selected: Selected | None,
                     all_trees: bool = True) -> dict:
    """Every drafter of the table streams over the answers in clip order: {"drafters": {name: ...},
    ...}.

    selected: what the memory's share in the hybrids is chosen on; None: there are no hybrids.
    all_trees: trees that ask the adapter are simulated too, which takes a step of it for each node.
    """
    if selected and parts.adapter.config.sees_prefix:
        names = ["hybrid", *["hybrid, online"] * parts.online]
        parts.memory_share.update({name: choose_share(selected, parts, name) for name in names})
    answers = len(parts.training) if parts.training else 0
    if parts.training and (count := number_remembered(parts.training.lengths("target"))) < answers:
        log(f"drafters | a memory begins with the last {count} of {answers} training answers")
    figures, hits, lengths = {}, {}, parts.pairs.lengths("target")
    for name, entry in SIMULATED.items():
        start, drafter = time.monotonic(), entry.make_simulated(parts)
        if drafter is None:
            continue
        rows = stream(drafter, parts.pairs)
        hits[name] = number_right(rows.pop("top1"), lengths)
        parameters = parts.adapter.num_parameters() if entry.needs_adapter else 0
        figures[name] = {**rows, "parameters": parameters}
        tau = rows["simulated"]["8"]["tau"]
        log(f"drafters | {name} | accepted {rows['alpha']:.1%} | tau {tau:.2f} at gamma 8 | "
            f"{time.monotonic() - start:.1f} s")
    for name, trees in tree_figures(parts, all_trees):
        figures[name]["trees"] = trees
    return {"drafters": figures, "memory_share": parts.memory_share, "stream": parts.streaming,
            "adapter_minus": {name: interval(hits["adapter"], lengths, parts.pairs.sequence, hits[name])
                              for name in COMPARED if name in hits},
            "step_ms": step_ms(parts.adapter, parts.pairs) if parts.adapter.config.sees_prefix else None}


def tree_figures(parts: SimulationParts, all_trees: bool) -> Iterator[tuple[str, dict]]:
    """(results name, {nodes: figures}) of the live drafters that propose trees."""
    live = LiveParts(parts.adapter, memory_share=parts.memory_share.get("hybrid", 0.0))
    counts = live.once("training counts", lambda: training_counts(parts))
    for entry in LIVE.values():
        name, sees_prefix = entry.results_name, parts.adapter.config.sees_prefix
        if name not in SIMULATED or (counts is None and entry.learns):
            continue
        if entry.needs_adapter and not (all_trees and sees_prefix):
            continue
        if name == "hybrid" and name not in parts.memory_share:
            continue
        trees, start = {}, time.monotonic()
        for nodes in TREE_NODES:
            drafter = entry.make_live(live)          # anew: each learns the answers
            if not isinstance(drafter, Branching) or drafter.prefers_chains:
                break
            trees[str(nodes)] = simulate_trees(drafter, parts.pairs, nodes, parts.streaming)
        if trees:
            log(f"drafters | {name}, trees | " + " | ".join(
                f"{nodes} nodes: tau {run['tau']:.2f}" for nodes, run in trees.items())
                + f" | {time.monotonic() - start:.1f} s")
            yield name, trees


@dataclasses.dataclass(frozen=True)
class Selected:
    """The adapter that was selected on validation pairs, which it was not trained on."""

    adapter: TokenAdapter
    training: Pairs
    validation: Pairs

    @functools.cached_property
    def training_counts(self) -> NGrams:
        return NGrams(remembered(self.training))


def choose_share(selected: Selected, parts: SimulationParts, name: str) -> float:
    """The memory's share in this hybrid with the best acceptance rate on the validation pairs."""
    drafter = Adapter(selected.adapter, selected.validation, online=name == "hybrid, online")
    alphas = {}
    for share in MEMORY_SHARES:
        memory = Memory(selected.training_counts, selected.validation, parts.streaming)
        alphas[share] = stream(Hybrid(drafter, memory, share), selected.validation)["alpha"]
    return max(alphas, key=alphas.__getitem__)


@torch.inference_mode()
def step_ms(adapter: TokenAdapter, pairs: Pairs) -> float | None:
    """Milliseconds of one cached step at batch 1, eager, the median of TIMED_STEPS; None: no
    position for a step.
    """
    device, times = next(adapter.parameters()).device, []
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    draft = pairs.select(np.arange(1)).padded("draft", adapter.config.max_seq_len)
    draft = torch.from_numpy(draft).to(device).long()
    _, cache = adapter.start(draft, torch.tensor([draft.shape[1]], device=device))
    for _ in range(min(WARM_UP_STEPS + TIMED_STEPS, adapter.config.max_seq_len - 1)):
        start = time.perf_counter()
        int(adapter.step(token, cache)[0, -1].argmax())
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[-TIMED_STEPS:])) if times else None
