"""Weights into memory: checked loading, quantisation, room for weights and for prompts."""

import copy
import gc
import logging
import re
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from base import UserError, log
from machine.device import Runtime
from vlm.checkpoints import Checkpoint
from vlm.errors import in_words, short_of_memory

# what matters is checked below and logged as our own lines
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()      # a bar would write \r into a log file
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # 8bit says at every layer that it casts

BLOCK_4BIT = 64                                  # weights that share a scale
BITS = {"4bit": 4.127, "8bit": 8}  # a weight of a quantised layer, with its share of the scales
# bitsandbytes' and ours
QUANTISED = {"Linear4bit": "4bit", "NF4Linear": "4bit", "Linear8bitLt": "8bit"}
# Names of what is quantised, in the models that have files of their own.
QUANTISED_BLOCKS = re.compile(r".*language_model.*\.layers\.")
ATTENTION = "sdpa"  # never the config's: it may name a kernel to fetch from the hub


# ------------------------------------------------------------------------------------------ loading
def load_checked(model_class, checkpoint: Checkpoint, config, runtime: Runtime,
                 keep: list[str] | None = None, key_mapping: dict[str, str] | None = None):
    """from_pretrained, streamed shard by shard, that raises a UserError unless every weight was
    found and fits.

    keep: full names of the sub-modules that stay unquantised; transformers 5 matches them from the
    start of the name and silently quantises what no entry matches, so the quantised layers are
    counted afterwards. None: all but the linear layers of the decoder, and weights of the files that
    the model has no place for are a warning. key_mapping: patterns of the weights' names in the
    files -> ours.
    """
    quantization, blocks, is_strict = None, QUANTISED_BLOCKS, keep is not None
    meta = on_meta(model_class, checkpoint.name, config)
    parts = [module for module in meta.modules() if isinstance(module, PreTrainedModel)]
    runs_eager = any(part.config._attn_implementation == "eager" for part in parts)
    attention = "eager" if runs_eager else ATTENTION     # Gemma 2, say, has no other
    if keep is None:
        keep, blocks = outside_decoder(meta)
    if runtime.quantization != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=runtime.quantization == "4bit",
            load_in_8bit=runtime.quantization == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=runtime.dtype,
            llm_int8_skip_modules=keep)
    name, needed_gib = checkpoint.name, check_room(meta, checkpoint, runtime, blocks)
    try:
        model, info = model_class.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=runtime.dtype,
            device_map={"": runtime.device},
            output_loading_info=True,
            quantization_config=quantization,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation=attention,
            generation_config=GenerationConfig(),  # else generate() would follow the folder's
            **({"key_mapping": key_mapping} if key_mapping else {}),
        )
    # damaged weights break in safetensors, torch and transformers in many ways
    except Exception as error:
        if short_of_memory(error):
            raise no_room(name, runtime, needed_gib, f"; {in_words(error)}") from error
        raise UserError(f"can't load the model {name}: {in_words(error)}") from error
    trouble = {
        kind: f"{kind.replace('_keys', '')}: {', '.join(sorted(str(key) for key in info[kind])[:12])}"
        f" ({len(info[kind])} in all)"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    }
    if "unexpected_keys" in trouble and not is_strict:
        log(f"load | WARNING | {name} | weights without a place in {model_class.__name__}, "
            + trouble.pop("unexpected_keys"))
    if trouble:
        raise UserError(
            f"the weights of {name} don't fit {model_class.__name__}: {'; '.join(trouble.values())}"
        )
    check_quantised(model, runtime, keep, blocks)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and module.in_features % BLOCK_4BIT:
            # its packed form there can't hold part of a block
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def on_meta(model_class, name: str, config) -> torch.nn.Module:
    """The model without memory for its weights; a UserError if the config describes none."""
    try:
        with torch.device("meta"):
            return model_class(copy.deepcopy(config))
    except Exception as error:        # a damaged config breaks in transformers in many ways
        raise UserError(f"can't make the model that {name} describes: {in_words(error)}") from error


