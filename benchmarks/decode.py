"""Live decoding at the target's real size, measured without its weights: `python benchmark.py decode`.

A Video-LLaVA with random weights replays recorded answers: every pass is computed, and only the chosen token is
replaced by the recorded one. So both time and acceptance are real. Its peers run beside it on the same answers: three
modes of transformers' generate, our loop without drafts, and every drafter.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import subprocess
import types
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from base import Progress, check_counts, log, option, required
from drafting.table import LIVE, SimulationParts
from pairs.formats import Pairs, load_pairs
from pairs.splits import check_ids, in_clip_order
from drafting.table import results_names
from speculative_decode import DRAFTERS, MAX_GAMMA, Decoder, Task, check_gamma, read_task, reads_draft

if TYPE_CHECKING:                    # torch and vlm are imported only after the flags are read
    from vlm.video_llava import VideoLlava

FRAMES, WARM_UPS = 8, 2              # video frames; answers that every peer runs before it is timed
NO_EOS = -1                          # an id that no token has: an answer ends where its recording ends
LOOKUP_TOKENS = 10                   # proposals of transformers' prompt lookup with --gamma auto: its own default
BRIEF = ("lookup", "copy", "none")   # ours that learn from no answer: a part tells all, as with transformers

WHAT = (
    "Real: every pass of vision, prefill, drafter and target is computed at this size, on random frames; the host "
    "waits for the target's choice in each pass, as greedy decoding does.",
    "Replayed: the weights are random and their choice means nothing, so the recorded answer's token is taken in its "
    "place, by our loop and (a logit of +inf) by transformers. Acceptance is that of the recorded answers.",
    "Not counted: EventGPT's time. Its recorded tokens are there when an answer begins; who reads none is marked.",
    "Decode: all after the prefill, with the drafter's time, its first proposals and its learning (transformers: the "
    "whole call less a call for one token). End to end: vision, prefill and decode.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time decoding at real size with random weights, recorded answers replayed, against its peers."""

    pairs: list[Path] = required("pair files whose recorded answers are replayed")
    task: Path = required("task folder of train_and_evaluate.py: the drafters")
    size: Literal["7b", "small"] = option("7b", "of the target; small: to try the program on a CPU")
    max_answers: int = option(-1, "use only the first so many answers, in clip order; -1: all")
    gamma: str = option("auto", "tokens proposed for each pass, 1 to 16; auto: while they are worth their cost")
    peer_answers: int = option(20, "the first so many, for transformers and for ours that learn from none; -1: all")
    output: Path = option(Path("benchmark_decode.json"), "where all numbers go")
    compare: Path | None = option(None, "an earlier output: print old, new and ratio of each figure")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "of the target's weights")
    quantization: Literal["4bit", "none"] = option("none", "4bit: the target as a checkpoint loaded so")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    compile: bool = option(True, "let transformers compile the step on its static cache, as it does by itself")

    def __post_init__(self):
        check_gamma(self.gamma)
        check_counts(self, (), ("max_answers", "peer_answers"))


# ----------------------------------------------------------------------------------------------------- inputs
def read_answers(config: Config, task: Task) -> Pairs:
    """The recorded pairs as a stream would bring them; every id must be one of the adapter's and of the target's."""
    from vlm.peers import VOCAB_SIZE_7B

    pairs = load_pairs(config.pairs)
    known = min(task.adapter.config.vocab_size, VOCAB_SIZE_7B if config.size == "7b" else math.inf)
    check_ids(pairs.largest_ids(), known, f"use pairs like those that {config.task} was trained on")
    pairs = in_clip_order(pairs)
    return pairs.select(range(len(pairs))[:config.max_answers if config.max_answers != -1 else None])


# ------------------------------------------------------------------------------------------- transformers' way
def run_transformers(model: VideoLlava, pixels, answers: list[list[int]], config: Config) -> dict:
    """{mode: what run_mode says of it}, each on the same answers."""
    tokens = LOOKUP_TOKENS if config.gamma == "auto" else int(config.gamma)
    # Prompt lookup finds the ":" of "USER:" and proposes what follows, <video>; the model refuses more of these than
    # there are features (ValueError). What is suppressed is not proposed.
    suppressed = [model.model.config.video_token_index]
    modes = {"generate": {},
             "generate, static cache": {"cache_implementation": "static", "disable_compile": not config.compile},
             "generate, prompt lookup": {"prompt_lookup_num_tokens": tokens, "suppress_tokens": suppressed}}
    return {name: run_mode(name, mode, model, pixels, answers) for name, mode in modes.items()}


