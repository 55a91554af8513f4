"""The figures of `python benchmark.py decode`: sums, ratios to peers, wanted numbers, and the table
as log lines.
"""

from __future__ import annotations

import math
import statistics

import numpy as np

from base import log
from decoding.limits import AUTO, MAX_GAMMA, PLAIN
from decoding.task import Task
from drafting.table import LIVE, results_names

TREE = ", tree"                      # ends the name of a drafter that proposes trees


def totals(rows: list[dict]) -> dict:
    """Sums over these answers, and how the time of a token spreads over them."""
    sums = {
        key: sum(row.get(key, 0) for row in rows)
        for key in ("tokens", "passes", "decode_s", "end_s")
    }
    tokens, passes = sums["tokens"], sums["passes"]
    ms = sorted(1000 * row["decode_s"] / row["tokens"] for row in rows)
    return {
        "answers": len(rows), "tokens": tokens, "decode_s": sums["decode_s"],
        "end_s": sums["end_s"], "ms_per_token": 1000 * sums["decode_s"] / tokens,
        "end_s_per_answer": sums["end_s"] / len(rows),
        "ms_per_token_by_answer": {"min": ms[0], "median": statistics.median(ms), "max": ms[-1]},
        "passes": passes or None, "tau": tokens / passes if passes else None
    }


def summarise(results: dict, task: Task, hits: dict[str, np.ndarray], lengths: np.ndarray) -> None:
    """Add to each run its totals, on the part too, its simulated tau, and how much faster than its
    peers it is.

    hits: of the simulated drafters, (N, T) bool; lengths: (N,) tokens of the answers.
    """
    from acceptance.simulation import simulate

    runs, part = results["runs"], results["peer_answers"]
    gamma = MAX_GAMMA if results["gamma"] == AUTO else int(results["gamma"])
    for name, run in runs.items():
        rows = len(run["rows"])
        run |= {**totals(run["rows"]), "part": totals(run["rows"][:part])}
        if is_ours(name):
            run["reads_eventgpt"] = LIVE[name.removesuffix(TREE)].reads_draft(task.conditioning)
            # with auto nothing stops it: more than can be reached
            run["simulated_gamma"] = gamma
            run["tau_simulated"] = 1.0 if name == PLAIN else None
            if name in hits:
                run["tau_simulated"] = simulate(hits[name][:rows], lengths[:rows], gamma)["tau"]
            run["tau_of_training"] = task.simulated.get(results_names().get(name, ""),
                                                        {}).get(str(gamma))
    for name in filter(is_ours, runs):
        runs[name]["times_faster_than"] = times_faster(runs, name)


def is_ours(name: str) -> bool:
    """Whether a run is one of our drafters, with chains or with trees."""
    return name.removesuffix(TREE) in LIVE


def times_faster(runs: dict, name: str) -> dict:
    """{peer: {"decode", "end"}} on the part that all ran, beside its own chains on all answers; None
    where it can't be told.
    """
    theirs, ours = [peer for peer in runs if not is_ours(peer)], runs[name]["part"]
    faster: dict[str, dict] = {}
    for peer in [*theirs, PLAIN]:
        # more than the prefills' tokens
        decoded = runs[peer]["part"]["tokens"] > runs[peer]["part"]["answers"]
        faster[peer] = {
            "decode": ratio(runs[peer]["part"]["decode_s"], ours["decode_s"]) if decoded else None,
            "end": ratio(runs[peer]["part"]["end_s"], ours["end_s"])
        }
    if name.endswith(TREE):              # both ran on all answers
        chain = runs[name.removesuffix(TREE)]
        faster[name.removesuffix(TREE)] = {
            "decode": ratio(chain["ms_per_token"], runs[name]["ms_per_token"]),
            "end": ratio(chain["end_s"], runs[name]["end_s"])
        }
    faster["fastest generate"] = {
        key: smallest(faster[peer][key] for peer in theirs) for key in ("decode", "end")
    }
    return faster


def ratio(slow: float, fast: float) -> float | None:
    return slow / fast if fast > 0 else None


def smallest(values) -> float | None:
    """The smallest of the values that are known."""
    return min((value for value in values if value is not None), default=None)


def tree_rows(runs: dict, verify: dict) -> list[tuple]:
    """What trees of the hybrid are wanted to reach; nothing with --tree 0."""
    tree = runs.get(f"hybrid{TREE}")
    if tree is None:
        return []
    faster = tree["times_faster_than"]
    return [("decode, hybrid with trees: times faster than its chains",
             faster["hybrid"]["decode"], ">=", 1.35),
            ("decode, hybrid with trees: times faster than our loop without drafts",
             faster[PLAIN]["decode"], ">=", 6),
            ("decode, hybrid with trees: times faster than generate",
             faster["generate"]["decode"], ">=", 30),
            ("verify(33) over verify(9)", verify[33] / verify[9], "<=", 1.03),
            ("verify(65) over verify(9)", verify[65] / verify[9], "<=", 1.07)]


