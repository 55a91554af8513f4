"""The demo: data sets of a made-up world in the real folder layout, and two tiny models trained to describe it.

    python make_demo.py                    renders the four data sets into demo/data (what is there is skipped)
    python make_demo.py --check_models     and tells how often the models in demo/models describe test clips right
    python make_demo.py --train_models     makes those models again from nothing, then checks them

    demo/data/my_egpt_dsec_train/my_egpt_dsec_train_{1s,500ms}    index file, event_image/, mp4/
    demo/data/my_egpt_dsec_test/my_egpt_dsec_seq_{1s,500ms}
    demo/models/eventgpt                   the layout of EventGPT's published checkpoint, float16
    demo/models/video_llava                what VideoLlavaForConditionalGeneration saves, float16

Everything is seeded: the same pictures and, on the same kind of CPU, the same weights. What the scenes are, how they
look and what is said about them stands in demo_world.py.
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

import demo.world as world
from base import ROOT, Progress, check_counts, drive_of, log, option, parse_config
from machine.files import make_folder, only_writer, write_whole
from machine.running import run

SEED = 2028
QUESTION = "What are the key elements in this scene?"
DRIVES = {"train": [f"demo{place}_0{k}" for place in ("field", "hill", "town") for k in range(4)],
          "test": ["demofield_10", "demohill_10", "demolake_10", "demolake_11", "demotown_10"]}
DATA_SETS = (("train", "my_egpt_dsec_train/my_egpt_dsec_train_1s", 20),      # split, folder, frames a clip
             ("train", "my_egpt_dsec_train/my_egpt_dsec_train_500ms", 10),
             ("test", "my_egpt_dsec_test/my_egpt_dsec_seq_1s", 20),
             ("test", "my_egpt_dsec_test/my_egpt_dsec_seq_500ms", 10))
INDEX_FILE = "EventGPT_Instruction_Subset.json"


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Render the demo's data sets; with --check_models or --train_models also check or make its two tiny models."""

    output_dir: Path = option(ROOT / "demo" / "data", "where the four data sets go")
    models_dir: Path = option(ROOT / "demo" / "models", "holds the two models, eventgpt and video_llava")
    train_clips: int = option(312, "clips of each training set, at least one for each of its 24 sequences")
    test_clips: int = option(100, "clips of each test set, at least one for each of its 10 sequences")
    check_models: bool = option(False, "report how often the models describe the test clips right")
    train_models: bool = option(False, "make both models again from nothing (minutes), then check them")
    wait: bool = option(False, "wait when another process is making these, instead of ending")

    def __post_init__(self):
        check_counts(self, ("train_clips", "test_clips"))


def main():
    config = parse_config(DemoConfig)
    if config.train_models:
        with only_writer(make_folder(config.models_dir), config.wait):
            train_models(config.models_dir)
    with only_writer(make_folder(config.output_dir), config.wait):
        make_data_sets(config)
    if config.train_models or config.check_models:
        check_models(config)


