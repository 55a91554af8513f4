"""An adapter whose logits are no numbers proposes nothing there, and leaves nothing behind in its
cache.
"""

import math

import pytest
import torch

from drafting.adapter import Adapter, LiveAdapter, LiveDraftAdapter
from drafting.contract import NOTHING
from drafting.hybrid import Hybrid, LiveHybrid
from drafting.memory import LiveMemory, Memory
from drafting.ngrams import NGrams
from drafting.steps import AdapterSteps
from tests.acceptance.builders import pairs_of
from token_adapter import AdapterConfig, TokenAdapter

BAD = 7                                  # a token whose embedding is no number


def tiny(conditioning: str, bad: bool = True) -> TokenAdapter:
    torch.manual_seed(0)
    adapter = TokenAdapter(AdapterConfig(20, conditioning, 8, 1, 2, 16, 12, dropout=0.0)).eval()
    if bad:
        # the output layer stays as it was: logits are numbers until BAD is fed
        with torch.no_grad():
            adapter.output_proj[1].weight = torch.nn.Parameter(
                adapter.output_proj[1].weight.detach().clone())
            adapter.embedding.weight[BAD] = math.nan
    return adapter.requires_grad_(False)


@pytest.mark.parametrize("conditioning", ["prefix", "prefix+draft"])
def test_after_a_token_that_makes_nan_nothing_is_proposed_and_after_its_rollback_all_is_as_before(
        conditioning):
    fine, drafter = LiveAdapter(tiny(conditioning, bad=False)), LiveAdapter(tiny(conditioning))
    for one in (fine, drafter):
        one.begin([5, 6])
    wanted = fine.propose([3, 4], 3)
    assert drafter.propose([3, 4, BAD], 3) == [] and drafter.propose([3, 4, BAD, 8], 3) == []
    before_bad = wanted[:wanted.index(BAD) + 1] if BAD in wanted else wanted
    assert drafter.propose([3, 4], 3)[:len(before_bad)] == before_bad
    drafter.propose([BAD], 3)
    drafter.begin([5, 6])
    assert drafter.propose([3, 4], 3)[:len(before_bad)] == before_bad
    drafter.begin([5, BAD])
    assert (drafter.propose([3, 4], 3) == []) == (conditioning == "prefix+draft")


def test_rows_without_numbers_are_empty_and_the_memory_goes_on_alone():
    steps = AdapterSteps(tiny("prefix"))
    steps.begin([])
    assert steps.after([3, BAD], 2) == [([], [])] * 3
    answers = [[3, BAD, 9, 10]] * 2 + [[3, BAD, 9, 11]] * 2
    hybrid, memory = LiveHybrid(NGrams(answers), tiny("prefix"), 0.5), LiveMemory(NGrams(answers))
    hybrid.begin([])
    assert hybrid.propose([3, BAD], 4) == memory.propose([3, BAD], 4) != []


@pytest.mark.parametrize("conditioning", ["draft", "prefix", "prefix+draft"])
def test_an_adapter_of_nan_proposes_no_token_live_or_simulated(conditioning, capsys):
    adapter, pairs = tiny(conditioning, bad=False), pairs_of([[5, 6]], [[0, 1, 2, 3]])
    for weight in adapter.parameters():
        weight.fill_(math.nan)
    live = LiveAdapter(adapter) if adapter.config.sees_prefix else LiveDraftAdapter(adapter)
    assert "WARNING | the adapter has weights that are no numbers" in capsys.readouterr().out
    live.begin([5, 6])
    assert live.propose([], 4) == [] and live.propose([0, 1], 4) == []
    simulated = Adapter(adapter, pairs)
    assert (simulated.predict(0) == NOTHING).all()
    if adapter.config.sees_prefix:
        memory = Memory(NGrams([[0, 1, 2, 3]]), pairs)
        hybrid = Hybrid(simulated, memory, 0.5)
        assert hybrid.predict(0)[:, 0].tolist() == memory.predict(0)[:, 0].tolist() == [0, 1, 2, 3]
