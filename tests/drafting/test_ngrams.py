"""The memory's trie counts and interpolates as the plain definition does, and is bounded."""

import numpy as np
import pytest

from drafting import ngrams as ngrams_module
from drafting.ngrams import MAX_ORDER, NGrams
from tests.drafting.builders import PlainNGrams, counts_of


def answers(count: int, seed: int, length: int = 30) -> list[list[int]]:
    """Answers by template: a few sentences with words that vary, so that contexts of every order
    recur.
    """
    random = np.random.default_rng(seed)
    sentences = np.random.default_rng(0).integers(3, 12, (4, length))
    rows = []
    for _ in range(count):
        answer = sentences[random.integers(4)].copy()
        places = random.integers(0, length, 3)
        answer[places] = random.integers(3, 12, 3)
        rows.append([*answer[:random.integers(1, length)].tolist(), 2])
    return rows


def test_distributions_are_those_of_the_plain_definition_while_answers_are_learned():
    training, stream = answers(40, 1), answers(12, 2)
    plain, ngrams = PlainNGrams(training), NGrams(before=NGrams(training))
    for answer in stream:
        state = ngrams.begin()
        for at in range(len(answer) + 1):
            wanted, distribution = plain.distribution(answer[:at]), ngrams.distribution_at(state)
            assert distribution == pytest.approx(wanted, abs=1e-12)
            # the order decides between equal probabilities
            assert list(distribution) == list(wanted)
            assert distribution == ngrams.distribution(answer[:at])
            if at < len(answer):
                state = ngrams.after(state, answer[at])
        plain.add(answer)
        ngrams.add(answer)
    assert counts_of(NGrams(training)).keys() == PlainNGrams(training).counts.keys()


def test_the_best_tokens_are_the_first_of_the_distribution():
    """Nine ids: no context lists less than all but one of them."""
    ngrams = NGrams(before=NGrams(answers(40, 1)))
    for answer in answers(12, 2):
        state = ngrams.begin()
        for token in answer:
            distribution, best = ngrams.distribution_at(state), ngrams.best(state, 3)
            wanted = sorted(distribution.values(), reverse=True)[:3]
            assert [probability
                    for probability, _ in best] == pytest.approx(wanted[:len(best)], abs=0.01)
            # where the longest contexts are sure, no more are named
            assert sum(wanted[len(best):]) < 0.01
            assert all(probability == pytest.approx(distribution[token], abs=0.01)
                       for probability, token in best)
            state = ngrams.after(state, token)
        ngrams.add(answer)


def test_a_context_lists_its_commonest_tokens_in_order():
    ngrams, random = NGrams(), np.random.default_rng(0)
    for token in random.choice(range(3, 30), 400, p=random.dirichlet(np.ones(27))).tolist():
        ngrams.add([token])
    context, = ngrams.contexts(ngrams.begin())
    wanted = sorted(context.counts.values(), reverse=True)[:ngrams_module.TOP_TOKENS]
    assert [context.counts[token] for token in context.top or ()] == wanted


def test_a_memory_is_bounded_and_keeps_what_came_up_recently(monkeypatch):
    monkeypatch.setattr(ngrams_module, "MAX_CONTEXTS", 2000)
    random, before = np.random.default_rng(0), NGrams(answers(20, 1))
    ngrams = NGrams(before=before)
    counts_before = counts_of(before)
    for _ in range(100):
        recent = random.integers(3, 1000, 40).tolist()
        ngrams.add(recent)
        assert len(ngrams.levels) <= 2 and sum(
            len(counts_of(NGramsOf(level))) for level in ngrams.levels) < 5500
        assert ngrams.best(ngrams.at(recent[:MAX_ORDER]), 1)[0][1] == recent[MAX_ORDER]
    assert counts_of(before) == counts_before


class NGramsOf(NGrams):
    """One level alone."""

    def __init__(self, level):
        self.levels = [level]


def test_an_answer_is_learned_across_the_border_of_levels(monkeypatch):
    monkeypatch.setattr(ngrams_module, "MAX_CONTEXTS", 50)
    ngrams = NGrams()
    for answer in ([5, 6, 7, 8] * 5, [5, 6, 9] * 9, [5, 6, 7, 8] * 5):
        ngrams.add(answer)
    assert ngrams.best(ngrams.at([5, 6, 7]), 1)[0][1] == 8