def processes(count: int):
    """A pool that dies with this program: its exit terminates the workers instead of waiting for their work."""
    return multiprocessing.get_context("spawn").Pool(count, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def seed_of(*names: str | int) -> list[int]:
    """Names -> a seed for numpy's generators; Python's own hash differs from run to run."""
    return [SEED, *(zlib.crc32(str(name).encode()) for name in names)]


# ---------------------------------------------------------------------------------------------- data sets
def sequences_of(split: str) -> list[str]:
    return [f"{drive}_{letter}" for drive in DRIVES[split] for letter in "ab"]


def scenes_of(sequence: str, count: int) -> list[world.Scene]:
    """The first `count` scenes of a sequence; its drive fixes road, light and background."""
    first = world.random_scene(np.random.default_rng(seed_of(drive_of(sequence))))
    return world.following_scenes(first, np.random.default_rng(seed_of(sequence)), count)


def make_data_sets(config: DemoConfig) -> None:
    """Render every data set that isn't there; the index file is written last, so a folder that has it is whole."""
    with processes(min(16, len(os.sched_getaffinity(0)))) as pool:
        for split, name, num_frames in DATA_SETS:
            folder = config.output_dir / name
            if (folder / INDEX_FILE).exists():
                log(f"demo | {folder} | skipped, it is there")
                continue
            clips = config.train_clips if split == "train" else config.test_clips
            rows = render_data_set(folder, sequences_of(split), clips, num_frames, pool.imap)
            log(f"RESULT | {folder} | {len(rows)} clips of {num_frames} frames")


def render_data_set(folder: Path, sequences: list[str], clips: int, num_frames: int, in_parallel=map) -> list[dict]:
    """Render `clips` clips, spread over the sequences (at least one each), and the index file; -> its rows."""
    jobs = []
    for number, sequence in enumerate(sequences):
        make_folder(folder / "event_image" / sequence)
        make_folder(folder / "mp4" / sequence)
        count = max(1, (clips + number) // len(sequences))
        jobs += [(folder, f"{sequence}/{clip:06d}", scene, num_frames)
                 for clip, scene in enumerate(scenes_of(sequence, count))]
    log(f"demo | {folder} | rendering {len(jobs)} clips")
    progress, rows = Progress(f"demo | {folder.name}", len(jobs), unit="clips"), []
    for row in in_parallel(render_clip, jobs):
        rows.append(row)
        progress.update(len(rows))
    rows.sort(key=lambda row: row["event_data"])
    write_whole(folder / INDEX_FILE, lambda temporary: temporary.write_text(json.dumps(rows, indent=2), "utf-8"))
    return rows


def render_clip(job: tuple[Path, str, world.Scene, int]) -> dict:
    """Write one clip's video and five event pictures; -> its row, with the fields of the published data sets."""
    from clips.media import event_frames, write_png, write_video

    folder, clip, scene, num_frames = job
    seed = seed_of(clip, num_frames)
    write_video(folder / "mp4" / f"{clip}.mp4", world.frames_of(scene, seed, num_frames), fps=world.FPS)
    pictures = [f"{clip}_{k}.png" for k in range(5)]
    events = world.events_of(scene, seed, num_frames)
    for name, picture in zip(pictures, event_frames(events, 5, (world.SIZE, world.SIZE))):
        write_png(folder / "event_image" / name, picture)
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{folder.name}/{clip}")), "split": folder.name,
            "event_data": f"{clip}.npy", "video_data": clip, "mp4_data": f"{clip}.mp4", "event_image": pictures,
            "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}]}


# ---------------------------------------------------------------------------------- tokenizer and models
LANGUAGE = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}
VISION = {"hidden_size": 96, "num_attention_heads": 4, "projection_dim": 96, "hidden_act": "quick_gelu"}
EVENT_VISION = {**VISION, "num_hidden_layers": 2, "intermediate_size": 192, "image_size": 96, "patch_size": 24}
# Video-LLaVA reads layer -2: the third layer is there to be left out.
VIDEO_VISION = {**VISION, "num_hidden_layers": 3, "intermediate_size": 384, "image_size": 48, "patch_size": 16}
NUM_FRAMES = 8                     # that Video-LLaVA sees of a clip
SPECIAL = ["<unk>", "<s>", "</s>"]


def build_tokenizer():
    """A LLaMA-style tokenizer: byte-pair merges that never span white space, bytes for what is unknown.

    Learned from this world's texts and both prompts. Ids as LLaMA's: <unk> 0, <s> 1, </s> 2, 256 bytes, the rest.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from vlm import eventgpt, video_llava

    random = np.random.default_rng(seed_of("tokenizer"))
    scenes = [world.random_scene(random) for _ in range(400)]
    prompts = f"{eventgpt.prompt(QUESTION)} {video_llava.prompt(QUESTION)}"
    for mark in (eventgpt.EVENT, video_llava.VIDEO, "\n"):
        prompts = prompts.replace(mark, " ")
    texts = [text(scene) for scene in scenes for text in (world.draft_text, world.target_text)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    learner.train_from_iterator([*texts, *[prompts] * len(scenes)], trainers.BpeTrainer(
        vocab_size=704, special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[chr(code) for code in range(33, 127)], show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    # Built anew, because the trainer makes the bytes special tokens, which a text could then spell out.
    tokenizer = Tokenizer(models.BPE(learned["vocab"], [tuple(pair) for pair in learned["merges"]],
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_tokenizer(folder: Path, added: list[str], pad: str):
    """The files of a LLaMA tokenizer with `added` as special tokens at its end; -> the tokenizer read from them."""
    from vlm.loading import load_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    how = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": pad, "add_bos_token": True, "add_eos_token": False, "legacy": False, "padding_side": "left",
        "clean_up_tokenization_spaces": False, "model_max_length": LANGUAGE["max_position_embeddings"],
        "added_tokens_decoder": {str(tokenizer.token_to_id(token)): {"content": token, **how}
                                 for token in [*SPECIAL, *added]}})
    return load_tokenizer(folder, local=True)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def preprocessor_config(size, crop_size) -> dict:
    from clips.media import PixelSettings

    return {"do_resize": True, "size": size, "resample": 3, "do_center_crop": True, "crop_size": crop_size,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
            "image_mean": PixelSettings.mean, "image_std": PixelSettings.std}


@dataclasses.dataclass
class Pupil:
    """One of the two models in training, with all that differs between them."""

    name: str
    model: object                  # the torch module
    vision: list                   # its modules: the tower first, then what leads to the language model
    language: list                 # its modules: LLaMA's body and head
    features: Callable             # pixels (B, F, 3, S, S) float32 -> visual tokens (B, N, H)
    pixels: Callable               # (scene, clip_seed, num_frames) -> pixels (F, 3, S, S) float32
    tokenizer: object
    prompt: tuple[list[int], list[int]]      # the ids before and after the visual tokens
    text: Callable                 # scene -> the answer to learn
    phrases: dict                  # what that answer can say: attribute -> value -> words


def event_pupil(folder: Path) -> Pupil:
    """EventGPT with random weights; writes all files of its folder but the weights."""
    from clips.media import PixelSettings, clip_pixels, event_frames
    from vlm import eventgpt

    clip, size = folder / "clip", EVENT_VISION["image_size"]
    clip.mkdir()
    write_json(clip / "config.json",
               {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **EVENT_VISION})
    write_json(clip / "preprocessor_config.json",
               {"feature_extractor_type": "CLIPFeatureExtractor", **preprocessor_config(size, size)})
    tokenizer = write_tokenizer(folder, [], "<unk>")
    text_config = {**LANGUAGE, "vocab_size": len(tokenizer)}
    write_json(folder / "config.json", {
        "architectures": ["EventChatModel"], "model_type": "EventChat_llama", **text_config, "hidden_act": "silu",
        "num_key_value_heads": LANGUAGE["num_attention_heads"], "rope_theta": 10000.0, "torch_dtype": "float16",
        "tie_word_embeddings": False, "mm_visual_tower": "clip", "event_feature_adaptor": True,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "tokenizer_model_max_length": LANGUAGE["max_position_embeddings"]})
    settings = PixelSettings.read(clip / "preprocessor_config.json", size)
    model = eventgpt.EventGPTModel(eventgpt.EventGPTConfig(text_config, EVENT_VISION))
    ids = eventgpt.prompt_ids(tokenizer, QUESTION)
    at = ids.index(eventgpt.EVENT_ID)

    def pixels(scene, clip_seed, num_frames):
        events = world.events_of(scene, clip_seed, num_frames)
        return clip_pixels(event_frames(events, 5, (world.SIZE, world.SIZE))[:1], settings)

    return Pupil(folder.name, model, [model.visual_tower, model.visual_projector, model.feature_adaptor],
                 [model.language_model.model, model.language_model.lm_head], model.event_features, pixels,
                 tokenizer, (ids[:at], ids[at + 1:]), world.draft_text, world.DRAFT_PHRASES)


def video_pupil(folder: Path) -> Pupil:
    """Video-LLaVA with random weights; writes tokenizer and pixel settings (the model saves the rest itself)."""
    from clips.media import PixelSettings, clip_pixels
    from vlm import video_llava

    size, patch = VIDEO_VISION["image_size"], VIDEO_VISION["patch_size"]
    video_tokens = NUM_FRAMES * (1 + (size // patch) ** 2)
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "VideoLlavaImageProcessor", "processor_class": "VideoLlavaProcessor",
        **preprocessor_config({"shortest_edge": size}, {"height": size, "width": size})})
    tokenizer = write_tokenizer(folder, ["<image>", video_llava.VIDEO, "<pad>"], "<pad>")
    model_class = video_llava.VideoLlavaForConditionalGeneration
    model = model_class(model_class.config_class(
        vision_config={**VIDEO_VISION, "model_type": "clip_vision_model"}, vision_feature_layer=-2,
        text_config={**LANGUAGE, "vocab_size": len(tokenizer), "model_type": "llama"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(size // patch) ** 2,
        video_token_index=tokenizer.convert_tokens_to_ids(video_llava.VIDEO), video_seq_length=video_tokens,
        pad_token_id=tokenizer.pad_token_id))
    settings = PixelSettings.read(folder / "preprocessor_config.json", size)
    ids = video_llava.prompt_ids(tokenizer, QUESTION, video_tokens)
    at = ids.index(model.config.video_token_index)

    def features(pixels):
        frames = model.model.get_video_features(pixel_values_videos=pixels).pooler_output
        return frames.reshape(len(pixels), -1, LANGUAGE["hidden_size"])

    def pixels(scene, clip_seed, num_frames):
        wanted = np.linspace(0, num_frames - 1, NUM_FRAMES).astype(int).tolist()     # as read_video picks them
        return clip_pixels(world.frames_of(scene, clip_seed, num_frames, wanted), settings)

    return Pupil(folder.name, model, [model.model.video_tower, model.model.multi_modal_projector],
                 [model.model.language_model, model.lm_head], features, pixels,
                 tokenizer, (ids[:at], ids[at + video_tokens:]), world.target_text, world.TARGET_PHRASES)


# ----------------------------------------------------------------------------------------------- training
TRAIN_CLIPS = 4000


def train_models(models_dir: Path) -> None:
    """Train both models side by side, a process and a thread each: two threads on two cores hinder each other.

    The folders in models_dir are replaced when both new ones are whole.
    """
    with tempfile.TemporaryDirectory(dir=models_dir, prefix=".", suffix=".tmp") as unfinished, processes(2) as pool:
        pupils = {"eventgpt": event_pupil, "video_llava": video_pupil}
        pool.starmap(train_model, [(build, Path(unfinished, name)) for name, build in pupils.items()], chunksize=1)
        for name in pupils:
            shutil.rmtree(models_dir / name, ignore_errors=True)
            Path(unfinished, name).rename(models_dir / name)
            log(f"RESULT | {models_dir / name}")


def train_model(build: Callable[[Path], Pupil], folder: Path) -> None:
    """From nothing to a folder that the real loaders take."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    folder.mkdir()
    pupil = build(folder)
    clips = render_training_clips(pupil)
    head = learn_to_see(pupil, clips)
    learn_to_speak(pupil, clips, head)
    save_weights(pupil, folder)


@dataclasses.dataclass
class Clips:
    """What one model learns from: TRAIN_CLIPS random scenes, none of them a clip of the data sets."""

    pixels: object                 # (N, F, 3, S, S) float16
    attributes: object             # (N, A) int64: which of its phrases each attribute has
    num_phrases: list[int]         # of the A attributes
    answers: object                # (N, T) int64: token ids up to EOS, then -100


def render_training_clips(pupil: Pupil) -> Clips:
    import torch

    words = {name: list(dict.fromkeys(phrases.values())) for name, phrases in pupil.phrases.items()}
    progress = Progress(f"{pupil.name} | render", TRAIN_CLIPS, unit="clips")
    pixels, attributes, answers = [], [], []
    for number in range(TRAIN_CLIPS):
        seed = seed_of("training", number)
        scene = world.random_scene(np.random.default_rng(seed))
        pixels.append(pupil.pixels(scene, seed, (10, 20)[number % 2]).astype(np.float16))
        attributes.append([words[name].index(phrases[getattr(scene, name)])
                           for name, phrases in pupil.phrases.items()])
        ids = pupil.tokenizer(pupil.text(scene)).input_ids[1:]                       # without BOS
        answers.append(torch.tensor([*ids, pupil.tokenizer.eos_token_id]))
        progress.update(number + 1)
    return Clips(torch.from_numpy(np.stack(pixels)), torch.tensor(attributes), [len(words[name]) for name in words],
                 torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100))


