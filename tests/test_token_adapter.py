"""The TokenAdapter is the original architecture; a folder that hands it on is understood or refused."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from base import UserError
from drafting.checkpoints import load_adapter, save_adapter
from token_adapter import CONTRACTS, FORMAT, MAX_SIZES, NOT_SCORED, AdapterConfig, TokenAdapter
from training.adapters import condition

TINY = AdapterConfig(vocab_size=50, conditioning="draft", embed_dim=32, num_layers=2, num_heads=4,
                     feedforward_dim=64, max_seq_len=12)
PREFIX = ("prefix", "prefix+draft")


def tiny_adapter(conditioning: str = "draft") -> TokenAdapter:
    torch.manual_seed(0)
    adapter = TokenAdapter(dataclasses.replace(TINY, conditioning=conditioning, contract="")).eval()
    # biases start at 0, norms at 1: that could hide a mix-up
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    return adapter


def drafts() -> torch.Tensor:
    return torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))


def test_it_computes_what_transformer_encoder_computes_with_the_same_weights():
    adapter, draft = tiny_adapter(), drafts()
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True)
    reference = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    reference.load_state_dict(adapter.transformer.state_dict())
    x = adapter.embedding(draft) + adapter.position_embedding(torch.arange(12))
    wanted = adapter.output_proj(reference(x, mask=nn.Transformer.generate_square_subsequent_mask(12)))
    assert (adapter(draft) - wanted).abs().max() < 1e-5


def test_the_default_has_the_size_of_the_original():
    with torch.device("meta"):
        adapter = TokenAdapter(AdapterConfig(vocab_size=32000, conditioning="draft"))
    assert adapter.num_parameters() == pytest.approx(45.5e6, rel=0.002)


def test_an_output_depends_on_no_later_draft_token():
    adapter, draft = tiny_adapter(), drafts()
    changed = draft.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    before, after = adapter(draft), adapter(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


# ------------------------------------------------------------------------------ prefix conditioning
DRAFT_LENGTHS = torch.tensor([12, 0, 5])


def prefixes() -> torch.Tensor:
    return torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("conditioning", PREFIX)
def test_steps_with_a_cache_equal_the_full_pass(conditioning):
    adapter, prefix = tiny_adapter(conditioning), prefixes()
    with torch.no_grad():
        full = adapter(drafts(), DRAFT_LENGTHS, prefix)
        first, cache = adapter.start(drafts(), DRAFT_LENGTHS)
        steps = [adapter.step(part, cache) for part in prefix.split([1, 3, 2, 3], dim=1)]
        assert (torch.cat([first, *steps], 1) - full).abs().max() < 1e-5
        cache.length -= 4                                        # rolled back and said again
        assert (adapter.step(prefix[:, -4:], cache) - full[:, -4:]).abs().max() < 1e-5


@pytest.mark.parametrize("conditioning", PREFIX)
def test_an_output_sees_the_prefix_before_it_and_nothing_later(conditioning):
    adapter, prefix = tiny_adapter(conditioning), prefixes()
    changed = prefix.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 50
    before, after = (adapter(drafts(), DRAFT_LENGTHS, tokens) for tokens in (prefix, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_the_whole_draft_is_seen_from_the_first_position_on_and_nothing_past_its_end():
    adapter, draft, prefix = tiny_adapter("prefix+draft"), drafts(), prefixes()
    before = adapter(draft, DRAFT_LENGTHS, prefix)
    last = draft.clone()
    last[0, 11] = (last[0, 11] + 1) % 50
    assert (adapter(last, DRAFT_LENGTHS, prefix)[0] != before[0]).any(-1).all()
    past = draft.clone()
    past[1], past[2, 5:] = 7, 7
    assert torch.equal(adapter(past, DRAFT_LENGTHS, prefix), before)


def test_a_missing_draft_is_a_draft_of_length_0_and_then_it_is_the_prefix_adapter():
    adapter, prefix = tiny_adapter("prefix+draft"), prefixes()
    missing = adapter(drafts()[:, :0], None, prefix)
    assert (adapter(drafts(), torch.zeros(3, dtype=torch.long), prefix) - missing).abs().max() < 1e-5
    condition(adapter, "prefix")
    assert torch.equal(adapter(drafts(), DRAFT_LENGTHS, prefix), missing)
    assert adapter.config.contract == CONTRACTS["prefix"]


OUTPUTS = torch.tensor([2, 3, 11, 30, 49])


def with_outputs(conditioning: str = "prefix+draft") -> TokenAdapter:
    """The tiny adapter, scoring five ids alone."""
    whole = tiny_adapter(conditioning)
    adapter = TokenAdapter(dataclasses.replace(whole.config, draft_vocab=5), OUTPUTS.clone()).eval()
    adapter.load_state_dict({**whole.state_dict(), "output_ids": OUTPUTS})
    return adapter


def test_a_draft_vocabulary_gives_the_logits_of_its_ids_in_a_full_pass_and_step_by_step(tmp_path):
    save_adapter(with_outputs(), tmp_path / "best_model.pt")
    adapter = load_adapter(tmp_path / "best_model.pt")
    arguments = (drafts(), DRAFT_LENGTHS, prefixes())
    assert adapter.config.draft_vocab == 5 and adapter.output_proj[
        1].weight is adapter.embedding.weight
    assert torch.allclose(adapter(*arguments),
                          tiny_adapter("prefix+draft")(*arguments)[..., OUTPUTS], atol=1e-6)
    first, cache = adapter.start(drafts(), DRAFT_LENGTHS)
    stepped = torch.cat([first, adapter.step(prefixes(), cache)], dim=1)
    assert (stepped - adapter(*arguments)).abs().max() < 1e-5


def test_ids_and_columns_of_a_draft_vocabulary_are_each_others_inverse():
    adapter, columns = with_outputs(), torch.arange(5)
    assert torch.equal(adapter.labels_of(adapter.ids_of(columns)), columns)
    ids = torch.tensor([[0, 1, 4], [48, NOT_SCORED, 12]])
    assert (adapter.labels_of(ids) == NOT_SCORED).all()
    assert torch.equal(tiny_adapter().labels_of(ids), ids)


def test_the_budget_of_the_original_is_kept():
    with torch.device("meta"):
        assert TokenAdapter(AdapterConfig(vocab_size=32000)).num_parameters() < 45.5e6


# ------------------------------------------------------------------------ folders that are handed on
@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_adapter("prefix+draft").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("conditioning", CONTRACTS)
def test_an_adapter_that_is_handed_on_proposes_the_same_and_keeps_its_contract(tmp_path, conditioning):
    adapter = tiny_adapter(conditioning)
    adapter.save_pretrained(tmp_path / "a")
    loaded = TokenAdapter.from_pretrained(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "README.md", "config.json", "model.safetensors"]
    assert loaded.config == adapter.config and not loaded.training
    assert loaded.num_parameters() == adapter.num_parameters()
    arguments = (drafts(),) if conditioning == "draft" else (drafts(), DRAFT_LENGTHS, prefixes())
    assert torch.equal(loaded(*arguments), adapter(*arguments))


def test_the_config_of_a_folder_is_that_of_the_adapter_when_it_was_saved(tmp_path):
    adapter = copy.deepcopy(pickle.loads(pickle.dumps(with_outputs())))
    condition(adapter, "prefix")
    adapter.save_pretrained(tmp_path, config={"memory_share": 0.25, "format": 7})
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["contract"] == CONTRACTS["prefix"] and values["format"] == FORMAT == 1
    assert values["memory_share"] == 0.25
    loaded = TokenAdapter.from_pretrained(tmp_path)
    assert loaded.config == adapter.config and torch.equal(loaded.output_ids, OUTPUTS)


def test_a_hub_id_is_read_through_the_hub_and_what_it_can_not_give_is_one_line(folder, monkeypatch):
    monkeypatch.setattr("token_adapter.hf_hub_download", lambda name, file, **options: str(folder / file))
    assert TokenAdapter.from_pretrained("org/name", revision="main").config.vocab_size == 50
    monkeypatch.undo()
    for name in ("org/name", "no/such/folder", "a b"):
        with pytest.raises(UserError, match=f"{name} is not a folder, nor an adapter of the hub"):
            TokenAdapter.from_pretrained(name, local_files_only=True)


def test_an_upload_holds_the_three_files_and_nothing_else(monkeypatch):
    seen = []

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **how):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **how):
            seen.extend([repo_id, *sorted(path.name for path in folder_path.iterdir())])
            assert TokenAdapter.from_pretrained(folder_path).config.conditioning == "prefix"
            return "url"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    assert tiny_adapter("prefix").push_to_hub("org/name") == "url"
    assert seen == ["org/name", "README.md", "config.json", "model.safetensors"]


def damage_config(folder: Path, **changed) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changed}))


def damage_weights(folder: Path, **changed) -> None:
    state = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in {**state, **changed}.items() if tensor is not None}
    save_file(state, folder / "model.safetensors")


HUGE = {name: limit + 1 for name, limit in MAX_SIZES.items()}
DAMAGES = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a folder": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
    "no JSON": lambda folder: (folder / "config.json").write_bytes(b"\xff{"),
    "a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "deep": lambda folder: (folder / "config.json").write_text("[" * 10**5),
    "another format": lambda folder: damage_config(folder, format=2),
    "no format": lambda folder: damage_config(folder, format=None),
    "conditioning": lambda folder: damage_config(folder, conditioning=["prefix"]),
    "contract": lambda folder: damage_config(folder, contract="target[i+2]"),
    "dropout": lambda folder: damage_config(folder, dropout="0.1"),
    "tokenizer": lambda folder: damage_config(folder, draft_tokenizer=[1]),
    "other sizes": lambda folder: damage_config(folder, vocab_size=51),
    **{f"huge {name}": lambda folder, name=name: damage_config(folder, **{name: HUGE[name]})
       for name in HUGE},
    "cut": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-100]),
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "a header of 2^63 bytes": lambda folder: (folder / "model.safetensors").write_bytes(
        b"\xff" * 7 + b"\x7f" + b"{}"),
    "missing": lambda folder: damage_weights(folder, begin=None),
    "unknown": lambda folder: damage_weights(folder, lora=torch.zeros(1)),
    "whole numbers": lambda folder: damage_weights(folder, begin=torch.zeros(32, dtype=torch.long)),
    "complex": lambda folder: damage_weights(folder, begin=torch.zeros(32, dtype=torch.complex64)),
    "not finite": lambda folder: damage_weights(folder, begin=torch.full((32,), torch.inf)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line_that_names_it(folder, damage):
    DAMAGES[damage](folder)
    with pytest.raises(UserError, match="is not the folder of an adapter") as raised:
        TokenAdapter.from_pretrained(folder)
    assert str(folder) in str(raised.value) and len(str(raised.value).splitlines()) == 1
