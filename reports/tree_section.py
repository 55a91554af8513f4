"""The section of DECODE.md about trees: their shape, what a node costs, and the size that pays."""

import statistics

from reports.blocks import escape, number, table, times
from reports.decode_figures import pass_ms


def tree_section(results: dict) -> list[str]:
    """Nothing where no proposals branched, or none were recorded."""
    name = results["drafter"]
    shapes = shapes_of(results)
    if not shapes:
        return []
    nodes, depths, accepted = (statistics.fmean(column) for column in zip(*shapes))
    widest = max(count for count, _, _ in shapes)
    return [
        f"### Trees: {escape(name)}", "",
        f"Of the {len(shapes)} passes whose proposals branched: {nodes:.1f} nodes (at most {widest}), "
        f"{depths:.1f} deep, of which {accepted:.1f} were accepted, on average.", "",
        *break_even_of_trees(results)
    ]


def shapes_of(results: dict) -> list[tuple[int, int, int]]:
    """(nodes, depth, accepted tokens) of each recorded pass whose proposals branched."""
    shapes, name = [], results["drafter"]
    for answer in results["answers"]:
        for row, accepted in zip(answer.get("passes") or [], answer["runs"][name]["accepted"]):
            if parents := row.get("parents"):
                depths: list[int] = []
                for parent in parents:
                    depths.append(1 + (depths[parent] if parent >= 0 else 0))
                shapes.append((len(parents), max(depths), accepted))
    return shapes


def break_even_of_trees(results: dict) -> list[str]:
    """For each size: what a round costs, and the tokens that make it as fast as plain decoding."""
    name, verify_ms = results["drafter"], pass_ms(results)
    run = results["totals"]["runs"][name]
    if not run["proposed"] or run["draft_s"] is None or 1 not in verify_ms:
        return []
    node_ms = 1000 * run["draft_s"] / run["proposed"]
    simulated = (results.get("simulated_trees") or {}).get(name) or {}
    rows = []
    for nodes in (size - 1 for size in verify_ms if size > 16):
        round_ms = verify_ms[nodes + 1] + nodes * node_ms
        even, tau = round_ms / verify_ms[1], simulated.get(str(nodes))
        rows.append([nodes, f"{verify_ms[nodes + 1]:.2f}", f"{nodes * node_ms:.2f}", f"{round_ms:.2f}",
                     f"{even:.2f}", number(tau), times(tau / even if tau else None)])
    if not rows:
        return []
    header = ["nodes", "verify(nodes + 1) ms", "nodes ms", "a round ms", "break-even tau",
              "simulated tau", "expected speed-up"]
    return [*table(header, rows),
            f"A node takes {node_ms:.3f} ms, the average of this run, the adapter's steps and learning "
            "included. Simulated tau is that of trees on the task's own test pairs.", ""]
