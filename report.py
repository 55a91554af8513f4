"""RESULTS.md and pictures from results.json alone, and the SUMMARY of several tasks.

    python report.py task/1s_20260128_020530 task/500ms_20260128_031512   the SUMMARY of these tasks
    python report.py --rebuild task/1s_20260128_020530                    make RESULTS.md and pictures anew

Text from files (paths, sequence names, arguments) is escaped: a name can't become a link, a cell or HTML.
"""

import dataclasses
import math
import re
import shlex
from pathlib import Path

from base import UserError, log, option, parse_config, read_json, required, run, write_whole

GAMMA_SHOWN = 5
CURVE_LINES = 50               # lines of the text curve in RESULTS.md; longer answers are shown in bins
PICTURES = ("training_curves.png", "loss_curve.png", "accuracy_curve.png")
# Okabe and Ito 2008, "Color Universal Design": told apart by colour-blind readers too.
BLUE, VERMILION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#555555"


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Print the SUMMARY of finished tasks, or make their RESULTS.md and pictures anew."""

    tasks: list[Path] = required("task folders", positional=True)
    rebuild: bool = option(False, "make RESULTS.md and the pictures anew from results.json")


# ---------------------------------------------------------------------------------------------------- reading
def read_results(task: Path) -> dict:
    """results.json of a task folder; a UserError when there is none or it is another program's."""
    path = task / "results.json"
    if not path.exists():
        raise UserError(f"{task} is no finished task: it has no results.json")
    results = read_json(path)
    if not isinstance(results, dict) or "test" not in (results.get("metrics") or {}):
        raise UserError(f"{path} is not the results.json of train_and_evaluate.py")
    return results


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def one_line(results: dict) -> str:
    """The answer for a log line: what plain copying and the adapter get right, beside the constant string."""
    test = results["metrics"]["test"]
    constant = test["constant_string"]
    return (f"accepted {test['direct_copy']['alpha']:.1%} -> {test['adapter']['alpha']:.1%}"
            + (f" | constant string {constant['alpha']:.1%}" if constant else "")
            + f" | top-5 {test['adapter']['top5']:.1%} | mean run {test['adapter']['mean_run']:.1f}")


