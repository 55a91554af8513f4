"""What decode.json says of a decoding: totals, speed-ups, verdicts and stage times.

Every speed-up is a ratio of totals over the same answers.
"""

import collections
from pathlib import Path

from base import UserError
from machine.files import check_format, read_json
from reports.blocks import number, percent, ratio, times
from reports.shapes import FIGURE, NUMBER, TEXT, check_shape, optional

# of decode.json; 2: with the proposals of each pass and the words of tokens; 0: without a number
FORMAT = 2
REDO = "decode again"          # what a user can do about a damaged decode.json
VERDICTS = ("exact", "tie", "WRONG")
DRAFT_MODEL = "eventgpt"       # its name among the models

RUN = {
    "tokens": int, "passes": int, "tau": FIGURE, "proposed": int, "accepted": int,
    "accepted_lengths": {str: int}, "draft_s": NUMBER, "prefill_s": NUMBER, "verify_s": NUMBER,
    "verdicts": dict
}
ANSWER = {"sequence": TEXT, "clip": TEXT, "question_idx": int, "runs": dict}
# Of the chosen drafter: what marks the words on the page.
MARKED = {"proposed": [int], "accepted": [int], "verdict": optional(str)}
CHANCES = [optional((int, float, bool))]
PASS = {"tokens": [int], "parents": optional([int]), "by": optional(dict)}
RECORDED = {"tokens": [int], "query": TEXT, "draft_text": TEXT, "passes": optional([PASS])}
GENERATE = {"tokens": int, "all_s": NUMBER, "first_token_s": NUMBER, "verdicts": dict}
DECODING = {
    "task": TEXT, "date": TEXT, "config": dict, "drafter": str, "gamma": TEXT, "memory_share": TEXT,
    "dtype": TEXT, "quantization": TEXT, "device": TEXT, "noise": FIGURE, "failed": list,
    "target": {"name": TEXT, "revision": TEXT}, "answers": [ANSWER], "costs_ms": {
        "vision": FIGURE, "prefill": FIGURE, "verify": {str: FIGURE}, "proposal": dict
    }, "totals": {
        "answers": int, "runs": {str: RUN}, "verdicts": dict, "vision_s": NUMBER,
        "eventgpt_s": NUMBER, "generate": optional(GENERATE)
    }, "provenance": {"argv": [str], "git_commit": TEXT, "versions": dict}
}
FAILED = {"sequence": TEXT, "clip": TEXT, "sample_id": TEXT, "model": TEXT, "reason": TEXT}
MOST_ACCEPTED = 1000           # proposals of one pass; a damaged file could name any number
STAGES = ("EventGPT", "vision and prefill", "vision and prompt", "prefill", "drafting",
          "decoding, verifying")


def totals(answers: list[dict]) -> dict:
    """Sums over all answers, for each drafter that ran and for transformers' generate: seconds,
    tokens, verdicts.
    """
    runs = {}
    for name in answers[0]["runs"]:
        rows = [answer["runs"][name] for answer in answers]
        proposed = sum(sum(row["proposed"]) for row in rows)
        accepted = sum(sum(row["accepted"]) for row in rows)
        passes = sum(len(row["accepted"]) for row in rows)
        tokens = sum(row["tokens"] for row in rows)
        lengths = collections.Counter(length for row in rows for length in row["accepted"])
        runs[name] = {
            "tokens": tokens, "passes": passes, "tau": tokens / passes, "proposed": proposed,
            "accepted": accepted, "accepted_lengths": dict(sorted(lengths.items())), **{
                key: sum(row[key] for row in rows) for key in ("draft_s", "prefill_s", "verify_s")
            }, "verdicts": dict(
                collections.Counter(row["verdict"] for row in rows if "verdict" in row))
        }
    generate = [answer["generate"] for answer in answers if "generate" in answer]
    verdicts = collections.Counter(row["verdict"] for row in generate)
    for run in runs.values():
        verdicts.update(run["verdicts"])
    sums = {key: sum(row[key] for row in generate) for key in ("tokens", "all_s", "first_token_s")}
    of_generate = {
        **sums, "verdicts": dict(collections.Counter(row["verdict"] for row in generate))
    }
    return {
        "answers": len(answers), "runs": runs, "verdicts": dict(verdicts),
        "vision_s": sum(answer["vision_s"] for answer in answers),
        "eventgpt_s": sum(answer["eventgpt_s"] for answer in answers),
        "generate": of_generate if generate else None,
    }