def run_mode(name: str, mode: dict, model: VideoLlava, pixels, answers: list[list[int]]) -> dict:
    """{"rows": [tokens and seconds of each answer], "memory_mib", "compiled", "warm_up_s"}."""
    import torch

    import decoding.loop as decoding
    from benchmarks.limits import memory
    from vlm.peers import generate

    device, before = model.runtime.device, memory(model.runtime.device)

    def both(answer: list[int]) -> dict:
        first, first_s = decoding.timed(lambda: generate(model, pixels, answer, 1, **mode), device)
        found, all_s = decoding.timed(lambda: generate(model, pixels, answer, len(answer), **mode), device)
        assert found == answer and first == answer[:1], f"{name} said {found} for {answer}"
        return {"tokens": len(answer), "first_token_s": first_s, "decode_s": all_s - first_s, "end_s": all_s}

    def warm_up() -> None:                           # the longest: a static cache that grows later compiles again
        for answer in sorted(answers, key=len, reverse=True)[:WARM_UPS]:
            both(answer)

    try:
        _, warm_up_s = decoding.timed(warm_up, device)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:     # no compiler, no headers, a bug in it
        if mode.get("disable_compile", True):
            raise
        log(f"benchmark | WARNING | {name}: the step can't be compiled here and runs uncompiled: {error!s:.300}")
        mode["disable_compile"] = True
        _, warm_up_s = decoding.timed(warm_up, device)
    compiled = hasattr(model.model, "_compiled_call") and not mode.get("disable_compile", True)
    progress, rows = Progress(f"benchmark | {name}", len(answers), unit="answers"), []
    for answer in answers:
        rows.append(both(answer))
        progress.update(len(rows))
    for left in {"_compiled_call", "_previous_max_cache_length"} & vars(model.model).keys():
        delattr(model.model, left)                   # ours must not carry what this one left
    if compiled:
        torch._dynamo.reset()
    return {"rows": rows, "compiled": compiled, "warm_up_s": warm_up_s,
            "memory_mib": {"before": before["held"], "peak": memory(device)["peak"]}}


# ----------------------------------------------------------------------------------------------------- our way
def replay(recorded: list[int]):
    """A rule for decoding.decode: waits for the target's choice as `greedy` does, then takes the recorded tokens."""
    from drafting.contract import matching

    def rule(answer: list[int], proposed: list[int], following) -> list[int]:
        following.best.tolist()
        true = recorded[len(answer):]
        return true[:matching(proposed, true) + 1]

    return rule


