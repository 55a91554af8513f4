"""A model's folder, or its snapshot in the hub's cache, examined without its weights.

    checkpoint = open_checkpoint(name)     # a UserError for what is missing, cut short or too large
    checkpoint.config                      # config.json, without keys that would choose code to run
    checkpoint.revision()                  # the hub's commit, or a digest of the folder's content

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import zipfile
from pathlib import Path

from base import UserError
from machine.files import read_json
from vlm import hub
from vlm.fingerprint import digest_of, read_header

SIZES = re.compile(
    r"num_\w*(layers|heads)|(hidden|intermediate|vocab|image|patch)_size|max_position_embeddings"
)
LARGEST = {"num_hidden_layers": 1000}  # a larger number in a config.json is damage or malice
LARGEST_SIZE = 10**7

# Files that are parsed whole. The largest tokenizer.json in public use has 35 MB; 64 MiB of JSON
# take about 1 GiB.
PARSED = (".json", ".txt", ".model", ".jinja")
LARGEST_FILE = {"config.json": 4 * 2**20}
LARGEST_PARSED = 64 * 2**20

# In the order in which transformers looks for them: one file, or an index that names the shards.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Read whole into the digest, where they exist: they decide what the same weights answer.
DIGESTED = ("config.json", "generation_config.json", *TOKENIZERS, "tokenizer_config.json",
            "special_tokens_map.json", "added_tokens.json", *hub.PIXEL_SETTINGS)
# Keys by which a config names code: of the folder itself, or an attention kernel to be fetched from
# the hub.
NAMES_CODE = {"auto_map", "custom_generate", "attn_implementation", "_attn_implementation",
              "_attn_implementation_internal", "experts_implementation", "_experts_implementation"}
LFS_POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One model on this disk, whole as far as its files can tell."""

    name: str                      # as the user gave it
    folder: Path
    commit: str | None             # of a hub's model
    config: dict                   # config.json, without NAMES_CODE

    @functools.cached_property
    def weights(self) -> list[Path]:
        """The weight files that transformers reads."""
        return weight_files(self.folder)

    def revision(self, more: str = "") -> str:
        """The commit, or "content <20 hex digits>" of weights, configs and tokenizer, and of the
        text `more`.

        A copy of a folder has the same digest, other weights of the same names and sizes have
        another one.
        """
        if self.commit:
            return self.commit
        files = [file for file in (self.folder / name for name in DIGESTED) if file.is_file()]
        return f"content {digest_of(files, self.weights, more)}"

    def eos_ids(self) -> list[int]:
        """The ids that end an answer as generation_config.json has them: none, one or several."""
        file = self.folder / "generation_config.json"
        settings = read_json(file) if file.is_file() else {}
        ids = settings.get("eos_token_id") if isinstance(settings, dict) else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(f"{file}: eos_token_id is {ids!r:.200}, wanted ids of tokens")
        return ids


def open_checkpoint(name: str | Path, from_hub: bool = True) -> Checkpoint:
    """The model of this folder, or else of this hub id (downloaded if the hub's cache lacks it)."""
    folder, commit = Path(name), None
    if not folder.is_dir():
        if not from_hub or not hub.is_id(str(name)):
            raise UserError(
                f"no such model folder: {name}"
                + (" (and not a hub id like LanguageBind/Video-LLaVA-7B-hf)" if from_hub else "")
            )
        folder, commit = hub.snapshot(str(name), lacks)
    config = read_model_config(folder)
    if reason := lacks(folder):
        raise UserError(f"can't load the model {name}: {reason}")
    check_unquantised(name, config)
    return Checkpoint(str(name), folder, commit, config)


def read_model_config(folder: Path) -> dict:
    """A model folder's config.json without NAMES_CODE; a UserError when the folder or the file
    isn't there.
    """
    if not folder.is_dir():
        raise UserError(f"no such model folder: {folder}")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    if reason := too_large(file):
        raise UserError(f"can't load the model {folder}: {reason}")
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file} holds {type(config).__name__}, wanted an object")
    check_sizes(config, file)
    return without_code(config)


def without_code(config: dict) -> dict:
    """The config without the keys that name code, on every level."""
    return {key: without_code(value) if isinstance(value, dict) else value
            for key, value in config.items() if key not in NAMES_CODE}


