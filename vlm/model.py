"""What models do alike once they are loaded: prompts, facts, unloading, what decodes them.

Subclasses add the rest of vlm/contract.py: EventGPT and VideoLlava by PixelModel, AnyModel directly.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from base import log
from clips.pixels import clip_pixels
from machine.device import Runtime
from vlm.contract import Shared, VisionLanguageModel
from vlm.loading import dtype_name, free_memory, quantization_of
from vlm.vocabulary import digest_of


@dataclasses.dataclass
class LoadedModel(VisionLanguageModel):
    """The parts of a loaded model; the contract, which it inherits, says what each of them is."""

    model: nn.Module
    tokenizer: Any
    pixels: Any
    runtime: Runtime
    revision: str
    more_eos: tuple[int, ...] = ()         # ids of generation_config.json that end an answer too

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys([self.tokenizer.eos_token_id, *self.more_eos]))

    def facts(self, name: str | Path) -> dict:
        language_model, _ = self.decoder
        bos_id = self.tokenizer.bos_token_id
        return {"name": str(name), "revision": self.revision, "vocab_size": self.vocab_size,
                **({} if bos_id is None else {"bos_id": bos_id}),
                "tokenizer": digest_of(self.tokenizer),
                "quantization": quantization_of(language_model),
                "dtype": dtype_name(self.model.get_input_embeddings().weight.dtype)}

    def clips_that_fit(self, questions: list[str], max_new_tokens: int, pictures: int) -> int:
        from vlm.batches import clips_that_fit

        return clips_that_fit(self, questions, max_new_tokens, pictures)

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(
            torch.tensor([ids], dtype=torch.long, device=self.runtime.device)
        )

    def unload(self) -> None:
        del self.model
        free_memory()


class PixelModel(LoadedModel):
    """A model whose pictures are squares of one size, and whose prompts have the pictures in one
    place. pixels: its PixelSettings.
    """

    def prompt_parts(self, query: str) -> tuple[list[int], list[int]]:
        """The prompt's ids before and after the pictures' positions. The first part is the same for
        all queries.
        """
        raise NotImplementedError

    def visual_tokens(self, pictures: int) -> int:
        """Positions that so many pictures take."""
        raise NotImplementedError

    def visual_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, n, 3, S, S) on the model's device -> (B, visual_tokens(n), H)."""
        raise NotImplementedError

    def prepare(self, pictures: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(clip_pixels(pictures, self.pixels)).to(self.runtime.dtype)

    @torch.inference_mode()
    def shared_embeds(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, n, 3, S, S) on the model's device -> (B, P, H): the prompts up to the end of
        the pictures.
        """
        before, _ = self.prompt_parts("")
        words = self._embed(before).expand(len(pixels), -1, -1)
        return torch.cat([words, self.visual_features(pixels)], 1)

    @torch.inference_mode()
    def prompt_embeds(self, pixels: torch.Tensor, query: str) -> torch.Tensor:
        """pixels (n, 3, S, S) of one clip as prepare() gives them -> (1, L, H): the decoder's input."""
        clip = self.shared_embeds(pixels[None].to(self.runtime.device, non_blocking=True))
        return torch.cat([clip, self._embed(self.prompt_parts(query)[1])], 1)[:, :self.max_prompt]

    def encode(self, pixels: Any, query: str) -> Any:
        return self.prompt_embeds(pixels, query)

    def layout(self, questions: list[str], pictures: int,
               clip: Any = None) -> tuple[int, list[list[int]]]:
        parts = [self.prompt_parts(question) for question in questions]
        first = parts[0][0]
        assert all(before == first for before, _ in parts), (
            "the ids before the pictures depend on the question"
        )
        before = len(first) + self.visual_tokens(pictures)
        return before, [after[:max(1, self.max_prompt - before)] for _, after in parts]

    def shared_prompts(self, clips: Sequence[Any]) -> Shared:
        pixels = torch.stack(list(clips))
        if self.runtime.device.type == "cuda":
            pixels = pixels.pin_memory()
        return Shared(self.shared_embeds(pixels.to(self.runtime.device, non_blocking=True)))

    def open_target(self, questions: list[str], pictures: int, more_tokens: int) -> Any:
        from vlm.steps import Prompted, Steps

        shared, after = self.layout(questions, pictures)
        steps = Steps(*self.decoder, room=shared + max(map(len, after)) + more_tokens)
        log(f"decode | keys and values: {steps.bytes / 2**20:,.0f} MiB for {steps.room} positions")
        return Prompted(steps)

    def open_batches(self, questions: list[str], max_new_tokens: int, clip: Any, clips: int) -> Any:
        from vlm.batches import Batches

        return Batches(self, questions, max_new_tokens, len(clip), clips)
