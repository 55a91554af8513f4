"""The step engine says what transformers' plain forward says, however the positions were fed, on
tiny models.
"""

import contextlib

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.costs import rounding
from decoding.limits import Limits
from decoding.loop import decode
from machine.device import Runtime
from tests.conftest import ROOT
from tests.decoding.test_decoding import QUALITY, Knowing
from tests.vlm.test_eventgpt import FIXTURES
from vlm import steps as steps_module
from vlm.eventgpt import EventGPT
from vlm.greedy import generate_greedily
from vlm.llama import Next
from vlm.steps import TREE_SIZES, Prompted, Steps
from vlm.video_llava import VideoLlava

ROOM, VOCAB = 61, 67                                    # neither is a multiple of 8
PROMPT = list(range(3, 23))
ANSWER = [5, 50, 9, 9, 41, 2, 17, 66, 0, 30, 31, 8, 12, 60, 44, 5, 1, 29, 33, 3]
QUESTION = "What are the key elements in this scene?"
VARIANTS = {
    "plain": {}, "grouped": {"num_key_value_heads": 2}, "one key head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True,
               "num_key_value_heads": 2}, "wide heads": {"head_dim": 16}, "scaled RoPE": {
                   "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
               }
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
                "max_position_embeddings": 128, **changes
            }))
    # transformers' start: biases 0, norms 1, all logits alike
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def llama(request):
    return tiny_llama(**request.param)


def steps_of(model: LlamaForCausalLM, **how) -> Steps:
    return Steps(model.model, model.lm_head, **{"room": ROOM, **how})


