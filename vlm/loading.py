"""What both models do alike: device and dtype, tokenizer, checked loading, greedy answers, unloading."""

import copy
import dataclasses
import gc
import hashlib
import logging
import re
from pathlib import Path

import numpy as np
import torch
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from base import UserError, first_line, log
from clips.pixels import PixelSettings, clip_pixels
from machine.device import Runtime
from machine.files import read_json
from vlm.contract import Answer

transformers_logging.set_verbosity_error()       # what matters is checked below and logged as our own lines
transformers_logging.disable_progress_bar()      # a bar would write \r into a log file
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)    # 8bit says at every layer that it casts

BLOCK_4BIT = 64                                  # weights that share a scale
BITS = {"4bit": 4.127, "8bit": 8}                # a weight of a quantised layer, with its share of the scales
LARGEST = {"num_hidden_layers": 1000}            # more than that of a config's sizes is damage or malice
LARGEST_SIZE = 10**7
SIZES = re.compile(r"num_\w*(layers|heads)|(hidden|intermediate|vocab|image|patch)_size|max_position_embeddings")


@dataclasses.dataclass
class VisionLanguageModel:
    """What both models have: load (their own), prepare, answer, prompt_embeds, unload."""

    model: torch.nn.Module
    tokenizer: object
    pixels: PixelSettings
    runtime: Runtime
    revision: str

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    def prepare(self, pictures: list[np.ndarray]) -> torch.Tensor:
        """Pictures (H, W, 3) uint8 RGB of a clip -> pixels (n, 3, S, S) in the model's dtype, on the CPU.

        Thread-safe.
        """
        return torch.from_numpy(clip_pixels(pictures, self.pixels)).to(self.runtime.dtype)

    @torch.inference_mode()
    def shared_embeds(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, n, 3, S, S) on the model's device -> (B, P, H): the prompts up to the end of the pictures."""
        before, _ = self.prompt_parts("")
        words = self._embed(before).expand(len(pixels), -1, -1)
        return torch.cat([words, self.visual_features(pixels)], 1)

    @torch.inference_mode()
    def prompt_embeds(self, pixels: torch.Tensor, query: str) -> torch.Tensor:
        """One clip's pixels (n, 3, S, S) as prepare() gives them -> (1, L, H), what the decoder reads."""
        clip = self.shared_embeds(pixels[None].to(self.runtime.device, non_blocking=True))
        return torch.cat([clip, self._embed(self.prompt_parts(query)[1])], 1)[:, :self.max_prompt]

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long, device=self.runtime.device))

    def unload(self) -> None:
        """Free the weights; the object can't answer any more."""
        del self.model
        free_memory()


def check_positions(prompt: int, max_new_tokens: int, positions: int) -> None:
    if prompt + max_new_tokens > positions:
        raise UserError(f"the prompt ({prompt} tokens) and --max_new_tokens {max_new_tokens} need "
                        f"{prompt + max_new_tokens} positions, the model has {positions}: use fewer pictures or "
                        "tokens, or a shorter question")


