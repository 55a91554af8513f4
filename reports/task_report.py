"""RESULTS.md of a task, from its results.json alone: how often is each drafter right?"""

import math
from pathlib import Path

from base import log
from machine.files import write_text
from reports.blocks import (
    command_line,
    escape,
    number,
    percent,
    settings_tables,
    shown_pictures,
    table,
)
from reports.charts import Styles, draw_task
from reports.html import PAGE, page
from reports.shapes import sensible_values
from reports.task_figures import (
    LEAD_GAMMA,
    REMEASURE,
    best_drafter,
    bounds,
    draft_worth,
    left_out,
    points,
    read_results,
)
from reports.task_page import body

CURVE_LINES = 50               # of the text curve in RESULTS.md; longer answers are shown in bins


def lead(results: dict) -> list[str]:
    """The answer in a few plain sentences."""
    test = results["metrics"]["test"]
    adapter, copied, constant = test["adapter"], test["direct_copy"], test["constant_string"]
    best = best_drafter(test)
    drafter = test["drafters"][best]
    gamma, longest = max(drafter["simulated"].items(), key=lambda item: item[1]["tau"] or 0.0)
    text = (f"**The adapter predicts {percent(adapter['alpha'])} of the target's tokens on "
            f"{test['pairs']} test pairs ({test['positions']} positions)"
            + (f"; copying the draft gets {percent(copied['alpha'])} right" if copied else "")
            + ".** ")
    if constant and (adapter["alpha"] or 0) <= (constant["alpha"] or 0):
        text += (f"**It does not beat a constant string of the commonest training tokens "
                 f"({percent(constant['alpha'])})**. ")
    elif constant:
        text += (f"That is {100 * (adapter['alpha'] - (constant['alpha'] or 0)):.1f} points above "
                 "a constant string of the commonest training tokens "
                 f"({percent(constant['alpha'])}). ")
    else:
        text += "Without training pairs there is no constant string to compare it with. "
    text += (f"The best drafter is **{best}**: {percent(drafter['alpha'])} of the tokens (95 % "
             f"interval {bounds(drafter['interval'])}), and in simulated greedy speculative "
             f"decoding {number(drafter['simulated'][LEAD_GAMMA]['tau'])} tokens for each target "
             f"pass at gamma {LEAD_GAMMA}, {number(longest['tau'])} at gamma {gamma}.")
    return [text, "", f"**What the draft adds:** {draft_worth(results)}", ""]


# ----------------------------------------------------------------------------------------- sections
def drafter_section(results: dict) -> list[str]:
    """The table of all drafters with its notes, and the paired differences."""
    test = results["metrics"]["test"]
    gammas = list(next(iter(test["drafters"].values()))["simulated"])
    rows = [[
        name,
        percent(d["alpha"]),
        bounds(d["interval"]),
        percent(d["top5"]), *(number(d["simulated"][gamma]["tau"]) for gamma in gammas),
        f"{d['parameters'] / 1e6:.1f} M" if d["parameters"] else "-",
        number(1000 * (d["seconds_per_answer"] or 0), 1)
    ] for name, d in test["drafters"].items()]
    header = [
        "drafter", "alpha", "95 % interval", "top-5", *(f"tau, gamma {gamma}" for gamma in gammas),
        "parameters", "ms per answer"
    ]
    lines = ["## Drafters (test)", "", *table(header, rows), " ".join(drafter_notes(test)), "",
             *tree_table(test["drafters"])]
    rows = [[
        f"adapter minus {name}", f"{points(minus['value'])} points",
        bounds(minus, True),
        left_out(minus)
    ] for name, minus in test["adapter_minus"].items()]
    header = [
        "alpha, paired over the same answers", "difference", "95 % interval",
        "leaving out one drive at a time"
    ]
    return lines + (table(header, rows) if rows else [])


