"""The SUMMARY of tasks, and their pages and pictures made again from their JSON files alone.

    python report.py task/1s_20260128_020530 task/500ms_20260128_031512   the SUMMARY of these tasks
    python report.py --rebuild task/1s_20260128_020530                    RESULTS.md and pictures of a task
    python report.py --rebuild task/1s_20260128_020530/decode_20260128_041503   DECODE.md and pictures
"""

import dataclasses
import sys
from pathlib import Path

from base import log, option, parse_config, required
from machine.files import reading
from machine.running import run
from reports import decode_report
from reports.task_report import (
    DRAFTER_PICTURES,
    GAMMA_OF_LEAD,
    MEASURE,
    PICTURES,
    best_drafter,
    draft_worth,
    percent,
    read_results,
    write_report,
)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Print the SUMMARY of finished tasks, or make their pages and pictures again."""

    tasks: list[Path] = required("task folders; with --rebuild also folders of decodings", positional=True)
    rebuild: bool = option(False, "make the page and the pictures again from results.json or decode.json")


def newest_decoding(task: Path) -> list[Path]:
    """The last folder of speculative_decode.py that was finished, none or one; its name ends in the time."""
    return sorted(path.parent for path in task.glob("decode_*/decode.json"))[-1:]


def summary(tasks: list[Path]) -> int:
    """Log the table of these tasks, one line each, their newest decoding, and where pages and pictures are.

    Returns the number of answers, by any way of decoding, that were not the target's own.
    """
    wrong, worth = 0, []
    rows = [["task", "conditioning", "pairs train/test", "copying", "constant", "adapter", "top-5",
             "best drafter", "alpha", f"tau, gamma {GAMMA_OF_LEAD}"]]
    for task in tasks:
        results = read_results(task)
        with reading(task / "results.json", MEASURE):
            trained, test = results["metrics"].get("train", {"pairs": 0}), results["metrics"]["test"]
            adapter, constant, best = test["adapter"], test["constant_string"], best_drafter(test)
            lead = test["drafters"][best]
            rows.append([
                str(results["task"]), str(results["adapter"]["conditioning"]), f"{trained['pairs']}/{test['pairs']}",
                percent(test["direct_copy"]["alpha"]), percent(constant["alpha"] if constant else None),
                percent(adapter["alpha"]), percent(adapter["top5"]), best, percent(lead["alpha"]),
                f"{lead['simulated'][GAMMA_OF_LEAD]['tau']:.2f}"])
            worth.append(draft_worth(results))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        log("SUMMARY | " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)))
    for task, (name, *_), draft in zip(tasks, rows[1:], worth):
        log(f"SUMMARY | {name} | what the draft adds: {draft}")
        for folder in newest_decoding(task):
            found = decode_report.read_decoding(folder)
            with reading(folder / "decode.json", decode_report.DECODE):
                wrong += found["totals"]["verdicts"].get("WRONG", 0)
                log(f"SUMMARY | {name} | decoding: {decode_report.one_line(found)}")
    log("SUMMARY | tau: tokens for each target pass in simulated greedy speculative decoding")
    for task in tasks:
        for name in ("RESULTS.md", *PICTURES, *DRAFTER_PICTURES):
            if (task / name).exists():
                log(f"SUMMARY | {task / name}")
        for folder in newest_decoding(task):
            for name in ("DECODE.md", *decode_report.PICTURES):
                if (folder / name).exists():
                    log(f"SUMMARY | {folder / name}")
    return wrong


def main() -> None:
    config = parse_config(ReportConfig)
    if config.rebuild:
        for folder in config.tasks:
            if (folder / "decode.json").exists():
                with reading(folder / "decode.json", decode_report.DECODE):
                    decode_report.write_decode_report(folder)
            else:
                with reading(folder / "results.json", MEASURE):
                    write_report(folder)
    elif wrong := summary(config.tasks):
        log(f"ERROR | {wrong} decoded answers are not the target's own: see WRONG in DECODE.md")
        sys.exit(3)


if __name__ == "__main__":
    run(main)
