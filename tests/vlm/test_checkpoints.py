"""Whatever can be known of a model folder without its weights is said by check(), before anything
is loaded.

For both models alike: what is missing, cut short, too large, quantised already, or does not belong
together.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from base import UserError
from machine.device import Runtime
from tests.conftest import ROOT
from vlm import fingerprint
from vlm.checkpoints import open_checkpoint
from vlm.eventgpt import EventGPT
from vlm.fits import why_not
from vlm.roles import DRAFT, ROLES, TARGET, View
from vlm.video_llava import VideoLlava

SOURCES = {
    "draft": ROOT / "demo" / "models" / "eventgpt",
    "target": ROOT / "demo" / "models" / "video_llava",
}
SHARDED = ROOT / "tests" / "eventgpt_parity" / "seed0" / "checkpoint"
CPU, QUESTION = Runtime.choose("cpu"), "What are the key elements in this scene?"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 14740000000\n"


@pytest.fixture(params=ROLES)
def case(request, tmp_path) -> tuple:
    """(role, a copy of its model's folder)."""
    return ROLES[request.param], shutil.copytree(SOURCES[request.param], tmp_path / "model")


def check(role, folder, questions=(QUESTION,), tokens: int = 20, frames: int = 8) -> None:
    role.check(folder, list(questions), View(frames), tokens)


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **changes}))


def sparse(file: Path) -> None:
    """20 GiB that take no room on the disk."""
    with open(file, "ab") as opened:
        opened.truncate(20 * 2**30)


# ---------------------------------------------------------------------------------- what is missing
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
        ("tokenizer_config.json", "no BOS"),
    ],
)
def test_a_file_that_is_missing_is_named(case, name, words):
    role, folder = case
    check(role, folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=words):
        check(role, folder)


def test_a_shard_that_the_index_names_is_missing(tmp_path):
    folder = shutil.copytree(SHARDED.parent, tmp_path / "seed0") / "checkpoint"
    check(DRAFT, folder)
    (folder / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"model-00003-of-00004\.safetensors is missing; download it again"
    ):
        check(DRAFT, folder)


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        {"weight_map": {}},
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": 3}},
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, index):
    folder = shutil.copytree(SHARDED.parent, tmp_path / "seed0") / "checkpoint"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not the index of weights"):
        check(DRAFT, folder)


@pytest.mark.parametrize("length", [0, 7, 5000, -1])
def test_weights_that_are_cut_short_are_named(case, length):
    role, folder = case
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(
        UserError, match=r"model\.safetensors (is empty|is damaged|has .* it is cut short)"
    ):
        check(role, folder)


def test_weights_of_pytorch_that_are_cut_short_are_named(case):
    role, folder = case
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check(role, folder)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"pytorch_model\.bin is cut short"):
        check(role, folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_notes_that_git_leaves_in_place_of_large_files_are_named(case, name):
    role, folder = case
    (folder / name).write_bytes(LFS)
    with pytest.raises(UserError, match=r"git lfs pull|not JSON"):
        check(role, folder)


def test_no_folder_at_all(tmp_path):
    for role in ROLES.values():
        with pytest.raises(UserError, match="no such model folder"):
            check(role, tmp_path / "nowhere")


# -------------------------------------------------------------------------------- what does not fit
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "generation_config.json",
        "special_tokens_map.json",
        "processor_config.json",
    ],
)
def test_files_of_gigabytes_are_refused_unread(case, name):
    role, folder = case
    sparse(folder / name)
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"{name} has 21,474.* bytes, wanted at most"):
        check(role, folder)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"x": 1},
        "fp8",
    ],
)
def test_a_model_that_is_quantised_already_is_refused_before_loading(case, settings):
    role, folder = case
    edit(folder / "config.json", quantization_config=settings)
    with pytest.raises(UserError, match=r"is quantised already .*wanted the unquantised weights"):
        check(role, folder)
    with pytest.raises(UserError, match="is quantised already"):
        role.load(folder, CPU)


