"""A data set folder made from recordings: its settings, its clips, and what had to be left out.

The index file is written last: a folder that has it is whole.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from base import Progress, UserError, log, now, provenance
from clips.dataset import INDEX_FILE, index_row
from clips.dsec import SEQUENCES, EventFile, Recording, find_recording, other_sequences
from clips.limits import MediaError, machine_trouble
from clips.windows import Clip, Recipe, make_block
from machine.files import is_machine_trouble, make_folder, read_json, write_json, write_text
from machine.team import Alone, Work
from machine.workers import in_workers

SETTINGS_FILE = "prepare_dsec.json"
MAX_BLOCK = 8                      # neighbouring clips that one worker makes one after the other


class LeftOut:
    """Reasons why whole sequences (clip None) and single clips could not be used."""

    def __init__(self):
        self.reasons: dict[str, dict[int | None, str]] = collections.defaultdict(dict)

    def add(self, sequence: str, clip: int | None, reason: str) -> None:
        self.reasons[sequence][clip] = reason
        log(f"prepare | LEFT OUT | {sequence}{'' if clip is None else f'/{clip:06d}'} | {reason}")

    @property
    def num_sequences(self) -> int:
        return sum(None in reasons for reasons in self.reasons.values())

    @property
    def num_clips(self) -> int:
        return sum(len(reasons) for reasons in self.reasons.values()) - self.num_sequences

    def __str__(self) -> str:
        return f"{self.num_sequences} sequences and {self.num_clips} clips left out"

    def take_up(self, rows: list[dict]) -> None:
        """Take up what another process left out: rows of its `as_json`."""
        for row in rows:
            self.reasons[row["sequence"]][row["clip"]] = row["reason"]

    def as_json(self) -> list[dict]:
        return [{"sequence": sequence, "clip": clip, "reason": reason}
                for sequence, reasons in sorted(self.reasons.items())
                for clip, reason in sorted(reasons.items())]

    def lines(self) -> Iterator[str]:
        """The summary: one line a sequence."""
        for sequence, reasons in sorted(self.reasons.items()):
            clips = sorted(clip for clip in reasons if clip is not None)
            names = ", ".join(f"{clip:06d}"
                              for clip in clips[:10]) + (", ..." if len(clips) > 10 else "")
            extent = f"{len(clips)} clips: {names} | the first" if clips else "the whole sequence"
            yield f"{sequence} | {extent}: {reasons[clips[0] if clips else None]}"


def find_recordings(root: Path, split: str, sequences: list[str] | None,
                    left_out: LeftOut) -> list[Recording]:
    """The usable recordings of these sequences (None: DSEC's list); the log names folders beyond
    them.
    """
    wanted = sorted(set(sequences or SEQUENCES[split]))
    if others := [name for name in other_sequences(root, split) if name not in wanted]:
        log(f"prepare | not in DSEC's {split} list, so not used unless --sequences names them: "
            f"{', '.join(others)}")
    recordings = []
    for sequence in wanted:
        try:
            recording = find_recording(root, split, sequence)
            with EventFile(recording.events):
                recordings.append(recording)
        except MediaError as error:
            left_out.add(sequence, None, str(error))
        except OSError as error:
            if is_machine_trouble(error):
                raise machine_trouble(Path(error.filename or root), error) from error
            left_out.add(sequence, None, f"can't be read: {error}")
    if not recordings:
        raise UserError(f"none of {len(wanted)} {split} sequences can be used; wanted in {root}: "
                        f"{split}/<sequence>/ with events/left/events.h5, "
                        "images/left/rectified/*.png and images/timestamps.txt")
    return recordings


class PreparedFolder:
    """One data set folder; used under its lock."""

    def __init__(self, path: Path, recipe: Recipe):
        self.path, self.recipe = path, recipe
        self.settings = dataclasses.asdict(recipe)

    def check_settings(self) -> None:
        """A folder belongs to one recipe; a new one is marked with it before anything is made."""
        file = self.path / SETTINGS_FILE
        if file.exists():
            recorded = read_json(file)
            recorded = recorded.get("settings") if isinstance(recorded, dict) else None
            if recorded != self.settings:
                old = recorded if isinstance(recorded, dict) else {}
                changed = [f"--{name} {old.get(name)} there, {value} now"
                           for name, value in self.settings.items() if old.get(name) != value]
                raise UserError(f"{self.path} was made with other settings: {'; '.join(changed)}. "
                                "Name another --output_root, or remove that folder")
        elif foreign := [
                name for name in ("event_image", "mp4", INDEX_FILE) if (self.path / name).exists()
        ]:
            raise UserError(f"{self.path} holds {', '.join(foreign)} but no {SETTINGS_FILE}: "
                            "another program made it. Name another --output_root, or remove that "
                            "folder")
        else:
            write_json(file, {"settings": self.settings})

    def tidy(self, clips: list[Clip]) -> set[str]:
        """Make the sequences' folders, remove half-written files; -> the whole files in them."""
        whole = set()
        for sequence in dict.fromkeys(clip.sequence for clip in clips):
            for kind in ("event_image", "mp4"):
                place = make_folder(self.path / kind / sequence)
                if not place.resolve().is_relative_to(self.path.resolve()):
                    raise UserError(f"{place} is a link that leads out of {self.path}: extraction "
                                    "would refuse its clips")
                for entry in os.scandir(place):
                    if re.fullmatch(r"\..*\.tmp\.(png|mp4)", entry.name):
                        os.unlink(entry)
                    elif entry.stat().st_size:
                        whole.add(f"{kind}/{sequence}/{entry.name}")
        return whole

    def make(self, clips: list[Clip], workers: int, left_out: LeftOut, team: Work | None = None,
             total: int | None = None) -> None:
        """Make the clips whose files are not all there; those that can't be made go to left_out.

        team: the processes that make `total` clips together, of which these are this one's.
        """
        team, total = team or Alone(), total or len(clips)
        whole = self.tidy(clips)
        missing = [clip for clip in clips if not whole.issuperset(clip.files(self.recipe.event_images))]
        done, failed = len(clips) - len(missing), 0
        log(f"prepare | {self.path} | {len(clips)} clips, {done} of them are there | {workers} workers")
        progress = Progress("prepare", total, done, unit="clips")
        work = functools.partial(make_block, folder=self.path, recipe=self.recipe)
        try:
            for block, reasons in in_workers(work, blocks_of(missing, workers), workers):
                for clip, reason in zip(block, reasons):
                    if reason:
                        failed += 1
                        left_out.add(clip.sequence, clip.number, reason)
                done += len(block)
                if known := team.report("prepare", done, failed):
                    progress.update(known[0], f"left out {known[1]}")
        except BaseException:
            self.tidy(clips)
            raise

    def finish(self, clips: list[Clip], left_out: LeftOut, config: dict,
               allow_missing: bool) -> None:
        """Log what is missing and write the index, unless something is missing and that was not allowed.

        config: the flags of the program as JSON values; kept beside the settings.
        """
        for line in left_out.lines():
            log(f"missing | {line}")
        file, missing = self.path / SETTINGS_FILE, left_out.as_json()
        if read_json(file).get("left_out") != missing:
            write_json(file, {"settings": self.settings, "date": now(), "config": config,
                              "left_out": missing,
                              "provenance": provenance()})
        rows = [self.row_of(clip) for clip in clips
                if clip.number not in left_out.reasons.get(clip.sequence, ())]
        rows.sort(key=lambda row: row["event_data"])
        if not rows:
            raise UserError(f"{self.path}: not one clip could be made; {left_out}")
        if left_out.reasons and not allow_missing:
            raise UserError(f"{self.path} is not whole: {left_out}, {len(rows)} clips are there. "
                            "No index was written: mend what the lines above name and run this "
                            "again, or add --allow_missing")
        index, text = self.path / INDEX_FILE, json.dumps(rows, indent=2)
        changed = not index.exists() or index.read_text("utf-8") != text
        if changed:
            write_text(index, text)
        sequences = {row["sequence"] for row in rows}
        log(f"RESULT | {self.path} | {len(rows)} clips of {len(sequences)} sequences | {left_out}"
            f"{'' if changed else ' | nothing to do, all was there'}")

    def row_of(self, clip: Clip) -> dict:
        """The clip's row of the index file: the published fields, then `sequence` and `clip`."""
        return {**index_row(self.path.name, clip.name,
                            clip.picture_names(self.recipe.event_images)),
                "sequence": clip.sequence, "clip": clip.number}


def blocks_of(clips: list[Clip], workers: int) -> list[list[Clip]]:
    """Runs of neighbours in one sequence, short enough that every worker gets some."""
    size, blocks = max(1, min(MAX_BLOCK, math.ceil(len(clips) / workers))), []
    for _, group in itertools.groupby(clips, key=lambda clip: clip.sequence):
        neighbours = list(group)
        blocks += [neighbours[start:start + size] for start in range(0, len(neighbours), size)]
    return blocks
