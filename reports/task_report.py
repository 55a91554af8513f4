"""RESULTS.md and pictures from results.json alone.

Text from files (paths, sequence names, arguments) is escaped: a name can't become a link, a cell or HTML.
"""

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from base import UserError, log, plain
from machine.files import read_json, write_text, write_whole

CURVE_LINES = 50               # lines of the text curve in RESULTS.md; longer answers are shown in bins
GAMMA_OF_LEAD = "8"
PLAIN_NAME = re.compile(r"[\w ,.+-]*")           # of a drafter, a figure, a gamma
MEASURE = "measure its best_model.pt with train_and_evaluate.py --checkpoint"
PICTURES = ("training_curves.png", "loss_curve.png", "accuracy_curve.png")
DRAFTER_PICTURES = ("drafters_by_position.png", "tau_over_gamma.png")
# Okabe and Ito 2008, "Color Universal Design": told apart by colour-blind readers too.
BLUE, VERMILION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#555555"
SKY, PURPLE = "#56B4E9", "#CC79A7"
DRAFTER_STYLES = {"copy of the draft": (":", GREY), "constant string": ("--", ORANGE), "n-gram": ("-.", SKY),
                  "memory": ("-", SKY), "prefix": ("--", GREEN), "adapter": ("-", VERMILION),
                  "adapter, online": ("-", PURPLE), "hybrid": ("-", BLUE), "hybrid, online": ("-", "black")}


# ---------------------------------------------------------------------------------------------------- reading
def read_results(task: Path) -> dict:
    """results.json of a task folder; a UserError when there is none or it is another program's."""
    path = task / "results.json"
    if not path.exists():
        raise UserError(f"{task} is no finished task: it has no results.json")
    results = read_json(path)
    if isinstance(results, dict) and results.get("unfinished"):
        raise UserError(f"{task} is unfinished: go on with train_and_evaluate.py --resume {task}")
    metrics = results.get("metrics") if isinstance(results, dict) else None
    if not isinstance(metrics, dict) or "test" not in metrics:
        raise UserError(f"{path} is not the results.json of train_and_evaluate.py")
    if odd := next(odd_names(metrics), None):
        raise UserError(f"{path} has the name {odd[:40]!a} among its metrics, which none of ours is; {MEASURE}")
    return results


