"""Every drafter stands in the table once, and the table's factories make it."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from base import ROOT
from drafting.contract import NOTHING, Costs
from drafting.parts import LiveParts, SimulationParts
from drafting.table import DRAFTERS, LIVE, LIVE_NAMES, SIMULATED, results_names, styles
from tests.acceptance.builders import pairs_of
from token_adapter import AdapterConfig, TokenAdapter

PAIRS = pairs_of([[5, 6], [7]], [[8, 9, 10], [8, 9]])


def tiny(conditioning: str) -> TokenAdapter:
    torch.manual_seed(0)
    return TokenAdapter(AdapterConfig(20, conditioning, 8, 1, 2, 16, 12, dropout=0.0)).eval()


def seconds(work) -> float:
    work()
    return 0.25


OURS = {"hybrid", "memory", "adapter", "lookup", "copy", "none"}     # drafters that others may join


def test_names_and_styles_are_told_apart():
    assert LIVE_NAMES[0] == "hybrid" and set(LIVE_NAMES) >= OURS     # the first is the default
    assert len(LIVE) == sum(entry.name is not None for entry in DRAFTERS)
    assert len(SIMULATED) == sum(entry.results_name is not None for entry in DRAFTERS)
    assert set(styles()) == set(SIMULATED) and len(set(styles().values())) == len(SIMULATED)
    assert results_names().items() >= {"hybrid": "hybrid", "memory": "memory", "adapter": "adapter",
                                       "copy": "copy of the draft"}.items()


@pytest.mark.parametrize("conditioning", ["draft", "prefix", "prefix+draft"])
def test_every_live_drafter_is_made_proposes_ids_and_measures_itself(conditioning):
    parts = LiveParts(tiny(conditioning), [[8, 9, 10]], [[8, 9, 11]])
    for name, entry in LIVE.items():
        drafter = entry.make_live(parts)
        assert isinstance(drafter.measure([5], [4], [8], seconds), Costs), name
        drafter.begin([5, 6], [4])
        proposed = drafter.propose([8], 4)
        assert len(proposed) <= 4 and all(0 <= token < 20 for token in proposed), name
        drafter.learn([8, 9])


def test_live_memories_learn_each_for_itself_and_know_earlier_decodings():
    parts = LiveParts(None, [[8, 9, 10]], [[8, 9, 11]])
    ours, theirs = (LIVE["memory"].make_live(parts) for _ in range(2))
    assert ours.propose([8, 9], 1) == [11]  # of an earlier decoding: counts as much as a fresh one
    for _ in range(3):
        ours.learn([8, 9, 12])
    assert ours.propose([8, 9], 1) == [12] and theirs.propose([8, 9], 1) == [11]


@pytest.mark.parametrize(("conditioning", "readers"), [
    ("draft", {"copy", "adapter"}), ("prefix", {"copy"}), ("prefix+draft", {"copy", "adapter", "hybrid"}),
    (None, {"copy"})])
def test_who_reads_the_draft(conditioning, readers):
    assert {name for name in OURS if LIVE[name].reads_draft(conditioning)} == readers


def test_every_simulated_drafter_is_made_where_its_parts_are_there():
    everything = SimulationParts(tiny("prefix+draft"), PAIRS, PAIRS, prefix_adapter=tiny("prefix"),
                                 online=True, memory_share={"hybrid": 0.5, "hybrid, online": 0.5})
    for name, entry in SIMULATED.items():
        drafter = entry.make_simulated(everything)
        proposals = drafter.predict(0)
        assert proposals.shape == (3, 5) and proposals.dtype == np.int32, name
        drafter.learn(0)
    checkpoint = SimulationParts(tiny("draft"), PAIRS)
    names = {name for name, entry in SIMULATED.items() if entry.make_simulated(checkpoint)}
    assert names >= {"copy of the draft", "adapter"}
    assert not names & {"constant string", "n-gram", "memory", "hybrid", "prefix"}
    assert SIMULATED["constant string"].make_simulated(everything).predict(1)[0, 0] != NOTHING


def test_the_table_is_read_without_torch():
    code = "import sys, drafting.table; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
