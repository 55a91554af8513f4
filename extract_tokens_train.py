"""Step 1: both models answer the same questions about the same clips; their tokens become a JSON file of pairs.

    python extract_tokens_train.py --dataset_dir data/my_egpt_dsec_train/my_egpt_dsec_train_1s \\
        --output_file train_tokens_full.json --draft_model models/EventGPT-7b

EventGPT answers for every clip first and is unloaded, then Video-LLaVA answers for those that succeeded: only one
model is in memory at a time. Each answer is appended to a journal beside the output as soon as it is there, so the
same command goes on where a stopped one was; the output itself is written whole at the end. A clip whose picture
or video can't be read goes to the list `failed` with the reason and stops nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from base import (
    Progress,
    UserError,
    as_json,
    check_counts,
    first_line,
    log,
    now,
    option,
    parse_config,
    provenance,
    required,
)
from machine.files import check_plain, make_folder, only_writer
from machine.running import finishing, goes_on_with, run
from pairs.journal import Content, Journal, differences
from pairs.rows import JsonRows, write_rows

if TYPE_CHECKING:                  # vlm is imported only after the flags are read
    from clips.dataset import Sample

BATCHES_AHEAD = 2                  # decoded clips waiting for the model, in batches
# What the answers depend on: a journal or an output made with other values of these is not continued.
SETTINGS = ("dataset_dir", "max_new_tokens", "questions", "draft_model", "target_model", "quantization", "dtype",
            "num_frames", "event_images")


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """Extract both models' answer tokens for the clips of a data set folder into a JSON file of pairs."""

    dataset_dir: Path = required("data set folder, with event_image/ and mp4/")
    output_file: Path = required("the JSON file to write")
    max_samples: int = option(-1, "use only the first so many clips; -1: all")
    max_new_tokens: int = option(50, "longest answer, in tokens")
    query: str = option("What are the key elements in this scene?", "the question asked about every clip")
    questions_file: Path | None = option(None, "ask these instead: JSON list of strings or {question, ...}, or lines")
    num_questions: int = option(-1, "use only the first so many questions of the file; -1: all")
    draft_model: Path | None = option(None, "folder of the EventGPT checkpoint")
    target_model: str = option("LanguageBind/Video-LLaVA-7B-hf", "folder or hub id of Video-LLaVA")
    quantization: Literal["auto", "4bit", "8bit", "none"] = option(
        "auto", "auto: 4bit on a GPU (4.2 GiB a 7B model; a tenth slower than none in large batches, a third one by "
        "one), none on a CPU; none: 13.2 GiB, for large cards; 8bit: 7.2 GiB, slow")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "auto: bfloat16 on a GPU, else float32")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    batch_size: int | None = option(None, "clips at a time; if not said: as many as the free memory holds")
    num_frames: int = option(8, "video frames shown to the target")
    event_images: Literal["first", "all"] = option("first", "event pictures shown to the draft")
    num_workers: int | None = option(None, "threads that read pictures and videos ahead; if not said: one a core")
    parity_check: int = option(0, "answer the first so many clips again, one by one; tell how many answers agree")
    seed: int = option(42, "seed of PyTorch (answers are greedy: it should change nothing)")
    wait: bool = option(False, "wait when another process is writing this output, instead of ending")
    restart: bool = option(False, "throw away an older journal and output of this name")

    def __post_init__(self):
        if not self.query.strip():
            raise UserError("--query is empty: wanted a question")
        check_plain(self.output_file)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}")
        if self.num_workers is None:
            object.__setattr__(self, "num_workers", len(os.sched_getaffinity(0)))
        check_counts(self, ("max_new_tokens", "num_frames", "num_workers"), ("max_samples", "num_questions"))
        if self.batch_size is not None:
            check_counts(self, ("batch_size",))
        if self.parity_check < 0:
            raise UserError(f"--parity_check must be 0 (none) or more, got {self.parity_check}")
        if self.draft_model is None or not self.draft_model.is_dir():
            found = "no --draft_model given" if self.draft_model is None else f"no such folder: {self.draft_model}"
            raise UserError(f"{found}; wanted the folder of the EventGPT checkpoint, which is linked from "
                            "https://github.com/XduSyL/EventGPT")


