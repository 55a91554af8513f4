"""Step 1: both models answer the same questions about the same clips; writes their tokens as pairs.

    python extract_tokens_train.py --dataset_dir data/my_egpt_dsec_train/my_egpt_dsec_train_1s \\
        --output_file train_tokens_full.json --draft_model models/EventGPT-7b

EventGPT answers for every clip first and is unloaded, then Video-LLaVA answers for those that
succeeded: only one model is in memory at a time. With --draft_model none Video-LLaVA answers alone,
and the pairs have empty drafts. Each answer is appended to a journal beside the
output as soon as it is there, so the same command goes on where a stopped run was; the output
itself is written whole at the end. A clip whose picture or video can't be read, or whose answer
would come from logits that are no numbers, goes to the list `failed` with the reason and stops
nothing; the same command, given again, tries it once more.

Several processes share the clips: torchrun --nproc_per_node 8 extract_tokens_train.py ...; see
docs/clusters.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import UserError, as_json, check_counts, log, option, parse_config, required
from clips.places import check_pattern
from extraction.together import (
    discard_together,
    is_one_disk,
    log_merge_command,
    merged_ledgers,
    open_together,
    written_by,
)
from machine.files import check_plain, make_folder, only_writer
from machine.ranks import this_process
from machine.running import goes_on_with, run
from machine.team import Team, Work, launch_command
from pairs.journal import Setting
from pairs.journals import Journals, finish_removal, open_journals, remove_locks
from vlm.hub import is_id
from vlm.roles import DRAFT, NO_MODEL, ROLES, TARGET, Role, View, content_of

if TYPE_CHECKING:
    from extraction.ledger import Survey
    from vlm.vocabulary import Translation

# Flags that the processes of one launch may differ in.
EACH_ITS_OWN = ("device", "num_workers", "batch_size", "wait")


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """Write both models' answer tokens for the clips of a data set into a JSON file of pairs."""

    dataset_dir: Path = required(
        "data set folder, with event_image/ and mp4/, or a folder of videos", answers="both")
    output_file: Path = required("the JSON file to write")
    allow_links: list[Path] | None = option(
        None, "folders outside dataset_dir that links in it may lead to; default: none")
    sequence_pattern: str | None = option(
        None, "regular expression whose group finds a clip's sequence in its path; default: the "
        "folder of the clip", answers="both")
    max_samples: int = option(-1, "use only the first so many clips; -1: all")
    max_new_tokens: int = option(50, "longest answer, in tokens", answers="both")
    query: str = option(
        "What are the key elements in this scene?", "the question asked about every clip")
    questions_file: Path | None = option(
        None,
        "ask the questions of this file instead: JSON, JSON Lines, CSV, or one question a line")
    num_questions: int = option(-1, "use only the first so many questions of the file; -1: all")
    draft_model: str | None = option(
        None, "folder of the EventGPT checkpoint, or folder or hub id of another model; none: the "
        "target answers alone", answers="draft")
    target_model: str = option(
        "LanguageBind/Video-LLaVA-7B-hf", "folder or hub id of Video-LLaVA, or of another model",
        answers="target")
    quantization: Literal["auto", "4bit", "8bit", "none"] = option(
        "auto",
        "auto: 4bit on a GPU (4.2 GiB a 7B model; a tenth slower than none in large batches, "
        "a third one by one), none on a CPU; none: 13.2 GiB, for large cards; 8bit: 7.2 GiB, slow",
        answers="both")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto: bfloat16 on a GPU, else float32", answers="both")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    batch_size: int | None = option(
        None, "clips at a time; default: as many as the free memory holds")
    num_frames: int = option(8, "video frames shown to the target", answers="target")
    event_images: Literal["first", "all"] = option(
        "first", "event pictures shown to the draft", answers="draft")
    draft_sees: Literal["events", "frames"] = option(
        "events", "what the draft model is shown: event pictures, or the target's video frames",
        answers="draft")
    num_workers: int | None = option(
        None, "threads that read pictures and videos ahead; default: one for each core")
    parity_check: int = option(
        0, "answer the first so many clips again, one by one, and tell how many answers agree")
    seed: int = option(42, "seed of PyTorch (answers are greedy: it should change nothing)")
    wait: bool = option(False,
                        "wait when another process is writing this output, instead of ending")
    restart: bool = option(False, "throw away an older journal and output of this name")
    merge: list[Path] | None = option(
        None, "make the output from these journals, which processes left on disks of their own")

    def __post_init__(self):
        if not self.query.strip():
            raise UserError("--query is empty: wanted a question")
        check_plain(self.output_file)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}")
        given = [name for name in ("batch_size", "num_workers") if getattr(self, name) is not None]
        check_counts(self, ("max_new_tokens", "num_frames", *given),
                     ("max_samples", "num_questions"))
        if self.parity_check < 0:
            raise UserError(f"--parity_check must be 0 (none) or more, got {self.parity_check}")
        check_pattern(self.sequence_pattern)
        name = self.draft_model
        if name != NO_MODEL and not (name and (Path(name).is_dir() or is_id(name))):
            got = f"no such folder: {name}" if name else "no --draft_model given"
            raise UserError(f"{got}; wanted the folder of the EventGPT checkpoint, which is linked "
                            "from https://github.com/XduSyL/EventGPT, or of another model, or "
                            f"{NO_MODEL}")

    @property
    def roles(self) -> list[Role]:
        """The roles that answer."""
        return [TARGET] if self.draft_model == NO_MODEL else list(ROLES.values())

    def name_of(self, role: Role) -> str:
        """The folder or hub id of this role's model."""
        return str(getattr(self, role.flag))

    def translation(self) -> Translation | None:
        """Drafts in the target's tokens, where both models answer and their tokenizers differ."""
        from vlm.vocabulary import translation_between

        names = [self.name_of(role) for role in self.roles]
        return translation_between(*names) if len(names) == 2 else None

    def settings(self, questions: list[str], **resolved: str) -> dict[str, Setting]:
        """The settings that answers depend on.

        resolved: what "auto" means on this machine; a field left to "auto" is left out without it.
        """
        values = {**as_json(self), "dataset_dir": str(self.dataset_dir.resolve()), **resolved}
        for role in self.roles:
            if Path(self.name_of(role)).is_dir():                     # and no hub id
                values[role.flag] = str(Path(self.name_of(role)).resolve())
        settings = {"questions": Setting(questions, models_of("both"))}
        for field in dataclasses.fields(self):
            name, answers = field.name, field.metadata["answers"]
            is_used = answers in ("both", *(role.role for role in self.roles)) or name == DRAFT.flag
            if answers and is_used and values[name] != "auto":
                settings[name] = Setting(values[name], models_of(answers))
        return settings


