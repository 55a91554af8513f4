"""What a decoding has done so far, on the disk: after a stop or a crash the same command goes on.

    .decode_<digest of the settings>/journal.jsonl   in the task folder, until the decoding is done
    <output_folder>/.journal.jsonl                   with --output_folder

After the first line (settings, digests of the clips' files) one entry a line, of these kinds:

    {"start": date, "answers": n}             a process began; n answers were there already
    {"model": name, "facts": {...}}           a model that was loaded
    {"draft": tokens, "seconds": s, "key": clip, "question_idx": n, "text": answer}
    {"draft_costs_ms": {...}}                 {"costs_ms": {...}, "noise": x}
    {"answer": row of decode.json, "key": clip, "question_idx": n, "other_tokens": {name: tokens}}
    {"folder": name}                          where the results go

Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from base import UserError, log, now
from machine.files import make_folder, only_writer
from machine.journal import START_AFRESH, JournalFile
from pairs.journal import differences
from vlm.contract import same_weights

if TYPE_CHECKING:
    from vlm.roles import Role

# First name of an entry -> the types of its values.
KINDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"start": str, "answers": int},
    "model": {"model": str, "facts": dict},
    "draft": {"draft": list, "seconds": float, "key": str, "question_idx": int},
    "draft_costs_ms": {"draft_costs_ms": dict},
    "costs_ms": {"costs_ms": dict, "noise": float},
    "answer": {"answer": dict, "key": str, "question_idx": int, "other_tokens": dict},
    "folder": {"folder": str}}
# Of a run in a row of answers: what going on needs.
RUN_KEYS = {
    "tokens": int, "proposed": list, "accepted": list, "draft_s": float, "prefill_s": float,
    "verify_s": float
}

JOURNAL, HIDDEN = "journal.jsonl", ".decode_"
Place = tuple[str, int]                      # a clip's key and the number of a question


def hidden_folder(task: Path, settings: dict) -> Path:
    """Where an unfinished decoding with these settings keeps its journal, in the folder of its
    task.
    """
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(),
                             digest_size=6).hexdigest()
    return task / f"{HIDDEN}{digest}"


def journal_of(folder: Path, rank: int = 0) -> Path:
    """The journal in this folder: an output folder, or a hidden one that holds nothing else.

    rank: of the process that writes it, where several decode together.
    """
    name = f"journal.rank{rank}.jsonl" if rank else JOURNAL
    return folder / (name if folder.name.startswith(HIDDEN) else f".{name}")


@contextlib.contextmanager
def open_journal(folder: Path, settings: dict, content: dict,
                 rank: int = 0) -> Iterator[DecodingJournal]:
    """The journal of this rank in this folder, which no other process writes meanwhile. One that
    holds nothing is not kept.
    """
    make_folder(folder)
    with only_writer(folder / f"rank{rank}" if rank else folder):
        path = journal_of(folder, rank)
        try:
            with DecodingJournal(path, settings, content) as journal:
                try:
                    yield journal
                finally:
                    if not journal.drafts and not journal.answers:
                        journal.remove()
        finally:
            if not rank and folder.name.startswith(HIDDEN) and not path.exists():
                (folder / ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()


class DecodingJournal:
    """Drafts and answers in the order in which they came. Everything is in memory too: decode.json
    holds it whole.
    """

    def __init__(self, path: Path, settings: dict, content: dict[str, dict[str, str]]):
        """Open the journal or begin one. content: model -> clip's key -> digest of the clip's files
        now.

        Raises UserError, and changes nothing, where the journal is of other settings or other
        files.
        """
        self.path, self.file = path, JournalFile(path, is_entry)
        self.settings, self.content = settings, content
        self._read()
        check_head(path, self.file.head, bool(self.drafts or self.answers), settings, content)
        before = (self.file.head or {}).get("clips", {})
        clips = {model: {**before.get(model, {}), **digests} for model, digests in content.items()}
        if self.file.begin({"settings": settings, "clips": {**before, **clips}}):
            self._read()
        if self.drafts or self.answers:
            log(f"decode | {path} | going on: {len(self.drafts)} drafts and {len(self.answers)} "
                "answers are there already")
        self.add({"start": now(), "answers": len(self.answers)})

    def _read(self) -> None:
        self.starts: list[dict] = []
        self.facts: dict[str, dict] = {}                         # model -> name, revision, ...
        self.drafts: dict[Place, tuple[list[int], float]] = {}   # tokens, seconds
        self.draft_texts: dict[Place, str] = {}
        self.answers: dict[Place, dict] = {}                     # rows of decode.json
        self.other_tokens: dict[Place, dict] = {}
        self.draft_costs_ms: dict | None = None
        self.costs_ms: dict | None = None                        # of the last start
        self.noise: float | None = None      # of the first start: all verdicts have one threshold
        self.folder: str | None = None
        for _, entry in self.file.lines():
            self._take(entry)

    def _take(self, entry: dict) -> None:
        kind, place = next(iter(entry)), (entry.get("key", ""), entry.get("question_idx", 0))
        if kind == "start":
            self.starts.append(entry)
        elif kind == "model":
            self.facts[entry["model"]] = entry["facts"]
        elif kind == "draft":
            self.drafts[place] = entry["draft"], entry["seconds"]
            # absent: of a version that did not record it
            self.draft_texts[place] = entry.get("text", "")
        elif kind == "draft_costs_ms":
            self.draft_costs_ms = entry["draft_costs_ms"]
        elif kind == "costs_ms":
            self.costs_ms = entry["costs_ms"]
            self.noise = entry["noise"] if self.noise is None else self.noise
        elif kind == "answer":
            self.answers[place] = entry["answer"]
            self.other_tokens[place] = entry["other_tokens"]
        else:
            self.folder = entry["folder"]

    def take_up(self, paths: list[Path]) -> None:
        """Take up what the journals of other processes hold of this decoding; they are only read."""
        for path in paths:
            file = JournalFile(path, is_entry)
            entries = [entry for _, entry in file.lines()]
            is_used = any(next(iter(entry)) in ("draft", "answer") for entry in entries)
            check_head(path, file.head, is_used, self.settings, self.content)
            if not is_used:
                continue
            for entry in entries:
                kind = next(iter(entry))
                known = kind == "model" and entry["model"] in self.facts
                known |= kind in ("draft_costs_ms", "costs_ms") and getattr(self, kind) is not None
                if kind not in ("start", "folder") and not known:
                    self._take(entry)

    # ------------------------------------------------------------------------------------ going on
    def check_revision(self, role: Role, name: str, revision: str) -> None:
        """A UserError where answers are there that a model of another revision gave."""
        recorded = self.facts.get(role.name, {}).get("revision")
        answered = self.drafts if role.role == "draft" else self.answers
        if answered and not same_weights(recorded, revision):
            raise UserError(
                f"{self.path} has answers of other weights of {name} ({recorded} there, {revision} "
                f"now); put the former model back, or {START_AFRESH}")

    # ------------------------------------------------------------------------------------- entries
    def add(self, entry: dict) -> None:
        """Put an entry on the disk, then take it up."""
        assert is_entry(entry), f"no entry of a decoding's journal: {entry}"
        self.file.append([entry])
        self._take(entry)

    def remove(self) -> None:
        """The results are whole: the journal has done its work."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> DecodingJournal:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.file.close()
        if kind is not None and (self.drafts or self.answers):
            log(f"decode | {len(self.drafts)} drafts and {len(self.answers)} answers are kept in "
                f"{self.path}; the same command goes on from there")


