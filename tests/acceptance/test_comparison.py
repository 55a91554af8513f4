"""Every position counts, in training and in evaluation, for the adapter and for both baselines."""

import tracemalloc

import numpy as np
import torch

from acceptance import intervals, metrics
from acceptance.comparison import compare
from acceptance.intervals import by_drive, interval
from acceptance.metrics import number_right
from acceptance.simulation import simulate
from acceptance.tensors import TokenTensors, predict
from drafting.baselines import commonest_tokens, direct_copy
from pairs.pairs import Pairs
from tests.acceptance.builders import CONTRACT, Oracle, pairs_of, random_pairs
from token_adapter import ORIGINAL_CONTRACT
from training.loop import Trainer, train_epoch


def evaluated(oracle: Oracle, pairs: Pairs, max_seq_len: int = 9) -> dict:
    top1, top5, _ = predict(oracle, TokenTensors.of(pairs, max_seq_len, torch.device("cpu")), batch_size=4)
    return compare(top1, top5, pairs, None)["adapter"]


def trained_alpha(oracle: Oracle, pairs: Pairs) -> float:
    tokens = TokenTensors.of(pairs, 9, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    return train_epoch(Trainer(oracle, batch_size=4, rate=1e-3, steps=8), tokens, generator)[1]


def test_a_perfect_adapter_is_right_everywhere_in_training_and_in_evaluation():
    pairs = random_pairs(CONTRACT)
    result = evaluated(Oracle(), pairs)
    assert trained_alpha(Oracle(),
                         pairs) == result["alpha"] == result["top5"] == result["first_token"] == 1.0
    assert result["mean_run"] == pairs.lengths("target").mean()
    assert result["per_position"]["alpha"] == [1.0] * 9
    assert result["expected_tokens"]["10"] == 11.0


def test_an_adapter_that_is_late_by_one_is_wrong_in_training_and_in_evaluation():
    pairs = random_pairs(CONTRACT)
    assert trained_alpha(Oracle(late=1), pairs) < 0.05
    assert evaluated(Oracle(late=1), pairs)["alpha"] < 0.05


def test_an_original_checkpoint_is_measured_by_its_own_contract_and_misses_only_the_first_token():
    pairs = random_pairs(ORIGINAL_CONTRACT)
    result = evaluated(Oracle(ORIGINAL_CONTRACT), pairs)
    assert result["per_position"]["alpha"] == [0.0] + [1.0] * 8
    assert result["alpha"] == 1 - len(pairs) / pairs.lengths("target").sum()
    assert result["mean_run"] == 0


def test_positions_past_max_seq_len_count_as_misses():
    pairs = random_pairs(CONTRACT)
    lengths = pairs.lengths("target")
    assert evaluated(Oracle(), pairs,
                     max_seq_len=4)["alpha"] == np.minimum(lengths, 4).sum() / lengths.sum()


def test_past_its_end_the_draft_proposes_nothing_not_even_a_0():
    pairs = pairs_of([[7, 0]], [[7, 0, 0, 0]])
    assert direct_copy(pairs, 4).tolist() == [[7, 0, -1, -1]]
    nothing = np.zeros((1, 4), bool)
    assert compare(nothing, nothing, pairs, None)["direct_copy"]["alpha"] == 0.5


def test_the_constant_string_is_the_commonest_training_token_at_each_position():
    train = pairs_of([[1]] * 4, [[4, 5], [4, 6], [4, 6, 9], [3]])
    commonest = commonest_tokens(train, 4)
    assert commonest[:, 0].tolist() == [4, 6, 9, -1]
    assert commonest[1].tolist() == [6, 5, -1, -1, -1]
    test = pairs_of([[1]], [[4, 5, 9, 9]])
    constant = compare(np.zeros((1, 4), bool), np.zeros((1, 4), bool), test, train)["constant_string"]
    assert (constant["alpha"], constant["top5"]) == (0.5, 0.75)


def test_figures_do_not_depend_on_how_many_answers_are_compared_at_a_time(monkeypatch):
    pairs, random = random_pairs(CONTRACT), np.random.default_rng(0)
    top1, top5 = (random.random((30, 9)) < share for share in (0.5, 0.8))
    names = [f"town_{i // 3}_a" for i in range(30)]
    lengths = pairs.lengths("target")

    def figures() -> list:
        hits = number_right(top1, lengths)
        simulated = simulate(top1, lengths, 3)
        return [compare(top1, top5, pairs, pairs), {**simulated, "passes": simulated["passes"].tolist()},
                hits.tolist(), interval(hits, lengths, names), by_drive(hits, lengths, names)]

    unbatched = figures()
    monkeypatch.setattr(metrics, "BLOCK_POSITIONS", 7 * 9)
    monkeypatch.setattr(intervals, "DRAWN_AT_A_TIME", 70)
    assert figures() == unbatched


def test_comparing_and_simulating_take_a_small_multiple_of_the_hits(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_POSITIONS", 100 * 30)
    monkeypatch.setattr(intervals, "DRAWN_AT_A_TIME", 2**13)
    answers = [[5] * 30] * 4000
    pairs, top1, lengths = pairs_of(answers, answers), np.ones((4000, 30), bool), np.full(4000, 30)
    tracemalloc.start()
    figures_of_all = compare(top1, top1, pairs, pairs)
    simulate(top1, lengths, 3)
    interval(number_right(top1, lengths), lengths, [f"town_{i // 2}_a" for i in range(4000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Numbers for each answer, not for each position: one array of ids would be 4 of these.
    assert figures_of_all["direct_copy"]["alpha"] == 1 and peak < 7 * top1.nbytes
