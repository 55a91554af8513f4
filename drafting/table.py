"""The table of drafters: every name, style and factory of a drafter is derived from here. Imports
no torch.

To add a drafter: write one file with its live class, its simulated class and a function that makes
each, and add one entry. Evaluation, --drafter, benchmarks and pictures follow.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING

from drafting.parts import LiveParts, SimulationParts

if TYPE_CHECKING:
    from drafting.contract import Drafter, SimulatedDrafter

# Okabe and Ito 2008, "Color Universal Design": distinct for colour-blind readers too.
BLUE, VERMILION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#555555"
SKY, PURPLE, BLACK, YELLOW = "#56B4E9", "#CC79A7", "#000000", "#F0E442"


@dataclasses.dataclass(frozen=True)
class DrafterEntry:
    """One drafter. `live` and `simulated` name factories as "file:function"; the file is imported
    when they are called."""

    about: str                                # what it proposes, for help texts and reports
    name: str | None = None  # of --drafter and in decode.json; None: simulated alone
    results_name: str | None = None           # in results.json; None: live alone
    style: tuple[str, str] | None = None      # (line style, colour) in pictures; None: not drawn
    live: str | None = None                   # f(LiveParts) -> Drafter
    # f(SimulationParts) -> SimulatedDrafter, None where parts are missing
    simulated: str | None = None
    learns: bool = False                      # from verified answers
    needs_adapter: bool = False
    reads_draft_in: tuple[str, ...] = ()  # conditionings of the adapter in which it reads the draft

    def reads_draft(self, conditioning: str | None) -> bool:
        """Whether the live drafter needs EventGPT's answer, with an adapter of this conditioning
        (None: none).
        """
        without_adapter = bool(self.reads_draft_in) and not self.needs_adapter
        return without_adapter or conditioning in self.reads_draft_in

    def make_live(self, parts: LiveParts) -> Drafter:
        assert self.live, f"{self.results_name} has no live drafter"
        return _function(self.live)(parts)

    def make_simulated(self, parts: SimulationParts) -> SimulatedDrafter | None:
        """None where parts are missing: another conditioning, no training pairs, a share that was
        not chosen.
        """
        return _function(self.simulated)(parts) if self.simulated else None


def _function(place: str):
    file, name = place.split(":")
    return getattr(importlib.import_module(f"drafting.{file}"), name)


# From the simplest to the best: the order of tables and pictures. --drafter names them the other
# way round.
DRAFTERS = (DrafterEntry("nothing", name="none", live="baselines:live_none"),
            DrafterEntry("EventGPT's own tokens", name="copy", results_name="copy of the draft",
                         style=(":", GREY), live="baselines:live_copy",
                         simulated="baselines:simulated_copy", reads_draft_in=("draft", "prefix",
                                                                               "prefix+draft")),
            DrafterEntry("prompt lookup", name="lookup", live="baselines:live_lookup"),
            DrafterEntry("the commonest target token at each position",
                         results_name="constant string", style=("--", ORANGE),
                         simulated="baselines:simulated_constant"),
            DrafterEntry("a memory of the training answers", results_name="n-gram",
                         style=("-.", SKY), simulated="memory:simulated_ngram"),
            DrafterEntry("the adapter trained without drafts", results_name="prefix",
                         style=("--", GREEN), simulated="adapter:simulated_prefix",
                         needs_adapter=True),
            DrafterEntry("the adapter with another clip's draft",
                         results_name="adapter, drafts shuffled", style=("-.", YELLOW),
                         simulated="adapter:simulated_shuffled", needs_adapter=True),
            DrafterEntry("the adapter alone", name="adapter", results_name="adapter",
                         style=("-", VERMILION), live="adapter:live_adapter",
                         simulated="adapter:simulated_adapter", needs_adapter=True,
                         reads_draft_in=("draft", "prefix+draft")),
            DrafterEntry("the adapter, trained on by each verified answer",
                         results_name="adapter, online", style=("-", PURPLE),
                         simulated="adapter:simulated_online", learns=True, needs_adapter=True),
            DrafterEntry("the memory alone", name="memory", results_name="memory", style=("-", SKY),
                         live="memory:live_memory", simulated="memory:simulated_memory",
                         learns=True),
            DrafterEntry("adapter and memory together", name="hybrid", results_name="hybrid",
                         style=("-", BLUE), live="hybrid:live_hybrid",
                         simulated="hybrid:simulated_hybrid", learns=True, needs_adapter=True,
                         reads_draft_in=("prefix+draft", )),
            DrafterEntry("memory and the adapter that learns online", results_name="hybrid, online",
                         style=("-", BLACK), simulated="hybrid:simulated_online", learns=True,
                         needs_adapter=True),
            )
LIVE = {entry.name: entry for entry in reversed(DRAFTERS) if entry.name}  # by name, the best first
# by results name
SIMULATED = {entry.results_name: entry for entry in DRAFTERS if entry.results_name}
LIVE_NAMES = tuple(LIVE)  # the choices of --drafter


def styles() -> dict[str, tuple[str, str]]:
    """{results name: (line style, colour)}: what programs hand to reports."""
    return {entry.results_name: entry.style for entry in DRAFTERS if entry.results_name and entry.style}


def results_names() -> dict[str, str]:
    """{name in decode.json: name in results.json} of the drafters that are both live and simulated.
    """
    return {entry.name: entry.results_name for entry in DRAFTERS if entry.name and entry.results_name}
