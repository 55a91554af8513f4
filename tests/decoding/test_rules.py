"""Rules: one seed gives one answer, whatever is proposed, however often a pass is asked again."""

import pytest
import torch

from decoding.contracts import NO_TOKEN
from decoding.limits import Limits
from decoding.loop import decode
from decoding.rules import Sampling, greedy, rule_of
from decoding.verdict import judge
from drafting.contract import NoDrafts
from tests.decoding.test_decoding import EOS, PROMPTS, QUALITY, Automaton, Following, Knowing


@pytest.mark.parametrize("gamma", [1, 2, 5, 12])
@pytest.mark.parametrize("quality", QUALITY)
def test_a_sampled_answer_does_not_depend_on_what_is_proposed(quality, gamma):
    target = Automaton(5, 5)
    for prompt in PROMPTS:
        target.ask(prompt)
        plain = decode(target, NoDrafts(), Limits(20, (EOS,), 1), rule=Sampling(1.3, 7)).tokens
        target.ask(prompt)
        decoded = decode(target, Knowing(plain, QUALITY[quality]), Limits(20, (EOS,), gamma),
                         rule=Sampling(1.3, 7))
        assert decoded.tokens == plain
        if quality == "always":
            assert len(decoded.accepted) == -(-len(plain) // (gamma + 1))


def test_a_pass_that_is_asked_again_draws_the_same_tokens():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(1))
    spoilt, rule = logits.clone(), Sampling(1.0, 3)
    spoilt[0] = torch.nan
    assert rule([], [0, 1, 2], Following(None, spoilt))[0] == NO_TOKEN
    drawn_again = rule([], [0], Following(None, logits[:1]))
    assert drawn_again == Sampling(1.0, 3)([], [0], Following(None, logits[:1]))


def test_each_answer_has_a_seed_of_its_own_and_no_temperature_is_greedy():
    assert rule_of(0.0, 42, "a") is greedy
    logits = torch.zeros(1, 10**6)
    draws = [rule_of(1.0, seed, name)([], [0], Following(None, logits))
             for seed, name in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3


def test_several_ids_end_an_answer():
    target = Automaton()
    plain = target.plain(PROMPTS[0], 12)
    ends = (plain[4], plain[7])
    target.ask(PROMPTS[0])
    decoded = decode(target, Knowing(plain, QUALITY["always"]), Limits(12, ends, 8))
    first = min(plain.index(end) for end in ends)
    assert decoded.tokens == plain[:first + 1]


def test_a_sampled_answer_is_judged_by_the_draws_of_its_seed():
    """The same answer is exact; one that leaves it where the scores tie is a tie, elsewhere WRONG."""
    target = Automaton(5, 5)
    prompt, limits = PROMPTS[0], Limits(12, (EOS,), 1)
    target.ask(prompt)
    plain = decode(target, NoDrafts(), limits, rule=Sampling(1.3, 7)).tokens
    target.ask(prompt)
    scores = Sampling(1.3, 7).scores(target.prefill(plain[:-1]).logits, 0)
    assert scores.argmax(-1).tolist() == plain
    second = scores[3].topk(2).indices[1].item()
    other = [*plain[:3], second]
    verdicts = [judge(other, plain, target, prompt, noise, Sampling(1.3, 7).scores)
                for noise in (1e-9, 1e9)]
    assert [verdict["verdict"] for verdict in verdicts] == ["WRONG", "tie"]
    gap = float(scores[3, plain[3]] - scores[3, second])
    assert verdicts[0]["gap"] == pytest.approx(gap) and verdicts[0]["position"] == 3
    assert judge(plain, plain, target, prompt, 0.0, Sampling(1.3, 7).scores) == {"verdict": "exact"}
