"""The parts of an HTML page: escaped text, tables, sections, and the page around them.

A page is one file: style and script are inside it, pictures are data: URIs, and a content security
policy forbids everything else, so that no request leaves it and no text from a file can run. Every
text goes through `text`, which leaves no markup of its own.
"""

import base64
import hashlib
import html
import re
from pathlib import Path

from base import plain

PAGE = "REPORT.html"  # beside each JSON file that pages are made of
LONGEST_NAME = 120  # letters of a name from a file that a page shows
STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
# A picture as pages accept it: nothing that a browser would do more with than to draw it.
PICTURE = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/]+={0,2}")


def text(value) -> str:
    """The value as HTML that shows exactly this text; in attributes with double quotes too."""
    return html.escape(plain(value), quote=True)


def name(value) -> str:
    """A name from a file, as HTML, cut to a length that can be read."""
    shown = plain(value)
    return text(shown if len(shown) <= LONGEST_NAME else f"{shown[:LONGEST_NAME]}…")


def inline(markdown: str) -> str:
    """Markdown within a line, as reports/blocks.py writes it: **strong**, `code`, escapes."""
    parts, strong = [], False
    for match in re.finditer(r"\\(.)|(\*\*)|`([^`]*)`|&(amp|lt|gt);|([^\\*`&]+|.)", markdown, re.S):
        escaped, stars, code, entity, rest = match.groups()
        if escaped:
            parts.append(text(escaped))
        elif stars:
            parts.append("</strong>" if strong else "<strong>")
            strong = not strong
        elif code is not None:
            parts.append(f"<code>{text(code)}</code>")
        elif entity:
            parts.append(f"&{entity};")
        else:
            parts.append(text(rest))
    return "".join(parts) + ("</strong>" if strong else "")


def table(header: list[str], rows: list, caption: str = "") -> str:
    """A table that scrolls by itself where the screen is narrow; cells are HTML already.

    Columns of figures are set to the right.
    """
    columns = list(zip(*rows)) if rows else []
    right = [
        bool(column)
        and all(
            re.fullmatch(
                r"(<strong>)?[-+]?[\d.,]+( ?%|x| M| s| ms)?"
                r"(</strong>)?|-",
                str(cell),
            )
            for cell in column
        )
        for column in columns
    ] or [False] * len(header)

    def row(cells, tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=n' if number else ''}>{cell}</{tag}>"
                for cell, number in zip(cells, right)
            )
            + "</tr>"
        )

    title = f"<caption>{caption}</caption>" if caption else ""
    body = "".join(row(cells, "td") for cells in rows)
    return (
        f'<div class=wide tabindex=0 role=group aria-label="table"><table>{title}<thead>'
        f"{row(header, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )


def cells_of(line: str) -> list[str]:
    return [inline(cell.strip()) for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def from_markdown(lines: list[str]) -> str:
    """Sections of RESULTS.md or DECODE.md as HTML; pictures are left out, `##` begins a section that
    opens and closes.
    """
    parts, is_open = [], False
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    for block in filter(str.strip, blocks):
        first = block.lstrip("\n")
        if heading := re.fullmatch(r"(##+) (.*)", first.strip()):
            if len(heading[1]) == 2:
                parts.append(
                    f"{'</div></details>' if is_open else ''}<details><summary><h2>"
                    f"{inline(heading[2])}</h2></summary><div>"
                )
                is_open = True
            else:
                parts.append(f"<h3>{inline(heading[2])}</h3>")
        elif first.startswith("|"):
            header, _, *rows = first.strip().splitlines()
            parts.append(table(cells_of(header), [cells_of(row) for row in rows]))
        elif first.startswith("    "):
            parts.append(f"<pre tabindex=0>{text_lines(first)}</pre>")
        elif first.startswith("> "):
            parts.append(f"<p class=note>{inline(first.strip()[2:])}</p>")
        elif not first.startswith("!["):
            parts.append(f"<p>{inline(first.strip())}</p>")
    return "".join(parts) + ("</div></details>" if is_open else "")


def text_lines(block: str) -> str:
    return "\n".join(text(line[4:]) for line in block.splitlines())


def section(title: str, body: str, identity: str = "", is_open: bool = True) -> str:
    """A section under a heading; title and body are HTML."""
    mark = f' id="{identity}"' if identity else ""
    if is_open:
        return f"<section{mark}><h2>{title}</h2>{body}</section>"
    return f"<details{mark}><summary><h2>{title}</h2></summary><div>{body}</div></details>"


def glossary(words: dict[str, str]) -> str:
    rows = "".join(
        f"<div><dt>{text(word)}</dt><dd>{text(says)}</dd></div>" for word, says in words.items()
    )
    return f"<dl>{rows}</dl>"


def digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def page(title: str, body: str) -> str:
    """The whole file. title: plain text; body: HTML."""
    style, script = (path.read_text(encoding="utf-8") for path in (STYLE, SCRIPT))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{digest(style)}'; "
        f"script-src '{digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{name(title)}</title>\n<style>{style}</style></head>\n<body><main>\n{body}\n"
        f"</main>\n<script>{script}</script></body></html>\n"
    )
