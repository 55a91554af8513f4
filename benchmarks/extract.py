"""Extraction at real size, measured without the weights: `python benchmark.py extract`.

Models with random weights answer questions about made-up clips with the given number of tokens (no
token ends an answer). The plain ways beside ours, in one run on the same clips: transformers'
generate one clip at a time, and in batches. Ours with one question a clip and with several; the
files alone, read and prepared by threads; and all together, as extraction runs it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from base import UserError, check_counts, log, option
from benchmarks.made_up import AllTokens, Prepared, random_pixels
from machine.workers import cores
from vlm.roles import BY_NAME, DRAFT, TARGET, Role, View

if TYPE_CHECKING:                  # torch is imported after the flags are read
    import numpy as np

    from clips.dataset import Sample
    from vlm.contract import VisionLanguageModel

VIDEO_SIZE, EVENT_SIZE = (1080, 1440), (480, 640)      # of the real data, height and width
EVENTS = 550_000                   # in a picture: a fifth of 200 ms of a DSEC recording
# Samples/s, and times the plain loop, that 7b should reach on one H200.
WANTED = {TARGET.name: (12, 12), DRAFT.name: (40, 40)}
PAIRS_PER_S, TIMES_ONE_QUESTION = 45, 3                  # of the target, with several questions
NOTES = (
    "Answers of random weights mean nothing and none ends early: every answer takes all its tokens.",
    "One at a time and batches: transformers' greedy generate over the same prompts and pixels.",
    "Ours: as extract_tokens_train.py runs it, from pixels in memory; with files: reading and preparing "
    "included.",
    "Limit: the products of the layers, of attention and of the vision tower over the measured "
    "matrix rate, and for each token the weights (shared by a batch) and the clip's keys and "
    "values over the measured copy rate.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time extraction with both models at real size with random weights, against plain loops."""

    size: Literal["7b", "small"] = option("7b", "of the models; small: to try the program on a CPU")
    model: str = option("both", f"which model to time: both, {' or '.join(BY_NAME)}")
    quantization: Literal["4bit", "none"] = option("none", "4bit: as a checkpoint loaded so")
    clips: int | None = option(None, "clips that ours answers; default: three batches")
    plain_clips: int = option(6, "clips answered one at a time")
    plain_batch_size: int = option(32, "clips in a batch of transformers")
    batch_size: int | None = option(
        None, "clips at a time, ours; default: as many as the free memory holds")
    questions: int = option(10, "questions a clip, where there are several")
    max_new_tokens: int = option(50, "tokens of every answer")
    files: int = option(
        48, "made-up videos and pictures in the sizes of the real ones, read repeatedly; 0: none")
    num_workers: int | None = option(None, "threads that read them; default: one for each core")
    num_processes: int = option(1, "above 1: time so many processes against one instead, by torchrun")
    output: Path = option(Path("benchmark_extract.json"), "where all numbers go")
    compare: Path | None = option(None,
                                  "an earlier output: print old, new and ratio of each figure")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "of the weights")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self):
        optional = ("clips", "batch_size", "num_workers")
        given = [name for name in optional if getattr(self, name) is not None]
        check_counts(self,
                     ("plain_clips", "plain_batch_size", "questions", "max_new_tokens",
                      "num_processes", *given))
        if self.files < 0:
            raise UserError(f"--files must be 0 (none) or more, got {self.files}")
        if self.model not in ("both", *BY_NAME):
            raise UserError(f"--model must be both or one of {', '.join(BY_NAME)}, got {self.model}")


