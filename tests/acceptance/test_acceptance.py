"""What counts as a hit, and that training and evaluation count alike."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import acceptance.metrics as acceptance
from acceptance.metrics import TokenTensors, compare, measure
from drafting.adapter import Adapter
from drafting.baselines import Fixed, commonest_tokens, direct_copy
from drafting.contract import NOTHING
from pairs.formats import Pairs
from tests.conftest import flat
from token_adapter import CONTRACTS, ORIGINAL_CONTRACT, AdapterConfig, TokenAdapter
from training.loop import Trainer, train_epoch

VOCAB_SIZE = 11
CONTRACT = CONTRACTS["draft"]


def pairs_of(drafts: list[list[int]], targets: list[list[int]]) -> Pairs:
    return Pairs(*flat(drafts), *flat(targets), [""] * len(drafts), list(range(len(drafts))), [])


def random_pairs(contract: str) -> Pairs:
    """30 pairs of 1 to 9 tokens: a target token is the draft's plus 3, or that of the place before."""
    rng = np.random.default_rng(0)
    drafts = [list(map(int, rng.permutation(VOCAB_SIZE)[:rng.integers(1, 10)])) for _ in range(30)]
    answers = [[(token + 3) % VOCAB_SIZE for token in draft] for draft in drafts]
    if contract == ORIGINAL_CONTRACT:
        answers = [[5, *answer[:-1]] for answer in answers]
    return pairs_of(drafts, answers)


class Oracle(nn.Module):
    """Knows that a target token is the draft's plus 3, and proposes the one `late` places further on."""

    def __init__(self, contract: str = CONTRACT, late: int = 0):
        super().__init__()
        self.late = late
        self.config = SimpleNamespace(first_position=int(contract == ORIGINAL_CONTRACT), sees_prefix=False,
                                      conditioning="draft")
        self.sure = nn.Parameter(torch.tensor(9.0))

    def labels_of(self, ids):
        return ids

    def hidden(self, draft):
        known = torch.roll((draft + 3) % VOCAB_SIZE, -self.late, dims=1)
        return self.sure * nn.functional.one_hot(known, VOCAB_SIZE)

    def output(self):
        return nn.Identity(), torch.eye(VOCAB_SIZE), torch.zeros(VOCAB_SIZE)

    forward = hidden


def evaluated(oracle: Oracle, pairs: Pairs, max_seq_len: int = 9) -> dict:
    top1, top5, _ = acceptance.predict(oracle, TokenTensors.of(pairs, max_seq_len, torch.device("cpu")), batch_size=4)
    return compare(top1, top5, pairs, None)["adapter"]


def trained_alpha(oracle: Oracle, pairs: Pairs) -> float:
    tokens, generator = TokenTensors.of(pairs, 9, torch.device("cpu")), torch.Generator().manual_seed(0)
    return train_epoch(Trainer(oracle, batch_size=4, rate=1e-3, steps=8), tokens, generator)[1]


def test_a_perfect_adapter_is_right_everywhere_in_training_and_in_evaluation():
    pairs = random_pairs(CONTRACT)
    result = evaluated(Oracle(), pairs)
    assert trained_alpha(Oracle(), pairs) == result["alpha"] == result["top5"] == result["first_token"] == 1.0
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
    assert evaluated(Oracle(), pairs, max_seq_len=4)["alpha"] == np.minimum(lengths, 4).sum() / lengths.sum()


def test_the_metrics_of_a_worked_example():
    top1 = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]], bool)      # answers of 4, 2 and 1 tokens
    result = measure(top1, np.array([4, 2, 1]), top1 | True)
    assert result["alpha"] == 4 / 7 and result["top5"] == 1.0
    assert result["first_token"] == 2 / 3 and result["mean_run"] == (2 + 1 + 0) / 3
    assert result["per_position"]["count"] == [3, 2, 1, 1]
    assert result["per_position"]["alpha"] == [2 / 3, 1 / 2, 0.0, 1.0]


@pytest.mark.parametrize(("alpha", "gamma", "tokens"), [(0, 5, 1), (1, 5, 6), (0.5, 1, 1.5), (0.5, 2, 1.75)])
def test_expected_tokens_follow_the_formula(alpha, gamma, tokens):
    assert acceptance.expected_tokens(alpha, gamma) == tokens


def test_expected_tokens_agree_with_drawing_independent_positions():
    right = np.random.default_rng(0).random((20000, 5)) < 0.6
    run = np.where(right.all(1), 5, right.argmin(1))
    assert acceptance.expected_tokens(0.6, 5) == pytest.approx(1 + run.mean(), abs=0.03)


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
    constant = compare(np.zeros((1, 4), bool), np.zeros((1, 4), bool), test, commonest)["constant_string"]
    assert (constant["alpha"], constant["top5"]) == (0.5, 0.75)


