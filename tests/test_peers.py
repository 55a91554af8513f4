"""The model with random weights has the published shape, and generate says the recorded answer in every mode."""

import pytest
import torch

from vlm.loading import Runtime
from vlm.peers import Forced, generate, random_model


@pytest.fixture(scope="module")
def model():
    return random_model("small", 64, Runtime.choose("cpu"))


@pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}],
                         ids=["plain", "static cache", "prompt lookup"])
def test_generate_says_the_recorded_tokens_in_every_mode(model, mode):
    if "prompt_lookup_num_tokens" in mode:
        mode = {**mode, "suppress_tokens": [model.model.config.video_token_index]}
    pixels = torch.randn(8, 3, 28, 28)
    for answer in ([7, 8, 9, 7, 8, 9, 7, 8, 2, 2, 0, 9], [5], [4] * 9):      # repeats to be found; 2 ends nothing
        assert generate(model, pixels, answer, len(answer), **mode) == answer
        assert generate(model, pixels, answer, 1, **mode) == answer[:1]


def test_forcing_forbids_no_token_and_goes_by_the_position():
    forced = Forced(3, [4, 5])
    for length, token in ((3, 4), (4, 5), (9, 5)):
        scores = forced(torch.zeros(1, length, dtype=torch.long), torch.zeros(1, 8))
        assert scores.argmax() == token and scores.isfinite().sum() == 7 and scores.min() == 0


@pytest.mark.parametrize("size", ["small", "7b"])
def test_the_prompt_is_as_long_as_the_published_one(size):
    """On the meta device: nothing of the 7B is computed."""
    model = random_model(size, 64, Runtime(torch.device("meta"), torch.bfloat16, "none"))
    ids = model._prompt_ids(8, "")
    assert len(ids) == {"small": 8 * 5 + 20, "7b": 2076}[size]
    assert ids.count(model.model.config.video_token_index) == len(ids) - 20 and max(ids) < model.vocab_size
    assert {weight.dtype for weight in model.model.parameters()} == {torch.bfloat16}
    billions = sum(weight.numel() for weight in model.model.parameters()) / 1e9
    assert size == "small" or billions == pytest.approx(7.366 - 0.303, abs=0.002)
