"""REPORT.html of a decoding, from decode.json and thumbnails.json alone: what it saved, who guessed
which words, and where guesses fail.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from machine.files import read_json
from reports import decode_figures
from reports.blocks import number, times
from reports.clip_cards import Answer, Clip, card
from reports.decode_costs import accounting_section, cost_section, stage_section
from reports.decode_figures import (
    accepted_lengths,
    own_verdicts,
    speed_ups,
    stages,
    whole_s,
)
from reports.html import LONGEST_NAME, from_markdown, glossary, name, section, text
from reports.svg import bars, columns, stacked
from reports.tokens import passes_of, tokens_of, words_of
from reports.tree_section import tree_section
from reports.word_sections import SHOWN_CLIPS, clip_section, guess_section, legend, miss_section

THUMBNAILS = "thumbnails.json"
TITLES = {"draft": "EventGPT", "target": "Video-LLaVA"}
WORDS = {
    "target": "The slow model whose own words are wanted. It checks every proposal, so its answer "
    "never changes.",
    "draft": "The answer that the fast model gives to the same question, in other words.",
    "proposal": "A token (a word or a part of one) guessed before the target has said it. Proposals "
    "may branch into a tree; at most one path of it can be right.",
    "pass": "One run of the target over all its proposals at once. It costs little more than a run "
    "for one token. The prefill, which reads question and pictures, is pass 0.",
    "miss": "A place where the target says something else than any proposal. It then adds its own "
    "token, and the next pass begins.",
    "tau": "Tokens that a pass brings on average; 1 is decoding without proposals.",
    "memory": "Counts of which tokens followed which in earlier answers of the target. It learns each "
    "answer once that is verified.",
    "adapter": "A small network, trained to say the target's next token from the tokens before it "
    "and from the draft.",
}


# --------------------------------------------------------------------------------------- answers
def answers_of(results: dict) -> list[Answer]:
    words, drafter = words_of(results), results["drafter"]
    return [
        Answer(
            row,
            row["runs"][drafter],
            tokens_of(row, row["runs"][drafter], words),
            passes_of(row, row["runs"][drafter], words),
        )
        for row in results["answers"]
    ]


def clips_of(answers: list[Answer]) -> list[Clip]:
    """The clips, the worst first."""
    by_clip: dict[tuple, list[Answer]] = {}
    for answer in answers:
        place = answer.row["sequence"], str(answer.row["clip"]), str(answer.row.get("sample_id"))
        by_clip.setdefault(place, []).append(answer)
    return sorted(map(Clip, by_clip.values()), key=lambda clip: clip.badness)


def shown_clips(results: dict) -> list[str]:
    """The keys of the clips that a page would show: the worst SHOWN_CLIPS."""
    return [clip.key for clip in clips_of(answers_of(results))[:SHOWN_CLIPS]]


# ------------------------------------------------------------------------------------------ lead
def titles_of(results: dict) -> dict[str, str]:
    """The names of both models in sentences."""
    given = results.get("titles") or {}
    return TITLES | {role: str(title)[:LONGEST_NAME] for role, title in given.items()}


def clips_in(results: dict) -> str:
    """8 clips"""
    count = len({(str(row["sequence"]), str(row["clip"]), str(row.get("sample_id")))
                 for row in results["answers"]})
    return f"{count} clip{'s' if count != 1 else ''}"


def plain_sentence(results: dict, titles: dict[str, str]) -> str:
    """What was reached, for a reader who knows nothing yet; HTML."""
    drafter, sums = results["drafter"], results["totals"]
    answers, whole = sums["answers"], whole_s(results, drafter)
    speed, verdicts = speed_ups(results, drafter), own_verdicts(results)
    target = text(titles["target"])
    asked = f"{target} answered {answers} question{'s' if answers != 1 else ''} about {clips_in(results)}"
    if verdicts:
        same = verdicts.get("exact", 0)
        asked += (
            ", every answer word for word its own"
            if same == answers
            else f", {same} of them word for word its own ({text(decode_figures.counted(verdicts))})"
        )
    each = f"{whole / answers:.3g} s an answer"
    if speed["whole"]:
        all_s = sums["generate"]["all_s"] / answers
        return (
            f"{asked}, and was <strong>{times(speed['whole'], 1)[:-1]} times as fast from "
            f"pictures to answer</strong> as with transformers’ generate: {each} instead of "
            f"{all_s:.3g} s."
        )
    otherwise = "How much faster that is was not measured: run again with --compare."
    temperature = results["config"].get("temperature")
    if temperature and verdicts:
        otherwise = (f"The answers were sampled at temperature {text(temperature)}; generate draws other "
                     "random numbers and was not timed.")
    return f"{asked}, from pictures to answer in <strong>{each}</strong>. {otherwise}"


def explained(results: dict, answers: list[Answer]) -> str:
    """The second sentence: how the speed comes about, and what decoding alone gains."""
    run = results["totals"]["runs"][results["drafter"]]
    speed = speed_ups(results, results["drafter"])
    alone = [
        f"{times(speed[key], 1)} the speed of {whose}"
        for key, whose in (("plain", "the same loop without proposals"), ("generate", "generate"))
        if speed[key]
    ]
    decoding = f" Decoding alone runs at {' and '.join(alone)}." if alone else ""
    return (
        f"A pass of the model brought {number(run['tau'])} tokens on average instead of one, "
        f"because {run['accepted']} of the {run['tokens']} tokens had been proposed rightly "
        f"beforehand by <em>{text(results['drafter'])}</em>.{decoding}"
    )


def facts(results: dict) -> str:
    run, verdicts = results["totals"]["runs"][results["drafter"]], own_verdicts(results)
    speed = speed_ups(results, results["drafter"])
    rows = [
        ("end to end", times(speed["whole"], 1), "over generate"),
        ("decoding", times(speed["plain"], 1), "over our loop without proposals"),
        ("tokens a pass (tau)", number(run["tau"]), f"{run['passes']} passes"),
        (
            "same words",
            f"{verdicts.get('exact', 0)} of {sum(verdicts.values())}" if verdicts else "-",
            "answers equal to plain decoding",
        ),
    ]
    return (
        "<div class=facts-row>"
        + "".join(
            f"<div><small>{label}</small><strong>{figure}</strong><small>{more}</small></div>"
            for label, figure, more in rows
        )
        + "</div>"
    )


def example(clips: list[Clip], results: dict, titles: dict[str, str], thumbnails: dict) -> str:
    """The clip nearest to the average tokens per pass, among those with a miss to look at."""
    tau = results["totals"]["runs"][results["drafter"]]["tau"] or 1.0
    missed = [clip for clip in clips if any(answer.misses for answer in clip.answers)] or clips
    best = min(missed, key=lambda clip: abs(clip.badness[1] - tau))
    return card(Clip(best.answers[:1]), titles, thumbnails)


def drafter_chart(results: dict) -> str:
    runs = results["totals"]["runs"]
    speeds = {drafter: speed for drafter in runs if (speed := speed_ups(results, drafter)["plain"])}
    if not speeds:
        return ""
    ordered = dict(sorted(speeds.items(), key=lambda item: -item[1]))
    return bars("Decoding over our loop without proposals", ordered, times, results["drafter"])


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the page takes over from DECODE.md, as Markdown."""

    warnings: list[str]  # below the lead
    who_pays: list[str]  # below the chart of times
    sections: list[str]  # behind headings