# ------------------------------------------------------------------------------------------- loading
def load_checked(model_class, name: str | Path, runtime: Runtime, keep: list[str], config, **how):
    """from_pretrained, streamed shard by shard, that raises a UserError unless every weight was found and fits.

    keep: full names of the sub-modules that stay unquantised; transformers 5 matches them from the start of the
    name and silently quantises what no entry matches, so the quantised layers are counted afterwards.
    """
    quantization = None
    if runtime.quantization != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=runtime.quantization == "4bit", load_in_8bit=runtime.quantization == "8bit",
            bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=runtime.dtype,
            llm_int8_skip_modules=keep)
    needed_gib = check_room(model_class, name, config, runtime)
    try:
        model, info = model_class.from_pretrained(
            name, config=config, dtype=runtime.dtype, device_map={"": runtime.device}, output_loading_info=True,
            quantization_config=quantization, ignore_mismatched_sizes=True, trust_remote_code=False, **how)
    except Exception as error:        # damaged weights break in safetensors, torch and transformers in many ways
        if short_of_memory(error):
            raise no_room(name, runtime, needed_gib, f"; {first_line(error)}") from error
        raise UserError(f"can't load the model {name}: {type(error).__name__}: {error}") from error
    trouble = [f"{kind.replace('_keys', '')}: {', '.join(sorted(str(key) for key in info[kind])[:12])}"
               f" ({len(info[kind])} in all)"
               for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
    if trouble:
        raise UserError(f"the weights of {name} don't fit {model_class.__name__}: {'; '.join(trouble)}")
    check_quantised(model, runtime, keep)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and module.in_features % BLOCK_4BIT:
            module.support_avx512bf16_for_cpu = False     # its packed form there can't hold part of a block
    return model.eval().requires_grad_(False)


def check_room(model_class, name: str | Path, config, runtime: Runtime) -> float:
    """GiB that the weights will take; a UserError when there is no room, or when a folder can't hold that many."""
    try:
        with torch.device("meta"):                                      # shapes alone
            weights = dict(model_class(copy.deepcopy(config)).named_parameters())
    except Exception as error:        # a damaged config breaks in transformers in many ways
        raise UserError(f"can't make the model that {name} describes: {type(error).__name__}: {error}") from error
    files = [file for kind in ("*.safetensors", "*.bin") for file in Path(name).glob(kind)]
    count, there = sum(weight.numel() for weight in weights.values()), sum(file.stat().st_size for file in files)
    if files and count / 2 > there:                                     # no format takes less than half a byte each
        raise UserError(f"can't load the model {name}: its config.json describes {count:,} weights, far more than "
                        f"fit into its {len(files)} weight files of {there:,} bytes: one is cut short or missing, or "
                        "this is the config.json of other weights")
    bits = 8 * runtime.dtype.itemsize
    needed_gib = sum(weight.numel() * (BITS.get(runtime.quantization, bits) if weight.dim() == 2 and ".layers." in key
                     and "language_model" in key else bits) for key, weight in weights.items()) / 8 / 2**30
    if needed_gib > free_gib(runtime.device):
        raise no_room(name, runtime, needed_gib)
    return needed_gib


def no_room(name: str | Path, runtime: Runtime, needed_gib: float, more: str = "") -> UserError:
    return UserError(
        f"not enough memory for {name} on {runtime.device}: its weights take about {needed_gib:.1f} GiB "
        f"({str(runtime.dtype).removeprefix('torch.')}, quantization {runtime.quantization}), "
        f"{free_gib(runtime.device):.1f} GiB are free{more}; try --quantization 4bit or --dtype bfloat16, end what "
        "else uses the memory, or use a larger device")


def free_gib(device: torch.device) -> float:
    """Memory that a process could still have."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + kept) / 2**30
    try:
        found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(found[name].split()[0]) for name in ("MemAvailable", "SwapFree")) / 2**20       # from KiB
    except (OSError, KeyError, ValueError):      # not Linux
        return float("inf")


def check_quantised(model: torch.nn.Module, runtime: Runtime, keep: list[str]) -> None:
    """Every linear layer of the language model's blocks is quantised, no kept one is; our mistake if not."""
    linear = {name: type(module).__name__ for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear)}
    quantised = [name for name, kind in linear.items() if kind in ("Linear4bit", "Linear8bitLt")]
    kept = [name for name in quantised if any(name == k or name.startswith(k + ".") for k in keep)]
    blocks = [name for name in linear if "language_model" in name and ".layers." in name]
    wanted = len(blocks) if runtime.quantization != "none" else 0
    assert not kept and len(quantised) == wanted, f"{len(quantised)} layers quantised, wanted {wanted}; kept: {kept}"
    log(f"load | {type(model).__name__} | {runtime.device} {str(runtime.dtype).removeprefix('torch.')} | quantised "
        f"{len(quantised)} of {len(linear)} linear layers ({runtime.quantization})")