def tree_table(drafters: dict) -> list[str]:
    """Tokens per pass with trees of several sizes beside the longest chain; nothing without trees."""
    branching = {name: drafter for name, drafter in drafters.items() if drafter.get("trees")}
    if not branching:
        return []
    first = next(iter(branching.values()))
    chain = max(first["simulated"], key=int)
    rows = [[
        name, number(drafter["simulated"][chain]["tau"]),
        *(f"{number(tree['tau'])} ({number(tree['depth'], 1)})" for tree in drafter["trees"].values()),
        number(1e6 * (max(tree["seconds_per_node"] or 0 for tree in drafter["trees"].values())), 0)
    ] for name, drafter in branching.items()]
    header = ["trees: tau (depth)", f"chain of {chain}",
              *(f"{nodes} nodes" for nodes in first["trees"]), "us per node"]
    return [*table(header, rows),
            "A tree is built as in decoding, from the most probable nodes, and verified in one pass; "
            "depth: tokens of its longest path, on average. Microseconds are those of this evaluation, "
            "at most.", ""]


def drafter_notes(test: dict) -> list[str]:
    shares = ", ".join(f"{name} {share}" for name, share in test["memory_share"].items())
    by = next(iter(test["drafters"].values()))["interval"]["by"]
    notes = [
        "tau: tokens emitted for each target pass in simulated greedy speculative decoding, "
        "pooled over the answers; the prefill is a pass, and its opening proposals are "
        "verified in it.",
        "`n-gram` knows the training answers; `memory` also learns each test answer once it "
        f"is verified{'' if test['stream'] else ' (switched off here)'}; `online` takes "
        "gradient steps on each; `hybrid` mixes adapter and "
        f"memory{f' (share of the memory, chosen on validation: {shares})' if shares else ''}.",
        f"Intervals are bootstrapped over {by}. Milliseconds are those of this evaluation, "
        "learning included; the hybrids reuse the adapter's passes."
    ]
    if test["step_ms"]:
        notes.append(
            f"One cached adapter step at batch 1 takes {test['step_ms']:.2f} ms here, without CUDA "
            "graph."
        )
    if test["pairs"] < test["whole_test"]:
        notes.insert(0, f"**Measured on {test['pairs']} of {test['whole_test']} test pairs**, the "
                        "first clips of every sequence; `--max_test_samples -1` measures all (a "
                        "large adapter is slow on a CPU).")
    return notes


def best_drafter_section(results: dict) -> list[str]:
    """The best drafter: simulation beside the formula, accepted lengths, and alpha by drive."""
    best = best_drafter(results["metrics"]["test"])
    drafter = results["metrics"]["test"]["drafters"][best]
    simulated, formula = drafter["simulated"], drafter["expected_by_gamma"]
    passes = list(next(iter(simulated.values()))["more_passes_than"])
    rows = [[
        gamma,
        number(run["tau"]),
        number(run["tau_mean"]),
        number(formula[gamma]), *(percent(share) for share in run["more_passes_than"].values())
    ] for gamma, run in simulated.items()]
    header = [
        "gamma", "tau, pooled", "tau, mean over answers", "formula", *(f"more than {n} passes"
                                                                       for n in passes)
    ]
    lengths = ", ".join(f"{n}: {count}"
                        for n, count in enumerate(simulated[LEAD_GAMMA]["accepted_lengths"]))
    drives = [[escape(drive) or "(none named)", alphas["clips"], percent(alphas["alpha"]),
               percent(alphas["without_it"])] for drive, alphas in drafter["drives"].items()]
    return [
        f"### {best}: simulation beside the formula", "", *table(header, rows),
        "The formula treats positions as independent; the difference shows how far they are from "
        "that.",
        "", f"Accepted proposals per pass at gamma {LEAD_GAMMA}: {lengths}.", "",
        f"### {best}: by drive", "",
        *table(["drive", "clips", "alpha", "alpha without this drive"], drives)
    ]


def question_section(results: dict) -> list[str]:
    """The best drafter and the adapter on each question, where there are several."""
    test = results["metrics"]["test"]
    best = best_drafter(test)
    columns = {name: test["drafters"][name].get("questions") or {}
               for name in dict.fromkeys((best, "adapter")) if name in test["drafters"]}
    if not columns[best]:
        return []
    rows = []
    for question, of_best in columns[best].items():
        of_all = [figures.get(question) or {} for figures in columns.values()]
        rows.append([question, of_best["answers"], *(
            cell for figures in of_all
            for cell in (percent(figures.get("alpha")), number(figures.get("tau"))))])
    header = ["question", "answers",
              *(f"{measure}, {name}" for name in columns for measure in ("alpha", "tau"))]
    return ["## By question (test)", "", *table(header, rows),
            f"question: its `question_idx` in the pair files. tau at gamma {LEAD_GAMMA}, simulated.", ""]


