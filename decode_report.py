"""DECODE.md and pictures from decode.json alone."""

import collections
from pathlib import Path


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
    for run in runs.values():
        verdicts.update(run["verdicts"])
    verdicts.update(row["verdict"] for row in generate)
    return {
        "answers": len(answers), "runs": runs, "verdicts": dict(verdicts),
        "vision_s": sum(answer["vision_s"] for answer in answers),
        "eventgpt_s": sum(answer["eventgpt_s"] for answer in answers),
        "generate": {**{key: sum(row[key] for row in generate) for key in ("tokens", "all_s", "first_token_s")},
                     "verdicts": dict(collections.Counter(row["verdict"] for row in generate))} if generate else None,
    }


def one_line(results: dict) -> str:
    run = results["totals"]["runs"][results["drafter"]]
    return f"{results['totals']['answers']} answers | {results['drafter']} | tau {run['tau']:.2f}"


def write_decode_report(folder: Path, plots: bool = True) -> None:
    pass
