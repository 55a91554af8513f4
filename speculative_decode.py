"""Step 3: the target's own words, sooner: a data set decoded speculatively, checked and timed.

    python speculative_decode.py --task task/1s_20260128_020530 --compare \\
        --draft_model models/EventGPT-7b --dataset_dir data/my_egpt_dsec_test/my_egpt_dsec_seq_1s

EventGPT answers for every clip first, where its answers are read, and is unloaded. Then Video-LLaVA
answers, clip by clip in the order they were driven: a drafter proposes tokens, one pass verifies
them, and the result is the answer of greedy decoding. With --compare each answer is also decoded
plainly, by transformers and by our own loop, and by every other drafter.

Writes decode.json, DECODE.md and pictures into a new folder decode_{time} inside the task folder. A
journal holds every answer as soon as it is there: after a stop or a crash the same command goes on.
Exit 3: an answer differs from plain decoding by more than rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import UserError, as_json, check_counts, first_line, log, now, option, parse_config, required
from clips.places import check_pattern
from decoding.journal import hidden_folder, journal_of, open_journal
from decoding.limits import PLAIN, WANTED_DRAFT_MODEL, check_gamma, check_tree, limits_of
from decoding.together import check_alone
from drafting.table import LIVE, LIVE_NAMES
from machine.ranks import this_process
from machine.running import goes_on_with, run
from machine.team import Team, Work, launch_command
from machine.trackers import ABOUT, NO_TRACKER, Name, Tracker, check_tracker, tracking
from reports.decode_figures import tracked_figures
from vlm.hub import is_id
from vlm.roles import DRAFT, NO_MODEL, TARGET, View, content_of

if TYPE_CHECKING:                  # torch is imported only after the flags are read
    from decoding.answers import Answering
    from decoding.clips import Clips
    from decoding.journal import DecodingJournal
    from decoding.task import Task
    from machine.device import Runtime
    from vlm.contract import VisionLanguageModel
    from vlm.roles import Role

# What the answers do not depend on: with other values of these the same journal goes on.
NOT_OF_THE_ANSWERS = ("num_workers", "plots", "parallel", "draft_device", "output_folder",
                      "restart", "query", "questions_file", "num_questions", "tracker")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Decode a data set speculatively with a trained task; check and time it."""

    task: Path = required(
        "task folder of train_and_evaluate.py, or folder or hub id of export_adapter.py")
    dataset_dir: Path = required(
        "data set folder, with event_image/ and mp4/, or a folder of videos")
    sequence_pattern: str | None = option(
        None, "regular expression whose group finds a clip's sequence in its path; default: the "
        "folder of the clip")
    draft_model: str | None = option(
        None,
        "folder of the EventGPT checkpoint, or folder or hub id of another model; needed where the "
        "drafter reads its answers; none: no draft model, and no drafter that reads its answers"
    )
    target_model: str = option(
        "LanguageBind/Video-LLaVA-7B-hf", "folder or hub id of Video-LLaVA, or of another model")
    drafter: Literal[LIVE_NAMES] = option(  # type: ignore[valid-type]
        LIVE_NAMES[0], "; ".join(f"{name}: {entry.about}" for name, entry in LIVE.items()))
    memory: list[Path] | None = option(None,
                                       "memory.npz of earlier decodings, known from the start")
    gamma: str = option(
        "auto", "tokens proposed for each pass, 1 to 16; auto: while they are worth their cost")
    tree: str = option(
        "auto", "nodes of the tree proposed for each pass, where the drafter has second choices; "
        "0: chains; auto: up to 64, those that are worth their cost")
    compare: bool = option(
        False, "decode plainly too, by our loop and (greedily) by transformers, and with every drafter")
    parallel: bool = option(
        False, "measure both models at work at once too (both in memory), on the first clips")
    draft_device: str = option(
        "auto", "with --parallel: where EventGPT runs; auto: beside the target, on --device")
    allow_links: list[Path] | None = option(
        None, "folders outside dataset_dir that links in it may lead to; default: none")
    max_samples: int = option(-1, "use only the first so many clips; -1: all")
    max_new_tokens: int = option(50, "longest answer, in tokens")
    query: str = option("What are the key elements in this scene?",
                        "the question asked about every clip")
    questions_file: Path | None = option(
        None, "ask these instead: JSON list of strings or {question, ...}, or lines")
    num_questions: int = option(-1, "use only the first so many questions of the file; -1: all")
    temperature: float = option(
        0.0, "above 0: sample from the target's distribution instead, just as losslessly")
    shuffle: bool = option(
        False, "decode the clips in random order: shows what the order is worth to a memory")
    quantization: Literal["auto", "4bit", "8bit",
                          "none"] = option("auto", "auto: 4bit on a GPU, none on a CPU")
    dtype: Literal["auto", "float32", "bfloat16",
                   "float16"] = option("auto", "auto: bfloat16 on a GPU, else float32")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    num_frames: int = option(8, "video frames shown to the target")
    event_images: Literal["first", "all"] = option("first", "event pictures shown to the draft")
    draft_sees: Literal["events", "frames"] = option(
        "events", "what the draft model is shown: event pictures, or the target's video frames")
    num_workers: int = option(4, "threads that read pictures and videos ahead of the model")
    fresh_sequences: bool = option(
        False, "each sequence begins with what training left, as always with several processes")
    seed: int = option(42, "for --temperature and --shuffle")
    output_folder: Path | None = option(
        None, "exactly this folder, instead of a new one in the task folder")
    restart: bool = option(False, "throw away what a stopped start of this command has decoded")
    plots: bool = option(True, "draw the pictures")
    tracker: Name = option("none", ABOUT)

    def __post_init__(self):
        check_tracker(self.tracker)
        check_gamma(self.gamma)
        check_tree(self.tree)
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be 0 or more, got {self.temperature}")
        if 0 < self.temperature < 0.01:
            raise UserError(
                f"--temperature must be 0 (greedy) or from 0.01, got {self.temperature}")
        if self.temperature and self.parallel:
            raise UserError("--parallel measures greedy decoding; leave out --temperature")
        if self.draft_device != "auto" and not self.parallel:
            raise UserError("--draft_device belongs to --parallel: without it both run on --device")
        if not self.query.strip():
            raise UserError("--query is empty: wanted a question")
        check_counts(self, ("max_new_tokens", "num_frames", "num_workers"),
                     ("max_samples", "num_questions"))
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}")
        if self.output_folder:
            check_output_folder(self.output_folder)
        check_pattern(self.sequence_pattern)
        name = str(self.draft_model)
        if self.has_draft_model and not (Path(name).is_dir() or is_id(name)):
            raise UserError(f"no such folder: {name}; wanted the folder of the EventGPT checkpoint, "
                            f"or of another model, or {NO_MODEL}")
        if self.parallel and not self.has_draft_model:
            raise UserError("--draft_model is missing: --parallel measures EventGPT's answers; "
                            + WANTED_DRAFT_MODEL)

    @property
    def has_draft_model(self) -> bool:
        return self.draft_model not in (None, NO_MODEL)

    @property
    def view(self) -> View:
        return View(self.num_frames, self.event_images, self.draft_sees)


