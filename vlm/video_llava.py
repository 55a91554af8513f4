"""Video-LLaVA: LLaMA that reads 8 video frames, through transformers' VideoLlavaForConditionalGeneration.

Pixels and prompt are made here, because transformers' own video processor needs torchvision; they are equal to
VideoLlavaImageProcessor's and to the processor's ids (tests/test_video_llava.py). Every frame gives 1 + patches
tokens (the CLS token stays), 8 x 257 = 2056 for the published model.

Reference: Lin et al., Video-LLaVA: Learning United Visual Representation by Alignment Before Projection, 2023.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, VideoLlavaForConditionalGeneration
from transformers.utils import cached_file

from base import UserError, log
from clips.pixels import PixelSettings
from vlm.loading import (
    Answer,
    Runtime,
    VisionLanguageModel,
    check_positions,
    free_memory,
    generate_greedily,
    load_checked,
    load_tokenizer,
    local_revision,
    read_model_config,
    weights_mib,
)
from vlm.roles import View

VIDEO = "<video>"
# Never quantised. transformers 5 wants full names; giving a list drops its own default, so lm_head is in it.
KEEP = ["model.video_tower", "model.image_tower", "model.multi_modal_projector", "lm_head"]


def prompt(query: str) -> str:
    """The prompt of one question; VIDEO stands once and is repeated for every visual token when tokenised."""
    if VIDEO in query or "<image>" in query:
        raise UserError(f"the query may contain neither {VIDEO} nor <image>: {query!r}")
    return f"USER: {VIDEO}\n{query} ASSISTANT:"


def prompt_ids(tokenizer, query: str, video_tokens: int) -> list[int]:
    """BOS, then the prompt with VIDEO repeated `video_tokens` times."""
    ids = tokenizer(prompt(query).replace(VIDEO, VIDEO * video_tokens)).input_ids
    # Tokenizer files differ in whether they add BOS by themselves; the model was trained with it.
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def read_config(name: str | Path) -> tuple:
    """(config, pixel settings) of a folder, or else of a hub id; a UserError when it is no Video-LLaVA."""
    local = Path(name).is_dir()
    if local:
        read_model_config(Path(name))
    elif str(name).count("/") != 1 or str(name).startswith((".", "/")):
        raise UserError(f"no such model folder: {name} (and not a hub id like LanguageBind/Video-LLaVA-7B-hf)")
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        preprocessor = cached_file(name, "preprocessor_config.json", local_files_only=local,
                                   _raise_exceptions_for_missing_entries=False)
        if config.model_type != "video_llava":
            raise UserError(f"{name} is a {config.model_type} model, wanted video_llava")
        return config, PixelSettings.read(preprocessor and Path(preprocessor), config.vision_config.image_size)
    except UserError:
        raise
    except Exception as error:        # a damaged config breaks in transformers in many ways
        raise UserError(f"can't load the config of {name}: {type(error).__name__}: {error}") from error


def check_prompts(name: str | Path, questions: list[str], frames: int, max_new_tokens: int) -> None:
    """A UserError unless the longest prompt and its answer fit into the model's positions; loads no weights."""
    config, _ = read_config(name)
    tokenizer, vision = load_tokenizer(name, Path(name).is_dir()), config.vision_config
    tokens = frames * (1 + (vision.image_size // vision.patch_size) ** 2)
    longest = max(len(prompt_ids(tokenizer, question, tokens)) for question in questions)
    check_positions(longest, max_new_tokens, config.text_config.max_position_embeddings)


def load(name: str | Path, runtime: Runtime) -> "VideoLlava":
    return VideoLlava.load(name, runtime)


def check(name: str | Path, questions: list[str], view: View, max_new_tokens: int) -> None:
    check_prompts(name, questions, view.num_frames, max_new_tokens)


class VideoLlava(VisionLanguageModel):
    """The target model, ready to answer (EventGPT has the same verbs)."""

    @staticmethod
    def load(name: str | Path, runtime: Runtime) -> "VideoLlava":
        """From a folder, or else a hub id (then the hub's cache is used, and the network when it lacks the files).

        The image tower, which no video passes through, is dropped: 0.3 G of the published 7.4 G parameters.
        """
        config, pixels = read_config(name)
        local = Path(name).is_dir()
        tokenizer = load_tokenizer(name, local)
        video_id = tokenizer.convert_tokens_to_ids(VIDEO)
        if video_id != config.video_token_index:
            raise UserError(f"{name}: {VIDEO} is id {video_id} in the tokenizer but video_token_index "
                            f"{config.video_token_index} in config.json")
        model = load_checked(VideoLlavaForConditionalGeneration, name, runtime, KEEP, config, local_files_only=local)
        model.model.image_tower = None
        free_memory()
        revision = local_revision(Path(name)) if local else getattr(config, "_commit_hash", None) or "unknown"
        log(f"load | {name} | weights {weights_mib(model):,.1f} MiB, the image tower dropped")
        return VideoLlava(model, tokenizer, pixels, runtime, revision)

    def answer(self, pixels: list[torch.Tensor], queries: list[str], max_new_tokens: int) -> list[Answer]:
        """One greedy answer per row; rows may differ in query, not in the number of frames."""
        rows = [self._prompt_ids(len(pixels[0]), query) for query in queries]
        check_positions(max(map(len, rows)), max_new_tokens, self.max_positions)
        pad = self.tokenizer.pad_token_id or 0
        left = [max(map(len, rows)) - len(row) for row in rows]
        ids = torch.tensor([[pad] * n + row for n, row in zip(left, rows)])
        mask = torch.tensor([[0] * n + [1] * len(row) for n, row in zip(left, rows)])
        device = self.runtime.device
        return generate_greedily(
            self.model, self.tokenizer, max_new_tokens, input_ids=ids.to(device), attention_mask=mask.to(device),
            pixel_values_videos=torch.stack(pixels).to(device, self.runtime.dtype, non_blocking=True))

    def prompt_parts(self, query: str) -> tuple[list[int], list[int]]:
        """The prompt's ids before and after the video's."""
        ids, video = prompt_ids(self.tokenizer, query, 1), self.model.config.video_token_index
        return ids[:ids.index(video)], ids[ids.index(video) + 1:]

    def visual_tokens(self, frames: int) -> int:
        vision = self.model.config.vision_config
        return frames * (1 + (vision.image_size // vision.patch_size) ** 2)

    def visual_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, F, 3, S, S) -> (B, F * (1 + patches), H)."""
        features = self.model.model.get_video_features(pixels.to(self.runtime.dtype)).pooler_output
        return features.reshape(len(pixels), self.visual_tokens(pixels.shape[1]), -1)

    @property
    def decoder(self) -> tuple:
        """(LlamaModel, lm_head), the parts that vlm/steps.py runs."""
        return self.model.model.language_model, self.model.lm_head

    @property
    def max_positions(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    @property
    def max_prompt(self) -> int:
        """Positions of a prompt that are kept."""
        return self.max_positions

    def _prompt_ids(self, frames: int, query: str) -> list[int]:
        return prompt_ids(self.tokenizer, query, self.visual_tokens(frames))