def learn_to_see(pupil: Pupil, clips: Clips):
    """Train the vision part to tell the attributes from single pictures; -> the head that reads their mean token.

    Two linear heads guess the attributes. One reads all visual tokens side by side and is nearly always right after
    200 steps. The other reads the tokens' mean, so that each token has to say where it is and what it saw, as the
    language model needs it; without the first, sides were still guessed at random after 600 steps.
    """
    import torch
    from torch import nn

    for name, parameter in pupil.vision[0].named_parameters():
        if "position_embedding" in name:
            nn.init.normal_(parameter, std=0.4)         # CLIP's 0.02 drowns in the patches: sides get confused
    with torch.no_grad():
        tokens, width = pupil.features(clips.pixels[:1, :1].float()).shape[1:]
    from_all, from_mean = (nn.Linear(inputs, sum(clips.num_phrases)) for inputs in (tokens * width, width))

    def loss_of(rows):
        frames = torch.randint(clips.pixels.shape[1], rows.shape)
        features = pupil.features(clips.pixels[rows, frames][:, None].float())
        return (attribute_loss(from_all(features.flatten(1)), clips, rows)
                + attribute_loss(from_mean(features.mean(1)), clips, rows))

    groups = [{"params": parameters_of(*pupil.vision, from_all, from_mean), "lr": 2.5e-3}]
    descend(f"{pupil.name} | see", loss_of, groups, num_steps=1000, batch_size=64)
    return from_mean


