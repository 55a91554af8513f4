"""The model with random weights has the published shape, and generate says the recorded answer in
every mode.
"""

import pytest
import torch

from machine.device import Runtime
from vlm.eventgpt import EventGPT
from vlm.peers import QUERY, Forced, generate, random_model
from vlm.video_llava import VideoLlava


@pytest.fixture(scope="module")
def model():
    return random_model(VideoLlava, "small", Runtime.choose("cpu"), 64)


@pytest.mark.parametrize(
    "mode",
    [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}],
    ids=["plain", "static cache", "prompt lookup"],
)
def test_generate_says_the_recorded_tokens_in_every_mode(model, mode):
    if "prompt_lookup_num_tokens" in mode:
        mode = {**mode, "suppress_tokens": [model.model.config.video_token_index]}
    pixels = torch.randn(8, 3, 28, 28)
    # repeats to be found; 2 ends nothing
    for answer in ([7, 8, 9, 7, 8, 9, 7, 8, 2, 2, 0, 9], [5], [4] * 9):
        assert generate(model, pixels, answer, len(answer), **mode) == answer
        assert generate(model, pixels, answer, 1, **mode) == answer[:1]


def test_forcing_forbids_no_token_and_goes_by_the_position():
    forced = Forced(3, [4, 5])
    for length, token in ((3, 4), (4, 5), (9, 5)):
        scores = forced(torch.zeros(1, length, dtype=torch.long), torch.zeros(1, 8))
        assert scores.argmax() == token and scores.isfinite().sum() == 7 and scores.min() == 0


@pytest.mark.parametrize(("kind", "size", "positions", "billions"), [
    (VideoLlava, "small", 8 * 5 + 20, None), (VideoLlava, "7b", 2076, 7.366 - 0.303),
    (EventGPT, "small", 59 + 6, None), (EventGPT, "7b", 637, 7.080)])
def test_the_prompt_is_as_long_as_the_published_one(kind, size, positions, billions):
    """On the meta device: nothing of the 7B is computed."""
    model = random_model(kind, size, Runtime(torch.device("meta"), torch.bfloat16, "none"), 64)
    before, after = model.prompt_parts(QUERY)
    assert (
        len(before) + model.visual_tokens(8 if kind is VideoLlava else 1) + len(after) == positions
    )
    assert (
        max(before + after) < model.vocab_size
        and len(model.prompt_parts("Why is that?")[1]) == len(after) - 5
    )
    assert {weight.dtype for weight in model.model.parameters()} == {torch.bfloat16}
    assert not billions or sum(
        weight.numel() for weight in model.model.parameters()
    ) / 1e9 == pytest.approx(billions, abs=0.002)


def test_4bit_is_quantised_as_loading_does():
    pytest.importorskip("bitsandbytes")
    model = random_model(
        VideoLlava, "small", Runtime(torch.device("cpu"), torch.float32, "4bit"), 64
    )
    kinds = {name: type(module).__name__ for name, module in model.model.named_modules()}
    four_bit = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert four_bit and four_bit == {
        name
        for name, kind in kinds.items()
        if kind.startswith("Linear") and ".layers." in name and "language_model" in name
    }
