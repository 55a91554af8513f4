"""The task that is decoded with: what training left, and whether these are the models that it was
trained for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from base import UserError, log
from decoding import exported
from drafting.parts import LiveParts
from machine.files import check_format, digest_of_file, read_json
from pairs.tokenizers import Tokenizers
from reports.shapes import NUMBER, TEXT, check_shape, optional
from reports.task_figures import FORMAT, REMEASURE
from vlm.contract import same_weights

if TYPE_CHECKING:
    from token_adapter import TokenAdapter
    from vlm.roles import Role

MEMORY_SHARE = 0.5                 # of the memory in a hybrid, where training chose none
MEMORY_FILE = exported.MEMORY_FILE

# All that decoding reads of results.json.
RESULTS = {
    "files": optional({"train": optional([{"models": optional(dict)}])}),
    "metrics": {"test": {"drafters": {str: {"simulated": optional(dict), "trees": optional(dict)}},
                         "memory_share": optional({"hybrid": optional(NUMBER)})}}}
MODEL = {"name": TEXT, "vocab_size": optional(int), "revision": optional(str)}
SIMULATED = {"tau": optional(NUMBER)}


@dataclasses.dataclass
class Task:
    """What training left: the adapter, what a memory begins with, and what results.json says of
    both models.
    """

    folder: Path                     # where decodings go
    parts: LiveParts
    # drafter's name in results.json -> gamma -> tau on the test pairs
    simulated: dict[str, dict[str, float]]
    # name of the model -> facts that the training files recorded of it
    models: dict[str, list[dict]]
    digest: str = ""                             # of results.json, which no two trainings share
    # the same as `simulated` of trees: nodes -> tau
    simulated_trees: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def adapter(self) -> TokenAdapter:
        assert self.parts.adapter, "a task that was read has an adapter"
        return self.parts.adapter

    @property
    def conditioning(self) -> str:
        """Of the adapter."""
        return self.adapter.config.conditioning


def read_task(name: Path, memories: Iterable[Path] = ()) -> Task:
    """The finished task of this folder, or of an exported folder, or of an exported one's hub id.

    memories: memory.npz of earlier decodings, whose answers count as fresh ones. Raises UserError
    for whatever is missing, unfinished or damaged.
    """
    from drafting.memory import load_memory

    folder = exported.files_of(name)
    read = read_exported if exported.is_exported(folder) else read_trained
    adapter, test, models, digest = read(folder)
    memory = folder / MEMORY_FILE
    if not memory.exists():
        log(f"decode | {name} has no {MEMORY_FILE}: the memory begins without training answers")
    training_answers = load_memory(memory) if memory.exists() else []
    verified_answers = [answer for path in memories for answer in load_memory(path)]
    share = (test.get("memory_share") or {}).get("hybrid")
    parts = LiveParts(adapter, training_answers, verified_answers,
                      MEMORY_SHARE if share is None else share)
    return Task(exported.results_folder_of(name), parts, taus(test, "simulated"), models, digest,
                taus(test, "trees"))


def taus(test: dict, kind: str) -> dict[str, dict[str, float]]:
    """{drafter: {gamma or nodes: tau}} of chains ("simulated") or of "trees"."""
    return {drafter: {size: row.get("tau") for size, row in (facts.get(kind) or {}).items()}
            for drafter, facts in test["drafters"].items()}


def read_trained(folder: Path) -> tuple[TokenAdapter, dict, dict[str, list[dict]], str]:
    """(adapter, figures on test pairs, facts of each model, digest) of a task folder."""
    from drafting.checkpoints import load_adapter

    for file in ("best_model.pt", "results.json"):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is no finished task: it has no {file}; wanted a folder that "
                            "train_and_evaluate.py wrote")
    results = read_results(folder)
    return (load_adapter(folder / "best_model.pt"), results["metrics"]["test"],
            recorded_models(results), digest_of_file(folder / "results.json"))


def read_exported(folder: Path) -> tuple[TokenAdapter, dict, dict[str, list[dict]], str]:
    """The same of a folder that export_adapter.py wrote."""
    from token_adapter import TokenAdapter

    models = exported.read_facts(folder).get("models") or {}
    for facts in models.values():
        check_shape(folder / exported.CONFIG_FILE, facts, [MODEL], exported.EXPORT_AGAIN)
    test = exported.read_metrics(folder)["metrics"]["test"]
    return TokenAdapter.from_pretrained(folder), test, models, exported.digest_of(folder)


def read_results(folder: Path) -> dict:
    """results.json of a task, the shape of all that decoding reads of it checked."""
    file = folder / "results.json"
    results = read_json(file)
    if isinstance(results, dict) and results.get("unfinished"):
        raise UserError(
            f"{folder} is unfinished: go on with train_and_evaluate.py --resume {folder}")
    test = (results.get("metrics") or {}).get("test") if isinstance(results, dict) else None
    if not isinstance(test, dict) or not isinstance(test.get("drafters"), dict):
        raise UserError(f"{file} is not the results.json of train_and_evaluate.py")
    check_format(file, results.get("format"), FORMAT)
    check_shape(file, results, RESULTS, REMEASURE)
    for facts in recorded_models(results).values():
        check_shape(file, facts, [MODEL], REMEASURE)
    for drafter in test["drafters"].values():
        for kind in ("simulated", "trees"):
            check_shape(file, list((drafter.get(kind) or {}).values()), [SIMULATED], REMEASURE)
    return results


def recorded_models(results: dict) -> dict[str, list[dict]]:
    """Name of the model -> the facts that each training file recorded of it; different ones once
    each.
    """
    models: dict[str, list[dict]] = {}
    for file in (results.get("files") or {}).get("train") or []:
        for name, facts in (file.get("models") or {}).items():
            if facts not in models.setdefault(name, []):
                models[name].append(facts)
    return models


def check_tokenizers(task: Task, names: dict[str, str]) -> None:
    """A UserError unless the adapter was trained on pairs of these models' tokenizers, as far as its
    files tell. Where draft and target have different ones, the task's drafters get a translation.

    names: role -> folder or hub id of the models of this run.
    """
    from drafting.checkpoints import tokenizers_of
    from vlm.vocabulary import Translation, digest_of, ends_of, is_same, tokenizer_of

    tokenizers = {role: tokenizer_of(name) for role, name in names.items()}
    digests = {role: digest_of(tokenizer) for role, tokenizer in tokenizers.items()}
    are_same = is_same(*tokenizers.values()) if len(tokenizers) == 2 else None
    config = task.adapter.config
    found = Tokenizers(digests.get("draft", ""), digests["target"], are_same)
    tokenizers_of(config).check(found, f"the adapter of {task.folder}", "the models of this run",
                                with_drafts=config.conditioning != "prefix")
    if are_same is False:
        log("decode | draft and target have tokenizers of their own: copy proposes the draft's text in "
            "the target's tokens")
        task.parts.translate = Translation(tokenizers["draft"], tokenizers["target"],
                                           ends_of(names["draft"]))


def check_model(task: Task, role: Role, name: str, facts: dict) -> None:
    """A UserError unless the adapter was trained on answers of this model, as far as its pair files
    tell.

    facts: vocab_size and revision of the model, or one of both.
    """
    for recorded in task.models.get(role.name, ()):
        for key in [key for key in ("vocab_size", "revision") if key in facts]:
            trained, loaded = recorded.get(key), facts[key]
            # of a version that did not record it
            if trained is None:
                continue
            is_same = same_weights(trained, loaded) if key == "revision" else trained == loaded
            if is_same is None:
                log(f"decode | WARNING | {name}: nothing tells whether its revision, {loaded}, is "
                    f"{trained}, which the task was trained for")
            elif not is_same:
                raise UserError(
                    f"{task.folder} was trained on answers of {recorded.get('name')} ({key} "
                    f"{trained}), but {name} has {key} {loaded}; decode with that model, or train "
                    "on pairs of this one")