def logits_of(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """The plain definition: logits (L, V) after each of ids, by transformers, without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]


def started(model: LlamaForCausalLM, **how) -> Steps:
    steps = steps_of(model, **how)
    steps.prefill(steps.embed(PROMPT))
    return steps


def alike(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Within `tolerance` of the largest logit (about 5 in tiny_llama)."""
    return ours.shape == theirs.shape and float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


def greedy(steps: Steps, embeds: torch.Tensor, count: int, eos: int) -> list[int]:
    ids = steps.prefill(embeds).best.tolist()
    while len(ids) < count and ids[-1] != eos:
        ids += steps.verify(ids[-1:]).best.tolist()
    return ids


# ----------------------------------------------------------------------------- against transformers
def test_prefill_and_steps_equal_a_forward_without_cache(llama):
    reference = logits_of(llama, PROMPT + ANSWER)
    steps = steps_of(llama)
    first = steps.prefill(steps.embed(PROMPT))
    assert alike(first.logits, reference[len(PROMPT) - 1:len(PROMPT)])
    for number, token in enumerate(ANSWER, start=len(PROMPT)):
        step = steps.verify([token])
        assert alike(step.logits, reference[number:number + 1])
        assert step.best.tolist() == [int(reference[number].argmax())]
        assert steps.length == number + 1


def test_greedy_ids_equal_generate(llama):
    class Tokenizer:
        eos_token_id, bos_token_id, pad_token_id = 2, 1, 0

        def decode(self, tokens, **how):
            return ""

    steps = steps_of(llama)
    prompts = [PROMPT, PROMPT[::-1], ANSWER, ANSWER[:7], [1, 64, 9]]
    references = [
        generate_greedily(llama, Tokenizer(), [2], 30, input_ids=torch.tensor([ids]),
                          attention_mask=torch.ones(1, len(ids), dtype=torch.long))[0].tokens
        for ids in prompts
    ]
    assert len(set().union(*references)) > 5            # else the comparison would say little
    assert [greedy(steps, steps.embed(ids), 30, 2) for ids in prompts] == references


def test_fused_weights_leave_transformers_forward_as_it_was(llama):
    before = logits_of(llama, PROMPT)
    steps = steps_of(llama)
    assert torch.allclose(logits_of(llama, PROMPT), before, atol=1e-5)
    attention, mlp = llama.model.layers[1].self_attn, llama.model.layers[1].mlp
    for fused, modules in ((steps.qkv[1], (attention.q_proj, attention.k_proj, attention.v_proj)),
                           (steps.gate_up[1], (mlp.gate_proj, mlp.up_proj))):
        assert (fused.bias is None) == (modules[0].bias is None)
        assert {module.weight.untyped_storage().data_ptr()          # no weight is stored twice
                for module in modules} == {fused.weight.data_ptr()}


@pytest.mark.parametrize("number", range(3))
def test_video_llava_through_steps_answers_as_it_does_alone(number):
    model = VideoLlava.load(ROOT / "demo" / "models" / "video_llava", Runtime.choose("cpu"))
    pixels = model.prepare(
        list(np.random.default_rng(number).integers(0, 200, (8, 72, 96, 3), dtype=np.uint8)))
    same_answers(model, pixels)


@pytest.mark.parametrize("folder", [
    ROOT / "demo" / "models" / "eventgpt", *(f / "checkpoint" for f in FIXTURES)])
def test_eventgpt_through_steps_answers_as_it_does_alone(folder):
    model = EventGPT.load(folder, Runtime.choose("cpu"))
    pixels = model.prepare(list(np.random.default_rng(0).integers(0, 255, (5, 60, 80, 3), dtype=np.uint8)))
    same_answers(model, pixels)


def same_answers(model, pixels):
    tokens_alone = model.answer([pixels], [QUESTION], 24)[0].tokens
    embeds = model.prompt_embeds(pixels, QUESTION)
    steps = Steps(*model.decoder, room=embeds.shape[1] + 24)
    # The second clip finds the first one's keys in the cache
    for _ in range(2):
        assert greedy(steps, embeds, 24, model.tokenizer.eos_token_id) == tokens_alone
    assert model.answer([pixels], [QUESTION], 24)[0].tokens == tokens_alone        # on the fused weights
    assert steps.bytes == steps.cache.nbytes


@pytest.mark.parametrize(("kind", "name"), [(EventGPT, "eventgpt"), (VideoLlava, "video_llava")])
def test_speculative_answers_of_both_models_are_their_own_whatever_is_proposed(kind, name):
    """Drafts never, always and sometimes right, of every length, EOS and the limit inside them,
    several questions.
    """
    model = kind.load(ROOT / "demo" / "models" / name, Runtime.choose("cpu"))
    picture = np.random.default_rng(3).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    pixels, target = model.prepare([picture] * (8 if kind is VideoLlava else 1)), None
    for question in (QUESTION, "Why?"):
        embeds = model.prompt_embeds(pixels, question)
        target = target or Prompted(Steps(*model.decoder, room=embeds.shape[1] + 64))
        plain = model.answer([pixels], [question], 40)[0].tokens
        # Also: an EOS early on, and at once
        for eos in (model.tokenizer.eos_token_id, plain[6], plain[0]):
            whole_answer = plain[:plain.index(eos) + 1] if eos in plain else plain
            for limit in (len(whole_answer), 5):
                for gamma in range(1, 13):
                    for wrong in QUALITY.values():
                        target.ask(embeds)
                        decoded = decode(target, Knowing(whole_answer, wrong),
                                       Limits(limit, (eos, ), gamma))
                        assert decoded.tokens == whole_answer[:limit]


def test_a_4bit_model_runs_eagerly_on_the_cpu():
    pytest.importorskip("bitsandbytes")
    model = VideoLlava.load(ROOT / "demo" / "models" / "video_llava",
                            Runtime.choose("cpu", quantization="4bit"))
    language_model, lm_head = model.decoder
    steps = Steps(language_model, lm_head, room=ROOM)
    assert steps.qkv == steps.gate_up == [None] * len(language_model.layers)
    with torch.inference_mode():
        reference = lm_head(language_model(input_ids=torch.tensor([PROMPT + ANSWER]), use_cache=False)[0][0])
    several = steps.prefill(steps.embed(PROMPT), outputs=3)
    rest = steps.verify(ANSWER)
    # Some processors multiply 4-bit weights in bfloat16: 0.4 % a rounding.
    assert alike(torch.cat([several.logits, rest.logits]), reference[len(PROMPT) - 3:], 0.02)


# ----------------------------------------------------------------------------------- against itself
@pytest.mark.parametrize("k", range(1, 18))
def test_verifying_k_equals_one_by_one(llama, k):
    one_by_one, together = started(llama), started(llama)
    wanted = torch.cat([one_by_one.verify([token]).logits for token in ANSWER[:k]])
    assert alike(together.verify(torch.tensor(ANSWER[:k])).logits, wanted)
    # The keys are right too
    assert alike(together.verify([7]).logits, one_by_one.verify([7]).logits)


@pytest.mark.parametrize("length", [0, 1, 11, 20, 21, 27, 37])
def test_after_a_rollback_it_is_as_if_the_rest_had_never_been(llama, length):
    steps = started(llama)
    steps.verify(ANSWER[:17])
    steps.rollback(length)
    assert steps.length == length
    reference = logits_of(llama, [*(PROMPT + ANSWER[:17])[:length], 4, 40, 14, 24, 34])
    assert alike(
        torch.cat([
            steps.verify([4, 40, 14]).logits,
            steps.verify([24]).logits,
            steps.verify([34]).logits
        ]), reference[-5:])


@pytest.mark.parametrize("k", [1, 2, 8, 17])
def test_an_opening_draft_in_the_prefill_equals_prefill_then_verify(llama, k):
    apart, at_once = steps_of(llama), steps_of(llama)
    first = apart.prefill(apart.embed(PROMPT)).logits
    wanted = torch.cat([first, apart.verify(ANSWER[:k]).logits])
    opening = at_once.prefill(torch.cat([at_once.embed(PROMPT), at_once.embed(ANSWER[:k])], 1), outputs=k + 1)
    assert alike(opening.logits, wanted) and opening.best.tolist() == wanted.argmax(-1).tolist()
    assert at_once.length == apart.length == len(PROMPT) + k
    assert alike(at_once.verify([7]).logits, apart.verify([7]).logits)


def test_a_clip_that_ends_in_nan_does_not_spoil_the_next():
    model = tiny_llama()
    steps = steps_of(model)
    assert steps.prefill(torch.full((1, ROOM, 32), torch.nan)).logits.isnan().all()
    steps.prefill(steps.embed(PROMPT))
    assert alike(steps.verify(ANSWER).logits, logits_of(model, PROMPT + ANSWER)[-len(ANSWER):])


def test_a_full_cache_and_a_foreign_id_are_told_with_numbers():
    steps = started(tiny_llama(), room=24)
    steps.verify([1, 2, 3])
    with pytest.raises(AssertionError, match=r"length 23 \+ 2 exceeds room 24"):
        steps.verify([1, 2])
    # The last slot can be used
    assert steps.length == 23 and steps.verify([4]).logits.shape == (1, VOCAB)
    with pytest.raises(AssertionError, match="25"):
        steps.prefill(torch.zeros(1, 25, 32))
    with pytest.raises(AssertionError, match="rollback to 25 from 24"):
        steps.rollback(25)
    steps.rollback(20)
    with pytest.raises(AssertionError, match=f"an id beyond {VOCAB - 1}"):
        steps.verify([VOCAB])


# ------------------------------------------------------------------------------------------- graphs
class FakeGraph:
    """What a CUDA graph does, on a CPU: the same work on the same buffers, written to the same outputs."""

    def __init__(self, work, wrong: float = 0.0):
        self.work, self.wrong, self.output = work, wrong, Next(*map(torch.clone, work()))

    def replay(self):
        for ours, value in zip(self.output, self.work()):
            ours.copy_(value)
        self.output.logits.mul_(1 + self.wrong)


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def capture(wrong: float):
        def fake(work, pool):
            graph = FakeGraph(work, wrong)
            return graph, graph.output

        monkeypatch.setattr(steps_module, "capture", fake)

    return capture


def test_graphs_get_their_inputs_and_leave_nothing_behind(fake_cuda):
    fake_cuda(wrong=0.0)
    model = tiny_llama()
    steps = steps_of(model)
    steps.warm_up([5, 2, 1])
    assert sorted(steps.graphs) == [1, 2, 5] and steps.length == 0 and not steps.cache.any()
    check_all_sizes(model, steps)


def test_the_noise_is_the_same_with_graphs_that_write_over_their_last_output(fake_cuda):
    fake_cuda(wrong=0.0)
    model = tiny_llama()
    noises = []
    for graphs in (False, True):
        steps = steps_of(model)
        if graphs:
            steps.warm_up([6, 1])
        embeds = steps.embed(PROMPT)
        noises.append(rounding(Prompted(steps), embeds, [3, 5, 8, 13, 21, 34]))
    assert 0 < noises[0] < 1e-4 and noises[1] == pytest.approx(noises[0], abs=1e-5)


@pytest.mark.parametrize("wrong", [1.0, torch.nan])
def test_a_graph_that_differs_from_eager_is_not_used(fake_cuda, wrong, capsys):
    fake_cuda(wrong)
    model = tiny_llama()
    steps = steps_of(model)
    steps.warm_up([2, 1])
    assert not steps.graphs
    warning = "no CUDA graphs, every step runs eagerly: the graph for 2 tokens differs"
    assert warning in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="differs from eager"):
        steps.warm_up([2, 1], must=True)
    check_all_sizes(model, steps)


