"""Models that are not ours answer in batches, and decode with every drafter, as transformers' greedy
generate answers each clip alone: tiny random models, exactly in float32.
"""

import dataclasses
import functools
import importlib.util
import json
import shutil
import types

import numpy as np
import pytest
import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MistralConfig, Qwen2Config

from base import UserError
from clips.limits import MediaError
from decoding.costs import rounding
from decoding.limits import Limits
from decoding.loop import decode
from drafting.parts import LiveParts
from drafting.table import LIVE
from machine.device import Runtime
from tests.vlm import tiny_models
from token_adapter import AdapterConfig, TokenAdapter
from vlm import any_model
from vlm.fits import why_not
from vlm.loading import BITS, check_room, on_meta, outside_decoder
from vlm.roles import DRAFT, TARGET, View

QUESTIONS = ["What is to be seen here?", "Why?"]
LENGTH = 10
CPU = Runtime.choose("cpu")
VISION = importlib.util.find_spec("torchvision")
# name -> (maker, whether the language model runs in our own layers)
CASES = {
    "biases (Qwen2)": (functools.partial(tiny_models.llava, "qwen2"), True),
    "head norms (Qwen3)": (functools.partial(tiny_models.llava, "qwen3", head_dim=16), True),
    "other layers and a window (Gemma 2)": (
        functools.partial(tiny_models.llava, "gemma2", sliding_window=16),
        False,
    ),
    **{name: (maker, True) for name, maker in tiny_models.READS_VIDEOS.items()},
}


def needs(name: str):
    """A test's case, skipped where its processor can't be made."""
    marks = [
        pytest.mark.skipif(
            not VISION, reason="torchvision, which video processors need, is not installed"
        )
    ]
    return pytest.param(name, marks=marks if name in tiny_models.READS_VIDEOS else [])


@dataclasses.dataclass
class Case:
    """A loaded model, three clips of four frames, and its answers to each clip and question alone."""

    folder: object
    model: any_model.AnyModel
    is_fast: bool
    clips: list
    alone: list


@pytest.fixture(scope="module", params=[needs(name) for name in CASES])
def case(request, tmp_path_factory) -> Case:
    maker, is_fast = CASES[request.param]
    folder = tiny_models.write(tmp_path_factory.mktemp("models") / "model", *maker())
    model, random = any_model.load(folder, CPU), np.random.default_rng(0)
    clips = [
        model.prepare(list(random.integers(0, high, (4, 72, 96, 3), dtype=np.uint8)))
        for high in (255, 40, 120)
    ]
    alone = [
        [model.answer([clip], [question], LENGTH)[0] for question in QUESTIONS] for clip in clips
    ]
    assert (
        len({tuple(answer.tokens) for answers in alone for answer in answers}) > 3
    )  # a mix-up is seen
    return Case(folder, model, is_fast, clips, alone)


def test_language_models_like_llama_run_in_our_own_layers(case, capfd):
    assert (case.model.reason is None) == case.is_fast, case.model.reason


@pytest.mark.parametrize("at_once", [1, 3])
def test_batches_answer_as_each_clip_and_question_alone(case, at_once):
    engine = case.model.open_batches(QUESTIONS, LENGTH, case.clips[0], at_once)
    waiting = [engine.answer(case.clips[at : at + at_once]) for at in range(0, 3, at_once)]
    assert [answers for wait in waiting for answers in wait()] == case.alone


def test_every_drafter_decodes_what_generate_answers(case):
    target = case.model.open_target(QUESTIONS, 4, LENGTH + 64)
    torch.manual_seed(0)
    adapter = TokenAdapter(
        AdapterConfig(
            vocab_size=case.model.vocab_size,
            embed_dim=16,
            num_layers=1,
            num_heads=2,
            feedforward_dim=16,
            conditioning="prefix",
            max_seq_len=32,
        )
    ).eval()
    known = [answer.tokens for answers in case.alone for answer in answers]
    drafters = {name: LIVE[name].make_live(LiveParts(adapter, known)) for name in LIVE}
    accepted = dict.fromkeys(LIVE, 0)
    for nodes in (0, 8) if target.takes_trees else (0,):
        limits = Limits(LENGTH, case.model.eos_ids, 4, nodes)
        for name, drafter in drafters.items():
            for clip, answers in zip(case.clips, case.alone):
                drafter.begin(answers[0].tokens, [])
                target.ask(case.model.encode(clip, QUESTIONS[0]))
                decoded = decode(target, drafter, limits)
                assert decoded.tokens == answers[0].tokens, name
                accepted[name] += sum(decoded.accepted)
    assert accepted["copy"] > 5 and accepted["memory"] > 5 and accepted["none"] == 0