def metric_section(metrics: dict) -> list[str]:
    """One column for each set of pairs."""
    sets = [name for name in ("train", "validation", "test") if metrics.get(name)]

    def row(label: str, show) -> list[str]:
        return [label, *(show(metrics[name]) for name in sets)]

    def constant(show):
        return lambda m: show(m["constant_string"]) if m["constant_string"] else "-"

    rows = [
        row("pairs", lambda m: m["pairs"]),
        row("target positions", lambda m: m["positions"]),
        row("adapter, top-1 (alpha)", lambda m: f"**{percent(m['adapter']['alpha'])}**"),
        row("adapter, top-5", lambda m: percent(m["adapter"]["top5"])),
        row("baseline: copying the draft, top-1",
            lambda m: percent(m["direct_copy"]["alpha"]) if m["direct_copy"] else "-"),
        row("baseline: constant string, top-1", constant(lambda c: percent(c["alpha"]))),
        row("baseline: constant string, top-5", constant(lambda c: percent(c["top5"]))),
        row("improvement over copying",
            lambda m: f"{points(m['improvement'])} points" if m["direct_copy"] else "-"),
        row("first token right", lambda m: percent(m["adapter"]["first_token"])),
        row("mean run from the start", lambda m: number(m["adapter"]["mean_run"], 2, " tokens")),
        row("mean run, constant string", constant(lambda c: number(c["mean_run"], 2, " tokens"))),
        row("loss of the adapter", lambda m: number(m["loss"], 3, " nats/token")),
    ]
    lines = ["## Metrics", "", *table(["", *sets], rows)]
    past = sum(metrics[name]["positions_past_max_seq_len"] for name in sets)
    if past:
        lines += [
            f"{past} target positions lie past the adapter's longest answer; it proposes nothing "
            "there, and they "
            "count as misses.", ""
        ]
    gammas = list(metrics["test"]["adapter"]["expected_tokens"])
    expected = [[
        name, *(number(metrics[name]["adapter"]["expected_tokens"][gamma]) for gamma in gammas)
    ] for name in sets]
    return [
        *lines, "## Expected tokens for each target pass", "",
        "By the formula (1 - alpha^(gamma+1)) / (1 - alpha), which **assumes that positions are "
        "independent**. They are not: it is a reference value, not a measurement of decoding.", "",
        *table(["gamma", *gammas], expected)
    ]


def position_section(test: dict) -> list[str]:
    """The per-position curve as text: a bar of 40 characters is 100 %."""
    curve, constant = test["adapter"]["per_position"], test["constant_string"]
    positions = len(curve["count"])
    size = math.ceil(positions / CURVE_LINES)

    def mean(shares: list, first: int) -> float:
        counts = curve["count"][first:first + size]
        return sum(count * (share or 0)
                   for count, share in zip(counts, shares[first:])) / sum(counts)

    lines = [
        "## By position (test)", "",
        "Top-1 of the adapter as a bar; `|` marks the constant string, where there is one.", "",
        "    position  answers   top-1   top-5"
    ]
    for first in range(0, positions, size):
        top1 = mean(curve["alpha"], first)
        bar = list(("#" * round(40 * top1)).ljust(41))
        if constant:
            bar[round(40 * mean(constant["per_position"]["alpha"], first))] = "|"
        name = f"{first}" if size == 1 else f"{first}-{min(first + size, positions) - 1}"
        shares = f"{top1:6.1%}  {mean(curve['top5'], first):6.1%}"
        lines.append(f"    {name:>8}  {curve['count'][first]:7}  {shares}  {''.join(bar)}".rstrip())
    return [*lines, ""]