def test_an_adapter_beside_the_weights_is_refused(case):
    role, folder = case
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/else")
    with pytest.raises(UserError, match=r"adapter_config\.json: adapters \(LoRA\) are not applied"):
        check(role, folder)


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        (["What is <image> here?"], "<image>"),
        ([QUESTION, "<video>"], "<video>"),
        (["word " * 3000], "positions"),
    ],
)
def test_questions_that_the_target_can_not_be_asked(questions, words):
    with pytest.raises(UserError, match=words):
        check(TARGET, SOURCES["target"], questions)


def test_positions_are_counted_for_both_models(case):
    role, folder = case
    for words, how in (
        ("positions", {"tokens": 3000}),
        ("positions", {"questions": ["word " * 3000]}),
    ):
        with pytest.raises(UserError, match=words):
            check(role, folder, **how)
    with pytest.raises(UserError, match="use fewer pictures"):
        check(TARGET, SOURCES["target"], frames=400)


def test_control_tokens_in_a_question_are_a_warning(case, capsys):
    role, folder = case
    check(role, folder, [QUESTION, "Is </s> there?"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(lines) == 1 and "contains </s>" in lines[0] and "control token" in lines[0]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([2, 10**7], "gives id 10,000,000"),
        ("2", "wanted ids"),
        (-1, "wanted ids"),
        ([True], "wanted ids"),
    ],
)
def test_ends_that_the_model_does_not_know_are_refused(case, ids, words):
    role, folder = case
    edit(folder / "generation_config.json", eos_token_id=ids)
    with pytest.raises(UserError, match=words):
        check(role, folder)


