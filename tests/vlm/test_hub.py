"""A hub's model: the snapshot in the cache, its commit, and one clear line where neither cache nor
network has it.
"""

import shutil
import time

import pytest
from huggingface_hub import constants

from base import UserError
from machine.device import Runtime
from tests.conftest import ROOT
from vlm import hub
from vlm.contract import same_weights
from vlm.roles import TARGET, View
from vlm.video_llava import VideoLlava
from vlm.vocabulary import digest_of

SOURCE, NAME = ROOT / "demo" / "models" / "video_llava", "LanguageBind/Video-LLaVA-7B-hf"
A, B = "a" * 40, "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that makes the cache hold these commits, the last one as main; the hub can't be
    reached.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "models--LanguageBind--Video-LLaVA-7B-hf"

    def fill(*commits: str):
        (place / "refs").mkdir(parents=True, exist_ok=True)
        for commit in commits:
            if not (place / "snapshots" / commit).is_dir():
                shutil.copytree(SOURCE, place / "snapshots" / commit)
        (place / "refs" / "main").write_text(commits[-1])
        return place / "snapshots" / commits[-1]

    return fill


def check() -> None:
    TARGET.check(NAME, ["Why?"], View(), 5)


def test_the_revision_is_the_commit_of_the_snapshot(cache):
    for commit in (A, B):
        cache(commit)
        check()
        model = VideoLlava.load(NAME, Runtime.choose("cpu"))
        assert model.revision == commit and model.facts(NAME) == {
            "name": NAME,
            "revision": commit,
            "vocab_size": 691,
            "bos_id": 1,
            "tokenizer": digest_of(model.tokenizer),
            "quantization": "none",
            "dtype": "float32",
        }


def test_what_an_output_records_is_read_off_the_loaded_model(cache):
    pytest.importorskip("bitsandbytes")
    cache(A)
    facts = VideoLlava.load(NAME, Runtime.choose("cpu", "bfloat16", "4bit")).facts(NAME)
    assert (facts["quantization"], facts["dtype"]) == ("4bit", "bfloat16")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
        ("config.json", "no config"),
    ],
)
def test_half_a_download_offline_is_one_line(cache, name, words):
    folder = cache(A)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{words}.*HF_HUB_OFFLINE forbids"):
        check()


def test_a_model_that_is_nowhere_is_one_line_at_once(cache, monkeypatch):
    with pytest.raises(UserError, match=r"the hub's cache does not hold it.*HF_HUB_OFFLINE"):
        check()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"can't be downloaded \(.*set HF_HUB_OFFLINE=1") as error:
        check()
    assert time.monotonic() - start < 5 and "\n" not in str(error.value)


def test_a_cache_without_pixel_settings_is_used_where_the_hub_is_silent(cache, capsys):
    folder = cache(A)
    (folder / "preprocessor_config.json").unlink()
    assert hub.snapshot(NAME, lambda folder: None) == (folder, A)
    assert "taken from the hub's cache as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (NAME, True),
        ("a/b", True),
        ("models/a/b", False),
        ("../b", False),
        ("/a/b", False),
        ("a", False),
        ("a/b c", False),
        ("~/b", False),
        ("a\\b/c", False),
    ],
)
def test_names_of_the_hub(name, wanted):
    assert hub.is_id(name) == wanted


def test_weights_are_the_same_only_where_both_revisions_tell():
    content = "content 0123456789abcdef0123"
    assert same_weights(A, A) and same_weights(content, content)
    assert same_weights(A, B) is False and same_weights(content, "content " + "0" * 20) is False
    for recorded in ("unknown", None, "local", "local 0123456789ab", "", A[:-1]):
        assert same_weights(recorded, content) is None and same_weights(recorded, A) is None
        assert same_weights(recorded, recorded or "") is None
    assert same_weights(A, content) is None and same_weights(content, A) is None


def test_files_that_are_downloaded():
    wanted = (
        "config.json",
        "tokenizer.model",
        "model-00001-of-00003.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "processor_config.json",
    )
    assert all(hub.DOWNLOADED.fullmatch(name) for name in wanted)
    assert not any(
        hub.DOWNLOADED.fullmatch(name)
        for name in ("README.md", "a/config.json", "modeling.py", "x.gguf")
    )