def check_output_folder(folder: Path) -> None:
    if (folder / "DECODE.md").exists() and not journal_of(folder).exists():
        raise UserError(
            f"{folder} holds a finished decoding (DECODE.md), nothing was changed; choose another "
            "--output_folder")
    if (folder / "results.json").exists():
        raise UserError(
            f"{folder} is a task folder, whose memory.npz would be written over; choose another "
            "--output_folder")


@dataclasses.dataclass(frozen=True)
class Stages:
    """What all stages of a decoding share."""

    task: Task
    clips: Clips                     # that this process decodes
    journal: DecodingJournal
    drafters: tuple[str, ...]        # the names of those that run
    runtime: Runtime
    draft_runtime: Runtime           # of EventGPT beside the target, with --parallel
    tracker: Tracker = NO_TRACKER


def main() -> None:
    config = parse_config(DecodeConfig)
    with Team.meet(this_process(together=True)) as team:
        check_alone(team, {"parallel": config.parallel, "shuffle": config.shuffle})
        fresh = config.fresh_sequences or team.ranks.world > 1
        results = decode(dataclasses.replace(config, fresh_sequences=fresh), team)
    goes_on_with([])
    if results and results["totals"]["verdicts"].get("WRONG"):
        log("ERROR | an answer differs from plain decoding by more than rounding: see DECODE.md")
        sys.exit(3)


