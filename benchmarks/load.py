"""Very many pairs from a file to metrics and back, their time and memory: `python benchmark.py
load`.

Makes pair files of several sizes, in the format of extract_tokens_train.py, and works through each
in processes of their own, so that a peak of memory is that of one size alone. Beside it runs the
plain way on the same file: json.load, and lists of its answers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from base import ROOT, UserError, check_counts, log, option
from machine.files import write_json
from machine.running import run
from pairs.formats import load_pairs
from pairs.rows import write_rows

# distinct ids, as in 1,100 real pairs; distinct answers, which come in turn
IDS, ANSWERS = 633, 997
CLIPS, SEGMENTS = 100, 3             # clips of a sequence, sequences of a drive
WORDS = ("car", "street", "the", "scene", "traffic", "with", "building", "and", "parked", "tree",
         "road", "is", "a", "pedestrian", "bicycle", "crossing", "along", "sidewalk", "light",
         "vehicle", "driving", "include", "one")
WARM_UP = 300                       # pairs that each process works through before its memory counts
ROW_BYTES = 30      # of the file, for each token and its share of the texts: about 27 were measured
PLAIN_BYTES = 8     # memory of json.load for each byte of the file, so that it is not tried in vain
JSON_ROWS = 10_000                   # rows by which json's own time is measured
MAX_SEQ_LEN, TRAINED_AT_A_TIME, PREDICTED_AT_A_TIME, SCORED = 128, 32, 64, 64

WHAT = (
    "Memory: the peak of a process's resident memory less what it held after its imports and a "
    f"warm-up on {WARM_UP} pairs. Each peak is that of all parts up to there. Tokens: all answers "
    "counted as int32.",
    "Load: load_pairs. Split: clip order, validation by drives, half of the pairs selected. Epoch: "
    f"all batches of an epoch made ready, {TRAINED_AT_A_TIME} pairs each. Evaluate: a tiny "
    "adapter's predictions and all metrics. All on one thread.",
    "Plain: json.load and lists of the answers, nothing else. Write: rows as they come into a new "
    "file.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the way of very many pairs from a file to metrics and back, and measure its memory."""

    pairs: list[int] = option((10_000, 100_000, 1_000_000), "sizes, one after the other")
    tokens: int = option(50,
                         "of a target answer, and of half of the drafts; the others are shorter")
    output: Path = option(Path("benchmark_load.json"), "where all numbers go")
    compare: Path | None = option(None,
                                  "an earlier output: print old, new and ratio of each figure")
    seed: int = option(42, "of the answers")

    def __post_init__(self):
        check_counts(self, ("tokens",))
        if min(self.pairs) < 2:
            raise UserError(f"--pairs must be 2 or more, got {min(self.pairs)}")
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, got {self.seed}")


