"""The benchmark of extraction runs every way on the same small models and says how near the limit
each came.
"""

import json

import pytest

import benchmark
from base import UserError
from benchmarks import extract
from benchmarks.extract import Config


def test_it_measures_every_way_and_writes_all_numbers(tmp_path, capsys):
    output = tmp_path / "out.json"
    config = Config(size="small", clips=5, plain_clips=2, plain_batch_size=3, batch_size=2,
                    questions=3, max_new_tokens=12, files=2, num_workers=1, output=output,
                    dtype="float32", device="cpu")
    benchmark.measure("extract", config)
    results = json.loads(output.read_text())
    assert set(results["models"]) == {"eventgpt", "videollava"}
    for figures in results["models"].values():
        assert figures["one at a time"]["clips"] == 2 and figures["batches of transformers"][
            "batch_size"] == 3
        assert (figures["ours"]["answers"], figures["ours, several questions"]["answers"]) == (5,
                                                                                               12)
        for name in ("ours", "ours, several questions"):
            limit = figures[name]["limit"]
            assert figures[name]["share_of_limit"] == pytest.approx(
                figures[name]["answers_per_s"] / limit["answers_per_s"])
            assert limit["tflop_per_clip"] > 0 and limit["gib_per_clip"] > 0
        assert figures["files alone"]["clips"] >= 2 and figures["ours, with files"]["answers"] == 5
    assert results["wanted"] == []                                 # those are of 7b
    assert {row["what"].split(":")[0] for row in extract.wanted(results["models"])} == {
        "eventgpt", "videollava", "videollava, 3 questions"}
    printed = capsys.readouterr().out
    assert "table | videollava | ours, several questions" in printed and "RESULT | " in printed.splitlines(
    )[-1]


def test_the_limit_of_7b_is_that_of_its_sizes(monkeypatch):
    """On the meta device, with rates of one: 13.2 G operations a token and 0.5 MiB of keys and
    values a position.
    """
    import torch

    from benchmarks import limits
    from machine.device import Runtime
    from vlm.peers import random_model
    from vlm.video_llava import VideoLlava

    for name in ("matmul_rate", "copy_rate"):
        monkeypatch.setattr(limits, name, lambda *_: 1e12)
    model = random_model(VideoLlava, "7b", Runtime(torch.device("meta"), torch.bfloat16, "none"))
    limit = extract.limit_of(model, extract.Load(1, 2061, 64, 100, 50))
    assert limit["tflop_per_clip"] == pytest.approx(2 * 6.476e9 * 2125 / 1e12 + 1.3 + 1.1, rel=0.02)
    assert limit["gib_per_clip"] == pytest.approx(49 * (2061 / 2048 + 13.1 / 100), rel=0.02)


def test_mistakes_are_refused():
    for wrong, words in (({"files": -1}, "--files must be 0"), ({
            "questions": 0
    }, "--questions must be 1 or more"), ({"batch_size": 0}, "--batch_size must be 1 or more"),
                         ({"model": "gpt"}, "--model must be both or one of eventgpt, videollava")):
        with pytest.raises(UserError, match=words):
            Config(**wrong)