def test_all_ways_to_compute_logits_agree(case):
    target = case.model.open_target(QUESTIONS, 4, 40)
    noise = rounding(target, case.model.encode(case.clips[1], QUESTIONS[0]), [3, 5, 8, 13, 21, 34])
    assert 0 < noise < 1e-3


def test_a_longer_prompt_makes_the_cache_grow(case):
    if not case.is_fast:
        pytest.skip("its cache grows with every token")
    target = case.model.open_target(QUESTIONS, 4, 20)
    prompt = case.model.encode(case.clips[0], "Why " * 150)
    target.ask(prompt)
    assert prompt.length + 20 <= target.steps.room
    answer = case.model.answer([case.clips[0]], ["Why " * 150], 1)[0]
    assert target.prefill([]).best.tolist() == answer.tokens


def test_generation_defaults_of_the_folder_play_no_part_and_its_eos_ids_do(case, capsys):
    any_model.check(case.folder, QUESTIONS, 4, LENGTH)
    said = capsys.readouterr().out
    assert "repetition_penalty 1.3" in said and "do_sample True" in said and "is padded" in said
    ids = tiny_models.ids()
    assert case.model.eos_ids == (ids["<|im_end|>"], ids["<end_of_utterance>"])
    ended = [answer for answers in case.alone for answer in answers if answer.finished]
    assert all(answer.tokens[-1] in case.model.eos_ids for answer in ended)


def test_clips_of_other_sizes_do_not_share_a_batch(case):
    random = np.random.default_rng(1)
    small, large = (
        case.model.prepare(list(random.integers(0, 255, (4, *size, 3), dtype=np.uint8)))
        for size in ((72, 96), (56, 28))
    )
    assert small.shape == case.clips[0].shape
    assert (large.length == small.length) == (large.shape == small.shape)


