"""Drafters know what was verified before, and nothing of what comes."""

import numpy as np
import pytest
import torch

from base import Pairs
from drafting import KEPT, NOTHING, Adapter, Fixed, Hybrid, Memory, NGrams, commonest_tokens
from token_adapter import AdapterConfig, TokenAdapter

CPU = torch.device("cpu")


def pairs_of(targets: list[list[int]], drafts: list[list[int]] | None = None) -> Pairs:
    def flat(lists):
        return np.array([token for one in lists for token in one], np.int32), np.cumsum([0, *map(len, lists)])

    drafts = drafts or [[1]] * len(targets)
    return Pairs(*flat(drafts), *flat(targets), ["town_00_a"] * len(targets), list(range(len(targets))), [])


TRAINING = pairs_of([[5, 6, 7, 8], [5, 6, 9, 8]])
TEST = pairs_of([[5, 6, 30, 31, 32], [5, 6, 30, 31, 33], [40]], [[7, 7], [], [9, 9, 9]])


def test_the_memory_learns_an_answer_only_when_told_and_then_prefers_it():
    memory = Memory(TRAINING, TEST)
    assert memory.predict(1)[2, 0] in (7, 9)             # what training answers said after 5 6
    memory.learn(0)
    assert memory.predict(1)[2:4, 0].tolist() == [30, 31]
    assert memory.predict(1)[4, 0] == 32                 # the last clip's word, though this clip's is 33


def test_the_memory_of_the_past_does_not_change_when_later_answers_do():
    later = pairs_of([*list(TEST.answers("target"))[:1], [1, 2, 3], [4]])
    for pairs in (TEST, later):
        memory = Memory(TRAINING, pairs)
        first = memory.predict(0)
        assert first.tolist() == Memory(TRAINING, TEST).predict(0).tolist()


def test_without_streaming_it_is_a_plain_n_gram():
    memory = Memory(TRAINING, TEST, streaming=False)
    before = memory.predict(1).tolist()
    memory.learn(0)
    assert memory.predict(1).tolist() == before


def test_chances_add_up_to_no_more_than_one_and_longer_contexts_win():
    memory = NGrams([[1, 2, 3]] * 3 + [[4, 2, 5]] * 9)
    assert sum(memory.distribution([1, 2]).values()) == pytest.approx(1.0, abs=0.35)
    assert sum(memory.distribution([1, 2]).values()) <= 1.0
    assert max(memory.distribution([1, 2]).items(), key=lambda item: item[1])[0] == 3
    assert max(memory.distribution([9, 2]).items(), key=lambda item: item[1])[0] == 5
    assert memory.distribution([77]) == {}


def test_fixed_proposals_end_with_the_answer():
    constant = Fixed(commonest_tokens(TRAINING, 5), TEST)
    assert constant.predict(0)[:, 0].tolist() == [5, 6, 7, 8, NOTHING]
    assert constant.predict(2).shape == (1, 5)


def tiny(conditioning: str) -> TokenAdapter:
    torch.manual_seed(0)
    return TokenAdapter(AdapterConfig(50, conditioning, 32, 1, 2, 64, 16, dropout=0.0))


@pytest.mark.parametrize("conditioning", ["draft", "prefix", "prefix+draft"])
def test_an_adapter_proposes_alike_alone_and_in_a_batch(conditioning):
    adapter = tiny(conditioning)
    together, alone = (Adapter(adapter, TEST, batch_size=size) for size in (3, 1))
    for number in range(3):
        assert together.predict(number).tolist() == alone.predict(number).tolist()
        assert together.predict(number).shape == (TEST.lengths("target")[number], 5)


def test_an_adapter_proposes_nothing_past_its_longest_answer():
    adapter = TokenAdapter(AdapterConfig(50, "prefix", 32, 1, 2, 64, 3))
    proposals = Adapter(adapter, TEST).predict(0)
    assert (proposals[:3] != NOTHING).all() and (proposals[3:] == NOTHING).all()


def test_shuffled_drafts_are_other_clips_drafts():
    drafter = Adapter(tiny("prefix+draft"), TEST, shuffled=3)
    assert sorted(drafter.draft_lengths.tolist()) == [0, 2, 3]
    assert drafter.draft_lengths.tolist() != [2, 0, 3]


def test_online_steps_teach_the_next_answer_and_leave_the_adapter_itself_alone():
    adapter = tiny("prefix")
    before = [parameter.clone() for parameter in adapter.parameters()]
    pairs = pairs_of([[5, 6, 30, 31]] * 40)
    drafter, right = Adapter(adapter, pairs, online=True), []
    for number, target in enumerate(pairs.answers("target")):
        right.append((drafter.predict(number)[:, 0] == target).mean())
        drafter.learn(number)
    assert right[-1] == 1.0 > right[0]
    assert all(torch.equal(old, new) for old, new in zip(before, adapter.parameters()))


def test_a_hybrid_with_all_or_nothing_of_the_memory_is_the_one_or_the_other():
    adapter = Adapter(tiny("prefix"), TEST)
    for share, other in ((0.0, adapter), (1.0, Memory(TRAINING, TEST))):
        hybrid = Hybrid(adapter, Memory(TRAINING, TEST), share)
        for number in range(3):
            ours, theirs = hybrid.predict(number)[:, 0], other.predict(number)[:, 0]
            assert ours[theirs != NOTHING].tolist() == theirs[theirs != NOTHING].tolist()
    assert KEPT >= 5