def check_all_sizes(model, steps, tolerance=1e-5):
    """Every number of tokens twice, the second time with other tokens after a rollback; lists and
    tensors.
    """
    steps.prefill(steps.embed(PROMPT))
    for k in range(1, 20):
        for tokens in (ANSWER[:k], ANSWER[::-1][:k]):
            given = tokens if k % 2 else torch.tensor(tokens, device=steps.device)
            logits, best = steps.verify(given)
            assert alike(logits.float(), logits_of(model, PROMPT + tokens)[-k:].float(), tolerance)
            assert best.tolist() == logits.argmax(-1).tolist()
            steps.rollback(len(PROMPT))


@needs_gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_cuda_graphs_equal_transformers(name):
    model = tiny_llama(**VARIANTS[name]).to("cuda")
    steps = steps_of(model, graphs=True)
    assert sorted(steps.graphs) == [size for size in (*range(1, 18), *TREE_SIZES) if size <= steps.room]
    assert steps.length == 0
    check_all_sizes(model, steps, 1e-4)


@needs_gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_cuda_graphs_equal_eager_in_bfloat16(name):
    model = tiny_llama(**VARIANTS[name]).to("cuda", torch.bfloat16)
    both = [started(model, graphs=graphs) for graphs in (True, False)]
    assert both[0].graphs and not both[1].graphs
    for k in (*range(1, 20), 1, 17, 3):
        first, second = (steps.verify(ANSWER[:k]) for steps in both)
        assert alike(first.logits.float(), second.logits.float(), 0.02)
        for steps in both:
            steps.rollback(len(PROMPT))


