"""Video-LLaVA: LLaMA that reads 8 video frames, through transformers'
VideoLlavaForConditionalGeneration.

Pixels and prompt are made here, because transformers' own video processor needs torchvision; they
are equal to VideoLlavaImageProcessor's and to the processor's ids (tests/test_video_llava.py).
Every frame gives 1 + patches tokens (the CLS token stays), 8 x 257 = 2056 for the published model.

Reference: Lin et al., Video-LLaVA: Learning United Visual Representation by Alignment Before
Projection, 2023.
"""

from pathlib import Path

import torch
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

from base import UserError, log
from clips.pixels import PixelSettings
from machine.device import Runtime
from vlm.checkpoints import Checkpoint, open_checkpoint
from vlm.contract import Answer
from vlm.errors import in_words
from vlm.fits import why_not
from vlm.greedy import generate_greedily
from vlm.loading import check_positions, check_prompts, free_memory, load_checked, weights_mib
from vlm.model import PixelModel
from vlm.roles import View
from vlm.tokenizers import (
    check_ids,
    check_tokenizer,
    ids_of,
    load_tokenizer,
    warn_of_special_tokens,
)

VIDEO, IMAGE = "<video>", "<image>"
# Never quantised. transformers 5 wants full names; giving a list drops its own default, so lm_head
# is in it.
KEEP = ["model.video_tower", "model.image_tower", "model.multi_modal_projector", "lm_head"]


def prompt(query: str) -> str:
    """The prompt of one question; VIDEO stands once and is repeated for every visual token when
    tokenised.
    """
    if VIDEO in query or IMAGE in query:
        raise UserError(
            f"the question may contain neither {VIDEO} nor {IMAGE}, which stand for pictures: "
            f"{query!r}"
        )
    return f"USER: {VIDEO}\n{query} ASSISTANT:"


def prompt_ids(tokenizer, query: str, video_tokens: int) -> list[int]:
    """BOS, then the prompt with VIDEO repeated `video_tokens` times."""
    ids = tokenizer(prompt(query).replace(VIDEO, VIDEO * video_tokens)).input_ids
    # Tokenizer files differ in whether they add BOS by themselves; the model was trained with it.
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


# ---------------------------------------------------------------------------------- without weights
def read_config(name: str | Path) -> tuple[VideoLlavaConfig, PixelSettings, Checkpoint]:
    """The settings of a folder, or else of a hub id; a UserError when it is no Video-LLaVA that can
    run here.
    """
    checkpoint = open_checkpoint(name)
    kind = checkpoint.config.get("model_type")
    if kind != "video_llava":
        raise UserError(
            f"can't load the config of {name}: it is of a {kind} model, wanted video_llava"
        )
    try:
        config = VideoLlavaConfig.from_dict(checkpoint.config)
        reason = why_not(config.text_config)
    except Exception as error:        # a damaged config breaks in transformers in many ways
        raise UserError(f"can't load the config of {name}: {in_words(error)}") from error
    if reason:
        raise UserError(f"{name} can't run here: {reason}")
    pixels = PixelSettings.of_folder(checkpoint.folder, config.vision_config.image_size)
    return config, pixels, checkpoint


def read_tokenizer(checkpoint: Checkpoint, config: VideoLlavaConfig):
    """The tokenizer of the checkpoint; a UserError unless it fits the config."""
    tokenizer, name, size = (
        load_tokenizer(checkpoint.folder),
        checkpoint.name,
        config.text_config.vocab_size,
    )
    check_tokenizer(tokenizer, name, size)
    video_id = tokenizer.convert_tokens_to_ids(VIDEO)
    if video_id != config.video_token_index:
        raise UserError(f"{name}: {VIDEO} is id {video_id} in the tokenizer but video_token_index "
                        f"{config.video_token_index} in config.json")
    check_ids([video_id, *checkpoint.eos_ids()], name, size)
    return tokenizer


