"""Logits that are no numbers are never a token: the clip fails, its neighbours and the next clips
do not.

Both models, three dtypes; NaN in the weights, from the vision tower, in the middle of an answer, in
refused proposals; a residual stream that overflows float16 alone.
"""

import dataclasses

import numpy as np
import pytest
import torch

from decoding.limits import Limits
from decoding.loop import decode
from drafting.contract import NoDrafts
from machine.device import Runtime
from tests.vlm.test_batches import MODELS, QUESTIONS
from tests.vlm.test_steps import PROMPT, started, tiny_llama
from vlm.batches import Batches
from vlm.contract import Answer, NotNumbers
from vlm.llama import NO_NUMBER, apart
from vlm.steps import Prompted, Steps

TOKENS, NEVER = 12, 999                # NEVER: the id of an EOS that is never given
DTYPES = ["float32", "bfloat16", "float16"]


def loaded(name: str, dtype: str = "float32"):
    kind, folder, pictures = MODELS[name]
    model, random = kind.load(folder, Runtime.choose("cpu", dtype)), np.random.default_rng(0)
    return model, [
        model.prepare(list(random.integers(0, high, (pictures, 72, 96, 3), dtype=np.uint8)))
        for high in (255, 40, 120)
    ]


def batches_of(model, pixels, questions=QUESTIONS, **how) -> Batches:
    return Batches(model, questions, TOKENS, len(pixels[0]), len(pixels), **how)


def overflow(model) -> None:
    """Scale the first block's down projection: RMSNorm takes it out again in float32 and bfloat16,
    not in float16.
    """
    weight = model.decoder[0].layers[0].mlp.down_proj.weight
    weight.mul_(6e4 / weight.abs().max())


class At:
    """A forward hook that spoils an output in some calls: value at [rows of the output]."""

    def __init__(self, module, calls, rows, value=torch.nan):
        self.calls, self.rows, self.value, self.count = calls, rows, value, 0
        self.handle = module.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        if self.count in self.calls:
            output = output.clone()
            output.flatten(0, -2)[self.rows] = self.value
        self.count += 1
        return output


# --------------------------------------------------------------------------------------- in batches
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["video_llava", "eventgpt"])
def test_weights_that_are_nan_fail_every_clip(name, dtype):
    model, pixels = loaded(name, dtype)
    model.decoder[0].layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    results = batches_of(model, pixels).answer(pixels)()
    assert [type(result) for result in results] == [NotNumbers] * 3
    assert (
        f"logits in {dtype} are no numbers" in str(results[0])
        and "float32" in str(results[0]) + dtype
    )
    with pytest.raises(NotNumbers, match=dtype) as error:
        model.answer(pixels[:2], QUESTIONS[:2], TOKENS)
    assert error.value.rows == (0, 1)


@pytest.mark.parametrize("name", ["video_llava", "eventgpt"])
def test_a_stream_that_overflows_float16_fails_there_and_nowhere_else(name):
    for dtype in DTYPES:
        model, pixels = loaded(name, dtype)
        overflow(model)
        results = batches_of(model, pixels).answer(pixels)()
        wanted = NotNumbers if dtype == "float16" else list
        assert [type(result) for result in results] == [wanted] * 3, dtype
        if dtype == "float16":
            assert "try --dtype bfloat16 or float32" in str(results[0])
            with pytest.raises(NotNumbers):
                model.answer(pixels[:1], QUESTIONS[:1], TOKENS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["video_llava", "eventgpt"])
