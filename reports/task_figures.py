"""The figures in results.json of a task: its shape, the best drafter, and the worth of the draft."""

import re
from collections.abc import Iterator
from pathlib import Path

from base import UserError
from machine.files import check_format, read_json
from reports.blocks import number, percent
from reports.shapes import FIGURE, TEXT, check_shape, optional

FORMAT = 1                     # of results.json; 0: without a number, before formats were counted
LEAD_GAMMA = "8"               # the page leads with tau at this gamma
PLAIN_NAME = re.compile(r"[\w ,.+-]*")           # of a drafter, a figure, a gamma
REMEASURE = "measure its best_model.pt with train_and_evaluate.py --checkpoint"

MEASURES = {"alpha": FIGURE, "top5": FIGURE, "first_token": FIGURE, "mean_run": FIGURE,
            "expected_tokens": {str: FIGURE},
            "per_position": {"count": [int], "alpha": [FIGURE]}}
SET = {"pairs": int, "positions": int, "positions_past_max_seq_len": int,
       "improvement": FIGURE, "loss": FIGURE, "adapter": MEASURES,
       "direct_copy": optional(MEASURES), "constant_string": optional(MEASURES)}
INTERVAL = {"value": FIGURE, "low": FIGURE, "high": FIGURE, "by": str,
            "left_out": optional([FIGURE])}
SIMULATED = {"tau": FIGURE, "tau_mean": FIGURE, "accepted_lengths": [int],
             "more_passes_than": {str: FIGURE}}
TREES = {"tau": FIGURE, "nodes": FIGURE, "depth": FIGURE, "seconds_per_node": FIGURE}
DRIVE = {"clips": int, "alpha": FIGURE, "without_it": FIGURE}
QUESTION = {"answers": int, "alpha": FIGURE, "tau": FIGURE}
DRAFTER = {**MEASURES, "questions": optional(dict), "simulated": {str: SIMULATED},
           "expected_by_gamma": {str: FIGURE}, "interval": INTERVAL, "parameters": int,
           "seconds_per_answer": FIGURE, "drives": {str: DRIVE},
           "trees": optional({str: TREES})}
EPOCH = {"epoch": int, "phase": str, "train_loss": FIGURE, "train_alpha": FIGURE,
         "validation_loss": FIGURE, "validation_alpha": FIGURE, "validation_top5": FIGURE,
         "learning_rate": FIGURE}
FILE = {"path": str, "format": str, "rows": int, "used": int, "dropped": dict, "flagged": dict}
TEST = {**SET, "drafters": {str: DRAFTER}, "memory_share": dict, "stream": bool,
        "whole_test": int, "step_ms": FIGURE, "adapter_minus": dict}
SPLIT = {"by": str, "validation": [str], "train": [str]}
PROVENANCE = {"argv": [str], "git_commit": TEXT, "folder": str, "device": str, "versions": dict}
RESULTS = {
    "task": str, "date": str, "config": {"conditioning": TEXT}, "warnings": [str],
    "adapter": {"conditioning": str, "contract": str},
    "files": dict, "split": optional(SPLIT), "history": [EPOCH],
    "best_epoch": (int, type(None)), "refitted": bool, "seconds": {"until_trained": FIGURE},
    "metrics": {"train": optional(SET), "validation": optional(SET), "test": TEST},
    "provenance": PROVENANCE}


def read_results(task: Path) -> dict:
    """results.json of a task folder, its shape checked.

    Raises UserError when there is none, when it is unfinished, another program's, of a later
    version, or damaged.
    """
    path = task / "results.json"
    if not path.exists():
        raise UserError(f"{task} is no finished task: it has no results.json")
    results = read_json(path)
    if isinstance(results, dict) and results.get("unfinished"):
        raise UserError(f"{task} is unfinished: go on with train_and_evaluate.py --resume {task}")
    metrics = results.get("metrics") if isinstance(results, dict) else None
    if not isinstance(metrics, dict) or "test" not in metrics:
        raise UserError(f"{path} is not the results.json of train_and_evaluate.py")
    check_format(path, results.get("format", 0), FORMAT)
    if unknown := next(unknown_names(metrics), None):
        raise UserError(f"{path} has the name {unknown[:40]!a} among its metrics, which no program "
                        f"of ours writes; {REMEASURE}")
    check_shape(path, results, RESULTS, REMEASURE)
    for drafter in metrics["test"]["drafters"].values():
        check_shape(path, list((drafter.get("questions") or {}).values()), [QUESTION], REMEASURE)
    for minus in metrics["test"]["adapter_minus"].values():
        check_shape(path, minus, INTERVAL, REMEASURE)
    for files in results["files"].values():
        check_shape(path, files, [FILE], REMEASURE)
    return results


