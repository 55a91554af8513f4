"""Batches say what transformers' generate answers each clip alone: on the demo's models, exactly in
float32.
"""

import numpy as np
import pytest
import torch

from base import UserError
from machine.device import Runtime
from tests.conftest import ROOT
from tests.vlm.test_eventgpt import FIXTURES
from tests.vlm.test_steps import needs_gpu
from vlm import batches as module
from vlm.batches import Batches, asked_at_once, clips_that_fit
from vlm.eventgpt import EventGPT
from vlm.video_llava import VideoLlava

MODELS = {"video_llava": (VideoLlava, ROOT / "demo" / "models" / "video_llava", 8),
          "eventgpt": (EventGPT, ROOT / "demo" / "models" / "eventgpt", 1),
          "parity": (EventGPT, FIXTURES[0] / "checkpoint", 5)}
QUESTIONS = [
    "What are the key elements in this scene?",
    "Why?",
    "Is there a vehicle, and is it parked or driving?",
]


@pytest.fixture(scope="module", params=MODELS)
def case(request) -> tuple:
    """(model, pixels of 5 clips, answers of each alone to each question)."""
    kind, folder, pictures = MODELS[request.param]
    model, random = kind.load(folder, Runtime.choose("cpu")), np.random.default_rng(0)
    pixels = [model.prepare(list(random.integers(0, high, (pictures, 72, 96, 3), dtype=np.uint8)))
              for high in (255, 40, 120, 200, 90)]
    singly = [[model.answer([clip], [question], 24)[0] for question in QUESTIONS] for clip in pixels]
    # else a mix-up were unseen
    assert len({tuple(answer.tokens) for answers in singly for answer in answers}) > 3
    return model, pixels, singly


def batches_of(model, pixels, questions=QUESTIONS, clips=5, tokens=24, **how) -> Batches:
    return Batches(model, questions, tokens, len(pixels[0]), clips, **how)


@pytest.mark.parametrize("clips", [1, 2, 5])
@pytest.mark.parametrize("questions", [1, 3])
def test_answers_are_those_of_each_clip_and_question_alone(case, clips, questions):
    model, pixels, singly = case
    batches = batches_of(model, pixels, QUESTIONS[:questions], clips)
    # started before one ends
    waiting = [batches.answer(pixels[at:at + clips]) for at in range(0, 5, clips)]
    assert [answers for wait in waiting for answers in wait()] == [
        answers[:questions] for answers in singly
    ]


def test_more_questions_than_fit_side_by_side_are_asked_in_groups(case, monkeypatch):
    model, pixels, singly = case
    monkeypatch.setattr(module, "ASKED", 2)
    assert batches_of(model, pixels).answer(pixels)() == singly
    assert [asked_at_once(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 2, 2, 2]


def test_pieces_of_the_prompts_are_as_good_as_the_whole(case, monkeypatch):
    model, pixels, singly = case
    monkeypatch.setattr(module, "READ_TOKENS", 1)
    assert batches_of(model, pixels).answer(pixels)() == singly


def test_an_answer_ends_with_eos_and_at_the_limit(case):
    model, pixels, singly = case
    for tokens in (1, 2, 9):
        batched = batches_of(model, pixels, tokens=tokens).answer(pixels)()
        assert [[answer.tokens for answer in answers] for answers in batched] == [
            [answer.tokens[:tokens] for answer in answers] for answers in singly]
    batches = batches_of(model, pixels, QUESTIONS[:1])
    for _ in range(2):  # the second batch finds the first one's tokens in the buffers
        assert [answers[0] for answers in batches.answer(pixels)()] == [
            answers[0] for answers in singly
        ]


def test_it_stops_when_all_have_ended(case, monkeypatch):
    model, pixels, _ = case
    steps, token = [], model.answer([pixels[0]], QUESTIONS[:1], 8)[0].tokens[2]
    monkeypatch.setattr(module, "LOOK", 2)
    forward = Batches._next
    monkeypatch.setattr(Batches, "_next", lambda self, *how: steps.append(1) or forward(self, *how))
    batches = batches_of(model, pixels, QUESTIONS[:1], clips=1, tokens=100)
    batches.eos = torch.tensor([token])
    batches.answer(pixels[:1])
    assert len(steps) <= 6  # the third token is an end; looks are two steps apart


def test_nan_of_one_batch_does_not_reach_the_next(case):
    model, pixels, singly = case
    batches = batches_of(model, pixels)
    batches.answer([clip * torch.nan for clip in pixels])
    assert batches.answer(pixels)() == singly


def test_too_long_a_prompt_is_refused(case):
    model, pixels, _ = case
    with pytest.raises(UserError, match="positions, the model has"):
        batches_of(model, pixels, tokens=100_000)


def test_as_many_clips_as_fit(case, monkeypatch):
    model, pixels, _ = case
    assert clips_that_fit(model, QUESTIONS, 24, len(pixels[0])) == module.CPU_CLIPS

    class OnGpu:
        decoder = model.decoder
        layout = model.layout
        runtime = Runtime(torch.device("cuda", 0), torch.float32, "none")

    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    batched = {}
    for mib in (1, 200, 10_000_000):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, mib=mib: (mib * 2**20, 0))
        batched[mib] = clips_that_fit(OnGpu, QUESTIONS, 24, len(pixels[0]))
    assert batched[1] == 1 and 1 < batched[200] <= batched[10_000_000] == module.ROWS // 3
    batches, free = batches_of(model, pixels, clips=batched[200]), 200 * 2**20
    assert batches.seen.nbytes + batches.said.nbytes < module.FILLED * free


def test_questions_must_leave_the_front_of_the_prompt_alone(case):
    model, pixels, _ = case
    before, after = model.layout(QUESTIONS, len(pixels[0]))
    embeds = model.prompt_embeds(pixels[0], QUESTIONS[1])
    assert before + len(after[1]) == embeds.shape[1]


# ----------------------------------------------------------------------------------------- on a GPU
@needs_gpu
@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["video_llava", "eventgpt"])
def test_graphs_answer_as_eager_steps_and_as_transformers(name, dtype, quantization):
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    kind, folder, pictures = MODELS[name]
    model, random = (
        kind.load(folder, Runtime.choose("cuda", dtype, quantization)),
        np.random.default_rng(0),
    )
    pixels = [model.prepare(list(random.integers(0, high, (pictures, 72, 96, 3), dtype=np.uint8)))
              for high in (255, 40, 120)]
    graphed, eager = (
        batches_of(model, pixels, clips=2),
        batches_of(model, pixels, clips=2, graphs=False),
    )
    batched = [[answers for at in (0, 2) for answers in batches.answer(pixels[at:at + 2])()]
             for batches in (graphed, eager)]
    assert bool(graphed.graph) == (quantization != "8bit") and not eager.graph
    assert quantization == "8bit" or batched[0] == batched[1]
    if dtype == "float32" and quantization == "none":
        assert batched[0] == [
            [model.answer([clip], [question], 24)[0] for question in QUESTIONS] for clip in pixels
        ]