def test_one_clip_of_the_vision_tower_fails_alone(name, value):
    model, pixels = loaded(name)
    unspoilt = batches_of(model, pixels).answer(pixels)()
    spoilt = [pixels[0], torch.full_like(pixels[1], value), pixels[2]]
    results = batches_of(model, pixels).answer(spoilt)()
    assert results[0] == unspoilt[0] and results[2] == unspoilt[2] and isinstance(results[1], NotNumbers)
    with pytest.raises(NotNumbers) as error:
        model.answer(spoilt, QUESTIONS, TOKENS)
    assert error.value.rows == (1,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_token_in_the_middle_fails_its_clip_and_no_other(value):
    model, pixels = loaded("video_llava")
    unspoilt = batches_of(model, pixels).answer(pixels)()
    batches = batches_of(model, pixels)
    # Row 4 of 9 is the second clip's second question; call 0 is the prompt's end, call 3 the fourth
    # token.
    At(model.decoder[1], {3}, [4], value)
    results = batches.answer(pixels)()
    assert results[0] == unspoilt[0] and results[2] == unspoilt[2] and isinstance(results[1], NotNumbers)
    assert batches.answer(pixels)() == unspoilt  # and the next batch is as if nothing had been


def test_what_comes_after_the_end_of_an_answer_does_not_matter():
    model, pixels = loaded("video_llava")
    tokens = model.answer(pixels[:1], QUESTIONS[:1], TOKENS)[0].tokens
    model.more_eos = (tokens[3],)
    hook = At(model.decoder[1], set(range(tokens.index(tokens[3]) + 1, 99)), slice(None))
    batches = Batches(model, QUESTIONS[:1], TOKENS, len(pixels[0]), 1)
    answer = batches.answer(pixels[:1])()[0][0]
    hook.handle.remove()
    wanted = tokens[:tokens.index(tokens[3]) + 1]
    assert (answer.tokens, answer.finished) == (wanted, True)
    assert model.answer(pixels[:1], QUESTIONS[:1], TOKENS)[0] == answer


def test_a_row_of_generate_fails_alone_in_the_middle():
    model, pixels = loaded("video_llava")
    hook = At(model.decoder[1], {2}, [1])
    with pytest.raises(NotNumbers) as error:
        model.answer(pixels, QUESTIONS, TOKENS)
    hook.handle.remove()
    assert error.value.rows == (1,)
    assert all(isinstance(answer, Answer) for answer in model.answer(pixels, QUESTIONS, TOKENS))


# ------------------------------------------------------------------------------------- step by step
@pytest.mark.parametrize("quality", [0, 1, 3])
def test_proposals_that_are_no_numbers_change_no_answer(quality):
    """One token is NaN wherever it is read. It is proposed in every pass and, refused, leaves no
    trace.
    """
    llama = tiny_llama()
    answer = plain_answer(llama)
    bad = next(token for token in range(3, 60) if token not in [*answer, *PROMPT])
    llama.model.embed_tokens.weight[bad] = torch.nan

    class Proposer(NoDrafts):
        def propose(self, prefix, room, price=0.0):
            return [*answer[len(prefix):len(prefix) + quality], bad, 7, bad][:room]

    target = Prompted(Steps(llama.model, llama.lm_head, room=61))
    for _ in range(2):
        target.ask(target.steps.embed(PROMPT))
        assert decode(target, Proposer(), Limits(20, (NEVER,), 8)).tokens == answer


def plain_answer(llama) -> list[int]:
    target = Prompted(Steps(llama.model, llama.lm_head, room=61))
    target.ask(target.steps.embed(PROMPT))
    return decode(target, NoDrafts(), Limits(20, (NEVER,), 1)).tokens


def test_best_is_no_token_where_the_largest_logit_is_no_number():
    llama = tiny_llama()
    steps = Steps(llama.model, llama.lm_head, room=61)
    for value, wanted in ((torch.nan, NO_NUMBER), (torch.inf, NO_NUMBER), (-torch.inf, None)):
        hook = At(llama.lm_head, {0}, ([0], [7]), value)
        best = steps.prefill(steps.embed(PROMPT)).best.tolist()
        hook.handle.remove()
        assert (best[0] == wanted) if wanted else best[0] >= 0 and best[0] != 7


def test_refused_proposals_that_are_no_numbers_leave_nothing_behind():
    """What they wrote is zeroed: the same pass without them, and the rest of the answer, are as if
    they never were.

    Within their own pass they spoil the positions before them too (a weight of 0 times NaN is NaN).
    """
    llama = tiny_llama()
    steps, plain = (started(llama) for _ in range(2))
    wanted = [plain.verify([token]).best.tolist()[0] for token in (5, 9, 9, 41)]
    hook = At(llama.model.layers[0].mlp.down_proj, {0}, [3])
    assert NO_NUMBER in steps.verify([5, 9, 50, 17, 2]).best.tolist()
    hook.handle.remove()
    assert not steps.cache.isfinite().all()
    steps.rollback(len(PROMPT))
    assert steps.cache.isfinite().all()
    assert [steps.verify([token]).best.tolist()[0] for token in (5, 9, 9, 41)] == wanted


def test_nothing_is_zeroed_while_all_are_numbers():
    llama = tiny_llama()
    steps = started(llama)
    steps.verify([5, 9, 50]).best.tolist()
    before = steps.cache.clone()
    steps.rollback(len(PROMPT) + 1)
    assert torch.equal(steps.cache, before)


def test_a_prompt_that_is_no_number_does_not_reach_the_next_one():
    llama = tiny_llama()
    target = Prompted(Steps(llama.model, llama.lm_head, room=61))
    embeds = target.steps.embed(PROMPT)
    target.ask(embeds)
    wanted = target.prefill([5]).best.tolist()
    target.ask(embeds * torch.nan)
    assert target.prefill([5]).best.tolist() == [NO_NUMBER] * 2
    target.ask(embeds)
    assert target.prefill([5]).best.tolist() == wanted


def test_layers_whose_kernels_are_broken_give_no_tokens():
    """4-bit layers come from outside PyTorch: NaN of one fused product, whichever it is."""
    llama = tiny_llama(attention_bias=True, mlp_bias=True)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"):
        steps = started(llama)
        steps.qkv = steps.gate_up = [None] * steps.depth         # not fused: every module is called
        hook = At(llama.model.layers[1].get_submodule(module), {0}, slice(None))
        assert steps.verify([5]).best.tolist() == [NO_NUMBER], module
        hook.handle.remove()


def test_rows_that_are_no_numbers_in_both_are_not_compared():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    spoilt = logits.clone()
    spoilt[1] = torch.nan
    assert apart(spoilt, spoilt) == 0 and apart(logits, logits) == 0
    assert np.isnan(apart(logits, spoilt)) and np.isnan(apart(spoilt[1:2], spoilt[1:2]))


def test_the_message_names_the_dtype_and_what_to_try():
    assert dataclasses.is_dataclass(Answer)
    for dtype, remedy in (
        (torch.float16, "bfloat16 or float32"),
        (torch.bfloat16, "--dtype float32"),
        (torch.float32, "check the weights"),
    ):
        assert remedy in str(NotNumbers(dtype)) and str(dtype).removeprefix("torch.") in str(
            NotNumbers(dtype)
        )
