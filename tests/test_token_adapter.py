"""The TokenAdapter is the original architecture, and a checkpoint file is either understood or
refused.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from base import UserError
from token_adapter import (
    CONTRACTS,
    FORMAT,
    NOT_SCORED,
    ORIGINAL_CONTRACT,
    AdapterConfig,
    TokenAdapter,
    load_adapter,
    save_adapter,
)

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


def test_a_saved_adapter_comes_back_with_its_config_and_its_logits(tmp_path):
    adapter = tiny_adapter()
    save_adapter(adapter, tmp_path / "best_model.pt", epoch=3)
    loaded = load_adapter(tmp_path / "best_model.pt")
    assert loaded.config == TINY and loaded.config.contract == CONTRACTS["draft"]
    assert loaded.config.first_position == 0
    assert torch.equal(loaded(drafts()), adapter(drafts()))


def test_a_checkpoint_of_the_original_suite_loads_and_is_marked_with_its_own_contract(tmp_path):
    state = {name: tensor.half() for name, tensor in tiny_adapter().state_dict().items()}
    torch.save({"model_state_dict": state, "config": {"num_heads": 4, "lr": 1e-4}}, tmp_path / "model.pt")
    loaded = load_adapter(tmp_path / "model.pt")
    assert loaded.config == dataclasses.replace(TINY, contract=ORIGINAL_CONTRACT)
    assert loaded.config.first_position == 1 and loaded(drafts()).dtype == torch.float32
    torch.save({"model_state_dict": state}, tmp_path / "bare.pt")
    assert load_adapter(tmp_path / "bare.pt").config.num_heads == 8


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
    adapter.condition("prefix")
    assert torch.equal(adapter(drafts(), DRAFT_LENGTHS, prefix), missing)
    assert adapter.config.contract == CONTRACTS["prefix"]


@pytest.mark.parametrize("conditioning", PREFIX)
def test_a_saved_prefix_adapter_comes_back_tied(tmp_path, conditioning):
    adapter = tiny_adapter(conditioning)
    save_adapter(adapter, tmp_path / "best_model.pt")
    loaded = load_adapter(tmp_path / "best_model.pt")
    assert loaded.config == adapter.config and loaded.num_parameters() == adapter.num_parameters()
    assert loaded.output_proj[1].weight is loaded.embedding.weight
    arguments = drafts(), DRAFT_LENGTHS, prefixes()
    assert torch.equal(loaded(*arguments), adapter(*arguments))


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


@pytest.mark.parametrize("ids", [[3, 2, 11], [2, 2, 3], [-1, 3], [3, 50], [2.0, 3.0]])
def test_a_damaged_map_of_a_draft_vocabulary_is_refused(tmp_path, ids):
    adapter = with_outputs()
    state = {**adapter.state_dict(), "output_ids": torch.tensor(ids)}
    torch.save({"model_state_dict": state, "config": dataclasses.asdict(adapter.config)},
               tmp_path / "odd.pt")
    with pytest.raises(UserError, match="output_ids must be"):
        load_adapter(tmp_path / "odd.pt")


def test_the_budget_of_the_original_is_kept():
    with torch.device("meta"):
        assert TokenAdapter(AdapterConfig(vocab_size=32000)).num_parameters() < 45.5e6


# ------------------------------------------------------------------------------------------ formats
def saved(folder: Path, state: dict | None = None, **facts) -> Path:
    config = dataclasses.asdict(TINY)
    torch.save(
        {"model_state_dict": state or tiny_adapter().state_dict(), "config": config, **facts},
        folder / "a.pt")
    return folder / "a.pt"


def test_a_checkpoint_of_today_and_one_from_before_the_format_number_load(tmp_path):
    save_adapter(tiny_adapter(), tmp_path / "now.pt")
    assert torch.load(tmp_path / "now.pt", weights_only=True)["format"] == FORMAT == 1
    for path in (tmp_path / "now.pt", saved(tmp_path, epoch=3, validation_alpha=0.5),
                 saved(tmp_path, format=0)):
        assert load_adapter(path).config == TINY


@pytest.mark.parametrize("number", [FORMAT + 1, 10**30, -1, "1", 1.0])
def test_a_checkpoint_of_an_unknown_format_is_refused(tmp_path, number):
    with pytest.raises(UserError, match=rf"a\.pt has format {number!r}"):
        load_adapter(saved(tmp_path, format=number))


@pytest.mark.parametrize("dtype", [torch.long, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_a_user_error(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tiny_adapter().state_dict().items()}
    with pytest.raises(UserError, match=r"embedding\.weight must be torch\.float16 or"):
        load_adapter(saved(tmp_path, state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_in_float32_are_a_user_error(tmp_path, value):
    state = {name: tensor.double() for name, tensor in tiny_adapter().state_dict().items()}
    state["transformer.layers.1.norm2.bias"][3] = value
    with pytest.raises(UserError, match="weights that are not finite"):
        load_adapter(saved(tmp_path, state))


class NotPlain:
    """Something that only arbitrary code could load."""


def damaged(folder: Path, damage: str) -> Path:
    path = folder / "best_model.pt"
    if damage == "absent":
        return path
    state, config = tiny_adapter().state_dict(), dataclasses.asdict(TINY)
    checkpoint = {"model_state_dict": state, "config": config}
    if damage == "missing key":
        del state["transformer.layers.1.norm2.bias"]
    elif damage == "extra key":
        state["lora.weight"] = torch.zeros(1)
    elif damage == "odd shape":
        state["output_proj.1.weight"] = torch.zeros(49, 32)
    elif damage == "no weights":
        checkpoint = {"state_dict": state}
    elif damage == "other model":
        checkpoint = {"model_state_dict": {"fc.weight": torch.zeros(2, 2)}}
    elif damage == "conditioning":
        config["conditioning"] = "telepathy"
    elif damage == "contract":
        config["contract"] = "target[i+2] from draft[:i+1]"
    elif damage == "heads":
        config["num_heads"] = 5
    elif damage == "code inside":
        checkpoint["config"] = NotPlain()
    torch.save(checkpoint, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint at all")
    return path


@pytest.mark.parametrize(("damage", "words"), [
    ("absent", "no such file"), ("empty", "can be read"), ("text", "can be read"), ("cut", "can be read"),
    ("code inside", "can be read"), ("no weights", "model_state_dict"), ("other model", "found fc.weight"),
    ("missing key", r"missing transformer\.layers\.1\.norm2\.bias"), ("extra key", r"not known lora\.weight"),
    ("odd shape", r"output_proj\.1\.weight has the shape \(49, 32\), wanted \(50, 32\)"),
    ("conditioning", "telepathy"), ("contract", "unknown contract"), ("heads", "num_heads must divide"),
])
def test_a_damaged_checkpoint_is_a_user_error_that_says_what_is_wrong(tmp_path, damage, words):
    path = damaged(tmp_path, damage)
    with pytest.raises(UserError, match=words) as raised:
        load_adapter(path)
    assert str(path) in str(raised.value)