def read_decoding(folder: Path) -> dict:
    """decode.json of a folder, its shape checked.

    Raises UserError when there is none, when it is another program's, of a later version, or
    damaged.
    """
    path = folder / "decode.json"
    results = read_json(path)
    if not isinstance(results, dict) or results.get("kind") != "decoding":
        raise UserError(f"{path} is not the decode.json of speculative_decode.py")
    check_format(path, results.get("format", 0), FORMAT)
    check_shape(path, results, DECODING, REDO)
    check_shape(path, results["failed"], [FAILED], REDO)
    if results["drafter"] not in results["totals"]["runs"]:
        raise UserError(
            f"{path} holds no answers by its own drafter, {results['drafter'][:40]!a}; {REDO}")
    check_shape(path, results, {"words": optional(dict), "titles": optional(dict)}, REDO)
    check_shape(path, list((results.get("words") or {}).values()), [str], REDO)
    for answer in results["answers"]:
        check_shape(path, answer, RECORDED, REDO)
        check_shape(path, answer["runs"].get(results["drafter"]), MARKED, REDO)
        for row in answer.get("passes") or []:
            check_shape(path, list((row.get("by") or {}).values()), [CHANCES], REDO)
    return results


def decode_s(run: dict) -> float:
    """Seconds of a run after its prefill: drafting and verifying."""
    return run["draft_s"] + run["verify_s"]


def whole_s(results: dict, name: str) -> float:
    """Seconds of a run from pictures to answers, without EventGPT's."""
    run = results["totals"]["runs"][name]
    return results["totals"]["vision_s"] + run["prefill_s"] + decode_s(run)


def speed_ups(results: dict, name: str) -> dict[str, float | None]:
    """Ratios of totals: decoding over our plain loop, decoding over generate's, and end to end over
    generate.

    None where a side is unknown, or where nothing was decoded after the first token.
    """
    sums = results["totals"]
    run, plain, generate = sums["runs"][name], sums["runs"].get("none"), sums["generate"]
    if run["tokens"] <= sums["answers"]:           # one token each, which is the prefill's
        return {
            "plain": None, "generate": None, "whole": ratio(generate and generate["all_s"],
                                                            whole_s(results, name))
        }
    decoding = decode_s(run)
    return {"plain": ratio(decode_s(plain), decoding) if plain and name != "none" else None,
            "generate": ratio(generate and generate["all_s"] - generate["first_token_s"], decoding),
            "whole": ratio(generate and generate["all_s"], whole_s(results, name))}


def tracked_figures(results: dict) -> dict:
    """The totals that an experiment tracker gets."""
    runs = results["totals"]["runs"]
    return {"answers": results["totals"]["answers"], "tau": {name: run["tau"] for name, run in runs.items()},
            "over": {name: speed_ups(results, name) for name in runs}}


def by_question(results: dict) -> list[tuple[str, dict]]:
    """(question, the results as if nothing else had been asked) for each; [] where there is one."""
    rows_of: dict[int, list[dict]] = {}
    for answer in results["answers"]:
        rows_of.setdefault(answer["question_idx"], []).append(answer)
    if len(rows_of) < 2:
        return []
    return [(str(rows[0].get("query", number)), {**results, "answers": rows, "totals": totals(rows)})
            for number, rows in sorted(rows_of.items())]


