"""The sections of DECODE.md about time: accountings, stages, costs and break-even."""

from reports.blocks import escape, number, ratio, table, times
from reports.decode_figures import STAGES, has_draft_model, pass_ms, stages, whole_s

# The name of a drafter in results.json where it differs from the one in decode.json.
SIMULATED_NAMES = {"copy": "copy of the draft"}


def accounting_section(results: dict) -> list[str]:
    """The chosen drafter end to end, with EventGPT's time left out, run in parallel, or added."""
    name, sums = results["drafter"], results["totals"]
    whole = whole_s(results, name)
    plain = whole_s(results, "none") if "none" in sums["runs"] else None
    all_s, together = sums["generate"] and sums["generate"]["all_s"], sums.get("parallel")

    def row(label: str, answers: int, seconds: float, generate_s: float | None,
            plain_s: float | None) -> list:
        return [
            label, answers, f"{seconds:.2f}", f"{seconds / answers:.3f}",
            times(ratio(generate_s, seconds)),
            times(ratio(plain_s, seconds))
        ]

    header = ["EventGPT's time", "answers", "total s", "s per answer", "over generate",
              "over our loop without drafts"]
    if not has_draft_model(results):
        return [f"## End to end: {escape(name)}", "",
                *table(header, [row("no draft model ran", sums["answers"], whole, all_s, plain)]),
                "Vision, prefill, drafting and verifying are counted. Each ratio is over the same "
                "answers.", ""]
    parallel, where = ["draft in parallel", *["not measured: run with --parallel"] * 5], ""
    if together:
        # Only the first clips and the first question were timed: generate's time is that of the
        # same answers.
        same = [
            answer.get("generate") for answer in results["answers"] if answer["question_idx"] == 0
        ]
        same = same[:together["clips"]]
        known = len(same) == together["clips"] and all(same)
        generate_s = sum(run["all_s"] for run in same) if known else None
        parallel = row("draft in parallel", together["clips"], together["all_s"], generate_s,
                       together["plain_all_s"])
        where = f" (EventGPT on {escape(together['draft_device'])})" if "draft_device" in together else ""
    rows = [row("draft free", sums["answers"], whole, all_s, plain), parallel,
            row("draft charged", sums["answers"], whole + sums["eventgpt_s"], all_s, plain)]
    unread = "" if name in results.get("reads_draft", (name,)) else (
        f" {escape(name)} reads nothing of EventGPT's answer: it needs no draft, and draft free is "
        "its true account.")
    return [f"## Three accountings: {escape(name)}, end to end", "",
            *table(header, rows),
            "Draft free: EventGPT has answered anyway, for its own sake, and its answer is "
            "available; vision, prefill, drafting and verifying are counted. Draft in parallel: "
            f"EventGPT drafts for the next clip while the target decodes this one{where}; one "
            "clock measures both, over the first clips, and the target alone without drafts is "
            "timed the same way. It is never computed as the larger of two times. Draft charged: "
            "EventGPT runs first, for nothing but the draft, and all its time is added. Each ratio "
            "is over the same "
            f"answers.{unread}", ""]


def stage_section(results: dict) -> list[str]:
    """Where the time goes, per answer and in total."""
    ways, answers = stages(results), results["totals"]["answers"]

    def cell(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1000 * seconds / answers:.1f} ({seconds:.2f})"

    rows = [[stage, *(cell(seconds.get(stage)) for seconds in ways.values())] for stage in STAGES
            if any(stage in seconds for seconds in ways.values())]
    rows.append(["**all**", *(cell(sum(seconds.values())) for seconds in ways.values())])
    return ["## Stages", "", *table(["ms per answer (total s)", *map(escape, ways)], rows),
            "generate's vision and prefill are timed as an answer of one token.", ""]


def cost_section(results: dict) -> list[str]:
    """What each part costs here, and from which tau on a round of each gamma pays."""
    costs, verify_ms = results["costs_ms"], pass_ms(results)
    parts = {
        "vision and prompt": costs["vision"], "prefill": costs["prefill"],
        "one token": verify_ms.get(1), **{
            f"a proposal of {escape(drafter)}": cost for drafter, cost in costs["proposal"].items()
        }, **({"a step of the adapter": costs["adapter_step"]} if "adapter_step" in costs else {})
    }
    if costs.get("eventgpt"):
        parts |= {"EventGPT: vision and prompt": costs["eventgpt"]["vision"],
                  "EventGPT: prefill": costs["eventgpt"]["prefill"],
                  "EventGPT: one token": costs["eventgpt"]["verify"]["1"]}
    return [
        "## Costs", "", *table(["part", "ms"], [[part, number(cost, 3)]
                                                for part, cost in parts.items()]),
        "Medians, measured on this machine in this run, on the first clip. verify(k) is one pass "
        "of the target "
        "over k tokens.", "", *break_even(results)
    ]


def break_even(results: dict) -> list[str]:
    """For each gamma: what a round costs, and the tokens per round that make it as fast as plain
    decoding.
    """
    costs, verify_ms, name = results["costs_ms"], pass_ms(results), results["drafter"]
    simulated_taus = results.get("simulated_tau") or {}
    simulated_taus = simulated_taus.get(name) or simulated_taus.get(SIMULATED_NAMES.get(
        name, name)) or {}
    rows, speed, run = [], {}, results["totals"]["runs"][name]
    proposal_ms, how = costs["proposal"][name], "as measured above"
    # then the adapter is asked only where it pays
    if results["gamma"] == "auto" and run["proposed"]:
        proposal_ms, how = 1000 * run["draft_s"] / run["proposed"], "the average of this run"
    if proposal_ms is None or 1 not in verify_ms:
        return [
            f"### Break-even: {escape(name)}", "", "Not all costs that it needs were measured.", ""
        ]
    for gamma in (size - 1 for size in verify_ms if size > 1):
        round_ms = verify_ms[gamma + 1] + gamma * proposal_ms
        even, simulated = round_ms / verify_ms[1], simulated_taus.get(str(gamma))
        if simulated:
            speed[gamma] = simulated / even
        rows.append([
            gamma, f"{verify_ms[gamma + 1]:.2f}", f"{verify_ms[gamma + 1] / verify_ms[1]:.2f}",
            f"{gamma * proposal_ms:.2f}", f"{round_ms:.2f}", f"{even:.2f}",
            number(simulated),
            times(speed.get(gamma))
        ])
    header = [
        "gamma", "verify(gamma + 1) ms", "over verify(1)", "proposals ms", "a round ms",
        "break-even tau", "simulated tau", "expected speed-up"
    ]
    lines = [f"### Break-even: {escape(name)}", "", *table(header, rows),
             f"A round costs verify(gamma + 1) plus gamma proposals of {proposal_ms:.3f} ms, "
             f"{how}. Break-even tau is that cost over verify(1): the tokens per round from which "
             "speculative decoding is faster than plain decoding. Simulated tau comes from the "
             "task's own test pairs; the live tau of this run, gamma "
             f"{escape(results['gamma'])}, is {number(run['tau'])}.", ""]
    if not speed:
        return [*lines, f"The task holds no simulated tau of {escape(name)}.", ""]
    best = max(speed, key=speed.__getitem__)
    pays = "" if speed[best] > 1 else " No gamma is expected to pay."
    return [
        *lines,
        f"**Best gamma for {escape(name)}: {best}**, expected {times(speed[best])} the speed of "
        "plain "
        f"decoding.{pays}", ""
    ]
