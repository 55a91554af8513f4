"""Sections of a decoding's page: the legend, who guessed, which words were missed, all clips."""

from __future__ import annotations

import collections

from reports.clip_cards import MARKS, Answer, Clip, card, marked_draft, outcomes_of, share
from reports.html import name, table, text
from reports.svg import bars
from reports.tokens import (
    ACCEPTED,
    FULL,
    MISS,
    NONE,
    OWN,
    SEVERAL,
    counted,
    missed_words,
    whole_words,
)

SHOWN_CLIPS = 100
MAX_BYTES = 4_500_000  # of all clips on a page
MISSED_WORDS = 12  # that are listed


def legend(answers: list[Answer]) -> str:
    """The marks that occur on this page, each with what it means."""
    seen = {token.who for answer in answers for token in answer.tokens if token.kind == ACCEPTED}
    kinds = {token.kind for answer in answers for token in answer.tokens}
    words = {
        "memory": "proposed by the memory",
        "adapter": "proposed by the adapter",
        "draft": "copied from the draft",
        "prompt": "copied from the question or answer",
        "several": "proposed by several",
        "unknown": "proposed",
    }
    items = [
        f"<li><b class={MARKS[who]}>word</b> {says}, accepted</li>"
        for who, says in words.items()
        if who in seen
    ]
    items += [
        f"<li>{sample} {says}</li>"
        for kind, sample, says in (
            (
                MISS,
                "<s>guess</s> <b class=x>word</b>",
                "a miss: the target’s own word, before it what was proposed",
            ),
            (FULL, "<b class=f>word</b>", "the target’s own, after all proposals were accepted"),
            (NONE, "<b class=o>word</b>", "the target’s own, nothing was proposed"),
            (OWN, "<b class=o>word</b>", "the target’s own"),
        )
        if kind in kinds
    ]
    items.append("<li><i>2</i> here pass 2 begins</li>")
    if any("<mark>" in marked_draft(answer) for answer in answers):
        items.append(
            "<li><mark>word</mark> in the draft: the target said it and nobody proposed it</li>"
        )
    return f"<ul class=marks>{''.join(items)}</ul>"


def guess_section(results: dict, answers: list[Answer]) -> str:
    """Who proposed the words: counts that add up to all tokens."""
    counts = counted([answer.tokens for answer in answers])
    whole = sum(counts.values())
    rows = [
        [text(label), count, share(count, whole)]
        for label, count in sorted(
            ((label_of(kind), count) for kind, count in counts.items()), key=lambda item: -item[1]
        )
    ]
    rows.append(["<strong>all tokens</strong>", f"<strong>{whole}</strong>", share(whole, whole)])
    by = {label_of(kind): count for kind, count in counts.items()}
    return (
        bars(
            "Who guessed the words",
            dict(sorted(by.items(), key=lambda item: -item[1])),
            lambda count: f"{count} ({share(count, whole)})",
        )
        + table(["part in the decoding", "tokens", "share"], rows)
        + (
            "<p>Several: more than one source gave the token at least 10 %. Where the memory is "
            "sure, the adapter is not asked.</p>"
            if f"{ACCEPTED}, {SEVERAL}" in counts
            else ""
        )
    )


def label_of(kind: str) -> str:
    if not kind.startswith(ACCEPTED):
        return {
            MISS: "own, after a miss",
            FULL: "own, after all proposals were accepted",
            NONE: "own, nothing was proposed",
            OWN: "own, proposals not recorded",
        }[kind]
    who = kind.removeprefix(f"{ACCEPTED}, ")
    return "accepted" if who == "unknown" else f"accepted, from {who}"


def miss_section(answers: list[Answer], titles: dict[str, str]) -> str:
    """Which words were missed, and which of them stood in the draft all along."""
    words: collections.Counter[str] = collections.Counter()
    in_draft: collections.Counter[str] = collections.Counter()
    instead: dict[str, collections.Counter[str]] = {}
    misses = 0
    recorded = [answer for answer in answers if answer.is_recorded]
    for answer in recorded:
        misses += answer.misses
        for word, holds in missed_words(answer.tokens, str(answer.row.get("draft_text") or "")):
            words[word] += 1
            in_draft[word] += holds
        for token, word in zip(answer.tokens, whole_words(answer.tokens)):
            for proposal in token.instead[:1]:
                instead.setdefault(word, collections.Counter())[proposal.text.strip()] += 1
    left = len(answers) - len(recorded)
    unknown = (
        f"<p class=note>What had been proposed is not recorded for {left} of {len(answers)} "
        "answers.</p>"
        if left
        else ""
    )
    if not recorded:
        return unknown
    if not any(sum(answer.run["proposed"]) for answer in recorded):
        return f"<p>Nothing was proposed.</p>{unknown}"
    if not misses:
        return f"<p>No miss: every word that was proposed for a place was right.</p>{unknown}"
    known = sum(in_draft.values())
    drafted = any(answer.row.get("draft_text") for answer in answers)
    lead = f"<p>{misses} misses, {sum(words.values())} of them in words that say something"
    lead += (
        f"; <strong>{known} of these stand in {text(titles['draft'])}’s own answer</strong> to the "
        "same question: a better use of the draft could have guessed them.</p>"
        if drafted
        else ".</p>"
    )
    rows = [
        [
            text(word),
            count,
            in_draft[word] if drafted else "-",
            text(
                ", ".join(
                    first for first, _ in instead.get(word, collections.Counter()).most_common(3)
                )
                or "-"
            ),
        ]
        for word, count in words.most_common(MISSED_WORDS)
    ]
    return lead + unknown + table(["missed word", "times", "in the draft", "proposed instead"], rows)


def clip_section(clips: list[Clip], results: dict, titles: dict[str, str], thumbnails: dict) -> str:
    """All clips that fit, the worst first, with the filters."""
    cards, shown, size = [], [], 0
    for clip in clips[:SHOWN_CLIPS]:
        html = card(clip, titles, thumbnails)
        if size + len(html.encode()) > MAX_BYTES:
            continue
        cards.append(html)
        shown.append(clip)
        size += len(html.encode())
    sequences = sorted({str(clip.answers[0].row["sequence"]) for clip in shown} - {""})
    options = "".join(
        f'<option value="{text(sequence)}">{name(sequence)}</option>'
        for sequence in sequences[:500]
    )
    outcomes = {
        "exact": "exact",
        "tie": "tie",
        "WRONG": "WRONG",
        "none": "not compared",
        "missed": "with a miss",
        "unmissed": "without a miss",
    }
    seen = {outcome for clip in shown for outcome in outcomes_of(clip)}
    kinds = "".join(
        f'<option value="{key}">{says}</option>' for key, says in outcomes.items() if key in seen
    )
    left = len(clips) - len(cards)
    more = f"<p class=note>{left} further clips are in decode.json alone.</p>" if left else ""
    return (
        f'<form id=filters hidden><label>Sequence <select id=sequence><option value="">all</option>'
        f'{options}</select></label><label>Outcome <select id=outcome><option value="">all</option>'
        f"{kinds}</select></label><output id=count>{len(cards)} of {len(cards)} clips</output></form>"
        f"<p class=hint>The worst clips first: the fewest tokens a pass. Point at a word, or go to an "
        f"answer with Tab and along its words with the arrow keys, to see who proposed it and how "
        f"surely.</p>{legend_again()}<div id=clips>{''.join(cards)}</div>{more}"
    )


def legend_again() -> str:
    return "<p class=hint><a href=#marks>What the marks mean</a></p>"
