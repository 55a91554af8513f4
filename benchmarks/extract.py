"""Extraction at real size, measured without the weights: `python benchmark.py extract`.

Models with random weights answer questions about made-up clips with the given number of tokens (no token ends an
answer). The plain ways beside ours, in one run on the same clips: transformers' generate one clip at a time, and in
batches. Ours with one question a clip and with several; the files alone, read and prepared by threads; and all
together, as extraction runs it.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

from base import UserError, check_counts, log, option

VIDEO_SIZE, EVENT_SIZE = (1080, 1440), (480, 640)        # of the real data, height and width
EVENTS = 550_000                                         # in a picture: a fifth of 200 ms of a DSEC recording
WANTED = {"videollava": (12, 12), "eventgpt": (40, 40)}  # samples/s, and times the plain loop, for 7b on one H200
WHAT = (
    "Answers of random weights mean nothing and none ends early: every answer takes all its tokens.",
    "One at a time and batches: transformers' greedy generate over the same prompts and pixels.",
    "Ours: as extract_tokens_train.py runs it, from pixels in memory; with files: reading and preparing included.",
    "Limit: the products of the layers, of attention and of the vision tower over the measured matrix rate, and for "
    "each token the weights (shared by a batch) and the clip's keys and values over the measured copy rate.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time extraction with both models at real size with random weights, against plain loops."""

    size: Literal["7b", "small"] = option("7b", "of the models; small: to try the program on a CPU")
    model: Literal["both", "eventgpt", "videollava"] = option("both", "which one to time")
    quantization: Literal["4bit", "none"] = option("none", "4bit: as a checkpoint loaded so")
    clips: int | None = option(None, "clips that ours answers; if not said: three batches")
    plain_clips: int = option(6, "clips answered one at a time")
    plain_batch_size: int = option(32, "clips in a batch of transformers")
    batch_size: int | None = option(None, "clips at a time, ours; if not said: as many as the free memory holds")
    questions: int = option(10, "questions a clip, where there are several")
    max_new_tokens: int = option(50, "tokens of every answer")
    files: int = option(48, "made-up videos and pictures in the sizes of the real ones, read over and over; 0: none")
    num_workers: int | None = option(None, "threads that read them; if not said: one a core")
    output: Path = option(Path("benchmark_extract.json"), "where all numbers go")
    compare: Path | None = option(None, "an earlier output: print old, new and ratio of each figure")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "of the weights")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self):
        if self.num_workers is None:
            object.__setattr__(self, "num_workers", len(os.sched_getaffinity(0)))
        counts = [name for name in ("clips", "batch_size") if getattr(self, name) is not None]
        check_counts(self, ("plain_clips", "plain_batch_size", "questions", "max_new_tokens", "num_workers", *counts))
        if self.files < 0:
            raise UserError(f"--files must be 0 (none) or more, got {self.files}")


