"""Time and memory of very many pairs, from a file to metrics: `python benchmark.py load`.

Makes pair files of several sizes, in the format of extract_tokens_train.py, and works through each
in processes of their own, so that a memory peak belongs to one size. For comparison json.load and
lists of answers run on the same file.
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

# Ids as in 1,100 real pairs; the answers come in turn
DISTINCT_IDS, DISTINCT_ANSWERS = 633, 997
CLIPS, SEGMENTS = 100, 3             # clips of a sequence, sequences of a drive
WORDS = ("car", "street", "the", "scene", "traffic", "with", "building", "and", "parked", "tree",
         "road", "is", "a", "pedestrian", "bicycle", "crossing", "along", "sidewalk", "light",
         "vehicle", "driving", "include", "one")
WARM_UP_PAIRS = 300                 # that each process works through before its memory counts
FILE_BYTES = 30     # of the file for each token and its share of the texts: about 27 were measured
PLAIN_BYTES = 8     # memory of json.load for each byte of the file
JSON_ROWS = 10_000                   # rows from which json's own time is extrapolated
MAX_SEQ_LEN, TRAINING_BATCH, PREDICTION_BATCH, SCORED_IDS = 128, 32, 64, 64

NOTES = (
    "Memory: the peak of a process's resident memory less what it held after its imports and a "
    f"warm-up on {WARM_UP_PAIRS} pairs. Each peak is that of all parts up to there. Tokens: all answers "
    "counted as int32.",
    "Load: load_pairs. Split: clip order, validation by drives, half of the pairs selected. Epoch: "
    f"all batches of an epoch made ready, {TRAINING_BATCH} pairs each. Evaluate: a tiny "
    "adapter's predictions and all metrics. All on one thread.",
    "Plain: json.load and lists of the answers, nothing else. Write: rows one by one into a new file.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time and memory of very many pairs, from a file to metrics and back."""

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
    ids = np.sort(random.choice(np.arange(259, 29_954), DISTINCT_IDS, replace=False))

    def answer(length: int) -> tuple[list[int], str]:
        chosen = random.integers(DISTINCT_IDS, size=length)
        return ids[chosen].tolist(), " ".join(WORDS[i % len(WORDS)] for i in chosen[:length * 3 // 4])

    shorter = random.integers(max(1, tokens * 2 // 5), tokens + 1, size=DISTINCT_ANSWERS)
    answers = [(answer(tokens if i % 2 else int(shorter[i])), answer(tokens))
               for i in range(DISTINCT_ANSWERS)]
    for i in range(count):
        (draft, draft_text), (target, target_text) = answers[i % DISTINCT_ANSWERS]
        number = i // CLIPS
        yield {"sample_idx": i, "question_idx": 0, "sample_id": f"{i:08x}-0000-4000-8000-{i:012x}",
               "sequence": f"town_{number // SEGMENTS:06}_{'abc'[number % SEGMENTS]}", "clip": i % CLIPS,
               "query": "What are the key elements in this scene?",
               "egpt_tokens": draft, "egpt_text": draft_text, "egpt_finished": len(draft) < tokens,
               "vl_tokens": target, "vl_text": target_text, "vl_finished": False}


# ----------------------------------------------------------- in a process of its own, one size each
def resident_mib(name: str) -> float:
    """VmRSS: now, VmHWM: the peak. In getrusage a new process begins with its parent's peak."""
    return kib_of(Path("/proc/self/status"), name) / 1024


def kib_of(path: Path, name: str) -> int:
    """The number of KiB that a file of /proc states under this name."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


class Parts:
    """Runs the parts of a size in turn: seconds of each, and the memory peak up to its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, float] = {}
        self.before_mib = resident_mib("VmRSS")

    def __call__(self, name: str, part: Callable):
        start = time.monotonic()
        result = part()
        self.seconds[name] = time.monotonic() - start
        self.peak_mib[name] = resident_mib("VmHWM") - self.before_mib
        return result

    def results(self) -> dict:
        return {"seconds": self.seconds, "peak_mib": self.peak_mib}


def write(path: Path, count: int, tokens: int, seed: int) -> dict:
    """The file itself, through the writer of extract_tokens_train.py."""
    head = {"dataset_dir": "made up", "total_samples": count, "vocab_size": 32_064}
    write_rows(path, head, rows(WARM_UP_PAIRS, tokens, seed), [])
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
        for batch, width, _ in batched.batches(TRAINING_BATCH, torch.Generator().manual_seed(seed)):
            batched.targets(batch, width), batched.drafts(batch, batched.draft_width)
        return batched

    def evaluate(pairs, batched):
        outputs = torch.from_numpy(pairs.ids("target")).long()[:SCORED_IDS]
        config = AdapterConfig(32_064, "prefix+draft", 16, 1, 2, 32, MAX_SEQ_LEN, draft_vocab=len(outputs))
        top1, top5, _ = predict(TokenAdapter(config, outputs), batched, PREDICTION_BATCH)
        return compare(top1, top5, pairs, pairs)

    def all_of(path, run_part):
        pairs = run_part("load", lambda: load_pairs([path]))
        ordered, *parts = run_part("split", lambda: split(pairs))
        batched = run_part("epoch", lambda: epoch(ordered))
        metrics = run_part("evaluate", lambda: evaluate(ordered, batched))
        assert metrics["pairs"] == count == len(parts[0]) + len(parts[1]) or path != pairs_file
        return pairs

    pairs_file, warm_up = path, path.with_name("warm_up.json")
    write_rows(warm_up, {"vocab_size": 32_064}, rows(WARM_UP_PAIRS, tokens, seed), [])
    all_of(warm_up, lambda name, part: part())
    read_s, json_s = read_alone(path), json_alone(path, count)
    parts = Parts()
    pairs = all_of(path, parts)
    return {
        **parts.results(), "token_mib": (pairs.draft.nbytes + pairs.target.nbytes) / 2**20,
        "read_s": read_s, "json_s": json_s
    }


def read_alone(path: Path) -> float:
    """Seconds of reading the file's bytes alone; just written, they come from the page cache."""
    start = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        while file.read(2**20):
            pass
    return time.monotonic() - start


def json_alone(path: Path, count: int) -> float:
    """Seconds that json takes for all rows, one by one, extrapolated from the first JSON_ROWS."""
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip(",\n") for line in itertools.islice(
            (line for line in file if line.startswith('{"sample_idx"')), JSON_ROWS)]
    start = time.monotonic()
    for line in lines:
        json.loads(line)
    return (time.monotonic() - start) * count / len(lines)


def plain(path: Path, count: int, tokens: int, seed: int) -> dict:
    """The usual first version."""
    def load():
        with open(path, encoding="utf-8") as file:
            results = json.load(file)["results"]
        return [row["egpt_tokens"] for row in results], [row["vl_tokens"] for row in results], results

    parts = Parts()
    assert len(parts("load", load)[0]) == count
    return parts.results()


# ------------------------------------------------------------------------------------------ measure
def one_size(count: int, tokens: int, seed: int, folder: Path) -> dict:
    """{"write", "ours", "plain"}: figures of each process; None for json.load without room."""
    path = folder / f"pairs_{count}.json"
    written = run_part(write, path, count, tokens, seed)
    mine = run_part(ours, path, count, tokens, seed)
    mib, seconds = mine["token_mib"], mine["seconds"]
    mine |= {"all_s": sum(seconds.values()),
             "peak_over_tokens": max(mine["peak_mib"].values()) / mib,
             "share_of_read": mine["read_s"] / seconds["load"],
             "share_of_json": mine["json_s"] / seconds["load"]}
    peer = None
    if path.stat().st_size * PLAIN_BYTES <= available_bytes():
        peer = run_part(plain, path, count, tokens, seed)
        peer["peak_over_tokens"] = peer["peak_mib"]["load"] / mib
    else:
        log(f"benchmark | {count} pairs | json.load would not fit into the free memory: left out")
    path.unlink()
    return {"write": written, "ours": mine, "plain": peer}


def run_part(part: Callable, path: Path, count: int, tokens: int, seed: int) -> dict:
    """The figures of one part, run in a process of its own."""
    result = path.with_name("result.json")
    log(f"benchmark | {count} pairs | {part.__name__}")
    words = [part.__name__, str(path), str(count), str(tokens), str(seed), str(result)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", "benchmarks.load", *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return json.loads(result.read_text())


def available_bytes() -> int:
    return kib_of(Path("/proc/meminfo"), "MemAvailable") * 1024


def exponent(small: float, large: float, times: float) -> float | None:
    """1 where `times` as many pairs take as many times the time or memory, 2 where they take its
    square.
    """
    if min(small, large) <= 0:                    # a few pairs may not raise the memory by one page
        return None
    return math.log(large / small) / math.log(times)


def measure(config: Config) -> dict:
    """The benchmark's main: nothing below it is given the configuration."""
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc, which this system lacks; run this benchmark on Linux")
    counts = sorted(set(config.pairs))
    with tempfile.TemporaryDirectory(prefix="pairs_") as folder:
        check_room(Path(folder), counts[-1], config.tokens)
        sizes = {str(count): one_size(count, config.tokens, config.seed, Path(folder))
                 for count in counts}
    first, last = (sizes[str(count)] for count in (counts[0], counts[-1]))
    growth = growth_of(first, last, counts[-1] / counts[0]) if len(counts) > 1 else {}
    peak_written = last["write"]["peak_mib"]["write"] / last["ours"]["token_mib"]
    span = f"{counts[0]} to {counts[-1]} pairs"
    rows = [("peak memory over the tokens, from the file to metrics", last["ours"]["peak_over_tokens"], 3),
            ("peak memory over the tokens, writing", peak_written, 3),
            (f"exponent of time, {span}", growth.get("time"), 1.1),
            (f"exponent of memory, {span}", growth.get("memory"), 1.1)]
    file_mib = last["write"]["file_mib"]
    return {
        "what": list(NOTES), "device": f"CPU, {os.cpu_count()} cores", "tokens": config.tokens,
        "sizes": sizes, "limits": {"read_mib_per_s": file_mib / last["ours"]["read_s"],
                                   "json_mib_per_s": file_mib / last["ours"]["json_s"]},
        "wanted_of": f"of {counts[-1]} pairs", "exponents": growth, "wanted": [
            {"what": label, "measured": value, "wanted": f"<= {bound}"} for label, value, bound in rows]
    }


def check_room(folder: Path, count: int, tokens: int) -> None:
    """A UserError unless the disk has room for the largest file."""
    need, free = count * tokens * FILE_BYTES, shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"{count} pairs take about {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} are "
                        "free; set TMPDIR to a folder with more room, or use fewer --pairs")


def growth_of(small: dict, large: dict, times: float) -> dict[str, float | None]:
    """Exponents of each part, all time and memory between two sizes, `times` as many pairs."""
    before, after = small["ours"]["seconds"], large["ours"]["seconds"]
    growth = {part: exponent(before[part], seconds, times) for part, seconds in after.items()}
    write_s = [size["write"]["seconds"]["write"] for size in (small, large)]
    peaks = [max(size["ours"]["peak_mib"].values()) for size in (small, large)]
    return {**growth, "write": exponent(write_s[0], write_s[1], times),
            "time": exponent(small["ours"]["all_s"], large["ours"]["all_s"], times),
            "memory": exponent(peaks[0], peaks[1], times)}


def show(results: dict) -> None:
    """The table, as log lines."""
    for line in results["what"]:
        log(f"benchmark | {line}")
    for count, size in results["sizes"].items():
        mine, write_s, peer = size["ours"], size["write"]["seconds"]["write"], "left out"
        if size["plain"]:
            peer = (f"{size['plain']['seconds']['load']:.2f} s, "
                    f"{size['plain']['peak_mib']['load']:.0f} MiB, "
                    f"{size['plain']['peak_over_tokens']:.1f} x tokens")
        log(" | ".join([
            f"table | {count:>8} pairs | tokens {mine['token_mib']:.1f} MiB, "
            f"file {size['write']['file_mib']:.0f} MiB",
            " ".join(f"{part} {seconds:.2f} s" for part, seconds in mine["seconds"].items()),
            "peak MiB " + " ".join(f"{part} {peak:.0f}" for part, peak in mine["peak_mib"].items()),
            f"{mine['peak_over_tokens']:.2f} x tokens", f"json.load: {peer}",
            f"write {write_s:.2f} s, {size['write']['peak_mib']['write']:.0f} MiB"]))
        log(f"table | {count:>8} pairs | share of the time to load: reading the bytes "
            f"{mine['share_of_read']:.2%}, json alone {mine['share_of_json']:.1%}")
    known = {part: value for part, value in results["exponents"].items() if value is not None}
    if known:
        log("table | exponents | " + " ".join(f"{part} {value:.2f}" for part, value in known.items()))
    log("table | limits | " + ", ".join(f"{name} {value:.0f}" for name, value in results["limits"].items()))


def one_line(results: dict) -> str:
    count, size = list(results["sizes"].items())[-1]
    return (f"{count} pairs: loaded in {size['ours']['seconds']['load']:.1f} s, peak memory "
            f"{size['ours']['peak_over_tokens']:.2f} times the tokens")


def main() -> None:
    """One part of one size: NAME FILE PAIRS TOKENS SEED RESULT."""
    name, path, count, tokens, seed, result = sys.argv[1:]
    part = {"write": write, "ours": ours, "plain": plain}[name]
    write_json(Path(result), part(Path(path), int(count), int(tokens), int(seed)))


if __name__ == "__main__":
    run(main)
