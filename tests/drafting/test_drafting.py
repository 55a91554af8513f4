"""Drafters know what was verified before, and nothing of what comes."""

import dataclasses

import pytest
import torch

from drafting import adapter as adapter_module
from drafting import memory as memory_module
from drafting.adapter import Adapter
from drafting.baselines import Copy, Fixed, commonest_tokens
from drafting.contract import NOTHING
from drafting.hybrid import Hybrid
from drafting.memory import Memory, remembered
from drafting.ngrams import NGrams
from drafting.steps import TOP_K
from pairs.pairs import Pairs
from tests.conftest import flat
from tests.drafting.builders import counts_of
from token_adapter import AdapterConfig, TokenAdapter

CPU = torch.device("cpu")


def pairs_of(targets: list[list[int]], drafts: list[list[int]] | None = None) -> Pairs:
    drafts = drafts or [[1]] * len(targets)
    return Pairs(*flat(drafts), *flat(targets), ["town_00_a"] * len(targets),
                 list(range(len(targets))), [])


TRAINING = pairs_of([[5, 6, 7, 8], [5, 6, 9, 8]])
NGRAMS = NGrams(TRAINING.answers("target"))
TEST = pairs_of([[5, 6, 30, 31, 32], [5, 6, 30, 31, 33], [40]], [[7, 7], [], [9, 9, 9]])


def test_the_memory_learns_an_answer_only_when_told_and_then_prefers_it():
    memory = Memory(NGRAMS, TEST)
    assert memory.predict(1)[2, 0] in (7, 9)             # what training answers said after 5 6
    memory.learn(0)
    assert memory.predict(1)[2:4, 0].tolist() == [30, 31]
    assert memory.predict(1)[4, 0] == 32  # the last clip's word, though this clip's is 33


def test_the_memory_of_the_past_does_not_change_when_later_answers_do():
    later = pairs_of([*list(TEST.answers("target"))[:1], [1, 2, 3], [4]])
    for pairs in (TEST, later):
        memory = Memory(NGRAMS, pairs)
        first = memory.predict(0)
        assert first.tolist() == Memory(NGRAMS, TEST).predict(0).tolist()


def test_without_streaming_it_is_a_plain_n_gram():
    memory = Memory(NGRAMS, TEST, streaming=False)
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
    together, one_by_one = (Adapter(adapter, TEST, batch_size=size) for size in (3, 1))
    for number in range(3):
        assert together.predict(number).tolist() == one_by_one.predict(number).tolist()
        assert together.predict(number).shape == (TEST.lengths("target")[number], 5)


def test_an_adapter_proposes_nothing_past_its_longest_answer():
    adapter = TokenAdapter(AdapterConfig(50, "prefix", 32, 1, 2, 64, 3))
    proposals = Adapter(adapter, TEST).predict(0)
    assert (proposals[:3] != NOTHING).all() and (proposals[3:] == NOTHING).all()


def test_counts_begun_with_others_are_those_of_all_and_the_others_stay_as_they_are():
    before, unbatched = NGrams([[1, 2, 3], [1, 4]]), NGrams([[1, 2, 3], [1, 4]])
    ours, theirs = NGrams(before=before), NGrams(before=before)
    for ngrams in (ours, unbatched):
        ngrams.add([1, 2, 5])
    for prefix in ([], [1], [1, 2], [1, 2, 5], [4], [9]):
        assert ours.distribution(prefix) == pytest.approx(unbatched.distribution(prefix), abs=1e-12)
        assert theirs.distribution(prefix) == before.distribution(prefix)
    assert counts_of(before) == counts_of(NGrams([[1, 2, 3], [1, 4]]))


def test_a_memory_begins_with_the_last_of_very_many_answers(monkeypatch):
    pairs = pairs_of([[number] for number in range(6)])
    pairs = dataclasses.replace(pairs, sequence=["b", "a", "b", "a", "b", "a"], clip=[3, 1, 2, 9, 1, 10])
    assert list(remembered(pairs)) == [[0], [1], [2], [3], [4], [5]]
    monkeypatch.setattr(memory_module, "MAX_TRAINING_ANSWERS", 4)
    assert list(remembered(pairs)) == [[0], [1], [3], [5]]


@pytest.mark.parametrize("conditioning", ["prefix+draft", "draft"])
def test_an_adapter_that_keeps_few_answers_proposes_the_same(monkeypatch, conditioning):
    unbatched = Adapter(tiny(conditioning), TEST, batch_size=2)
    predicted = [unbatched.predict(number).tolist() for number in range(3)]
    monkeypatch.setattr(adapter_module, "MAX_STORED", 2)
    few = Adapter(tiny(conditioning), TEST, batch_size=2)
    for _ in range(2):
        assert [few.predict(number).tolist()
                for number in range(3)] == predicted and len(few.stored) <= 2


def test_a_copy_proposes_the_draft_and_nothing_else():
    pairs = pairs_of([[1, 2, 3], [4]], [[7, 0], [8, 9]])
    assert Copy(pairs).predict(0)[:, 0].tolist() == [
        7, 0, NOTHING
    ] and Copy(pairs).predict(1)[:, 0].tolist() == [8]
    assert (Copy(pairs).predict(0)[:, 1:] == NOTHING).all()


def test_shuffled_drafts_are_other_clips_drafts():
    drafter = Adapter(tiny("prefix+draft"), TEST, shuffled=3)
    assert sorted(drafter.drafts.lengths("draft")) == [0, 2, 3]
    assert drafter.drafts.lengths("draft").tolist() != [2, 0, 3]


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
    for share, other in ((0.0, adapter), (1.0, Memory(NGRAMS, TEST))):
        hybrid = Hybrid(adapter, Memory(NGRAMS, TEST), share)
        for number in range(3):
            ours, theirs = hybrid.predict(number)[:, 0], other.predict(number)[:, 0]
            assert ours[theirs != NOTHING].tolist() == theirs[theirs != NOTHING].tolist()
    assert TOP_K >= 5