def outside_decoder(model: torch.nn.Module) -> tuple[list[str], re.Pattern]:
    """(the linear layers outside of the decoder by name, a pattern of the names within it)."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return ([name for name in names if not name.startswith(f"{prefix}.")],
            re.compile(re.escape(prefix) + r"\."))


def check_quantised(model: torch.nn.Module, runtime: Runtime, keep: list[str],
                    of_blocks: re.Pattern = QUANTISED_BLOCKS) -> None:
    """Every linear layer of the language model's blocks is quantised, no kept one is; our mistake
    if not.
    """
    linear = {name: type(module).__name__ for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear)}
    quantised = [name for name, kind in linear.items() if kind in QUANTISED]
    kept = [
        name
        for name in quantised
        if any(name == part or name.startswith(f"{part}.") for part in keep)
    ]
    blocks = [name for name in linear if of_blocks.match(name)]
    wanted = len(blocks) if runtime.quantization != "none" else 0
    assert not kept and len(quantised) == wanted, (
        f"{len(quantised)} layers quantised, wanted {wanted}; kept: {kept}"
    )
    log(f"load | {type(model).__name__} | {runtime.device} {dtype_name(runtime.dtype)} | quantised "
        f"{len(quantised)} of {len(linear)} linear layers ({runtime.quantization})")


def quantization_of(language_model: torch.nn.Module) -> str:
    """4bit, 8bit or none, as the layers in memory are."""
    kinds = {type(module).__name__ for module in language_model.modules()}
    return next((bits for kind, bits in QUANTISED.items() if kind in kinds), "none")


def dtype_name(dtype: torch.dtype) -> str:
    """float16 of torch.float16."""
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------- memory
def check_room(model: torch.nn.Module, checkpoint: Checkpoint, runtime: Runtime,
               blocks: re.Pattern) -> float:
    """GiB that the weights will take; a UserError when there is no room, or when a folder can't
    hold that many.

    model: on the meta device; blocks: matches the names of the linear layers that are quantised.
    """
    name, weights = checkpoint.name, dict(model.named_parameters())
    quantised = {f"{key}.weight" for key, module in model.named_modules()
                 if isinstance(module, torch.nn.Linear) and blocks.match(key)}
    files = checkpoint.weights
    count, size = (
        sum(weight.numel() for weight in weights.values()),
        sum(file.stat().st_size for file in files),
    )
    if count / 2 > size:  # no format takes less than half a byte each
        raise UserError(
            f"can't load the model {name}: its config.json describes {count:,} weights, far more "
            f"than fit into its {len(files)} weight files of {size:,} bytes: one is cut short or "
            "missing, or this is the config.json of other weights"
        )
    bits = 8 * runtime.dtype.itemsize
    needed_gib = (
        sum(
            weight.numel() * (BITS.get(runtime.quantization, bits) if key in quantised else bits)
            for key, weight in weights.items()
        )
        / 8
        / 2**30
    )
    if needed_gib > free_gib(runtime.device):
        raise no_room(name, runtime, needed_gib)
    return needed_gib


def no_room(name: str | Path, runtime: Runtime, needed_gib: float, more: str = "") -> UserError:
    return UserError(
        f"not enough memory for {name} on {runtime.device}: its weights take about "
        f"{needed_gib:.1f} GiB "
        f"({dtype_name(runtime.dtype)}, quantization {runtime.quantization}), "
        f"{free_gib(runtime.device):.1f} GiB are free{more}; try --quantization 4bit or --dtype "
        "bfloat16, end what else uses the memory, or use a larger device"
    )


def free_gib(device: torch.device) -> float:
    """Memory that a process could still have."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) / 2**30
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        # from KiB
        return sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")) / 2**20
    except (OSError, KeyError, ValueError):      # not Linux
        return float("inf")


def free_memory() -> None:
    """Give the memory of dropped models back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weights_mib(model: torch.nn.Module) -> float:
    """What the weights occupy, in MiB, with the scales of quantised ones."""
    tensors = [tensor for weight in model.parameters() for tensor in (weight, *scales_of(weight))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def scales_of(weight: torch.nn.Parameter) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a quantised weight; nothing for a plain one."""
    kind = type(weight).__name__
    if kind == "Params4bit":
        state = weight.quant_state
        # scales of scales
        return [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
    # LLM.int8 moves it elsewhere with the first product
    if kind == "Int8Params" and weight.SCB is not None:
        return [weight.SCB]
    return []


# ---------------------------------------------------------------------------------------- positions
def check_prompts(name: str | Path, parts: list[tuple[int, int]], max_new_tokens: int,
                  limits: tuple[int, int]) -> None:
    """A UserError unless every prompt and its answer fit; a WARNING for prompts that are cut.

    parts: positions of each prompt up to the end of the pictures, and behind; limits: max_prompt
    and max_positions.
    """
    max_prompt, max_positions = limits
    before, longest = (
        max(front for front, _ in parts),
        max(front + behind for front, behind in parts),
    )
    if max_prompt < max_positions and before >= max_prompt:
        raise UserError(
            f"{name} keeps {max_prompt:,} positions of a prompt, the pictures alone take "
            f"{before:,}: use fewer pictures"
        )
    if max_prompt < min(longest, max_positions):
        log(
            f"load | WARNING | {name} | a prompt has {longest:,} positions: its end is cut off "
            f"after {max_prompt:,}"
        )
    if max_prompt < max_positions:
        longest = min(longest, max_prompt)
    check_positions(longest, max_new_tokens, max_positions)


def check_positions(prompt: int, max_new_tokens: int, positions: int) -> None:
    if prompt + max_new_tokens > positions:
        raise UserError(
            f"the prompt ({prompt} tokens) and --max_new_tokens {max_new_tokens} need "
            f"{prompt + max_new_tokens} positions, the model has {positions}: use fewer pictures "
            "or tokens, or a shorter question"
        )