def test_batches_hold_each_pair_once_no_wider_than_their_longest_target():
    tokens = TokenTensors.of(random_pairs(CONTRACT), 9, torch.device("cpu"))
    batches = list(tokens.batches(4, torch.Generator().manual_seed(3)))
    rows = torch.cat([rows for rows, _, _ in batches])
    assert sorted(rows.tolist()) == list(range(30)) and rows.tolist() != list(range(30))
    for rows, width, positions in batches:
        assert (width, positions) == (tokens.lengths[rows].max(), tokens.lengths[rows].sum())


def test_a_batch_is_padded_when_it_is_asked_for_from_tokens_that_are_shared():
    pairs = pairs_of([[1, 2], [], [3, 4, 5, 6], [7]], [[8], [9, 10, 8], [8, 9], [10] * 5]).select([3, 2, 1])
    tokens = TokenTensors.of(pairs, 4, torch.device("cpu"))
    assert all(np.shares_memory(tokens.flat[which].numpy(), getattr(pairs, which)) for which in ("draft", "target"))
    assert (tokens.width, tokens.draft_width, tokens.device.type) == (4, 4, "cpu")
    assert tokens.lengths.tolist() == [5, 2, 3] and tokens.draft_lengths.tolist() == [1, 4, 0]
    rows = torch.tensor([2, 0, 1])
    assert tokens.targets(rows, 6).tolist() == [[9, 10, 8, -100, -100, -100], [10] * 4 + [-100] * 2,
                                                [8, 9] + [-100] * 4]
    assert tokens.drafts(rows, 3).tolist() == [[0, 0, 0], [7, 0, 0], [3, 4, 5]]
    assert tokens.drafts(rows, 0).shape == (3, 0) and tokens.targets(rows, 2).dtype == torch.int64


def test_pairs_without_a_draft_token_are_tensors_too():
    tokens = TokenTensors.of(pairs_of([[], []], [[8], [9, 10]]), 4, torch.device("cpu"))
    assert tokens.drafts(torch.tensor([1, 0]), tokens.draft_width).tolist() == [[0], [0]]


def test_figures_do_not_depend_on_how_many_answers_are_reckoned_at_a_time(monkeypatch):
    pairs, random = random_pairs(CONTRACT), np.random.default_rng(0)
    top1, top5 = (random.random((30, 9)) < share for share in (0.5, 0.8))
    commonest, names = commonest_tokens(pairs, 9), [f"town_{i // 3}_a" for i in range(30)]
    lengths = pairs.lengths("target")

    def figures() -> list:
        hits = acceptance.number_right(top1, lengths)
        simulated = acceptance.simulate(top1, lengths, 3)
        return [compare(top1, top5, pairs, commonest), {**simulated, "passes": simulated["passes"].tolist()},
                hits.tolist(), acceptance.interval(hits, lengths, names), acceptance.by_drive(hits, lengths, names)]

    whole = figures()
    monkeypatch.setattr(acceptance, "BLOCK", 7)
    monkeypatch.setattr(acceptance, "DRAWN_AT_A_TIME", 70)
    assert figures() == whole