# --------------------------------------------------------------------------------------------- rows
def rows(count: int, tokens: int, seed: int) -> Iterator[dict]:
    """Rows as extraction writes them: ids of five digits, texts of three words for four tokens,
    clips of drives.
    """
    random = np.random.default_rng(seed)
    ids = np.sort(random.choice(np.arange(259, 29_954), IDS, replace=False))

    def answer(length: int) -> tuple[list[int], str]:
        chosen = random.integers(IDS, size=length)
        return ids[chosen].tolist(), " ".join(WORDS[i % len(WORDS)] for i in chosen[:length * 3 // 4])

    shorter = random.integers(max(1, tokens * 2 // 5), tokens + 1, size=ANSWERS)
    answers = [(answer(tokens if i % 2 else int(shorter[i])), answer(tokens)) for i in range(ANSWERS)]
    for i in range(count):
        (draft, draft_text), (target, target_text) = answers[i % ANSWERS]
        number = i // CLIPS
        yield {"sample_idx": i, "question_idx": 0, "sample_id": f"{i:08x}-0000-4000-8000-{i:012x}",
               "sequence": f"town_{number // SEGMENTS:06}_{'abc'[number % SEGMENTS]}", "clip": i % CLIPS,
               "query": "What are the key elements in this scene?",
               "egpt_tokens": draft, "egpt_text": draft_text, "egpt_finished": len(draft) < tokens,
               "vl_tokens": target, "vl_text": target_text, "vl_finished": False}


# ----------------------------------------------------------- in a process of its own, one size each
def resident_mib(which: str) -> float:
    """VmRSS now, VmHWM at its highest. Not getrusage: a new process begins there with the peak of
    who started it.
    """
    found = next(line for line in Path("/proc/self/status").read_text().splitlines()
                 if line.startswith(which))
    return int(found.split()[1]) / 1024


class Parts:
    """Runs the parts of a size one after the other: seconds of each, and the highest memory up to
    its end.
    """

    def __init__(self):
        self.seconds, self.peak_mib, self.before = {}, {}, resident_mib("VmRSS")

    def __call__(self, name: str, part: Callable):
        start = time.monotonic()
        found = part()
        self.seconds[name] = time.monotonic() - start
        self.peak_mib[name] = resident_mib("VmHWM") - self.before
        return found

    def results(self) -> dict:
        return {"seconds": self.seconds, "peak_mib": self.peak_mib}


def write(path: Path, count: int, tokens: int, seed: int) -> dict:
    """The file itself, through the writer of extract_tokens_train.py."""
    head = {"dataset_dir": "made up", "total_samples": count, "vocab_size": 32_064}
    write_rows(path, head, rows(WARM_UP, tokens, seed), [])
    parts = Parts()
    parts("write", lambda: write_rows(path, head, rows(count, tokens, seed), []))
    return {**parts.results(), "file_mib": path.stat().st_size / 2**20}


def ours(path: Path, count: int, tokens: int, seed: int) -> dict:
    """From the file to metrics, as train_and_evaluate.py goes."""
    import torch

    import pairs.splits as splits
    from acceptance.comparison import compare
    from acceptance.tensors import TokenTensors, predict
    from token_adapter import AdapterConfig, TokenAdapter

    torch.set_num_threads(1)          # two that share a core with somebody else wait for each other

    def split(pairs):
        ordered = splits.in_clip_order(pairs)
        train, validation, _ = splits.split_validation(ordered, 0.15, seed)
        return ordered, ordered.select(train), ordered.select(validation), splits.shortened(
            ordered, count // 2)

    def epoch(pairs):
        batched = TokenTensors.of(pairs, MAX_SEQ_LEN, torch.device("cpu"))
        for batch, width, _ in batched.batches(TRAINED_AT_A_TIME, torch.Generator().manual_seed(seed)):
            batched.targets(batch, width), batched.drafts(batch, batched.draft_width)
        return batched

    def evaluate(pairs, batched):
        outputs = torch.from_numpy(pairs.ids("target")).long()[:SCORED]
        config = AdapterConfig(32_064, "prefix+draft", 16, 1, 2, 32, MAX_SEQ_LEN, draft_vocab=len(outputs))
        top1, top5, _ = predict(TokenAdapter(config, outputs), batched, PREDICTED_AT_A_TIME)
        return compare(top1, top5, pairs, pairs)

    def all_of(path, run_part):
        pairs = run_part("load", lambda: load_pairs([path]))
        ordered, *parts = run_part("split", lambda: split(pairs))
        batched = run_part("epoch", lambda: epoch(ordered))
        metrics = run_part("evaluate", lambda: evaluate(ordered, batched))
        assert metrics["pairs"] == count == len(parts[0]) + len(parts[1]) or path != pairs_file
        return pairs

    pairs_file, warm_up = path, path.with_name("warm_up.json")
    write_rows(warm_up, {"vocab_size": 32_064}, rows(WARM_UP, tokens, seed), [])
    all_of(warm_up, lambda name, part: part())
    read_s, json_s = read_alone(path), json_alone(path, count)
    parts = Parts()
    pairs = all_of(path, parts)
    return {
        **parts.results(), "token_mib": (pairs.draft.nbytes + pairs.target.nbytes) / 2**20,
        "read_s": read_s, "json_s": json_s
    }


def read_alone(path: Path) -> float:
    """Seconds of reading the file's bytes and nothing else; just written, they come from the page
    cache.
    """
    start = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        while file.read(2**20):
            pass
    return time.monotonic() - start


def json_alone(path: Path, count: int) -> float:
    """Seconds that json takes for all rows, one by one, by the time for the first of them."""
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip(",\n") for line in itertools.islice(
            (line for line in file if line.startswith('{"sample_idx"')), JSON_ROWS)]
    start = time.monotonic()
    for line in lines:
        json.loads(line)
    return (time.monotonic() - start) * count / len(lines)


def plain(path: Path, count: int, tokens: int, seed: int) -> dict:
    """What one would write first."""
    def load():
        with open(path, encoding="utf-8") as file:
            found = json.load(file)["results"]
        return [row["egpt_tokens"] for row in found], [row["vl_tokens"] for row in found], found

    parts = Parts()
    assert len(parts("load", load)[0]) == count
    return parts.results()


# ------------------------------------------------------------------------------------------ measure
def one_size(count: int, config: Config, folder: Path) -> dict:
    """{"write", "ours", "plain"}: what each of these processes found; None for a plain way that
    wouldn't fit.
    """
    path, found = folder / f"pairs_{count}.json", {}
    for part in (write, ours, plain):
        name, result = part.__name__, folder / "result.json"
        log(f"benchmark | {count} pairs | {name}")
        if name == "plain" and path.stat().st_size * PLAIN_BYTES > available_bytes():
            log(f"benchmark | {count} pairs | json.load would not fit into the memory that is "
                "free: left out")
            found[name] = None
            continue
        subprocess.run([sys.executable, "-m", "benchmarks.load", name, path, str(count), str(config.tokens),
                        str(config.seed), result], cwd=ROOT, check=True)
        found[name] = json.loads(result.read_text())
    path.unlink()
    mib, seconds = found["ours"]["token_mib"], found["ours"]["seconds"]
    found["ours"] |= {"all_s": sum(seconds.values()),
                      "peak_over_tokens": max(found["ours"]["peak_mib"].values()) / mib,
                      "share_of_read": found["ours"]["read_s"] / seconds["load"],
                      "share_of_json": found["ours"]["json_s"] / seconds["load"]}
    if found["plain"]:
        found["plain"]["peak_over_tokens"] = found["plain"]["peak_mib"]["load"] / mib
    return found


def available_bytes() -> int:
    found = next(line for line in Path("/proc/meminfo").read_text().splitlines()
                 if line.startswith("MemAvailable"))
    return int(found.split()[1]) * 1024


def exponent(small: float, large: float, times: float) -> float | None:
    """1 where `times` as many pairs take as many times the time or memory, 2 where they take its
    square.
    """
    if min(small, large) <= 0:                    # a few pairs may not raise the memory by one page
        return None
    return math.log(large / small) / math.log(times)


def measure(config: Config) -> dict:
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc, which this system lacks; run this benchmark on Linux")
    counts = sorted(set(config.pairs))
    with tempfile.TemporaryDirectory(prefix="pairs_") as folder:
        need, free = counts[-1] * config.tokens * ROW_BYTES, shutil.disk_usage(folder).free
        if need > free:
            raise UserError(f"{counts[-1]} pairs take about {need / 1e9:.1f} GB in {folder}, "
                            f"{free / 1e9:.1f} are free; set TMPDIR to a folder with more room, or "
                            "use fewer --pairs")
        sizes = {str(count): one_size(count, config, Path(folder)) for count in counts}
    first, last = (sizes[str(count)] for count in (counts[0], counts[-1]))
    results = {
        "what": list(WHAT), "device": f"CPU, {os.cpu_count()} cores", "tokens": config.tokens,
        "sizes": sizes, "limits": {
            "read_mib_per_s": last["write"]["file_mib"] / last["ours"]["read_s"],
            "json_mib_per_s": last["write"]["file_mib"] / last["ours"]["json_s"]
        }, "wanted_of": f"of {counts[-1]} pairs"
    }
    growth = {}
    if len(counts) > 1:
        times = counts[-1] / counts[0]
        growth = {part: exponent(first["ours"]["seconds"][part], seconds, times)
                  for part, seconds in last["ours"]["seconds"].items()}
        growth |= {
            "write": exponent(first["write"]["seconds"]["write"], last["write"]["seconds"]["write"],
                              times), "time": exponent(first["ours"]["all_s"],
                                                       last["ours"]["all_s"], times),
            "memory": exponent(
                *(max(found["ours"]["peak_mib"].values()) for found in (first, last)), times)
        }
    over = last["ours"]["peak_over_tokens"]
    written = last["write"]["peak_mib"]["write"] / last["ours"]["token_mib"]
    wanted = [("peak memory over the tokens, from the file to metrics", over, 3),
              ("peak memory over the tokens, writing", written, 3),
              (f"exponent of time, {counts[0]} to {counts[-1]} pairs", growth.get("time"), 1.1),
              (f"exponent of memory, {counts[0]} to {counts[-1]} pairs", growth.get("memory"), 1.1)]
    return results | {"exponents": growth, "wanted": [
        {"what": what, "measured": found, "wanted": f"<= {bound}"} for what, found, bound in wanted]}


def show(results: dict) -> None:
    """The table, as log lines."""
    for line in results["what"]:
        log(f"benchmark | {line}")
    for count, found in results["sizes"].items():
        mine, write_s, peer = found["ours"], found["write"]["seconds"]["write"], "left out"
        if found["plain"]:
            peer = (f"{found['plain']['seconds']['load']:.2f} s, "
                    f"{found['plain']['peak_mib']['load']:.0f} MiB, "
                    f"{found['plain']['peak_over_tokens']:.1f} x tokens")
        peaks = mine["peak_mib"]
        log(" | ".join([
            f"table | {count:>8} pairs | tokens {mine['token_mib']:.1f} MiB, "
            f"file {found['write']['file_mib']:.0f} MiB",
            " ".join(f"{part} {seconds:.2f} s" for part, seconds in mine["seconds"].items()),
            "peak MiB " + " ".join(f"{part} {peak:.0f}" for part, peak in peaks.items()),
            f"{mine['peak_over_tokens']:.2f} x tokens", f"json.load: {peer}",
            f"write {write_s:.2f} s, {found['write']['peak_mib']['write']:.0f} MiB"]))
        log(f"table | {count:>8} pairs | share of the time to load: reading the bytes "
            f"{mine['share_of_read']:.2%}, json alone {mine['share_of_json']:.1%}")
    known = {part: value for part, value in results["exponents"].items() if value is not None}
    if known:
        log("table | exponents | " + " ".join(f"{part} {value:.2f}" for part, value in known.items()))
    log("table | limits | " + ", ".join(f"{name} {value:.0f}" for name, value in results["limits"].items()))


def one_line(results: dict) -> str:
    count, found = list(results["sizes"].items())[-1]
    return (f"{count} pairs: loaded in {found['ours']['seconds']['load']:.1f} s, peak memory "
            f"{found['ours']['peak_over_tokens']:.2f} times the tokens")


def main() -> None:
    """One part of one size: NAME FILE PAIRS TOKENS SEED RESULT."""
    name, path, *numbers, result = sys.argv[1:]
    part = {"write": write, "ours": ours, "plain": plain}[name]
    write_json(Path(result), part(Path(path), *map(int, numbers)))


if __name__ == "__main__":
    run(main)
