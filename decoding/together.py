"""Several processes that decode together: whole sequences are dealt, journals are read as one.

Within a sequence the memory learns answer after answer, so a sequence stays with one process, and
each begins with what training left: its figures are then the same whichever process decodes it,
and those of one process with --fresh_sequences. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from base import UserError
from decoding.clips import Clips
from decoding.journal import DecodingJournal, journal_of
from machine.files import make_folder, only_writer
from machine.team import Work, share_of


def check_alone(team: Work, flags: dict[str, bool]) -> None:
    """A UserError where several processes were given flags that belong to one."""
    given = [f"--{name}" for name, value in flags.items() if value]
    if team.ranks.world > 1 and given:
        raise UserError(f"{', '.join(given)} belongs to one process, here are {team.ranks.world}: leave "
                        "it out, or start one")


def agree(team: Work, settings: dict, content: dict) -> None:
    """All processes decode the same clips with the same settings."""
    team.agree({**{name: json.dumps(value) for name, value in settings.items()},
                "data set folder": digest_of(content)})


def digest_of(value: dict) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def clips_of(clips: Clips, team: Work) -> Clips:
    """The clips that this process decodes, with a list of its own for those that fail."""
    if team.ranks.world == 1:
        return clips
    samples = share_of(clips.samples, lambda sample: sample.sequence, team.ranks)
    return dataclasses.replace(clips, samples=samples, failed=[])


def other_journals(folder: Path, rank: int) -> list[Path]:
    """The journals in this folder that processes of other ranks wrote, now or in an earlier start."""
    own, first = journal_of(folder, rank), journal_of(folder)
    pattern = re.compile(rf"{re.escape(first.stem)}\.rank\d+\.jsonl")
    paths = [first, *(path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name))]
    return [path for path in paths if path.exists() and path != own]


def discard_together(team: Work, folder: Path) -> None:
    """Remove the journals of all ranks in this folder before a process begins a new one."""
    team.from_first("discarded", lambda: discard(folder))


def discard(folder: Path) -> str:
    make_folder(folder)
    with only_writer(folder):
        for path in (*other_journals(folder, 0), journal_of(folder)):
            path.unlink(missing_ok=True)
    return "discarded"


def gather(team: Work, clips: Clips, own: Clips, journal: DecodingJournal, folder: Path) -> None:
    """Wait until all processes are through; the first then knows all answers, and all that failed."""
    if team.ranks.world == 1:
        return
    here = [row for row in own.failed if row not in clips.failed]
    for rows in team.gather("failed", json.dumps(here).encode()):
        clips.failed += [row for row in json.loads(rows) if row not in clips.failed]
    if team.ranks.rank == 0:
        team.outlast()
        journal.take_up(other_journals(folder, 0))


def check_one_disk(team: Work, folder: Path) -> None:
    """A UserError unless all processes see the journal of the first: its results need all answers."""
    if team.ranks.world == 1:
        return
    team.from_first("journal", lambda: "begun")
    sees = journal_of(folder).exists()
    said = team.gather("one disk", b"1" if sees else b"0")
    if b"0" in said:
        raise UserError(f"rank {said.index(b'0')} does not see {folder} of the first process: decoding by "
                        "several hosts needs a shared disk for the task folder")


def remove_journals(journal: DecodingJournal, folder: Path) -> None:
    """The results are whole: the journals have done their work."""
    for path in (*other_journals(folder, 0), *folder.glob(".rank*.lock")):
        path.unlink(missing_ok=True)
    journal.remove()