def run_ours(model: VideoLlava, pixels, pairs: Pairs, part: int, task: Task, config: Config) -> tuple:
    """({drafter: {"rows"}}, costs in seconds, memory in MiB): all drafters on each answer in turn."""
    import decoding.loop as decoding
    from benchmarks.limits import memory
    from vlm.peers import QUERY, QUESTION
    from vlm.steps import Prompted, Steps

    device, before = model.runtime.device, memory(model.runtime.device)
    recorded = list(zip(pairs.answers("draft"), pairs.answers("target")))
    question = [token % model.tokenizer.words for token in QUESTION]
    length, longest = len(model._prompt_ids(len(pixels), QUERY)), max(len(answer) for _, answer in recorded)
    target = Prompted(Steps(*model.decoder, room=length + longest + MAX_GAMMA))
    costs = decoding.measure_costs(target, model, pixels, QUERY, device, range(1, MAX_GAMMA + 2))
    settings = types.SimpleNamespace(gamma=config.gamma, temperature=0.0, max_new_tokens=0)
    task.adapter.to(device)
    decoders = {name: Decoder(name, task, target, costs, NO_EOS, settings) for name in DRAFTERS}

    def one(decoder: Decoder, embeds, draft: list[int], answer: list[int]) -> dict:
        settings.max_new_tokens, decoder.rule = len(answer), replay(answer)
        found, seconds = decoding.timed(lambda: decoder.answer(embeds, draft, question), device)
        assert found.tokens == answer, f"{decoder.name} said {found.tokens} for {answer}"
        return {"tokens": len(answer), "passes": len(found.accepted), "proposed": sum(found.proposed),
                "accepted": sum(found.accepted), "draft_s": found.draft_s, "verify_s": found.verify_s,
                "prefill_s": found.prefill_s, "decode_s": seconds - found.prefill_s, "end_s": seconds}

    embeds = model.prompt_embeds(pixels, QUERY)
    for decoder in decoders.values():
        decoder.drafter.learn = lambda answer: None                          # warming up must teach nothing
        for draft, answer in recorded[:WARM_UPS]:
            one(decoder, embeds, draft, answer)
        del decoder.drafter.learn
        draft, answer = recorded[0]
        decoder.set_pace(draft, question, answer[:1], device)
    costs |= proposing(decoders, *recorded[0], question, device)
    progress = Progress("benchmark | ours", len(recorded), unit="answers")
    runs = {name: {"rows": []} for name in DRAFTERS}
    for number, (draft, answer) in enumerate(recorded):
        embeds, vision_s = decoding.timed(lambda: model.prompt_embeds(pixels, QUERY), device)
        for name, decoder in decoders.items():
            if number < part or name not in BRIEF:
                row = one(decoder, embeds, draft, answer)
                runs[name]["rows"].append({**row, "vision_s": vision_s, "end_s": vision_s + row["end_s"]})
        progress.update(number + 1)
    return runs, costs, {"before": before["held"], "peak": memory(device)["peak"],
                         "keys_and_values": target.steps.bytes / 2**20}


def proposing(decoders: dict, draft: list[int], answer: list[int], question: list[int], device) -> dict:
    """Seconds of 8 proposals, the median along an answer that grows by 5 tokens; of one step of the adapter."""
    import decoding.loop as decoding

    found = {"propose_8": {}}
    for name in ("adapter", "hybrid", "memory"):
        drafter = decoders[name].drafter
        drafter.begin(draft, question)
        found["propose_8"][name] = statistics.median(
            decoding.timed(lambda at=at: drafter.propose(answer[:at], 8), device)[1]                        # noqa: B023
            for at in range(min(5, len(answer)), max(6, len(answer) - 7), 5))
    steps = getattr(decoders["adapter"].drafter, "steps", None)              # none in draft conditioning
    most = min(8, steps.config.max_seq_len - 1) if steps else 0
    if most > 1:
        steps.begin(draft)
        many, one = (decoding.median_s(lambda n=n: steps.after([], n), device) for n in (most, 1))
        found["adapter_step"] = (many - one) / (most - 1)
    return found


def simulated(pairs: Pairs, task: Task) -> dict:
    """{drafter: (N, T) bool hits} of each drafter that has a simulated twin."""
    from acceptance.simulation import stream

    parts = SimulationParts(task.adapter, pairs, training_answers=task.answers, memory_share={"hybrid": task.share})
    drafters = {name: entry.make_simulated(parts) for name, entry in LIVE.items()}
    return {name: stream(drafter, pairs)["top1"] for name, drafter in drafters.items() if drafter}


# ---------------------------------------------------------------------------------------------------- figures
def limits(model: VideoLlava) -> dict:
    """No step is faster than reading the weights once, at the rate at which this device copies."""
    from benchmarks.limits import copy_rate

    decoder, head = model.decoder
    weights = [weight for name, weight in decoder.named_parameters() if not name.startswith("embed_tokens")]
    weights, rate = sum(weight.nbytes for weight in [*weights, *head.parameters()]), copy_rate(model.runtime.device)
    return {"step_weights_gib": weights / 2**30, "copy_gib_per_s": rate / 2**30,
            "least_step_ms": 1000 * weights / rate}


