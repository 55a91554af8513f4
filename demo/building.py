"""The demo's two models before training: tokenizer, configuration files, random weights.

    <models>/eventgpt       the layout of EventGPT's published checkpoint
    <models>/video_llava    the layout that VideoLlavaForConditionalGeneration saves
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clips.events import event_frames
from clips.pixels import PixelSettings, clip_pixels
from demo import filming, texts
from demo.data_sets import NUM_PICTURES, seed_of
from demo.world import random_scene

QUESTION = "What are the key elements in this scene?"
LANGUAGE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0}
VISION: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 4, "projection_dim": 96,
          "hidden_act": "quick_gelu"}
EVENT_VISION = {**VISION, "num_hidden_layers": 2, "intermediate_size": 192, "image_size": 96,
                "patch_size": 24}
# Video-LLaVA reads layer -2: the third layer is there to be left out.
VIDEO_VISION = {**VISION, "num_hidden_layers": 3, "intermediate_size": 384, "image_size": 48,
                "patch_size": 16}
NUM_FRAMES = 8                     # frames of a clip that Video-LLaVA sees
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = 704
TOKENIZER_SCENES = 400             # whose two texts the merges are learned from


# ---------------------------------------------------------------------------------------- tokenizer
def build_tokenizer():
    """A LLaMA-style tokenizer: byte-pair merges that never span white space, bytes for what is unknown.

    Learned from this world's texts and both prompts. Ids as LLaMA's: <unk> 0, <s> 1, </s> 2, 256
    bytes, the rest.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from vlm import eventgpt, video_llava

    random = np.random.default_rng(seed_of("tokenizer"))
    scenes = [random_scene(random) for _ in range(TOKENIZER_SCENES)]
    prompts = f"{eventgpt.prompt(QUESTION)} {video_llava.prompt(QUESTION)}"
    for mark in (eventgpt.EVENT, video_llava.VIDEO, "\n"):
        prompts = prompts.replace(mark, " ")
    lines = [text(scene) for scene in scenes for text in (texts.draft_text, texts.target_text)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    learner.train_from_iterator([*lines, *[prompts] * len(scenes)], trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[chr(code) for code in range(33, 127)], show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    # Built anew, because the trainer makes the bytes special tokens, which a text could then spell
    # out.
    tokenizer = Tokenizer(models.BPE(learned["vocab"], [tuple(pair) for pair in learned["merges"]],
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_tokenizer(folder: Path, added: list[str], pad: str):
    """The files of a LLaMA tokenizer with `added` special tokens at its end; -> the tokenizer they make."""
    from vlm.tokenizers import load_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
             "special": True}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": pad, "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "padding_side": "left", "clean_up_tokenization_spaces": False,
        "model_max_length": LANGUAGE["max_position_embeddings"],
        "added_tokens_decoder": {str(tokenizer.token_to_id(token)): {"content": token, **flags}
                                 for token in [*SPECIAL, *added]}})
    return load_tokenizer(folder)


def write_json(path: Path, value: dict) -> None:
    """A model's configuration file, indented as transformers does; its folder is still a temporary one."""
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


# ------------------------------------------------------------------------------------------- models
@dataclasses.dataclass
class Student:
    """One of the two models in training, with all that differs between them."""

    name: str
    model: Any                     # the torch module
    vision: list                   # its modules: the tower first, then what leads to the language model
    language: list                 # its modules: LLaMA's body and head
    features: Callable             # pixels (B, F, 3, S, S) float32 -> visual tokens (B, N, H)
    pixels: Callable               # (scene, clip_seed, num_frames) -> pixels (F, 3, S, S) float32
    tokenizer: Any
    prompt: tuple[list[int], list[int]]      # the ids before and after the visual tokens
    text: Callable                 # scene -> the answer to learn
    phrases: dict                  # the contents of that answer: attribute -> value -> words


def preprocessor_config(size, crop_size) -> dict:
    return {"do_resize": True, "size": size, "resample": 3, "do_center_crop": True,
            "crop_size": crop_size,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": PixelSettings.mean, "image_std": PixelSettings.std}


def event_student(folder: Path) -> Student:
    """EventGPT with random weights; writes all files of its folder but the weights."""
    from vlm import eventgpt

    clip, size = folder / "clip", EVENT_VISION["image_size"]
    clip.mkdir()
    write_json(clip / "config.json",
               {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
                **EVENT_VISION})
    write_json(clip / "preprocessor_config.json",
               {"feature_extractor_type": "CLIPFeatureExtractor",
                **preprocessor_config(size, size)})
    tokenizer = write_tokenizer(folder, [], "<unk>")
    text_config = {**LANGUAGE, "vocab_size": len(tokenizer)}
    write_json(folder / "config.json", {
        "architectures": ["EventChatModel"], "model_type": "EventChat_llama", **text_config,
        "hidden_act": "silu", "num_key_value_heads": LANGUAGE["num_attention_heads"],
        "rope_theta": 10000.0, "torch_dtype": "float16",
        "tie_word_embeddings": False, "mm_visual_tower": "clip", "event_feature_adaptor": True,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "tokenizer_model_max_length": LANGUAGE["max_position_embeddings"]})
    settings = PixelSettings.of_folder(clip, size)
    model = eventgpt.EventGPTModel(eventgpt.EventGPTConfig(text_config, EVENT_VISION))
    ids = eventgpt.prompt_ids(tokenizer, QUESTION)
    at = ids.index(eventgpt.EVENT_ID)

    def pixels(scene, clip_seed, num_frames):
        events = filming.events_of(scene, clip_seed, num_frames)
        pictures = event_frames(events, NUM_PICTURES, (filming.SIZE, filming.SIZE))
        return clip_pixels(pictures[:1], settings)

    return Student(folder.name, model, [model.visual_tower, model.visual_projector,
                                        model.feature_adaptor],
                   [model.language_model.model, model.language_model.lm_head],
                   model.event_features, pixels,
                   tokenizer, (ids[:at], ids[at + 1:]), texts.draft_text, texts.DRAFT_PHRASES)


def video_student(folder: Path) -> Student:
    """Video-LLaVA with random weights; writes tokenizer and pixel settings (the model saves the rest)."""
    from vlm import video_llava

    size, patch = VIDEO_VISION["image_size"], VIDEO_VISION["patch_size"]
    video_tokens = NUM_FRAMES * (1 + (size // patch) ** 2)
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "VideoLlavaImageProcessor",
        "processor_class": "VideoLlavaProcessor",
        **preprocessor_config({"shortest_edge": size}, {"height": size, "width": size})})
    tokenizer = write_tokenizer(folder, ["<image>", video_llava.VIDEO, "<pad>"], "<pad>")
    model_class = video_llava.VideoLlavaForConditionalGeneration
    model = model_class(model_class.config_class(
        vision_config={**VIDEO_VISION, "model_type": "clip_vision_model"}, vision_feature_layer=-2,
        text_config={**LANGUAGE, "vocab_size": len(tokenizer), "model_type": "llama"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(size // patch) ** 2,
        video_token_index=tokenizer.convert_tokens_to_ids(video_llava.VIDEO),
        video_seq_length=video_tokens,
        pad_token_id=tokenizer.pad_token_id))
    settings = PixelSettings.of_folder(folder, size)
    ids = video_llava.prompt_ids(tokenizer, QUESTION, video_tokens)
    at = ids.index(model.config.video_token_index)

    def features(pixels):
        frames = model.model.get_video_features(pixel_values_videos=pixels).pooler_output
        return frames.reshape(len(pixels), -1, LANGUAGE["hidden_size"])

    def pixels(scene, clip_seed, num_frames):
        # As read_video
        numbers = np.linspace(0, num_frames - 1, NUM_FRAMES).astype(int).tolist()
        return clip_pixels(filming.frames_of(scene, clip_seed, num_frames, numbers), settings)

    return Student(folder.name, model, [model.model.video_tower, model.model.multi_modal_projector],
                   [model.model.language_model, model.lm_head], features, pixels,
                   tokenizer, (ids[:at], ids[at + video_tokens:]), texts.target_text,
                   texts.TARGET_PHRASES)
