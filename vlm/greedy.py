"""Answers by transformers' own greedy generate, and an answer from its tokens."""

from collections.abc import Iterable

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vlm.contract import Answer, NotNumbers
from vlm.tokenizers import guarded


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
