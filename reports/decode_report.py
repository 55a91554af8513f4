"""DECODE.md and pictures from decode.json alone: whether the answers are the target's own, and what it saved.

Every speed-up is a ratio of totals over the same answers. Text from files is escaped.
"""

import collections
import shlex
from pathlib import Path

from base import UserError, log, plain
from machine.files import read_json, write_text, write_whole
from reports.task_report import BLUE, GREY, ORANGE, PURPLE, SKY, VERMILION, escape, percent, table

DECODE = "decode again"
PICTURES = ("accepted_lengths.png", "stage_times.png", "drafter_speed_up.png")
MOST_ROWS = 20                         # of differences and of failed clips
CLOCK_S = 1e-4                 # seconds in all; below that a time is a clock's noise
STAGE_COLORS = {"EventGPT": PURPLE, "vision and prefill": GREY, "vision and prompt": SKY, "prefill": BLUE,
                "drafting": ORANGE, "decoding, verifying": VERMILION}
VERDICTS = ("exact", "tie", "WRONG")
# The drafter's name in results.json of the task, where it was simulated.
SIMULATED = {"hybrid": "hybrid", "memory": "memory", "adapter": "adapter", "copy": "copy of the draft"}


# ---------------------------------------------------------------------------------------------------- numbers
def totals(answers: list[dict]) -> dict:
    """Sums over all answers, for each drafter that ran and for transformers' generate; seconds and tokens."""
    runs = {}
    for name in answers[0]["runs"]:
        rows = [answer["runs"][name] for answer in answers]
        proposed, accepted = (sum(sum(row[key]) for row in rows) for key in ("proposed", "accepted"))
        passes, tokens = sum(len(row["accepted"]) for row in rows), sum(row["tokens"] for row in rows)
        runs[name] = {
            "tokens": tokens, "passes": passes, "tau": tokens / passes, "proposed": proposed, "accepted": accepted,
            "accepted_lengths": dict(sorted(collections.Counter(n for row in rows for n in row["accepted"]).items())),
            **{key: sum(row[key] for row in rows) for key in ("draft_s", "prefill_s", "verify_s")},
            "verdicts": dict(collections.Counter(row["verdict"] for row in rows if "verdict" in row))}
    generate = [answer["generate"] for answer in answers if "generate" in answer]
    verdicts = collections.Counter()
    for found in runs.values():
        verdicts.update(found["verdicts"])
    verdicts.update(row["verdict"] for row in generate)
    return {
        "answers": len(answers), "runs": runs, "verdicts": dict(verdicts),
        "vision_s": sum(answer["vision_s"] for answer in answers),
        "eventgpt_s": sum(answer["eventgpt_s"] for answer in answers),
        "generate": {**{key: sum(row[key] for row in generate) for key in ("tokens", "all_s", "first_token_s")},
                     "verdicts": dict(collections.Counter(row["verdict"] for row in generate))} if generate else None,
    }


def read_decoding(folder: Path) -> dict:
    """decode.json of a folder; a UserError when there is none or it is another program's."""
    results = read_json(folder / "decode.json")
    if not isinstance(results, dict) or results.get("kind") != "decoding":
        raise UserError(f"{folder / 'decode.json'} is not the decode.json of speculative_decode.py")
    return results


def decode_s(found: dict) -> float:
    """Seconds of a run after its prefill."""
    return found["draft_s"] + found["verify_s"]


def whole_s(results: dict, name: str) -> float:
    """Seconds of a run from pictures to answers, EventGPT's not counted."""
    found = results["totals"]["runs"][name]
    return results["totals"]["vision_s"] + found["prefill_s"] + decode_s(found)


def ratio(slow_s: float | None, fast_s: float) -> float | None:
    """How many times the speed; None where either time is unknown or too short to be told from a clock's noise."""
    return slow_s / fast_s if slow_s and slow_s > CLOCK_S and fast_s > CLOCK_S else None


