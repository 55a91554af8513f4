"""EventGPT: LLaMA that reads one or more event pictures. Our own, on transformers' LLaMA and CLIP
vision tower.

The published checkpoint loads as it is; no code of the original is needed. Per picture:

    (H, W, 3) uint8 -> clip_pixels -> CLIP, last layer, all 1 + patches tokens
                    -> projector (Linear, GELU, Linear) -> feature adaptor (Linear)
    over t pictures: t means over the tokens, then the 1 + patches means over the pictures

and the result stands in the prompt where <event> was. Proved against the reference, stage by stage,
by tests/test_eventgpt.py. Reference: XduSyL/EventGPT (Liu et al., EventGPT: Event Stream
Understanding with Multimodal Large Language Models, CVPR 2025).
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from base import UserError, log
from clips.pixels import PixelSettings
from machine.device import Runtime
from vlm import hub
from vlm.checkpoints import Checkpoint, open_checkpoint, read_model_config, too_large
from vlm.contract import Answer
from vlm.errors import in_words
from vlm.fits import why_not
from vlm.greedy import generate_greedily
from vlm.loading import check_prompts, load_checked, weights_mib
from vlm.model import PixelModel
from vlm.roles import View, most_event_pictures
from vlm.tokenizers import (
    check_ids,
    check_tokenizer,
    ids_of,
    load_tokenizer,
    warn_of_special_tokens,
)

EVENT, EVENT_ID = "<event>", -200  # the id is a place holder in input_ids and never embedded
START, END, PATCH = "<ev_start>", "<ev_end>", "<ev_patch>"
SYSTEM = ("A chat between a curious human and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the human's questions.")
WEIGHTS_ARE_AT = "the weights are linked from https://github.com/XduSyL/EventGPT"

# The published names -> ours. CLIPVisionModel of transformers 5 has no level `vision_model` any
# more.
KEY_MAPPING = {
    r"^model\.visual_tower\.visual_tower\.vision_model\.": "visual_tower.",
    r"^model\.(visual_projector|feature_adaptor)\.": r"\1.",
    r"^model\.(embed_tokens|layers|norm)\.": r"language_model.model.\1.",
    r"^lm_head\.": "language_model.lm_head.",
}
# never quantised
KEEP = ["visual_tower", "visual_projector", "feature_adaptor", "language_model.lm_head"]

# Used where config.json's mm_visual_tower names no folder that is there: OpenAI's CLIP ViT-L/14.
CLIP_SIDE = 336  # px
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": CLIP_SIDE,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}


def prompt(query: str) -> str:
    """The one-turn prompt of EventGPT's inference; START and END are in it whatever the config's
    flags say.
    """
    if EVENT in query:
        raise UserError(
            f"the question may not contain {EVENT}, which stands for pictures: {query!r}"
        )
    return f"{SYSTEM} USER: {START}{EVENT}{END}\n{query} ASSISTANT:"


def prompt_ids(tokenizer, query: str) -> list[int]:
    """Ids with EVENT_ID where the pictures go: both parts are tokenised alone, BOS stays in front
    of the first.
    """
    before, after = (tokenizer(part).input_ids for part in prompt(query).split(EVENT))
    if before[:1] == [tokenizer.bos_token_id]:
        after = after[1:]
    return [*before, EVENT_ID, *after]


# ------------------------------------------------------------------------------------------- module
class EventGPTConfig(PretrainedConfig):
    """text_config: LLaMA's; vision_config: the CLIP tower's; max_length: positions kept of a
    prompt.
    """

    model_type = "eventgpt"
    sub_configs = {"text_config": LlamaConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: dict | None = None,
        vision_config: dict | None = None,
        max_positions: int = 2048,
        **rest,
    ):
        self.text_config = LlamaConfig(**(text_config or {}))
        self.vision_config = CLIPVisionConfig(**(vision_config or {}))
        self.max_positions = max_positions
        super().__init__(tie_word_embeddings=False, **rest)


class EventGPTModel(PreTrainedModel):
    """language_model, visual_tower, visual_projector and feature_adaptor: all the weights there
    are.
    """

    config_class = EventGPTConfig
    base_model_prefix = ""
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    # Buffers that transformers before 4.32 saved along with the weights.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"rotary_emb\.inv_freq", r"embeddings\.position_ids"]

    def __init__(self, config: EventGPTConfig):
        super().__init__(config)
        wide, narrow = config.text_config.hidden_size, config.vision_config.hidden_size
        self.language_model = LlamaForCausalLM(config.text_config)
        self.visual_tower = CLIPVisionModel(config.vision_config)
        self.visual_projector = nn.Sequential(
            nn.Linear(narrow, wide), nn.GELU(), nn.Linear(wide, wide)
        )
        self.feature_adaptor = nn.Linear(wide, wide)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def event_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, t, 3, S, S) -> (B, t + P, H): per picture its mean token, then P = 1 + patches
        tokens.

        The CLS token takes part and post_layernorm does not. Adaptor and pooling are both linear,
        so their order is free; the adaptor is applied once (the token pairs published with the
        original suite had it twice).
        """
        rows, t = pixels.shape[:2]
        hidden = self.visual_tower(pixels.flatten(0, 1).to(self.dtype)).last_hidden_state
        adapted = self.feature_adaptor(self.visual_projector(hidden)).unflatten(0, (rows, t))
        return torch.cat([adapted.mean(2), adapted.mean(1)], dim=1)

    def inputs_embeds(
        self, ids: list[list[int]], features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts with one EVENT_ID each and features (B, t + P, H) -> embeddings (B, L, H), mask
        (B, L) int64.

        Left-padded with zeros, so that every row's last position is its last prompt token.
        """
        embed, rows = self.get_input_embeddings(), []
        for row, block in zip(ids, features):
            at = row.index(EVENT_ID)
            before, after = (embed(torch.tensor(part, dtype=torch.long, device=block.device))
                             for part in (row[:at], row[at + 1:]))
            rows.append(torch.cat([before, block, after])[:self.config.max_positions])
        length = max(map(len, rows))
        embeds = torch.stack([nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        mask = torch.tensor(
            [[0] * (length - len(row)) + [1] * len(row) for row in rows], device=embeds.device
        )
        return embeds, mask


# ---------------------------------------------------------------------------------- without weights
def read_config(name: str | Path) -> tuple[EventGPTConfig, PixelSettings, Checkpoint]:
    """The settings of a folder in the published layout (LLaMA-style config.json with
    mm_visual_tower).
    """
    folder = Path(name)
    settings = read_model_config(folder)
    if "mm_visual_tower" not in settings or "event_feature_adaptor" not in settings:
        raise UserError(
            f"{folder} is not an EventGPT checkpoint: config.json lacks mm_visual_tower or "
            f"event_feature_adaptor (model_type {settings.get('model_type')!r}); {WEIGHTS_ARE_AT}"
        )
    checkpoint = open_checkpoint(name, from_hub=False)
    try:
        vision, pixels = _vision_settings(folder, str(settings["mm_visual_tower"]))
        known = set(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling"}
        text = {
            key: value
            for key, value in settings.items()
            if key in known and key not in ("model_type", "architectures", "dtype", "torch_dtype")
        }
        config = EventGPTConfig(
            text, vision, max_positions=settings.get("tokenizer_model_max_length") or 2048
        )
        reason = why_not(config.text_config)
    except UserError:
        raise
    except Exception as error:  # a damaged config breaks in transformers in many ways
        raise UserError(
            f"{folder}: config.json or the CLIP tower's can't be used: {in_words(error)}"
        ) from error
    if reason:
        raise UserError(f"{name} can't run here: {reason}")
    return config, pixels, checkpoint


def read_tokenizer(checkpoint: Checkpoint, config: EventGPTConfig):
    """The tokenizer with the tokens that config.json adds; a UserError unless both fit."""
    tokenizer, name, settings = (
        load_tokenizer(checkpoint.folder),
        checkpoint.name,
        checkpoint.config,
    )
    added = [PATCH] if settings.get("mm_use_im_patch_token", True) else []
    added += [START, END] if settings.get("mm_use_im_start_end", False) else []
    tokenizer.add_tokens(added, special_tokens=True)
    # The embeddings are resized to the tokenizer, but only for the tokens that were added just now.
    size = config.text_config.vocab_size + len(added)
    if len(tokenizer) > size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer):,} ids, the model "
            f"{config.text_config.vocab_size:,}"
            f" and {len(added)} added ones: its files belong to another model"
        )
    check_tokenizer(tokenizer, name, len(tokenizer))
    check_ids(checkpoint.eos_ids(), name, len(tokenizer))
    return tokenizer


def check(name: str | Path, questions: list[str], view: View, max_new_tokens: int) -> None:
    """See vlm.roles.Role.check."""
    if view.draft_sees != "events":
        raise UserError(
            f"{name} is an EventGPT, which was trained on event pictures alone and reads no video "
            "frames: leave out --draft_sees, or choose another --draft_model"
        )
    for question in questions:
        prompt(question)
    config, _, checkpoint = read_config(name)
    tokenizer = read_tokenizer(checkpoint, config)
    for question in questions:
        ids_of(tokenizer, name, prompt(question), len(tokenizer))
    warn_of_special_tokens(tokenizer, name, questions)
    parts = [split(tokenizer, question) for question in questions]
    events = picture_tokens(config, most_event_pictures([], view))
    check_prompts(
        name,
        [(len(before) + events, len(after)) for before, after in parts],
        max_new_tokens,
        (config.max_positions, config.text_config.max_position_embeddings),
    )


def revision(name: str | Path) -> str:
    """See vlm.roles.Role.revision."""
    return revision_of(*read_config(name))


def revision_of(config: EventGPTConfig, pixels: PixelSettings, checkpoint: Checkpoint) -> str:
    """The tower's settings may come from a folder beside the checkpoint's: what they say belongs to
    the content.
    """
    tower = {key: getattr(config.vision_config, key) for key in (*CLIP_L_336, "layer_norm_eps")}
    return checkpoint.revision(
        json.dumps([tower, dataclasses.asdict(pixels)], sort_keys=True, default=str)
    )


def split(tokenizer, query: str) -> tuple[list[int], list[int]]:
    """The prompt's ids before and after the pictures' tokens."""
    ids = prompt_ids(tokenizer, query)
    return ids[:ids.index(EVENT_ID)], ids[ids.index(EVENT_ID) + 1:]


def picture_tokens(config: EventGPTConfig, pictures: int) -> int:
    """Positions of so many pictures: a mean token each, then CLS and the patches once."""
    return pictures + 1 + (config.vision_config.image_size // config.vision_config.patch_size) ** 2


# ---------------------------------------------------------------------------------------- the model
class EventGPT(PixelModel):
    """The draft model, ready to answer (VideoLlava has the same verbs)."""

    @staticmethod
    def load(name: str | Path, runtime: Runtime) -> "EventGPT":
        """From a folder in the published layout."""
        config, pixels, checkpoint = read_config(name)
        tokenizer = read_tokenizer(checkpoint, config)
        model = load_checked(EventGPTModel, checkpoint, config, runtime, KEEP, KEY_MAPPING)
        embeddings = model.get_input_embeddings().num_embeddings
        if len(tokenizer) != embeddings:  # resized as EventGPT's inference does
            log(
                f"load | WARNING | {name} | resizing {embeddings} embeddings to the tokenizer's "
                f"{len(tokenizer)} ids"
            )
            model.language_model.resize_token_embeddings(len(tokenizer))
        log(f"load | {name} | weights {weights_mib(model):,.1f} MiB")
        revision = revision_of(config, pixels, checkpoint)
        return EventGPT(model, tokenizer, pixels, runtime, revision, tuple(checkpoint.eos_ids()))

    def answer(
        self, pixels: list[torch.Tensor], queries: list[str], max_new_tokens: int
    ) -> list[Answer]:
        """One greedy answer per row; rows may differ in query, not in the number of pictures."""
        with torch.inference_mode():
            features = self.visual_features(
                torch.stack(pixels).to(self.runtime.device, non_blocking=True)
            )
            ids = [prompt_ids(self.tokenizer, query) for query in queries]
            embeds, mask = self.model.inputs_embeds(ids, features)
        return generate_greedily(
            self.model.language_model,
            self.tokenizer,
            self.eos_ids,
            max_new_tokens,
            inputs_embeds=embeds,
            attention_mask=mask,
        )

    def prompt_text(self, query: str) -> str:
        return prompt(query)

    def prompt_parts(self, query: str) -> tuple[list[int], list[int]]:
        return split(self.tokenizer, query)

    def visual_tokens(self, pictures: int) -> int:
        return picture_tokens(self.model.config, pictures)

    def visual_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, t, 3, S, S) -> (B, t + 1 + patches, H)."""
        return self.model.event_features(pixels)

    @property
    def decoder(self) -> tuple:
        return self.model.language_model.model, self.model.language_model.lm_head

    @property
    def max_positions(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    @property
    def max_prompt(self) -> int:          # as EventGPT's inference cuts it
        return self.model.config.max_positions


def _vision_settings(folder: Path, tower: str) -> tuple[dict, PixelSettings]:
    """The CLIP tower's config and pixel settings. Only these are taken from the tower's folder,
    never weights.
    """
    for place in (folder / tower, folder.parent / tower, Path(tower)):
        if (place / "config.json").is_file():
            vision = read_model_config(place)
            for file in (place / name for name in hub.PIXEL_SETTINGS):
                if file.is_file() and (reason := too_large(file)):
                    raise UserError(f"can't use the CLIP tower's settings in {place}: {reason}")
            # a whole CLIP's config holds its tower's
            vision = vision.get("vision_config") or vision
            vision = {"hidden_act": "quick_gelu", **vision}
            return vision, PixelSettings.of_folder(place, vision["image_size"], kinds=("image",))
    log(
        f"load | {folder} | no folder {tower!r} for the CLIP tower's settings: taking those of "
        "CLIP ViT-L/14-336"
    )
    return dict(CLIP_L_336), PixelSettings(CLIP_SIDE, CLIP_SIDE)


load = EventGPT.load
