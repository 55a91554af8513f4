"""Files that mean harm: bombs, pickles and code that want to run, paths that lead elsewhere, texts
that pretend.
"""

import base64
import json
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import extract_tokens_train
from base import UserError
from clips.dataset import read_dataset
from clips.limits import MediaError
from clips.pictures import read_event_image
from drafting.checkpoints import load_adapter, save_adapter
from drafting.memory import load_memory
from machine.device import Runtime
from pairs.formats import load_pairs
from tests.clips.test_hostile import Runs, no_hang  # noqa: F401  (a fixture)
from tests.conftest import ROOT
from token_adapter import AdapterConfig, TokenAdapter
from vlm import loading, roles
from vlm.eventgpt import EventGPT
from vlm.greedy import answer_of
from vlm.video_llava import VideoLlava

CPU = Runtime.choose("cpu")
TARGET, DRAFT = ROOT / "demo" / "models" / "video_llava", ROOT / "demo" / "models" / "eventgpt"
SHARDED = ROOT / "tests" / "eventgpt_parity" / "seed0"


# ------------------------------------------------------------------------- checkpoints and memories
def adapter(**changed) -> TokenAdapter:
    return TokenAdapter(
        AdapterConfig(
            **{
                "vocab_size": 16,
                "embed_dim": 8,
                "num_layers": 1,
                "num_heads": 2,
                "feedforward_dim": 8,
                "max_seq_len": 8,
                **changed,
            }
        )
    )


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"model_state_dict": Runs(tmp_path / "executed"), "config": {}}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Runs(tmp_path / "executed"), 2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match="not a checkpoint that can be read"):
            load_adapter(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(2**40, 8),
        torch.empty(16, 8, device="meta"),
        torch.zeros(16, 8, dtype=torch.int8),
        torch.zeros(16, 8).to_sparse(),
        torch.zeros(16, 8, dtype=torch.complex64),
    ],
)
def test_a_checkpoint_whose_numbers_are_not_all_there_is_refused(tmp_path, tensor):
    save_adapter(adapter(), tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    loaded["model_state_dict"]["embedding.weight"] = tensor
    torch.save(loaded, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt"):
        load_adapter(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "config",
    [
        {"num_heads": "2"},
        {"num_heads": [2]},
        {"num_heads": float("nan")},
        {"num_heads": 10**30},
        {"dropout": None},
        {"conditioning": ["draft"]},
        {"contract": {}},
    ],
)
def test_a_checkpoint_with_an_odd_config_is_a_clear_error(tmp_path, config):
    save_adapter(adapter(), tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**loaded, "config": {**loaded["config"], **config}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt"):
        load_adapter(tmp_path / "a.pt")


def test_a_memory_is_unpacked_only_so_far_and_runs_nothing(tmp_path, monkeypatch):
    np.savez_compressed(
        tmp_path / "m.npz", target=np.zeros(2**15, np.int32), target_start=np.array([0, 2**15])
    )
    assert (tmp_path / "m.npz").stat().st_size < 2**10 and len(load_memory(tmp_path / "m.npz")) == 1
    monkeypatch.setattr("drafting.memory.MAX_UNPACKED_BYTES", 2**15)
    with pytest.raises(UserError, match="unpacks to more than"):
        load_memory(tmp_path / "m.npz")
    np.savez(
        tmp_path / "m.npz",
        target=np.array([Runs(tmp_path / "executed")]),
        target_start=np.array([0, 1]),
    )
    with pytest.raises(UserError, match="not the memory of a task"):
        load_memory(tmp_path / "m.npz")
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------ model folders
@pytest.fixture
def sharded(tmp_path) -> Path:
    return shutil.copytree(SHARDED, tmp_path / "model") / "checkpoint"


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"can't load the model .*model-00002-of-00004\.safetensors"
    ):
        EventGPT.load(sharded, CPU)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**26, 0, 3])
def test_weights_with_an_absurd_header_are_a_clear_error(sharded, length):
    shard = sharded / "model-00003-of-00004.safetensors"
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    with pytest.raises(UserError, match="can't load the model"):
        EventGPT.load(sharded, CPU)