def main():
    from clips.dataset import content_of, read_dataset, read_questions

    config = parse_config(ExtractConfig)
    questions = read_questions(config.query, config.questions_file, config.num_questions)
    make_folder(config.output_file.absolute().parent)
    with only_writer(config.output_file, config.wait):
        samples = read_dataset(config.dataset_dir)[:config.max_samples if config.max_samples > 0 else None]
        content = content_of(samples, config.event_images)
        if is_finished(config, named_settings(config, questions), samples, content):
            return
        goes_on_with([word for word in sys.argv if word != "--restart"])
        settings = resolve_settings(config, questions)
        check_before_loading(config, questions)
        with Journal(config.output_file, settings, config.restart, content) as journal:
            drafts, lost = answer_all("eventgpt", samples, questions, journal, config)
            pairs, lost_too = answer_all("videollava", drafts, questions, journal, config)
            write_pairs(config, settings, content, samples, questions, journal, drafts, pairs, lost + lost_too)
            journal.remove()
        goes_on_with([])


# ---------------------------------------------------------------------------------------------- settings
def named_settings(config: ExtractConfig, questions: list[str]) -> dict:
    """What the answers depend on, as far as it was said: without what "auto" leaves to the machine."""
    values = {**as_json(config), "dataset_dir": str(config.dataset_dir.resolve()), "questions": questions,
              "draft_model": str(config.draft_model.resolve())}
    if Path(config.target_model).is_dir():
        values["target_model"] = str(Path(config.target_model).resolve())
    return {name: values[name] for name in SETTINGS if values[name] != "auto"}


def resolve_settings(config: ExtractConfig, questions: list[str]) -> dict:
    """The same, with "auto" replaced by what it means on this machine."""
    import torch

    from machine.device import Runtime

    torch.manual_seed(config.seed)
    runtime = Runtime.choose(config.device, config.dtype, config.quantization)
    values = {**named_settings(config, questions), "quantization": runtime.quantization,
              "dtype": str(runtime.dtype).removeprefix("torch.")}
    return {name: values[name] for name in SETTINGS}


def check_before_loading(config: ExtractConfig, questions: list[str]) -> None:
    """What would end the second model's pass is found before the first one's hours."""
    from vlm import eventgpt, video_llava

    for question in questions:
        eventgpt.prompt(question), video_llava.prompt(question)
    video_llava.check_prompts(config.target_model, questions, config.num_frames, config.max_new_tokens)