def speed_ups(results: dict, name: str) -> dict:
    """Ratios of totals, None where unknown: decoding over our plain loop, over generate's, and end to end."""
    runs, generate = results["totals"]["runs"], results["totals"]["generate"]
    decoding, plain = decode_s(runs[name]), runs.get("none") if name != "none" else None
    return {"plain": ratio(plain and decode_s(plain), decoding),
            "generate": ratio(generate and generate["all_s"] - generate["first_token_s"], decoding),
            "whole": ratio(generate and generate["all_s"], whole_s(results, name))}


def accepted_share(found: dict) -> str:
    return percent(found["accepted"] / found["proposed"] if found["proposed"] else None)


def own_verdicts(results: dict) -> dict:
    """Of the chosen drafter's answers; without a drafter of generate's, which are held against the same loop."""
    sums, name = results["totals"], results["drafter"]
    return (sums["generate"] or {"verdicts": {}} if name == "none" else sums["runs"][name])["verdicts"]


def times(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}x"


def counted(verdicts: dict) -> str:
    """20 exact, 2 ties, 1 WRONG: what there is of each."""
    return ", ".join(f"{verdicts[key]} {key}{'s' * (key == 'tie' and verdicts[key] > 1)}"
                     for key in VERDICTS if verdicts.get(key))


def elsewhere(results: dict) -> dict:
    """Ties and WRONG among the answers of the others."""
    own = own_verdicts(results)
    rest = {key: results["totals"]["verdicts"].get(key, 0) - own.get(key, 0) for key in ("tie", "WRONG")}
    return {key: count for key, count in rest.items() if count}


def one_line(results: dict) -> str:
    """The answer for a log line, as far as it was measured."""
    found, speed = results["totals"]["runs"][results["drafter"]], speed_ups(results, results["drafter"])
    over = [f"{times(speed[key], 1)} over {key}" for key in ("plain", "generate") if speed[key]]
    parts = [f"{results['totals']['answers']} answers", counted(own_verdicts(results)), results["drafter"],
             f"tau {found['tau']:.2f}", f"decode {', '.join(over)}" if over else "",
             f"elsewhere {counted(elsewhere(results))}" if elsewhere(results) else "",
             f"failed {len(results['failed'])}" if results["failed"] else ""]
    return " | ".join(filter(None, parts))


# --------------------------------------------------------------------------------------------------- the lead
def exactness(verdicts: dict, whose: str = "plain decoding") -> str:
    """What the verdicts of one drafter come to, in a sentence."""
    number, ties, wrong = (verdicts.get(key, 0) for key in VERDICTS)
    number += ties + wrong
    if not ties and not wrong:
        return f"**All {number} answers are word for word what {whose} says.**"
    text = f"{verdicts.get('exact', 0)} of {number} answers are word for word what {whose} says. "
    if ties:
        text += (f"There {'is 1 tie' if ties == 1 else f'are {ties} ties'}: the target's two best words lay within "
                 "rounding of each other, and the answer went on with the other one. ")
    if wrong:
        text += f"**{wrong} of {number} {'is' if wrong == 1 else 'are'} WRONG: different by more than rounding.**"
    return text.strip()


