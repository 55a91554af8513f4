"""The pictures of a task and of a decoding, drawn with matplotlib from JSON values alone.

Figures are made without pyplot and with matplotlib's own defaults: neither the user's backend
(MPLBACKEND, as notebooks export it) nor the user's rc settings play a part. A picture that can't be
drawn is a WARNING; the page is written without it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from base import first_line, log, plain
from machine.files import write_whole
from reports.blocks import number, times
from reports.decode_figures import accepted_lengths, speed_ups, stages

# Okabe and Ito 2008, "Color Universal Design": colour-blind readers can tell these apart.
BLUE, VERMILION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#555555"
SKY, PURPLE = "#56B4E9", "#CC79A7"
STAGE_COLORS = {
    "EventGPT": PURPLE, "vision and prefill": GREY, "vision and prompt": SKY, "prefill": BLUE,
    "drafting": ORANGE, "decoding, verifying": VERMILION
}
UNKNOWN_STYLE = ("-", GREY)    # of a drafter that the caller gives no style for
CURVES = ("training_curves.png", "loss_curve.png", "accuracy_curve.png")
DRAFTER_CURVES = ("drafters_by_position.png", "tau_over_gamma.png")
DECODE_CHARTS = ("accepted_lengths.png", "stage_times.png", "drafter_speed_up.png")
LEGEND_BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "frameon": False}

Styles = dict[str, tuple[str, str]]      # drafter -> (line style, colour)


@contextlib.contextmanager
def own_matplotlib() -> Iterator[None]:
    """Inside, matplotlib is imported and has its own defaults, whatever the user's environment
    says.
    """
    # an unknown name would break the import itself
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # a $ in a name stays one
        matplotlib.rcParams.update({"text.parse_math": False, "lines.markersize": 3.5})
        yield


def draw(path: Path, title: str, panels: list[Callable], shape: tuple[int, int],
         size: tuple[float, float]) -> bool:
    """Draw panels, functions of matplotlib axes, into one PNG; False, after a WARNING, if that
    fails.
    """
    try:
        with own_matplotlib():
            from matplotlib.figure import Figure

            figure = Figure(figsize=size, layout="constrained")
            for axes, panel in zip(figure.subplots(*shape, squeeze=False).flat, panels):
                axes.grid(alpha=0.25)
                panel(axes)
                axes.set_axisbelow(True)
                axes.spines[["top", "right"]].set_visible(False)
            figure.suptitle(plain(title), fontsize=11)
            write_whole(path, lambda temporary: figure.savefig(temporary, dpi=160))
        return True
    # matplotlib, its fonts and the disk can fail in many ways; the figures are safe in JSON
    except Exception as error:
        log(f"report | WARNING | {path} was not drawn: {type(error).__name__}: {first_line(error)}")
        return False


# --------------------------------------------------------------------------------------------- task
def draw_task(task: Path, results: dict, styles: Styles) -> list[str]:
    """Draw the curves into the task folder; without a history only those of the drafters. Returns
    the names drawn.
    """
    history, metrics = results["history"], results["metrics"]
    drafters = metrics["test"]["drafters"]

    def positions_of_drafters(axes) -> None:
        draw_drafters(axes, drafters, styles)

    def tau(axes) -> None:
        draw_tau(axes, drafters, styles)

    def loss(axes) -> None:
        draw_loss(axes, history, results["best_epoch"])

    def accuracy(axes) -> None:
        draw_accuracy(axes, history, results["best_epoch"], metrics["validation"])

    def learning_rate(axes) -> None:
        draw_learning_rate(axes, history)

    def positions(axes) -> None:
        draw_positions(axes, metrics["test"])

    charts = [(DRAFTER_CURVES[0], [positions_of_drafters], (1, 1), (7.4, 5.2)),
              (DRAFTER_CURVES[1], [tau], (1, 1), (7.4, 5.2))]
    if history:
        charts = [(CURVES[0], [loss, accuracy, learning_rate, positions], (2, 2), (11, 8)),
                  (CURVES[1], [loss], (1, 1), (6.4, 4.6)),
                  (CURVES[2], [accuracy], (1, 1), (6.4, 4.8)), *charts]
    title = f"{results['task']} ({results['date']})"
    return [name for name, parts, grid, size in charts if draw(task / name, title, parts, grid, size)]


def over_epochs(axes) -> None:
    """The epochs as x axis, whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(ncols=2, **LEGEND_BELOW)


def draw_loss(axes, history: list[dict], best_epoch: int) -> None:
    epochs = [epoch["epoch"] for epoch in history]
    axes.plot(epochs, [epoch["train_loss"] for epoch in history], "o-", color=BLUE, label="train")
    axes.plot(epochs, [epoch["validation_loss"]
                       for epoch in history], "s--", color=VERMILION, label="validation")
    axes.axvline(best_epoch, color=GREY, linewidth=0.8, linestyle=":", label="kept epoch")
    axes.set(title="Loss", ylabel="cross-entropy (nats/token)", ylim=(0, None))
    over_epochs(axes)


def draw_accuracy(axes, history: list[dict], best_epoch: int, validation: dict) -> None:
    epochs = [epoch["epoch"] for epoch in history]
    for key, style, color, label in (("validation_top5", "^-.", GREEN, "validation top-5"),
                                     ("validation_alpha", "s--", VERMILION, "validation top-1"),
                                     ("train_alpha", "o-", BLUE, "train top-1")):
        axes.plot(epochs, [100 * epoch[key] for epoch in history], style, color=color, label=label)
    for name, color, label in (("constant_string", ORANGE, "validation, constant string"),
                               ("direct_copy", GREY, "validation, copied draft")):
        if validation[name]:
            axes.axhline(100 * validation[name]["alpha"], color=color, linewidth=1.5, label=label)
    axes.axvline(best_epoch, color=GREY, linewidth=0.8, linestyle=":", label="kept epoch")
    axes.set(title="Acceptance", ylabel="target tokens predicted right (%)", ylim=(0, None))
    over_epochs(axes)


