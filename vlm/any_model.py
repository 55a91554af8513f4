"""Any model for pictures and text that transformers loads: LLaVA-OneVision, Qwen2.5-VL, SmolVLM2.

Its class comes from config.json (AutoModelForImageTextToText's table), its prompt and pixels from
its own processor (vlm/processing.py), its embeddings of pictures from transformers' own forward
(vlm/embedded.py). Its language model runs in our own layers if it fits them (vlm/fits.py) and gives
the same logits there, else in transformers' (vlm/generic.py); the log says which, and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from base import UserError, log
from clips.limits import MediaError
from machine.device import Runtime
from machine.files import read_json, read_within
from vlm.checkpoints import Checkpoint, open_checkpoint
from vlm.contract import Answer, NotNumbers, Prompt, Shared
from vlm.embedded import KNOWN, GrowingTarget, added_of, axes_of, reach, shared_of
from vlm.errors import in_words, short_of_memory
from vlm.fits import why_not
from vlm.generic import CPU_ROWS, ROWS, GenericBatches, GenericTarget, extended
from vlm.greedy import generate_greedily
from vlm.llama import apart
from vlm.loading import check_positions, check_prompts, load_checked, no_room, weights_mib
from vlm.model import LoadedModel
from vlm.processing import PIXELS, ClipInputs, Processing, example
from vlm.steps import Steps
from vlm.tokenizers import check_ids, check_tokenizer, warn_of_special_tokens

TEMPLATES = "chat_template.jinja", "chat_template.json"
TRIED = 8  # pictures that a loaded model is tried with
# Our logits may be so far from transformers', relative to their size: rounding, no missing part.
FAR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Of generation_config.json: what would change which tokens an answer has.
CHANGES_TOKENS = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "suppress_tokens": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "encoder_repetition_penalty": 1.0,
    "penalty_alpha": None,
    "sequence_bias": None,
}


# ---------------------------------------------------------------------------------- without weights
def read_config(name: str | Path) -> tuple[Any, type, Checkpoint]:
    """(config, model class, checkpoint) of a folder or hub id; a UserError for another kind of
    model.
    """
    checkpoint = open_checkpoint(name)
    settings = checkpoint.config
    kind = settings.get("model_type")
    try:
        config = CONFIG_MAPPING[kind].from_dict(settings)
    except Exception as error:  # an unknown kind; a damaged config breaks in many ways
        if "auto_map" in (read_json(checkpoint.folder / "config.json") or {}):
            raise UserError(
                f"{name} comes with code of its own (auto_map in config.json: {kind}), which is "
                "never run here: wanted a model that is a part of transformers"
            ) from error
        raise UserError(
            f"can't load the config of {name} (model_type {kind!r:.60}): {in_words(error)}; wanted "
            "EventGPT, Video-LLaVA, or a model that transformers' AutoModelForImageTextToText "
            "loads"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"{name} is of a {kind} model, which reads no pictures along with text: wanted "
            "EventGPT, Video-LLaVA, or a model that transformers' AutoModelForImageTextToText "
            "loads"
        )
    return config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], checkpoint


def check(name: str | Path, questions: list[str], pictures: int, max_new_tokens: int) -> None:
    """See vlm.roles.Role.check. pictures: the most that are shown at once."""
    config, _, checkpoint = read_config(name)
    processing = Processing.of(checkpoint)
    check_text(processing, config, checkpoint, questions)
    parts = []
    try:
        shared = processing.inputs(example(pictures)).length
        parts = [(shared, len(processing.after(question, pictures))) for question in questions]
    except MediaError as error:
        raise UserError(str(error)) from error
    positions = config.get_text_config().max_position_embeddings
    check_prompts(name, parts, max_new_tokens, (positions, positions))
    say_overridden(checkpoint)


def check_text(
    processing: Processing, config: Any, checkpoint: Checkpoint, questions: list[str]
) -> None:
    """A UserError unless the tokenizer fits the model, and for marks of pictures in a question."""
    tokenizer, size = processing.tokenizer, config.get_text_config().vocab_size
    check_tokenizer(tokenizer, checkpoint.name, size, needs_bos=False)
    check_ids([*processing.mark_ids(), *checkpoint.eos_ids()], checkpoint.name, size)
    if len(tokenizer) < size:
        log(
            f"load | {checkpoint.name} | its vocabulary of {size:,} ids is padded, the tokenizer has "
            f"{len(tokenizer):,}; the others mean no text"
        )
    for question in questions:
        for mark in processing.marks():
            if mark in question:
                raise UserError(
                    f"the question may not contain {mark}, which stands for pictures: {question!r}"
                )
    warn_of_special_tokens(tokenizer, checkpoint.name, questions)


def say_overridden(checkpoint: Checkpoint) -> None:
    """Log which generation defaults of the folder play no part: greedy means greedy."""
    file = checkpoint.folder / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    settings = settings if isinstance(settings, dict) else {}
    found = [
        f"{key} {settings[key]}"
        for key, neutral in CHANGES_TOKENS.items()
        if settings.get(key) not in (None, neutral)
    ]
    if found:
        log(
            f"load | {checkpoint.name} | answers are greedy: of generation_config.json "
            f"{', '.join(found)} play no part, here and in transformers' generate alike"
        )


def revision(name: str | Path) -> str:
    """See vlm.roles.Role.revision."""
    return revision_of(read_config(name)[2])


def revision_of(checkpoint: Checkpoint) -> str:
    """The chat template decides what the model is asked: it belongs to the content."""
    files = [checkpoint.folder / file for file in TEMPLATES]
    return checkpoint.revision("".join(
        read_within(file).decode(errors="replace") for file in files if file.is_file()))


# ---------------------------------------------------------------------------------------- the model
@dataclasses.dataclass
class AnyModel(LoadedModel):
    """A loaded model with its processor. Clips are ClipInputs, prompts are Prompts."""

    # why the language model does not run in our own layers; None: it does
    reason: str | None = dataclasses.field(init=False)

    @property
    def processing(self) -> Processing:
        return self.pixels

    def __post_init__(self):
        """Find out how the model decodes; UserError if it can't."""
        clip = self._example(TRIED)
        self.reason = self._why_not(clip)
        if self.reason is None:
            log(
                f"load | {type(self.model).__name__} | decodes in our own layers "
                f"({self.decoder[0].config.model_type})"
            )
            return
        log(
            f"load | {type(self.model).__name__} | decodes by transformers' own forward, slower and "
            f"in chains alone: {self.reason}"
        )
        target = self._generic()
        target.ask(self.encode(clip, ""))
        target.check(self.eos_ids[0])

    # -------------------------------------------------------------------------------------- prompts
    def prompt_text(self, query: str) -> str:
        return self.processing.text(query, TRIED)

    def prepare(self, pictures: list[np.ndarray]) -> ClipInputs:
        inputs = self.processing.inputs(pictures)
        inputs.tensors = {
            name: tensor.to(self.runtime.dtype)
            if name.startswith(PIXELS) and tensor.is_floating_point()
            else tensor
            for name, tensor in inputs.tensors.items()
        }
        return inputs

    def _example(self, pictures: int) -> ClipInputs:
        """A clip of so many pictures of noise; a UserError where the processor refuses them."""
        try:
            return self.prepare(example(pictures))
        except MediaError as error:
            raise UserError(str(error)) from error

    def layout(
        self, questions: list[str], pictures: int, clip: ClipInputs | None = None
    ) -> tuple[int, list[list[int]]]:
        clip = clip or self._example(pictures)
        return clip.length, [
            self.processing.after(question, clip.pictures) for question in questions
        ]

    def encode(self, pixels: ClipInputs, query: str) -> Prompt:
        after = self.processing.after(query, pixels.pictures)
        length = pixels.length + len(after)
        if self.reason is not None:
            return Prompt(length, inputs=extended(self._on_device([pixels]), [after]))
        shared = self.shared_prompts([pixels])
        return Prompt(
            length,
            torch.cat([shared.embeds, self._embed(after)], 1),
            shared.positions,
            None if shared.added is None else shared.added[:, 0],
        )

    @torch.inference_mode()
    def shared_prompts(self, clips: Sequence[ClipInputs]) -> Shared:
        # One token of text more: where text goes on behind pictures differs between models.
        text = [[self.eos_ids[0]]] * len(clips)
        return shared_of(reach(self.model, extended(self._on_device(clips), text)))

    def answer(
        self, pixels: list[ClipInputs], queries: list[str], max_new_tokens: int
    ) -> list[Answer]:
        rows = [
            [*self.processing.after(query, clip.pictures)] for clip, query in zip(pixels, queries)
        ]
        check_positions(
            max(clip.length + len(row) for clip, row in zip(pixels, rows)),
            max_new_tokens,
            self.max_positions,
        )
        answers: dict[int, Answer] = {}
        for group in alike([(clip.shape, len(row)) for clip, row in zip(pixels, rows)]):
            inputs = extended(
                self._on_device([pixels[number] for number in group]),
                [rows[number] for number in group],
            )
            try:
                answered = generate_greedily(
                    self.model, self.tokenizer, self.eos_ids, max_new_tokens, **inputs
                )
            except NotNumbers as error:
                rows_of_call = tuple(group[row] for row in error.rows)
                raise NotNumbers(self.model.dtype, rows_of_call) from error
            answers |= dict(zip(group, answered))
        return [answers[number] for number in range(len(pixels))]

    def _on_device(self, clips: Sequence[ClipInputs]) -> dict[str, torch.Tensor]:
        """The tensors of clips of one shape, side by side."""
        device = self.runtime.device
        return {
            name: torch.cat([clip.tensors[name] for clip in clips]).to(device, non_blocking=True)
            for name in clips[0].tensors
        }

    # ---------------------------------------------------------------------------------- the decoder
    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @property
    def decoder(self) -> tuple:
        return self.model.get_decoder(), self.model.get_output_embeddings()

    @property
    def max_positions(self) -> int:
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def max_prompt(self) -> int:
        return self.max_positions

    def open_target(self, questions: list[str], pictures: int, more_tokens: int) -> Any:
        if self.reason is not None:
            return self._generic()
        shared, after = self.layout(questions, pictures)
        return GrowingTarget(self.decoder, shared + max(map(len, after)), more_tokens)

    def open_batches(
        self, questions: list[str], max_new_tokens: int, clip: ClipInputs, clips: int
    ) -> Any:
        from vlm.batches import Batches

        if self.reason is not None:
            return GenericBatches(self, questions, max_new_tokens, clips)
        return Batches(self, questions, max_new_tokens, clip.pictures, clips, clip=clip)

    def clips_that_fit(self, questions: list[str], max_new_tokens: int, pictures: int) -> int:
        if self.reason is None:
            return super().clips_that_fit(questions, max_new_tokens, pictures)
        return ROWS if self.runtime.device.type == "cuda" else CPU_ROWS

    # ----------------------------------------------------------------------------------- what it is
    def _generic(self) -> GenericTarget:
        return GenericTarget(self.model, self.processing.mark_ids())

    @torch.inference_mode()
    def _why_not(self, clip: ClipInputs) -> str | None:
        """Why our own layers can't run the language model, by its parts and by its logits."""
        decoder, head = self.decoder
        if not hasattr(decoder, "layers") or not hasattr(decoder, "embed_tokens") or head is None:
            return f"its language model is a {type(decoder).__name__}, without LLaMA's parts"
        if reason := why_not(decoder.config, decoder):
            return reason
        # Any text will do, but no mark of pictures.
        tail = [*self.processing.after("", clip.pictures), *[self.eos_ids[0]] * 8]
        target = self._generic()
        target.ask(Prompt(0, inputs=self._on_device([clip])))
        theirs = target.reference(tail)
        if not theirs.isfinite().all():
            return "its logits are no numbers, for pictures of noise at least"
        reached = reach(self.model, extended(self._on_device([clip]), [tail]))
        if reached.get("inputs_embeds") is None:
            return "its language model is not called with embeddings"
        given = {name for name, value in reached.items() if value is not None and name not in KNOWN}
        if given:
            return f"its language model is given {', '.join(sorted(given))} beside the embeddings"
        embeds = reached["inputs_embeds"]
        steps = Steps(decoder, head, embeds.shape[1], graphs=False)
        if (axes := axes_of(reached)) is not None:
            steps.set_positions(axes)
        added = added_of(reached)
        ours = steps.prefill(embeds, len(theirs), added=None if added is None else added[:, 0])
        difference, limit = apart(ours.logits, theirs), FAR[self.runtime.dtype]
        if difference <= limit:
            return None
        return f"our own layers give other logits (by {difference:.2%}, wanted {limit:.1%} or less)"


def alike(keys: list) -> list[list[int]]:
    """The numbers of the entries that are equal, together."""
    groups: dict[Any, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def load(name: str | Path, runtime: Runtime) -> AnyModel:
    """From a folder, or else a hub id."""
    config, model_class, checkpoint = read_config(name)
    processing = Processing.of(checkpoint)
    check_text(processing, config, checkpoint, [])
    model = load_checked(model_class, checkpoint, config, runtime)
    log(f"load | {name} | {model_class.__name__}, weights {weights_mib(model):,.1f} MiB")
    try:
        return AnyModel(model, processing.tokenizer, processing, runtime, revision_of(checkpoint),
                        tuple(checkpoint.eos_ids()))
    except (RuntimeError, MemoryError) as error:
        if not short_of_memory(error):
            raise
        raise no_room(name, runtime, weights_mib(model) / 1024, f"; {in_words(error)}") from error
