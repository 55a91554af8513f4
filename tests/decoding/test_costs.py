"""--tree auto takes what was faster here, trees or chains."""

import pytest

from decoding.costs import ChainOrTree
from decoding.loop import Decoded


def decoded(seconds: float) -> Decoded:
    """An answer of 21 tokens, 20 of them after the prefill, in so many seconds."""
    return Decoded([5] * 21, [0] * 2, [0, 19], verify_s=seconds)


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("gap", [1.1, 3.0])
def test_the_faster_kind_is_taken_and_the_other_tried_again_only_where_it_is_near(faster, gap):
    shape, taken = ChainOrTree(), []
    for _ in range(200):
        taken.append(shape.takes_tree())
        shape.add(taken[-1], decoded(1.0 if taken[-1] is faster else gap))
    assert sorted(taken[:4]) == [False, False, True, True]
    others = sum(kind is not faster for kind in taken[4:])
    assert others == (0 if gap > 2 else 6)


def test_what_becomes_faster_later_is_taken_then():
    shape = ChainOrTree()
    for number in range(400):
        is_tree = shape.takes_tree()
        # chains are a little faster at first, trees by far once the memory knows more
        seconds = 1.0 if not is_tree else 1.2 if number < 100 else 0.5
        shape.add(is_tree, decoded(seconds))
    assert shape.takes_tree() and shape.answers[True] > 150