def accepted_share(run: dict) -> str:
    return percent(run["accepted"] / run["proposed"] if run["proposed"] else None)


def own_verdicts(results: dict) -> dict[str, int]:
    """Verdicts on the chosen drafter's answers; without a drafter those of generate, held against
    the same loop.
    """
    sums, name = results["totals"], results["drafter"]
    if name != "none":
        return sums["runs"][name]["verdicts"]
    return sums["generate"]["verdicts"] if sums["generate"] else {}


def other_verdicts(results: dict) -> dict[str, int]:
    """Ties and WRONG among the answers of the other ways of decoding."""
    own = own_verdicts(results)
    rest = {
        key: results["totals"]["verdicts"].get(key, 0) - own.get(key, 0) for key in ("tie", "WRONG")
    }
    return {key: count for key, count in rest.items() if count}


def counted(verdicts: dict[str, int]) -> str:
    """20 exact, 2 ties, 1 WRONG: those that occur."""
    plural = {"tie": "ties"}
    return ", ".join(f"{verdicts[key]} {plural.get(key, key) if verdicts[key] > 1 else key}"
                     for key in VERDICTS if verdicts.get(key))


def one_line(results: dict) -> str:
    """The answer for a log line, as far as it was measured."""
    run = results["totals"]["runs"][results["drafter"]]
    speed = speed_ups(results, results["drafter"])
    over = [f"{times(speed[key], 1)} over {key}" for key in ("plain", "generate") if speed[key]]
    elsewhere = counted(other_verdicts(results))
    parts = [
        f"{results['totals']['answers']} answers",
        counted(own_verdicts(results)), results["drafter"], f"tau {number(run['tau'])}",
        f"decode {', '.join(over)}" if over else "", f"elsewhere {elsewhere}" if elsewhere else "",
        f"failed {len(results['failed'])}" if results["failed"] else ""
    ]
    return " | ".join(filter(None, parts))


def pass_ms(results: dict) -> dict[int, float]:
    """Milliseconds of one target pass over k tokens, where they were measured."""
    verify = results["costs_ms"]["verify"]
    return {int(k): cost for k, cost in verify.items() if cost is not None}


def accepted_lengths(results: dict) -> dict[int, int]:
    """Passes of the chosen drafter by the number of accepted proposals, from 0 to the largest."""
    passes = results["totals"]["runs"][results["drafter"]]["accepted_lengths"]
    largest = max(map(int, passes))
    if largest > MOST_ACCEPTED:
        raise ValueError(f"a pass of {largest} accepted proposals, wanted at most {MOST_ACCEPTED}")
    return {length: passes.get(str(length), 0) for length in range(largest + 1)}


def has_draft_model(results: dict) -> bool:
    """Whether a draft model ran; files of earlier versions, which name no models, are taken to say so."""
    return DRAFT_MODEL in results.get("models", (DRAFT_MODEL, ))


def stages(results: dict) -> dict[str, dict[str, float]]:
    """Total seconds by way of decoding and by stage; generate's vision and prefill can't be told
    apart.
    """
    sums, name, ways = results["totals"], results["drafter"], {}
    if sums["generate"]:
        first_s = sums["generate"]["first_token_s"]
        ways["transformers' generate"] = {
            "vision and prefill": first_s,
            "decoding, verifying": max(0.0, sums["generate"]["all_s"] - first_s)
        }
    for run_name, way in {"none": "our loop, no drafts", name: f"{name}, draft free"}.items():
        if run_name in sums["runs"]:
            run = sums["runs"][run_name]
            ways[way] = {"vision and prompt": sums["vision_s"], "prefill": run["prefill_s"],
                         "drafting": run["draft_s"], "decoding, verifying": run["verify_s"]}
    if not has_draft_model(results):
        return ways
    return ways | {
        f"{name}, draft charged": {"EventGPT": sums["eventgpt_s"], **ways[f"{name}, draft free"]}
    }
