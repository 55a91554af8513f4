"""Plain and ours are timed on the same work: they learn alike, propose alike, and all figures are
written.
"""

import json
import math

import numpy as np
import pytest
import torch

import benchmark
from base import UserError
from benchmarks import adapter, train
from tests.conftest import write_pairs
from token_adapter import AdapterConfig

SMALL = {"vocab_size": 90, "embed_dim": 32, "num_layers": 1, "num_heads": 2, "device": "cpu"}
FIGURES = {
    "steps_per_epoch", "step_ms", "steps_per_s", "epoch_s", "first_epoch_s", "all_epochs_s",
    "50_epochs_s", "train_losses", "validation_s", "validation_loss", "validation_alpha",
    "peak_memory_mib", "model_tflop_per_s", "share_of_limit"
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("benchmark") / "train.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        # small and short: it must learn faster, and fewer sentences
        monkeypatch.setattr(train, "peak_rate", lambda name: 2e-2)
        monkeypatch.setattr(train, "SENTENCES", 3)
        benchmark.measure(
            "train",
            train.Config(**SMALL, made_pairs=100, num_epochs=6, max_seq_len=52, output=output,
                         batch_size=10))
    return json.loads(output.read_text())


def test_plain_and_ours_learn_alike(trained):
    """Other dropout and another order: not the same numbers, but the same lesson."""
    for name, run in trained["runs"].items():
        for loop in ("plain", "ours"):
            losses = run[loop]["train_losses"]
            assert len(losses) == 6 and losses[-1] < losses[0], (name, loop)
        alphas = [run[loop]["validation_alpha"] for loop in ("plain", "ours")]
        assert min(alphas) > 0.5 and abs(alphas[0] - alphas[1]) < 0.1, (name, alphas)


def test_the_output_of_train_holds_everything(trained):
    assert list(trained["runs"]) == ["prefix+draft", "prefix", "draft"] and trained["made"]
    assert (trained["pairs"], trained["validation_pairs"], len(trained["wanted"])) == (100, 10, 12)
    for run in trained["runs"].values():
        for loop in ("plain", "ours"):
            figures = run[loop]
            assert set(figures) == FIGURES and figures["steps_per_epoch"] == 10
            step_ms, least_ms = figures["step_ms"], run["limits"]["least_step_ms"]
            assert figures["50_epochs_s"] == pytest.approx(50 * math.ceil(5208 / 10) * step_ms / 1000)
            assert figures["share_of_limit"] == pytest.approx(least_ms / step_ms)
        assert run["times_faster"] == pytest.approx(run["plain"]["step_ms"] / run["ours"]["step_ms"])


def test_the_limit_counts_no_padding(tmp_path):
    pairs = train.load_pairs([write_pairs(tmp_path / "pairs.json", ["a_a", "b_b"])])
    schedule, rates = train.Schedule(3, 32, 0.5, seed=42), {"matmul": 1e12, "copy": 1e12}
    models = [train.new_adapter(AdapterConfig(90, "prefix", 32, 1, 2, 128, max_seq_len), 42,
                                torch.device("cpu")) for max_seq_len in (60, 120)]
    short, long = (train.limits(model, pairs, schedule, rates) for model in models)
    assert short["step_gflop"] == long["step_gflop"]
    positions = int(pairs.lengths("target").sum() + pairs.lengths("draft").sum())
    weights = sum(weight.numel() for weight in models[0].transformer.parameters()) + 90 * 32
    assert short["step_gflop"] * 1e9 == pytest.approx(6 * positions * weights / math.ceil(len(pairs) / 32))


def test_synthetic_pairs_are_the_same_each_time_and_validation_repeats_sentences_but_not_rows():
    first, again, other = (train.synthetic_rows(60, 400, seed) for seed in (1, 1, 2))
    assert first == again != other
    targets = [np.array([row["vl_tokens"] for row in rows]) for rows in (first, other)]
    assert all((targets[0] == target).mean(1).max() > 0.7 for target in targets[1])
    assert len(np.unique(targets[0], axis=0)) > 30 and targets[0].shape[1] == 50
    assert all(41 <= len(row["egpt_tokens"]) <= 47 for row in first)


def test_the_users_pairs_are_trained_on_and_must_fit_the_vocabulary(tmp_path, files):
    config = {
        **SMALL, "pairs": [files["train"]], "test_pairs": [files["test"]], "num_epochs": 2,
        "max_seq_len": 9, "conditioning": "prefix", "plain": False
    }
    results = train.measure(train.Config(**config))
    assert (results["pairs"], results["validation_pairs"], results["made"]) == (80, 20, False)
    assert list(results["runs"]) == ["prefix"] and results["runs"]["prefix"]["plain"] is None
    assert [row["measured"] is None for row in results["wanted"]] == [False, False, True, True]
    train.show(results)
    odd = write_pairs(tmp_path / "odd.json", ["a_a"])
    odd.write_text(odd.read_text().replace('"vl_tokens": [', '"vl_tokens": [90, '))
    with pytest.raises(UserError, match="token id 90, wanted ids below the vocabulary size 90"):
        train.measure(train.Config(**{**config, "test_pairs": [odd]}))


# ------------------------------------------------------------------------------------------ adapter
@pytest.fixture(scope="module")
def steps_timed(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("benchmark") / "adapter.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(adapter, "REPEATS", 5)
        benchmark.measure("adapter", adapter.Config(**SMALL, max_seq_len=48, output=output))
    return json.loads(output.read_text())


def test_all_ways_to_ask_an_adapter_propose_the_same(steps_timed):
    assert steps_timed["alike"] == 1 and steps_timed["draft_pass_ms"]["alike"] == 1
    model = adapter.new_adapter(AdapterConfig(90, "prefix+draft", 32, 1, 2, 128), 42, torch.device("cpu"))
    ways = [adapter.Plain(model, False), adapter.Plain(model, True), adapter.Ours(model)]
    for way in ways:
        way.begin([5, 6, 7])
    for prefix in ([], [4, 9], [4, 9, 11, 12], [4, 8], [4, 8, 30]):          # grows, and turns off
        proposed = [way.propose(prefix, 4) for way in ways]
        assert proposed[0] == proposed[1] == proposed[2] and len(proposed[0]) == 4


def test_the_output_of_adapter_holds_everything(steps_timed):
    assert set(steps_timed["ms"]) == {"prefix+draft", "prefix"} and len(steps_timed["wanted"]) == 3
    for ways in steps_timed["ms"].values():
        assert set(ways) == {"plain, whole", "plain, cached", "ours"}
        assert all(set(times) == {"step", "eight", "begin"} for times in ways.values())
    least = steps_timed["limits"]["least_ms"]
    assert least["eight"] == pytest.approx(
        8 * least["step"]) and least["draft_pass"] >= least["step"]
    sizes = AdapterConfig(90, "prefix", 32, 1, 2, 128, max_seq_len=48)
    weights = adapter.new_adapter(sizes, 42, torch.device("cpu"))
    read = [
        weight for name, weight in weights.named_parameters()
        if name.startswith(("transformer", "output_proj"))
    ]
    tied = weights.embedding.weight                                     # read as the output layer's
    assert steps_timed["limits"]["step_weights_mib"] * 2**20 == sum(weight.nbytes for weight in [*read, tied])
