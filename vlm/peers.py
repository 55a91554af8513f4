"""Models that benchmark.py times, at real size with random weights, and transformers' decoding modes.

Random weights give meaningless answers. Where the text of an answer matters, a logits processor
forces a recorded answer on generate, token by token; every pass is computed all the same.
"""

import math
import re
import types
from typing import Literal

import torch
from torch import nn
from transformers import VideoLlavaForConditionalGeneration

from clips.pixels import PixelSettings
from machine.device import Runtime
from vlm.contract import VisionLanguageModel
from vlm.eventgpt import CLIP_L_336, EventGPTConfig, EventGPTModel
from vlm.loading import check_quantised
from vlm.model import LoadedModel
from vlm.nf4 import Linear4bit
from vlm.video_llava import VIDEO, VideoLlava

SEED = 42                            # of the weights, and of the benchmark's pictures
QUERY = "What are the key elements in this scene?"

# Token ids of both prompts around pictures and question, by LLaMA's tokenizer: 2,076 positions with
# 8 x 257 of video, 637 with a picture.
ASSISTANT, NEWLINE = [319, 1799, 9047, 13566, 29901], 13
VIDEO_BEFORE = [1, 3148, 1001, 29901, 29871]
EVENT_BEFORE = [
    1, 319, 13563, 1546, 263, 12758, 5199, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 5199, 29915, 29879, 5155, 29889,
    3148, 1001, 29901, 529, 5750, 29918, 2962, 29958
]
EVENT_AFTER = [529, 5750, 29918, 355, 29958]
QUESTION = [5618, 526, 278, 1820, 3161, 297, 445, 9088, 29973]      # QUERY

VISION_7B = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 768
}
TEXT_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32
}
# Behind the words: <image>, <video>, <pad>, then unused rows
WORDS_7B, VOCAB_SIZE_7B = 32000, 32064
NO_EOS = 10**9                      # an EOS id that no model generates
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_VISION = {**SMALL, "image_size": 28, "patch_size": 14, "projection_dim": 32}


class Tokenizer:
    """Gives as many ids as LLaMA's tokenizer for both prompts, with any vocabulary; no id is EOS."""

    bos_token_id, eos_token_id, pad_token_id = 1, NO_EOS, 0

    def __init__(self, words: int):
        self.words = words                           # ids below are words; words + 1 is VIDEO

    def __call__(self, prompt: str):
        query = prompt.partition("\n")[2].removesuffix(" ASSISTANT:")
        question = (QUESTION * len(query))[:len(re.findall(r"\w+|[^\w\s]", query))]
        after = [NEWLINE, *question, *ASSISTANT] if "\n" in prompt else []
        # EventGPT's prompt comes in two parts, each with BOS.
        before = VIDEO_BEFORE if VIDEO in prompt else [1, *EVENT_AFTER] if after else EVENT_BEFORE
        before, after = ([token % self.words for token in part] for part in (before, after))
        return types.SimpleNamespace(input_ids=[*before, *[self.words + 1] * prompt.count(VIDEO), *after])

    def decode(self, tokens: list[int], **how) -> str:
        return ""


def several_questions(count: int) -> list[str]:
    """So many questions of different lengths."""
    return [f"{QUERY} {'And why? ' * (number % 3)}".strip() for number in range(count)]


def random_model(kind: type[LoadedModel], size: Literal["7b", "small"], runtime: Runtime,
                 words: int = WORDS_7B) -> VisionLanguageModel:
    """VideoLlava (without its image tower) or EventGPT of that size, created on its device.

    words: vocabulary of the small model, without the ids for image and video; 7b has its own.
    """
    real, video = size == "7b", kind is VideoLlava
    words = WORDS_7B if real else words
    text = {**(TEXT_7B if real else SMALL), "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "vocab_size": (VOCAB_SIZE_7B if real else words + 2) if video else words}
    if video:
        model_class = VideoLlavaForConditionalGeneration
        shape = model_class.config_class(vision_config=VISION_7B if real else SMALL_VISION,
                                         text_config=text, image_token_index=words,
                                         video_token_index=words + 1)
    else:
        model_class = EventGPTModel
        shape = EventGPTConfig(text, CLIP_L_336 if real else SMALL_VISION)
    torch.manual_seed(SEED)
    torch.set_default_dtype(runtime.dtype)
    try:
        with runtime.device:
            model = model_class(shape).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    if video:
        model.model.image_tower = None
        model.generation_config.eos_token_id = None
    if runtime.quantization == "4bit":
        quantise(model, runtime)
    side = shape.vision_config.image_size
    return kind(model, Tokenizer(words), PixelSettings(side, side), runtime, "random weights")


def quantise(model: nn.Module, runtime: Runtime) -> None:
    """Replace the language model's layers by bitsandbytes' 4-bit ones, as --quantization 4bit does."""
    for name, module in list(model.named_modules()):
        if "language_model" in name and ".layers." in name and type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear_4bit(module.weight.data, runtime))
    check_quantised(model, runtime, [])


def linear_4bit(weight: torch.Tensor, runtime: Runtime) -> Linear4bit:
    """bitsandbytes' linear layer with this weight (N, K), in NF4 with nested statistics."""
    import bitsandbytes

    n, k = weight.shape
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, device="meta", compute_dtype=runtime.dtype,
                                       quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4",
                                              compress_statistics=True).to(runtime.device)
    return layer


class Forced:
    """A logits processor that forces a recorded answer: its next token gets the logit +inf.

    It goes by position, because assisted decoding calls it for every candidate of a pass in turn.
    Other logits stay as they are: prompt lookup drops candidates with a logit of -inf, so -inf
    would reveal the answer to it.
    """

    def __init__(self, prompt_length: int, answer: list[int]):
        self.prompt_length, self.answer = prompt_length, answer

    def __call__(self, input_ids, scores):           # (1, L) ids so far, (1, V) next logits
        at = input_ids.shape[1] - self.prompt_length
        # Candidates may reach past the end
        scores[:, self.answer[min(at, len(self.answer) - 1)]] = math.inf
        return scores


def generate(model: VideoLlava, pixels, answer: list[int], length: int,
             **mode) -> list[int]:
    """The first `length` tokens of the recorded answer, by transformers' greedy generate."""
    prompt = model._prompt_ids(len(pixels), QUERY)
    ids = torch.tensor([prompt], device=model.runtime.device)
    # No inference mode for compiled code, which can't use it; generate turns gradients off itself.
    with torch.inference_mode("cache_implementation" not in mode):
        ids = model.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length,
            pixel_values_videos=pixels[None].to(ids.device, model.runtime.dtype, non_blocking=True),
            logits_processor=[Forced(len(prompt), answer)], **mode)
    return ids[0, len(prompt):].tolist()
