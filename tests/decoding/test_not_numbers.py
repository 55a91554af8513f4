"""A token never comes from logits that are not finite; such logits behind a refused proposal change
nothing.
"""

import dataclasses
import math

import pytest
import torch

from decoding.contracts import NO_TOKEN
from decoding.limits import Limits
from decoding.loop import decode
from decoding.rules import Sampling
from drafting.contract import NoDrafts
from tests.decoding.test_decoding import EOS, PROMPTS, QUALITY, VOCABULARY, Automaton, Following, Knowing

NAN, INF = math.nan, math.inf


class NotNumbers(Exception):
    pass


class Spoilt(Automaton):
    """Its logits are not finite after one context; spreads: they spoil all rows of the same pass,
    as masked NaN do.
    """

    def __init__(self, context: list[int], value: float = NAN, spreads: bool = False):
        super().__init__(5, 5)
        self.context, self.value, self.spreads = context, value, spreads

    def _after(self, tokens: list[int], count: int) -> Following:
        following = super()._after(tokens, count)
        logits = following.logits.clone()
        ends = range(len(tokens) - count + 1, len(tokens) + 1)
        bad = [tokens[end - 3:end] == self.context for end in ends]
        if self.spreads and any(bad):
            bad = [True] * count
        logits[torch.tensor(bad), 3] = self.value
        largest, best = logits.max(-1)
        return Following(best.where(largest.isfinite(), NO_TOKEN), logits)

    def not_numbers(self) -> NotNumbers:
        return NotNumbers("float16")


@pytest.fixture(params=["greedy", "sampling"])
def rule(request):
    if request.param == "greedy":
        return {}
    # so cold that it says what greedy decoding says
    return {"rule": Sampling(1e-3, 1)}


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("quality", QUALITY)
def test_an_answer_that_needs_such_a_token_has_none(quality, value, rule):
    """At its first token, in its middle, at its last one; the drafter learns nothing."""
    plain, learnt = Automaton(5, 5).plain(PROMPTS[1], 12), []
    for at in (0, 3, len(plain) - 1):
        target = Spoilt([*PROMPTS[1], *plain][at:at + 3], value)
        drafter = Knowing(plain, QUALITY[quality])
        drafter.learn = learnt.append
        target.ask(PROMPTS[1])
        with pytest.raises(NotNumbers):
            decode(target, drafter, Limits(12, (EOS,), 5), **rule)
        assert not learnt


@pytest.mark.parametrize("spreads", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
def test_such_logits_behind_a_refused_proposal_change_nothing(value, spreads, rule):
    plain = Automaton(5, 5).plain(PROMPTS[1], 12)

    @dataclasses.dataclass
    class Misleading(NoDrafts):
        """A right token, a wrong one, and the context after which the target is spoilt."""

        def propose(self, prefix, gamma, price=0.0):
            wrong = (plain[len(prefix) + 1] + 1) % VOCABULARY if len(prefix) + 1 < len(plain) else 9
            return [*plain[len(prefix):len(prefix) + 1], wrong, 13, 14, 15][:gamma]

    target = Spoilt([13, 14, 15], value, spreads)
    target.ask(PROMPTS[1])
    decoded = decode(target, Misleading(), Limits(12, (EOS,), 5), **rule)
    assert decoded.tokens == plain
    assert sum(decoded.accepted) + len(decoded.accepted) >= len(plain)


def test_an_end_before_such_a_token_is_an_end():
    """EOS is proposed and right; what would follow it is asked for in the same pass and needed by
    nobody.
    """
    plain = Automaton(5, 5).plain(PROMPTS[1], 30)
    assert plain[-1] == EOS
    target = Spoilt([*PROMPTS[1], *plain][-3:])
    target.ask(PROMPTS[1])
    decoded = decode(target, Knowing(plain, QUALITY["always"]), Limits(30, (EOS,), 8))
    assert decoded.tokens == plain
