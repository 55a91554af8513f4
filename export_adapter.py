"""A trained drafter, to be handed on: a folder that another machine decodes with, or the hub.

    python export_adapter.py task/1s_20260128_020530 my_adapter
    python export_adapter.py task/1s_20260128_020530 my_adapter --no-memory --push ORG/NAME

Writes config.json and model.safetensors (TokenAdapter.from_pretrained reads them), memory.npz, the
figures of the task and of its decodings as metrics.json, and README.md, a model card made from them.
The folder appears when it is whole. Nothing is uploaded without --push; a repository that --push
makes is private. speculative_decode.py --task takes the folder, or the id on the hub.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import UserError, log, option, parse_config, plain, required
from machine.files import host, make_folder, sync_folder, write_json, write_text
from machine.running import run
from reports.adapter_card import CARD_FILE, METRICS_FILE, card, metrics_of, public_name
from reports.decode_figures import read_decoding
from reports.shapes import sensible_values
from reports.task_figures import REMEASURE, read_results

if TYPE_CHECKING:
    from decoding.task import Task


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a task's adapter, memory, figures and model card into a new folder; upload it if asked."""

    task: Path = required("task folder of train_and_evaluate.py", positional=True)
    folder: Path = required("the new folder", positional=True)
    memory: bool = option(
        True, "include memory.npz, which holds the training answers word for word")
    push: str | None = option(
        None, "upload the folder to this id on the Hugging Face hub, ORG/NAME, too")

    def __post_init__(self):
        from vlm.hub import is_id

        if self.folder.exists():
            raise UserError(f"{self.folder} exists, nothing was changed; name a new folder")
        if self.push is not None and not is_id(self.push):
            raise UserError(f"--push must be an id on the hub, ORG/NAME, got {self.push[:80]!r}")


def main() -> None:
    config = parse_config(ExportConfig)

    from decoding.task import read_task

    task, results = read_task(config.task), read_results(config.task)
    decodings = finished_decodings(config.task)
    models = public_models(task.models)
    answers = len(task.parts.training_answers) if config.memory else 0
    with sensible_values(config.task, REMEASURE):
        metrics = metrics_of(results, decodings)
        text = card(config.push or config.folder.name, metrics, models, answers or None)
    write_folder(config.folder, task, {METRICS_FILE: metrics, CARD_FILE: text}, {
        "task": results["task"], "models": models, "memory": bool(answers)})
    log(f"export | {config.folder} | {len(decodings)} decodings in its card | "
        + (f"memory of {answers} answers, word for word" if answers else "no memory"))
    where = upload(config.folder, config.push) if config.push else config.folder
    log(f"RESULT | {where}")


def finished_decodings(task: Path) -> list[dict]:
    """decode.json of each finished decoding in a task folder, the oldest first."""
    pages = sorted(task.glob("decode_*/DECODE.md"))
    return [read_decoding(page.parent) for page in pages]


def public_models(models: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """What the pair files recorded of each model, without paths of this machine."""
    return {role: [{**facts, "name": public_name(facts.get("name", "unknown"))} for facts in of_role]
            for role, of_role in models.items()}


def write_folder(folder: Path, task: Task, files: dict, facts: dict) -> None:
    """Write all files under a temporary name, then rename. facts: more keys of config.json."""
    from decoding.task import MEMORY_FILE
    from drafting.memory import save_memory

    parent = make_folder(folder.resolve().parent)
    temporary = parent / f".{folder.name}.{host()}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        write_json(temporary / METRICS_FILE, files[METRICS_FILE])
        write_text(temporary / CARD_FILE, files[CARD_FILE])
        if facts["memory"]:
            save_memory(task.parts.training_answers, temporary / MEMORY_FILE)
        task.adapter.save_pretrained(temporary, config=facts)
        for path in temporary.iterdir():
            path.chmod(0o644)                  # safetensors makes a file for its owner alone
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            raise UserError(f"{folder} has appeared meanwhile; name another folder")
        os.rename(temporary, folder)
        sync_folder(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def upload(folder: Path, name: str) -> str:
    """Upload the folder to the hub; a repository that is not there yet is made, private."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder,
                                   commit_message=f"Adapter of {folder.name}")
    except Exception as error:                 # of the network, of the hub's answers, of rights
        raise UserError(f"{folder} is written, but can't be uploaded to {name} "
                        f"({type(error).__name__}: {plain(error)[:300]}); log in with `hf auth login` "
                        f"and upload it with: hf upload {name} {folder}") from error
    return str(commit.commit_url)


if __name__ == "__main__":
    run(main)
