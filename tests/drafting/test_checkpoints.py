"""A checkpoint file is either understood or refused."""

import dataclasses
from pathlib import Path

import pytest
import torch

from base import UserError
from drafting.checkpoints import FORMAT, load_adapter, save_adapter
from tests.test_token_adapter import (
    DRAFT_LENGTHS,
    PREFIX,
    TINY,
    drafts,
    prefixes,
    tiny_adapter,
    with_outputs,
)
from token_adapter import CONTRACTS, ORIGINAL_CONTRACT


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


@pytest.mark.parametrize("ids", [[3, 2, 11], [2, 2, 3], [-1, 3], [3, 50], [2.0, 3.0]])
def test_a_damaged_map_of_a_draft_vocabulary_is_refused(tmp_path, ids):
    adapter = with_outputs()
    state = {**adapter.state_dict(), "output_ids": torch.tensor(ids)}
    torch.save({"model_state_dict": state, "config": dataclasses.asdict(adapter.config)},
               tmp_path / "odd.pt")
    with pytest.raises(UserError, match="output_ids must be"):
        load_adapter(tmp_path / "odd.pt")


@pytest.mark.parametrize("conditioning", PREFIX)
def test_a_saved_prefix_adapter_comes_back_tied(tmp_path, conditioning):
    adapter = tiny_adapter(conditioning)
    save_adapter(adapter, tmp_path / "best_model.pt")
    loaded = load_adapter(tmp_path / "best_model.pt")
    assert loaded.config == adapter.config and loaded.num_parameters() == adapter.num_parameters()
    assert loaded.output_proj[1].weight is loaded.embedding.weight
    arguments = drafts(), DRAFT_LENGTHS, prefixes()
    assert torch.equal(loaded(*arguments), adapter(*arguments))


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
