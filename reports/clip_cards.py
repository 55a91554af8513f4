"""Clips on a page: pictures, question, both answers, and each word of the target's marked."""

from __future__ import annotations

import dataclasses
import re

from base import plain
from reports.blocks import number, percent
from reports.html import PICTURE, name, text
from reports.tokens import (
    ACCEPTED,
    FULL,
    MISS,
    NONE,
    OWN,
    SEVERAL,
    UNKNOWN,
    Pass,
    Token,
    missed_words,
)

# Who proposed -> the class of page.css
MARKS = {"memory": "m", "adapter": "a", "draft": "d", "prompt": "q", SEVERAL: "v", UNKNOWN: "u"}
OWN_MARKS = {MISS: "x", FULL: "f", NONE: "o"}
SHOWN_INSTEAD = 3  # proposals that stand before a miss; the others are in its note
OUTCOMES = {"exact": "exact", "tie": "tie", "WRONG": "WRONG", "": "not compared"}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer, ready for a page."""

    row: dict  # of decode.json
    run: dict  # of the chosen drafter
    tokens: list[Token]
    passes: list[Pass]

    @property
    def tau(self) -> float:
        return len(self.tokens) / max(1, len(self.run["accepted"]))

    @property
    def misses(self) -> int:
        return sum(token.kind == MISS for token in self.tokens)

    @property
    def is_recorded(self) -> bool:
        """Whether decode.json tells what had been proposed in place of the target's own tokens."""
        return all(token.kind != OWN for token in self.tokens)

    @property
    def outcome(self) -> str:
        return self.run.get("verdict", "")


@dataclasses.dataclass(frozen=True)
class Clip:
    """All answers about one clip."""

    answers: list[Answer]

    @property
    def key(self) -> str:
        """As Sample.key of clips/dataset.py: it finds the clip's pictures."""
        row = self.answers[0].row
        clip = str(row["clip"])
        return f"{row['sequence']}/{clip}" if row["sequence"] else clip or str(row.get("sample_id"))

    @property
    def badness(self) -> tuple:
        """The worst come first: a WRONG answer, then few tokens per pass."""
        tokens = sum(len(answer.tokens) for answer in self.answers)
        passes = sum(len(answer.run["accepted"]) for answer in self.answers)
        return not any(answer.outcome == "WRONG" for answer in self.answers), tokens / max(
            1, passes
        )


# --------------------------------------------------------------------------------------- tokens
def chances(by: dict[str, float | bool]) -> str:
    """memory 98 %, adapter 71 %; plain text."""
    return ", ".join(
        who if chance is True else f"{who} {100 * float(chance):.0f} %"
        for who, chance in by.items()
    )


def visible(words: str) -> str:
    """The text of a token, with a sign for one that shows nothing; plain text."""
    if words.strip():
        return plain(words)
    return "↵" if "\n" in words else "␣" if words else "∅"


def note_of(token: Token) -> str:
    """What hovering shows; plain text."""
    where = "prefill" if token.number == 0 else f"pass {token.number}"
    word = f"“{visible(token.text).strip()}”"
    if token.kind == ACCEPTED:
        who = f"proposed by {chances(token.by)}" if token.by else "proposed"
        return f"{word} {who}, accepted in {where}"
    if token.kind == MISS:
        instead = "; ".join(
            f"“{visible(proposal.text).strip()}”"
            + (f" ({chances(proposal.by)})" if proposal.by else "")
            for proposal in token.instead
        )
        return f"{word} is the target's own word in {where}. Proposed instead: {instead}"
    if token.kind == FULL:
        return f"{word} is the target's own word in {where}, after every proposal was accepted"
    if token.kind == NONE:
        return f"{word} is the target's own word in {where}: nothing was proposed"
    return f"{word} is the target's own word in {where}"


def marked(token: Token) -> str:
    """A token as HTML: its mark, what was proposed instead, and the note."""
    mark = MARKS.get(token.who, "u") if token.kind == ACCEPTED else OWN_MARKS.get(token.kind, "o")
    word = text(visible(token.text))
    blank = " " if word.startswith(" ") else ""
    struck = ""
    if token.kind == MISS:
        struck = "".join(
            f"<s>{text(visible(proposal.text).strip())}</s> "
            for proposal in token.instead[:SHOWN_INSTEAD]
        )
        more = len(token.instead) - SHOWN_INSTEAD
        struck += f"<small>+{more}</small> " if more > 0 else ""
    return f'{blank}{struck}<b class={mark} data-t="{text(note_of(token))}">{word.strip()}</b>'


def marked_answer(answer: Answer) -> str:
    """The words of an answer with a bar where a pass begins."""
    parts, number = [], -1
    for token in answer.tokens:
        if token.number != number:
            number = token.number
            parts.append(
                f'<i title="{"prefill" if number == 0 else f"pass {number}"}">{number}</i>'
            )
        parts.append(marked(token))
    return f'<p class=words tabindex=0 role=group aria-label="Words of the answer">{"".join(parts)}</p>'