# ------------------------------------------------------------------------------------------------------ made up
def make_files(folder: Path, count: int) -> None:
    """A data set folder of `count` clips: MP4s of 20 frames and event pictures, as large as the real ones."""
    import numpy as np

    from clips.events import render_events
    from clips.pictures import write_png
    from clips.videos import write_video

    random = np.random.default_rng(0)
    sight = random.integers(0, 255, (VIDEO_SIZE[0] // 12, VIDEO_SIZE[1] // 12 + 8 * count + 20, 3), dtype=np.uint8)
    sight = sight.repeat(12, 0).repeat(12, 1)            # a street of large squares, driven along
    for name in ("mp4", "event_image"):
        (folder / name / "street_00_a").mkdir(parents=True)
    for clip in range(count):
        left = 12 * 8 * clip
        write_video(folder / "mp4" / "street_00_a" / f"{clip:06d}.mp4",
                    (np.ascontiguousarray(sight[:, left + 12 * k:left + 12 * k + VIDEO_SIZE[1]]) for k in range(20)))
        y, x = (random.integers(0, side, EVENTS) for side in EVENT_SIZE)
        write_png(folder / "event_image" / "street_00_a" / f"{clip:06d}_0.png",
                  render_events(x, y, random.integers(0, 2, EVENTS), EVENT_SIZE))


def random_pixels(model, pictures: int, clips: int) -> list:
    """Of `clips` clips; a few different ones, in turn."""
    import numpy as np

    side, random = model.pixels.crop, np.random.default_rng(0)
    few = [model.prepare(list(random.integers(0, 255, (pictures, side, side, 3), dtype=np.uint8)))
           for _ in range(8)]
    return [few[number % len(few)] for number in range(clips)]


# ----------------------------------------------------------------------------------------------------- the ways
def one_by_one(model, pixels: list, question: str, config: Config) -> dict:
    """transformers' generate, a clip at a time."""
    from machine.timing import timed

    seconds = [timed(lambda clip=clip: model.answer([clip], [question], config.max_new_tokens),
                              model.runtime.device)[1] for clip in (pixels[0], *pixels[:config.plain_clips])]
    seconds = seconds[1:]                                    # the first warms up
    return {"clips": len(seconds), "samples_per_s": len(seconds) / sum(seconds), "s_min": min(seconds),
            "s_median": statistics.median(seconds), "s_max": max(seconds)}


def in_batches(model, pixels: list, question: str, config: Config) -> dict:
    """transformers' generate in batches, fewer at a time if memory is short."""
    import torch

    from machine.timing import timed
    from vlm.loading import free_memory

    size = min(config.plain_batch_size, len(pixels))
    while True:
        try:
            some, asked = pixels[:size], [question] * size
            seconds = [timed(lambda some=some, asked=asked: model.answer(some, asked, config.max_new_tokens),
                                      model.runtime.device)[1] for _ in range(2)]       # the first warms up
            return {"batch_size": size, "samples_per_s": size / seconds[-1], "s": seconds[-1]}
        except torch.OutOfMemoryError:
            if size == 1:
                return {"batch_size": 0, "samples_per_s": None, "s": None}
        size //= 2
        free_memory()


def ours(model, which: str, questions: list[str], samples: list, read, config: Config, size: int) -> dict:
    """extract_tokens_train.Answering over all samples, timed as a whole, after one batch to warm up."""
    from benchmarks.limits import memory
    from extract_tokens_train import Answering
    from machine.timing import timed

    before, failed = memory(model.runtime.device), []

    def keep(samples: list, answers: list) -> None:
        assert all(len(answer.tokens) == config.max_new_tokens for one in answers for answer in one)

    answering = Answering(which, model, read, questions, size, failed, config)
    answering.run(samples[:size], keep)
    _, seconds = timed(lambda: answering.run(samples, keep), model.runtime.device)
    assert not failed, failed[0]
    graph, answering.engine = bool(answering.engine.graph), None
    return {"batch_size": answering.size, "questions": len(questions), "answers": len(samples) * len(questions),
            "answers_per_s": len(samples) * len(questions) / seconds, "seconds": seconds, "graph": graph,
            "peak_mib": memory(model.runtime.device)["peak"], "held_before_mib": before["held"]}


def loader(model, samples: list, read, config: Config) -> dict:
    """The files alone: read, decoded and prepared, by the threads that extraction uses."""
    from clips.dataset import read_ahead

    threads = config.num_workers
    ahead = read_ahead(lambda sample: model.prepare(read(sample)), samples, threads, 4 * threads)
    start = time.perf_counter()
    for _, pixels in ahead:
        assert not isinstance(pixels, Exception), pixels
    return {"clips": len(samples), "threads": threads,
            "samples_per_s": len(samples) / (time.perf_counter() - start)}


# -------------------------------------------------------------------------------------------------------- limits
def limit(model, questions: int, prompt: int, words: int, size: int, config: Config) -> dict:
    """Seconds that one clip's answers take at least: operations over the matrix rate and bytes over the copy rate."""
    from benchmarks.limits import copy_rate, matmul_rate
    from vlm.llama import position_bytes

    device, dtype = model.runtime.device, model.runtime.dtype
    language, head = model.decoder
    shape = language.config
    layers = [weight for name, weight in language.named_parameters() if name.startswith("layers.")]
    # 4-bit weights are two in a byte; products are computed in 16 bits all the same.
    parameters = sum(weight.numel() * (1 + (weight.dtype.itemsize == 1)) for weight in layers if weight.dim() > 1)
    weights = sum(weight.nbytes for weight in [*layers, *head.parameters()])
    tower = sum(weight.numel() for name, weight in model.model.named_parameters()
                if ("tower" in name or "proj" in name) and "language_model" not in name and weight.dim() > 1)
    attended = shape.num_hidden_layers * shape.hidden_size * (prompt ** 2 + 2 * questions * words * prompt) * 2
    operations = 2 * parameters * (prompt + questions * words) + attended + 2 * tower * prompt
    kept = prompt * position_bytes(shape, dtype)
    rows = size * questions
    read = (config.max_new_tokens - 1) * (kept + weights * questions / rows)
    rates = matmul_rate(device, dtype), copy_rate(device)
    return {"tflop_per_clip": operations / 1e12, "gib_per_clip": read / 2**30, "matmul_tflop_per_s": rates[0] / 1e12,
            "copy_gib_per_s": rates[1] / 2**30, "prefill_s": operations / rates[0], "decode_s": read / rates[1],
            "answers_per_s": questions / (operations / rates[0] + read / rates[1])}


# ------------------------------------------------------------------------------------------------------ measure
def measure_model(which: str, folder: Path, config: Config) -> dict:
    import functools

    from benchmarks.limits import memory
    from clips.dataset import Sample, draft_pictures, read_dataset, target_pictures
    from machine.device import Runtime
    from vlm.batches import clips_that_fit, prompt_of
    from vlm.eventgpt import EventGPT
    from vlm.loading import weights_mib
    from vlm.peers import QUERY, random_model
    from vlm.video_llava import VideoLlava

    runtime = Runtime.choose(config.device, config.dtype, config.quantization)
    memory(runtime.device)
    model = random_model(EventGPT if which == "eventgpt" else VideoLlava, config.size, runtime)
    held, pictures = memory(runtime.device)["held"], 1 if which == "eventgpt" else 8
    several = [f"{QUERY} {'And why? ' * (number % 3)}".strip() for number in range(config.questions)]
    sizes = [config.batch_size or clips_that_fit(model, asked, config.max_new_tokens, pictures)
             for asked in ([QUERY], several)]
    clips = config.clips or 3 * sizes[0]
    pixels = random_pixels(model, pictures, max(clips, config.plain_clips, config.plain_batch_size))
    samples = [Sample(number, str(number), "street_00_a", number) for number in range(clips)]
    log(f"benchmark | {which} | weights {weights_mib(model.model):.0f} MiB | {sizes[0]} clips at a time, {sizes[1]} "
        f"with {config.questions} questions")

    def at_hand(sample: Sample):
        return pixels[sample.index]

    found = {"weights_gib": weights_mib(model.model) / 1024, "held_mib": held,
             "one at a time": one_by_one(model, pixels, QUERY, config),
             "batches of transformers": in_batches(model, pixels, QUERY, config)}
    prepare, model.prepare = model.prepare, lambda pixels: pixels             # they are prepared already
    found["ours"] = ours(model, which, [QUERY], samples, at_hand, config, sizes[0])
    fewer = samples[:max(2 * sizes[1], len(samples) // config.questions)]
    found["ours, several questions"] = ours(model, which, several, fewer, at_hand, config, sizes[1])
    model.prepare = prepare
    if config.files:
        read = draft_pictures if which == "eventgpt" else target_pictures
        read = functools.partial(read, **({"which": "first"} if which == "eventgpt" else {"num_frames": 8}))
        made = [sample for sample in read_dataset(folder) if sample.event_images and sample.video]
        files = [dataclasses.replace(made[number % len(made)], index=number) for number in range(clips)]
        found["files alone"] = loader(model, files[:max(4 * len(made), 64)], read, config)
        found["ours, with files"] = ours(model, which, [QUERY], files, read, config, sizes[0])
    for name, asked in (("ours", [QUERY]), ("ours, several questions", several)):
        prompt, after = prompt_of(model, asked, pictures)
        words = statistics.mean(map(len, after)) + config.max_new_tokens - 1
        found[name]["limit"] = limit(model, len(asked), prompt, words, found[name]["batch_size"], config)
        found[name]["share_of_limit"] = found[name]["answers_per_s"] / found[name]["limit"]["answers_per_s"]
    model.unload()
    return found


def measure(config: Config) -> dict:
    from machine.device import Runtime, device_name

    runtime = Runtime.choose(config.device, config.dtype, config.quantization)
    names = ("eventgpt", "videollava") if config.model == "both" else (config.model,)
    with tempfile.TemporaryDirectory() as folder:
        if config.files:
            log(f"benchmark | making {config.files} videos and event pictures in the sizes of the real ones")
            make_files(Path(folder), config.files)
        models = {which: measure_model(which, Path(folder), config) for which in names}
    results = {"size": config.size, "device": device_name(runtime.device), "dtype": config.dtype,
               "quantization": config.quantization, "what": WHAT, "models": models}
    return {**results, "wanted": wanted(models) if config.size == "7b" else []}


def wanted(models: dict) -> list[dict]:
    rows = []
    for which, found in models.items():
        rate, one = found["ours"]["answers_per_s"], found["one at a time"]["samples_per_s"]
        per_s, times = WANTED[which]
        rows += [(f"{which}: samples/s", rate, f">= {per_s}"),
                 (f"{which}: times one at a time", rate / one, f">= {times}")]
        several = found["ours, several questions"]
        if which == "videollava":
            rows += [(f"{which}, {several['questions']} questions: pairs/s", several["answers_per_s"], ">= 45, or"),
                     (f"{which}, {several['questions']} questions: times the pairs/s of one",
                      several["answers_per_s"] / rate, ">= 3")]
    return [{"what": what, "measured": measured, "wanted": bound} for what, measured, bound in rows]


def show(results: dict) -> None:
    for line in results["what"]:
        log(f"benchmark | {line}")
    for which, found in results["models"].items():
        one = found["one at a time"]["samples_per_s"]
        log(f"table | {which} | weights {found['weights_gib']:.2f} GiB")
        for name, part in found.items():
            if not isinstance(part, dict) or part.get("samples_per_s", part.get("answers_per_s")) is None:
                continue
            rate, facts = part.get("samples_per_s", part.get("answers_per_s")), []
            if "batch_size" in part:
                facts.append(f"{part['batch_size']} clips at a time")
            if part.get("peak_mib"):
                facts.append(f"peak {part['peak_mib'] / 1024:.1f} GiB")
            if "limit" in part:
                facts.append(f"{part['share_of_limit']:.0%} of the limit {part['limit']['answers_per_s']:.1f}/s")
            log(" | ".join([f"table | {which} | {name:24}", f"{rate:8.2f}/s", f"{rate / one:6.1f}x", *facts]))


def one_line(results: dict) -> str:
    rates = {which: (found["ours"]["answers_per_s"], found["one at a time"]["samples_per_s"])
             for which, found in results["models"].items()}
    return ", ".join(f"{which} {ours:.2f} samples/s, {ours / one:.1f} times one at a time"
                     for which, (ours, one) in rates.items())