def check_sizes(config: dict, file: Path) -> None:
    """A model of a billion layers would never be complete."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, file)
        largest = LARGEST.get(key, LARGEST_SIZE)
        if SIZES.fullmatch(key) and isinstance(value, (int, float)) and not 0 < value <= largest:
            raise UserError(f"{file}: {key} is {value}, wanted 1 to {largest:,}")


def check_unquantised(name: str | Path, config: dict) -> None:
    """A UserError for weights that were saved quantised: --quantization applies to plain ones."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        settings = part.get("quantization_config") or part.get("compression_config")
        if settings:
            raise UserError(
                f"{name} is quantised already (quantization_config in config.json: "
                f"{_method_of(settings)}): wanted the unquantised weights (float16 or bfloat16), "
                "which --quantization 4bit or 8bit quantises while loading"
            )


def _method_of(settings: object) -> str:
    """The method and bits of a quantization_config, for a message."""
    if not isinstance(settings, dict):
        return f"{settings!s:.40}"
    bits = next((f", {bits} bit" for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), "")
    return f"{settings.get('quant_method', 'an unnamed method')!s:.40}{bits}"


# ------------------------------------------------------------------------------ is everything there
def lacks(folder: Path) -> str | None:
    """What is missing, cut short or unusable in a model folder; None if it looks whole."""
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    if (folder / "adapter_config.json").exists():
        return (
            "it has an adapter_config.json: adapters (LoRA) are not applied; merge the adapter into "
            "the weights and remove that file"
        )
    for file in sorted(folder.iterdir()):
        if (
            file.suffix in PARSED
            and file.is_file()
            and (reason := too_large(file) or pointer(file))
        ):
            return reason
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return f"it has no tokenizer ({' or '.join(TOKENIZERS)}); download the folder again, whole"
    try:
        weights = weight_files(folder)
    except UserError as error:
        return str(error)
    return next(filter(None, map(incomplete, weights)), None)


def too_large(file: Path) -> str | None:
    """A file of gigabytes would fill the memory before it turns out to be no JSON."""
    size, largest = file.stat().st_size, LARGEST_FILE.get(file.name, LARGEST_PARSED)
    return f"{file.name} has {size:,} bytes, wanted at most {largest:,}" if size > largest else None


def pointer(file: Path) -> str | None:
    """Git without LFS leaves a note in place of each large file: the commonest half download."""
    with open(file, "rb") as opened:
        is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
    if not is_pointer:
        return None
    return f"{file.name} is a Git LFS pointer and not the file; run git lfs pull in its folder"


def incomplete(file: Path) -> str | None:
    """What is wrong with a weight file, as far as its header and its length tell."""
    if not file.is_file():
        return f"the weight file {file.name} is missing; download it again"
    if reason := pointer(file):
        return reason
    if file.stat().st_size == 0:
        return f"the weight file {file.name} is empty; download it again"
    if file.suffix != ".safetensors":
        with open(file, "rb") as opened:
            is_zip = opened.read(2) == b"PK"
        if is_zip and not zipfile.is_zipfile(file):            # its directory stands at the end
            return f"the weight file {file.name} is cut short; download it again"
        return None
    try:
        tensors, begin = read_header(file)
    except ValueError as error:
        return f"the weight file {file.name} is damaged: {error}; download it again"
    size = begin + max((end for _, end in tensors.values()), default=0)
    if file.stat().st_size != size:
        return (
            f"the weight file {file.name} has {file.stat().st_size:,} bytes, its header says "
            f"{size:,}: it is cut short or damaged; download it again"
        )
    return None


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers reads from this folder, there or not; a UserError if none
    is named.
    """
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise UserError(
            "it has no weights (model.safetensors or pytorch_model.bin, or their index.json); "
            "download the folder again, whole"
        )
    if not name.endswith(".json"):
        return [folder / name]
    index = read_json(folder / name)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(map(_is_plain_name, shards.values())):
        raise UserError(
            f"{name} is not the index of weights: wanted a weight_map from tensors to files beside it"
        )
    return [folder / shard for shard in sorted(set(shards.values()))]


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")