# ----------------------------------------------------------------------------------------- made up
def make_files(folder: Path, count: int) -> None:
    """A data set folder of `count` clips: MP4s of 20 frames and event pictures in the real sizes."""
    import numpy as np

    from clips.events import render_events
    from clips.pictures import write_png
    from clips.videos import write_video

    random = np.random.default_rng(0)
    height, width = VIDEO_SIZE
    sight = random.integers(0, 255, (height // 12, width // 12 + 8 * count + 20, 3), dtype=np.uint8)
    sight = sight.repeat(12, 0).repeat(12, 1)            # a street of large squares, driven along
    for name in ("mp4", "event_image"):
        (folder / name / "street_00_a").mkdir(parents=True)
    for clip in range(count):
        left = 12 * 8 * clip
        frames = (np.ascontiguousarray(sight[:, start:start + width])
                  for start in range(left, left + 12 * 20, 12))
        write_video(folder / "mp4" / "street_00_a" / f"{clip:06d}.mp4", frames)
        y, x = (random.integers(0, side, EVENTS) for side in EVENT_SIZE)
        write_png(folder / "event_image" / "street_00_a" / f"{clip:06d}_0.png",
                  render_events(x, y, random.integers(0, 2, EVENTS), EVENT_SIZE))


# ---------------------------------------------------------------------------------------- the ways
@dataclasses.dataclass(frozen=True)
class Bench:
    """One model, and the ways in which it can answer about clips, each timed."""

    role: Role
    model: VisionLanguageModel
    max_new_tokens: int
    num_workers: int

    def one_by_one(self, pixels: list, question: str, clips: int) -> dict:
        """transformers' generate, a clip at a time."""
        from machine.timing import timed

        device = self.model.runtime.device
        self.model.answer(pixels[:1], [question], self.max_new_tokens)                # warms up
        seconds = []
        for clip in pixels[:clips]:
            answer = functools.partial(self.model.answer, [clip], [question], self.max_new_tokens)
            seconds.append(timed(answer, device)[1])
        return {"clips": len(seconds), "samples_per_s": len(seconds) / sum(seconds),
                "s_min": min(seconds), "s_median": statistics.median(seconds), "s_max": max(seconds)}

    def in_batches(self, pixels: list, question: str, size: int) -> dict:
        """transformers' generate in batches, fewer at a time if memory is short."""
        import torch

        from machine.timing import timed
        from vlm.loading import free_memory

        while size:
            answer = functools.partial(
                self.model.answer, pixels[:size], [question] * size, self.max_new_tokens)
            try:
                answer()                                                              # warms up
                _, seconds = timed(answer, self.model.runtime.device)
                return {"batch_size": size, "samples_per_s": size / seconds, "s": seconds}
            except torch.OutOfMemoryError:
                size //= 2
            free_memory()
        return {"batch_size": 0, "samples_per_s": None, "s": None}

    def ours(self, questions: list[str], samples: list[Sample], read: Callable, size: int) -> dict:
        """extraction.answering over all samples, timed as a whole, after one batch to warm up."""
        from benchmarks.limits import memory
        from extraction.answering import Answering, Job
        from machine.timing import timed

        device = self.model.runtime.device
        before = memory(device)
        job = Job(self.role.name, read, questions, self.max_new_tokens, self.num_workers)
        answering = Answering(self.model, job, size, AllTokens(self.max_new_tokens))
        answering.run(samples[:size])
        _, seconds = timed(lambda: answering.run(samples), device)
        assert answering.engine is not None
        graph, answering.engine = bool(answering.engine.graph), None
        answers = len(samples) * len(questions)
        return {"batch_size": answering.size, "questions": len(questions), "answers": answers,
                "answers_per_s": answers / seconds, "seconds": seconds, "graph": graph,
                "peak_mib": memory(device)["peak"], "held_before_mib": before["held"]}

    def files_alone(self, samples: list[Sample], read: Callable[[Sample], list[np.ndarray]]) -> dict:
        """The files read, decoded and prepared, by the threads that extraction uses."""
        from clips.dataset import read_ahead

        threads = self.num_workers
        ahead = read_ahead(
            lambda sample: self.model.prepare(read(sample)), samples, threads, 4 * threads)
        start = time.perf_counter()
        for _, pixels in ahead:
            assert not isinstance(pixels, Exception), pixels
        return {"clips": len(samples), "threads": threads,
                "samples_per_s": len(samples) / (time.perf_counter() - start)}

    # -------------------------------------------------------------------------------------- limits
    def limit(self, questions: list[str], pictures: int, size: int) -> dict:
        """The least seconds of one clip's answers, of `size` clips at a time, on this device."""
        prompt, after = self.model.layout(questions, pictures)
        words = statistics.mean(map(len, after)) + self.max_new_tokens - 1
        return limit_of(self.model, Load(len(questions), prompt, words, size, self.max_new_tokens))


@dataclasses.dataclass(frozen=True)
class Load:
    """What a clip asks of the model, in positions, and how many clips share a step's weights."""

    questions: int
    prompt: int                      # positions that all questions share
    words: float                     # further positions of each question and its answer
    size: int                        # clips at a time
    max_new_tokens: int


def limit_of(model: VisionLanguageModel, load: Load) -> dict:
    """The least seconds of one clip's answers: operations over matrix rate, bytes over copy rate."""
    from benchmarks.limits import copy_rate, matmul_rate
    from vlm.llama import position_bytes

    device, dtype = model.runtime.device, model.runtime.dtype
    language, head = model.decoder
    shape, prompt, words, questions = language.config, load.prompt, load.words, load.questions
    layers = [weight for name, weight in language.named_parameters() if name.startswith("layers.")]
    # 4-bit weights are two in a byte; products are computed in 16 bits all the same.
    matrices = [weight for weight in layers if weight.dim() > 1]
    parameters = sum(weight.numel() * (1 + (weight.dtype.itemsize == 1)) for weight in matrices)
    weights = sum(weight.nbytes for weight in [*layers, *head.parameters()])
    tower = sum(weight.numel() for name, weight in model.model.named_parameters()
                if is_of_tower(name) and weight.dim() > 1)
    attended = 2 * shape.num_hidden_layers * shape.hidden_size * (
        prompt ** 2 + 2 * questions * words * prompt)
    operations = 2 * parameters * (prompt + questions * words) + attended + 2 * tower * prompt
    cache = prompt * position_bytes(shape, dtype)
    read = (load.max_new_tokens - 1) * (cache + weights / load.size)
    rates = matmul_rate(device, dtype), copy_rate(device)
    prefill_s, decode_s = operations / rates[0], read / rates[1]
    return {"tflop_per_clip": operations / 1e12, "gib_per_clip": read / 2**30,
            "matmul_tflop_per_s": rates[0] / 1e12, "copy_gib_per_s": rates[1] / 2**30,
            "prefill_s": prefill_s, "decode_s": decode_s,
            "answers_per_s": questions / (prefill_s + decode_s)}


def is_of_tower(name: str) -> bool:
    """Whether this weight is one of the vision tower or the projection behind it."""
    return ("tower" in name or "proj" in name) and "language_model" not in name


# ----------------------------------------------------------------------------------------- measure
def measure_model(bench: Bench, config: Config, folder: Path) -> dict:
    """All figures of one model; folder: made-up files."""
    from benchmarks.limits import memory
    from clips.dataset import Sample
    from vlm.batches import clips_that_fit
    from vlm.loading import weights_mib
    from vlm.peers import QUERY, several_questions

    model, role = bench.model, bench.role
    held, pictures = memory(model.runtime.device)["held"], role.most_pictures([], View())
    asked = {"ours": [QUERY], "ours, several questions": several_questions(config.questions)}
    sizes = {name: config.batch_size or clips_that_fit(model, questions, config.max_new_tokens, pictures)
             for name, questions in asked.items()}
    clips = config.clips or 3 * sizes["ours"]
    pixels = random_pixels(model, pictures, max(clips, config.plain_clips, config.plain_batch_size))
    samples = [Sample(number, str(number), "street_00_a", number) for number in range(clips)]
    fewer = samples[:max(2 * sizes["ours, several questions"], len(samples) // config.questions)]
    log(f"benchmark | {role.name} | weights {weights_mib(model.model):.0f} MiB | {sizes['ours']} "
        f"clips at a time, {sizes['ours, several questions']} with {config.questions} questions")

    figures = {"weights_gib": weights_mib(model.model) / 1024, "held_mib": held,
               "one at a time": bench.one_by_one(pixels, QUERY, config.plain_clips),
               "batches of transformers": bench.in_batches(
                   pixels, QUERY, min(config.plain_batch_size, len(pixels)))}
    ready = dataclasses.replace(bench, model=Prepared(model))
    for name, some in (("ours", samples), ("ours, several questions", fewer)):
        figures[name] = ready.ours(asked[name], some, lambda sample: pixels[sample.index], sizes[name])
    if config.files:
        files = files_of(folder, clips)
        read = functools.partial(role.pictures, view=View())
        figures["files alone"] = bench.files_alone(files[:max(4 * config.files, 64)], read)
        figures["ours, with files"] = bench.ours([QUERY], files, read, sizes["ours"])
    for name, questions in asked.items():
        figures[name]["limit"] = bench.limit(questions, pictures, figures[name]["batch_size"])
        share = figures[name]["answers_per_s"] / figures[name]["limit"]["answers_per_s"]
        figures[name]["share_of_limit"] = share
    return figures


def files_of(folder: Path, clips: int) -> list[Sample]:
    """So many samples of the made-up files, each file again and again."""
    from clips.dataset import read_dataset

    samples = read_dataset(folder)
    return [dataclasses.replace(samples[number % len(samples)], index=number) for number in range(clips)]


def measure(config: Config) -> dict:
    from benchmarks.together import KINDS, together
    from machine.device import Runtime, device_name
    from vlm.peers import random_model

    runtime = Runtime.choose(config.device, config.dtype, config.quantization)
    names = BY_NAME if config.model == "both" else (config.model,)
    models: dict[str, dict] = {}
    facts = {"size": config.size, "device": device_name(runtime.device), "dtype": config.dtype,
             "quantization": config.quantization}
    if config.num_processes > 1:
        return {**facts, "what": NOTES[:1], "models": {}, **together(config, names)}
    with tempfile.TemporaryDirectory() as folder:
        if config.files:
            log(f"benchmark | making {config.files} videos and event pictures in the real sizes")
            make_files(Path(folder), config.files)
        for name in names:
            model = random_model(KINDS[name](), config.size, runtime)
            bench = Bench(BY_NAME[name], model, config.max_new_tokens, config.num_workers or cores())
            models[name] = measure_model(bench, config, Path(folder))
            model.unload()
    return {**facts, "what": NOTES, "models": models, "wanted": wanted(models) if config.size == "7b" else []}


def wanted(models: dict) -> list[dict]:
    """What each model should reach beside what it reached."""
    rows = []
    for name, figures in models.items():
        rate, plain = figures["ours"]["answers_per_s"], figures["one at a time"]["samples_per_s"]
        per_s, times = WANTED[name]
        rows += [(f"{name}: samples/s", rate, f">= {per_s}"),
                 (f"{name}: times one at a time", rate / plain, f">= {times}")]
        several = figures["ours, several questions"]
        if name == TARGET.name:
            what = f"{name}, {several['questions']} questions"
            rows += [(f"{what}: pairs/s", several["answers_per_s"], f">= {PAIRS_PER_S}, or"),
                     (f"{what}: times the pairs/s of one", several["answers_per_s"] / rate,
                      f">= {TIMES_ONE_QUESTION}")]
    return [{"what": what, "measured": measured, "wanted": bound} for what, measured, bound in rows]


def show(results: dict) -> None:
    from benchmarks.together import show_merge, show_together

    for line in results["what"]:
        log(f"benchmark | {line}")
    for name, figures in results.get("together", {}).items():
        show_together(name, figures)
    if "merge" in results:
        show_merge(results["merge"])
    for name, figures in results["models"].items():
        log(f"table | {name} | weights {figures['weights_gib']:.2f} GiB")
        for way, part in figures.items():
            if isinstance(part, dict) and rate_of(part) is not None:
                log(row_of(f"{name} | {way:24}", part, figures["one at a time"]["samples_per_s"]))


def rate_of(part: dict) -> float | None:
    return part.get("samples_per_s", part.get("answers_per_s"))


def row_of(title: str, part: dict, plain: float) -> str:
    """One row of the table. plain: samples/s, one at a time."""
    facts = []
    if "batch_size" in part:
        facts.append(f"{part['batch_size']} clips at a time")
    if part.get("peak_mib"):
        facts.append(f"peak {part['peak_mib'] / 1024:.1f} GiB")
    if "limit" in part:
        facts.append(f"{part['share_of_limit']:.0%} of the limit "
                     f"{part['limit']['answers_per_s']:.1f}/s")
    rate = rate_of(part) or 0.0
    return " | ".join([f"table | {title}", f"{rate:8.2f}/s", f"{rate / plain:6.1f}x", *facts])


def one_line(results: dict) -> str:
    if together := results.get("together"):
        return ", ".join(f"{name}: {figures['processes']} processes {figures['times_one']:.2f} times one"
                         for name, figures in together.items())
    rates = {name: (figures["ours"]["answers_per_s"], figures["one at a time"]["samples_per_s"])
             for name, figures in results["models"].items()}
    return ", ".join(f"{name} {ours:.2f} samples/s, {ours / plain:.1f} times one at a time"
                     for name, (ours, plain) in rates.items())
