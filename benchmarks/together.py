"""Several processes that extract together, timed against one: for `benchmark.py extract --num_processes`.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.together SETTINGS.json

Each process answers made-up clips with random weights as extraction does: clips are dealt, answers go
into a journal for each process, the first merges them. The first writes its seconds to the file that
the settings name; the model is loaded, and warm, before the clock starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from base import ROOT, UserError, log
from machine.ranks import this_process
from machine.running import run
from machine.team import Team, Work
from vlm.roles import BY_NAME, DRAFT, TARGET, Role, View

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extraction.ledger import Ledger
    from pairs.journals import Journals
    from vlm.contract import VisionLanguageModel

MERGED_CLIPS = 10_000              # of made-up answers, for the size and merge of journals
CLIPS = 1536                       # minutes at 7B size, so that the last batch weighs little


def _eventgpt():
    from vlm.eventgpt import EventGPT

    return EventGPT


def _video_llava():
    from vlm.video_llava import VideoLlava

    return VideoLlava


KINDS = {DRAFT.name: _eventgpt, TARGET.name: _video_llava}       # name -> its class, imported late


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all processes do together."""

    model: str                       # its name in files
    size: Literal["7b", "small"]
    dtype: str
    quantization: Literal["4bit", "none"]
    device: str
    clips: int
    questions: int
    max_new_tokens: int
    batch_size: int | None
    folder: str                      # for journals, output and seconds


def together(config: Any, names: Iterable[str]) -> dict:
    """What benchmark.py adds for --num_processes: figures of each model, and what they should reach.

    config: of benchmarks/extract.py.
    Answers of one and of several are equal in float32; batches of other sizes round otherwise.
    """
    models = {name: measure_together(Shared(
        name, config.size, config.dtype, config.quantization, config.device, config.clips or CLIPS,
        config.questions, config.max_new_tokens, config.batch_size, ""), config.num_processes)
        for name in names}
    rows = []
    for name, figures in models.items():
        rows += [(f"{name}: times one process", figures["times_one"],
                  f">= {0.95 * config.num_processes:.2f}"),
                 (f"{name}: more bookkeeping and merge", figures["bookkeeping_overhead"], "< 0.02")]
    wanted = [{"what": what, "measured": measured, "wanted": bound} for what, measured, bound in rows]
    merge = measure_merge(MERGED_CLIPS, config.questions, config.max_new_tokens, config.num_processes)
    return {"together": models, "merge": merge, "wanted": wanted, "wanted_of": "of several processes"}


def measure_together(load: Shared, processes: int) -> dict:
    """The figures of one process and of so many, each a launch of its own, in one run."""
    figures = {}
    for world in (1, processes):
        with tempfile.TemporaryDirectory() as folder:
            settings = Path(folder) / "settings.json"
            settings.write_text(json.dumps({**dataclasses.asdict(load), "folder": folder}))
            log(f"benchmark | {load.model} | {load.clips} clips by {world} processes")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       "--nproc_per_node", str(world), "-m", "benchmarks.together", str(settings)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{world} processes ended with {done.returncode}: "
                                f"{(done.stdout + done.stderr)[-2000:]}")
            figures[world] = json.loads((Path(folder) / "figures.json").read_text())
    one, several = figures[1], figures[processes]
    overhead = several["bookkeeping_s"] - one["bookkeeping_s"]
    equal = sum(a == b for a, b in zip(one.pop("tokens"), several.pop("tokens"), strict=True))
    return {"processes": processes, "clips": load.clips, "questions": load.questions, "one": one,
            "several": several, "times_one": one["seconds"] / several["seconds"],
            "bookkeeping_overhead": overhead / several["seconds"], "equal_rows": equal}


