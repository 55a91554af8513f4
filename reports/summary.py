"""The SUMMARY of tasks and their newest decodings: for the log, SUMMARY.md, and as one page.

A decoding is named by its folder, whose name holds its time.
"""

from __future__ import annotations

import dataclasses
import os
import urllib.parse
from pathlib import Path

from reports.blocks import escape, number, percent, times
from reports.blocks import table as markdown_table
from reports.charts import CURVES, DECODE_CHARTS, DRAFTER_CURVES
from reports.decode_figures import REDO, VERDICTS, own_verdicts, read_decoding, speed_ups
from reports.decode_page import (
    WORDS,
    answers_of,
    clips_of,
    example,
    explained,
    plain_sentence,
    read_thumbnails,
    titles_of,
)
from reports.html import PAGE, glossary, name, page, section, table, text
from reports.shapes import sensible_values
from reports.svg import bars
from reports.task_figures import LEAD_GAMMA, REMEASURE, best_drafter, draft_worth, read_results
from reports.word_sections import legend

TASK_COLUMNS = [
    "task",
    "conditioning",
    "pairs train/test",
    "copying",
    "constant",
    "adapter",
    "top-5",
    "best drafter",
    "alpha",
    f"tau, gamma {LEAD_GAMMA}",
]
DECODE_COLUMNS = [
    "decoding",
    "drafter",
    "answers",
    "exact / tie / WRONG",
    "failed",
    "tau",
    "decoding over plain",
    "over generate",
    "end to end",
]
TAU = "tau: tokens for each target pass in simulated greedy speculative decoding"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A task or a decoding that has ended."""

    folder: Path
    results: dict  # results.json or decode.json
    row: list[str]  # of its table; plain text


@dataclasses.dataclass(frozen=True)
class Summary:
    """All that is known of these tasks."""

    tasks: list[Finished]
    decodings: list[Finished]
    notes: list[str]  # one sentence for each task, and one on the columns

    @property
    def wrong(self) -> int:
        """Answers, by any way of decoding, that were not the target's own."""
        return sum(
            decoding.results["totals"]["verdicts"].get("WRONG", 0) for decoding in self.decodings
        )

    def paths(self) -> list[Path]:
        """The pages and pictures that are there."""
        paths = [
            task.folder / file
            for task in self.tasks
            for file in (PAGE, "RESULTS.md", *CURVES, *DRAFTER_CURVES)
        ]
        paths += [
            decoding.folder / file
            for decoding in self.decodings
            for file in (PAGE, "DECODE.md", *DECODE_CHARTS)
        ]
        return [path for path in paths if path.exists()]


def newest_decodings(task: Path) -> list[Path]:
    """The newest finished folder of speculative_decode.py, none or one; its name ends in the time."""
    return sorted(path.parent for path in task.glob("decode_*/decode.json"))[-1:]


def task_row(results: dict) -> list[str]:
    train = results["metrics"].get("train") or {"pairs": 0}
    test = results["metrics"]["test"]
    adapter, constant, best = test["adapter"], test["constant_string"], best_drafter(test)
    drafter, copied = test["drafters"][best], test["direct_copy"]
    return [
        results["task"],
        results["adapter"]["conditioning"],
        f"{train['pairs']}/{test['pairs']}",
        percent(copied["alpha"] if copied else None),
        percent(constant["alpha"] if constant else None),
        percent(adapter["alpha"]),
        percent(adapter["top5"]),
        best,
        percent(drafter["alpha"]),
        number(drafter["simulated"][LEAD_GAMMA]["tau"]),
    ]


def decode_row(folder: Path, results: dict) -> list[str]:
    drafter, verdicts = results["drafter"], own_verdicts(results)
    speed = speed_ups(results, drafter)
    judged = (
        " / ".join(str(verdicts.get(key, 0)) for key in VERDICTS) if verdicts else "not compared"
    )
    return [
        f"{folder.parent.name}/{folder.name}",
        drafter,
        str(results["totals"]["answers"]),
        judged,
        str(len(results["failed"])),
        number(results["totals"]["runs"][drafter]["tau"]),
        *(times(speed[key]) for key in ("plain", "generate", "whole")),
    ]


