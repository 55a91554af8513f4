"""Pairs share the memory of their tokens, however they are selected; several files become one set.
"""

import json
from pathlib import Path

import numpy as np

from pairs.formats import load_pairs
from tests.pairs.test_formats import extraction, load


def test_what_is_selected_shares_the_tokens(tmp_path):
    pairs = load(
        tmp_path,
        [extraction(i, [5, i + 9], [7] * (i + 1), egpt_text="", vl_text="") for i in range(6)])
    part = pairs.select([4, 1, 1])
    assert all(
        np.shares_memory(getattr(part, which), getattr(pairs, which))
        for which in ("draft", "target"))
    assert part.draft is pairs.draft and list(part.answers("target")) == [[7] * 5, [7] * 2, [7] * 2]
    assert part.answer("draft",
                       0) == [5, 13] and part.clip == [pairs.clip[4], pairs.clip[1], pairs.clip[1]]
    assert all(np.shares_memory(tokens, pairs.draft) for tokens in part.views("draft"))
    assert part.select([2, 0]).padded("target", 3).tolist() == [[7, 7, 0], [7, 7, 7]]
    assert part.ids("draft").tolist() == [5, 10, 13] and part.ids("target").tolist() == [7]
    assert len(pairs.select([])) == 0 and pairs.select([]).padded("draft", 2).shape == (0, 2)
    assert [len(one)
            for one in pairs.parts(4)] == [4, 2] and part.largest_ids() == pairs.largest_ids()


def test_several_files_become_one_set_and_select_keeps_rows_whole(tmp_path):
    for name, target in (("a", [4, 5, 6, 7]), ("b", [8, 9, 10, 11, 12])):
        content = {"vocab_size": 32064, "results": [extraction(0, target=target)]}
        (tmp_path / name).write_text(json.dumps(content))
    pairs = load_pairs([tmp_path / "a", tmp_path / "b"])
    assert pairs.vocab_size == 32064 and pairs.lengths("target").tolist() == [4, 5]
    assert [(largest, Path(name).name) for largest, name in pairs.largest_ids()] == [(9088, "a"),
                                                                                     (9088, "b")]
    turned = pairs.select(np.array([1, 0]))
    assert turned.padded("target", 6).tolist() == [[8, 9, 10, 11, 12, 0], [4, 5, 6, 7, 0, 0]]
    assert turned.padded("target", 2).tolist() == [[8, 9], [4, 5]]
