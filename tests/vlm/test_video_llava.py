"""Video-LLaVA: pixels, prompt and answers without torchvision, on the demo's tiny trained model."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import VideoLlavaForConditionalGeneration, VideoLlavaImageProcessor

from base import UserError
from machine.device import Runtime
from tests.conftest import ROOT
from vlm.video_llava import VideoLlava, prompt, prompt_ids

FOLDER = ROOT / "demo" / "models" / "video_llava"
CPU = Runtime.choose("cpu")
QUERIES = [
    "What are the key elements in this scene?",
    "Why?",
    "Is there a vehicle, and is it parked or driving?",
]


@pytest.fixture(scope="module")
def model():
    return VideoLlava.load(FOLDER, CPU)


@pytest.fixture(scope="module")
def pixels(model):
    random = np.random.default_rng(0)
    return [
        model.prepare(list(random.integers(0, high, (8, 72, 96, 3), dtype=np.uint8)))
        for high in (255, 40, 120)
    ]


def test_the_prompt_repeats_the_video_mark_for_every_visual_token(model):
    ids = prompt_ids(model.tokenizer, "Why?", 40)
    video = model.model.config.video_token_index
    assert prompt("Why?") == "USER: <video>\nWhy? ASSISTANT:"
    assert ids[0] == model.tokenizer.bos_token_id and ids.count(model.tokenizer.bos_token_id) == 1
    assert ids.count(video) == 40
    first = ids.index(video)
    assert ids[first:first + 40] == [video] * 40
    text = model.tokenizer.decode(
        [token for token in ids if token != video], skip_special_tokens=True
    )
    assert text.split() == ["USER:", "Why?", "ASSISTANT:"]


def test_answers_equal_those_of_transformers_own_loop(model, pixels):
    theirs_loaded = VideoLlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    vision = theirs_loaded.config.vision_config
    tokens = 8 * (1 + (vision.image_size // vision.patch_size) ** 2)
    ids = torch.tensor([prompt_ids(model.tokenizer, QUERIES[0], tokens)])
    reference = []
    with torch.inference_mode():
        for _ in range(12):  # no cache, no generate: the plain definition
            step = torch.tensor([reference], dtype=torch.long)
            logits = theirs_loaded(
                input_ids=torch.cat([ids, step], 1), pixel_values_videos=pixels[0][None]
            ).logits
            reference.append(int(logits[0, -1].argmax()))
    assert model.answer(pixels[:1], QUERIES[:1], 12)[0].tokens == reference


def test_a_batch_of_unequal_prompts_answers_as_one_by_one(model, pixels):
    together = model.answer(pixels, QUERIES, 20)
    assert together == [model.answer([row], [query], 20)[0] for row, query in zip(pixels, QUERIES)]
    # else the rows could be mixed up unseen
    assert len({tuple(answer.tokens) for answer in together}) > 1


def test_the_image_tower_is_dropped(model):
    assert not [name for name, _ in model.model.named_parameters() if "image_tower" in name]


def test_only_the_language_model_is_quantised():
    pytest.importorskip("bitsandbytes")
    model = VideoLlava.load(FOLDER, Runtime.choose("cpu", quantization="4bit")).model
    four_bit = {
        name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"
    }
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert four_bit and four_bit == {
        name for name in linear if name.startswith("model.language_model.layers.")
    }


def test_too_long_a_prompt_is_refused(model, pixels):
    with pytest.raises(UserError, match="positions"):
        model.answer(pixels[:1], QUERIES[:1], 100_000)


def test_queries_with_marks_are_refused():
    for mark in ("<video>", "<image>"):
        with pytest.raises(UserError, match=mark):
            prompt(f"a {mark}?")


@pytest.mark.parametrize("where", ["preprocessor_config.json", "processor_config.json", "both"])
def test_pixels_are_those_of_transformers_own_processor(tmp_path, where):
    """processor_config.json is all that transformers 5 writes; where both are there, it reads that
    one.
    """
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    file = folder / "preprocessor_config.json"
    plain = json.loads(file.read_text())
    other = {
        **plain,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "rescale_factor": 1 / 128,
    }
    if where == "preprocessor_config.json":
        file.write_text(json.dumps(other))
    else:
        video = {**other, "video_processor_type": "VideoLlavaVideoProcessor"}
        (folder / "processor_config.json").write_text(
            json.dumps(
                {
                    "processor_class": "VideoLlavaProcessor",
                    "image_processor": other,
                    "video_processor": video,
                }
            )
        )
        if where == "processor_config.json":
            file.unlink()
    picture = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    wanted = VideoLlavaImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="np")
    wanted = next(iter(wanted.values()))[0]
    prepared = VideoLlava.load(folder, CPU).prepare([picture])[0].numpy()
    assert prepared.shape == wanted.shape and np.abs(prepared - wanted).max() < 1e-6
    assert np.abs(prepared - VideoLlava.load(FOLDER, CPU).prepare([picture])[0].numpy()).max() > 0.1


def test_damaged_folders_are_clear_errors(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "video_token_index": 5}))
    with pytest.raises(UserError, match="video_token_index 5"):
        VideoLlava.load(folder, CPU)
    (folder / "config.json").write_text(json.dumps(config))
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="can't load the model"):
        VideoLlava.load(folder, CPU)
    weights.unlink()
    with pytest.raises(UserError, match="can't load the model"):
        VideoLlava.load(folder, CPU)
    with pytest.raises(UserError, match="no such model folder"):
        VideoLlava.load(tmp_path / "nowhere", CPU)
