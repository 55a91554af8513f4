"""decode.json, memory.npz and DECODE.md of a finished decoding, made from its journal."""

from __future__ import annotations

import contextlib
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from base import UserError, log, now, provenance
from decoding.clips import Clips
from decoding.journal import DecodingJournal
from decoding.task import MEMORY_FILE, Task
from drafting.table import LIVE
from machine.files import make_folder, new_task_folder, write_json
from reports.decode_figures import FORMAT, one_line, totals
from reports.decode_page import THUMBNAILS, shown_clips
from reports.decode_report import write_decode_report

if TYPE_CHECKING:
    from vlm.roles import Role


def rows_in_order(clips: Clips, journal: DecodingJournal) -> list[dict]:
    """The rows of all answers in the order of the clips, however often the run was broken."""
    places = [(sample.key, number) for sample in clips.samples
              for number in range(len(clips.questions))]
    rows = []
    for place in places:
        if place in journal.answers:
            row = {name: value for name, value in journal.answers[place].items() if name != "words"}
            if text := journal.draft_texts.get(place):
                row |= {"draft_text": text, "draft_tokens": journal.drafts[place][0]}
            rows.append(row)
    return rows


def words_of(journal: DecodingJournal) -> dict[str, str]:
    """The text of every token that was proposed or emitted, by its id."""
    words: dict[str, str] = {}
    for row in journal.answers.values():
        words |= row.get("words", {})
    return dict(sorted(words.items(), key=lambda item: int(item[0])))


def title_of(role: Role, facts: dict | None) -> str:
    """The name of a role's model in sentences: of another than the role was made for, its own."""
    from vlm.roles import module_of

    name = str((facts or {}).get("name", ""))
    with contextlib.suppress(UserError, OSError):      # a model that is gone by now is named too
        if not name or module_of(name) == role.module:
            return role.title
    return PurePath(name).name or role.title


def results_of(task: Task, clips: Clips, journal: DecodingJournal, parallel: dict | None,
               more: dict) -> dict:
    """The content of decode.json. more: settings and facts of this run."""
    from vlm.roles import DRAFT, TARGET

    rows = rows_in_order(clips, journal)
    costs_ms = dict(journal.costs_ms or {})
    if journal.draft_costs_ms:
        costs_ms[DRAFT.name] = journal.draft_costs_ms
    starts = [{"date": entry["start"], "answers": entry["answers"]} for entry in journal.starts]
    return {
        "kind": "decoding", "format": FORMAT, "task": task.folder.resolve().name, "date": now(),
        **more, "memory_share": task.parts.memory_share,
        "reads_draft": [
            name for name, entry in LIVE.items() if entry.reads_draft(task.conditioning)
        ],
        "simulated_tau": task.simulated,
        "simulated_trees": task.simulated_trees, "target": journal.facts[TARGET.name],
        "models": journal.facts, "starts": starts, "interrupted": len(starts) > 1,
        "noise": journal.noise, "costs_ms": costs_ms, "answers": rows, "failed": clips.failed,
        "words": words_of(journal),
        "titles": {role.role: title_of(role, journal.facts.get(role.name)) for role in (DRAFT, TARGET)},
        "totals": {**totals(rows), "parallel": parallel}, "provenance": provenance()
    }


def results_folder(task: Task, journal: DecodingJournal, output_folder: Path | None) -> Path:
    """The output folder, or a new one in the task folder; one that an earlier start began to fill
    is used again.
    """
    if output_folder:
        return output_folder
    if journal.folder and (task.folder / journal.folder).is_dir():
        return task.folder / journal.folder
    folder = new_task_folder(task.folder, "decode")
    try:
        journal.add({"folder": folder.name})
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    return folder


def write_results(folder: Path, results: dict, clips: Clips, plots: bool) -> None:
    """Everything that a decoding leaves. DECODE.md comes last: a folder with it is whole."""
    from drafting.memory import save_memory

    make_folder(folder)
    write_json(folder / "decode.json", results, rows="answers")
    if plots:
        write_json(folder / THUMBNAILS, clips.thumbnails(shown_clips(results)))
    save_memory((row["tokens"] for row in results["answers"]), folder / MEMORY_FILE)
    write_decode_report(folder, plots=plots)
    log(f"RESULT | {folder} | {one_line(results)}")
