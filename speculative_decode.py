"""Step 3: the target's own words, sooner: draft, adapter and target decode a data set together, checked and timed.

    python speculative_decode.py --task task/1s_20260128_020530 --draft_model models/EventGPT-7b --compare \\
        --dataset_dir data/my_egpt_dsec_test/my_egpt_dsec_seq_1s

EventGPT answers for every clip first and is unloaded. Then Video-LLaVA answers, clip by clip in the order they were
driven: a drafter proposes tokens, one pass verifies them, and what comes out is what greedy decoding says. With
--compare each answer is also decoded plainly, by transformers and by our own loop, and by every other drafter.
Writes decode.json, DECODE.md and pictures into a new folder decode_{time} inside the task folder. Exit 3: an answer
differs from plain decoding by more than rounding.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from base import (
    Progress,
    UserError,
    as_json,
    check_counts,
    log,
    now,
    option,
    parse_config,
    provenance,
    required,
)
from drafting.table import LIVE, LIVE_NAMES, LiveParts
from machine.files import make_folder, new_task_folder, only_writer, read_json, reading, write_json
from machine.running import run
from pairs.splits import clip_order
from reports.decode_figures import one_line, totals
from reports.decode_report import write_decode_report
from reports.task_figures import REMEASURE

if TYPE_CHECKING:                  # torch and vlm are imported only after the flags are read
    from clips.dataset import Sample
    from decoding.loop import Decoded

DRAFTERS = LIVE_NAMES
MAX_GAMMA = 16                     # proposals a pass with --gamma auto: verifying 17 costs little more than one
SLACK = 8                          # positions by which a clip's prompt may be longer than the first clip's
PARALLEL_CLIPS = 32                # clips that --parallel reads beforehand and decodes


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Decode a data set speculatively with a trained task; check and time it."""

    task: Path = required("task folder of train_and_evaluate.py")
    dataset_dir: Path = required("data set folder, with event_image/ and mp4/")
    draft_model: Path = required("folder of the EventGPT checkpoint")
    target_model: str = option("LanguageBind/Video-LLaVA-7B-hf", "folder or hub id of Video-LLaVA")
    drafter: Literal[LIVE_NAMES] = option(
        "hybrid", "adapter and memory together, either alone, prompt lookup, EventGPT's own tokens, or nothing")
    memory: list[Path] | None = option(None, "memory.npz of earlier decodings, known from the start")
    gamma: str = option("auto", "tokens proposed for each pass, 1 to 16; auto: while they are worth their cost")
    compare: bool = option(False, "decode plainly too, by transformers and by our loop, and with every drafter")
    parallel: bool = option(False, "measure both models at work at once too (both in memory), on the first clips")
    draft_device: str = option("auto", "with --parallel: where EventGPT runs; auto: beside the target, on --device")
    max_samples: int = option(-1, "use only the first so many clips; -1: all")
    max_new_tokens: int = option(50, "longest answer, in tokens")
    query: str = option("What are the key elements in this scene?", "the question asked about every clip")
    questions_file: Path | None = option(None, "ask these instead: JSON list of strings or {question, ...}, or lines")
    num_questions: int = option(-1, "use only the first so many questions of the file; -1: all")
    temperature: float = option(0.0, "above 0: sample from the target's distribution instead, just as losslessly")
    shuffle: bool = option(False, "decode the clips in random order: shows what the order is worth to a memory")
    quantization: Literal["auto", "4bit", "8bit", "none"] = option("auto", "auto: 4bit on a GPU, none on a CPU")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "auto: bfloat16 on a GPU, else float32")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    num_frames: int = option(8, "video frames shown to the target")
    event_images: Literal["first", "all"] = option("first", "event pictures shown to the draft")
    num_workers: int = option(4, "threads that read pictures and videos ahead of the model")
    seed: int = option(42, "for --temperature and --shuffle")
    output_folder: Path | None = option(None, "exactly this folder, instead of a new one in the task folder")
    plots: bool = option(True, "draw the pictures")

    def __post_init__(self):
        check_gamma(self.gamma)
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be 0 or more, got {self.temperature}")
        if 0 < self.temperature < 0.01:
            raise UserError(f"--temperature must be 0 (greedy) or from 0.01, got {self.temperature}")
        if self.temperature and (self.compare or self.parallel):
            raise UserError(f"--{'compare' if self.compare else 'parallel'} needs greedy answers: sampled ones "
                            "differ by chance; leave out --temperature")
        if self.draft_device != "auto" and not self.parallel:
            raise UserError("--draft_device belongs to --parallel: without it both run on --device")
        if not self.query.strip():
            raise UserError("--query is empty: wanted a question")
        check_counts(self, ("max_new_tokens", "num_frames", "num_workers"), ("max_samples", "num_questions"))
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}")
        if self.output_folder and (self.output_folder / "DECODE.md").exists():
            raise UserError(f"{self.output_folder} holds a finished decoding (DECODE.md), nothing was changed; "
                            "choose another --output_folder")
        if self.output_folder and (self.output_folder / "results.json").exists():
            raise UserError(f"{self.output_folder} is a task folder, whose memory.npz would be written over; choose "
                            "another --output_folder")
        if not self.draft_model.is_dir():
            raise UserError(f"no such folder: {self.draft_model}; wanted the folder of the EventGPT checkpoint")