def measure_merge(clips: int, questions: int, tokens: int, journals: int) -> dict:
    """Journals with made-up answers of both models, merged into an output: bytes, seconds, memory."""
    import tracemalloc

    from clips.dataset import Sample
    from extraction.ledger import Survey
    from extraction.output import write_output
    from extraction.together import merged_ledgers
    from pairs.journal import Journal
    from pairs.journals import open_journals

    samples = [Sample(number, f"id-{number}", f"street_{number // 1000:02}_a", number)
               for number in range(clips)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.json"
        text = "A street with a car and a few people. " * 6
        written_s = 0.0
        for rank in range(journals):
            with Journal(output, {}, {}, rank=rank) as journal:
                journal.append([{"model": name, "vocab_size": 32_000} for name in BY_NAME])
                mine = samples[rank::journals]
                start = time.perf_counter()
                for first in range(0, len(mine), 64):
                    journal.append([{
                        "model": name, "key": sample.key, "question_idx": number,
                        "tokens": list(range(900, 900 + tokens)), "text": text, "finished": True}
                        for name in BY_NAME for sample in mine[first:first + 64]
                        for number in range(questions)])
                written_s += time.perf_counter() - start
        paths = [Journal.path_of(output, rank) for rank in range(journals)]
        survey = Survey(samples, [f"question {number}?" for number in range(questions)], View(),
                        {name: {} for name in BY_NAME})
        start = time.perf_counter()
        merged = open_journals(paths, {}, {})
        write_output(output, {}, survey, merged_ledgers(survey, merged))
        seconds = time.perf_counter() - start
        merged.close()
        tracemalloc.start()                          # the index of the journals is what takes memory
        merged = open_journals(paths, {}, {})
        memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        merged.close()
        pairs = clips * questions
        return {"pairs": pairs, "journals": journals, "journal_bytes_per_pair":
                sum(path.stat().st_size for path in paths) / pairs,
                "output_bytes_per_pair": output.stat().st_size / pairs,
                "append_us_per_pair": 1e6 * written_s / pairs, "merge_us_per_pair": 1e6 * seconds / pairs,
                "merge_memory_bytes_per_pair": memory / pairs}


def show_merge(figures: dict) -> None:
    log(f"table | {figures['pairs']} pairs in {figures['journals']} journals | a pair: "
        f"{figures['journal_bytes_per_pair']:.0f} bytes of journal, "
        f"{figures['output_bytes_per_pair']:.0f} of output | "
        f"{figures['append_us_per_pair']:.0f} us to append, {figures['merge_us_per_pair']:.0f} us and "
        f"{figures['merge_memory_bytes_per_pair']:.0f} bytes of memory to merge")


def show_together(name: str, figures: dict) -> None:
    one, several = figures["one"], figures["several"]
    log(f"table | {name} | 1 process: {one['answers_per_s']:.2f} answers/s | "
        f"{figures['processes']} processes: {several['answers_per_s']:.2f}/s | "
        f"{figures['times_one']:.3f} times | bookkeeping and merge {one['bookkeeping_s']:.2f} s, "
        f"{several['bookkeeping_s']:.2f} s: {figures['bookkeeping_overhead']:.2%} more of the whole, "
        f"waited {several['waited_s']:.2f} s for the last batch | "
        f"{figures['equal_rows']} of {figures['clips'] * figures['questions']} rows equal")


# --------------------------------------------------------------------------------- in each process
def main() -> None:
    load = Shared(**json.loads(Path(sys.argv[1]).read_text()))
    role = BY_NAME[load.model]
    with Team.meet(this_process(together=True)) as team:
        model = model_of(load, role, team)
        work(load, role, model, team)


def model_of(load: Shared, role: Role, team: Work) -> VisionLanguageModel:
    import torch

    from machine.device import Runtime
    from vlm.peers import random_model

    device = team.ranks.device(load.device, torch.cuda.device_count())
    runtime = Runtime.choose(device, load.dtype, load.quantization)
    return random_model(KINDS[role.name](), load.size, runtime)


def work(load: Shared, role: Role, model: VisionLanguageModel, team: Work) -> None:
    from benchmarks.made_up import AllTokens, Prepared, random_pixels
    from clips.dataset import Sample
    from extraction.answering import Answering, Job
    from extraction.ledger import Ledger, Survey
    from extraction.model_pass import Pace, answer, deal
    from extraction.together import open_together
    from pairs.journals import Journals
    from vlm.batches import clips_that_fit
    from vlm.peers import several_questions

    questions = several_questions(load.questions)
    samples = [Sample(number, str(number), "street_00_a", number) for number in range(load.clips)]
    pixels = random_pixels(model, role.most_pictures([], View()), len(samples))
    model = Prepared(model)
    timed_role = dataclasses.replace(role, sees=lambda view: dataclasses.replace(
        role.sees(view), read=lambda sample, view: pixels[sample.index]))
    size = load.batch_size or clips_that_fit(
        model, questions, load.max_new_tokens, role.most_pictures([], View()))
    job = Job(role.name, lambda sample: pixels[sample.index], questions, load.max_new_tokens, 2)
    Answering(model, job, size, AllTokens(load.max_new_tokens)).run(samples[:size])     # warms up
    survey = Survey(samples, questions, View(), {role.name: {}})
    team.gather("warm", b"")
    start = time.perf_counter()
    with open_together(team, lambda: Journals(Path(load.folder) / "out.json", {}, survey.content, (),
                                              team.ranks.rank)) as journals:
        ledger = Ledger(timed_role, survey, samples, journals, team)
        facts = {"model": role.name, "vocab_size": model.vocab_size, "revision": "random weights"}
        before = time.perf_counter()
        answer(ledger, model, facts, Pace(load.max_new_tokens, 2, size), deal(ledger))
        answering_s = time.perf_counter() - before
        through = time.perf_counter()
        ledger.gather()
        waited_s = time.perf_counter() - through         # for the others' last batches
        tokens = merged_by_first(ledger, journals, load, team)
    seconds = time.perf_counter() - start
    if team.ranks.rank:
        return
    answers = len(samples) * len(questions)
    (Path(load.folder) / "figures.json").write_text(json.dumps({
        "seconds": seconds, "answers_per_s": answers / seconds, "batch_size": size,
        "waited_s": waited_s, "bookkeeping_s": seconds - answering_s - waited_s, "tokens": tokens}))


def merged_by_first(ledger: Ledger, journals: Journals, load: Shared, team: Work) -> list[list[int]]:
    """The first process waits until all have left, then merges; -> the tokens of all rows."""
    if team.ranks.rank:
        return []
    team.outlast()
    return merged(ledger, journals, Path(load.folder) / "out.json")


def merged(ledger: Ledger, journals: Journals, output: Path) -> list[list[int]]:
    """Write the rows of all answers as extraction does; -> the tokens of each."""
    from pairs.rows import write_rows

    tokens = []

    def rows():
        for sample in ledger.answered():
            for number in range(len(ledger.survey.questions)):
                answer = ledger.answer(sample, number)
                tokens.append(answer["tokens"])
                yield {"sample_idx": sample.index, "question_idx": number, **answer}

    journals.refresh()
    write_rows(output, {}, rows(), [])
    journals.remove()
    os.sync()
    return tokens


if __name__ == "__main__":
    run(main, together=True)
