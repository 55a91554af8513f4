"""The journals of all processes of an extraction, read as one; each process writes its own.

A file has one writer, so no lock is needed on a shared disk. Journals of earlier starts, of however
many processes, are read too: nothing is done twice. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from base import UserError, log
from machine.files import check_plain, sync_folder
from pairs.journal import Content, Journal, Recorded, Setting


def journals_of(output_file: Path) -> list[Path]:
    """The journals beside this output: of its first process, then by rank."""
    first = Journal.path_of(output_file)
    pattern = re.compile(rf"\.{re.escape(output_file.name)}\.journal\.rank(\d+)\.jsonl")
    ranks = sorted(int(match[1]) for path in output_file.absolute().parent.iterdir()
                   if (match := pattern.fullmatch(path.name)))
    paths = [first, *(Journal.path_of(output_file, rank) for rank in ranks if rank)]
    return [path for path in paths if path.exists() or path.is_symlink()]


class Merged:
    """The answers of several journals; where two have the same one, that of the first counts."""

    def __init__(self, parts: Iterable[Recorded]):
        self.parts = list(parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def models(self) -> dict[str, dict]:
        """Model -> the facts that were recorded of it, by the first journal that has any."""
        return {name: facts for part in reversed(self.parts) for name, facts in part.models.items()}

    def has(self, model: str, sample_key: str, question_number: int) -> bool:
        return any(part.has(model, sample_key, question_number) for part in self.parts)

    def read(self, model: str, sample_key: str, question_number: int) -> dict:
        """That answer, from the disk."""
        for part in self.parts:
            if part.has(model, sample_key, question_number):
                return part.read(model, sample_key, question_number)
        raise UserError(f"{self.parts[0].path}: neither there nor in the journals beside it is the "
                        f"answer of {model} to question {question_number} about {sample_key}, "
                        "which another process has given: its journal was removed, give the same "
                        "command again")

    def failed(self, model: str) -> dict[str, dict]:
        """Sample key -> row of `failed`, of clips that this model could not answer at some time."""
        rows: dict[str, dict] = {}
        for part in reversed(self.parts):
            rows |= part.failed.get(model, {})
        return rows

    def close(self) -> None:
        for part in self.parts:
            part.close()


class Journals(Merged):
    """The journal that this process writes, and those of others on this disk, which it reads."""

    def __init__(self, output_file: Path, settings: dict[str, Setting], content: Content,
                 entries: Iterable[dict] = (), rank: int = 0):
        """As for Journal: entries for a journal that is new."""
        self.output_file, self.settings, self.content = output_file, settings, content
        self.own = Journal(output_file, settings, content, entries, rank)
        super().__init__([self.own])
        self.refresh()

    def refresh(self) -> None:
        """Read what the other processes have written until now."""
        for part in self.parts[1:]:
            part.close()
        others = [Recorded(path) for path in journals_of(self.output_file) if path != self.own.path]
        for part in others:
            part.check(self.settings, self.content)
            part.file.open_reader()
        self.parts = [self.own, *others]

    @property
    def run(self) -> str:
        """What tells the journal of this start from others of the same name."""
        return self.own.file.head.get("run", "")

    def append(self, entries: list[dict]) -> None:
        self.own.append(entries)

    def remove(self) -> None:
        """The output is whole: the journals have done their work."""
        if len(self.parts) == 1:
            self.own.path.unlink(missing_ok=True)
            return
        # Renamed, it says that the output is whole, until the last of the others is gone.
        self.own.path.rename(merged_mark(self.output_file))
        sync_folder(self.output_file.absolute().parent)
        finish_removal(self.output_file)

    def __enter__(self) -> Journals:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()
        if kind is not None and len(self):
            log(f"extract | {len(self)} answers are kept in {self.own.path}"
                f"{' and its neighbours' * (len(self.parts) > 1)}; the same command goes on from "
                "there")


def merged_mark(output_file: Path) -> Path:
    return output_file.with_name(f".{output_file.name}.merged.jsonl")


def remove_others(output_file: Path) -> None:
    """Remove the journals of all processes but the first."""
    for path in journals_of(output_file):
        if path != Journal.path_of(output_file):
            check_plain(path, follow=False)
            path.unlink(missing_ok=True)


def remove_locks(output_file: Path) -> None:
    """Remove the lock files of all processes but the first, when they have left."""
    pattern = re.compile(rf"\.{re.escape(output_file.name)}\.rank\d+\.lock")
    for path in output_file.absolute().parent.iterdir():
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


def finish_removal(output_file: Path) -> None:
    """Remove journals whose output is whole, where a crash kept that from being done."""
    mark = merged_mark(output_file)
    if mark.exists():
        remove_others(output_file)
        mark.unlink()


def discard(output_file: Path) -> None:
    """Remove the journals of this output, if there are any: that of the first process last.

    A mark that an earlier output is whole goes too: it says nothing of the journals to come.
    """
    remove_others(output_file)
    merged_mark(output_file).unlink(missing_ok=True)
    path = Journal.path_of(output_file)
    check_plain(path, follow=False)
    path.unlink(missing_ok=True)


def open_journals(paths: list[Path], settings: dict[str, Setting], content: Content) -> Merged:
    """These journals, wherever they lie, to be read; a UserError unless all have these settings."""
    parts = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"--merge: no such journal: {path}")
        part = Recorded(path)
        part.check(settings, content)
        if not part.file.head:
            raise UserError(f"{path} is no journal of an extraction: it has no first line")
        if parts and part.file.head["settings"] != parts[0].file.head["settings"]:
            raise UserError(f"{path} and {paths[0]} were made with different settings; merge "
                            "journals of one command")
        part.file.open_reader()
        parts.append(part)
    return Merged(parts)
