"""The parts of a page: escaped text, tables, percentages and ratios, as Markdown.

Text from files (paths, sequence names, arguments) is escaped: a name can't become a link, a table
cell or HTML.
"""

import re
import shlex

from base import plain

# seconds in all; a shorter time can't be told from the noise of a clock
CLOCK_S = 1e-4


def escape(text) -> str:
    """Plain text as Markdown that shows exactly this text, on one line."""
    text = " ".join(plain(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#!|~$@]|:(?=//)|\.(?<=www\.))", r"\\\1", text)


def table(header: list[str], rows: list) -> list[str]:
    """Lines of a Markdown table; the cells are Markdown already."""
    return [f"| {' | '.join(map(str, row))} |"
            for row in (header, ["---"] * len(header), *rows)] + [""]


def shown_pictures(names: list[str]) -> list[str]:
    """Lines that show these pictures, which lie beside the page."""
    return [line for name in names for line in (f"![{name}]({name})", "")]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure with its unit; "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def times(value: float | None, digits: int = 2) -> str:
    """A speed-up: 2.50x."""
    return number(value, digits, "x")


def ratio(slow_s: float | None, fast_s: float) -> float | None:
    """Speed-up; None where either time is unknown or shorter than CLOCK_S."""
    if not slow_s or slow_s <= CLOCK_S or fast_s <= CLOCK_S:
        return None
    return slow_s / fast_s


def command_line(argv: list[str]) -> str:
    """The command that made a result, as an indented code line that can be pasted into a shell."""
    return "    " + " ".join(plain(shlex.join(["python", *argv])).split())


def settings_tables(settings: dict, provenance: dict) -> list[str]:
    """The sections Settings and Provenance."""
    rows = [[escape(name), escape(", ".join(map(str, value)) if isinstance(value, list) else value)]
            for name, value in settings.items()]
    return [
        "## Settings", "", *table(["setting", "value"], rows), "## Provenance", "",
        *table(["", ""], [map(escape, item) for item in provenance.items()])
    ]
