"""DECODE.md of a decoding, from its decode.json alone: are the answers the target's own, and how
much time was saved?
"""

from pathlib import Path

from base import log
from machine.files import write_text
from reports.blocks import command_line, escape, number, ratio, settings_tables, shown_pictures, table, times
from reports.charts import draw_decoding
from reports.decode_costs import accounting_section, cost_section, stage_section
from reports.decode_figures import (
    REDO,
    VERDICTS,
    accepted_lengths,
    accepted_share,
    by_question,
    counted,
    decode_s,
    other_verdicts,
    own_verdicts,
    pass_ms,
    read_decoding,
    speed_ups,
    whole_s,
)
from reports.decode_page import Parts, body, read_thumbnails
from reports.html import PAGE, page
from reports.shapes import sensible_values
from reports.tree_section import tree_section

MAX_ROWS = 20                          # of differences and of failed clips on the page


# --------------------------------------------------------------------------------------------- lead
def exactness(verdicts: dict, whose: str = "plain decoding") -> str:
    """The verdicts on one way of decoding, in a sentence."""
    exact, ties, wrong = (verdicts.get(key, 0) for key in VERDICTS)
    answers = exact + ties + wrong
    if not ties and not wrong:
        return f"**All {answers} answers are word for word those of {whose}.**"
    text = f"{exact} of {answers} answers are word for word those of {whose}. "
    if ties:
        text += (f"There {'is 1 tie' if ties == 1 else f'are {ties} ties'}: the target's two best "
                 "words lay within rounding of each other, and the answer went on with the other "
                 "one. ")
    if wrong:
        text += (f"**{wrong} of {answers} {'is' if wrong == 1 else 'are'} WRONG: different by more "
                 "than rounding.**")
    return text.strip()


def lead(results: dict) -> list[str]:
    """The answer in a few plain sentences, then the warnings."""
    name, sums = results["drafter"], results["totals"]
    run, verdicts = sums["runs"][name], own_verdicts(results)
    text = (f"**With {escape(name)} the target emits {number(run['tau'])} tokens per pass (tau), "
            f"gamma {escape(results['gamma'])}{trees_of(results)}, over {sums['answers']} "
            "answers.** ")
    if run["proposed"]:
        text += (f"Of {run['proposed']} proposed tokens {run['accepted']} were accepted "
                 f"({accepted_share(run)}). ")
    else:
        text += "Nothing was proposed. "
    if verdicts and name != "none":
        text += exactness(verdicts, plain_way(results))
    lines = [text.strip(), *speed_sentence(results)]
    if verdicts:
        lines += comparison(results)
    elif results["config"].get("temperature"):
        lines.append(f"The answers were sampled at temperature {escape(results['config']['temperature'])}. "
                     "Whether they equal those of sampling without drafts, and how much time was saved, "
                     "was not measured: run again with --compare.")
    else:
        lines.append("Whether the answers equal plain decoding, and how much time was saved, was "
                     f"not measured: run again with --compare. Known is that {sums['answers']} "
                     f"answers took {whole_s(results, name):.2f} s draft free, {decode_s(run):.2f} "
                     "s of it decoding.")
    return [part for line in [*lines, *lead_warnings(results)] for part in (line, "")]


def plain_way(results: dict) -> str:
    """What answers are compared with, in words."""
    temperature = results["config"].get("temperature")
    if not temperature:
        return "plain decoding"
    return f"sampling without drafts from the same seeds (temperature {escape(temperature)})"


def trees_of(results: dict) -> str:
    """How proposals branched, for the lead; nothing for chains and for files that know no trees."""
    tree = str(results.get("tree", "0"))
    nodes = {"0": "", "auto": ", trees of as many nodes as are worth their cost"}
    return nodes.get(tree, f", trees of up to {escape(tree)} nodes")


def speed_sentence(results: dict) -> list[str]:
    speed = speed_ups(results, results["drafter"])
    sides = [
        f"**{times(speed[key])}** the speed of {whose}"
        for key, whose in (("plain", "our own loop without drafts"),
                           ("generate", "transformers' generate")) if speed[key]
    ]
    if not sides:
        return []
    end_to_end = f"; end to end, draft free, at **{times(speed['whole'])}** the speed of generate"
    return [f"Decoding runs at {' and '.join(sides)}{end_to_end if speed['whole'] else ''}. These "
            "are ratios of totals over the same answers."]


def comparison(results: dict) -> list[str]:
    """What --compare found of the other ways of decoding, and which drafter pays."""
    lines, others = [], other_verdicts(results)
    if results["totals"]["generate"]:
        verdict = exactness(results["totals"]["generate"]["verdicts"], "generate")
        lines.append(
            f"Our own loop without drafts, compared with transformers' generate: {verdict}")
    if others:
        strong = "**" if "WRONG" in others else ""
        lines.append(
            f"{strong}Among the others: {counted(others)}; see the table of differences.{strong}")
    return [*lines, who_pays(results)]