# ---------------------------------------------------------------------------------------- trees
def run_of(one: Pass, node: int) -> tuple[list[int], list[int]]:
    """A node and those after it up to a branch or the end of the accepted path: (nodes, what
    follows)."""
    nodes, following = [node], one.children(node)
    while len(following) == 1 and (following[0] in one.path) == (node in one.path):
        nodes += following
        following = one.children(following[0])
    return nodes, following


def tree_list(one: Pass, starts: list[int]) -> str:
    """Proposals that follow one place as nested lists; the accepted path is marked."""
    items = []
    for start in starts:
        nodes, following = run_of(one, start)
        words = text("".join(visible(one.nodes[node].text) for node in nodes).strip())
        shown = f"<b>✓ {words}</b>" if start in one.path else f"<s>{words}</s>"
        inner = tree_list(one, following) if following else ""
        items.append(f"<li>{shown}{inner}</li>")
    return f"<ul>{''.join(items)}</ul>"


def pass_table(answer: Answer) -> str:
    """The passes of an answer one by one: what was proposed, as a tree, and what was accepted."""
    items, at = [], 0
    for place, one in enumerate(answer.passes):
        accepted = len(one.path)
        own = answer.tokens[at + accepted : at + accepted + 1]
        ends = f"; the target's own: <b>{text(visible(own[0].text).strip())}</b>" if own else ""
        title = "Prefill" if place == 0 else f"Pass {place}"
        tree = tree_list(one, one.children(-1)) if one.nodes else ""
        items.append(
            f"<div class=pass><h5>{title}: {accepted} of {len(one.nodes)} proposals "
            f"accepted{ends}</h5>{tree}</div>"
        )
        at += accepted + 1
    if not items:
        return ""
    return (
        f"<details class=tree><summary>All proposals, pass by pass</summary>{''.join(items)}"
        "</details>"
    )


# ---------------------------------------------------------------------------------------- clips
def pictures_of(clip: Clip, thumbnails: dict) -> str:
    """The small pictures of a clip, as far as they are at hand."""
    shown = thumbnails.get(clip.key) or {}
    parts = []
    for kind, says in (
        ("events", "Events of the clip: the event picture"),
        ("frames", "Video of the clip: frames, oldest first"),
    ):
        source = shown.get(kind) if isinstance(shown, dict) else None
        if isinstance(source, str) and PICTURE.fullmatch(source):
            parts.append(
                f'<figure class={kind}><img alt="{says}" src="{source}">'
                f"<figcaption>{says.split(': ')[1]}</figcaption></figure>"
            )
    return f"<div class=pictures>{''.join(parts)}</div>" if parts else ""


def marked_draft(answer: Answer) -> str:
    """The draft with the words marked that the target said and nobody proposed."""
    draft = str(answer.row.get("draft_text") or "")
    missed = {word for word, holds in missed_words(answer.tokens, draft) if holds}
    return "".join(
        f"<mark>{text(part)}</mark>" if part.casefold() in missed else text(part)
        for part in re.split(r"(\w+)", plain(draft))
    )


def answer_block(answer: Answer, titles: dict[str, str]) -> str:
    run, row = answer.run, answer.row
    outcome = OUTCOMES.get(answer.outcome, "not compared")
    misses = f"{answer.misses} misses; " if answer.is_recorded else ""
    facts = (
        f"{len(answer.tokens)} tokens in {len(run['accepted'])} passes, "
        f"{number(answer.tau)} a pass; {sum(run['accepted'])} of {sum(run['proposed'])} "
        f"proposals accepted; {misses}{outcome}"
    )
    theirs = (
        f"<h4>{text(titles['draft'])} (the draft)</h4><p class=draft>{marked_draft(answer)}</p>"
        if row.get("draft_text")
        else ""
    )
    return (
        f"<div class=answer><p class=question>{text(row.get('query', ''))}</p>{theirs}"
        f"<h4>{text(titles['target'])} (the target)</h4>{marked_answer(answer)}"
        f"<p class=facts>{facts}</p>{pass_table(answer)}</div>"
    )


def outcomes_of(clip: Clip) -> list[str]:
    """What the filter of outcomes finds the clip by: verdicts, and whether words were missed."""
    outcomes = list(dict.fromkeys(answer.outcome or "none" for answer in clip.answers))
    if any(answer.misses for answer in clip.answers):
        return [*outcomes, "missed"]
    return [*outcomes, "unmissed"] if all(answer.is_recorded for answer in clip.answers) else outcomes


def card(clip: Clip, titles: dict[str, str], thumbnails: dict) -> str:
    """One clip as HTML, with what the filters look at."""
    row = clip.answers[0].row
    outcomes = text(" ".join(outcomes_of(clip)))
    return (
        f'<article data-s="{text(row["sequence"])}" data-o="{outcomes}">'
        f"<h3>{name(row['sequence'])} <small>clip {name(row['clip'])}</small></h3>"
        f"{pictures_of(clip, thumbnails)}"
        f"{''.join(answer_block(answer, titles) for answer in clip.answers)}</article>"
    )


def share(part: int, whole: int) -> str:
    return percent(part / whole if whole else None)