def test_pickled_weights_that_run_code_are_refused(tmp_path):
    folder = shutil.copytree(TARGET, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(
        {"x": Runs(tmp_path / "executed"), "y": torch.zeros(10**6)}, folder / "pytorch_model.bin"
    )
    with pytest.raises(UserError, match="can't load the model"):
        VideoLlava.load(folder, CPU)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("kind", "source"), [(VideoLlava, TARGET), (EventGPT, DRAFT)])
def test_code_in_a_model_folder_is_never_run(tmp_path, kind, source):
    folder, executed = shutil.copytree(source, tmp_path / "model"), tmp_path / "executed"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil", "processing_evil"):
        (folder / f"{name}.py").write_text(
            f"import os\nos.mkdir({str(executed)!r})\nclass Evil: pass\n"
        )
    maps = {
        "config.json": {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
        "preprocessor_config.json": {"AutoProcessor": "processing_evil.Evil"},
    }
    for name, auto_map in maps.items():
        path = folder / name
        loaded = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**loaded, "auto_map": auto_map}))
    kind.load(folder, CPU)  # its own architecture is known: what else is there is not needed
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "evil", "architectures": ["Evil"]})
    )
    if kind is VideoLlava:
        with pytest.raises(UserError, match="can't load the config"):
            kind.load(folder, CPU)
    assert not executed.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, wanted 1 to 1,000"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"intermediate_size": 10**7}, "far more than fit into its 1 weight files"),
        ({"num_hidden_layers": 3}, "the weights of .* don't fit .* missing: .*layers.2"),
        ({"hidden_size": "64"}, "can't load the config"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_a_clear_error(tmp_path, change, words):
    folder = shutil.copytree(TARGET, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "text_config": {**config["text_config"], **change}})
    )
    with pytest.raises(UserError, match=words):
        VideoLlava.load(folder, CPU)


def test_too_little_memory_is_told_with_the_figures_before_loading(monkeypatch):
    monkeypatch.setattr(loading, "free_gib", lambda device: 0.0)
    monkeypatch.setattr(loading, "BITS", {})
    words = r"not enough memory for .* take about 0\.0 GiB \(float32, .*0\.0 GiB are free"
    with pytest.raises(UserError, match=words):
        VideoLlava.load(TARGET, CPU)
    assert loading.free_gib(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        MemoryError("Unable to allocate"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
    ],
)
def test_memory_that_ends_while_loading_is_told_with_the_figures(monkeypatch, error):
    from transformers import VideoLlavaForConditionalGeneration

    def short(*_, **__):
        raise error

    monkeypatch.setattr(VideoLlavaForConditionalGeneration, "from_pretrained", short)
    with pytest.raises(
        UserError, match=r"not enough memory for .* GiB are free; .*allocate.*--quantization 4bit"
    ):
        VideoLlava.load(TARGET, CPU)


# A tokenizer.json each that the tokenizers library loads or refuses in its own way; "panics" are no
# Exceptions.
WORDS = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"},
}
START_TOKEN = [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
TOKENIZERS = {
    "panics while it is read": {
        **WORDS,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""},
    },
    "panics over a text": {
        **WORDS,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": START_TOKEN,
            "pair": [],
            "special_tokens": {},
        },
    },
    "panics over letters": {
        **WORDS,
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(b"\4\0\0\0\xff\xff\xff\xffabc").decode(),
        },
    },
    "no model": {},
    "no words": WORDS,
    "a number": 3,
    "ids beyond the model's": {**WORDS, "model": {**WORDS["model"], "vocab": {"?": 10**6, "a": 0}}},
    "words without end": {
        "version": "1.0",
        "model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]},
    },
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("role", "source"), [(roles.TARGET, TARGET), (roles.DRAFT, DRAFT)], ids=["target", "draft"]
)
def test_hostile_tokenizers_are_one_line(tmp_path, capfd, role, source, name):
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZERS[name]))
    for work in (
        lambda: role.check(folder, ["Why?"], roles.View(), 5),
        lambda: role.load(folder, CPU),
    ):
        with pytest.raises(UserError, match="tokenizer") as error:
            work()
        assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""                # the library prints a stack when it panics