def check_head(path: Path, head: dict, is_used: bool, settings: dict,
               content: dict[str, dict[str, str]]) -> None:
    """A UserError unless what stands behind this first line was decoded of these files with these
    settings.

    is_used: whether drafts or answers stand there.
    """
    there, before = head.get("settings", {}), head.get("clips", {})
    if not isinstance(there, dict) or not is_content(before):
        raise UserError(f"{path} is no journal of a decoding; {START_AFRESH}")
    if not is_used:
        return
    changed = sorted({
        key for model, digests in before.items() for key, digest in digests.items()
        if content.get(model, {}).get(key, digest) != digest
    })
    reasons = [differences(there, settings)]
    if changed:
        reasons.append(f"the files of {len(changed)} clips have changed, the first: {changed[0]}")
    if differs := "; ".join(filter(None, reasons)):
        raise UserError(f"{path} is the journal of another decoding ({differs}); give that command "
                        f"again, choose another --output_folder, or {START_AFRESH}")


def is_content(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(digests, dict) for digests in value.values())


def is_entry(entry: dict) -> bool:
    """Whether a line holds an entry of one of the KINDS, whole."""
    kinds = KINDS.get(next(iter(entry), ""))
    if not kinds or not all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
        return False
    if "answer" in kinds:
        return is_row(entry["answer"]) and all(map(are_tokens, entry["other_tokens"].values()))
    return are_tokens(entry.get("draft", [])) and isinstance(entry.get("text", ""), str)


def is_row(row: dict) -> bool:
    """Whether this is a row of decode.json, as far as going on with it needs."""
    runs = row.get("runs")
    return are_tokens(row.get("tokens")) and isinstance(runs, dict) and all(
        isinstance(run, dict) and all(
            isinstance(run.get(key), kind) for key, kind in RUN_KEYS.items())
        for run in runs.values())


def are_tokens(tokens: object) -> bool:
    return isinstance(tokens, list) and all(type(token) is int for token in tokens)