def models_of(answers: str) -> tuple[str, ...]:
    """The names, in files, of the models whose answers depend on a field: option(answers=...)."""
    return tuple(role.name for role in ROLES.values() if answers in (role.role, "both"))


def values_of(settings: dict[str, Setting]) -> dict:
    return {name: setting.value for name, setting in settings.items()}


def survey_of(config: ExtractConfig) -> Survey:
    from clips.dataset import read_dataset
    from clips.questions import read_questions
    from extraction.ledger import Survey

    questions = read_questions(config.query, config.questions_file, config.num_questions)
    view = View(config.num_frames, config.event_images, config.draft_sees)
    samples = read_dataset(config.dataset_dir, config.allow_links or (), config.sequence_pattern)
    samples = samples[:config.max_samples if config.max_samples > 0 else None]
    return Survey(samples, questions, view, content_of(samples, config.roles, view))


def main():
    config = parse_config(ExtractConfig)
    with Team.meet(this_process(together=True)) as team:
        team.agree({f"--{name}": json.dumps(value) for name, value in as_json(config).items()
                    if name not in EACH_ITS_OWN})
        make_folder(config.output_file.absolute().parent)
        with only_writer(written_by(config.output_file, team.ranks.rank), config.wait):
            if config.merge and team.ranks.world == 1:
                merge(config)
            elif config.merge:
                raise UserError(f"--merge is the work of one process, here are {team.ranks.world}")
            else:
                extract(config, team)
        goes_on_with([])