@needs_gpu
def test_graphs_of_two_models_do_not_disturb_each_other():
    models = [tiny_llama().to("cuda"), tiny_llama(num_key_value_heads=2).to("cuda")]
    both = [started(model, graphs=True) for model in models]
    for k in (3, 1, 17, 2):
        for model, steps in zip(models, both):
            assert alike(steps.verify(ANSWER[:k]).logits, logits_of(model, PROMPT + ANSWER[:k])[-k:], 1e-4)
            steps.rollback(len(PROMPT))


@needs_gpu
@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_a_model_on_the_gpu_answers_alike_with_and_without_graphs(quantization):
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    model = VideoLlava.load(ROOT / "demo" / "models" / "video_llava",
                            Runtime.choose("cuda", "float32", quantization))
    pixels = model.prepare(list(np.random.default_rng(0).integers(0, 200, (8, 72, 96, 3), dtype=np.uint8)))
    embeds = model.prompt_embeds(pixels, QUESTION)
    eos, room = model.tokenizer.eos_token_id, embeds.shape[1] + 24
    eager = Steps(*model.decoder, room=room, graphs=False)
    automatic = Steps(*model.decoder, room=room)
    if quantization == "8bit":
        assert not automatic.graphs
    assert greedy(automatic, embeds, 24, eos) == greedy(eager, embeds, 24, eos)
