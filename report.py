"""The SUMMARY of tasks, and their pages and pictures made again from their JSON files alone.

    python report.py task/1s_20260128_020530 task/500ms_20260128_031512   the SUMMARY of these tasks
    python report.py --rebuild task/1s_20260128_020530                    RESULTS.md and pictures of a task
    python report.py --rebuild task/1s_20260128_020530/decode_20260128_041503   DECODE.md and pictures
"""

import dataclasses
import sys
from pathlib import Path

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import log, option, parse_config, required
from drafting.table import styles
from machine.running import run
from reports.blocks import number, percent
from reports.charts import CURVES, DECODE_CHARTS, DRAFTER_CURVES
from reports.decode_figures import REDO, one_line, read_decoding
from reports.decode_report import write_decode_report
from reports.shapes import sensible_values
from reports.task_figures import LEAD_GAMMA, REMEASURE, best_drafter, draft_worth, read_results
from reports.task_report import write_report


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Print the SUMMARY of finished tasks, or make their pages and pictures again."""

    tasks: list[Path] = required("task folders; with --rebuild also folders of decodings",
                                 positional=True)
    rebuild: bool = option(False, "make the page and the pictures again from results.json or "
                                  "decode.json")


def newest_decodings(task: Path) -> list[Path]:
    """The newest finished folder of speculative_decode.py, none or one; its name ends in the time."""
    return sorted(path.parent for path in task.glob("decode_*/decode.json"))[-1:]


def summary_row(results: dict) -> list[str]:
    """One task as a row of the SUMMARY."""
    train = results["metrics"].get("train") or {"pairs": 0}
    test = results["metrics"]["test"]
    adapter, constant, best = test["adapter"], test["constant_string"], best_drafter(test)
    copied = test["direct_copy"]
    drafter = test["drafters"][best]
    return [results["task"], results["adapter"]["conditioning"],
            f"{train['pairs']}/{test['pairs']}", percent(copied["alpha"] if copied else None),
            percent(constant["alpha"] if constant else None), percent(adapter["alpha"]),
            percent(adapter["top5"]), best, percent(drafter["alpha"]),
            number(drafter["simulated"][LEAD_GAMMA]["tau"])]


def summary(tasks: list[Path]) -> int:
    """Log the table of these tasks, their newest decodings, and the paths of pages and pictures.

    Returns the number of answers, by any way of decoding, that were not the target's own.
    """
    rows = [["task", "conditioning", "pairs train/test", "copying", "constant", "adapter", "top-5",
             "best drafter", "alpha", f"tau, gamma {LEAD_GAMMA}"]]
    notes, paths, wrong = [], [], 0
    for task in tasks:
        results = read_results(task)
        with sensible_values(task / "results.json", REMEASURE):
            rows.append(summary_row(results))
            notes.append(f"{results['task']} | what the draft adds: {draft_worth(results)}")
        paths += [task / name for name in ("RESULTS.md", *CURVES, *DRAFTER_CURVES)]
        for folder in newest_decodings(task):
            decoding = read_decoding(folder)
            with sensible_values(folder / "decode.json", REDO):
                notes.append(f"{results['task']} | decoding: {one_line(decoding)}")
            wrong += decoding["totals"]["verdicts"].get("WRONG", 0)
            paths += [folder / name for name in ("DECODE.md", *DECODE_CHARTS)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    notes.append("tau: tokens for each target pass in simulated greedy speculative decoding")
    for line in [*table, *notes, *(path for path in paths if path.exists())]:
        log(f"SUMMARY | {line}")
    return wrong


def main() -> None:
    config = parse_config(ReportConfig)
    if config.rebuild:
        for folder in config.tasks:
            if (folder / "decode.json").exists():
                write_decode_report(folder)
            else:
                write_report(folder, styles())
    elif wrong := summary(config.tasks):
        log(f"ERROR | {wrong} decoded answers are not the target's own: see WRONG in DECODE.md")
        sys.exit(3)


if __name__ == "__main__":
    run(main)