def test_a_window_fits_only_where_no_context_is_longer():
    for window, longest, fits in ((None, 100, True), (100, 100, True), (99, 100, False)):
        config = MistralConfig(
            sliding_window=window,
            max_position_embeddings=longest,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        assert (why_not(config) is None) == fits
    assert why_not(Qwen2Config(sliding_window=99, use_sliding_window=False)) is None


# ---------------------------------------------------------------------------------------- bad input
@pytest.fixture
def folder(tmp_path):
    """The folder of a whole model, to be damaged."""
    return tiny_models.write(tmp_path / "model", *tiny_models.llava())


def change(file, **entries):
    settings = json.loads(file.read_text())
    settings.update(entries)
    file.write_text(
        json.dumps({key: value for key, value in settings.items() if value is not None})
    )


def refused(folder, match: str, pictures: int = 4, questions=("Why?",)):
    with pytest.raises(UserError, match=match) as caught:
        any_model.check(folder, list(questions), pictures, LENGTH)
    assert "\n" not in str(caught.value)


def test_a_model_without_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    refused(folder, "no chat template")


def test_a_chat_template_without_pictures_or_question_is_refused(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")
    refused(folder, "shows no image")
    (folder / "chat_template.jinja").write_text("<image><image><image><image>")
    refused(folder, "leaves out the question")
    (folder / "chat_template.jinja").write_text(
        "{{ messages[0]['content'][-1]['text'] }}<image><image><image><image>"
    )
    refused(folder, "puts it before the pictures")
    (folder / "chat_template.jinja").write_text("{% for ")
    refused(folder, "chat template of .* can't be used")


def test_a_tokenizer_without_the_marks_of_pictures_is_refused(folder):
    processing = any_model.Processing.of(any_model.read_config(folder)[2])
    processing.processor.image_token, processing.processor.image_token_id = "<picture>", None
    processing.text = lambda query, pictures: f"<picture>{query}"
    assert tiny_models.ids()["<image>"] not in processing.mark_ids()
    with pytest.raises(UserError, match="gives no id of <picture>"):
        processing.inputs([np.zeros((28, 28, 3), np.uint8)])


def test_generation_defaults_that_are_no_object_play_no_part(folder):
    (folder / "generation_config.json").write_text("[]")
    any_model.check(folder, QUESTIONS, 4, LENGTH)


def test_a_processor_that_cant_be_made_is_one_line(folder):
    (folder / "processor_config.json").unlink()
    refused(folder, "can't make the processor")


def test_a_text_model_and_an_unknown_one_are_refused(folder):
    change(folder / "config.json", model_type="qwen2")
    refused(folder, "qwen2 model, which reads no pictures")
    change(folder / "config.json", model_type="a_model_of_tomorrow")
    refused(folder, "a_model_of_tomorrow")


def test_code_of_the_folder_is_never_run(folder, tmp_path):
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change(folder / "config.json", model_type="its_own", auto_map={"AutoConfig": "code.Config"})
    refused(folder, "code of its own .* never run")
    change(folder / "config.json", model_type="llava", auto_map={"AutoConfig": "code.Config"})
    change(
        folder / "processor_config.json",
        processor_class="Own",
        auto_map={"AutoProcessor": "code.Own"},
    )
    refused(folder, "its own|never run|refused")
    assert not (tmp_path / "ran").exists()


def test_marks_of_pictures_in_a_question_and_long_prompts_are_refused(folder):
    refused(folder, "may not contain <image>", questions=["What is <image>?"])
    refused(folder, "positions", questions=["Why? " * 300])


def test_an_id_beyond_the_model_is_refused(folder):
    words = json.loads((folder / "config.json").read_text())["text_config"]
    words["vocab_size"] = 200
    change(folder / "config.json", text_config=words)
    refused(folder, "the model has 200 ids|below 200")


def test_a_missing_package_is_named(folder, monkeypatch):
    def absent(*_, **__):
        raise ImportError("XVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr("vlm.processing.AutoProcessor.from_pretrained", absent)
    refused(folder, "needs torchvision, .*requirements-models.txt")


def test_a_model_with_a_recurrent_state_is_refused(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    heads = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    maker = tiny_models.llava("qwen3_next", num_hidden_layers=4, **experts, **heads, **sizes)
    with pytest.raises(UserError, match="keeps a state that can't be set back"):
        any_model.load(tiny_models.write(tmp_path / "model", *maker), CPU)


def test_pictures_that_the_processor_refuses_cost_their_clip(folder):
    model = any_model.load(folder, CPU)
    with pytest.raises(MediaError, match="can't be shown 2 pictures of 5 x 4"):
        model.processing.processor.image_processor = lambda *_, **__: 1 / 0
        model.prepare([np.zeros((4, 5, 3), np.uint8)] * 2)


def test_weights_that_are_no_numbers_fail_their_clip_alone(folder):
    model = any_model.load(folder, CPU)
    frames = [np.full((28, 28, 3), 90, np.uint8)] * 4
    good, bad = model.prepare(frames), model.prepare(frames)
    bad.tensors["pixel_values"] = bad.tensors["pixel_values"] * torch.nan
    for reason in (None, "forced"):
        model.reason = reason
        answers = model.open_batches(["Why?"], 4, good, 2).answer([bad, good])()
        assert "no numbers" in str(answers[0])
        assert answers[1] == model.answer([good], ["Why?"], 4)


def test_the_facts_need_no_embeddings_in_the_language_model(folder, monkeypatch):
    model = any_model.load(folder, CPU)
    bare = torch.nn.Linear(2, 2)
    monkeypatch.setattr(type(model), "decoder", property(lambda _: (bare, bare)))
    assert model.facts(folder)["dtype"] == "float32"


@pytest.mark.parametrize("maker", [tiny_models.llava, tiny_models.smolvlm])
def test_room_is_wanted_for_quantised_weights_whatever_the_language_model_is_called(maker, tmp_path):
    config, _ = maker()
    model = on_meta(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], "tiny", config)
    (tmp_path / "weights").write_bytes(bytes(2**20))
    checkpoint = types.SimpleNamespace(name="tiny", weights=[tmp_path / "weights"])
    _, blocks = outside_decoder(model)
    whole, quantised = (
        check_room(model, checkpoint, dataclasses.replace(CPU, quantization=kind), blocks)
        for kind in ("none", "4bit")
    )
    layer = model.get_decoder().layers[0]
    linear = sum(part.weight.numel() for part in layer.modules() if isinstance(part, torch.nn.Linear))
    saved = 2 * linear * (32 - BITS["4bit"]) / 8 / 2**30     # 2 layers
    assert whole - quantised == pytest.approx(saved)


# ------------------------------------------------------------------------------------------- roles
def test_another_chat_template_is_another_revision(folder):
    before = any_model.revision(folder)
    assert before.startswith("content ") and before == any_model.revision(folder)
    with open(folder / "chat_template.jinja", "a") as file:
        file.write(" ")
    assert any_model.revision(folder) != before


def test_config_json_decides_which_file_runs_a_model(folder, demo_models):
    view = View(num_frames=4)
    for role in (DRAFT, TARGET):
        role.check(folder, QUESTIONS, view, LENGTH)
    assert type(TARGET.load(folder, CPU)).__name__ == "AnyModel"
    assert type(DRAFT.load(demo_models / "video_llava", CPU)).__name__ == "VideoLlava"
    with pytest.raises(UserError, match="EventGPT, which reads event pictures"):
        TARGET.check(demo_models / "eventgpt", QUESTIONS, view, LENGTH)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such model folder"):
        TARGET.check(folder, QUESTIONS, view, LENGTH)


@pytest.fixture
def demo_models():
    from tests.conftest import ROOT

    return ROOT / "demo" / "models"
