"""What both models do alike once they are loaded: pixels, prompts, transformers' own greedy
answers, facts, unloading.

Subclasses (EventGPT, VideoLlava) add what vlm/contract.py asks for beside: prompt_parts,
visual_tokens, visual_features, decoder, max_positions, max_prompt and answer.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from clips.pixels import PixelSettings, clip_pixels
from machine.device import Runtime
from vlm.contract import Answer, NotNumbers, VisionLanguageModel
from vlm.loading import dtype_name, free_memory, quantization_of
from vlm.tokenizers import guarded


@dataclasses.dataclass
class LoadedModel(VisionLanguageModel):
    """The parts of a loaded model; the contract, which it inherits, says what each of them is."""

    model: nn.Module
    tokenizer: Any
    pixels: PixelSettings
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
        return {"name": str(name), "revision": self.revision, "vocab_size": self.vocab_size,
                "bos_id": self.tokenizer.bos_token_id,
                "quantization": quantization_of(language_model),
                "dtype": dtype_name(language_model.embed_tokens.weight.dtype)}

    def prepare(self, pictures: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(clip_pixels(pictures, self.pixels)).to(self.runtime.dtype)

    @torch.inference_mode()
    def shared_embeds(self, pixels: torch.Tensor) -> torch.Tensor:
        before, _ = self.prompt_parts("")
        words = self._embed(before).expand(len(pixels), -1, -1)
        return torch.cat([words, self.visual_features(pixels)], 1)

    @torch.inference_mode()
    def prompt_embeds(self, pixels: torch.Tensor, query: str) -> torch.Tensor:
        clip = self.shared_embeds(pixels[None].to(self.runtime.device, non_blocking=True))
        return torch.cat([clip, self._embed(self.prompt_parts(query)[1])], 1)[:, :self.max_prompt]

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(
            torch.tensor([ids], dtype=torch.long, device=self.runtime.device)
        )

    def unload(self) -> None:
        del self.model
        free_memory()


# ---------------------------------------------------------------------------------------- answering
class Checked(LogitsProcessor):
    """Notes in which steps of generate() a row's logits are no numbers; the tokens taken there mean
    nothing.

    Without it the largest of NaN logits is token 0. Nothing here waits for the device or changes a
    logit.
    """

    def __init__(self):
        self.steps: list[torch.Tensor] = []              # (B,) bool of each step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(~scores.amax(-1).isfinite())   # the largest of a row with a NaN is NaN
        return scores

    def rows(self, lengths: list[int]) -> list[int]:
        """Rows of which a token came from such a step; lengths: tokens of each answer."""
        steps = torch.stack(self.steps, 1).tolist() if self.steps else [[]] * len(lengths)
        return [
            number for number, (bad, length) in enumerate(zip(steps, lengths)) if any(bad[:length])
        ]


def generate_greedily(
    model, tokenizer, eos_ids: Iterable[int], max_new_tokens: int, **inputs
) -> list[Answer]:
    """transformers' greedy generate on a left-padded batch -> one Answer per row; NotNumbers names
    the rows with none.

    The checkpoint's own generation_config plays no part (sampling settings, a length limit).
    inputs: input_ids (B, L) or inputs_embeds (B, L, H), attention_mask (B, L), and what else the
    model takes.
    """
    eos_ids = list(eos_ids)
    pad = tokenizer.pad_token_id
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=eos_ids[0] if pad is None else pad,
    )
    checked = Checked()
    with torch.inference_mode():
        ids = model.generate(
            **inputs, generation_config=settings, logits_processor=LogitsProcessorList([checked])
        )
    if "input_ids" in inputs:  # then the prompt stands in front; else it does not
        ids = ids[:, inputs["input_ids"].shape[1]:]
    tokens = [cut_at_end(row, eos_ids) for row in ids.tolist()]
    if bad := checked.rows(list(map(len, tokens))):
        raise NotNumbers(model.dtype, tuple(bad))
    return [answer_of(row, eos_ids, tokenizer) for row in tokens]


def cut_at_end(row: list[int], eos_ids: Iterable[int]) -> list[int]:
    """The row up to its first EOS, which is kept."""
    end = next((at for at, token in enumerate(row) if token in eos_ids), len(row))
    return row[:end + 1]


def answer_of(tokens: list[int], eos_ids: Iterable[int], tokenizer) -> Answer:
    """tokens: as cut_at_end gives them."""
    text = guarded(
        "the tokenizer can't decode an answer",
        lambda: tokenizer.decode(tokens, skip_special_tokens=True),
    )
    return Answer(tokens, text.strip(), bool(tokens) and tokens[-1] in eos_ids)
