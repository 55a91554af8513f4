"""The adapter that a run trains or measures: a new one, or a checkpoint that fits the pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from base import UserError, first_line, log
from drafting.checkpoints import load_adapter, tokenizers_of
from pairs.formats import DRAFT_MODEL
from pairs.pairs import Pairs
from pairs.splits import MAX_VOCAB_SIZE, Data, check_drafts, check_ids
from token_adapter import MAX_WEIGHTS, AdapterConfig, TokenAdapter

SMALLER = "choose a smaller --embed_dim, --num_layers or --vocab_size"


def new_adapter(config: AdapterConfig, seed: int,
                output_ids: torch.Tensor | None = None) -> TokenAdapter:
    """An adapter with random weights.

    output_ids: as for TokenAdapter.
    Raises UserError if it is too large for a checkpoint or for the memory.
    """
    with torch.device("meta"):
        state = TokenAdapter(config, output_ids).state_dict()
    size = sum(tensor.nbytes for tensor in state.values())
    if size > 0.99 * MAX_WEIGHTS:                       # the rest is for the names
        raise UserError(f"this adapter has {size / 2**30:.1f} GiB, wanted at most "
                        f"{MAX_WEIGHTS / 2**30:.0f}; {SMALLER}")
    torch.manual_seed(seed)
    try:
        return TokenAdapter(config, output_ids)
    except (RuntimeError, MemoryError) as error:           # of PyTorch's allocator
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError(f"not enough memory for this adapter ({first_line(error)[:200]}); "
                        f"{SMALLER}") from error


def condition(adapter: TokenAdapter, conditioning: str) -> None:
    """Go on as `prefix` or `prefix+draft`: same weights, other inputs."""
    assert adapter.config.sees_prefix == (conditioning != "draft"), conditioning
    adapter.config = dataclasses.replace(adapter.config, conditioning=conditioning, contract="")


def scoring_targets_of(pairs: Pairs, config: AdapterConfig, seed: int) -> TokenAdapter:
    """A new adapter that scores only the target tokens of these pairs."""
    output_ids = torch.from_numpy(pairs.ids("target")).long()
    return new_adapter(dataclasses.replace(config, draft_vocab=len(output_ids)), seed, output_ids)


def vocab_size_for(data: Data, wanted: int) -> int:
    """The vocabulary size: as wanted, else recorded in the pair files, else by their largest id.

    Raises UserError if an id lies outside.
    """
    enough = min(max(data.largest_ids)[0] // 64 * 64 + 64, MAX_VOCAB_SIZE)
    size = wanted or data.vocab_size or enough
    if not 0 < size <= MAX_VOCAB_SIZE:
        raise UserError(f"the pair files record a vocabulary of {size} ids, wanted 1 to "
                        f"{MAX_VOCAB_SIZE}; correct them, or set --vocab_size")
    check_ids(data.largest_ids, size, "correct the file, or set --vocab_size to that of the models")
    return size


def of_tokenizers(config: AdapterConfig, data: Data) -> AdapterConfig:
    """The config for pairs of these tokenizers.

    An adapter that reads drafts of another one than the target's has embeddings of its own for them.
    """
    known, own = data.tokenizers, 0
    if known.are_same is False and config.conditioning != "prefix":
        sizes = [file["models"].get(DRAFT_MODEL, {}).get("vocab_size", 0)
                 for files in data.files.values() for file in files]
        own = max(sizes) or max(data.largest_draft_ids)[0] + 1
        check_ids(data.largest_draft_ids, own, "correct the file, which records that vocabulary")
        log(f"train | draft and target have tokenizers of their own: {own} embeddings for draft "
            "tokens, and drafts are no further text to learn (--draft_text 0)")
    return dataclasses.replace(config, draft_embeddings=own, draft_tokenizer=known.draft,
                               target_tokenizer=known.target)


def open_checkpoint(path: Path, data: Data, conditioning: str) -> TokenAdapter:
    """The adapter of a checkpoint, if it fits these pairs; conditioning: the one that it must have,
    or "auto".
    """
    adapter = load_adapter(path)
    tokenizers_of(adapter.config).check(data.tokenizers, str(path), data.test.files[0]["path"],
                                        with_drafts=adapter.config.conditioning != "prefix")
    check_ids(data.largest_ids, adapter.config.vocab_size,
              "a checkpoint needs pairs of its tokenizer")
    if conditioning not in ("auto", adapter.config.conditioning):
        raise UserError(f"{path} was trained in {adapter.config.conditioning} conditioning, wanted "
                        f"--conditioning {conditioning}; leave the flag out to measure it by its own")
    check_drafts(data.test, adapter.config.conditioning)
    log(f"checkpoint | {path} | {adapter.config.contract}")
    return adapter
