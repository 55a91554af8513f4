"""How often the demo's models say the right thing about the test clips."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from base import log
from clips.dataset import Sample, draft_pictures, read_dataset, target_pictures
from demo import texts
from demo.building import NUM_FRAMES, QUESTION
from demo.data_sets import DATA_SETS, scenes_of

BATCH = 20                         # clips answered at a time


@dataclasses.dataclass(frozen=True)
class Lesson:
    """The texts that a model was taught."""

    text: Callable                 # scene -> the answer
    phrases: dict                  # attribute -> value -> words


DRAFT = Lesson(texts.draft_text, texts.DRAFT_PHRASES)
TARGET = Lesson(texts.target_text, texts.TARGET_PHRASES)


def check_models(models_dir: Path, data_dir: Path) -> None:
    """Let both models answer about the rendered test clips, and log how often they are right."""
    import torch

    from machine.device import Runtime
    from vlm.eventgpt import EventGPT
    from vlm.video_llava import VideoLlava

    torch.set_num_threads(1)
    draft = EventGPT.load(models_dir / "eventgpt", Runtime.choose("cpu"))
    target = VideoLlava.load(models_dir / "video_llava", Runtime.choose("cpu"))
    for split, name, _ in DATA_SETS:
        if split == "test":
            samples = read_dataset(data_dir / name)
            pictures = [draft_pictures(sample, "first") for sample in samples]
            check_answers(f"draft | {name}", draft, samples, pictures, DRAFT)
            pictures = [target_pictures(sample, NUM_FRAMES) for sample in samples]
            check_answers(f"target | {name}", target, samples, pictures, TARGET)


def check_answers(title: str, model, samples: list[Sample], pictures: list,
                  lesson: Lesson) -> float:
    """Ask about every clip and log the result; -> the share of attributes that the answers name right."""
    answers = []
    for start in range(0, len(samples), BATCH):
        pixels = [model.prepare(images) for images in pictures[start:start + BATCH]]
        answers += model.answer(pixels, [QUESTION] * len(pixels), max_new_tokens=64)
    references = [lesson.text(scenes_of(sample.sequence, int(sample.clip) + 1)[-1])
                  for sample in samples]
    named = [texts.read_text(answer.text, lesson.phrases) for answer in answers]
    true = [texts.read_text(reference, lesson.phrases) for reference in references]
    right = {attribute: np.mean([said[attribute] == values[attribute]
                                 for said, values in zip(named, true)])
             for attribute in lesson.phrases}
    share = float(np.mean(list(right.values())))
    verbatim = np.mean([answer.text == reference and answer.finished
                        for answer, reference in zip(answers, references)])
    tokens = [len(answer.tokens) for answer in answers]
    log(f"check | {title} | {', '.join(f'{attribute} {hits:.1%}' for attribute, hits in right.items())}")
    log(f"RESULT | {title} | {share:.1%} of attributes right, {verbatim:.1%} of answers word for word | "
        f"{len(samples)} clips, {np.mean(tokens):.1f} tokens an answer, {max(tokens)} at most")
    return share
