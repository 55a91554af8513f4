"""Simulated decoding is speculative decoding."""

import numpy as np
import pytest

from acceptance.metrics import measure
from acceptance.simulation import by_question, simulate, stream
from drafting.baselines import Fixed
from tests.acceptance.builders import CONTRACT, random_pairs


def decode_one(right: list[bool], gamma: int) -> tuple[int, list[int]]:
    """Speculative decoding of one answer as it is defined, token by token: (passes, accepted
    proposals of each).
    """
    at, accepted = 0, []
    while at < len(right):
        run = 0
        while run < gamma and at + run < len(right) and right[at + run]:
            run += 1
        accepted.append(run)
        at += run + 1  # the bonus token; past the end there is none
    return len(accepted), accepted


@pytest.mark.parametrize("gamma", [1, 2, 3, 5, 8, 12])
def test_simulation_of_all_answers_together_equals_each_one_alone(gamma):
    random = np.random.default_rng(gamma)
    lengths = random.integers(1, 15, 60)  # answers of one token and shorter than gamma among them
    top1 = random.random((60, 14)) < 0.7
    top1[:5], top1[5:10] = True, False
    simulated = simulate(top1, lengths, gamma)
    single = [decode_one(row[:length].tolist(), gamma) for row, length in zip(top1, lengths)]
    assert simulated["passes"].tolist() == [passes for passes, _ in single]
    assert simulated["tau"] == pytest.approx(lengths.sum() / sum(passes for passes, _ in single))
    histogram = np.bincount([n for _, accepted in single for n in accepted], minlength=gamma + 1)
    assert simulated["accepted_lengths"] == histogram.tolist()


def test_a_perfect_drafter_needs_one_pass_for_gamma_plus_one_tokens_and_a_wrong_one_a_pass_for_each():
    lengths = np.array([9, 10, 1])
    inside = np.arange(10) < lengths[:, None]
    assert simulate(inside, lengths, 4)["passes"].tolist() == [2, 2, 1]
    assert simulate(~inside, lengths, 4)["passes"].tolist() == [9, 10, 1]
    assert simulate(~inside, lengths, 4)["tau"] == 1.0


def test_tau_of_a_drafter_that_streams_is_that_of_its_hits():
    pairs = random_pairs(CONTRACT)
    target = pairs.padded("target", 9)
    proposals = np.where(np.arange(9) % 3 < 2, target, -1)[:, :, None].repeat(5, 2)
    simulated = stream(Fixed(proposals, pairs), pairs)
    right = np.broadcast_to(np.arange(9) % 3 < 2, (30, 9))
    assert simulated["alpha"] == simulated["top5"] == measure(right, pairs.lengths("target"))["alpha"]
    again = simulate(simulated["top1"], pairs.lengths("target"), 12)
    assert simulated["simulated"]["12"]["tau"] == again["tau"]


def test_figures_of_a_question_are_those_of_its_answers_alone():
    rng = np.random.default_rng(5)
    lengths, top1 = rng.integers(2, 9, 12), rng.random((12, 9)) < 0.7
    question = np.array([0, 3, -1] * 4, np.int32)
    figures = by_question(top1, lengths, question)
    assert list(figures) == ["0", "3"]
    rows = question == 3
    inside = np.arange(9) < lengths[rows][:, None]
    assert figures["3"] == {"answers": 4, "alpha": pytest.approx(top1[rows][inside].mean()),
                            "tau": simulate(top1[rows], lengths[rows], 8)["tau"]}
    assert by_question(top1, lengths, None) == by_question(top1, lengths, question * 0) == {}
