"""What several processes of an extraction do together beside answering: journals, disks, the merge.

All of them may write on one disk, or each host on its own. On one disk the first process makes the
output from the journals of all. From several disks the journals are copied to one place and merged
by a command of its own (--merge).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from base import UserError, log
from extraction.ledger import Ledger, Survey
from machine.team import Work
from pairs.journals import Journals, Merged, discard, journals_of

Ledgers = dict[Literal["draft", "target"], Ledger]


def written_by(output_file: Path, rank: int) -> Path:
    """What the process of this rank locks while it works: the first the output, each other a name
    of its own.
    """
    return output_file.with_name(f"{output_file.name}.rank{rank}") if rank else output_file


def discard_together(output_file: Path, team: Work) -> None:
    """Remove all journals of this output on all disks, before anybody begins a new one."""
    discard(output_file)
    team.gather("discarded", b"")


def open_together(team: Work, open_journals: Callable[[], Journals]) -> Journals:
    """The journals of all processes; the first opens its own before the others read it."""
    journals: list[Journals] = []

    def run_of_first() -> str:
        journals.append(open_journals())
        return journals[0].run

    team.from_first("journal", run_of_first)
    return journals[0] if journals else open_journals()


def is_one_disk(team: Work, journals: Journals) -> bool:
    """Whether all processes see the journal of the first."""
    run = team.from_first("run of the first journal", lambda: journals.run)
    sees = any(part.file.head.get("run") == run for part in journals.parts)
    return all(value == b"1" for value in team.gather("one disk", b"1" if sees else b"0"))


def log_merge_command(output_file: Path, survey: Survey, ledgers: Ledgers) -> None:
    """The end of a run over several disks: nobody can make the output yet."""
    failed = sum(len(ledger.failed) for ledger in ledgers.values())
    here = ", ".join(str(path) for path in journals_of(output_file))
    log(f"RESULT | all {len(survey.samples)} clips are done ({failed} failed), in journals on the "
        f"disks of several hosts (here: {here}): copy them into one folder, then give this command "
        "to one process with --merge and the names of all journals")


def merged_ledgers(survey: Survey, merged: Merged) -> Ledgers:
    """What these journals hold of all models; a UserError where they lack a clip."""
    ledgers: Ledgers = {}
    samples = survey.samples
    for role in survey.roles:
        ledgers[role.role] = ledger = Ledger(role, survey, samples, merged)
        failed = merged.failed(role.name)
        missing = ledger.unanswered()
        if absent := [sample.key for sample in missing if sample.key not in failed]:
            raise UserError(f"{len(absent)} of {len(samples)} clips have no answer of {role.name} "
                            f"in any of these journals, the first: {absent[0]}; name the journals "
                            "of all processes, or give the command without --merge, which does "
                            "what is missing")
        ledger.failed += [failed[sample.key] for sample in missing]
        samples = ledger.answered()
    log_twice(merged)
    return ledgers


def log_twice(merged: Merged) -> None:
    """Tell how many answers are in several journals, and how many of those differ."""
    twice = differ = 0
    for number, part in enumerate(merged.parts):
        for (model, question), keys in part.places.items():
            for key in keys:
                if other := next((before for before in merged.parts[:number]
                                  if before.has(model, key, question)), None):
                    twice += 1
                    differ += (other.read(model, key, question)["tokens"]
                               != part.read(model, key, question)["tokens"])
    log(f"extract | {len(merged) - twice} answers of {len(merged.parts)} journals | {twice} in two "
        f"of them, {differ} of those with other tokens: that of the journal named first counts")