# --------------------------------------------------------------------------------------------------- Markdown
def escape(text) -> str:
    """Plain text as Markdown that shows just this text, on one line."""
    text = " ".join(str(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#!|~$]|:(?=//))", r"\\\1", text)


def table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a Markdown table; the cells are Markdown already."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def answer(results: dict) -> list[str]:
    """What a reader must know, in a few plain sentences."""
    test = results["metrics"]["test"]
    adapter, copied, constant = test["adapter"], test["direct_copy"], test["constant_string"]
    text = (f"**The adapter predicts {percent(adapter['alpha'])} of the target's tokens on {test['pairs']} "
            f"test pairs ({test['positions']} positions); copying the draft gets "
            f"{percent(copied['alpha'])} right.** On average {adapter['mean_run']:.1f} tokens from the start "
            "of an answer are right before the first miss. ")
    if constant is None:
        return [text + "Without training pairs there is no constant string to compare it with.", ""]
    gain = 100 * (adapter["alpha"] - constant["alpha"])
    string = f"a constant string of the commonest training tokens ({percent(constant['alpha'])})"
    if gain > 0:
        return [text + f"That is {gain:.1f} points above {string}.", ""]
    return [text + f"**It does not beat {string}**: it is {-gain:.1f} points below, so nothing here shows a "
            "use of the draft.", ""]


def metric_tables(metrics: dict) -> list[str]:
    """One column for each set of pairs."""
    sets = [name for name in ("train", "validation", "test") if name in metrics]

    def row(label: str, show) -> list[str]:
        return [label, *(show(metrics[name]) for name in sets)]

    def of_constant(key: str):
        return lambda m: percent(m["constant_string"][key]) if m["constant_string"] else "-"

    rows = [
        row("pairs", lambda m: m["pairs"]),
        row("target positions", lambda m: m["positions"]),
        row("adapter, top-1 (alpha)", lambda m: f"**{percent(m['adapter']['alpha'])}**"),
        row("adapter, top-5", lambda m: percent(m["adapter"]["top5"])),
        row("baseline: copying the draft, top-1", lambda m: percent(m["direct_copy"]["alpha"])),
        row("baseline: constant string, top-1", of_constant("alpha")),
        row("baseline: constant string, top-5", of_constant("top5")),
        row("improvement over copying", lambda m: f"{100 * m['improvement']:+.1f} points"),
        row("first token right", lambda m: percent(m["adapter"]["first_token"])),
        row("mean run from the start", lambda m: f"{m['adapter']['mean_run']:.2f} tokens"),
        row("mean run, constant string",
            lambda m: f"{m['constant_string']['mean_run']:.2f} tokens" if m["constant_string"] else "-"),
        row("loss of the adapter", lambda m: f"{m['loss']:.3f} nats/token"),
    ]
    lines = ["## Metrics", "", *table(["", *sets], rows)]
    past = sum(m["positions_past_max_seq_len"] for m in metrics.values())
    if past:
        lines += [f"{past} target positions lie past the adapter's longest answer and count as misses.", ""]
    gammas = list(metrics["test"]["adapter"]["expected_tokens"])
    expected = [[name, *(f"{metrics[name]['adapter']['expected_tokens'][gamma]:.2f}" for gamma in gammas)]
                for name in sets]
    return [*lines, "## Expected tokens for each target pass", "",
            "By the formula (1 - alpha^(gamma+1)) / (1 - alpha), which **assumes that positions are "
            "independent**. They are not: it is a yardstick, not a measurement of decoding.", "",
            *table(["gamma", *gammas], expected)]


def position_curve(test: dict) -> list[str]:
    """The per-position curve as text: a bar of 40 characters is 100 %."""
    curve, constant = test["adapter"]["per_position"], test["constant_string"]
    size = math.ceil(len(curve["count"]) / CURVE_LINES)
    lines = ["## By position (test)", "",
             "Top-1 of the adapter as a bar; `|` marks the constant string, where there is one.", "",
             "    position  answers   top-1   top-5"]
    for first in range(0, len(curve["count"]), size):
        part = slice(first, first + size)

        def mean(shares, part=part) -> float:
            counts = curve["count"][part]
            return sum(n * share for n, share in zip(counts, shares[part])) / sum(counts)

        top1 = mean(curve["alpha"])
        bar = list(("#" * round(40 * top1)).ljust(41))
        if constant:
            bar[round(40 * mean(constant["per_position"]["alpha"]))] = "|"
        name = f"{first}" if size == 1 else f"{first}-{min(first + size, len(curve['count'])) - 1}"
        shares = f"{top1:6.1%}  {mean(curve['top5']):6.1%}"
        lines.append(f"    {name:>8}  {curve['count'][first]:7}  {shares}  {''.join(bar)}".rstrip())
    return [*lines, ""]


def data_section(results: dict) -> list[str]:
    """Files read, rows dropped and flagged, and what went to validation."""
    rows = []
    for use, files in results["files"].items():
        for file in files:
            dropped, flagged = (", ".join(f"{n} x {escape(why)}" for why, n in file[key].items()) or "none"
                                for key in ("dropped", "flagged"))
            used = f"{file['used']} of {file['rows']}"
            rows.append([use, escape(file["path"]), file["format"], used, dropped, flagged])
    lines = ["## Data", "", *table(["use", "file", "format", "rows used", "dropped", "flagged, kept"], rows)]
    if results["split"]:
        lines += [f"Validation, cut from the training pairs by {results['split']['by']}: "
                  f"{escape(', '.join(results['split']['validation']))}. Trained on: "
                  f"{escape(', '.join(results['split']['train']))}.", ""]
    return lines


def training_section(results: dict, pictures: list[str]) -> list[str]:
    if not results["history"]:
        return ["## Training", "", f"None: the checkpoint {escape(results['config']['checkpoint'])} was "
                f"measured by its own contract, {escape(results['adapter']['contract'])}. It has no history "
                "here, so there are no curves.", ""]
    best = results["history"][results["best_epoch"] - 1]
    lines = ["## Training", "",
             f"{len(results['history'])} of at most {results['config']['num_epochs']} epochs, "
             f"{results['seconds']['until_trained']:.0f} s with reading the pairs. Kept is epoch "
             f"{results['best_epoch']}, best on validation: {percent(best['validation_alpha'])} accepted. "
             "In the curves, loss and top-1 on train come from the training pass itself, with dropout on and "
             "weights on the move; the metrics above are measured anew with the kept weights.", ""]
    return lines + [line for name in pictures for line in (f"![{name}]({name})", "")]


def settings_section(results: dict) -> list[str]:
    """Settings, versions, and the command that made this."""
    provenance, adapter = results["provenance"], results["adapter"]
    settings = {**{f"--{name}": value for name, value in results["config"].items()},
                **{f"adapter: {name}": value for name, value in adapter.items()}}
    shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in settings.items()}
    made = {"date": results["date"], "device": provenance["device"], "git commit": provenance["git_commit"],
            "folder": provenance["folder"], **provenance["versions"]}
    command = " ".join(shlex.join(["python", *provenance["argv"]]).split())
    return ["## Settings", "", *table(["setting", "value"], [map(escape, item) for item in shown.items()]),
            "## Provenance", "", *table(["", ""], [map(escape, item) for item in made.items()]),
            "## Again", "", "From the folder named above:", "", f"    {command}", "",
            "This page and the pictures, from results.json alone:", "",
            "    python report.py --rebuild TASK_FOLDER", ""]


def markdown(results: dict, pictures: list[str]) -> str:
    """RESULTS.md of one task."""
    lines = [f"# {escape(results['task'])}", "", *answer(results)]
    lines += [f"> **Warning:** {escape(warning)}\n" for warning in results["warnings"]]
    lines += [*metric_tables(results["metrics"]), *position_curve(results["metrics"]["test"]),
              *training_section(results, pictures), *data_section(results), *settings_section(results)]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------- pictures
def draw_loss(axes, history: list[dict], best_epoch: int) -> None:
    epochs = [epoch["epoch"] for epoch in history]
    axes.plot(epochs, [epoch["train_loss"] for epoch in history], "o-", color=BLUE, label="train")
    losses = [epoch["validation_loss"] for epoch in history]
    axes.plot(epochs, losses, "s--", color=VERMILION, label="validation")
    axes.axvline(best_epoch, color=GREY, linewidth=0.8, linestyle=":", label="kept epoch")
    axes.set(title="Loss", ylabel="cross-entropy (nats/token)", ylim=(0, None))


def draw_accuracy(axes, history: list[dict], best_epoch: int, validation: dict) -> None:
    epochs = [epoch["epoch"] for epoch in history]
    for key, style, color, label in (("validation_top5", "^-.", GREEN, "validation top-5"),
                                     ("validation_alpha", "s--", VERMILION, "validation top-1"),
                                     ("train_alpha", "o-", BLUE, "train top-1")):
        axes.plot(epochs, [100 * epoch[key] for epoch in history], style, color=color, label=label)
    for name, color, label in (("constant_string", ORANGE, "validation, constant string"),
                               ("direct_copy", GREY, "validation, copied draft")):
        axes.axhline(100 * validation[name]["alpha"], color=color, linewidth=1.5, label=label)
    axes.axvline(best_epoch, color=GREY, linewidth=0.8, linestyle=":", label="kept epoch")
    axes.set(title="Acceptance", ylabel="target tokens right (%)", ylim=(0, None))


def draw_learning_rate(axes, history: list[dict]) -> None:
    rates = [epoch["learning_rate"] for epoch in history]
    axes.plot([epoch["epoch"] for epoch in history], rates, "o-", color=BLUE)
    axes.set(title="Learning rate", ylabel="learning rate after the epoch", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def draw_positions(axes, test: dict) -> None:
    for name, style, color, label in (("adapter", "-", VERMILION, "test, adapter"),
                                      ("constant_string", "--", ORANGE, "test, constant string"),
                                      ("direct_copy", ":", GREY, "test, copied draft")):
        shares = [100 * share for share in test[name]["per_position"]["alpha"]]
        axes.plot(shares, style, color=color, label=label)
    axes.set(title="Acceptance by position", xlabel="position in the answer (token)",
             ylabel="target tokens right (%)", ylim=(0, 102))


def draw(task: Path, results: dict) -> list[str]:
    """Draw the curves into the task folder and return their names; nothing is drawn without a history."""
    history, best, metrics = results["history"], results["best_epoch"], results["metrics"]
    if not history:
        return []
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    def save(name: str, panels: list, shape: tuple[int, int], size: tuple[float, float]) -> None:
        figure, grid = pyplot.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
        for axes, panel in zip(grid.flat, panels):
            panel(axes)
            if not axes.get_xlabel():
                axes.set_xlabel("epoch")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
        figure.suptitle(f"{results['task']} ({results['date']})", fontsize=11, parse_math=False)
        write_whole(task / name, lambda temporary: figure.savefig(temporary, dpi=160))
        pyplot.close(figure)

    def loss(axes):
        draw_loss(axes, history, best)

    def accuracy(axes):
        draw_accuracy(axes, history, best, metrics["validation"])

    with pyplot.rc_context({"lines.markersize": 3.5, "lines.linewidth": 1.5}):
        save(PICTURES[0], [loss, accuracy, lambda axes: draw_learning_rate(axes, history),
                           lambda axes: draw_positions(axes, metrics["test"])], (2, 2), (11, 8))
        save(PICTURES[1], [loss], (1, 1), (6.4, 4.6))
        save(PICTURES[2], [accuracy], (1, 1), (6.4, 4.8))
    return list(PICTURES)


# ------------------------------------------------------------------------------------------------------ tasks
def write_report(task: Path, plots: bool = True) -> None:
    """Make the pictures and then RESULTS.md of a task folder, from its results.json alone."""
    results = read_results(task)
    text = markdown(results, draw(task, results) if plots else [])
    write_whole(task / "RESULTS.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    log(f"report | {task / 'RESULTS.md'}")


def summary(tasks: list[Path]) -> None:
    """Log the table of these tasks, one line each, and where their pages and pictures are."""
    rows = [["task", "pairs train/test", "copying", "constant", "top-1", "top-5", "mean run",
             f"expected tokens, gamma {GAMMA_SHOWN}", "best epoch"]]
    for task in tasks:
        results = read_results(task)
        trained, test = results["metrics"].get("train", {"pairs": 0}), results["metrics"]["test"]
        adapter, constant = test["adapter"], test["constant_string"]
        rows.append([
            results["task"], f"{trained['pairs']}/{test['pairs']}", percent(test["direct_copy"]["alpha"]),
            percent(constant["alpha"] if constant else None), percent(adapter["alpha"]),
            percent(adapter["top5"]), f"{adapter['mean_run']:.2f}",
            f"{adapter['expected_tokens'][str(GAMMA_SHOWN)]:.2f}", str(results["best_epoch"] or "-")])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        log("SUMMARY | " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)))
    log("SUMMARY | the expected tokens come from a formula that assumes independent positions")
    for task in tasks:
        for name in ("RESULTS.md", *PICTURES):
            if (task / name).exists():
                log(f"SUMMARY | {task / name}")


def main() -> None:
    config = parse_config(ReportConfig)
    if config.rebuild:
        for task in config.tasks:
            write_report(task)
    else:
        summary(config.tasks)


if __name__ == "__main__":
    run(main)