def lead(results: dict) -> list[str]:
    """What a reader must know, in a few plain sentences."""
    name, sums, verify = results["drafter"], results["totals"], costs(results)
    found, speed = sums["runs"][name], speed_ups(results, name)
    first = f"**With {escape(name)} the target says {found['tau']:.2f} tokens a pass (tau), gamma "
    first += f"{escape(results['gamma'])}, over {sums['answers']} answers.** "
    first += (f"Of {found['proposed']} proposed tokens {found['accepted']} were accepted ({accepted_share(found)}). "
              if found["proposed"] else "Nothing was proposed. ")
    judged = own_verdicts(results)
    if judged and name != "none":
        first += exactness(judged)
    lines = [first.strip()]
    sides = [f"**{times(speed[key])}** the speed of {whose}" for key, whose in (
        ("plain", "our own loop without drafts"), ("generate", "transformers' generate")) if speed[key]]
    if sides:
        lines.append(f"Decoding goes at {' and '.join(sides)}"
                     + (f"; end to end, draft free, at **{times(speed['whole'])}** the speed of generate"
                        if speed["whole"] else "") + ". These are ratios of totals over the same answers.")
    if judged:
        if sums["generate"]:
            said = exactness(sums["generate"]["verdicts"], "generate")
            lines.append(f"Our own loop without drafts, beside transformers' generate: {said}")
        if others := elsewhere(results):
            lines.append(f"{'**' * ('WRONG' in others)}Among the others: {counted(others)}; see "
                         f"the table of differences.{'**' * ('WRONG' in others)}")
        lines.append(who_pays(results))
    elif results["config"].get("temperature"):
        lines.append(f"The answers were sampled at temperature {escape(results['config']['temperature'])}: they "
                     "differ by chance and can't be compared word for word. Greedy ones can: leave out "
                     "--temperature and run again with --compare.")
    else:
        lines.append("Whether these are the words of plain decoding, and how much sooner they came, was not "
                     f"measured: run again with --compare. Known is that {sums['answers']} answers took "
                     f"{whole_s(results, name):.2f} s draft free, {decode_s(found):.2f} s of it decoding.")
    if results["quantization"] == "4bit":
        lines.append(f"> **Warning:** verifying several tokens is slow with bitsandbytes 4-bit: 9 tokens take "
                     f"{verify[9] / verify[1]:.2f} times as long as one here. Try --quantization none if the weights "
                     "fit.")
    if results["failed"]:
        lines.append(f"> **Warning:** clips that could not be decoded: {len(results['failed'])}; see Failed clips.")
    return [part for line in lines for part in (line, "")]


def costs(results: dict) -> dict[int, float]:
    """Milliseconds of a target pass over k tokens."""
    return {int(k): cost for k, cost in results["costs_ms"]["verify"].items()}


def who_pays(results: dict) -> str:
    """The drafter with the least total decode time and no WRONG answer, if it beats decoding plainly."""
    runs, verify = results["totals"]["runs"], costs(results)
    drafters = {name: decode_s(found) for name, found in runs.items()
                if name != "none" and not found["verdicts"].get("WRONG")}
    best, plain_s = min(drafters, key=drafters.get, default=None), decode_s(runs["none"]) if "none" in runs else None
    speed = ratio(plain_s, drafters[best]) if best else None
    if speed is None:
        return "Which drafter pays on this machine can't be told from these answers."
    if speed > 1:
        chosen = "" if best == results["drafter"] else f" (this run chose {escape(results['drafter'])})"
        return (f"**On this machine {escape(best)} pays most:** decoding everything takes it {drafters[best]:.2f} s, "
                f"decoding plainly {plain_s:.2f} s, {times(speed)} the speed{chosen}.")
    return (f"**On this machine no drafter pays:** the best, {escape(best)}, takes {drafters[best]:.2f} s to decode "
            f"everything, decoding plainly {plain_s:.2f} s. A proposal of it costs "
            f"{results['costs_ms']['proposal'][best]:.2f} ms and one token of plain decoding {verify[1]:.2f} ms; "
            f"verifying 9 tokens costs {verify[9] / verify[1]:.2f} times as much as one, and a pass brings "
            f"{runs[best]['tau']:.2f} tokens.")


# --------------------------------------------------------------------------------------------------- sections
def drafter_section(results: dict, pictures: list[str]) -> list[str]:
    rows = []
    for name, found in results["totals"]["runs"].items():
        speed, verdicts = speed_ups(results, name), found["verdicts"]
        judged = " / ".join(str(verdicts.get(key, 0)) for key in VERDICTS) if verdicts else "-"
        shown = f"**{escape(name)}**" if name == results["drafter"] else escape(name)
        rows.append([shown, f"{found['tau']:.2f}", found["passes"], found["proposed"],
                     accepted_share(found), f"{found['draft_s']:.2f}", f"{found['verify_s']:.2f}",
                     *(times(speed[key]) for key in ("plain", "generate", "whole")),
                     "yardstick" if name == "none" else judged])
    header = ["drafter", "tau", "passes", "proposed", "accepted", "draft s", "verify s", "decoding over plain",
              "decoding over generate", "end to end over generate", "exact / tie / WRONG"]
    return ["## Drafters", "", *table(header, rows),
            "tau: tokens for each pass of the target, the prefill included; proposals made before it are verified in "
            "it. Decoding is drafting and verifying after the prefill; none is our own loop without drafts, and "
            "generate's decoding is its whole time less that of its first token. End to end is draft free.", "",
            *shown_picture("drafter_speed_up.png", pictures)]


def accounting_section(results: dict) -> list[str]:
    """The chosen drafter end to end, with EventGPT's time left out, alongside, or added."""
    name, sums = results["drafter"], results["totals"]
    whole, plain = whole_s(results, name), whole_s(results, "none") if "none" in sums["runs"] else None
    all_s, together = sums["generate"] and sums["generate"]["all_s"], sums.get("parallel")

    def row(label: str, number: int, taken_s: float, generate_s: float | None, plain_s: float | None) -> list:
        return [label, number, f"{taken_s:.2f}", f"{taken_s / number:.3f}", times(ratio(generate_s, taken_s)),
                times(ratio(plain_s, taken_s))]

    parallel = ["draft in parallel", *["not measured: run with --parallel"] * 5]
    if together:
        # Only the first clips and the first question: generate's time is that of the same answers.
        same = [answer.get("generate") for answer in results["answers"] if answer["question_idx"] == 0]
        same = same[:together["clips"]]
        known = len(same) == together["clips"] and all(same)
        parallel = row("draft in parallel", together["clips"], together["all_s"],
                       sum(found["all_s"] for found in same) if known else None, together["plain_all_s"])
    rows = [row("draft free", sums["answers"], whole, all_s, plain), parallel,
            row("draft charged", sums["answers"], whole + sums["eventgpt_s"], all_s, plain)]
    where = f" (EventGPT on {escape(together['draft_device'])})" if together and "draft_device" in together else ""
    unread = (f" {escape(name)} reads nothing of EventGPT's answer: it needs no draft, and draft free is its true "
              "account."
              if name not in results.get("reads_draft", (name,)) else "")
    return [f"## Three accountings: {escape(name)}, end to end", "",
            *table(["EventGPT's time", "answers", "s in all", "s an answer", "over generate",
                    "over our loop without drafts"], rows),
            "Draft free: EventGPT has answered anyway, for its own sake, and its answer is at hand; counted are "
            "vision, prefill, drafting and verifying. Draft in parallel: EventGPT drafts for the next clip while the "
            f"target decodes this one{where}, and one clock measures both, over the first clips; beside it stands "
            "the target alone without drafts, timed alike; it is never reckoned as the larger of two times. Draft "
            "charged: EventGPT is run first, for nothing but the draft, and all its time is added. "
            f"Each ratio is over the same answers.{unread}", ""]


def stages(results: dict) -> dict[str, dict[str, float]]:
    """Seconds in all, by way of decoding and by stage; generate's vision and prefill can't be told apart."""
    sums, name, ways = results["totals"], results["drafter"], {}
    if sums["generate"]:
        first_s = sums["generate"]["first_token_s"]
        ways["transformers' generate"] = {"vision and prefill": first_s,
                                          "decoding, verifying": max(0.0, sums["generate"]["all_s"] - first_s)}
    for run_name, way in {"none": "our loop, no drafts", name: f"{name}, draft free"}.items():
        if run_name in sums["runs"]:
            found = sums["runs"][run_name]
            ways[way] = {"vision and prompt": sums["vision_s"], "prefill": found["prefill_s"],
                         "drafting": found["draft_s"], "decoding, verifying": found["verify_s"]}
    return ways | {f"{name}, draft charged": {"EventGPT": sums["eventgpt_s"], **ways[f"{name}, draft free"]}}


def stage_section(results: dict, pictures: list[str]) -> list[str]:
    """Where the time goes, per answer and in total."""
    ways, number = stages(results), results["totals"]["answers"]

    def cell(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1000 * seconds / number:.1f} ({seconds:.2f})"

    rows = [[stage, *(cell(found.get(stage)) for found in ways.values())] for stage in STAGE_COLORS
            if any(stage in found for found in ways.values())]
    rows.append(["**all**", *(cell(sum(found.values())) for found in ways.values())])
    return ["## Stages", "", *table(["ms an answer (s in all)", *map(escape, ways)], rows),
            "generate's vision and prefill are timed as an answer of one token.", "",
            *shown_picture("stage_times.png", pictures)]


def cost_section(results: dict) -> list[str]:
    """What each part costs here, and from which tau on a round of each gamma pays."""
    found, verify, name = results["costs_ms"], costs(results), results["drafter"]
    tau = (results.get("simulated_tau") or {}).get(SIMULATED.get(name), {})
    eventgpt = found["eventgpt"]
    parts = {"vision and prompt": found["vision"], "prefill": found["prefill"], "one token": verify[1],
             **{f"a proposal of {escape(drafter)}": cost for drafter, cost in found["proposal"].items()},
             **({"a step of the adapter": found["adapter_step"]} if "adapter_step" in found else {}),
             "EventGPT: vision and prompt": eventgpt["vision"], "EventGPT: prefill": eventgpt["prefill"],
             "EventGPT: one token": eventgpt["verify"]["1"]}
    lines = ["## Costs", "", *table(["part", "ms"], [[part, f"{cost:.3f}"] for part, cost in parts.items()]),
             "Medians, measured on this machine in this run, on the first clip. verify(k) is one pass of the target "
             "over k tokens.", "", f"### Break-even: {escape(name)}", ""]
    rows, expected, run = [], {}, results["totals"]["runs"][name]
    proposal_ms, how = found["proposal"][name], "as measured above"
    if results["gamma"] == "auto" and run["proposed"]:         # there the adapter is asked only where it pays
        proposal_ms, how = 1000 * run["draft_s"] / run["proposed"], "as this run drafted, on average"
    for gamma in range(1, max(verify)):
        round_ms = verify[gamma + 1] + gamma * proposal_ms
        even, simulated = round_ms / verify[1], tau.get(str(gamma))
        if simulated:
            expected[gamma] = simulated / even
        rows.append([gamma, f"{verify[gamma + 1]:.2f}", f"{verify[gamma + 1] / verify[1]:.2f}",
                     f"{gamma * proposal_ms:.2f}", f"{round_ms:.2f}", f"{even:.2f}",
                     f"{simulated:.2f}" if simulated else "-", times(expected.get(gamma))])
    lines += table(["gamma", "verify(gamma + 1) ms", "over verify(1)", "proposals ms", "a round ms",
                    "break-even tau", "simulated tau", "expected speed-up"], rows)
    lines += [f"A round costs verify(gamma + 1) + gamma proposals of {proposal_ms:.3f} ms, {how}; break-even tau "
              "is that over verify(1): the tokens that a round must bring to be as fast as plain decoding. Simulated "
              "tau comes from the task's own test "
              f"pairs; live tau of this run, gamma {escape(results['gamma'])}, is "
              f"{results['totals']['runs'][name]['tau']:.2f}.", ""]
    if not expected:
        return [*lines, f"The task holds no simulated tau of {escape(name)}.", ""]
    best = max(expected, key=expected.get)
    pays = "" if expected[best] > 1 else " No gamma is expected to pay."
    return [*lines, f"**Best gamma for {escape(name)}: {best}**, expected {times(expected[best])} the speed of plain "
            f"decoding.{pays}", ""]


def verdict_section(results: dict) -> list[str]:
    """How a verdict is reached, and every difference."""
    if not own_verdicts(results):
        return []
    found = [(answer, name, judged) for answer in results["answers"]
             for name, judged in (*answer["runs"].items(), ("generate", answer.get("generate") or {}))
             if judged.get("verdict") in ("tie", "WRONG")]
    found.sort(key=lambda row: row[2]["verdict"] != "WRONG")
    rows = [[escape(f"{answer['sequence']} {answer['clip']}"), answer["question_idx"], escape(name),
             judged["position"], "-" if judged["gap"] is None else f"{judged['gap']:.3g}",
             "**WRONG**" if judged["verdict"] == "WRONG" else "tie"] for answer, name, judged in found[:MOST_ROWS]]
    lines = ["## Verdicts", "",
             "exact: the same tokens as our own loop without drafts (generate is held against that loop too). "
             "Otherwise the target is asked again: tie if at the first difference both tokens, and from there on "
             f"each of ours, lie no further below its best logit than the noise, {results['noise']:.3g} here; else "
             "WRONG. The noise is 4 times the largest difference of a logit between four ways to reckon the same "
             "tokens, one by one, together, in the prefill, and by transformers' own forward pass, measured in this "
             "run. position: how many tokens are the same; gap: between the target's two best logits there.", ""]
    if not rows:
        return [*lines, "There are no differences.", ""]
    lines += table(["clip", "question", "by", "position", "gap of logits", "verdict"], rows)
    return [*lines, *([f"{len(found) - MOST_ROWS} more are in decode.json.", ""] if len(found) > MOST_ROWS else [])]


def lengths(results: dict) -> dict[int, int]:
    """Passes of the chosen drafter by accepted proposals, 0 to the most."""
    found = results["totals"]["runs"][results["drafter"]]["accepted_lengths"]
    return {n: found.get(str(n), 0) for n in range(max(map(int, found)) + 1)}


def length_section(results: dict, pictures: list[str]) -> list[str]:
    """The histogram as text: a bar of 40 characters is 100 %."""
    found = lengths(results)
    passes = sum(found.values())
    bars = [f"    {n:>8}  {count:>6}  {count / passes:6.1%}  {'#' * round(40 * count / passes)}".rstrip()
            for n, count in found.items()]
    return [f"## Accepted proposals a pass: {escape(results['drafter'])}", "", "    accepted  passes   share", *bars,
            "", *shown_picture("accepted_lengths.png", pictures)]


def failed_section(results: dict) -> list[str]:
    failed = results["failed"]
    if not failed:
        return []
    rows = [[escape(f"{clip['sequence']} {clip['clip']}"), escape(clip["sample_id"]), escape(clip["model"] or "-"),
             escape(clip["reason"])] for clip in failed[:MOST_ROWS]]
    more = [f"{len(failed) - MOST_ROWS} more are in decode.json.", ""] if len(failed) > MOST_ROWS else []
    return ["## Failed clips", "", *table(["clip", "sample", "model", "reason"], rows), *more]


def settings_section(results: dict) -> list[str]:
    """Settings, versions, and the command that made this."""
    made, target = results["provenance"], results["target"]
    facts = {"date": results["date"], "device": results["device"], "dtype": results["dtype"],
             "quantization": results["quantization"], "target": f"{target['name']} ({target['revision']})",
             "memory's share in a hybrid": results["memory_share"], "git commit": made["git_commit"],
             **made["versions"]}
    settings = [[escape(f"--{name}"), escape(value)] for name, value in results["config"].items()]
    return ["## Settings", "", *table(["setting", "value"], settings),
            "## Provenance", "", *table(["", ""], [map(escape, item) for item in facts.items()]),
            "## Again", "", f"    {' '.join(plain(shlex.join(['python', *made['argv']])).split())}", "",
            "This page and the pictures, from decode.json alone:", "",
            "    python decode_report.py DECODE_FOLDER", ""]