def odd_names(metrics) -> Iterator[str]:
    """Keys and texts that no program of ours wrote; those of drives come from files and are escaped on the page."""
    if isinstance(metrics, str):
        yield from () if PLAIN_NAME.fullmatch(metrics) else (metrics,)
    for key, part in metrics.items() if isinstance(metrics, dict) else ():
        yield from odd_names(key)
        yield from odd_names(part if key != "drives" else [*part.values()] if isinstance(part, dict) else None)
    for part in metrics if isinstance(metrics, list) else ():
        yield from odd_names(part)


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
    text = " ".join(plain(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#!|~$@]|:(?=//)|\.(?<=www\.))", r"\\\1", text)


def table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a Markdown table; the cells are Markdown already."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def best_drafter(test: dict) -> str:
    """The drafter with the most tokens a pass at the gamma that the page leads with."""
    return max(test["drafters"], key=lambda name: test["drafters"][name]["simulated"][GAMMA_OF_LEAD]["tau"])


def bounds(interval: dict, signed: bool = False) -> str:
    form = "{:+.1f}" if signed else "{:.1f}"
    return f"{form.format(100 * interval['low'])} to {form.format(100 * interval['high'])}"


def left_out(interval: dict) -> str:
    """How far a difference moves with the choice of drives."""
    if not interval["left_out"]:
        return "a single drive"
    low, high = interval["left_out"]
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def answer(results: dict) -> list[str]:
    """What a reader must know, in a few plain sentences."""
    test = results["metrics"]["test"]
    adapter, copied, constant = test["adapter"], test["direct_copy"], test["constant_string"]
    best = best_drafter(test)
    lead = test["drafters"][best]
    gamma, tau = max(lead["simulated"].items(), key=lambda item: item[1]["tau"])
    text = (f"**The adapter predicts {percent(adapter['alpha'])} of the target's tokens on {test['pairs']} "
            f"test pairs ({test['positions']} positions); copying the draft gets {percent(copied['alpha'])} "
            "right.** ")
    if constant and adapter["alpha"] <= constant["alpha"]:
        text += (f"**It does not beat a constant string of the commonest training tokens "
                 f"({percent(constant['alpha'])})**. ")
    elif constant:
        text += (f"That is {100 * (adapter['alpha'] - constant['alpha']):.1f} points above a constant string of the "
                 f"commonest training tokens ({percent(constant['alpha'])}). ")
    else:
        text += "Without training pairs there is no constant string to compare it with. "
    text += (f"The best drafter is **{best}**: {percent(lead['alpha'])} of the tokens (95 % interval "
             f"{bounds(lead['interval'])}), and in simulated greedy speculative decoding "
             f"{lead['simulated'][GAMMA_OF_LEAD]['tau']:.2f} tokens for each target pass at gamma {GAMMA_OF_LEAD}, "
             f"{tau['tau']:.2f} at gamma {gamma}.")
    return [text, "", f"**What the draft adds:** {draft_worth(results)}", ""]


def draft_worth(results: dict) -> str:
    """One sentence on what EventGPT's answer is worth, with its interval."""
    test, conditioning = results["metrics"]["test"], results["adapter"]["conditioning"]
    if conditioning == "draft":
        return ("this adapter sees nothing but the draft; its worth is the distance to the constant string. "
                "Train with --conditioning prefix+draft for the comparison that decides it.")
    if conditioning == "prefix":
        if results["config"]["conditioning"] == "prefix+draft":
            return ("nothing that validation could see. An adapter that also reads the draft was trained and was "
                    "not better on the validation drives; the adapter kept reads verified tokens alone.")
        return "not measured: this adapter was trained to read verified tokens alone."
    parts = []
    for name, words in (("prefix", "the same adapter trained without drafts"),
                        ("adapter, drafts shuffled", "itself when shown another clip's draft")):
        if name in test["adapter_minus"]:
            found = test["adapter_minus"][name]
            parts.append(f"{100 * found['value']:+.1f} points of alpha (95 % interval {bounds(found, True)}, "
                         f"paired, over {found['by']}) against {words}")
    sure = parts and all(test["adapter_minus"][name]["low"] > 0 for name in ("prefix", "adapter, drafts shuffled")
                         if name in test["adapter_minus"])
    return "; ".join(parts) + ("." if sure else ": not a sure gain.") if parts else "not measured for a checkpoint."


def drafter_tables(results: dict) -> list[str]:
    """The table of all drafters, how far the formula is off, accepted lengths, and alpha by drive."""
    test = results["metrics"]["test"]
    drafters = test["drafters"]
    gammas = list(next(iter(drafters.values()))["simulated"])
    rows = [[name, percent(d["alpha"]), bounds(d["interval"]), percent(d["top5"]),
             *(f"{d['simulated'][g]['tau']:.2f}" for g in gammas),
             f"{d['parameters'] / 1e6:.1f} M" if d["parameters"] else "-",
             f"{1000 * d['seconds_per_answer']:.1f}"] for name, d in drafters.items()]
    header = ["drafter", "alpha", "95 % interval", "top-5", *(f"tau, gamma {g}" for g in gammas), "parameters",
              "ms an answer"]
    shares = ", ".join(f"{name} {share}" for name, share in test["memory_share"].items())
    by = next(iter(drafters.values()))["interval"]["by"]
    notes = ["tau: tokens emitted for each target pass in simulated greedy speculative decoding, pooled over the "
             "answers; the prefill is a pass, and its opening proposals are verified in it.",
             "`n-gram` knows the training answers; `memory` also learns each test answer once it is verified"
             + ("" if test["stream"] else " (switched off here)") + "; `online` takes gradient steps on each; "
             "`hybrid` mixes adapter and memory"
             + (f" (memory's share, chosen on validation: {shares})." if shares else "."),
             f"Intervals are bootstrapped over {by}. Milliseconds are those of this evaluation, learning included; "
             "the hybrids reuse the adapter's passes."]
    if test["step_ms"]:
        notes.append(f"One cached adapter step at batch 1 takes {test['step_ms']:.2f} ms here, without CUDA graph.")
    if test["pairs"] < test["whole_test"]:
        notes.insert(0, f"**Measured on {test['pairs']} of {test['whole_test']} test pairs**, the first clips of "
                        "every sequence; `--max_test_samples -1` measures all (a large adapter is slow on a CPU).")
    lines = ["## Drafters (test)", "", *table(header, rows), " ".join(notes), ""]
    rows = [[f"adapter minus {name}", f"{100 * found['value']:+.1f} points", bounds(found, True), left_out(found)]
            for name, found in test["adapter_minus"].items()]
    lines += table(["alpha, paired over the same answers", "difference", "95 % interval",
                    "leaving out one drive at a time"], rows) if rows else []
    best = best_drafter(test)
    rows = [[g, f"{d['tau']:.2f}", f"{d['tau_mean']:.2f}", f"{drafters[best]['expected_by_gamma'][g]:.2f}",
             *(percent(share) for share in d["more_passes_than"].values())]
            for g, d in drafters[best]["simulated"].items()]
    over = list(drafters[best]["simulated"][gammas[0]]["more_passes_than"])
    lines += [f"### {best}: simulation beside the formula", "",
              *table(["gamma", "tau, pooled", "tau, mean over answers", "formula",
                      *(f"more than {n} passes" for n in over)], rows),
              "The formula takes positions for independent; the difference shows how far they are from that.", ""]
    histogram = drafters[best]["simulated"][GAMMA_OF_LEAD]["accepted_lengths"]
    lines += [f"Accepted proposals a pass at gamma {GAMMA_OF_LEAD}: "
              + ", ".join(f"{n}: {count}" for n, count in enumerate(histogram)) + ".", ""]
    rows = [[escape(drive) or "(none named)", d["clips"], percent(d["alpha"]), percent(d["without_it"])]
            for drive, d in drafters[best]["drives"].items()]
    header = ["drive", "clips", "alpha", "alpha without this drive"]
    return [*lines, f"### {best}: by drive", "", *table(header, rows)]


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
            dropped, flagged = (", ".join(f"{n} x {why}" for why, n in file[key].items()) or "none"
                                for key in ("dropped", "flagged"))
            used = f"{file['used']} of {file['rows']}"
            rows.append(map(escape, (use, file["path"], file["format"], used, dropped, flagged)))
    lines = ["## Data", "", *table(["use", "file", "format", "rows used", "dropped", "flagged, kept"], rows)]
    if results["split"]:
        lines += [f"Validation, cut from the training pairs by {escape(results['split']['by'])}: "
                  f"{escape(', '.join(results['split']['validation']))}. Trained on: "
                  f"{escape(', '.join(results['split']['train']))}.", ""]
    return lines


def training_section(results: dict, pictures: list[str]) -> list[str]:
    shown = [line for name in pictures for line in (f"![{name}]({name})", "")]
    if not results["history"]:
        return ["## Training", "", f"None: the checkpoint {escape(results['config']['checkpoint'])} was "
                f"measured by its own contract, {escape(results['adapter']['contract'])}. It has no history "
                "here, so there are no training curves.", "", *shown]
    best = results["history"][results["best_epoch"] - 1]
    phases = [epoch["phase"] for epoch in results["history"]]
    counted = escape(", ".join(f"{phases.count(name)} {name}" for name in dict.fromkeys(phases)))
    again = ("The adapter was then trained again from the start, just as long, with the validation pairs; that one "
             "is kept, and only the metrics on validation are those of the first. " if results["refitted"] else "")
    seconds, accepted = results["seconds"]["until_trained"], percent(best["validation_alpha"])
    lines = ["## Training", "",
             f"{len(phases)} epochs ({counted}), {seconds:.0f} s with reading the pairs. Chosen is epoch "
             f"{best['epoch']:d}, best on validation: {accepted} accepted. {again}In the curves, loss and "
             "top-1 on train come from the training pass itself, with dropout on and weights on the move; the "
             "metrics above are measured anew with the kept weights.", ""]
    return lines + shown


def settings_section(results: dict) -> list[str]:
    """Settings, versions, and the command that made this."""
    provenance, adapter = results["provenance"], results["adapter"]
    settings = {**{f"--{name}": value for name, value in results["config"].items()},
                **{f"adapter: {name}": value for name, value in adapter.items()}}
    shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in settings.items()}
    made = {"date": results["date"], "device": provenance["device"], "git commit": provenance["git_commit"],
            "folder": provenance["folder"], **provenance["versions"]}
    command = " ".join(plain(shlex.join(["python", *provenance["argv"]])).split())
    return ["## Settings", "", *table(["setting", "value"], [map(escape, item) for item in shown.items()]),
            "## Provenance", "", *table(["", ""], [map(escape, item) for item in made.items()]),
            "## Again", "", "From the folder named above:", "", f"    {command}", "",
            "This page and the pictures, from results.json alone:", "",
            "    python report.py --rebuild TASK_FOLDER", ""]


def markdown(results: dict, pictures: list[str]) -> str:
    """RESULTS.md of one task."""
    lines = [f"# {escape(results['task'])}", "", *answer(results)]
    lines += [f"> **Warning:** {escape(warning)}\n" for warning in results["warnings"]]
    lines += [*drafter_tables(results), *metric_tables(results["metrics"]),
              *position_curve(results["metrics"]["test"]), *training_section(results, pictures),
              *data_section(results), *settings_section(results)]
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


def draw_drafters(axes, drafters: dict) -> None:
    for name, (style, color) in DRAFTER_STYLES.items():
        if name in drafters:
            shares = [100 * share for share in drafters[name]["per_position"]["alpha"]]
            axes.plot(shares, style, color=color, linewidth=1.2, label=name)
    axes.set(title="Acceptance by position, test", xlabel="position in the answer (token)",
             ylabel="target tokens right (%)", ylim=(0, 102))


def draw_tau(axes, drafters: dict) -> None:
    for name, (style, color) in DRAFTER_STYLES.items():
        if name in drafters:
            gammas = list(map(int, drafters[name]["simulated"]))
            axes.plot(gammas, [found["tau"] for found in drafters[name]["simulated"].values()], "o" + style,
                      color=color, linewidth=1.2, label=name)
    axes.set(title="Simulated greedy speculative decoding, test", xlabel="gamma (tokens proposed a pass)",
             ylabel="tau (tokens for each target pass)", ylim=(0.9, None))


def draw(task: Path, results: dict) -> list[str]:
    """Draw the curves into the task folder and return their names; without a history only those of the drafters."""
    history, best, metrics = results["history"], results["best_epoch"], results["metrics"]
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
        figure.suptitle(f"{plain(results['task'])} ({results['date']})", fontsize=11, parse_math=False)
        write_whole(task / name, lambda temporary: figure.savefig(temporary, dpi=160))
        pyplot.close(figure)

    def loss(axes):
        draw_loss(axes, history, best)

    def accuracy(axes):
        draw_accuracy(axes, history, best, metrics["validation"])

    with pyplot.rc_context({"lines.markersize": 3.5, "lines.linewidth": 1.5}):
        drafters = metrics["test"]["drafters"]
        save(DRAFTER_PICTURES[0], [lambda axes: draw_drafters(axes, drafters)], (1, 1), (7.4, 5.2))
        save(DRAFTER_PICTURES[1], [lambda axes: draw_tau(axes, drafters)], (1, 1), (7.4, 5.2))
        if not history:
            return list(DRAFTER_PICTURES)
        save(PICTURES[0], [loss, accuracy, lambda axes: draw_learning_rate(axes, history),
                           lambda axes: draw_positions(axes, metrics["test"])], (2, 2), (11, 8))
        save(PICTURES[1], [loss], (1, 1), (6.4, 4.6))
        save(PICTURES[2], [accuracy], (1, 1), (6.4, 4.8))
    return [*PICTURES, *DRAFTER_PICTURES]


# ------------------------------------------------------------------------------------------------------ tasks
def write_report(task: Path, plots: bool = True) -> None:
    """Make the pictures and then RESULTS.md of a task folder, from its results.json alone."""
    results = read_results(task)
    text = markdown(results, draw(task, results) if plots else [])
    write_text(task / "RESULTS.md", text)
    log(f"report | {task / 'RESULTS.md'}")