def learn_to_speak(pupil: Pupil, clips: Clips, head) -> None:
    """Train everything on the answers that follow the real prompt; the attributes stay a second goal."""
    import torch
    from torch import nn

    body, lm_head = pupil.language
    embed = pupil.model.get_input_embeddings()

    def loss_of(rows):
        features, answers = pupil.features(clips.pixels[rows].float()), clips.answers[rows]
        before, after = (embed(torch.tensor(ids)).expand(len(rows), -1, -1) for ids in pupil.prompt)
        spoken = embed(answers[:, :-1].clamp(min=0))          # past an answer's end any id: no label asks about it
        hidden = body(inputs_embeds=torch.cat([before, features, after, spoken], dim=1)).last_hidden_state
        logits = lm_head(hidden[:, -answers.shape[1]:])
        return (nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
                + attribute_loss(head(features.mean(1)), clips, rows))

    groups = [{"params": parameters_of(*pupil.language), "lr": 3e-3},
              {"params": parameters_of(*pupil.vision, head), "lr": 1e-3}]
    descend(f"{pupil.name} | speak", loss_of, groups, num_steps=200, batch_size=32)


def parameters_of(*modules) -> list:
    return [parameter for module in modules for parameter in module.parameters()]


def attribute_loss(logits, clips: Clips, rows):
    """logits (B, all phrases of all attributes) -> mean cross-entropy over the attributes."""
    import torch

    parts = zip(logits.split(clips.num_phrases, dim=1), clips.attributes[rows].T)
    return torch.stack([torch.nn.functional.cross_entropy(part, labels) for part, labels in parts]).mean()