def read_summary(tasks: list[Path]) -> Summary:
    """What the JSON files of these tasks say; raises UserError for one that is damaged."""
    finished, decodings, notes = [], [], []
    for task in tasks:
        results = read_results(task)
        with sensible_values(task / "results.json", REMEASURE):
            finished.append(Finished(task, results, task_row(results)))
            notes.append(f"{results['task']} | what the draft adds: {draft_worth(results)}")
        for folder in newest_decodings(task):
            decoding = read_decoding(folder)
            with sensible_values(folder / "decode.json", REDO):
                decodings.append(Finished(folder, decoding, decode_row(folder, decoding)))
    return Summary(finished, decodings, [*notes, TAU])


# ------------------------------------------------------------------------------------- log, SUMMARY.md
def aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table in a log."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in (header, *rows)
    ]


def log_lines(summary: Summary) -> list[str]:
    """The notes, then the tables: what is looked for stands last."""
    lines = [*summary.notes, *aligned(TASK_COLUMNS, [task.row for task in summary.tasks])]
    if summary.decodings:
        lines += aligned(DECODE_COLUMNS, [decoding.row for decoding in summary.decodings])
    return lines


def markdown(summary: Summary, home: Path) -> str:
    """SUMMARY.md of a folder."""
    lines = [
        "# Summary",
        "",
        *markdown_table(TASK_COLUMNS, [list(map(escape, task.row)) for task in summary.tasks]),
    ]
    if summary.decodings:
        lines += markdown_table(
            DECODE_COLUMNS, [list(map(escape, decoding.row)) for decoding in summary.decodings]
        )
    for note in summary.notes:
        lines += [escape(note), ""]
    lines += [
        "## Files",
        "",
        *(f"- {escape(os.path.relpath(path, home))}" for path in summary.paths()),
        "",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- the page
def link(folder: Path, home: Path, words: str) -> str:
    """A link to the page of a folder, where it is there; HTML."""
    if not (folder / PAGE).exists():
        return name(words)
    # a colon would begin a scheme: quoted it does not
    path = urllib.parse.quote(os.path.relpath(folder / PAGE, home))
    return f'<a href="./{text(path)}">{name(words)}</a>'


def shown_decoding(summary: Summary) -> Finished | None:
    """The decoding that the page leads with: the one that gained most from pictures to answer."""

    def gain(decoding: Finished) -> float:
        return speed_ups(decoding.results, decoding.results["drafter"])["whole"] or 0.0

    return max(summary.decodings, key=gain, default=None)


def lead(shown: Finished, home: Path) -> str:
    """Sentence and example of one decoding; HTML."""
    results, thumbnails = shown.results, read_thumbnails(shown.folder)
    answers, titles = answers_of(results), titles_of(results)
    where = link(shown.folder, home, "All its clips and figures")
    return (
        f"<header><p class=kicker>{name(results['task'])}, {name(results['date'])}, on "
        f"{name(results['device'])}</p><h1>{plain_sentence(results, titles)}</h1>"
        f"<p>{explained(results, answers)}</p><p>{where}</p></header>"
        + section(
            "One example",
            legend(answers) + example(clips_of(answers), results, titles, thumbnails),
            "example",
        )
    )


def body(summary: Summary, home: Path) -> str:
    shown = shown_decoding(summary)
    tasks = [
        [link(task.folder, home, task.row[0]), *map(text, task.row[1:])] for task in summary.tasks
    ]
    parts = [
        lead(shown, home)
        if shown
        else f"<header><h1>{len(summary.tasks)} tasks side by side</h1></header>"
    ]
    if summary.decodings:
        rows = [
            [link(decoding.folder, home, decoding.row[0]), *map(text, decoding.row[1:])]
            for decoding in summary.decodings
        ]
        speeds = {
            decoding.row[0]: speed
            for decoding in summary.decodings
            if (speed := speed_ups(decoding.results, decoding.results["drafter"])["plain"])
        }
        parts.append(
            section(
                "Decodings",
                table(DECODE_COLUMNS, rows)
                + (bars("Decoding over our loop without proposals", speeds, times) if speeds else ""),
                "decodings",
            )
        )
    taus = {task.row[0]: float(task.row[-1]) for task in summary.tasks if task.row[-1] != "-"}
    notes = "".join(f"<p>{text(note)}</p>" for note in summary.notes)
    parts += [
        section(
            "Tasks",
            table(TASK_COLUMNS, tasks)
            + notes
            + bars(f"Simulated tokens for each pass, gamma {LEAD_GAMMA}", taus, number),
            "tasks",
        ),
        section("Eight words", glossary(WORDS), "words"),
    ]
    return "".join(parts)


def summary_page(summary: Summary, home: Path) -> str:
    """REPORT.html over all these tasks, to lie in the folder `home`."""
    return page("Tasks and decodings", body(summary, home))