def decode(config: DecodeConfig, team: Work) -> dict | None:
    """Decode, as one of the team's processes. The content of decode.json; None but in the first."""
    import torch

    from decoding import together
    from decoding.drafts import drafters_of
    from decoding.results import results_folder, results_of, write_results
    from decoding.task import check_tokenizers, read_task
    from machine.device import Runtime, gpu_of

    task = read_task(config.task, config.memory or [])
    drafters = drafters_of(config.drafter, config.compare, task.conditioning, config.has_draft_model)
    roles = [DRAFT, TARGET] if config.has_draft_model else [TARGET]
    clips = open_clips(config)
    revisions = {role: check_unloaded(role, config, task, clips.questions) for role in roles}
    check_tokenizers(task, {role.role: str(getattr(config, role.flag)) for role in roles})
    device = team.ranks.device(config.device, torch.cuda.device_count())
    runtime = Runtime.choose(device, config.dtype, config.quantization)
    beside = runtime
    if config.draft_device != "auto":
        beside = Runtime.choose(config.draft_device, config.dtype, config.quantization)
    clips.content = content_of(clips.samples, roles, config.view)
    settings, rank = settings_of(config, task, clips.questions, runtime), team.ranks.rank
    together.agree(team, settings, clips.content)
    team.differ("the GPU", gpu_of(runtime.device))
    folder = config.output_folder or hidden_folder(task.folder, settings)
    if config.restart:
        together.discard_together(team, folder)
    with (open_journal(folder, settings, clips.content, rank) as journal,
          tracking("none" if rank else config.tracker, config.output_folder or task.folder,
                   f"{task.folder.resolve().name} decode {now().replace(':', '')}", settings) as tracker):
        goes_on_with([word for word in launch_command() if word != "--restart"])
        together.check_one_disk(team, folder)
        journal.take_up(together.other_journals(folder, rank))
        for role, revision in revisions.items():
            journal.check_revision(role, str(getattr(config, role.flag)), revision)
        mine = together.clips_of(clips, team)
        stages = Stages(task, mine, journal, drafters, runtime, beside, tracker)
        parallel = decode_all(config, stages, draft_all(config, stages)) if mine.samples else None
        together.gather(team, clips, mine, journal, folder)
        if rank:
            return None
        if not journal.answers:
            raise clips.none_left("decoded" if journal.drafts or DRAFT not in roles else "read")
        results_in = results_folder(task, journal, config.output_folder)
        results = results_of(task, clips, journal, parallel, facts_of(config, settings))
        tracker.log({"all": tracked_figures(results)})
        write_results(results_in, results, clips, config.plots)
        together.remove_journals(journal, folder)
        return results


# ----------------------------------------------------------------------------------------- inputs
def check_unloaded(role: Role, config: DecodeConfig, task: Task, questions: list[str]) -> str:
    """Check all of a role's model that can be known before it is loaded; its revision."""
    from decoding.task import check_model

    name = str(getattr(config, role.flag))
    role.check(name, questions, config.view, config.max_new_tokens)
    revision = role.revision(name)
    check_model(task, role, name, {"revision": revision})
    return revision


def open_clips(config: DecodeConfig) -> Clips:
    """The usable clips in the order of decoding; rows of the data set that are unusable have
    failed.
    """
    from clips.dataset import read_dataset
    from clips.questions import read_questions
    from decoding.clips import Clips, failure, in_order

    questions = read_questions(config.query, config.questions_file, config.num_questions)
    samples = read_dataset(config.dataset_dir, config.allow_links or (), config.sequence_pattern)
    samples = samples[:config.max_samples if config.max_samples > 0 else None]
    usable = in_order([sample for sample in samples if not sample.trouble],
                      config.seed if config.shuffle else None)
    failed = [failure(sample, sample.trouble) for sample in samples if sample.trouble]
    return Clips(usable, questions, config.view, config.num_workers, {}, failed)


def settings_of(config: DecodeConfig, task: Task, questions: list[str], runtime: Runtime) -> dict:
    """What answers, figures and times depend on: a journal made with other values of these is not
    continued.
    """
    from machine.device import device_name
    from machine.files import digest_of_file

    def resolved(name: str | Path) -> str:
        return str(Path(name).resolve() if Path(name).is_dir() else name)

    values = {
        name: value for name, value in as_json(config).items() if name not in NOT_OF_THE_ANSWERS
    }
    memories = [digest_of_file(path) for path in config.memory or ()]
    return {**values, "task": f"{task.folder.resolve().name} {task.digest}", "questions": questions,
            "dataset_dir": resolved(config.dataset_dir), "memory": memories,
            "target_model": resolved(config.target_model),
            "draft_model": resolved(str(config.draft_model)) if config.has_draft_model else None,
            "dtype": str(runtime.dtype).removeprefix("torch."),
            "quantization": runtime.quantization, "device": device_name(runtime.device)}


