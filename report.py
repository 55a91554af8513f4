"""The SUMMARY of tasks, and their pages and pictures made again from their JSON files alone.

    python report.py task/1s_20260128_020530 task/500ms_20260128_031512   the SUMMARY of these tasks
    python report.py --html task/1s_* task/500ms_*       the same, one page over all of them, SUMMARY.md
    python report.py --rebuild task/1s_20260128_020530                    RESULTS.md and pictures of a task
    python report.py --rebuild task/1s_20260128_020530/decode_20260128_041503   DECODE.md and pictures
"""

import dataclasses
import sys
from pathlib import Path

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import UserError, log, option, parse_config, required
from drafting.table import styles
from machine.files import write_text
from machine.running import run
from reports.decode_report import write_decode_report
from reports.html import PAGE
from reports.summary import log_lines, markdown, read_summary, summary_page
from reports.task_report import write_report


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Print the SUMMARY of finished tasks, make one page over them, or their own pages again."""

    tasks: list[Path] = required("task folders; with --rebuild also folders of decodings",
                                 positional=True)
    rebuild: bool = option(False, "make the page and the pictures again from results.json or "
                                  "decode.json")
    html: bool = option(False, "write one page over all these tasks and their newest decodings too, "
                               "REPORT.html, and SUMMARY.md, beside the first task")

    def __post_init__(self):
        if self.rebuild and self.html:
            raise UserError("--rebuild makes each folder's own page, --html one over all: give one of both")


def summary(tasks: list[Path], html: bool = False) -> int:
    """Log paths, notes and the tables of these tasks and their newest decodings, the tables last.

    html: write SUMMARY.md and REPORT.html beside the first task instead of naming all paths, and end
    with the page to open. Returns the number of answers, by any way of decoding,
    that were not the target's own.
    """
    read, home = read_summary(tasks), tasks[0].resolve().parent
    if html:
        write_text(home / "SUMMARY.md", markdown(read, home))
        write_text(home / PAGE, summary_page(read, home))
    for line in [*([] if html else read.paths()), *log_lines(read)]:
        log(f"SUMMARY | {line}")
    if html:
        log(f"RESULT | open {home / PAGE} in a browser: all clips, figures and files")
    return read.wrong


def main() -> None:
    config = parse_config(ReportConfig)
    if config.rebuild:
        for folder in config.tasks:
            if (folder / "decode.json").exists():
                write_decode_report(folder)
            else:
                write_report(folder, styles())
    elif wrong := summary(config.tasks, config.html):
        log(f"ERROR | {wrong} decoded answers are not the target's own: see WRONG in DECODE.md")
        sys.exit(3)


if __name__ == "__main__":
    run(main)
