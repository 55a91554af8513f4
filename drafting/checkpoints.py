"""best_model.pt, the adapter as training keeps it, and checkpoints of the original suite.

An adapter that is handed on is a folder instead: TokenAdapter.save_pretrained.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch

from base import UserError
from machine.files import check_format
from machine.tensors import check_weights, read_tensors, some_of, write_tensors
from pairs.tokenizers import Tokenizers
from token_adapter import MAX_SIZES, MAX_WEIGHTS, ORIGINAL_CONTRACT, TIED, AdapterConfig, TokenAdapter

FORMAT = 1                     # of checkpoints; those without the number count as 0
ORIGINAL_NUM_HEADS = 8


def save_adapter(adapter: TokenAdapter, path: Path, **facts) -> None:
    """Write weights, config and plain facts (epoch, ...) into one file, whole or not at all."""
    weights = {name: tensor.cpu() for name, tensor in adapter.state_dict().items()}
    config = dataclasses.asdict(adapter.config)
    write_tensors(path, {"format": FORMAT, "model_state_dict": weights, "config": config, **facts})


def load_adapter(path: Path) -> TokenAdapter:
    """Read a checkpoint of ours or of the original suite, on the CPU, in eval mode, float32.

    Sizes come from the shapes, everything else from the checkpoint's config. A checkpoint without a
    contract is the original suite's, which proposed target[i+1] where we propose target[i].
    """
    if not path.exists():
        raise UserError(f"no such file: {path}")
    checkpoint = read_tensors(path, MAX_WEIGHTS, "is not a checkpoint that can be read: {reason}")
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    check_format(path, checkpoint.get("format"), FORMAT)
    state, recorded = checkpoint.get("model_state_dict"), checkpoint.get("config")
    try:
        if not isinstance(state, dict):
            raise ValueError("it has no weights under 'model_state_dict'")
        check_weights(state, integers=("output_ids",))
        config = config_of(state, recorded if isinstance(recorded, dict) else {})
        with torch.device("meta"):
            wanted = TokenAdapter(config).state_dict()
        check_weights(state, integers=("output_ids",), wanted=wanted)
        return TokenAdapter.of_weights(config, state)
    except (UserError, ValueError) as error:
        raise UserError(f"{path} is not an adapter checkpoint: {error}") from error


def tokenizers_of(config: AdapterConfig) -> Tokenizers:
    """The tokenizers of an adapter, as far as its checkpoint tells."""
    is_known = config.draft_embeddings or config.draft_tokenizer
    are_same = not config.draft_embeddings if is_known else None
    return Tokenizers(config.draft_tokenizer, config.target_tokenizer, are_same)


def config_of(state: dict, recorded: dict) -> AdapterConfig:
    """The config of an adapter with these weights. recorded: what the checkpoint says of it."""
    num_layers = len(set(re.findall(r"^transformer\.layers\.(\d+)\.", "\n".join(state), re.MULTILINE)))
    telling = ("embedding.weight", "position_embedding.weight", "transformer.layers.0.linear1.weight")
    shapes = [state[name].shape for name in telling if name in state and state[name].dim() == 2]
    if len(shapes) < len(telling):
        raise ValueError(f"wanted two-dimensional {', '.join(telling)}, found {some_of(state)}")
    if num_layers > MAX_SIZES["num_layers"]:
        raise ValueError(f"{num_layers} layers, wanted at most {MAX_SIZES['num_layers']}")
    (vocab_size, embed_dim), (max_seq_len, _), (feedforward_dim, _) = shapes
    # In draft conditioning `embedding` is the drafts' table
    if recorded.get("draft_embeddings") and TIED in state:
        vocab_size = len(state[TIED])
    for name in ("conditioning", "contract"):
        if not isinstance(recorded.get(name, ""), str):
            raise ValueError(f"{name} must be a text, got {recorded[name]!r}")
    return AdapterConfig(
        vocab_size=vocab_size, embed_dim=embed_dim, num_layers=num_layers, max_seq_len=max_seq_len,
        feedforward_dim=feedforward_dim, num_heads=recorded.get("num_heads", ORIGINAL_NUM_HEADS),
        dropout=recorded.get("dropout", 0.1), conditioning=recorded.get("conditioning", "draft"),
        contract=recorded.get("contract", ORIGINAL_CONTRACT),
        draft_vocab=state["output_ids"].numel() if "output_ids" in state else 0,
        draft_embeddings=recorded.get("draft_embeddings", 0),
        draft_tokenizer=recorded.get("draft_tokenizer", ""),
        target_tokenizer=recorded.get("target_tokenizer", ""))