def totals(rows: list[dict]) -> dict:
    """Sums over these answers, and how the time of a token spreads over them."""
    tokens, passes = sum(row["tokens"] for row in rows), sum(row.get("passes", 0) for row in rows)
    decode_s, end_s = (sum(row[key] for row in rows) for key in ("decode_s", "end_s"))
    ms = sorted(1000 * row["decode_s"] / row["tokens"] for row in rows)
    return {"answers": len(rows), "tokens": tokens, "decode_s": decode_s, "end_s": end_s,
            "ms_per_token": 1000 * decode_s / tokens, "end_s_per_answer": end_s / len(rows),
            "ms_per_token_by_answer": {"min": ms[0], "median": statistics.median(ms), "max": ms[-1]},
            "passes": passes or None, "tau": tokens / passes if passes else None}


def summarise(runs: dict, part: int, hits: dict, pairs: Pairs, task: Task, config: Config) -> None:
    """Add to each run its totals, on the part too, its simulated tau, and how much faster than its peers it is."""
    from acceptance.simulation import simulate

    gamma = MAX_GAMMA if config.gamma == "auto" else int(config.gamma)
    lengths = pairs.lengths("target")
    for name, found in runs.items():
        count = len(found["rows"])
        found |= {**totals(found["rows"]), "part": totals(found["rows"][:part])}
        if name in DRAFTERS:
            found["reads_eventgpt"] = reads_draft(name, task)
            found["simulated_gamma"] = gamma             # with auto nothing stops it: more than can be reached
            found["tau_simulated"] = 1.0 if name == "none" else None if name not in hits else simulate(
                hits[name][:count], lengths[:count], gamma)["tau"]
            found["tau_of_training"] = task.simulated.get(results_names().get(name), {}).get(str(gamma))
    theirs = [name for name in runs if name not in DRAFTERS]
    for name in DRAFTERS:
        ours, found = runs[name]["part"], {}
        for peer in [*theirs, "none"]:
            found[peer] = {key: runs[peer]["part"][f"{key}_s"] / ours[f"{key}_s"] for key in ("decode", "end")}
        found["fastest generate"] = {key: min(found[peer][key] for peer in theirs) for key in ("decode", "end")}
        runs[name]["times_faster_than"] = found


def wanted(results: dict) -> list[dict]:
    """The project's numbers for 7b on one H200, with what was measured here; None: not to be had."""
    runs, costs, faster = results["runs"], results["costs_ms"], results["runs"]["hybrid"]["times_faster_than"]
    free = max((name for name in DRAFTERS if not runs[name]["reads_eventgpt"]),
               key=lambda name: runs[name]["times_faster_than"]["generate"]["end"])
    static, ours = (results["memory_mib"][name]["peak"] for name in ("generate, static cache", "ours"))
    rows = [
        ("decode, hybrid: times faster than generate", faster["generate"]["decode"], ">=", 8),
        ("decode, hybrid: times faster than generate's fastest mode", faster["fastest generate"]["decode"], ">=", 2),
        ("decode, hybrid: times faster than our loop without drafts", faster["none"]["decode"], ">=", 2.5),
        (f"end to end without EventGPT, {free}: times faster than generate",
         runs[free]["times_faster_than"]["generate"]["end"], ">=", 4),
        ("verify(9) over one step", costs["verify"][9] / costs["verify"][1], "<=", 1.25),
        ("tau, hybrid", runs["hybrid"]["tau"], ">=", 4.8),
        ("adapter step, ms", costs["adapter_step"], "<=", 0.2),
        ("8 proposals of the adapter, ms", costs["propose_8"]["adapter"], "<=", 1.6),
        ("peak memory over generate's with a static cache", ours and static and ours / static, "<=", 1.05)]
    return [{"what": what, "measured": found, "wanted": f"{sign} {bound}"} for what, found, sign, bound in rows]