def extract(config: ExtractConfig, team: Work) -> None:
    """Answer what is missing, as one of the team's processes; the first writes the output."""
    from extraction.content import fingerprint
    from extraction.output import find_earlier, may_succeed_now, write_output

    survey, output_file = survey_of(config), config.output_file
    team.agree({"data set folder": fingerprint(survey.content)})
    earlier, is_first = None, team.ranks.rank == 0
    if is_first and not config.restart:
        finish_removal(output_file)
        earlier = find_earlier(output_file, values_of(config.settings(survey.questions)), survey)
    if earlier and not may_succeed_now(earlier, survey):
        log(f"RESULT | {output_file} | finished before: {earlier.pairs} pairs, "
            f"{len(earlier.failed)} failed")
        team.from_first("state", lambda: "finished")
        team.outlast()
        remove_locks(output_file)
        return
    if team.from_first("state", lambda: "open") == "finished":
        return
    goes_on_with([word for word in launch_command() if word != "--restart"])

    import torch  # from here on, because a finished output needs none

    from extraction.model_pass import Models, Pace, answer_all
    from machine.device import Runtime, gpu_of
    from machine.workers import cores

    torch.manual_seed(config.seed)
    device = team.ranks.device(config.device, torch.cuda.device_count())
    runtime = Runtime.choose(device, config.dtype, config.quantization)
    settings = config.settings(survey.questions, dtype=str(runtime.dtype).removeprefix("torch."),
                               quantization=runtime.quantization)
    team.agree({name: json.dumps(setting.value) for name, setting in settings.items()})
    team.differ("the GPU", gpu_of(runtime.device))
    workers = config.num_workers or max(1, cores() // team.ranks.local_world)
    pace = Pace(config.max_new_tokens, workers, config.batch_size, config.parity_check)
    models = Models({role.role: config.name_of(role) for role in config.roles}, runtime)
    if earlier:
        earlier.check_again(values_of(settings), survey)
    models.check(survey, config.max_new_tokens)
    if config.restart:
        discard_together(output_file, team)
    answers = earlier.entries(survey) if earlier else ()
    with open_together(team, lambda: Journals(output_file, settings, survey.content, answers,
                                              team.ranks.rank)) as journals:
        one_disk = is_one_disk(team, journals)
        ledgers = answer_all(survey, models, journals, pace, team)
        if is_first:
            team.outlast()
            remove_locks(output_file)
        if is_first and one_disk:
            journals.refresh()
            head = head_of(config, values_of(settings))
            write_output(output_file, head, survey, ledgers, config.translation())
            journals.remove()
        elif is_first:
            log_merge_command(output_file, survey, ledgers)


def merge(config: ExtractConfig) -> None:
    """Make the output from the journals of all processes, wherever they were written."""
    from extraction.output import write_output

    survey = survey_of(config)
    if config.output_file.exists() and not config.restart:
        raise UserError(f"{config.output_file} exists; choose another --output_file, or --restart "
                        "to replace it")
    merged = open_journals(config.merge or [], config.settings(survey.questions), survey.content)
    ledgers = merged_ledgers(survey, merged)
    settings = merged.parts[0].file.head["settings"]
    write_output(config.output_file, head_of(config, settings), survey, ledgers,
                 config.translation())
    merged.close()


def head_of(config: ExtractConfig, settings: dict) -> dict:
    """What the output records of the run itself."""
    return {"dataset_dir": str(config.dataset_dir), "settings": settings}


if __name__ == "__main__":
    run(main, together=True)