def frame_tokens(config: VideoLlavaConfig) -> int:
    """Positions of one video frame: a token for each patch, and CLS."""
    return 1 + (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def check(name: str | Path, questions: list[str], view: View, max_new_tokens: int) -> None:
    """See vlm.roles.Role.check."""
    for question in questions:
        prompt(question)
    config, _, checkpoint = read_config(name)
    tokenizer = read_tokenizer(checkpoint, config)
    for question in questions:
        ids_of(tokenizer, name, prompt(question), config.text_config.vocab_size)
    warn_of_special_tokens(tokenizer, name, questions)
    parts = [split(tokenizer, question, config.video_token_index) for question in questions]
    video, positions = (
        view.num_frames * frame_tokens(config),
        config.text_config.max_position_embeddings,
    )
    check_prompts(
        name,
        [(len(before) + video, len(after)) for before, after in parts],
        max_new_tokens,
        (positions, positions),
    )


def revision(name: str | Path) -> str:
    """See vlm.roles.Role.revision."""
    return read_config(name)[2].revision()


def split(tokenizer, query: str, video_id: int) -> tuple[list[int], list[int]]:
    """The prompt's ids before and after the video's."""
    ids = prompt_ids(tokenizer, query, 1)
    if ids.count(video_id) != 1:
        raise UserError(
            f"the tokenizer reads {VIDEO} as {ids.count(video_id)} tokens of id {video_id}, wanted "
            "1: its files are damaged or of another model"
        )
    return ids[:ids.index(video_id)], ids[ids.index(video_id) + 1:]


# ---------------------------------------------------------------------------------------- the model
class VideoLlava(PixelModel):
    """The target model, ready to answer (EventGPT has the same verbs)."""

    @staticmethod
    def load(name: str | Path, runtime: Runtime) -> "VideoLlava":
        """From a folder, or else a hub id (vlm/hub.py).

        The image tower, which no video passes through, is dropped: 0.3 G of the published 7.4 G
        parameters.
        """
        config, pixels, checkpoint = read_config(name)
        tokenizer = read_tokenizer(checkpoint, config)
        model = load_checked(VideoLlavaForConditionalGeneration, checkpoint, config, runtime, KEEP)
        model.model.image_tower = None
        free_memory()
        log(f"load | {name} | weights {weights_mib(model):,.1f} MiB, the image tower dropped")
        return VideoLlava(
            model, tokenizer, pixels, runtime, checkpoint.revision(), tuple(checkpoint.eos_ids())
        )

    def answer(
        self, pixels: list[torch.Tensor], queries: list[str], max_new_tokens: int
    ) -> list[Answer]:
        """One greedy answer per row; rows may differ in query, not in the number of frames."""
        rows = [self._prompt_ids(len(pixels[0]), query) for query in queries]
        check_positions(max(map(len, rows)), max_new_tokens, self.max_positions)
        pad = self.tokenizer.pad_token_id or 0
        left = [max(map(len, rows)) - len(row) for row in rows]
        ids = torch.tensor([[pad] * n + row for n, row in zip(left, rows)])
        mask = torch.tensor([[0] * n + [1] * len(row) for n, row in zip(left, rows)])
        device = self.runtime.device
        return generate_greedily(
            self.model,
            self.tokenizer,
            self.eos_ids,
            max_new_tokens,
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values_videos=torch.stack(pixels).to(
                device, self.runtime.dtype, non_blocking=True
            ),
        )

    def prompt_text(self, query: str) -> str:
        return prompt(query)

    def prompt_parts(self, query: str) -> tuple[list[int], list[int]]:
        return split(self.tokenizer, query, self.model.config.video_token_index)

    def visual_tokens(self, frames: int) -> int:
        return frames * frame_tokens(self.model.config)

    def visual_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, F, 3, S, S) -> (B, F * (1 + patches), H)."""
        features = self.model.model.get_video_features(pixels.to(self.runtime.dtype)).pooler_output
        return features.reshape(len(pixels), self.visual_tokens(pixels.shape[1]), -1)

    @property
    def decoder(self) -> tuple:
        return self.model.model.language_model, self.model.lm_head

    @property
    def max_positions(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    @property
    def max_prompt(self) -> int:
        return self.max_positions

    def _prompt_ids(self, frames: int, query: str) -> list[int]:
        return prompt_ids(self.tokenizer, query, self.visual_tokens(frames))


load = VideoLlava.load