def unknown_names(metrics) -> Iterator[str]:
    """Keys and texts that no program of ours writes; names of drives come from files and are
    escaped on the page.
    """
    if isinstance(metrics, str) and not PLAIN_NAME.fullmatch(metrics):
        yield metrics
    if isinstance(metrics, dict):
        for key, part in metrics.items():
            yield from unknown_names(key)
            drives = [*part.values()] if key == "drives" and isinstance(part, dict) else None
            yield from unknown_names(part if key != "drives" else drives)
    if isinstance(metrics, list):
        for part in metrics:
            yield from unknown_names(part)


def one_line(results: dict) -> str:
    """The answer for a log line: the adapter's acceptance and, named as such, the baselines'."""
    test = results["metrics"]["test"]
    adapter = test["adapter"]
    baselines = {"copying the draft": test["direct_copy"],
                 "constant string": test["constant_string"]}
    shown = ", ".join(f"{name} {percent(row['alpha'])}" for name, row in baselines.items() if row)
    return (f"adapter accepted {percent(adapter['alpha'])} (baselines: {shown or 'none'}) | top-5 "
            f"{percent(adapter['top5'])} | mean run {number(adapter['mean_run'], 1)}")


def tracked_figures(test: dict) -> dict:
    """The figures on test pairs that an experiment tracker gets."""
    return {name: {"alpha": drafter["alpha"],
                   "tau": {gamma: run["tau"] for gamma, run in drafter["simulated"].items()}}
            for name, drafter in test["drafters"].items()}


def best_drafter(test: dict) -> str:
    """The drafter with the most tokens per pass at the gamma that the page leads with."""
    def tau(name: str) -> float:
        return test["drafters"][name]["simulated"][LEAD_GAMMA]["tau"] or 0.0

    return max(test["drafters"], key=tau)


def points(share: float | None) -> str:
    """A difference of two shares, in percentage points: +4.1."""
    return "-" if share is None else f"{100 * share:+.1f}"


def bounds(interval: dict, signed: bool = False) -> str:
    if interval["low"] is None or interval["high"] is None:
        return "-"
    form = "{:+.1f}" if signed else "{:.1f}"
    return f"{form.format(100 * interval['low'])} to {form.format(100 * interval['high'])}"


def left_out(interval: dict) -> str:
    """The range of a difference when any one drive is left out."""
    if not interval["left_out"]:
        return "a single drive"
    low, high = interval["left_out"]
    return f"{points(low)} to {points(high)}"


def draft_worth(results: dict) -> str:
    """One sentence on the worth of EventGPT's answer, with its interval."""
    minus = results["metrics"]["test"]["adapter_minus"]
    conditioning = results["adapter"]["conditioning"]
    if conditioning == "draft":
        return ("this adapter sees nothing but the draft; its worth is the distance to the "
                "constant string. Train with --conditioning prefix+draft for the comparison that "
                "decides it.")
    if conditioning == "prefix":
        if results["config"]["conditioning"] == "prefix+draft":
            return ("nothing that validation could see. An adapter that also reads the draft was "
                    "trained and was not better on the validation drives; the selected adapter "
                    "reads verified tokens alone.")
        if results["metrics"]["test"]["direct_copy"] is None:
            return "nothing: these pairs have no drafts."
        return "not measured: this adapter was trained to read verified tokens alone."
    controls = {"prefix": "the same adapter trained without drafts",
                "adapter, drafts shuffled": "itself when shown another clip's draft"}
    parts = [
        f"{points(minus[name]['value'])} points of alpha (95 % interval "
        f"{bounds(minus[name], True)}, paired, over "
        f"{minus[name]['by']}) against {words}" for name, words in controls.items() if name in minus
    ]
    if not parts:
        return "not measured for a checkpoint."
    certain = all((minus[name]["low"] or 0) > 0 for name in controls if name in minus)
    return "; ".join(parts) + ("." if certain else ": not a certain gain.")