def descend(step: str, loss_of: Callable, groups: list[dict], num_steps: int, batch_size: int) -> None:
    """AdamW on loss_of(rows): 30 steps of warm-up, then the learning rate falls in a line to 2 % of its peak."""
    import torch

    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1, (done + 1) / 30) * max(0.02, 1 - done / num_steps))
    parameters = [parameter for group in groups for parameter in group["params"]]
    progress = Progress(step, num_steps, unit="steps")
    for done in range(1, num_steps + 1):
        loss = loss_of(torch.randint(TRAIN_CLIPS, (batch_size,)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.update(done, f"loss {loss.item():.3f}")


def save_weights(pupil: Pupil, folder: Path) -> None:
    from safetensors.torch import save_file

    model = pupil.model.half()
    if pupil.name == "video_llava":
        # The layout has a tower for images too: it gets what the video tower has learned.
        model.model.image_tower.load_state_dict(model.model.video_tower.state_dict())
        model.save_pretrained(folder)
    else:
        tensors = {published_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def published_name(name: str) -> str:
    """Our names of EventGPT's weights -> those of its published checkpoint; vlm/eventgpt.py reads them back."""
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("visual_tower.", "visual_tower.visual_tower.vision_model.")


# ----------------------------------------------------------------------------------------------- checking
def check_models(config: DemoConfig) -> None:
    """Log how often the models say the right thing about the test clips, read from the rendered files."""
    import torch

    from clips.dataset import draft_pictures, read_dataset, target_pictures
    from machine.device import Runtime
    from vlm.eventgpt import EventGPT
    from vlm.video_llava import VideoLlava

    torch.set_num_threads(1)
    draft = EventGPT.load(config.models_dir / "eventgpt", Runtime.choose("cpu"))
    target = VideoLlava.load(config.models_dir / "video_llava", Runtime.choose("cpu"))
    for split, name, _ in DATA_SETS:
        if split == "test":
            samples = read_dataset(config.output_dir / name)
            pictures = [draft_pictures(sample, "first") for sample in samples]
            check_answers(f"draft | {name}", draft, samples, pictures, world.draft_text, world.DRAFT_PHRASES)
            pictures = [target_pictures(sample, NUM_FRAMES) for sample in samples]
            check_answers(f"target | {name}", target, samples, pictures, world.target_text, world.TARGET_PHRASES)


def check_answers(title: str, model, samples: list, pictures: list, text: Callable, phrases: dict) -> float:
    """Ask about every clip, log the result; -> the share of attributes that the answers name right."""
    answers = []
    for start in range(0, len(samples), 20):
        pixels = [model.prepare(images) for images in pictures[start:start + 20]]
        answers += model.answer(pixels, [QUESTION] * len(pixels), max_new_tokens=64)
    true = [text(scenes_of(sample.sequence, sample.clip + 1)[-1]) for sample in samples]
    read = [[world.read_text(words, phrases) for words in pair] for pair in zip([a.text for a in answers], true)]
    right = {name: np.mean([said[name] == wanted[name] for said, wanted in read]) for name in phrases}
    share, tokens = np.mean(list(right.values())), [len(answer.tokens) for answer in answers]
    same = np.mean([answer.text == words and answer.finished for answer, words in zip(answers, true)])
    log(f"check | {title} | {', '.join(f'{name} {hits:.1%}' for name, hits in right.items())}")
    log(f"RESULT | {title} | {share:.1%} of attributes right, {same:.1%} of answers word for word | {len(samples)} "
        f"clips, {np.mean(tokens):.1f} tokens an answer, {max(tokens)} at most")
    return share


if __name__ == "__main__":
    run(main)
