"""What benchmark.py times: Video-LLaVA at real size with random weights, and transformers' own ways to decode.

Words of random weights mean nothing, so a recorded answer is forced on generate, token by token; every pass is
computed all the same.
"""

import math
import types
from typing import Literal

import torch
from transformers import VideoLlavaForConditionalGeneration

from vlm.loading import Runtime
from vlm.video_llava import VIDEO, VideoLlava

SEED = 42                            # of the weights, and of the benchmark's frames

# LLaMA's ids around the frames: <s> "USER: ", then "\n", the question, " ASSISTANT:". With 8 x 257 of frames 2,076.
BEFORE, NEWLINE, AFTER = [1, 3148, 1001, 29901, 29871], 13, [319, 1799, 9047, 13566, 29901]
QUESTION = [5618, 526, 278, 1820, 3161, 297, 445, 9088, 29973]      # What are the key elements in this scene?

VISION_7B = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
             "image_size": 224, "patch_size": 14, "projection_dim": 768}
TEXT_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
WORDS_7B, VOCAB_SIZE_7B = 32000, 32064                              # then come <image>, <video>, <pad>, and nothing
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def random_model(size: Literal["7b", "small"], vocab_size: int, runtime: Runtime) -> VideoLlava:
    """Video-LLaVA of that size, made where it runs, without its image tower; it answers to vlm's verbs.

    vocab_size: of the adapter, whose ids the small one knows; the 7b has its own.
    """
    real = size == "7b"
    words = WORDS_7B if real else vocab_size                               # then come <image> and <video>
    text = {**(TEXT_7B if real else SMALL), "vocab_size": VOCAB_SIZE_7B if real else words + 2,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    vision = VISION_7B if real else {**SMALL, "image_size": 28, "patch_size": 14, "projection_dim": 32}
    shape = VideoLlavaForConditionalGeneration.config_class(
        vision_config=vision, text_config=text, image_token_index=words, video_token_index=words + 1)
    torch.manual_seed(SEED)
    torch.set_default_dtype(runtime.dtype)
    try:
        with runtime.device:
            model = VideoLlavaForConditionalGeneration(shape).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    model.model.image_tower = None
    model.generation_config.eos_token_id = None

    def tokenizer(prompt: str):                      # knows one question, whatever it is asked
        around = [[token % words for token in part] for part in (BEFORE, [NEWLINE, *QUESTION, *AFTER])]
        return types.SimpleNamespace(input_ids=[*around[0], *[words + 1] * prompt.count(VIDEO), *around[1]])

    tokenizer.bos_token_id = BEFORE[0]
    return VideoLlava(model, tokenizer, None, runtime, "random weights")


class Forced:
    """A logits processor that makes generate say a recorded answer: its next token gets the logit +inf.

    Told by the position, because assisted decoding asks about all candidates of a pass, one after the other. No other
    logit is touched: prompt lookup drops candidates whose logit is -inf, and would be told the answer that way.
    """

    def __init__(self, prompt_length: int, answer: list[int]):
        self.prompt_length, self.answer = prompt_length, answer

    def __call__(self, input_ids, scores):           # (1, L) ids so far, (1, V) logits of what follows
        at = input_ids.shape[1] - self.prompt_length
        scores[:, self.answer[min(at, len(self.answer) - 1)]] = math.inf      # candidates may reach past the end
        return scores


def generate(model: VideoLlava, pixels, answer: list[int], length: int, **mode) -> list[int]:
    """The first `length` tokens of the recorded answer, by transformers' greedy generate in one of its modes."""
    prompt = model._prompt_ids(len(pixels), "")
    ids = torch.tensor([prompt], device=model.runtime.device)
    # Compiled code and inference tensors do not go together; generate turns gradients off by itself.
    with torch.inference_mode("cache_implementation" not in mode):
        found = model.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length,
            pixel_values_videos=pixels[None].to(ids.device, model.runtime.dtype, non_blocking=True),
            logits_processor=[Forced(len(prompt), answer)], **mode)
    return found[0, len(prompt):].tolist()