def check_gamma(gamma: str) -> None:
    if gamma != "auto" and gamma not in map(str, range(1, MAX_GAMMA + 1)):
        raise UserError(f"--gamma must be auto or from 1 to {MAX_GAMMA}, got {gamma[:40]}")


# ------------------------------------------------------------------------------------------------------- task
@dataclasses.dataclass
class Task:
    """What training left: the adapter, its memory, and what is known of both."""

    folder: Path
    adapter: object                        # TokenAdapter
    answers: list[list[int]]               # target answers of training: what a memory begins with
    verified: list[list[int]]              # and those of earlier decodings, which count as fresh ones
    share: float                           # of the memory in the hybrid
    simulated: dict                        # drafter -> gamma -> tau on the test pairs
    models: dict                           # eventgpt, videollava -> recorded name, revision, vocab_size; {} if none


def read_task(folder: Path, memories: list[Path] = ()) -> Task:
    from drafting.memory import load_memory
    from token_adapter import load_adapter

    for name in ("best_model.pt", "results.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no finished task: it has no {name}; wanted a folder that "
                            "train_and_evaluate.py wrote")
    results = read_json(folder / "results.json")
    if isinstance(results, dict) and results.get("unfinished"):
        raise UserError(f"{folder} is unfinished: go on with train_and_evaluate.py --resume {folder}")
    test = (results.get("metrics") or {}).get("test") if isinstance(results, dict) else None
    if not isinstance(test, dict) or not isinstance(test.get("drafters"), dict):
        raise UserError(f"{folder / 'results.json'} is not the results.json of train_and_evaluate.py")
    adapter = load_adapter(folder / "best_model.pt")
    memory = folder / "memory.npz"
    if not memory.exists():
        log(f"decode | {folder} has no memory.npz: the memory begins without training answers")
    verified = [answer for path in memories for answer in load_memory(path)]
    with reading(folder / "results.json", REMEASURE):
        trained_on = [file.get("models") or {} for file in (results.get("files") or {}).get("train") or []]
        models = {which: dict(facts) for which, facts in next(filter(None, trained_on), {}).items()}
        share = (test.get("memory_share") or {}).get("hybrid")
        simulated = {name: {gamma: float(found["tau"]) for gamma, found in drafter.get("simulated", {}).items()}
                     for name, drafter in test["drafters"].items()}
        share = 0.5 if share is None else float(share)
    return Task(folder, adapter, load_memory(memory) if memory.exists() else [], verified, share, simulated, models)


def check_model(task: Task, which: Literal["eventgpt", "videollava"], name: str, revision: str,
                vocab_size: int) -> None:
    """The adapter was trained on this model's answers, as far as its pair files say whose they were."""
    recorded = task.models.get(which) or {}
    for key, found in (("vocab_size", vocab_size), ("revision", revision)):
        trained = recorded.get(key)
        if trained in (None, "local", "unknown", found):         # "local": before digests were recorded
            continue
        if key == "revision" and str(trained).startswith("local ") != found.startswith("local "):
            log(f"decode | WARNING | {name}: whether {found} is {trained}, which the task was trained for, can't be "
                "told: one is a folder, the other a hub's")
            continue
        raise UserError(f"{task.folder} was trained on answers of {recorded.get('name')} ({key} {trained}), but "
                        f"{name} has {key} {found}; decode with that model, or train on pairs of this one")


def make_drafter(name: str, task: Task):
    return LIVE[name].make_live(LiveParts(task.adapter, task.answers, task.verified, task.share))


def reads_draft(name: str, task: Task) -> bool:
    """Whether this drafter needs EventGPT's answer at all."""
    return LIVE[name].reads_draft(task.adapter.config.conditioning)


# ------------------------------------------------------------------------------------------------ both models
def clips(model, read: Callable, samples: list[Sample], failed: list[dict], which: str,
          config: DecodeConfig) -> Iterator[tuple]:
    """Yield (sample, pixels) in order; a clip that can't be read is added to `failed`."""
    from clips.dataset import read_ahead

    ahead = 2 * config.num_workers
    for sample, pixels in read_ahead(lambda sample: model.prepare(read(sample)), samples, config.num_workers, ahead):
        if isinstance(pixels, Exception):
            failed.append({"sample_id": sample.id, "sequence": sample.sequence, "clip": sample.clip, "model": which,
                           "reason": str(pixels)})
            log(f"decode | {which} | WARNING | clip {sample.key} failed: {pixels}")
        else:
            yield sample, pixels


def prompted(model, pixels, questions: list[str], config: DecodeConfig):
    """The model's decoder on a static cache with room for the longest prompt, an answer and a round's proposals."""
    from vlm.loading import check_positions
    from vlm.steps import Prompted, Steps

    longest = max(model.prompt_embeds(pixels, question).shape[1] for question in questions)
    room = longest + SLACK + config.max_new_tokens + MAX_GAMMA
    check_positions(longest, config.max_new_tokens, model.max_positions)
    steps = Steps(*model.decoder, room=room)
    log(f"decode | keys and values: {steps.bytes / 2**20:,.0f} MiB for {room} positions")
    return Prompted(steps)


def draft_all(samples: list[Sample], questions: list[str], failed: list[dict], task: Task, runtime,
              config: DecodeConfig) -> tuple[dict, dict]:
    """EventGPT's answer for every clip and question: {(key, question number): (tokens, seconds)}, and its costs."""
    import functools

    import decoding.loop as decoding
    from clips.dataset import draft_pictures
    from drafting.contract import NoDrafts
    from vlm.eventgpt import EventGPT

    model = EventGPT.load(config.draft_model, runtime)
    check_model(task, "eventgpt", str(config.draft_model), model.revision, model.vocab_size)
    target, drafts, costs, eos = None, {}, {}, model.tokenizer.eos_token_id
    progress = Progress("decode | drafts", len(samples) * len(questions), unit="answers")
    for sample, pixels in clips(model, functools.partial(draft_pictures, which=config.event_images), samples, failed,
                                "eventgpt", config):
        if target is None:
            target = prompted(model, pixels, questions, config)
            costs = decoding.measure_costs(target, model, pixels, questions[0], runtime.device, sizes=(1,))
        for number, question in enumerate(questions):
            def answer(target=target, pixels=pixels, question=question) -> Decoded:
                target.ask(model.prompt_embeds(pixels, question))
                return decoding.decode(target, NoDrafts(), config.max_new_tokens, eos, 1)

            found, seconds = decoding.timed(answer, runtime.device)
            drafts[sample.key, number] = found.tokens, seconds
            progress.update(len(drafts))
    answer = target = None                              # they hold the weights
    model.unload()
    if not drafts:
        raise UserError(f"none of {len(samples)} clips could be read; the first reason: {failed[0]['reason']}")
    return drafts, costs


# --------------------------------------------------------------------------------------------------- decoding
class Decoder:
    """One drafter at work: its memory and its pace go from answer to answer."""

    def __init__(self, name: str, task: Task, target, costs: dict, eos: int, config: DecodeConfig):
        import decoding.loop as decoding

        self.name, self.target, self.eos, self.config = name, target, eos, config
        self.drafter = make_drafter(name, task)
        self.gamma = MAX_GAMMA if config.gamma == "auto" else int(config.gamma)
        self.rule = decoding.Sampling(config.temperature, config.seed) if config.temperature else decoding.greedy
        self.costs, self.pace = costs, None

    def set_pace(self, draft: list[int], question: list[int], answer: list[int], device) -> None:
        """Measure what proposals cost this drafter; with --gamma auto it weighs them from now on."""
        import decoding.loop as decoding

        verify = self.costs["verify"]
        slope_s = max(0.0, (verify[max(verify)] - verify[1]) / (max(verify) - 1))
        found = self.drafter.measure(draft, question, answer, lambda work: decoding.median_s(work, device), slope_s)
        self.costs.setdefault("proposal", {})[self.name] = found.proposal_s
        if found.adapter_step_s:
            self.costs["adapter_step"] = found.adapter_step_s
        if self.config.gamma == "auto":
            self.pace = decoding.Pace(verify[1])

    def answer(self, embeds, draft: list[int], question: list[int]) -> Decoded:
        import decoding.loop as decoding

        start = time.perf_counter()
        self.drafter.begin(draft, question)
        begin_s = time.perf_counter() - start
        self.target.ask(embeds)
        price = self.pace.price if self.pace else lambda: 0.0
        found = decoding.decode(self.target, self.drafter, self.config.max_new_tokens, self.eos, self.gamma, price,
                                self.rule)
        found.draft_s += begin_s
        if self.pace:
            self.pace.add(found)
        return found


def decode_all(samples: list[Sample], questions: list[str], drafts: dict, failed: list[dict], task: Task, runtime,
               config: DecodeConfig) -> dict:
    """Every answer by the chosen drafter, and with --compare by all of them and by transformers."""
    import functools

    import torch

    import decoding.loop as decoding
    from clips.dataset import target_pictures
    from vlm.video_llava import VideoLlava

    model = VideoLlava.load(config.target_model, runtime)
    check_model(task, "videollava", config.target_model, model.revision, model.vocab_size)
    task.adapter.to(runtime.device)
    device, target, decoders, rows, costs, noise = runtime.device, None, [], [], {}, 0.0
    progress = Progress("decode | answers", len(drafts), unit="answers")
    for sample, pixels in clips(model, functools.partial(target_pictures, num_frames=config.num_frames), samples,
                                failed, "videollava", config):
        for number, question in enumerate(questions):
            draft, draft_s = drafts[sample.key, number]
            words = model.tokenizer(question, add_special_tokens=False).input_ids
            if target is None:
                target = prompted(model, pixels, questions, config)
                costs = decoding.measure_costs(target, model, pixels, question, device, range(1, MAX_GAMMA + 2))
                decoders, noise = begin(target, model, pixels, question, draft, words, costs, task, config)
            embeds, vision_s = decoding.timed(
                lambda pixels=pixels, question=question: model.prompt_embeds(pixels, question), device)
            found = {decoder.name: decoder.answer(embeds, draft, words) for decoder in decoders}
            ours = found[config.drafter].tokens
            row = {"sample_id": sample.id, "sequence": sample.sequence, "clip": sample.clip, "question_idx": number,
                   "query": question, "text": model.tokenizer.decode(ours, skip_special_tokens=True).strip(),
                   "tokens": ours, "vision_s": vision_s, "eventgpt_s": draft_s, "runs": {}}
            for name, decoded in found.items():
                row["runs"][name] = {**dataclasses.asdict(decoded), "tokens": len(decoded.tokens)}
                if config.compare:
                    row["runs"][name] |= decoding.judge(decoded.tokens, found["none"].tokens, target, embeds, noise)
            if config.compare:
                def generate(length: int, pixels=pixels, question=question) -> list[int]:
                    return model.answer([pixels], [question], length)[0].tokens

                tokens, all_s = decoding.timed(lambda generate=generate: generate(config.max_new_tokens), device)
                row["generate"] = {"tokens": len(tokens), "all_s": all_s,
                                   "first_token_s": decoding.timed(lambda generate=generate: generate(1), device)[1],
                                   **decoding.judge(found["none"].tokens, tokens, target, embeds, noise)}
            rows.append(row)
            progress.update(len(rows))
    if not rows:
        raise UserError(f"none of {len(samples)} clips could be decoded; the first reason: {failed[0]['reason']}")
    decoded = {(row["sequence"], row["clip"]) for row in rows}
    both = [sample for sample in samples if (sample.sequence, sample.clip) in decoded][:PARALLEL_CLIPS]
    try:
        together = config.parallel and in_parallel(both, questions[0], model, target, task, costs, runtime, config)
    except torch.OutOfMemoryError as error:
        log(f"decode | WARNING | not measured in parallel: both models don't fit into memory ({error})")
        together = None
    facts = {"name": config.target_model, "revision": model.revision, "vocab_size": model.vocab_size}
    decoders = target = None                              # they hold the weights
    model.unload()
    return {"target": facts, "noise": noise, "costs": costs, "answers": rows, "failed": failed,
            "parallel": together or None}


def in_parallel(samples: list[Sample], question: str, model, target, task: Task, costs: dict, runtime,
                config: DecodeConfig) -> dict:
    """Seconds for the first clips with EventGPT drafting each next clip while the target decodes, and without drafts.

    Both run whole, one after the other, over clips that are in memory already; the drafter begins anew.
    """
    import torch

    import decoding.loop as decoding
    from clips.dataset import draft_pictures, target_pictures
    from drafting.contract import NoDrafts
    from machine.device import Runtime
    from vlm.eventgpt import EventGPT

    beside = runtime if config.draft_device == "auto" else Runtime.choose(
        config.draft_device, config.dtype, config.quantization)
    eventgpt = EventGPT.load(config.draft_model, beside)
    both = [(eventgpt.prepare(draft_pictures(sample, config.event_images)),
             model.prepare(target_pictures(sample, config.num_frames))) for sample in samples]
    short = prompted(eventgpt, both[0][0], [question], config)
    words, eos = model.tokenizer(question, add_special_tokens=False).input_ids, model.tokenizer.eos_token_id
    gpu = beside.device.type == "cuda"
    stream = torch.cuda.Stream(beside.device) if gpu else None

    def draft(number: int) -> list[int]:
        with torch.cuda.stream(stream) if gpu else contextlib.nullcontext():
            short.ask(eventgpt.prompt_embeds(both[number][0], question))
            eos = eventgpt.tokenizer.eos_token_id
            return decoding.decode(short, NoDrafts(), config.max_new_tokens, eos, 1).tokens

    def speculative(decoder: Decoder) -> None:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            coming = pool.submit(draft, 0)
            for number, (_, pixels) in enumerate(both):
                tokens = coming.result()
                if number + 1 < len(both):
                    coming = pool.submit(draft, number + 1)
                decoder.answer(model.prompt_embeds(pixels, question), tokens, words)

    def plain(decoder: Decoder) -> None:
        for _, pixels in both:
            decoder.answer(model.prompt_embeds(pixels, question), [], words)

    first, seconds = draft(0), {}
    for name, work in ((config.drafter, speculative), ("none", plain)):
        decoder = Decoder(name, task, target, copy.deepcopy(costs), eos, config)      # those of the run stay
        decoder.set_pace(first, words, first[:1], runtime.device)
        seconds[work.__name__] = decoding.timed(lambda work=work, decoder=decoder: work(decoder), runtime.device)[1]
    log(f"decode | in parallel | {len(both)} clips in {seconds['speculative']:.2f} s, plain {seconds['plain']:.2f} s")
    short = None                                          # it holds the weights
    eventgpt.unload()
    return {"clips": len(both), "all_s": seconds["speculative"], "plain_all_s": seconds["plain"],
            "draft_device": str(beside.device)}