def fingerprint(content: Content) -> str:
    """Of all the files that the models see: their names and sizes, not what is in them."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def is_finished(config: ExtractConfig, settings: dict, samples: list[Sample], content: Content) -> bool:
    """Whether the output is there already, whole and made with these settings. One of other settings is kept.

    A journal beside it is of a later run with --restart, which goes on; or the machine stopped between the writing of
    the output and the end of its journal, then going on writes it again.
    """
    if config.restart or not config.output_file.exists() or Journal.path_of(config.output_file).exists():
        return False
    rows = JsonRows(config.output_file)
    try:
        count = sum(1 for _ in rows)                         # what it says beside its rows is known after them
    except UserError as error:
        raise UserError(f"{error}; nothing goes on from there: choose another --output_file, or --restart to replace "
                        "it") from error
    found, wanted = rows.beside, {**settings, "total_samples": len(samples)}
    if "dataset_content" in found:                           # outputs of earlier versions say nothing of it
        wanted["dataset_content"] = fingerprint(content)
    made = found["settings"] if isinstance(found.get("settings"), dict) else {}
    differs = differences({**found, **made}, wanted)
    if differs:
        raise UserError(f"{config.output_file} exists and was made differently ({differs}); choose another "
                        "--output_file, or --restart to replace it")
    if count != found.get("videollava_success") or not isinstance(found.get("failed"), list):
        raise UserError(f"{config.output_file} was changed: it holds {count} pairs and says that it has "
                        f"{found.get('videollava_success')}; choose another --output_file, or --restart to replace "
                        "it")
    log(f"RESULT | {config.output_file} | finished before: {count} pairs, {len(found['failed'])} failed")
    return True


# ------------------------------------------------------------------------------------------- answers
def answer_all(which: Literal["eventgpt", "videollava"], samples: list[Sample], questions: list[str],
               journal: Journal, config: ExtractConfig) -> tuple[list[Sample], list[dict]]:
    """Load one model, answer every question about every sample that the journal lacks, unload.

    Returns the samples with an answer to every question, and the `failed` rows of the others.
    """
    from vlm.batches import clips_that_fit

    def missing(sample: Sample) -> list[int]:
        return [number for number in range(len(questions)) if not journal.has(which, sample.key, number)]

    failed = [failure(sample, which, sample.trouble) for sample in samples if sample.trouble]
    good = [sample for sample in samples if not sample.trouble]
    todo = [sample for sample in good if missing(sample)]
    if todo or (config.parity_check and "parity" not in journal.models.get(which, {})):
        if which == "eventgpt" and config.event_images == "all":       # clips of as many pictures side by side
            todo.sort(key=lambda sample: len(sample.event_images))
        model, read, pictures, facts = load_model(which, todo, config)
        journal.check_model(which, facts)
        size = config.batch_size or clips_that_fit(model, questions, config.max_new_tokens, pictures)
        facts["batch_size"] = size
        journal.append([dict(facts)])
        at_once = max(1, min(size, len(todo)))
        log(f"extract | {which} | {at_once} clips at a time, {config.num_workers} threads reading ahead")
        answering = Answering(which, model, read, questions, at_once, failed, config)
        done = sum(len(questions) - len(missing(sample)) for sample in good)
        progress = Progress(f"extract | {which}", len(good) * len(questions), done, "answers")

        def keep(samples: list[Sample], all_answers: list[list]) -> None:
            nonlocal done
            rows = [{"model": which, "key": sample.key, "question_idx": number, **dataclasses.asdict(answers[number])}
                    for sample, answers in zip(samples, all_answers) for number in missing(sample)]
            journal.append(rows)
            done += len(rows)
            progress.update(done, f"{len(failed)} clips failed" if failed else "")

        answering.run(todo, keep)
        if answering.size < at_once:              # memory was short
            facts["batch_size"] = answering.size
        if config.parity_check:
            again = [sample for sample in good if not missing(sample)][:config.parity_check]
            facts["parity"] = answering.parity(again, journal)
        if facts != journal.models[which]:
            journal.append([facts])
        answering.unload()
    answered = [sample for sample in good if not missing(sample)]
    assert len(answered) + len(failed) == len(samples), f"{len(answered)} + {len(failed)} of {len(samples)} clips"
    log(f"extract | {which} | {len(answered)} of {len(samples)} clips answered, {len(failed)} failed")
    if not answered:
        raise UserError(f"{which}: none of {len(samples)} clips could be answered; the first reason: "
                        f"{failed[0]['reason']}")
    return answered, failed


class Answering:
    """One loaded model at work: so many clips at a time, fewer when memory turns out to be short."""

    def __init__(self, which: str, model, read: Callable, questions: list[str], size: int, failed: list[dict],
                 config: ExtractConfig):
        """model: VideoLlava or EventGPT; read: what it sees of a sample; failed: gets the rows of the lost clips."""
        self.which, self.model, self.read, self.questions = which, model, read, questions
        self.size, self.failed, self.config = size, failed, config
        self.engine = None                        # vlm.batches.Batches, made for the first clips and kept
        self.running: list[tuple] = []            # (samples, function that waits for their answers)

    def run(self, todo: list[Sample], keep: Callable) -> None:
        """Answer them all; keep(samples, answers of each) is called while the model works on the next ones.

        After a signal to stop only the clips that the model works on are finished.
        """
        def hand_over() -> None:
            running, self.running = self.running, []
            for samples, wait in running:
                keep(samples, wait())

        with finishing("the clips in hand are answered") as stopping:
            for clips in self.clips(todo, stopping):
                self.start(clips, hand_over)
            hand_over()

    def clips(self, todo: list[Sample], stopping: Callable[[], bool]) -> Iterator[list[tuple]]:
        """Yield lists of (sample, pixels), all of one shape; a clip that can't be read is added to `failed`."""
        clips = []
        for sample, pixels in self.pixels_of(todo, BATCHES_AHEAD * self.size):
            if stopping():
                return
            if isinstance(pixels, Exception):
                self.lose(sample, str(pixels))
                continue
            if len(clips) >= self.size or (clips and clips[0][1].shape != pixels.shape):
                yield clips
                clips = []
            clips.append((sample, pixels))
        if clips and not stopping():
            yield clips

    def pixels_of(self, samples: list[Sample], ahead: int) -> Iterator[tuple]:
        from clips.dataset import read_ahead

        prepare = self.model.prepare
        return read_ahead(lambda sample: prepare(self.read(sample)), samples, self.config.num_workers, ahead)

    def start(self, clips: list[tuple], meanwhile: Callable) -> None:
        """Start answering, fewer at a time if memory is short; meanwhile() is called once the device is busy."""
        from vlm.batches import Batches
        from vlm.loading import free_memory, short_of_memory

        while len(clips) > self.size:             # it may shrink on the way
            part, clips = clips[:self.size], clips[self.size:]
            self.start(part, meanwhile)
        samples, pixels = zip(*clips)
        try:
            if self.engine is None or self.engine.pictures != len(pixels[0]):
                self.engine = None
                self.engine = Batches(self.model, self.questions, self.config.max_new_tokens, len(pixels[0]),
                                      self.size)
            wait = self.engine.answer(pixels, meanwhile)
            self.running.append((samples, wait))
            return
        except (RuntimeError, MemoryError) as error:          # on a CPU PyTorch has no class of its own for it
            if not short_of_memory(error):
                raise
            reason = f"out of memory with {len(clips)} clips at a time: {first_line(error)}"
        self.engine = None
        free_memory()
        if self.size == 1:
            self.lose(samples[0], reason)
            return
        self.size //= 2
        log(f"extract | {self.which} | WARNING | {reason}; going on with {self.size}")
        self.start(clips, meanwhile)

    def lose(self, sample: Sample, reason: str) -> None:
        self.failed.append(failure(sample, self.which, reason))
        log(f"extract | {self.which} | WARNING | clip {sample.key} failed: {reason}")

    def parity(self, samples: list[Sample], journal: Journal) -> dict:
        """How many answers transformers gives alike, one by one: all in float32; not all in 16 or 4 bits."""
        self.engine, same = None, []              # its memory is needed
        for sample, pixels in self.pixels_of(samples, self.config.num_workers):
            if isinstance(pixels, Exception):     # answered once, its file is gone now
                continue
            for number, question in enumerate(self.questions):
                alone = self.model.answer([pixels], [question], self.config.max_new_tokens)[0].tokens
                same.append(alone == journal.read(self.which, sample.key, number)["tokens"])
        log(f"extract | {self.which} | parity | {sum(same)} of {len(same)} answers are those of one by one")
        return {"answers": len(same), "equal": sum(same)}

    def unload(self) -> None:
        self.engine = None                        # it holds the weights
        self.model.unload()


