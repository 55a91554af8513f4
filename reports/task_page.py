"""REPORT.html of a task, from its results.json alone: how often is each drafter right?"""

from __future__ import annotations

from reports.blocks import number, percent
from reports.html import from_markdown, glossary, name, section, text
from reports.svg import bars, lines
from reports.task_figures import LEAD_GAMMA, best_drafter, draft_worth

WORDS = {
    "pair": "The answers of both models to one question about one clip, as tokens.",
    "target": "The slow model whose own words are wanted.",
    "draft": "The answer that the fast model gives to the same question, in other words.",
    "alpha": "Share of the target's tokens that a drafter predicts, given the right ones before.",
    "tau": "Tokens that a pass of the target brings on average; 1 is decoding without proposals.",
    "gamma": "How many tokens are proposed for a pass.",
    "memory": "Counts of which tokens followed which in earlier answers of the target.",
    "adapter": "A small network, trained to say the target's next token from the tokens before it "
    "and from the draft.",
}


def plain_sentence(results: dict) -> str:
    """What was reached, for a reader who knows nothing yet; HTML."""
    test = results["metrics"]["test"]
    best = best_drafter(test)
    drafter, tau = test["drafters"][best], test["drafters"][best]["simulated"][LEAD_GAMMA]["tau"]
    return (
        f"The best drafter, {text(best)}, guesses <strong>{percent(drafter['alpha'])} of the target’s "
        f"tokens</strong> on {test['pairs']} answers that no training saw: a pass of the target "
        f"would bring {number(tau)} tokens instead of one."
    )


def explained(results: dict) -> str:
    test = results["metrics"]["test"]
    baselines = {"copying the draft": "direct_copy",
                 "the commonest token at each place": "constant_string"}
    others = "".join(f"; {words} {percent(test[key]['alpha'])}" for words, key in baselines.items()
                     if test[key])
    return (f"The adapter alone guesses {percent(test['adapter']['alpha'])}{others}. These are "
            "simulations over recorded answers: what is saved in seconds, a decoding measures. What "
            f"the draft adds: {text(draft_worth(results))}")


def charts(results: dict) -> str:
    drafters = results["metrics"]["test"]["drafters"]
    best = best_drafter(results["metrics"]["test"])
    alphas = {drafter: figures["alpha"] for drafter, figures in drafters.items()
              if figures["alpha"] is not None}
    taus: dict[str, list[tuple[float, float]]] = {
        drafter: [
            (float(gamma), row["tau"]) for gamma, row in figures["simulated"].items() if row["tau"]
        ]
        for drafter, figures in drafters.items()
    }
    ordered = sorted(alphas, key=lambda drafter: -alphas[drafter])
    parts = [
        bars(
            "Tokens guessed right (alpha)",
            {drafter: alphas[drafter] for drafter in ordered},
            percent,
            best,
        ),
        lines(
            "Tokens for each pass of the target (tau)",
            {drafter: taus[drafter] for drafter in ordered[:7]},
            "tokens proposed (gamma)",
        ),
    ]
    history = results["history"]
    if history:
        losses = {
            key.partition("_")[0]: [
                (epoch["epoch"], epoch[key]) for epoch in history if epoch[key] is not None
            ]
            for key in ("train_loss", "validation_loss")
        }
        parts.append(lines("Loss while training (nats a token)", losses, "epoch"))
    return f"<div class=charts>{''.join(parts)}</div>"


def body(results: dict, sections: list[str]) -> str:
    """The page of a task. sections: those of RESULTS.md, as Markdown."""
    warnings = "".join(
        f"<p class=note>Warning: {text(warning)}</p>" for warning in results["warnings"]
    )
    return "".join(
        [
            f"<header><p class=kicker>Task {name(results['task'])}, {name(results['date'])}</p>"
            f"<h1>{plain_sentence(results)}</h1><p>{explained(results)}</p>{warnings}</header>",
            section("Which drafter", charts(results), "drafters"),
            section("Eight words", glossary(WORDS), "words"),
            f"<section id=more><h2>Figures</h2>{from_markdown(sections)}</section>",
        ]
    )