def show(results: dict) -> None:
    """The table, as log lines."""
    def ms(value: float | None) -> str:
        return "none" if value is None else f"{value:.3f}"

    for line in results["what"]:
        log(f"benchmark | {line}")
    for name, found in results["runs"].items():
        spread, facts = found["ms_per_token_by_answer"], []
        if name in DRAFTERS:
            taus, faster = (found["tau"], found["tau_simulated"]), found["times_faster_than"]
            if results["gamma"] != "auto" and taus[1] and not math.isclose(*taus):
                log(f"benchmark | WARNING | {name}: tau live {taus[0]} is not the simulated {taus[1]}")
            facts = [f"tau {ms(found['tau'])}, simulated at gamma {found['simulated_gamma']} "
                     f"{ms(found['tau_simulated'])}, in results.json {ms(found['tau_of_training'])}",
                     f"on {results['peer_answers']} answers, times faster than generate "
                     f"{faster['generate']['decode']:.2f} (end to end {faster['generate']['end']:.2f}), its fastest "
                     f"mode {faster['fastest generate']['decode']:.2f}, no drafts {faster['none']['decode']:.2f}",
                     *([] if found["reads_eventgpt"] else ["needs no EventGPT"])]
        elif "static" in name:
            facts = ["compiled" if found["compiled"] else "not compiled"]
        log(" | ".join([f"table | {name:23}", f"{found['answers']:4} answers",
                        f"decode {found['ms_per_token']:.3f} ms a token (by answer {spread['min']:.3f} "
                        f"{spread['median']:.3f} {spread['max']:.3f})",
                        f"end to end {found['end_s_per_answer']:.4f} s an answer", *facts]))
    costs = results["costs_ms"]
    log("table | ms of verifying 1 to 17 tokens | " + " ".join(ms(cost) for cost in costs["verify"].values()))
    log(f"table | ms | vision {ms(costs['vision'])} | prefill {ms(costs['prefill'])} | adapter step "
        f"{ms(costs['adapter_step'])} | 8 proposals: "
        + ", ".join(f"{name} {ms(cost)}" for name, cost in costs["propose_8"].items()))
    peaks = {name: kept["peak"] for name, kept in results["memory_mib"].items()}
    log("table | peak MiB | " + "; ".join(f"{name} {ms(peak)}" for name, peak in peaks.items()))
    log("table | limits | " + ", ".join(f"{name} {ms(value)}" for name, value in results["limits"].items()))


def one_line(results: dict) -> str:
    hybrid = results["runs"]["hybrid"]
    return (f"hybrid {hybrid['ms_per_token']:.3f} ms a token, tau {hybrid['tau']:.2f}, "
            f"{hybrid['times_faster_than']['generate']['decode']:.2f} times faster than generate")


# ----------------------------------------------------------------------------------------------------- measure
def measure(config: Config) -> dict:
    task = read_task(config.task)
    pairs = read_answers(config, task)

    import torch

    from decoding.loop import milliseconds
    from machine.device import Runtime, device_name
    from vlm.peers import QUERY, SEED, random_model
    from vlm.video_llava import VideoLlava

    runtime = Runtime.choose(config.device, config.dtype, config.quantization)
    model = random_model(VideoLlava, config.size, runtime, task.adapter.config.vocab_size)
    side = model.model.config.vision_config.image_size
    pixels = torch.randn(FRAMES, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    part = len(pairs) if config.peer_answers == -1 else min(config.peer_answers, len(pairs))
    results = {
        "size": config.size, "device": device_name(runtime.device), "dtype": config.dtype,
        "quantization": config.quantization, "gamma": config.gamma,
        "what": [
            *WHAT, f"Part: transformers' modes and {', '.join(BRIEF)} ran on the first {part} of {len(pairs)} "
            "answers, one contiguous part, the same for all; whoever is compared with them is timed on that part."],
        "answers": len(pairs), "peer_answers": part, "prompt_positions": len(model._prompt_ids(FRAMES, QUERY)),
        "limits": limits(model)}
    log("benchmark | " + " | ".join(f"{key} {results[key]}" for key in (
        "size", "device", "dtype", "answers", "peer_answers", "prompt_positions")))
    runs = run_transformers(model, pixels, list(pairs.answers("target"))[:part], config)
    ours, costs, kept = run_ours(model, pixels, pairs, part, task, config)
    results["memory_mib"] = {**{name: found.pop("memory_mib") for name, found in runs.items()}, "ours": kept}
    results["runs"] = runs | ours
    results["costs_ms"] = {"adapter_step": None} | milliseconds(costs)
    summarise(results["runs"], part, simulated(pairs, task), pairs, task, config)
    return results | {"wanted": wanted(results)}
