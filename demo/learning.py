"""How the demo's two models are trained: to see, then to speak. Seeded: one CPU, the same weights."""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from base import Progress, log
from demo.building import Student, event_student, video_student
from demo.data_sets import SEED, seed_of
from demo.world import random_scene
from machine.workers import in_workers

TRAIN_CLIPS = 4000
STUDENTS = {"eventgpt": event_student, "video_llava": video_student}


def train_models(models_dir: Path) -> None:
    """Train both models side by side, a process and a thread each, because two threads hinder each other.

    The folders in models_dir are replaced when both new ones are whole.
    """
    with tempfile.TemporaryDirectory(dir=models_dir, prefix=".", suffix=".tmp") as unfinished:
        work = functools.partial(train_model, models_dir=Path(unfinished))
        for _ in in_workers(work, list(STUDENTS), workers=2):
            pass
        for name in STUDENTS:
            shutil.rmtree(models_dir / name, ignore_errors=True)
            Path(unfinished, name).rename(models_dir / name)
            log(f"RESULT | {models_dir / name}")


def train_model(name: str, models_dir: Path) -> None:
    """From nothing to a folder that the real loaders take."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    folder = models_dir / name
    folder.mkdir()
    student = STUDENTS[name](folder)
    clips = render_training_clips(student)
    head = learn_to_see(student, clips)
    learn_to_speak(student, clips, head)
    save_weights(student, folder)


@dataclasses.dataclass
class TrainingClips:
    """TRAIN_CLIPS random scenes as one model sees them, none of them a clip of the data sets."""

    pixels: torch.Tensor           # (N, F, 3, S, S) float16
    attributes: torch.Tensor       # (N, A) int64: which of its phrases each attribute has
    num_phrases: list[int]         # of the A attributes
    answers: torch.Tensor          # (N, T) int64: token ids up to EOS, then -100


def render_training_clips(student: Student) -> TrainingClips:
    words = {name: list(dict.fromkeys(phrases.values()))
             for name, phrases in student.phrases.items()}
    progress = Progress(f"{student.name} | render", TRAIN_CLIPS, unit="clips")
    pixels, attributes, answers = [], [], []
    for number in range(TRAIN_CLIPS):
        seed = seed_of("training", number)
        scene = random_scene(np.random.default_rng(seed))
        pixels.append(student.pixels(scene, seed, (10, 20)[number % 2]).astype(np.float16))
        attributes.append([words[name].index(phrases[getattr(scene, name)])
                           for name, phrases in student.phrases.items()])
        ids = student.tokenizer(student.text(scene)).input_ids[1:]                   # without BOS
        answers.append(torch.tensor([*ids, student.tokenizer.eos_token_id]))
        progress.update(number + 1)
    return TrainingClips(torch.from_numpy(np.stack(pixels)), torch.tensor(attributes),
                         [len(words[name]) for name in words],
                         nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100))


def learn_to_see(student: Student, clips: TrainingClips) -> nn.Module:
    """Train the vision part to tell the attributes from single pictures; -> the head on their mean token.

    Two linear heads guess the attributes. One reads all visual tokens side by side and is nearly
    always right after 200 steps. The other reads the tokens' mean, so that each token has to say
    where it is and what it saw, as the language model needs it; without the first, sides were still
    guessed at random after 600 steps.
    """
    for name, parameter in student.vision[0].named_parameters():
        if "position_embedding" in name:
            # CLIP's 0.02 drowns in the patches: sides get mixed up
            nn.init.normal_(parameter, std=0.4)
    with torch.no_grad():
        tokens, width = student.features(clips.pixels[:1, :1].float()).shape[1:]
    from_all, from_mean = (nn.Linear(inputs, sum(clips.num_phrases))
                           for inputs in (tokens * width, width))

    def loss_of(rows):
        frames = torch.randint(clips.pixels.shape[1], rows.shape)
        features = student.features(clips.pixels[rows, frames][:, None].float())
        return (attribute_loss(from_all(features.flatten(1)), clips, rows)
                + attribute_loss(from_mean(features.mean(1)), clips, rows))

    groups = [{"params": parameters_of(*student.vision, from_all, from_mean), "lr": 2.5e-3}]
    descend(f"{student.name} | see", loss_of, groups, num_steps=1000, batch_size=64)
    return from_mean


def learn_to_speak(student: Student, clips: TrainingClips, head: nn.Module) -> None:
    """Train everything on the answers that follow the real prompt; the attributes stay a second goal."""
    body, lm_head = student.language
    embed = student.model.get_input_embeddings()

    def loss_of(rows):
        features, answers = student.features(clips.pixels[rows].float()), clips.answers[rows]
        before, after = (embed(torch.tensor(ids)).expand(len(rows), -1, -1)
                         for ids in student.prompt)
        answer = embed(answers[:, :-1].clamp(min=0))          # padding may be any id: it has no label
        hidden = body(inputs_embeds=torch.cat([before, features, after, answer], dim=1)).last_hidden_state
        logits = lm_head(hidden[:, -answers.shape[1]:])
        return (nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
                + attribute_loss(head(features.mean(1)), clips, rows))

    groups = [{"params": parameters_of(*student.language), "lr": 3e-3},
              {"params": parameters_of(*student.vision, head), "lr": 1e-3}]
    descend(f"{student.name} | speak", loss_of, groups, num_steps=200, batch_size=32)


def parameters_of(*modules) -> list:
    return [parameter for module in modules for parameter in module.parameters()]


def attribute_loss(logits: torch.Tensor, clips: TrainingClips, rows: torch.Tensor) -> torch.Tensor:
    """logits (B, all phrases of all attributes) -> mean cross-entropy over the attributes."""
    parts = zip(logits.split(clips.num_phrases, dim=1), clips.attributes[rows].T)
    return torch.stack([nn.functional.cross_entropy(part, labels) for part, labels in parts]).mean()


def descend(step: str, loss_of: Callable, groups: list[dict], num_steps: int,
            batch_size: int) -> None:
    """AdamW on loss_of(rows): 30 steps of warm-up, then the rate falls linearly to 2 % of its peak."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1, (done + 1) / 30) * max(0.02, 1 - done / num_steps))
    parameters = [parameter for group in groups for parameter in group["params"]]
    progress = Progress(step, num_steps, unit="steps")
    for done in range(1, num_steps + 1):
        loss = loss_of(torch.randint(TRAIN_CLIPS, (batch_size,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.update(done, f"loss {loss.item():.3f}")


def save_weights(student: Student, folder: Path) -> None:
    from safetensors.torch import save_file

    model = student.model.half()
    if student.name == "video_llava":
        # The layout has a tower for images too: it gets the weights of the video tower.
        model.model.image_tower.load_state_dict(model.model.video_tower.state_dict())
        model.save_pretrained(folder)
    else:
        tensors = {published_name(name): tensor.contiguous()
                   for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def published_name(name: str) -> str:
    """Our names of EventGPT's weights -> those of its published checkpoint (see vlm/eventgpt.py)."""
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("visual_tower.", "visual_tower.visual_tower.vision_model.")