def test_several_ids_that_end_an_answer_are_all_known(case):
    role, folder = case
    for ids, wanted in ((None, (2,)), (5, (2, 5)), ([7, 2, 5], (2, 7, 5))):
        edit(folder / "generation_config.json", eos_token_id=ids)
        assert role.load(folder, CPU).eos_ids == wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "RoPE is of the type 'dynamic'",
        ),
        ({"model_type": "phi3"}, "language model is a phi3"),
        ({"num_key_value_heads": 3}, "heads"),
    ],
)
def test_a_language_model_that_can_not_run_here_is_refused_before_loading(tmp_path, change, words):
    folder = shutil.copytree(SOURCES["target"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config={**config["text_config"], **change})
    with pytest.raises(UserError, match=words):
        check(TARGET, folder)


def test_modules_that_llama_does_not_have_are_named():
    from tests.vlm.test_steps import tiny_llama

    llama = tiny_llama()
    assert why_not(llama.config, llama.model) is None
    llama.model.layers[1].self_attn.q_norm = torch.nn.Identity()
    assert "attention of layer 1 has q_norm beside LLaMA's" in why_not(llama.config, llama.model)


# ------------------------------------------------------------------------------------ other weights
def revision(folder: Path) -> str:
    return open_checkpoint(folder, from_hub=False).revision()


@pytest.fixture(params=["whole", "sampled"])
def reading(request, monkeypatch):
    if request.param == "sampled":
        monkeypatch.setattr(fingerprint, "WHOLE", 0)


def test_a_copied_or_touched_folder_is_the_same(case, reading, tmp_path):
    role, folder = case
    copy = shutil.copytree(folder, tmp_path / "copy")
    for file in copy.iterdir():
        if file.is_file():
            file.touch()
    (copy / "README.md").write_text("notes")
    assert revision(copy) == revision(folder) == role.load(folder, CPU).revision or role is DRAFT
    assert role.load(copy, CPU).revision == role.load(folder, CPU).revision


def test_other_weights_of_the_same_names_and_sizes_are_others(case, reading):
    _role, folder = case
    file, before = folder / "model.safetensors", revision(folder)
    weights = load_file(file)
    for name in list(weights)[::7]:
        changed = {**weights, name: weights[name] + 0.01}
        save_file(changed, file, {"format": "pt"})
        assert revision(folder) != before, name
    save_file(weights, file, {"format": "pt"})


def test_one_changed_value_of_a_small_model_is_seen(case):
    _role, folder = case
    file, before = folder / "model.safetensors", revision(folder)
    content = bytearray(file.read_bytes())
    content[-len(content) // 3] ^= 1
    file.write_bytes(content)
    assert revision(folder) != before


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_other_settings_of_the_same_length_are_others(case, name):
    _role, folder = case
    edit(folder / name)
    text, before = (folder / name).read_text(), revision(folder)
    (folder / name).write_text(text[:-1] + " }" if text[-2] != " " else text[:-2] + "}")
    assert revision(folder) != before


def test_other_weights_of_pytorch_files_are_others(case, reading):
    _role, folder = case
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    before = revision(folder)
    name = list(weights)[len(weights) // 2]
    weights[name].flatten()[weights[name].numel() // 2] += 1
    torch.save(weights, folder / "pytorch_model.bin")
    # of a zip file's directory, which has a checksum of every tensor
    assert revision(folder) != before


def test_the_pictures_of_another_clip_tower_are_others(tmp_path):
    folder = shutil.copytree(SOURCES["draft"], tmp_path / "model")
    before = EventGPT.load(folder, CPU).revision
    edit(folder / "clip" / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    assert EventGPT.load(folder, CPU).revision != before


def test_15_gb_are_told_apart_in_less_than_a_second(tmp_path):
    """Sparse: as many tensors and bytes as a 7B model has, in three shards."""
    files = []
    for shard in range(3):
        names = [f"layers.{number}.weight" for number in range(230)]
        size = 5_000_000_000 // len(names) // 2 * 2
        header = json.dumps({name: {"dtype": "F16", "shape": [size // 2],
                                    "data_offsets": [number * size, (number + 1) * size]}
                             for number, name in enumerate(names)}).encode()
        files.append(tmp_path / f"model-{shard}.safetensors")
        with open(files[-1], "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size * len(names))
    start = time.monotonic()
    before = fingerprint.digest_of([], files)
    assert time.monotonic() - start < 1
    with open(files[1], "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert fingerprint.digest_of([], files) != before


def test_a_file_that_grows_while_it_is_digested_costs_one_error():
    with pytest.raises(UserError, match="/dev/zero has 128 MiB, wanted at most"):
        fingerprint.digest_of([Path("/dev/zero")], [])


# -------------------------------------------------------------------------------------- what is run
def test_generation_settings_of_a_folder_change_no_answer(tmp_path):
    folder = shutil.copytree(SOURCES["target"], tmp_path / "model")
    edit(
        folder / "generation_config.json",
        do_sample=True,
        temperature=9.0,
        repetition_penalty=3.0,
        top_k=3,
        suppress_tokens=list(range(100)),
        max_length=3,
        num_beams=3,
    )
    plain, changed = (VideoLlava.load(path, CPU) for path in (SOURCES["target"], folder))
    pixels = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    answers = [model.answer([pixels], [QUESTION], 16)[0] for model in (plain, changed)]
    assert answers[0] == answers[1] and len(answers[0].tokens) > 8


def test_a_config_can_not_choose_code_to_run(case, monkeypatch):
    """Neither code of the folder nor an attention kernel of the hub."""
    role, folder = case
    choice = {
        "attn_implementation": "kernels-community/evil",
        "_attn_implementation": "kernels-community/evil",
        "auto_map": {"AutoConfig": "evil.Evil"},
    }
    config = json.loads((folder / "config.json").read_text())
    nested = {key: {**value, **choice} for key, value in config.items() if key.endswith("_config")}
    edit(folder / "config.json", **choice, **nested)
    if (folder / "clip").is_dir():
        edit(folder / "clip" / "config.json", **choice)
    model = role.load(folder, CPU).model
    kinds = {
        module.config._attn_implementation
        for module in model.modules()
        if hasattr(module, "config")
    }
    assert kinds == {"sdpa"}