def lead_warnings(results: dict) -> list[str]:
    verify_ms, lines = pass_ms(results), []
    is_measured = verify_ms.keys() >= {1, 9}
    if results["quantization"] == "4bit" and is_measured and verify_ms[9] > 1.25 * verify_ms[1]:
        lines.append("> **Warning:** verifying several tokens is slow with these 4-bit products: 9 "
                     f"tokens take {verify_ms[9] / verify_ms[1]:.2f} times as long as one here. "
                     "Try --quantization none if the weights fit.")
    if results.get("interrupted"):
        lines.append("> **Warning:** this decoding was stopped and resumed; times of answers "
                     "before and after the stop were not measured in one run.")
    if results["failed"]:
        lines.append(
            f"> **Warning:** clips that could not be decoded: {len(results['failed'])}; see Failed "
            "clips."
        )
    return lines


def who_pays(results: dict) -> str:
    """The drafter with the least total decode time and no WRONG answer, if it beats plain decoding."""
    runs, verify_ms = results["totals"]["runs"], pass_ms(results)
    seconds = {name: decode_s(run) for name, run in runs.items()
               if name != "none" and not run["verdicts"].get("WRONG")}
    best = min(seconds, key=seconds.__getitem__, default=None)
    plain_s = decode_s(runs["none"]) if "none" in runs else None
    nothing_decoded = best is None or runs[best]["tokens"] <= results["totals"]["answers"]
    speed = None if nothing_decoded else ratio(plain_s, seconds[best])
    if speed is None:
        return "Which drafter pays on this machine can't be told from these answers."
    if speed > 1:
        chosen = "" if best == results[
            "drafter"] else f" (this run chose {escape(results['drafter'])})"
        return (f"**On this machine {escape(best)} pays most:** decoding everything takes it "
                f"{seconds[best]:.2f} s, decoding plainly {plain_s:.2f} s, {times(speed)} the "
                f"speed{chosen}.")
    over_one = verify_ms[9] / verify_ms[1] if verify_ms.keys() >= {1, 9} else None
    return (f"**On this machine no drafter pays:** the best, {escape(best)}, takes "
            f"{seconds[best]:.2f} s to decode everything, decoding plainly {plain_s:.2f} s. One of "
            f"its proposals costs {number(results['costs_ms']['proposal'][best])} ms and one token "
            f"of plain decoding {number(verify_ms.get(1))} ms; verifying 9 tokens costs "
            f"{number(over_one)} times as much as one, and a pass yields "
            f"{number(runs[best]['tau'])} tokens.")


# ----------------------------------------------------------------------------------------- sections
def drafter_section(results: dict) -> list[str]:
    rows = []
    for name, run in results["totals"]["runs"].items():
        speed, verdicts = speed_ups(results, name), run["verdicts"]
        judged = " / ".join(str(verdicts.get(key, 0)) for key in VERDICTS) if verdicts else "-"
        shown = f"**{escape(name)}**" if name == results["drafter"] else escape(name)
        rows.append([
            shown, number(run['tau']), run["passes"], run["proposed"],
            accepted_share(run), f"{run['draft_s']:.2f}", f"{run['verify_s']:.2f}",
            *(times(speed[key])
              for key in ("plain", "generate", "whole")), "reference" if name == "none" else judged
        ])
    header = [
        "drafter", "tau", "passes", "proposed", "accepted", "draft s", "verify s",
        "decoding over plain", "decoding over generate", "end to end over generate",
        "exact / tie / WRONG"
    ]
    return [
        "## Drafters", "", *table(header, rows),
        "tau: tokens per pass of the target, the prefill included; proposals made before the "
        "prefill are verified in it. Decoding is drafting and verifying after the prefill; none is "
        "our own loop without drafts, and generate's decoding is its total time less that of its "
        "first token. End to end is draft free.",
        ""
    ]


def question_section(results: dict) -> list[str]:
    """The chosen drafter on each question, where there are several."""
    rows, name = [], results["drafter"]
    for question, alone in by_question(results)[:MAX_ROWS]:
        run, speed = alone["totals"]["runs"][name], speed_ups(alone, name)
        rows.append([escape(question), alone["totals"]["answers"], number(run["tau"]), accepted_share(run),
                     *(times(speed[key]) for key in ("plain", "generate", "whole")),
                     counted(own_verdicts(alone)) or "-"])
    if not rows:
        return []
    header = ["question", "answers", "tau", "accepted", "decoding over plain", "decoding over generate",
              "end to end over generate", "verdicts"]
    return [f"## By question: {escape(name)}", "", *table(header, rows),
            *more_rows(len(by_question(results)))]


