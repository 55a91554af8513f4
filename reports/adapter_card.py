"""metrics.json and README.md (the model card) of an adapter that is handed on, from the JSON of its task.

metrics.json holds figures of results.json and of decodings, and no path of this machine.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path, PurePath

from base import plain
from machine.files import check_format, read_json
from reports.blocks import escape, number, percent, table, times
from reports.decode_figures import counted, own_verdicts, speed_ups
from reports.shapes import FIGURE, NUMBER, check_shape, optional
from reports.task_figures import LEAD_GAMMA, best_drafter, bounds, draft_worth

FORMAT = 1                             # of metrics.json
METRICS_FILE, CARD_FILE = "metrics.json", "README.md"
EXPORT_AGAIN = "export the adapter again"
# All that decoding reads of metrics.json.
METRICS = {"kind": str, "metrics": {"test": {
    "drafters": {str: {"simulated": {str: {"tau": FIGURE}}}},
    "memory_share": optional({"hybrid": optional(NUMBER)})}}}
KEPT = ("pairs", "positions", "memory_share", "stream", "whole_test", "step_ms", "adapter_minus")
OF_A_DRAFTER = ("alpha", "top5", "mean_run", "interval", "parameters")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONTROLS = ("adapter, drafts shuffled", "prefix")
BASELINES = ("copy of the draft", "constant string", "n-gram")


# --------------------------------------------------------------------------------------- metrics.json
def metrics_of(results: dict, decodings: list[dict]) -> dict:
    """The content of metrics.json. results: a task's results.json; decodings: its decode.json's."""
    test = results["metrics"]["test"]
    drafters = {
        name: {**{key: drafter[key] for key in OF_A_DRAFTER},
               "simulated": {gamma: {"tau": run["tau"]} for gamma, run in drafter["simulated"].items()}}
        for name, drafter in test["drafters"].items()}
    provenance = results["provenance"]
    files = {use: [{"name": public_name(file["path"]), "rows": file["rows"], "used": file["used"]}
                   for file in files] for use, files in results["files"].items()}
    return {
        "format": FORMAT, "kind": "adapter", "task": results["task"], "date": results["date"],
        "adapter": results["adapter"], "refitted": results["refitted"],
        "draft_worth": draft_worth(results),
        "files": files, "warnings": len(results["warnings"]),
        "metrics": {"test": {**{key: test[key] for key in KEPT}, "drafters": drafters}},
        "decodings": [decoding_of(decoding) for decoding in decodings],
        "trained_on": provenance["device"], "versions": provenance["versions"],
        "git_commit": provenance["git_commit"]}


def decoding_of(results: dict) -> dict:
    """The figures of one decoding."""
    sums, name = results["totals"], results["drafter"]
    return {
        **{key: results.get(key) for key in ("date", "drafter", "gamma", "tree", "device", "dtype",
                                             "quantization", "interrupted")},
        "temperature": results["config"].get("temperature"), "answers": sums["answers"],
        "failed": len(results["failed"]), "tau": {key: run["tau"] for key, run in sums["runs"].items()},
        "verdicts": own_verdicts(results), "all_verdicts": sums["verdicts"],
        "speed_up": speed_ups(results, name), "target": public_name(results["target"]["name"]),
        "versions": results["provenance"]["versions"]}


def public_name(name) -> str:
    """The name without the folders of this machine: a hub id as it is, of a path its last part."""
    text = str(name)
    return text if HUB_ID.fullmatch(text) else PurePath(text).name


def read_metrics(folder: Path) -> dict:
    """metrics.json of an exported folder, the shape of all that decoding reads of it checked."""
    path = folder / METRICS_FILE
    metrics = read_json(path)
    check_format(path, metrics.get("format") if isinstance(metrics, dict) else None, FORMAT)
    check_shape(path, metrics, METRICS, EXPORT_AGAIN)
    return metrics


# ------------------------------------------------------------------------------------ the model card
def card(name: str, metrics: dict, models: dict[str, list[dict]], answers: int | None) -> str:
    """README.md. name: of the folder or of the hub; models: role -> facts; answers: in memory.npz,
    None without one.
    """
    lines = [*front_matter(models), f"# {escape(name)}", "", *lead(metrics, models),
             *use_section(name), *contract_section(metrics, answers), *models_section(models),
             *acceptance_section(metrics), *decoding_section(metrics["decodings"]),
             *data_section(metrics), *licence_section(answers)]
    return "\n".join(lines)


def front_matter(models: dict[str, list[dict]]) -> list[str]:
    """The head that the hub reads. A base model is named where its revision is a commit of the hub."""
    based_on = sorted({str(facts["name"]) for rows in models.values() for facts in rows
                       if HUB_ID.fullmatch(str(facts.get("name")))
                       and re.fullmatch("[0-9a-f]{40}", str(facts.get("revision")))})
    return ["---", "license: other", "license_name: to-be-filled-in",
            "library_name: eventgpt-drafts-video-llava",
            "tags: [speculative-decoding, token-adapter]",
            *(["base_model:", *(f"- {name}" for name in based_on)] if based_on else []), "---", ""]


def name_of(models: dict[str, list[dict]], role: str) -> str:
    names = [escape(facts["name"]) for facts in models.get(role, ()) if "name" in facts]
    return ", ".join(names) or "a model that the pair files don't name"


def lead(metrics: dict, models: dict[str, list[dict]]) -> list[str]:
    test = metrics["metrics"]["test"]
    best = best_drafter(test)
    drafter = test["drafters"][best]
    text = (f"A drafter for speculative decoding of {name_of(models, 'videollava')}: it proposes "
            "tokens, the target verifies several in one pass, and the answers stay the target's own. "
            f"On {test['pairs']} test answers, **{best}** predicts "
            f"**{percent(drafter['alpha'])}** of the target's tokens (alpha; 95 % interval "
            f"{bounds(drafter['interval'])}), in simulation "
            f"**{number(drafter['simulated'][LEAD_GAMMA]['tau'])}** tokens for each target pass at "
            f"gamma {LEAD_GAMMA} (tau).")
    return [text, ""]


def use_section(name: str) -> list[str]:
    return ["## Use", "", "With the suite, to decode a data set (a folder or a hub id):", "",
            f"    python speculative_decode.py --task {shlex.quote(plain(name))} --target_model ... "
            "--dataset_dir ...", "", "From Python, with `token_adapter.py` and `base.py` alone:", "",
            "    from token_adapter import TokenAdapter",
            f"    adapter = TokenAdapter.from_pretrained({json.dumps(plain(name))})", ""]


def contract_section(metrics: dict, answers: int | None) -> list[str]:
    adapter = metrics["adapter"]
    memory = (f"`memory.npz` holds {answers} answers of the training pairs, **word for word** (as "
              "token ids, which the target's tokenizer decodes): the drafters memory and hybrid begin "
              "with them." if answers else
              "No memory of training answers is included: the drafters memory and hybrid begin empty, "
              "so that alpha and tau are lower at first than those below.")
    return ["## What it is", "",
            f"A transformer of {adapter['num_layers']} layers, width {adapter['embed_dim']}, "
            f"{adapter['parameters'] / 1e6:.1f} M parameters, vocabulary {adapter['vocab_size']}. "
            f"Conditioning {escape(adapter['conditioning'])}; output i proposes "
            f"{escape(adapter['contract'])}. At most {adapter['max_seq_len']} tokens of an answer.", "",
            memory, ""]


def models_section(models: dict[str, list[dict]]) -> list[str]:
    rows = [[escape(role), *(escape(facts.get(key, "not recorded")) for key in
                     ("name", "revision", "vocab_size", "tokenizer"))]
            for role, of_role in models.items() for facts in of_role]
    if not rows:
        return ["## Models", "", "The pair files recorded no models.", ""]
    return ["## Models", "", *table(["role", "name", "revision", "vocabulary", "tokenizer"], rows),
            "Decoding refuses models of another revision or vocabulary.", ""]


def acceptance_section(metrics: dict) -> list[str]:
    test = metrics["metrics"]["test"]
    gammas = list(next(iter(test["drafters"].values()))["simulated"])
    kinds = {**dict.fromkeys(BASELINES, " (baseline)"), **dict.fromkeys(CONTROLS, " (control)")}
    rows = [[name + kinds.get(name, ""), percent(drafter["alpha"]), bounds(drafter["interval"]),
             percent(drafter["top5"]),
             *(number(drafter["simulated"][gamma]["tau"]) for gamma in gammas)]
            for name, drafter in test["drafters"].items()]
    header = ["drafter", "alpha", "95 % interval", "top-5", *(f"tau, gamma {gamma}" for gamma in gammas)]
    measured = (f" {test['pairs']} of {test['whole_test']} test pairs were measured."
                if test["pairs"] < test["whole_test"] else "")
    return ["## Acceptance on test pairs", "", *table(header, rows),
            "alpha: share of target tokens predicted right given the true prefix. tau: tokens for each "
            f"target pass in simulated greedy decoding, the prefill counted.{measured}", "",
            f"What the draft adds: {metrics['draft_worth']}", ""]


def decoding_section(decodings: list[dict]) -> list[str]:
    if not decodings:
        return ["## Decoding", "", "Not measured with this task: neither the speed nor whether answers "
                "equal plain decoding.", ""]
    rows = [[escape(row["date"]), escape(row["device"]), escape(f"{row['dtype']}, {row['quantization']}"),
             escape(drafting_of(row)), row["answers"],
             number(row["tau"][row["drafter"]]), exactness(row),
             *(times(row["speed_up"][key]) for key in ("plain", "generate", "whole"))]
            for row in decodings]
    header = ["date", "hardware", "dtype, quantization", "drafter", "answers", "tau",
              "equal to plain decoding", "over our own loop", "over generate", "end to end over generate"]
    return ["## Decoding", "", *table(header, rows),
            "Speed-ups are ratios of totals over the same answers, without the draft model's time.", ""]


def drafting_of(row: dict) -> str:
    """hybrid, gamma auto, tree auto, sampled at temperature 0.7"""
    sampled = f", sampled at temperature {row['temperature']}" if row["temperature"] else ""
    return f"{row['drafter']}, gamma {row['gamma']}, tree {row['tree']}{sampled}"


def exactness(row: dict) -> str:
    """50 of 50 exact."""
    compared = sum(row["verdicts"].values())
    if not compared:
        return "not compared"
    return f"{row['verdicts'].get('exact', 0)} of {compared} exact" + (
        f" ({counted(row['verdicts'])})" if row["verdicts"].keys() - {"exact"} else "")


def data_section(metrics: dict) -> list[str]:
    rows = [[use, escape(file["name"]), f"{file['used']} of {file['rows']}"]
            for use, files in metrics["files"].items() for file in files]
    made = [f"{name} {version}" for name, version in metrics["versions"].items()]
    return ["## Data", "", *table(["use", "pair file", "rows used"], rows),
            f"Trained {escape(metrics['date'])} on {escape(metrics['trained_on'])} "
            f"({escape(', '.join(made))}). Validation was cut from the training pairs by whole drives; "
            "the test pairs decided nothing. All figures: metrics.json.", ""]


def licence_section(answers: int | None) -> list[str]:
    memory = ", and memory.npz holds such answers themselves" if answers else ""
    return ["## Licence", "", "To be filled in by whoever publishes this folder, here and at the head of "
            "this file. The weights were trained on answers of the models named above about the data "
            f"named above{memory}: their licences may bind what may be done with it.", ""]