def shown_picture(name: str, pictures: list[str]) -> list[str]:
    return [f"![{name}]({name})", ""] if name in pictures else []


def markdown(results: dict, pictures: list[str]) -> str:
    """DECODE.md of one decoding."""
    return "\n".join([f"# Decoding with {escape(results['task'])}", "", *lead(results),
                      *drafter_section(results, pictures), *accounting_section(results),
                      *stage_section(results, pictures), *cost_section(results), *verdict_section(results),
                      *length_section(results, pictures), *failed_section(results), *settings_section(results)])


# --------------------------------------------------------------------------------------------------- pictures
def draw_lengths(axes, results: dict) -> None:
    found, run_totals = lengths(results), results["totals"]["runs"][results["drafter"]]
    bars = axes.bar(list(found), list(found.values()), color=BLUE)
    axes.bar_label(bars, fontsize=8, padding=1)
    axes.set(title=f"{results['drafter']}: {run_totals['passes']} passes, tau {run_totals['tau']:.2f}",
             xlabel="accepted proposals (tokens)", ylabel="passes of the target", xticks=list(found))
    axes.margins(y=0.1)


def draw_stages(axes, results: dict) -> None:
    ways, number = stages(results), results["totals"]["answers"]
    places, left = list(range(len(ways))), [0.0] * len(ways)
    for stage, color in STAGE_COLORS.items():
        widths = [found.get(stage, 0.0) / number for found in ways.values()]
        if any(widths):
            axes.barh(places, widths, 0.62, left, color=color, label=stage, edgecolor="white", linewidth=0.5)
            left = [start + width for start, width in zip(left, widths)]
    for place, end in zip(places, left):
        axes.annotate(f"{end:.3f} s", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set(title="Where the time goes", xlabel="seconds an answer", yticks=places,
             yticklabels=[way.replace(", ", ",\n").replace("' ", "'\n") for way in ways])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=3, frameon=False)


def draw_speed_ups(axes, results: dict) -> None:
    found = {name: speed_ups(results, name)["plain"] or 0.0 for name in results["totals"]["runs"] if name != "none"}
    names = sorted(found, key=found.get, reverse=True)
    bars = axes.bar(names, [found[name] for name in names], color=BLUE, width=0.62)
    axes.bar_label(bars, [times(found[name]) for name in names], fontsize=9, padding=3,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8}, zorder=4)
    axes.axhline(1, color=VERMILION, linewidth=1.5, linestyle="--", label="our own loop without drafts")
    axes.set(title="Decoding, drafting included", xlabel="drafter", ylabel="speed-up over plain decoding (times)")
    axes.margins(y=0.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def draw(folder: Path, results: dict) -> list[str]:
    """Draw the pictures into the folder and return their names; drafters are compared only where all of them ran."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(zip(PICTURES, (draw_lengths, draw_stages, draw_speed_ups)))
    if not {"none"} < set(results["totals"]["runs"]):
        panels.pop()
    for name, panel in panels:
        with pyplot.rc_context({"text.parse_math": False}):                        # a $ in a name is just that
            figure, axes = pyplot.subplots(figsize=(7.4, 4.4), layout="constrained")
            panel(axes, results)
            axes.grid(alpha=0.25, axis="x" if panel is draw_stages else "y")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            figure.suptitle(f"{plain(results['task'])} ({results['date']})", fontsize=11)
            write_whole(folder / name, lambda temporary, figure=figure: figure.savefig(temporary, dpi=160))
            pyplot.close(figure)
    return [name for name, _ in panels]


def write_decode_report(folder: Path, plots: bool = True) -> None:
    """Make the pictures and then DECODE.md of a folder, from its decode.json alone."""
    results = read_decoding(folder)
    text = markdown(results, draw(folder, results) if plots else [])
    write_text(folder / "DECODE.md", text)
    log(f"decode | {folder / 'DECODE.md'}")
