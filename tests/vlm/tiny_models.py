"""Folders of tiny random models that are not ours, made from their configs in code: no network.

Each has weights, a tokenizer of bytes and a processor with a chat template, as a folder of the hub.
"""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MARKS = [
    "<image>",
    "<video>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<pad>",
]
PADDED = 8  # ids of the models beyond the tokenizer's
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}\
{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}MARK{% endif %}\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, then MARKS; no BOS, like Qwen's; <|im_end|> ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(
        models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[])
    )
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<pad>")


def ids() -> dict[str, int]:
    words = tokenizer()
    return {mark: words.convert_tokens_to_ids(mark) for mark in MARKS}


def template(image: str, video: str) -> str:
    return TEMPLATE.replace(
        "MARK", "{% if part['type'] == 'video' %}" + video + "{% else %}" + image + "{% endif %}"
    )


def text_config(kind: str, **changes) -> dict:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer()) + PADDED,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ids()["<|im_end|>"],
        **TEXT,
        **changes,
    }


def tower(kind: str) -> dict:
    return {"model_type": kind, "image_size": 28, "patch_size": 14, **TOWER}


# ------------------------------------------------------------------------------------- the models
def llava(text: str = "qwen2", **changes):
    """(config, processor): pictures alone, no video; its processor needs no torchvision."""
    config = transformers.LlavaConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text_config(text, **changes),
        image_token_index=ids()["<image>"],
        image_seq_length=4,
    )
    pictures = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    return config, lambda: transformers.LlavaProcessor(
        pictures,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", "<video>"),
    )


def llava_onevision():
    config = transformers.LlavaOnevisionConfig(
        vision_config=tower("siglip_vision_model") | {"vision_use_head": False},
        text_config=text_config("qwen2"),
        image_token_id=ids()["<image>"],
        video_token_id=ids()["<video>"],
        image_grid_pinpoints=[[28, 28], [28, 56]],
    )
    side = {"height": 28, "width": 28}
    return config, lambda: transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessorPil(
            size=side, image_grid_pinpoints=[[28, 28], [28, 56]]
        ),
        tokenizer(),
        transformers.LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
    )


def llava_next_video():
    config = transformers.LlavaNextVideoConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text_config("mistral", sliding_window=None),
        image_token_index=ids()["<image>"],
        video_token_index=ids()["<video>"],
        image_grid_pinpoints=[[28, 28], [28, 56]],
        image_seq_length=4,
    )
    side = {"height": 28, "width": 28}
    return config, lambda: transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(size={"shortest_edge": 28}, crop_size=side),
        transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=side, image_grid_pinpoints=[[28, 28], [28, 56]]
        ),
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", "<video>"),
    )


def qwen_marks() -> dict[str, int]:
    """The ids that Qwen's configs name for pictures and videos."""
    marks = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start",
             "vision_end": "vision_end"}
    return {f"{name}_token_id": ids()[f"<|{mark}|>"] for name, mark in marks.items()}


def qwen2_5_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        text_config=text_config("qwen2_5_vl_text", rope_parameters=rope),
        **qwen_marks(),
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 84}
    return config, lambda: transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessorPil(size=size),
        tokenizer(),
        transformers.Qwen2VLVideoProcessor(size={**size, "longest_edge": 8 * 56 * 56}),
        chat_template=template(
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<|vision_start|><|video_pad|><|vision_end|>",
        ),
    )


def qwen3_vl():
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "mrope_interleaved": True,
    }
    config = transformers.Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config=text_config("qwen3_vl_text", rope_parameters=rope, head_dim=8),
        **qwen_marks(),
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 84}
    return config, lambda: transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessorPil(size=size, patch_size=14),
        tokenizer(),
        transformers.Qwen3VLVideoProcessor(
            size={**size, "longest_edge": 8 * 56 * 56}, patch_size=14
        ),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>", "<|video_pad|>"),
    )


def smolvlm():
    config = transformers.SmolVLMConfig(
        vision_config={"model_type": "smolvlm_vision", "image_size": 28, "patch_size": 14, **TOWER},
        text_config=text_config("llama"),
        image_token_id=ids()["<image>"],
        scale_factor=2,
    )
    side = {"longest_edge": 28}
    return config, lambda: transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessorPil(
            size=side, max_image_size=side, do_image_splitting=False
        ),
        tokenizer(),
        transformers.SmolVLMVideoProcessor(size=side, max_image_size=side),
        image_seq_len=1,
        chat_template=template("<image>", "<video>"),
    )


READS_VIDEOS = {
    "LLaVA-OneVision": llava_onevision,
    "LLaVA-NeXT-Video": llava_next_video,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "SmolVLM2": smolvlm,
}


def write(folder: Path, config, processor) -> Path:
    """Random weights of this config, and what processor() makes, as a folder of the hub."""
    kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():  # transformers' start: biases 0, norms 1, all logits alike
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    settings = {
        "do_sample": True,
        "repetition_penalty": 1.3,
        "temperature": 0.7,
        "eos_token_id": [ids()["<|im_end|>"], ids()["<end_of_utterance>"]],
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder
