"""Live decoding at the target's real size, without its weights: `python benchmark.py decode`.

A Video-LLaVA with random weights replays recorded answers: every pass is computed, and only the
chosen token is replaced by the recorded one. So both time and acceptance are real. Its peers run
beside it on the same answers: three modes of transformers' generate, our loop without drafts, and
every drafter.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from base import UserError, check_counts, log, option, required
from benchmarks.decode_table import TREE, one_line, show, summarise, wanted
from decoding.limits import check_gamma, check_tree
from decoding.task import Task, read_task
from drafting.parts import SimulationParts
from drafting.table import LIVE
from pairs.formats import load_pairs
from pairs.pairs import Pairs
from pairs.splits import check_ids, in_clip_order

if TYPE_CHECKING:                    # torch and vlm are imported only after the flags are read
    from vlm.contract import VisionLanguageModel

__all__ = ["Config", "measure", "one_line", "show"]          # what benchmark.py calls

FRAMES = 8                           # video frames
# Ours that run on a part of the answers alone, as transformers do: they learn from no answer, so a
# part tells all.
ON_A_PART = tuple(name for name, entry in LIVE.items()
                  if not entry.learns and not entry.needs_adapter)

WHAT = (
    "Real: every pass of vision, prefill, drafter and target is computed at this size, on random "
    "frames; the host waits for the target's choice in each pass, as greedy decoding does.",
    "Replayed: the weights are random and their choice means nothing, so the recorded answer's "
    "token is taken in its place, by our loop and (a logit of +inf) by transformers. Acceptance is "
    "that of the recorded answers.",
    "Not counted: EventGPT's time. Its recorded tokens are there when an answer begins; who reads "
    "none is marked.",
    "Decode: all after the prefill, with the drafter's time, its first proposals and its learning "
    "(transformers: the whole call less a call for one token). End to end: vision, prefill and "
    "decode.")
SAMPLED = ("Sampled: our loop, with drafts and without, draws every token at the temperature; the recorded "
           "answers stay greedy ones, so that acceptance is higher than that of sampled answers.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time decoding at real size with random weights, recorded answers replayed, against its peers.
    """

    pairs: list[Path] = required("pair files whose recorded answers are replayed")
    task: Path = required("task folder of train_and_evaluate.py: the drafters")
    size: Literal["7b", "small"] = option("7b", "of the target; small: to try the program on a CPU")
    max_answers: int = option(-1, "use only the first so many answers, in clip order; -1: all")
    gamma: str = option(
        "auto", "tokens proposed for each pass, 1 to 16; auto: while they are worth their cost")
    tree: str = option(
        "auto", "nodes of the trees of drafters with second choices, 0 to 64; auto: while they are "
        "worth their cost")
    temperature: float = option(
        0.0, "above 0: our loop draws each token at this temperature before it takes the recorded one: "
        "what sampling costs")
    peer_answers: int = option(
        20, "the first so many, for transformers and for ours that learn from none; -1: all")
    output: Path = option(Path("benchmark_decode.json"), "where all numbers go")
    compare: Path | None = option(None,
                                  "an earlier output: print old, new and ratio of each figure")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "of the target's weights")
    quantization: Literal["4bit", "none"] = option("none",
                                                   "4bit: the target as a checkpoint loaded so")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    compile: bool = option(
        True, "let transformers compile the step on its static cache, as it does by itself")

    def __post_init__(self):
        check_gamma(self.gamma)
        check_tree(self.tree)
        if self.temperature and not 0.01 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be 0 or from 0.01, got {self.temperature}")
        check_counts(self, (), ("max_answers", "peer_answers"))


# ----------------------------------------------------------------------------------------- inputs
def read_answers(config: Config, task: Task) -> Pairs:
    """The recorded pairs as a stream would bring them; every id must be one of the adapter's and of
    the target's.
    """
    from vlm.peers import VOCAB_SIZE_7B

    pairs = load_pairs(config.pairs)
    vocab_size = task.adapter.config.vocab_size
    largest = min(vocab_size, VOCAB_SIZE_7B) if config.size == "7b" else vocab_size
    check_ids(pairs.largest_ids(), largest,
              f"use pairs like those that {config.task} was trained on")
    pairs = in_clip_order(pairs)
    count = len(pairs) if config.max_answers == -1 else min(config.max_answers, len(pairs))
    return pairs.select(np.arange(count))