def load_model(which: str, todo: list[Sample], config: ExtractConfig) -> tuple:
    """(model, function that reads what it sees of a sample, the most pictures of a sample, facts for the journal)."""
    from clips.dataset import draft_pictures, target_pictures
    from machine.device import Runtime
    from vlm import eventgpt, video_llava

    name = str(config.draft_model if which == "eventgpt" else config.target_model)
    log(f"extract | {which} | loading {name}")
    runtime = Runtime.choose(config.device, config.dtype, config.quantization)
    if which == "eventgpt":
        model, prompt = eventgpt.EventGPT.load(name, runtime), eventgpt.prompt("{query}")
        read = functools.partial(draft_pictures, which=config.event_images)
        pictures = 1 if config.event_images == "first" else max(
            (len(sample.event_images) or 5 for sample in todo), default=5)
    else:
        model, prompt = video_llava.VideoLlava.load(name, runtime), video_llava.prompt("{query}")
        read, pictures = functools.partial(target_pictures, num_frames=config.num_frames), config.num_frames
    return model, read, pictures, {"model": which, "name": name, "revision": model.revision, "prompt": prompt,
                                   "vocab_size": model.vocab_size}


def failure(sample: Sample, which: str, reason: str) -> dict:
    return {"sample_idx": sample.index, "sample_id": sample.id, "sequence": sample.sequence, "clip": sample.clip,
            "model": which, "reason": reason}


# ------------------------------------------------------------------------------------------- output
def write_pairs(config: ExtractConfig, settings: dict, content: Content, samples: list[Sample], questions: list[str],
                journal: Journal, drafts: list[Sample], pairs: list[Sample], failed: list[dict]) -> None:
    """The output file, whole: a head, one row a line in `results`, then `failed`."""
    head = {
        "timestamp": now(), "dataset_dir": str(config.dataset_dir), "dataset_content": fingerprint(content),
        "total_samples": len(samples), "num_questions": len(questions), "questions": questions,
        "eventgpt_success": len(drafts) * len(questions), "videollava_success": len(pairs) * len(questions),
        "vocab_size": max(model["vocab_size"] for model in journal.models.values()), "models": journal.models,
        "settings": settings, **provenance(),
    }

    def rows() -> Iterator[dict]:
        for sample in pairs:
            for number, question in enumerate(questions):
                short, long = (journal.read(which, sample.key, number) for which in ("eventgpt", "videollava"))
                yield {"sample_idx": sample.index, "question_idx": number, "sample_id": sample.id,
                       "sequence": sample.sequence, "clip": sample.clip, "query": question,
                       "egpt_tokens": short["tokens"], "egpt_text": short["text"], "egpt_finished": short["finished"],
                       "vl_tokens": long["tokens"], "vl_text": long["text"], "vl_finished": long["finished"]}

    write_rows(config.output_file, head, rows(), failed)
    log(f"RESULT | {config.output_file} | {len(pairs) * len(questions)} pairs of {len(samples)} clips x "
        f"{len(questions)} questions | {len(failed)} failed")


if __name__ == "__main__":
    run(main)