def body(results: dict, thumbnails: dict, parts: Parts) -> str:
    """The page of a decoding."""
    titles = titles_of(results)
    answers = answers_of(results)
    clips = clips_of(answers)
    costs = from_markdown(
        [*accounting_section(results), *cost_section(results), *tree_section(results)])
    time_chart = stacked("Seconds an answer", per_answer(results), "s")
    return "".join(
        [
            f"<header><p class=kicker>Decoding with {name(results['task'])}, {name(results['date'])}, on "
            f"{name(results['device'])}</p><h1>{plain_sentence(results, titles)}</h1>"
            f"<p>{explained(results, answers)}</p>{facts(results)}{from_markdown(parts.warnings)}</header>",
            section(
                "One example",
                legend(answers).replace("<ul", "<ul id=marks", 1)
                + example(clips, results, titles, thumbnails),
                "example",
            ),
            section(
                "Where the time goes",
                time_chart
                + from_markdown(parts.who_pays)
                + "<details><summary>As a table</summary><div>"
                + from_markdown(stage_section(results)[2:])
                + "</div></details>",
                "time",
            ),
            section("Who guessed the words", guess_section(results, answers), "guesses"),
            section("Where guesses fail", miss_section(answers, titles), "misses"),
            section(
                f"All clips ({len(clips)})", clip_section(clips, results, titles, thumbnails), "all"
            ),
            section("Eight words", glossary(WORDS), "words"),
            "<section id=more><h2>Figures</h2>",
            drafter_chart(results),
            columns(
                "Accepted proposals in a pass", accepted_lengths(results), "proposals accepted"
            ),
            from_markdown(parts.sections),
            costs,
            "</section>",
        ]
    )


def per_answer(results: dict) -> dict[str, dict[str, float]]:
    answers = results["totals"]["answers"]
    return {
        way: {stage: seconds / answers for stage, seconds in parts.items() if seconds}
        for way, parts in stages(results).items()
    }


def read_thumbnails(folder: Path) -> dict:
    """Clip's key -> {"events", "frames"}: data: URIs. Empty where there are none."""
    path = folder / THUMBNAILS
    thumbnails = read_json(path) if path.exists() else {}
    return thumbnails if isinstance(thumbnails, dict) else {}
