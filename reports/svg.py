"""Charts as SVG inside a page, drawn from figures alone, each with its figures as text.

400 units wide with labels above the bars, so that they can be read on a telephone. Colours are
classes of page.css (s0, s1, ...), each with an outline of another dash, and every bar has its
figure beside it.
"""

import zlib
from collections.abc import Sequence

from reports.html import text

WIDTH, BAR, GAP, LINE = 400, 16, 10, 16
SERIES = 7  # classes of page.css
LONGEST_LABEL = 44  # letters beside a figure: 300 units at 12 px


def chart(title: str, says: str, height: int, body: list[str], legend: Sequence[str] = ()) -> str:
    """A figure. says: its figures in words, for who can't see it; title and says: plain text."""
    number = zlib.crc32(f"{title}\0{says}".encode())  # the ids of a page must differ
    keys = "".join(
        f'<li><svg viewBox="0 0 12 12" aria-hidden=true><rect x=1 y=1 width=10 height=10 '
        f"class=s{place % SERIES} /></svg>{text(label)}</li>"
        for place, label in enumerate(legend)
    )
    return (
        f'<figure><figcaption>{text(title)}</figcaption><svg role=img viewBox="0 0 {WIDTH} '
        f'{height}" aria-labelledby="t{number} d{number}"><title id="t{number}">{text(title)}'
        f'</title><desc id="d{number}">{text(says)}</desc>{"".join(body)}</svg>'
        f"{f'<ul class=legend>{keys}</ul>' if keys else ''}</figure>"
    )


def label(x: float, y: float, words: str, end: bool = False) -> str:
    shown = words if len(words) <= LONGEST_LABEL else f"{words[:LONGEST_LABEL]}…"
    return f'<text x="{x:.1f}" y="{y:.1f}"{" class=e" if end else ""}>{text(shown)}</text>'


def rectangle(x: float, y: float, width: float, height: float, series: int) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height}" '
        f'class="s{series % SERIES}"/>'
    )


def stacked(title: str, rows: dict[str, dict[str, float]], unit: str) -> str:
    """Bars of stacked parts: {row: {part: value}}."""
    parts = list(dict.fromkeys(part for values in rows.values() for part in values))
    most = max((sum(values.values()) for values in rows.values()), default=0) or 1
    body, y = [], LINE
    for row, values in rows.items():
        body += [label(0, y, row), label(WIDTH, y, f"{sum(values.values()):.3g} {unit}", end=True)]
        x = 0.0
        for part, value in values.items():
            width = WIDTH * value / most
            body.append(rectangle(x, y + 5, width, BAR, parts.index(part)))
            x += width
        y += 5 + BAR + GAP + LINE
    says = "; ".join(
        f"{row}: " + ", ".join(f"{part} {value:.3g} {unit}" for part, value in values.items())
        for row, values in rows.items()
    )
    return chart(title, says, y - LINE, body, parts)


def bars(title: str, values: dict[str, float], show, highlighted: str = "") -> str:
    """One bar a row. show: value -> its text; highlighted: the row to look at."""
    most = max(values.values(), default=0) or 1
    body, y = [], LINE
    for row, value in values.items():
        body += [
            label(0, y, row),
            label(WIDTH, y, show(value), end=True),
            rectangle(0, y + 5, WIDTH * value / most, BAR, 0 if row == highlighted else 1),
        ]
        y += 5 + BAR + GAP + LINE
    says = "; ".join(f"{row}: {show(value)}" for row, value in values.items())
    return chart(title, says, y - LINE, body)


def columns(title: str, counts: dict[int, int], below: str) -> str:
    """A histogram: {value: count}, the values in order. below: what the values are."""
    most, step = max(counts.values(), default=0) or 1, WIDTH / max(len(counts), 1)
    body = []
    for place, (value, count) in enumerate(counts.items()):
        height = 100 * count / most
        if count:
            body.append(
                f'<rect x="{place * step + 1:.1f}" y="{118 - height:.1f}" class=s1 '
                f'width="{step - 2:.1f}" height="{height:.1f}"/>'
            )
            body.append(
                f'<text class="m" x="{(place + 0.5) * step:.1f}" y="{114 - height:.1f}">'
                f"{count}</text>"
            )
        if len(counts) <= 13 or place % 4 == 0:
            body.append(f'<text class="m" x="{(place + 0.5) * step:.1f}" y="132">{value}</text>')
    body.append(f'<text class="m" x="{WIDTH / 2}" y="150">{text(below)}</text>')
    says = "; ".join(f"{value}: {count}" for value, count in counts.items() if count)
    return chart(title, f"{below}: times. {says}", 156, body)


def lines(title: str, series: dict[str, list[tuple[float, float]]], across: str) -> str:
    """Curves {name: [(x, y), ...]} from (0, 0); each ends in a mark with its name in the legend."""
    points = [point for curve in series.values() for point in curve]
    right, top = (max((point[axis] for point in points), default=0) or 1 for axis in (0, 1))
    body = [
        f'<path class=a d="M28 8V150H{WIDTH}"/>',
        label(0, 14, f"{top:.3g}"),
        label(16, 154, "0"),
        label(WIDTH, 168, f"{right:.3g}", end=True),
        f'<text class="m" x="{WIDTH / 2}" y="168">{text(across)}</text>',
    ]
    for place, curve in enumerate(series.values()):
        spots = [(28 + (WIDTH - 36) * x / right, 150 - 138 * y / top) for x, y in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        body.append(f'<polyline class="l s{place % SERIES}" points="{path}"/>')
        body += [
            f'<circle class="s{place % SERIES}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in spots
        ]
    says = "; ".join(
        f"{row}: " + ", ".join(f"{x:.3g} -> {y:.3g}" for x, y in curve)
        for row, curve in series.items()
    )
    return chart(title, says, 174, body, list(series))
