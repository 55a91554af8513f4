"""What counts as a hit."""

import numpy as np
import pytest

from acceptance.metrics import expected_tokens, measure


def test_the_metrics_of_a_worked_example():
    # answers of 4, 2 and 1 tokens
    top1 = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]], bool)
    result = measure(top1, np.array([4, 2, 1]), top1 | True)
    assert result["alpha"] == 4 / 7 and result["top5"] == 1.0
    assert result["first_token"] == 2 / 3 and result["mean_run"] == (2 + 1 + 0) / 3
    assert result["per_position"]["count"] == [3, 2, 1, 1]
    assert result["per_position"]["alpha"] == [2 / 3, 1 / 2, 0.0, 1.0]


@pytest.mark.parametrize(("alpha", "gamma", "tokens"), [(0, 5, 1), (1, 5, 6), (0.5, 1, 1.5), (0.5, 2, 1.75)])
def test_expected_tokens_follow_the_formula(alpha, gamma, tokens):
    assert expected_tokens(alpha, gamma) == tokens


def test_expected_tokens_agree_with_drawing_independent_positions():
    right = np.random.default_rng(0).random((20000, 5)) < 0.6
    run = np.where(right.all(1), 5, right.argmin(1))
    assert expected_tokens(0.6, 5) == pytest.approx(1 + run.mean(), abs=0.03)
