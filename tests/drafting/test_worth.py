"""The adapter is asked while it brings more tokens than its time would."""

import pytest

from drafting.worth import EXPLORED, PRIOR, StepWorth


def settled(worth: StepWorth, memory, mixture, verified: list[int], path: list[int]) -> float:
    """What one opinion changes in the tokens won."""
    before = worth.won
    worth.add(len(path), lambda: path, 0.5, memory, mixture)
    worth.settle(verified)
    return worth.won - before


def test_tokens_are_won_where_the_mixture_alone_was_right_and_to_the_end_of_what_was_accepted():
    # 3 and 4 verified before; 5, 6, 7 were accepted, 8 is the target's own
    verified = [3, 4, 5, 6, 7, 8]
    assert settled(StepWorth(), [9], [5], verified, [3, 4]) == 3
    assert settled(StepWorth(), [9], [7], verified, [3, 4, 5, 6]) == 1
    assert settled(StepWorth(), [5], [5], verified, [3, 4]) == 0
    assert settled(StepWorth(), [5], [9], verified, [3, 4]) == -1
    # right, but it was not proposed: the target said it itself
    assert settled(StepWorth(), [9], [8], verified, [3, 4, 5, 6, 7]) == 0
    assert settled(StepWorth(), [9], [5], verified, [3, 9]) == 0         # not on the way


def test_a_step_pays_while_what_it_won_is_more_than_its_cost():
    worth = StepWorth()
    assert worth.pays(0.4, 0.3) and not worth.pays(0.4, 0.5) and worth.pays(0.4, 0.0)
    for _ in range(20):                      # asked about much, nothing won
        worth.add(1, lambda: [3], 1.0, [5], [5])
        worth.settle([3, 5])
    assert worth.asked == PRIOR + 20 and not worth.pays(0.4, 0.3) and worth.pays(0.4, 0.0)
    passes = 0
    while not worth.pays(0.4, 0.3):          # but now and then all is asked
        worth.settle([3])
        passes += 1
    assert 0 < passes < EXPLORED
    won, asked = worth.won, worth.asked
    worth.fade()
    assert worth.won / worth.asked == pytest.approx(won / asked) and worth.asked < asked