def draw_learning_rate(axes, history: list[dict]) -> None:
    rates = [epoch["learning_rate"] for epoch in history]
    axes.plot([epoch["epoch"] for epoch in history], rates, "o-", color=BLUE)
    axes.set(title="Learning rate", ylabel="learning rate after the epoch", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    over_epochs(axes)


def draw_positions(axes, test: dict) -> None:
    for name, style, color, label in (("adapter", "-", VERMILION, "test, adapter"),
                                      ("constant_string", "--", ORANGE, "test, constant string"),
                                      ("direct_copy", ":", GREY, "test, copied draft")):
        if test[name]:
            shares = [100 * share for share in test[name]["per_position"]["alpha"]]
            axes.plot(shares, style, color=color, label=label)
    axes.set(title="Acceptance by position", xlabel="position in the answer (token)",
             ylabel="target tokens predicted right (%)", ylim=(0, 102))
    axes.legend(ncols=2, **LEGEND_BELOW)


def draw_drafters(axes, drafters: dict, styles: Styles) -> None:
    for name, drafter in drafters.items():
        style, color = styles.get(name, UNKNOWN_STYLE)
        shares = [100 * share for share in drafter["per_position"]["alpha"]]
        axes.plot(shares, style, color=color, linewidth=1.2, label=name)
    axes.set(title="Acceptance by position, test", xlabel="position in the answer (token)",
             ylabel="target tokens predicted right (%)", ylim=(0, 102))
    axes.legend(ncols=2, **LEGEND_BELOW)


def draw_tau(axes, drafters: dict, styles: Styles) -> None:
    for name, drafter in drafters.items():
        style, color = styles.get(name, UNKNOWN_STYLE)
        gammas = list(map(int, drafter["simulated"]))
        taus = [simulated["tau"] for simulated in drafter["simulated"].values()]
        axes.plot(gammas, taus, "o" + style, color=color, linewidth=1.2, label=name)
        if trees := drafter.get("trees"):
            axes.plot(list(map(int, trees)), [tree["tau"] for tree in trees.values()], "^" + style,
                      color=color, linewidth=1.2, label=f"{name}, trees")
    axes.set(title="Simulated greedy speculative decoding, test",
             xlabel="tokens proposed for each pass: gamma of chains, nodes of trees",
             ylabel="tau (tokens for each target pass)", ylim=(0.9, None))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(ncols=2, **LEGEND_BELOW)


# ----------------------------------------------------------------------------------------- decoding
def draw_decoding(folder: Path, results: dict) -> list[str]:
    """Draw the charts into the folder; drafters are compared only where all of them ran. Returns
    the names drawn.
    """
    panels = [draw_accepted_lengths, draw_stages, draw_speed_ups]
    if not {"none"} < set(results["totals"]["runs"]):
        panels.remove(draw_speed_ups)
    title = f"{results['task']} ({results['date']})"
    return [
        name for name, panel in zip(DECODE_CHARTS, panels)
        if draw(folder /
                name, title, [lambda axes, panel=panel: panel(axes, results)], (1, 1), (7.4, 4.4))
    ]


def draw_accepted_lengths(axes, results: dict) -> None:
    passes, run = accepted_lengths(results), results["totals"]["runs"][results["drafter"]]
    bars = axes.bar(list(passes), list(passes.values()), color=BLUE)
    axes.bar_label(bars, fontsize=8, padding=1)
    axes.set(title=f"{results['drafter']}: {run['passes']} passes, tau {number(run['tau'])}",
             xlabel="accepted proposals (tokens)", ylabel="passes of the target",
             xticks=list(passes))
    axes.margins(y=0.1)
    axes.grid(visible=False, axis="x")


def draw_stages(axes, results: dict) -> None:
    ways, answers = stages(results), results["totals"]["answers"]
    rows = list(range(len(ways)))
    starts = [0.0] * len(ways)
    for stage, color in STAGE_COLORS.items():
        widths = [seconds.get(stage, 0.0) / answers for seconds in ways.values()]
        if any(widths):
            axes.barh(rows, widths, 0.62, starts, color=color, label=stage, edgecolor="white",
                      linewidth=0.5)
            starts = [start + width for start, width in zip(starts, widths)]
    for row, end in zip(rows, starts):
        axes.annotate(f"{end:.3f} s", (end, row), (4, 0), textcoords="offset points", va="center",
                      fontsize=9)
    axes.set(title="Where the time goes", xlabel="seconds per answer", yticks=rows,
             yticklabels=[way.replace(", ", ",\n").replace("' ", "'\n") for way in ways])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(visible=False, axis="y")
    axes.legend(ncols=3, **{**LEGEND_BELOW, "bbox_to_anchor": (0.4, -0.16)})


def draw_speed_ups(axes, results: dict) -> None:
    speeds = {name: speed_ups(results, name)["plain"] or 0.0
              for name in results["totals"]["runs"] if name != "none"}
    names = sorted(speeds, key=speeds.__getitem__, reverse=True)
    bars = axes.bar(names, [speeds[name] for name in names], color=BLUE, width=0.62)
    axes.bar_label(bars, [times(speeds[name]) for name in names], fontsize=9, padding=3,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8}, zorder=4)
    axes.axhline(1, color=VERMILION, linewidth=1.5, linestyle="--",
                 label="our own loop without drafts")
    axes.set(title="Decoding, drafting included", xlabel="drafter",
             ylabel="speed-up over plain decoding (times)")
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.legend(**LEGEND_BELOW)