def weights_mib(model: torch.nn.Module) -> float:
    """What the weights occupy, in MiB, with the scales of quantised ones."""
    tensors = list(model.parameters())
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)                              # NF4: scales of scales
        for part in (state, getattr(state, "state2", None)):
            tensors += [tensor for tensor in (getattr(part, "absmax", None),) if tensor is not None]
        tensors += [tensor for tensor in (getattr(weight, "SCB", None),) if tensor is not None]     # LLM.int8
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def load_tokenizer(name: str | Path, local: bool):
    """The tokenizer exactly as its files describe it.

    tokenizer.json is read verbatim: transformers' LlamaTokenizer class would rebuild it and drop its normaliser.
    A folder with tokenizer.model alone (EventGPT's published form) goes through LlamaTokenizer.
    """
    try:
        verbatim = cached_file(name, "tokenizer.json", local_files_only=local,
                               _raise_exceptions_for_missing_entries=False)
        # PreTrainedTokenizerFast must not see a folder without tokenizer.json: it would make one, and not LLaMA's.
        kind = PreTrainedTokenizerFast if verbatim else LlamaTokenizer
        return kind.from_pretrained(name, local_files_only=local)
    except Exception as error:       # the converters raise RuntimeError, TypeError, their own classes, ...
        raise UserError(f"can't load a tokenizer from {name}: {type(error).__name__}: {error}") from error


def read_model_config(folder: Path) -> dict:
    """A model folder's config.json; a UserError when the folder or the file isn't there."""
    if not folder.is_dir():
        raise UserError(f"no such model folder: {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} holds {type(config).__name__}, wanted an object")
    check_sizes(config, folder / "config.json")
    return config


def check_sizes(config: dict, file: Path) -> None:
    """A model of a billion layers would be built for ever."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, file)
        largest = LARGEST.get(key, LARGEST_SIZE)
        if SIZES.fullmatch(key) and isinstance(value, (int, float)) and not 0 < value <= largest:
            raise UserError(f"{file}: {key} is {value}, wanted 1 to {largest:,}")


# ----------------------------------------------------------------------------------------- answering
def generate_greedily(model, tokenizer, max_new_tokens: int, **inputs) -> list[Answer]:
    """transformers' greedy generate on a left-padded batch -> one Answer per row.

    The checkpoint's own generation_config plays no part (sampling settings, a length limit).
    inputs: input_ids (B, L) or inputs_embeds (B, L, H), attention_mask (B, L), and what else the model takes.
    """
    eos = tokenizer.eos_token_id
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, use_cache=True,
                                bos_token_id=tokenizer.bos_token_id,
                                pad_token_id=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    with torch.inference_mode():
        ids = model.generate(**inputs, generation_config=settings)
    if "input_ids" in inputs:                                  # then the prompt stands in front; else it does not
        ids = ids[:, inputs["input_ids"].shape[1]:]
    return answers_of(ids.tolist(), tokenizer)


def answers_of(rows: list[list[int]], tokenizer) -> list[Answer]:
    """New tokens, with whatever stands after EOS -> an Answer for each row."""
    answers, eos = [], tokenizer.eos_token_id
    for row in rows:
        finished = eos in row
        tokens = row[:row.index(eos) + 1] if finished else row
        answers.append(Answer(tokens, tokenizer.decode(tokens, skip_special_tokens=True).strip(), finished))
    return answers


def local_revision(folder: Path) -> str:
    """Tells two checkpoints at one path apart: a digest of the config and of the weight files' names and sizes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return f"local {digest.hexdigest()[:12]}"


def short_of_memory(error: BaseException) -> bool:
    """Whether this error is a lack of memory. On a CPU and inside CUDA's libraries it is a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in words))


def free_memory() -> None:
    """Give the memory of dropped models back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