def wanted(results: dict) -> list[dict]:
    """The project's numbers for 7b on one H200, with what was measured here; None: not to be had.
    """
    runs, costs, faster = results["runs"], results["costs_ms"], results["runs"]["hybrid"][
        "times_faster_than"]
    free = max((name for name in LIVE if not runs[name]["reads_eventgpt"]),
               key=lambda name: runs[name]["times_faster_than"]["generate"]["end"] or 0)
    static, ours = (results["memory_mib"][name]["peak"]
                    for name in ("generate, static cache", "ours"))
    rows = [("decode, hybrid: times faster than generate", faster["generate"]["decode"], ">=", 8),
            ("decode, hybrid: times faster than generate's fastest mode",
             faster["fastest generate"]["decode"], ">=", 2),
            ("decode, hybrid: times faster than our loop without drafts", faster["none"]["decode"],
             ">=", 2.5),
            (f"end to end without EventGPT, {free}: times faster than generate",
             runs[free]["times_faster_than"]["generate"]["end"], ">=", 4),
            ("verify(9) over one step", costs["verify"][9] / costs["verify"][1], "<=", 1.25),
            ("tau, hybrid", runs["hybrid"]["tau"], ">=", 4.8),
            *tree_rows(runs, costs["verify"]),
            ("adapter step, ms", costs["adapter_step"], "<=", 0.2),
            ("8 proposals of the adapter, ms", costs["propose_8"]["adapter"], "<=", 1.6),
            ("peak memory over generate's with a static cache", ours and static
             and ours / static, "<=", 1.05)]
    return [{"what": what, "measured": value, "wanted": f"{sign} {bound}"}
            for what, value, sign, bound in rows]


def figure(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def show(results: dict) -> None:
    """The table, as log lines."""
    for line in results["what"]:
        log(f"benchmark | {line}")
    for name, run in results["runs"].items():
        spread = run["ms_per_token_by_answer"]
        log(" | ".join([f"table | {name:23}", f"{run['answers']:4} answers",
                        f"decode {run['ms_per_token']:.3f} ms a token (by answer "
                        f"{spread['min']:.3f} {spread['median']:.3f} {spread['max']:.3f})",
                        f"end to end {run['end_s_per_answer']:.4f} s an "
                        "answer", *facts_of(name, run, results)]))
    costs = results["costs_ms"]
    log("table | ms of a pass by tokens | " +
        " ".join(f"{size}: {figure(cost)}" for size, cost in costs["verify"].items()))
    log(f"table | ms | vision {figure(costs['vision'])} | prefill {figure(costs['prefill'])} | "
        f"adapter step {figure(costs['adapter_step'])} | 8 proposals: " +
        ", ".join(f"{name} {figure(cost)}" for name, cost in costs["propose_8"].items()))
    peaks = {name: memory["peak"] for name, memory in results["memory_mib"].items()}
    log("table | peak MiB | " + "; ".join(f"{name} {figure(peak)}" for name, peak in peaks.items()))
    log("table | limits | " + ", ".join(f"{name} {figure(value)}"
                                        for name, value in results["limits"].items()))


def facts_of(name: str, run: dict, results: dict) -> list[str]:
    """What the table says of one run beside its times."""
    if not is_ours(name):
        return (["compiled"] if run["compiled"] else ["not compiled"]) if "static" in name else []
    tau, simulated, faster = run["tau"], run["tau_simulated"], run["times_faster_than"]
    if results["gamma"] != AUTO and simulated and not math.isclose(tau, simulated):
        log(f"benchmark | WARNING | {name}: tau live {tau} is not the simulated {simulated}")
    if name.endswith(TREE):
        chain = faster[name.removesuffix(TREE)]
        return [f"tau {figure(tau)}, on {results['peer_answers']} answers, times faster than "
                f"generate {figure(faster['generate']['decode'], 2)} (end to end "
                f"{figure(faster['generate']['end'], 2)}), its fastest mode "
                f"{figure(faster['fastest generate']['decode'], 2)}, no drafts "
                f"{figure(faster[PLAIN]['decode'], 2)}, its chain {figure(chain['decode'], 2)}"]
    facts = [
        f"tau {figure(tau)}, simulated at gamma {run['simulated_gamma']} {figure(simulated)}, in "
        f"results.json {figure(run['tau_of_training'])}",
        f"on {results['peer_answers']} answers, times faster than generate "
        f"{figure(faster['generate']['decode'], 2)} (end to end "
        f"{figure(faster['generate']['end'], 2)}), its "
        f"fastest mode {figure(faster['fastest generate']['decode'], 2)}, no drafts "
        f"{figure(faster[PLAIN]['decode'], 2)}"
    ]
    return facts if run["reads_eventgpt"] else [*facts, "needs no EventGPT"]


def one_line(results: dict) -> str:
    hybrid = results["runs"]["hybrid"]
    return (f"hybrid {hybrid['ms_per_token']:.3f} ms a token, tau {hybrid['tau']:.2f}, "
            f"{figure(hybrid['times_faster_than']['generate']['decode'], 2)} times faster than "
            "generate")
