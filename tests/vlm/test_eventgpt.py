"""Our EventGPT against numbers that the reference implementation computed:
tests/eventgpt_parity/seed*/.

Each folder there holds a tiny random checkpoint in the published layout, a CLIP folder whose
weights differ from the checkpoint's on purpose, inputs, and every stage's output (README.md there).
Any further folder is tested too.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from base import UserError
from clips.event_files import read_events
from clips.events import event_frames
from clips.pictures import read_event_image
from machine.device import Runtime
from vlm.eventgpt import EventGPT, prompt, prompt_ids

FIXTURES = sorted(Path(__file__).parents[1].glob("eventgpt_parity/seed*"))
CPU = Runtime.choose("cpu")


@pytest.fixture(scope="module", params=FIXTURES, ids=lambda folder: folder.name)
def fixture(request):
    return request.param


@pytest.fixture(scope="module")
def model(fixture):
    return EventGPT.load(fixture / "checkpoint", CPU)


def pictures_of(folder: Path, scenario: str) -> list[np.ndarray]:
    png, events = (folder / "inputs" / f"{scenario}.{suffix}" for suffix in ("png", "npy"))
    return [read_event_image(png)] if png.exists() else event_frames(read_events(events))


def scenarios(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())["scenarios"]


def test_every_stage_equals_the_reference(model, fixture):
    for name, expected in scenarios(fixture).items():
        reference = np.load(fixture / f"{name}.npz")
        pictures = pictures_of(fixture, name)
        for number, picture in enumerate(pictures):
            assert np.array_equal(picture, reference[f"frame_{number}"])
        pixels = model.prepare(pictures)
        assert np.abs(pixels.numpy() - reference["pixel_values"]).max() <= 1e-6

        assert prompt(expected["query"]) == expected["prompt"]
        ids = prompt_ids(model.tokenizer, expected["query"])
        assert ids == reference["input_ids"][0].tolist()

        with torch.inference_mode():
            network = model.model
            hidden = network.visual_tower(pixels).last_hidden_state
            projected = network.visual_projector(hidden)
            features = network.event_features(pixels[None])
            embeds, mask = network.inputs_embeds([ids], features)
            prefill = network.language_model(
                inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True
            )
        for ours, theirs, tolerance in (
            (hidden, "vision_last_hidden_state", 1e-4),
            (projected, "projected", 1e-4),
            (network.feature_adaptor(projected), "adapted", 1e-4),
            (features[0], "event_features", 1e-4),
            (embeds, "inputs_embeds", 1e-4),
            (prefill.hidden_states[-1], "prefill_last_hidden_state", 1e-3),
            (prefill.logits, "prefill_logits", 1e-3),
        ):
            assert ours.shape == reference[theirs].shape, theirs
            assert np.abs(ours.detach().numpy() - reference[theirs]).max() <= tolerance, theirs


def test_greedy_ids_equal_the_reference(model, fixture):
    for name, expected in scenarios(fixture).items():
        reference = np.load(fixture / f"{name}.npz")["generated_ids"][0].tolist()
        answer = model.answer(
            [model.prepare(pictures_of(fixture, name))], [expected["query"]], len(reference)
        )[0]
        assert answer.tokens == reference
        assert not answer.finished


def test_eos_ends_an_answer_and_is_kept(fixture):
    model = EventGPT.load(fixture / "checkpoint", CPU)
    for name, expected in scenarios(fixture).items():
        reference = np.load(fixture / f"{name}.npz")
        model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(
            int(reference["eos_forced_id"])
        )
        answer = model.answer([model.prepare(pictures_of(fixture, name))], [expected["query"]], 16)[
            0
        ]
        assert answer.tokens == reference["eos_forced_generated_ids"][0].tolist()
        assert answer.finished


def test_a_batch_of_unequal_prompts_answers_as_one_by_one(model, fixture):
    name = next(name for name in scenarios(fixture) if name.startswith("png"))
    pixels = model.prepare(pictures_of(fixture, name))
    queries = [
        "Why?",
        "What are the key elements in this scene?",
        "Describe what is on the left, then all.",
        "",
    ]
    rows = [pixels, pixels.flip(-1), pixels.flip(-2), -pixels]
    together = model.answer(rows, queries, 12)
    alone = [model.answer([row], [query], 12)[0] for row, query in zip(rows, queries)]
    assert together == alone
    # else the rows could be mixed up unseen
    assert len({tuple(answer.tokens) for answer in together}) == 4


def test_a_query_with_the_event_mark_is_refused():
    with pytest.raises(UserError, match="<event>"):
        prompt("what is <event> here?")


# --------------------------------------------------------------------------- other checkpoint forms
@pytest.fixture
def checkpoint(tmp_path):
    shutil.copytree(
        FIXTURES[0], tmp_path / "seed", ignore=shutil.ignore_patterns("*.npz", "inputs")
    )
    return tmp_path / "seed" / "checkpoint"


def weights_of(folder: Path) -> dict:
    return {
        key: tensor
        for file in folder.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }


def merge(folder: Path) -> dict:
    """Replace the shards by nothing and return their weights."""
    weights = weights_of(folder)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    return weights


def logits_of(folder: Path) -> torch.Tensor:
    model = EventGPT.load(folder, CPU)
    with torch.inference_mode():
        return model.model.language_model(torch.arange(20)[None]).logits


def test_single_file_and_bin_load_as_shards_do(checkpoint):
    sharded = logits_of(checkpoint)
    weights = merge(checkpoint)
    # in saves of older versions
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits_of(checkpoint), sharded)
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    assert torch.equal(logits_of(checkpoint), sharded)


def test_a_bin_file_that_runs_code_is_refused(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    weights = merge(checkpoint)
    torch.save({**weights, "extra": Evil()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match="can't load"):
        EventGPT.load(checkpoint, CPU)
    assert not (tmp_path / "executed").exists()


def test_missing_unexpected_and_misshapen_weights_are_listed(checkpoint):
    weights = merge(checkpoint)
    del weights["model.norm.weight"]
    weights["model.extra.weight"] = torch.ones(3)
    weights["model.feature_adaptor.bias"] = torch.ones(5, dtype=torch.bfloat16)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as error:
        EventGPT.load(checkpoint, CPU)
    for key in ("language_model.model.norm.weight", "model.extra.weight", "feature_adaptor.bias"):
        assert key in str(error.value)


def test_a_missing_shard_and_other_folders_are_clear_errors(checkpoint, tmp_path):
    (checkpoint / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00004"):
        EventGPT.load(checkpoint, CPU)
    with pytest.raises(UserError, match="no such model folder"):
        EventGPT.load(tmp_path / "nowhere", CPU)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="not an EventGPT checkpoint"):
        EventGPT.load(tmp_path, CPU)


def test_only_the_language_model_is_quantised(checkpoint):
    pytest.importorskip("bitsandbytes")
    model = EventGPT.load(checkpoint, Runtime.choose("cpu", quantization="4bit")).model
    kinds = {name: type(module).__name__ for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear)}
    four_bit = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert four_bit == {name for name in kinds if name.startswith("language_model.model.layers.")}
    assert kinds["language_model.lm_head"] == kinds["feature_adaptor"] == "Linear"


def test_special_tokens_of_the_config_are_added_and_the_embeddings_follow(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(
        {**config, "mm_use_im_patch_token": True, "mm_use_im_start_end": True}))
    model = EventGPT.load(checkpoint, CPU)
    size = config["vocab_size"]
    ids = prompt_ids(model.tokenizer, "Why?")
    at = ids.index(-200)
    # <ev_patch> was added first, then start and end
    assert (ids[at - 1], ids[at + 1]) == (size + 1, size + 2)
    assert model.vocab_size == size + 3