def test_a_tokenizer_that_panics_over_an_answer_is_one_line():
    class Tokenizer:
        def decode(self, tokens, **how):
            raise type("PanicException", (BaseException,), {})("index out of bounds")

    with pytest.raises(
        UserError, match="can't decode an answer: PanicException: index out of bounds"
    ):
        answer_of([1, 2], [2], Tokenizer())


@pytest.mark.parametrize(
    "advice",
    [
        "Loading it needs code of its own: set the option `trust_remote_code=True` to allow it",
        "Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` will "
        "likely succeed",
        "use `torch.serialization.add_safe_globals([os.system])`",
        "Object arrays cannot be loaded when allow_pickle=False",
    ],
)
def test_advice_to_run_a_files_code_is_never_repeated(tmp_path, monkeypatch, advice):
    from transformers import VideoLlavaForConditionalGeneration

    def refuse(*_, **__):
        raise ValueError(advice)

    monkeypatch.setattr(VideoLlavaForConditionalGeneration, "from_pretrained", refuse)
    with pytest.raises(
        UserError, match=r"can't load the model .*code of its own to be run, which is refused"
    ) as error:
        VideoLlava.load(TARGET, CPU)
    assert not any(
        word in str(error.value)
        for word in ("trust_remote", "weights_only", "safe_globals", "pickle")
    )


def test_weights_that_are_pickles_are_refused_without_advice(tmp_path):
    for source, kind in ((TARGET, VideoLlava), (DRAFT, EventGPT)):
        folder = shutil.copytree(source, tmp_path / kind.__name__)
        (folder / "model.safetensors").unlink()
        torch.save(
            {"x": Runs(tmp_path / "executed"), "y": torch.zeros(10**6)},
            folder / "pytorch_model.bin",
        )
        with pytest.raises(UserError, match="can't load the model") as error:
            kind.load(folder, CPU)
        assert not any(
            word in str(error.value) for word in ("trust_remote", "weights_only", "safe_globals")
        )
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------- texts, through it all
EVIL = "town_00_a\x1b[31m\r\n[2026-01-01 00:00:00] RESULT | forged‮\ud83d"


def test_ids_and_names_can_forge_no_line_of_the_log_and_end_no_run(
    demo, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(demo.test_1s, tmp_path / "set")
    index = folder / "EventGPT_Instruction_Subset.json"
    rows = json.loads(index.read_text())[:3]
    rows[0]["id"] = EVIL                           # answered, under that name
    rows[1]["event_data"] = rows[1]["video_data"] = f"{EVIL}/000001"
    rows[2]["event_image"] = [f"{EVIL}.png"]
    index.write_text(json.dumps(rows))
    output = tmp_path / "out.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "extract_tokens_train.py",
            "--dataset_dir",
            str(folder),
            "--output_file",
            str(output),
            "--draft_model",
            str(DRAFT),
            "--target_model",
            str(TARGET),
            "--max_new_tokens",
            "8",
            "--device",
            "cpu",
            "--num_workers",
            "1",
        ],
    )
    extract_tokens_train.main()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() and line.startswith("[20") for line in lines)
    assert not [line for line in lines if "] RESULT | forged" in line[:40]]
    loaded = json.loads(output.read_text())
    assert [row["sample_id"] for row in loaded["results"]] == [EVIL] and len(loaded["failed"]) == 2
    pairs = load_pairs([output])
    assert len(pairs) == 1


def test_names_that_no_path_can_have_are_trouble_of_one_clip(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "event_image").mkdir()
    (tmp_path / "event_image" / "circle").symlink_to("circle")
    names = [
        "a\0b",
        "\ud83d",
        "x" * 5000,
        "../a",
        "circle/000001",
        "circle",
        "..",
        "/x",
        "9" * 5000,
        "../../x",
    ]
    rows = [{"event_image": [name]} for name in names] + [{"event_data": name} for name in names]
    (tmp_path / "EventGPT_Instruction_Subset.json").write_text(json.dumps(rows))
    samples = read_dataset(tmp_path)
    assert len(samples) == len(rows)
    for sample in samples:
        for path in sample.event_images:
            with pytest.raises(MediaError):
                read_event_image(path)
    leaving = [
        sample.index for sample in samples if "leaves the data set folder" in (sample.trouble or "")
    ]
    assert leaving == [
        number for number, name in enumerate([*names, *names]) if name in ("/x", "../../x")
    ]