def facts_of(config: DecodeConfig, settings: dict) -> dict:
    """What decode.json says of the run itself."""
    return {"config": as_json(config), "drafter": config.drafter, "gamma": config.gamma, "tree": config.tree,
            **{name: settings[name] for name in ("dtype", "quantization", "device")}}


# ----------------------------------------------------------------------------------------- stages
@contextlib.contextmanager
def loaded(role: Role, config: DecodeConfig, stages: Stages,
           runtime: Runtime) -> Iterator[VisionLanguageModel]:
    """A role's model, of the vocabulary that the task was trained for; unloaded at the end."""
    from decoding.task import check_model

    name = str(getattr(config, role.flag))
    model = role.load(name, runtime)
    check_model(stages.task, role, name, {"vocab_size": model.vocab_size})
    stages.journal.check_revision(role, name, model.revision)
    stages.journal.add({"model": role.name, "facts": model.facts(name)})
    try:
        yield model
    finally:
        model.unload()


def draft_all(config: DecodeConfig, stages: Stages) -> dict:
    """EventGPT's tokens and seconds by clip and question; from the journal where it has answered
    before.
    """
    from decoding.drafts import Drafting, missing_drafts

    clips, journal = stages.clips, stages.journal
    if not config.has_draft_model:
        return {(sample.key, number): ([], 0.0) for sample in clips.samples
                for number in range(len(clips.questions))}
    if missing_drafts(clips, journal):
        with loaded(DRAFT, config, stages, stages.runtime) as model:
            Drafting(model, clips, limits_of("1", config.max_new_tokens, model.eos_ids),
                     journal).run()
    keys = {sample.key for sample in clips.samples}
    return {place: draft for place, draft in journal.drafts.items() if place[0] in keys}


def decode_all(config: DecodeConfig, stages: Stages, drafts: dict) -> dict | None:
    """Decode all answers into the journal. Returns what --parallel measured, None without it."""
    from decoding.answers import Answering, Settings

    clips, journal = stages.clips, stages.journal
    if not drafts or (journal.answers.keys() >= drafts.keys() and not config.parallel):
        return None
    settings = Settings(config.drafter, config.gamma, config.tree, config.compare,
                        config.max_new_tokens, config.temperature, config.seed,
                        config.fresh_sequences)
    with loaded(TARGET, config, stages, stages.runtime) as model:
        stages.task.adapter.to(stages.runtime.device)
        drafters = {name: LIVE[name].make_live(stages.task.parts) for name in stages.drafters}
        answering = Answering(model, drafters, clips, settings, journal, stages.tracker.log)
        answering.run(drafts)
        can_measure = config.parallel and journal.answers
        return measure_parallel(config, stages, answering) if can_measure else None


def measure_parallel(config: DecodeConfig, stages: Stages, answering: Answering) -> dict | None:
    """Seconds with both models at work at once, over the first clips that were decoded; None where
    memory is short.
    """
    from decoding.answers import Question
    from decoding.parallel import PARALLEL_CLIPS, Parallel, Side
    from vlm.loading import free_memory, short_of_memory

    question, view = stages.clips.questions[0], config.view
    samples = [
        sample for sample in stages.clips.samples if (sample.key, 0) in stages.journal.answers
    ][:PARALLEL_CLIPS]
    try:
        with loaded(DRAFT, config, stages, stages.draft_runtime) as model:
            pictures = [DRAFT.pictures(sample, view) for sample in samples]
            target = model.open_target([question], max(map(len, pictures)), config.max_new_tokens)
            limits = limits_of("1", config.max_new_tokens, model.eos_ids)
            draft = Side(model, target, list(map(model.prepare, pictures)), limits)
            pixels = [answering.model.prepare(TARGET.pictures(sample, view)) for sample in samples]
            parallel = Parallel(draft,
                                Side(answering.model, answering.target, pixels, answering.limits),
                                question)
            answering.measure_model(Question(samples[0], 0, question, pixels[0]))
            first, answer = parallel.asked(
                0, parallel.draft_of(0)), stages.journal.answers[samples[0].key, 0]["tokens"]
            chosen, plain = (answering.new_decoder(LIVE[name].make_live(stages.task.parts), first,
                                                   answer) for name in (config.drafter, PLAIN))
            return parallel.measure(chosen, plain)
    except (RuntimeError, MemoryError) as error:
        if not short_of_memory(error):
            raise
        log("decode | WARNING | not measured in parallel: both models don't fit into memory "
            f"({first_line(error)})"
            )
    free_memory()
    return None


if __name__ == "__main__":
    run(main, together=True)