def data_section(results: dict) -> list[str]:
    """Files read, rows dropped and flagged, and the pairs that went to validation."""
    def reasons(counts: dict) -> str:
        return ", ".join(f"{count} x {reason}" for reason, count in counts.items()) or "none"

    rows = [map(escape, (use, file["path"], file["format"], f"{file['used']} of {file['rows']}",
                         reasons(file["dropped"]), reasons(file["flagged"])))
            for use, files in results["files"].items() for file in files]
    lines = [
        "## Data", "",
        *table(["use", "file", "format", "rows used", "dropped", "flagged, kept"], rows)
    ]
    if results["split"]:
        lines += [f"Validation, cut from the training pairs by {escape(results['split']['by'])}: "
                  f"{escape(', '.join(results['split']['validation']))}. Trained on: "
                  f"{escape(', '.join(results['split']['train']))}.", ""]
    return lines


def training_section(results: dict, pictures: list[str]) -> list[str]:
    if not results["history"]:
        return [
            "## Training", "",
            f"None: the checkpoint {escape(results['config'].get('checkpoint'))} was measured by "
            f"its own contract, {escape(results['adapter']['contract'])}. It has no history "
            "here, so there are no training curves.", "", *shown_pictures(pictures)
        ]
    best = results["history"][results["best_epoch"] - 1]
    phases = [epoch["phase"] for epoch in results["history"]]
    counts = escape(", ".join(f"{phases.count(name)} {name}" for name in dict.fromkeys(phases)))
    again = ("The adapter was then trained again from the start, just as long, with the validation "
             "pairs included; that adapter is kept, and only the metrics on validation are those "
             "of the first. "
             if results["refitted"] else "")
    return [
        "## Training", "",
        f"{len(phases)} epochs ({counts}), {number(results['seconds']['until_trained'], 0)} s with "
        f"reading the pairs. Epoch {best['epoch']} was selected, the best on validation: "
        f"{percent(best['validation_alpha'])} accepted. {again}In the curves, loss and top-1 "
        "on train come from the training pass itself, with dropout "
        "on and changing weights; the metrics above are measured again with the final weights.", "",
        *shown_pictures(pictures)
    ]


def settings_section(results: dict) -> list[str]:
    """Settings, versions, and the command that made this."""
    provenance = results["provenance"]
    settings = {**{f"--{name}": value for name, value in results["config"].items()},
                **{f"adapter: {name}": value for name, value in results["adapter"].items()}}
    facts = {
        "date": results["date"], "device": provenance["device"],
        "git commit": provenance["git_commit"], "folder": provenance["folder"],
        **provenance["versions"]
    }
    return [
        *settings_tables(settings, facts), "## Again", "", "From the folder named above:", "",
        command_line(provenance["argv"]), "",
        "This page and the pictures, from results.json alone:", "",
        "    python report.py --rebuild TASK_FOLDER", ""
    ]


def markdown(results: dict, pictures: list[str]) -> str:
    """RESULTS.md of one task."""
    lines = [f"# {escape(results['task'])}", "", *lead(results)]
    lines += [f"> **Warning:** {escape(warning)}\n" for warning in results["warnings"]]
    lines += [
        *drafter_section(results), *best_drafter_section(results), *question_section(results),
        *metric_section(results["metrics"]), *position_section(results["metrics"]["test"]),
        *training_section(results, pictures), *data_section(results), *settings_section(results)
    ]
    return "\n".join(lines)


def task_page(results: dict) -> str:
    """REPORT.html of one task."""
    sections = [*drafter_section(results), *best_drafter_section(results), *question_section(results),
                *metric_section(results["metrics"]), *position_section(results["metrics"]["test"]),
                *training_section(results, []), *data_section(results), *settings_section(results)]
    return page(f"Task {results['task']}", body(results, sections))


def write_report(task: Path, styles: Styles, plots: bool = True) -> None:
    """Make the pictures, REPORT.html and then RESULTS.md of a task folder, from its results.json alone.

    styles: line style and colour of each drafter in the pictures; a drafter without one is drawn in
    grey. Raises UserError as read_results does.
    """
    results = read_results(task)
    with sensible_values(task / "results.json", REMEASURE):
        # a damaged file is refused before anything is drawn
        markdown(results, [])
        html = task_page(results)
    text = markdown(results, draw_task(task, results, styles) if plots else [])
    write_text(task / PAGE, html)
    write_text(task / "RESULTS.md", text)
    log(f"report | {task / 'RESULTS.md'}")
