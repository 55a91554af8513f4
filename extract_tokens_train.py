"""Step 1: both models answer the same questions about the same clips; writes their tokens as pairs.

    python extract_tokens_train.py --dataset_dir data/my_egpt_dsec_train/my_egpt_dsec_train_1s \\
        --output_file train_tokens_full.json --draft_model models/EventGPT-7b

EventGPT answers for every clip first and is unloaded, then Video-LLaVA answers for those that
succeeded: only one model is in memory at a time. Each answer is appended to a journal beside the
output as soon as it is there, so the same command goes on where a stopped run was; the output
itself is written whole at the end. A clip whose picture or video can't be read, or whose answer
would come from logits that are no numbers, goes to the list `failed` with the reason and stops
nothing; the same command, given again, tries it once more.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from base import UserError, as_json, check_counts, log, option, parse_config, required
from machine.files import check_plain, make_folder, only_writer
from machine.running import goes_on_with, run
from pairs.journal import Journal, Setting
from vlm.roles import ROLES, Role, View, content_of


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """Write both models' answer tokens for the clips of a data set folder into a JSON file of pairs."""

    dataset_dir: Path = required("data set folder, with event_image/ and mp4/", answers="both")
    output_file: Path = required("the JSON file to write")
    allow_links: list[Path] | None = option(
        None, "folders outside dataset_dir that links in it may lead to; default: none")
    max_samples: int = option(-1, "use only the first so many clips; -1: all")
    max_new_tokens: int = option(50, "longest answer, in tokens", answers="both")
    query: str = option(
        "What are the key elements in this scene?", "the question asked about every clip")
    questions_file: Path | None = option(
        None,
        "ask the questions of this file instead: JSON, JSON Lines, CSV, or one question a line")
    num_questions: int = option(-1, "use only the first so many questions of the file; -1: all")
    draft_model: Path | None = option(None, "folder of the EventGPT checkpoint", answers="draft")
    target_model: str = option(
        "LanguageBind/Video-LLaVA-7B-hf", "folder or hub id of Video-LLaVA", answers="target")
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
    num_workers: int | None = option(
        None, "threads that read pictures and videos ahead; default: one for each core")
    parity_check: int = option(
        0, "answer the first so many clips again, one by one, and tell how many answers agree")
    seed: int = option(42, "seed of PyTorch (answers are greedy: it should change nothing)")
    wait: bool = option(False,
                        "wait when another process is writing this output, instead of ending")
    restart: bool = option(False, "throw away an older journal and output of this name")

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
        if self.draft_model is None or not self.draft_model.is_dir():
            folder = self.draft_model
            got = f"no such folder: {folder}" if folder else "no --draft_model given"
            raise UserError(f"{got}; wanted the folder of the EventGPT checkpoint, which is linked "
                            "from https://github.com/XduSyL/EventGPT")

    def name_of(self, role: Role) -> str:
        """The folder or hub id of this role's model."""
        return str(getattr(self, role.flag))

    def settings(self, questions: list[str], **resolved: str) -> dict[str, Setting]:
        """The settings that answers depend on.

        resolved: what "auto" means on this machine; a field left to "auto" is left out without it.
        """
        values = {**as_json(self), "dataset_dir": str(self.dataset_dir.resolve()), **resolved}
        for role in ROLES.values():
            if Path(self.name_of(role)).is_dir():                     # and no hub id
                values[role.flag] = str(Path(self.name_of(role)).resolve())
        settings = {"questions": Setting(questions, models_of("both"))}
        for field in dataclasses.fields(self):
            name, answers = field.name, field.metadata["answers"]
            if answers and values[name] != "auto":
                settings[name] = Setting(values[name], models_of(answers))
        return settings


def models_of(answers: str) -> tuple[str, ...]:
    """The names, in files, of the models whose answers depend on a field: option(answers=...)."""
    return tuple(role.name for role in ROLES.values() if answers in (role.role, "both"))


def values_of(settings: dict[str, Setting]) -> dict:
    return {name: setting.value for name, setting in settings.items()}


def main():
    config = parse_config(ExtractConfig)

    from clips.dataset import read_dataset
    from clips.questions import read_questions
    from extraction.ledger import Survey
    from extraction.output import find_earlier, may_succeed_now, write_output

    questions = read_questions(config.query, config.questions_file, config.num_questions)
    view = View(config.num_frames, config.event_images)
    make_folder(config.output_file.absolute().parent)
    with only_writer(config.output_file, config.wait):
        samples = read_dataset(config.dataset_dir, config.allow_links or ())
        samples = samples[:config.max_samples if config.max_samples > 0 else None]
        survey = Survey(samples, questions, view, content_of(samples, ROLES.values(), view))
        earlier = None
        if not config.restart:
            earlier = find_earlier(config.output_file, values_of(config.settings(questions)), survey)
        if earlier and not may_succeed_now(earlier, survey):
            log(f"RESULT | {config.output_file} | finished before: {earlier.pairs} pairs, "
                f"{len(earlier.failed)} failed")
            return
        goes_on_with([word for word in sys.argv if word != "--restart"])

        import torch  # from here on, because a finished output needs none

        from extraction.model_pass import Models, Pace, answer_all
        from machine.device import Runtime
        from machine.workers import cores

        torch.manual_seed(config.seed)
        runtime = Runtime.choose(config.device, config.dtype, config.quantization)
        settings = config.settings(questions, dtype=str(runtime.dtype).removeprefix("torch."),
                                   quantization=runtime.quantization)
        pace = Pace(config.max_new_tokens, config.num_workers or cores(), config.batch_size,
                    config.parity_check)
        models = Models({role.role: config.name_of(role) for role in ROLES.values()}, runtime)
        if earlier:
            earlier.check_again(values_of(settings), survey)
        models.check(survey, config.max_new_tokens)
        if config.restart:
            Journal.discard(config.output_file)
        answers = earlier.entries(survey) if earlier else ()
        with Journal(config.output_file, settings, survey.content, answers) as journal:
            ledgers = answer_all(survey, models, journal, pace)
            head = {"dataset_dir": str(config.dataset_dir), "settings": values_of(settings)}
            write_output(config.output_file, head, survey, ledgers)
            journal.remove()
        goes_on_with([])


if __name__ == "__main__":
    run(main)