def test_comparing_and_simulating_take_a_small_multiple_of_the_hits(monkeypatch):
    monkeypatch.setattr(acceptance, "BLOCK", 100)
    monkeypatch.setattr(acceptance, "DRAWN_AT_A_TIME", 2**13)
    answers = [[5] * 30] * 4000
    pairs, top1, lengths = pairs_of(answers, answers), np.ones((4000, 30), bool), np.full(4000, 30)
    commonest = commonest_tokens(pairs, 30)
    tracemalloc.start()
    found = compare(top1, top1, pairs, commonest)
    acceptance.simulate(top1, lengths, 3)
    acceptance.interval(acceptance.number_right(top1, lengths), lengths, [f"town_{i // 2}_a" for i in range(4000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The three arrays of the baselines' hits, and numbers for each answer: one array of ids would be 4 of these.
    assert found["direct_copy"]["alpha"] == 1 and peak < 7 * top1.nbytes


# ------------------------------------------------------------------------------------------ simulated decoding
def decode_one(right: list[bool], gamma: int) -> tuple[int, list[int]]:
    """Speculative decoding of one answer as it is defined, token by token: (passes, accepted proposals of each)."""
    at, accepted = 0, []
    while at < len(right):
        run = 0
        while run < gamma and at + run < len(right) and right[at + run]:
            run += 1
        accepted.append(run)
        at += run + 1                                    # the bonus token; past the end there is none
    return len(accepted), accepted


@pytest.mark.parametrize("gamma", [1, 2, 3, 5, 8, 12])
def test_simulation_of_all_answers_together_equals_each_one_alone(gamma):
    random = np.random.default_rng(gamma)
    lengths = random.integers(1, 15, 60)                 # answers of one token and shorter than gamma among them
    top1 = random.random((60, 14)) < 0.7
    top1[:5], top1[5:10] = True, False
    found = acceptance.simulate(top1, lengths, gamma)
    alone = [decode_one(row[:length].tolist(), gamma) for row, length in zip(top1, lengths)]
    assert found["passes"].tolist() == [passes for passes, _ in alone]
    assert found["tau"] == pytest.approx(lengths.sum() / sum(passes for passes, _ in alone))
    histogram = np.bincount([n for _, accepted in alone for n in accepted], minlength=gamma + 1)
    assert found["accepted_lengths"] == histogram.tolist()


def test_a_perfect_drafter_needs_one_pass_for_gamma_plus_one_tokens_and_a_wrong_one_a_pass_for_each():
    lengths = np.array([9, 10, 1])
    inside = np.arange(10) < lengths[:, None]
    assert acceptance.simulate(inside, lengths, 4)["passes"].tolist() == [2, 2, 1]
    assert acceptance.simulate(~inside, lengths, 4)["passes"].tolist() == [9, 10, 1]
    assert acceptance.simulate(~inside, lengths, 4)["tau"] == 1.0


def test_tau_of_a_drafter_that_streams_is_that_of_its_hits():
    pairs = random_pairs(CONTRACT)
    target = pairs.padded("target", 9)
    proposals = np.where(np.arange(9) % 3 < 2, target, -1)[:, :, None].repeat(5, 2)
    found = acceptance.stream(Fixed(proposals, pairs), pairs)
    right = np.broadcast_to(np.arange(9) % 3 < 2, (30, 9))
    assert found["alpha"] == found["top5"] == measure(right, pairs.lengths("target"))["alpha"]
    assert found["simulated"]["12"]["tau"] == acceptance.simulate(found["top1"], pairs.lengths("target"), 12)["tau"]


def test_intervals_hold_the_value_and_pairing_takes_the_common_part_out():
    random = np.random.default_rng(0)
    lengths = np.full(200, 50)
    good = random.random((200, 50)) < np.repeat(random.uniform(0.4, 0.9, 10), 20)[:, None]    # blocks differ
    better = good | (random.random((200, 50)) < 0.05)
    names = [f"town_{i // 20:02}_a" for i in range(200)]
    one = acceptance.interval(good.sum(1), lengths, names)
    both = acceptance.interval(better.sum(1), lengths, names, good.sum(1))
    assert one["low"] < one["value"] < one["high"] and one["by"] == "sequences"
    assert 0 < both["low"] < both["value"] < both["high"]
    assert both["high"] - both["low"] < 0.3 * (one["high"] - one["low"])
    assert acceptance.interval(good.sum(1), lengths, [""] * 200)["by"] == "blocks of 20 clips"


def test_beside_an_interval_stands_the_range_when_one_drive_at_a_time_is_left_out():
    lengths, names = np.full(6, 10), ["bern_00_a", "bern_00_b", "bern_00_b", "thun_01_a", "basel_02_a", "basel_02_a"]
    hits = np.array([9, 9, 9, 2, 5, 5])
    assert acceptance.interval(hits, lengths, names)["left_out"] == pytest.approx([12 / 30, 37 / 50])
    assert acceptance.interval(hits[:3], lengths[:3], names[:3])["left_out"] is None


def test_a_token_that_is_not_scored_is_a_miss_and_costs_no_loss():
    pairs = pairs_of([[1]] * 2, [[3, 7, 5], [7, 9]])
    adapter = TokenAdapter(AdapterConfig(11, "prefix", 8, 1, 2, 16, 4, draft_vocab=3), torch.tensor([3, 5, 7]))
    top1, top5, loss = acceptance.predict(adapter, TokenTensors.of(pairs, 4, torch.device("cpu")), 2)
    assert top5.tolist() == [[True, True, True], [True, False, False]] and not top1[1, 1] and 0 < loss < 20
    whole = Adapter(adapter, pairs)
    assert set(np.concatenate([whole.predict(0), whole.predict(1)]).ravel()) <= {3, 5, 7, NOTHING}