def verdict_section(results: dict) -> list[str]:
    """How a verdict is reached, and every difference."""
    if not own_verdicts(results):
        return []
    differences = [(answer, name, judged) for answer in results["answers"]
                   for name, judged in (*answer["runs"].items(), ("generate",
                                                                  answer.get("generate") or {}))
                   if judged.get("verdict") in ("tie", "WRONG")]
    differences.sort(key=lambda difference: difference[2]["verdict"] != "WRONG")
    rows = [[
        escape(f"{answer['sequence']} {answer['clip']}"), answer["question_idx"],
        escape(name), judged["position"], "-" if judged["gap"] is None else f"{judged['gap']:.3g}",
        "**WRONG**" if judged["verdict"] == "WRONG" else "tie"
    ] for answer, name, judged in differences[:MAX_ROWS]]
    noise = "unknown" if results["noise"] is None else f"{results['noise']:.3g}"
    lines = ["## Verdicts", "",
             "exact: the same tokens as our own loop without drafts (generate is compared with "
             "that loop too). Otherwise the target is asked again. The verdict is tie if, at the "
             "first difference, both tokens, and from there on each token of the speculative "
             "answer, lie no further below the target's best logit than the noise, "
             f"{noise} here; otherwise it is WRONG. The noise is 4 times the "
             "largest difference of a logit between four ways to compute the same tokens: one by "
             "one, together, in the prefill, and by transformers' own forward pass, measured in "
             "this run. position: the number of equal "
             "tokens before the difference; gap: between the target's two best logits there.", ""]
    if not rows:
        return [*lines, "There are no differences.", ""]
    lines += table(["clip", "question", "by", "position", "gap of logits", "verdict"], rows)
    return lines + more_rows(len(differences))


def more_rows(count: int) -> list[str]:
    return [f"{count - MAX_ROWS} more are in decode.json.", ""] if count > MAX_ROWS else []


def length_section(results: dict) -> list[str]:
    """The histogram of accepted proposals as text: a bar of 40 characters is 100 %."""
    lengths = accepted_lengths(results)
    passes = sum(lengths.values())
    bars = [
        f"    {length:>8}  {count:>6}  {count / passes:6.1%}  {'#' * round(40 * count / passes)}".
        rstrip() for length, count in lengths.items()
    ]
    return [
        f"## Accepted proposals per pass: {escape(results['drafter'])}", "",
        "    accepted  passes   share", *bars, ""
    ]


def failed_section(results: dict) -> list[str]:
    failed = results["failed"]
    if not failed:
        return []
    rows = [[
        escape(f"{clip['sequence']} {clip['clip']}"),
        escape(clip["sample_id"]),
        escape(clip["model"] or "-"),
        escape(clip["reason"])
    ] for clip in failed[:MAX_ROWS]]
    return [
        "## Failed clips", "", *table(["clip", "sample", "model", "reason"], rows),
        *more_rows(len(failed))
    ]


def settings_section(results: dict) -> list[str]:
    """Settings, versions, and the command that made this."""
    provenance, target = results["provenance"], results["target"]
    facts = {
        "date": results["date"], "device": results["device"], "dtype": results["dtype"],
        "quantization": results["quantization"],
        "target": f"{target['name']} ({target['revision']})",
        "share of the memory in a hybrid": results["memory_share"],
        "git commit": provenance["git_commit"], **provenance["versions"]
    }
    settings = {f"--{name}": value for name, value in results["config"].items()}
    return [*settings_tables(settings, facts), "## Again", "", command_line(provenance["argv"]), "",
            "This page and the pictures, from decode.json alone:", "",
            "    python report.py --rebuild DECODE_FOLDER", ""]


def markdown(results: dict, pictures: list[str]) -> str:
    """DECODE.md of one decoding; each picture stands below the section that it belongs to."""
    def picture(name: str) -> list[str]:
        return shown_pictures([name]) if name in pictures else []

    return "\n".join([
        f"# Decoding with {escape(results['task'])}", "", *lead(results), *drafter_section(results),
        *picture("drafter_speed_up.png"), *question_section(results), *accounting_section(results),
        *stage_section(results), *picture("stage_times.png"), *cost_section(results),
        *tree_section(results), *verdict_section(results),
        *length_section(results), *picture("accepted_lengths.png"), *failed_section(results),
        *settings_section(results)
    ])


def decode_page(folder: Path, results: dict) -> str:
    """REPORT.html of a decoding."""
    sections = [*drafter_section(results), *question_section(results), *verdict_section(results),
                *length_section(results),
                *failed_section(results), *settings_section(results)]
    parts = Parts([part for line in lead_warnings(results) for part in (line, "")],
                  [who_pays(results)] if results["totals"]["runs"].keys() > {"none"} else [], sections)
    return page(f"Decoding with {results['task']}", body(results, read_thumbnails(folder), parts))


def write_decode_report(folder: Path, plots: bool = True) -> None:
    """Make the pictures, REPORT.html and then DECODE.md of a folder, from its JSON files alone.

    Raises UserError when decode.json is missing, another program's or of a later version.
    """
    results = read_decoding(folder)
    with sensible_values(folder / "decode.json", REDO):
        # a damaged file is refused before anything is drawn
        markdown(results, [])
        html = decode_page(folder, results)
    text = markdown(results, draw_decoding(folder, results) if plots else [])
    write_text(folder / PAGE, html)
    log(f"decode | {folder / PAGE}")
    write_text(folder / "DECODE.md", text)
    log(f"decode | {folder / 'DECODE.md'}")