def simulated_hits(pairs: Pairs, task: Task) -> dict:
    """{drafter: (N, T) bool, whether its first proposal is right} of each drafter that has a
    simulated twin.
    """
    from acceptance.simulation import stream

    live = task.parts
    parts = SimulationParts(task.adapter, pairs, training_answers=live.training_answers,
                            memory_share={"hybrid": live.memory_share})
    drafters = {name: entry.make_simulated(parts) for name, entry in LIVE.items()}
    return {name: stream(drafter, pairs)["top1"] for name, drafter in drafters.items() if drafter}


def prompt_positions(model: VisionLanguageModel, query: str) -> int:
    shared, [after] = model.layout([query], FRAMES)
    return shared + len(after)


def limits(model: VisionLanguageModel) -> dict:
    """No step is faster than reading the weights once, at the rate at which this device copies."""
    from benchmarks.limits import copy_rate

    decoder, head = model.decoder
    weights = [
        weight for name, weight in decoder.named_parameters() if not name.startswith("embed_tokens")
    ]
    size, rate = sum(weight.nbytes
                     for weight in [*weights, *head.parameters()]), copy_rate(model.runtime.device)
    return {
        "step_weights_gib": size / 2**30, "copy_gib_per_s": rate / 2**30,
        "least_step_ms": 1000 * size / rate
    }


# ---------------------------------------------------------------------------------------- measure
def measure(config: Config) -> dict:
    task = read_task(config.task)
    pairs = read_answers(config, task)

    import torch

    from benchmarks.replay import Ours, run_mode, transformers_modes
    from drafting.tree import Branching
    from machine.device import Runtime, device_name
    from vlm.peers import QUERY, SEED, random_model
    from vlm.video_llava import VideoLlava

    runtime = Runtime.choose(config.device, config.dtype, config.quantization)
    model = random_model(VideoLlava, config.size, runtime, task.adapter.config.vocab_size)
    assert isinstance(model, VideoLlava)
    side = model.model.config.vision_config.image_size
    pixels = torch.randn(FRAMES, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    part = len(pairs) if config.peer_answers == -1 else min(config.peer_answers, len(pairs))
    results = {
        "size": config.size, "device": device_name(runtime.device), "dtype": config.dtype,
        "quantization": config.quantization, "gamma": config.gamma, "tree": config.tree,
        "temperature": config.temperature, "what": [
            *WHAT, *([SAMPLED] if config.temperature else []),
            f"Part: transformers' modes and {', '.join(ON_A_PART)} ran on the first {part} of "
            f"{len(pairs)} answers, one contiguous part, the same for all; whoever is compared "
            "with them is timed on that part."
        ], "answers": len(pairs), "peer_answers": part,
        "prompt_positions": prompt_positions(model, QUERY), "limits": limits(model)
    }
    log("benchmark | " + " | ".join(f"{key} {results[key]}" for key in (
        "size", "device", "dtype", "answers", "peer_answers", "prompt_positions")))
    recorded = list(zip(pairs.answers("draft"), pairs.answers("target")))
    answers = [answer for _, answer in recorded]
    runs = {name: run_mode(name, mode, model, pixels, answers[:part])
            for name, mode in transformers_modes(model, config.gamma, config.compile).items()}
    task.adapter.to(runtime.device)
    drafters = {name: entry.make_live(task.parts) for name, entry in LIVE.items()}
    if config.tree != "0":               # each with a memory of its own
        drafters |= {f"{name}{TREE}": LIVE[name].make_live(task.parts)
                     for name, drafter in drafters.items() if isinstance(drafter, Branching)}
    ours = Ours(model, pixels, drafters, config.gamma, config.tree, max(map(len, answers)))
    ours.temperature = config.temperature
    ours.warm_up(recorded)
    proposing = ours.proposing_ms(*recorded[0])
    our_runs = ours.run(recorded, ON_A_PART, part)
    results["memory_mib"] = {
        **{name: run.pop("memory_mib") for name, run in runs.items()}, "ours": ours.memory_mib()
    }
    results["runs"] = runs | our_runs
    results["costs_ms"] = ours.costs.milliseconds() | proposing
    summarise(results, task, simulated_hits(pairs, task), pairs.lengths("target"))
    return results | {"wanted": wanted(results)}
