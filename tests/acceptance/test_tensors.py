"""Batches of pairs on a device, and an adapter that scores a part of the vocabulary."""

import numpy as np
import torch

from acceptance.tensors import TokenTensors, predict
from drafting.adapter import Adapter
from drafting.contract import NOTHING
from tests.acceptance.builders import CONTRACT, pairs_of, random_pairs
from token_adapter import AdapterConfig, TokenAdapter


def test_batches_hold_each_pair_once_no_wider_than_their_longest_target():
    tokens = TokenTensors.of(random_pairs(CONTRACT), 9, torch.device("cpu"))
    batches = list(tokens.batches(4, torch.Generator().manual_seed(3)))
    rows = torch.cat([rows for rows, _, _ in batches])
    assert sorted(rows.tolist()) == list(range(30)) and rows.tolist() != list(range(30))
    for rows, width, positions in batches:
        assert (width, positions) == (tokens.lengths[rows].max(), tokens.lengths[rows].sum())


def test_a_batch_is_padded_when_it_is_asked_for_from_tokens_that_are_shared():
    pairs = pairs_of([[1, 2], [], [3, 4, 5, 6], [7]],
                     [[8], [9, 10, 8], [8, 9], [10] * 5]).select([3, 2, 1])
    tokens = TokenTensors.of(pairs, 4, torch.device("cpu"))
    assert all(
        np.shares_memory(tokens.flat[which].numpy(), getattr(pairs, which))
        for which in ("draft", "target"))
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


def test_a_token_that_is_not_scored_is_a_miss_and_costs_no_loss():
    pairs = pairs_of([[1]] * 2, [[3, 7, 5], [7, 9]])
    adapter = TokenAdapter(AdapterConfig(11, "prefix", 8, 1, 2, 16, 4, draft_vocab=3),
                           torch.tensor([3, 5, 7]))
    top1, top5, loss = predict(adapter, TokenTensors.of(pairs, 4, torch.device("cpu")), 2)
    assert top5.tolist() == [[True, True, True], [True, False, False]
                             ] and not top1[1, 1] and 0 < loss < 20
    predictions = Adapter(adapter, pairs)
    assert set(np.concatenate([predictions.predict(0), predictions.predict(1)]).ravel()) <= {3, 5, 7, NOTHING}
