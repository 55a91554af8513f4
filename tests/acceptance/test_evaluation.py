"""The figures of all drafters: every number is one, and there is one definition of each."""

import json
import math

import pytest
import torch

from acceptance.comparison import compare, measure_adapter
from acceptance.evaluation import Selected, measure_drafters
from acceptance.tensors import TokenTensors, predict
from base import UserError
from drafting import adapter as adapter_module
from drafting.adapter import Adapter
from drafting.table import SIMULATED, SimulationParts
from tests.acceptance.builders import CONTRACT, pairs_of, random_pairs
from token_adapter import CONTRACTS, ORIGINAL_CONTRACT, AdapterConfig, TokenAdapter

ONE_PAIR = pairs_of([[]], [[3]])


def tiny(conditioning: str, max_seq_len: int, contract: str = "") -> TokenAdapter:
    torch.manual_seed(0)
    return TokenAdapter(AdapterConfig(11, conditioning, 8, 1, 2, 16, max_seq_len, 0.0, contract)).eval()


@pytest.mark.parametrize("pairs", [random_pairs(CONTRACT), ONE_PAIR], ids=["many", "one"])
@pytest.mark.parametrize(("conditioning", "contract"), [*CONTRACTS.items(), ("draft", ORIGINAL_CONTRACT)])
def test_with_one_position_and_with_one_pair_every_figure_is_a_number_or_null(conditioning, contract, pairs):
    adapter = tiny(conditioning, 1, contract)
    figures = measure_adapter(adapter, pairs, pairs, 4, "test")
    parts = SimulationParts(adapter, pairs, pairs, prefix_adapter=adapter, online=True)
    figures |= measure_drafters(parts, Selected(adapter, pairs, pairs))
    json.dumps(figures, allow_nan=False)
    assert figures["step_ms"] is None


def test_every_drafter_of_the_table_is_measured_and_hybrids_only_with_a_selection():
    adapter, pairs = tiny("prefix+draft", 9), random_pairs(CONTRACT)
    parts = SimulationParts(adapter, pairs, pairs, prefix_adapter=tiny("prefix", 9), online=True)
    figures = measure_drafters(parts, Selected(adapter, pairs, pairs))
    assert list(figures["drafters"]) == list(SIMULATED)
    assert set(figures["memory_share"]) == {"hybrid", "hybrid, online"}
    assert figures["step_ms"] > 0
    assert {name for name, rows in figures["drafters"].items() if rows["parameters"]} == {
        name for name, entry in SIMULATED.items() if entry.needs_adapter}
    checkpoint = measure_drafters(SimulationParts(adapter, pairs), None)
    assert list(checkpoint["drafters"]) == ["copy of the draft", "adapter"]


def test_with_answers_longer_than_the_adapter_every_baseline_has_one_figure_and_a_warning_is_given(capsys):
    pairs = random_pairs(CONTRACT)
    adapter = tiny("prefix+draft", 4)
    figures = measure_adapter(adapter, pairs, pairs, 4, "test")
    drafters = measure_drafters(SimulationParts(adapter, pairs, pairs), None)["drafters"]
    for ours, theirs in (("constant_string", "constant string"), ("direct_copy", "copy of the draft")):
        assert figures[ours]["alpha"] == drafters[theirs]["alpha"]
        assert figures[ours]["per_position"]["alpha"] == drafters[theirs]["per_position"]["alpha"]
    assert figures["adapter"]["alpha"] == drafters["adapter"]["alpha"]
    assert figures["positions_past_max_seq_len"] == (pairs.lengths("target") - 4).clip(min=0).sum() > 0
    assert "WARNING | 17 of 30 test answers are longer than --max_seq_len 4" in capsys.readouterr().out
    measure_adapter(tiny("prefix+draft", 9), pairs, pairs, 4, "test")
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("conditioning", CONTRACTS)
def test_figures_do_not_depend_on_how_many_logits_are_held(monkeypatch, conditioning):
    """All logits of 64 answers of 128 tokens over 262,144 ids are 8 GiB."""
    adapter, pairs = tiny(conditioning, 9), random_pairs(CONTRACT)
    tokens = TokenTensors.of(pairs, 9, torch.device("cpu"))

    def figures() -> tuple:
        top1, top5, loss = predict(adapter, tokens, 8)
        simulated = Adapter(adapter, pairs)
        return compare(top1, top5, pairs,
                       pairs), loss, [simulated.predict(k).tolist() for k in range(len(pairs))]

    whole, sizes, linear = figures(), [], torch.nn.functional.linear
    monkeypatch.setitem(adapter_module.MAX_LOGITS, "cpu", 5 * 11 + 3)
    monkeypatch.setattr(adapter_module.F, "linear",
                        lambda *args: sizes.append(linear(*args).shape) or linear(*args))
    chunked = figures()
    assert chunked[0] == whole[0] and chunked[1] == pytest.approx(
        whole[1], rel=1e-6) and chunked[2] == whole[2]
    assert max(shape[0] for shape in sizes if len(shape) == 2 and shape[1] == 11) == 5


@pytest.mark.parametrize("conditioning", CONTRACTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_adapter_whose_logits_are_no_numbers_is_one_clear_error_and_never_a_hit(conditioning, bad):
    adapter, pairs = tiny(conditioning, 9), pairs_of([[0, 1, 2, 3]] * 4, [[0, 1, 2, 3]] * 4)
    with torch.no_grad():
        adapter.output_proj[0].weight.fill_(bad)
    top1, top5, loss = predict(adapter, TokenTensors.of(pairs, 9, torch.device("cpu")), 4)
    assert not top1.any() and not top5.any() and math.isnan(loss)
    with pytest.raises(UserError, match="logits on the test pairs are no numbers"):
        measure_adapter(adapter, pairs, pairs, 4, "test")


@pytest.mark.parametrize("all_trees", [True, False])
def test_trees_are_simulated_of_what_proposes_them_and_more_nodes_bring_no_less(all_trees):
    adapter, pairs = tiny("prefix", 9), random_pairs(CONTRACT)
    parts = SimulationParts(adapter, pairs, pairs)
    drafters = measure_drafters(parts, Selected(adapter, pairs, pairs), all_trees)["drafters"]
    trees = {name: drafter["trees"] for name, drafter in drafters.items() if "trees" in drafter}
    assert set(trees) == ({"hybrid", "memory"} if all_trees else {"memory"})
    for figures in trees.values():
        assert list(figures) == ["16", "32", "64"]
        assert 1 <= figures["16"]["tau"] <= figures["64"]["tau"] + 0.2
        assert all(run["nodes"] <= int(nodes) for nodes, run in figures.items())
