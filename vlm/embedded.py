"""What a model's own forward calls its language model with, and decoding on from there.

No file here knows how a model turns pictures into embeddings and merges them with those of words:
transformers' forward runs up to its language model and is stopped there. Inputs, positions for RoPE
with several axes included, then go through our own layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from base import log
from vlm.contract import Prompt, Shared
from vlm.llama import with_text
from vlm.steps import Prompted, Steps

ROOM_STEP = 512                      # positions by which the cache grows for a longer prompt
# What a language model is called with that our layers know, or that changes nothing.
KNOWN = {
    "inputs_embeds", "position_ids", "attention_mask", "input_ids", "use_cache", "cache",
    "past_key_values", "cache_position", "logits_to_keep", "return_dict", "output_attentions",
    "output_hidden_states", "visual_pos_masks", "deepstack_visual_embeds"}


class Reached(Exception):
    """Carries what the language model was called with."""

    def __init__(self, inputs: dict):
        self.inputs = inputs


def reach(model: Any, inputs: dict[str, torch.Tensor]) -> dict:
    """Run transformers' forward up to its language model -> what that is called with, by name."""
    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise Reached(kwargs)

    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except Reached as reached:
        return reached.inputs
    finally:
        hook.remove()
    raise AssertionError(f"{type(model).__name__} does not call its decoder")


def axes_of(reached: dict) -> torch.Tensor | None:
    """The positions (axes, L) that a language model was called with; None: 0, 1, 2, ..."""
    positions = reached.get("position_ids")
    if positions is None:
        return None
    if positions.ndim == 2:
        plain = torch.equal(positions[0], torch.arange(positions.shape[1], device=positions.device))
        return None if plain else positions[:1]
    return positions[-3:, 0]                             # of four the first is for masks


def added_of(reached: dict) -> torch.Tensor | None:
    """(k, B, L, H), what Qwen3-VL adds behind its first k layers where pictures are; None: nothing."""
    mask, parts = reached.get("visual_pos_masks"), reached.get("deepstack_visual_embeds")
    if mask is None or not parts:
        return None
    added = reached["inputs_embeds"].new_zeros(len(parts), *mask.shape, parts[0].shape[-1])
    for layer, part in zip(added, parts):
        layer[mask] = part.to(layer)
    return added


def shared_of(reached: dict) -> Shared:
    """All positions but the last, which is text."""
    added = added_of(reached)
    return Shared(reached["inputs_embeds"][:, :-1], axes_of(reached),
                  None if added is None else added[:, :, :-1])


class GrowingTarget(Prompted):
    """The Target protocol on our own layers, for prompts of any length: the cache grows with them."""

    def __init__(self, decoder: tuple[nn.Module, nn.Module], longest: int, more_tokens: int):
        """decoder: as of the model; longest: positions of a prompt, as far as is known."""
        self.decoder, self.more = decoder, more_tokens
        self._open(longest + more_tokens)

    def _open(self, positions: int) -> None:
        self.steps: Any = None                           # the old cache makes room for the new one
        room = -(-positions // ROOM_STEP) * ROOM_STEP
        self.steps = Steps(self.decoder[0], self.decoder[1], room)
        self.vocab_size = self.steps.vocab_size
        log(f"decode | keys and values: {self.steps.bytes / 2**20:,.0f} MiB for {room} positions")

    def ask(self, prompt: Prompt) -> None:
        """Set the prompt of the next answer."""
        if prompt.length + self.more > self.steps.room:
            self._open(prompt.length + self.more)
        self.positions = prompt.positions
        self.embeds = prompt.embeds
        self.added = prompt.added
        if prompt.positions is not None:
            self.steps.set_positions(prompt.positions)

    @torch.inference_mode()
    def reference(self, tokens: list[int]) -> torch.Tensor:
        whole, how = torch.cat([self.embeds, self.steps.embed(tokens)], 1), {}
        if self.positions is not None and len(self.positions) > 1:
            how["position_ids"] = with_text(self.positions, whole.shape[1])[:, None]
        if self.added is not None:
            mask = (self.added != 0).any(-1).any(0)
            how["deepstack_visual_embeds"] = [layer[mask] for layer in self.added]
            text = mask.new_zeros(whole.shape[1] - len(mask))
            how["visual_pos_masks"] = torch.cat([mask, text])[None]
        hidden = self.steps.model(inputs_embeds=whole, use_cache=False, **how).last_hidden_state
        return self.steps.lm_head(hidden[0, -len(tokens) :])