def begin(target, model, pixels, question: str, draft: list[int], words: list[int], costs: dict, task: Task,
          config: DecodeConfig) -> tuple[list[Decoder], float]:
    """The drafters with their measured costs, and the gap between two logits up to which they count as tied."""
    import decoding.loop as decoding

    device, eos = model.runtime.device, model.tokenizer.eos_token_id
    embeds = model.prompt_embeds(pixels, question)
    if config.compare:
        model.answer([pixels], [question], 2)              # transformers' first call is slow and not to be timed
    plain = Decoder("none", task, target, costs, eos, config)
    tokens = plain.answer(embeds, draft, words).tokens
    # Each of two logits may be off either way: twice the rounding, and a margin.
    noise = 4 * decoding.rounding(target, model, embeds, tokens)
    names = DRAFTERS if config.compare else (config.drafter,)
    decoders = [Decoder(name, task, target, costs, eos, config) for name in names]
    for decoder in decoders:
        decoder.set_pace(draft, words, tokens[:1], device)
    verify, proposal_s = costs["verify"], costs["proposal"][config.drafter]
    log(f"decode | one token takes {1000 * verify[1]:.2f} ms, verifying 9 {1000 * verify[9]:.2f} ms, a proposal of "
        f"{config.drafter} {1000 * proposal_s:.2f} ms | tied: logits within {noise:.2g}")
    return decoders, noise


# ---------------------------------------------------------------------------------------------------- results
def in_order(samples: list[Sample], config: DecodeConfig) -> list[Sample]:
    """As they were driven, sequence by sequence, so that a memory sees yesterday's answers; or shuffled."""
    if config.shuffle:
        return random.Random(config.seed).sample(samples, len(samples))
    order = clip_order([sample.sequence for sample in samples], [sample.clip for sample in samples])
    return [samples[number] for number in order]


def main() -> None:
    config = parse_config(DecodeConfig)
    task = read_task(config.task, config.memory or [])
    with only_writer(make_folder(config.output_folder)) if config.output_folder else contextlib.nullcontext():
        decode_and_measure(task, config)


def decode_and_measure(task: Task, config: DecodeConfig) -> None:

    import decoding.loop as decoding
    from clips.dataset import read_dataset, read_questions
    from drafting.memory import save_memory
    from machine.device import Runtime, device_name

    questions = read_questions(config.query, config.questions_file, config.num_questions)
    samples = read_dataset(config.dataset_dir)[:config.max_samples if config.max_samples > 0 else None]
    runtime = Runtime.choose(config.device, config.dtype, config.quantization)
    failed = [{"sample_id": sample.id, "sequence": sample.sequence, "clip": sample.clip, "model": None,
               "reason": sample.trouble} for sample in samples if sample.trouble]
    usable = in_order([sample for sample in samples if not sample.trouble], config)
    if config.parallel:
        Runtime.choose(config.draft_device, config.dtype, config.quantization)       # a mistake is said before hours
    if not config.output_folder:
        make_folder(config.task)
    drafts, draft_costs = draft_all(usable, questions, failed, task, runtime, config)
    drafted = [sample for sample in usable if (sample.key, 0) in drafts]
    found = decode_all(drafted, questions, drafts, failed, task, runtime, config)
    folder = config.output_folder or new_task_folder(config.task, "decode")
    costs, together = {**found.pop("costs"), "eventgpt": draft_costs}, found.pop("parallel")
    results = {
        "kind": "decoding", "task": config.task.resolve().name, "date": now(),
        "config": as_json(config), "drafter": config.drafter, "gamma": config.gamma, "memory_share": task.share,
        "reads_draft": [name for name in DRAFTERS if reads_draft(name, task)],
        "simulated_tau": task.simulated, "dtype": str(runtime.dtype).removeprefix("torch."),
        "quantization": runtime.quantization, "device": device_name(runtime.device), **found,
        "costs_ms": decoding.milliseconds(costs),
        "totals": {**totals(found["answers"]), "parallel": together}, "provenance": provenance()}
    write_json(folder / "decode.json", results)
    save_memory((answer["tokens"] for answer in found["answers"]), folder / "memory.npz")
    write_decode_report(folder, plots=config.plots)
    log(f"RESULT | {folder} | {one_line(results)}")
    if results["totals"]["verdicts"].get("WRONG"):
        log("ERROR | an answer differs from plain decoding by more than rounding: see DECODE.md")
        sys.exit(3)


if __name__ == "__main__":
    run(main)
