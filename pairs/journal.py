"""What an extraction has answered so far, on the disk beside its output: the same command goes on there.

    .<output>.journal.jsonl         first line: the settings, and for each clip a digest of its
                                    files; then the facts of a model, an answer, or a clip that
                                    failed, a line
    .<output>.journal.rank1.jsonl   the same of the second of several processes, and so on
    .<output>.lock                  locked while a process writes; its text says which one

Rows are found by model, clip and question. Imports no torch.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from base import UserError, log
from machine.journal import START_AFRESH, JournalFile

# Model -> clip's key -> digest of the files it sees
Content = dict[str, dict[str, str]]
FACTS = {"model": str, "vocab_size": int}        # a line with facts of a loaded model
FAILED = {"model": str, "key": str, "failed": dict}       # a clip that this model could not answer
ANSWER = {"model": str, "key": str, "question_idx": int, "tokens": list, "text": str,
          "finished": bool}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting that answers depend on."""

    value: object
    models: tuple[str, ...]          # the models whose answers depend on it


# What files of earlier versions, which do not name these settings, were made with.
EARLIER_SETTINGS = {"draft_sees": "events", "fresh_sequences": False}


def differences(there: dict, wanted: dict) -> str:
    """Each name whose value there is not the wanted one, with both values."""
    there = {**EARLIER_SETTINGS, **there}
    return "; ".join(f"{name}: {json.dumps(there.get(name))} there, {json.dumps(wanted[name])} now"
                     for name in wanted if there.get(name) != wanted[name])


class Recorded:
    """The answers in one journal file, as they were written; in memory is only where each one's line begins.

    So a million answers fit.
    """

    def __init__(self, path: Path):
        """Read all of it. A last line that is being written, or was never finished, is left out."""
        self.path = path
        # (model, question number) -> {sample key: offset of the line}; flat keys would take twice
        # the memory
        self.places: dict[tuple[str, int], dict[str, int]] = collections.defaultdict(dict)
        self.models: dict[str, dict] = {}        # model -> name, revision, vocab_size, prompt, ...
        self.failed: dict[str, dict[str, dict]] = {}     # model -> {sample key: row of `failed`}
        self.file = JournalFile(path, is_entry)
        self._read()

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    def _read(self) -> None:
        """Note where each answer is; a later one to the same question counts."""
        self.places.clear()
        self.models.clear()
        self.failed.clear()
        for offset, entry in self.file.lines():
            self._take(entry, offset)

    def _take(self, entry: dict, offset: int) -> None:
        if "vocab_size" in entry:
            self.models[entry["model"]] = entry
        elif "failed" in entry:
            self.failed.setdefault(entry["model"], {})[entry["key"]] = entry["failed"]
        else:
            self.places[entry["model"], entry["question_idx"]][sys.intern(entry["key"])] = offset

    def check(self, settings: dict[str, Setting], content: Content) -> Content:
        """The digests in the first line; a UserError when an answer depends on what differs now."""
        head = self.file.head
        if not head:
            return {}
        there, before = head.get("settings"), head.get("clips", {})
        if not isinstance(there, dict) or not is_content(before):
            raise UserError(f"{self.path} is no journal of an extraction; {START_AFRESH}")
        answered = {model for model, _ in self.places}
        binding = {name: setting.value for name, setting in settings.items()
                   if answered.intersection(setting.models)}
        reasons = [differences(there, binding), self._changed_clips(before, content)]
        if differs := "; ".join(filter(None, reasons)):
            raise UserError(f"{self.path} is the journal of an extraction with other settings ({differs}); "
                            f"give those again, choose another --output_file, or {START_AFRESH}")
        return before

    def _changed_clips(self, before: Content, content: Content) -> str:
        """Which answered clips had other files then, in words.

        What is known of one time only is not compared.
        """
        changed: dict[str, None] = {}
        for (model, _), keys in self.places.items():
            then, now = before.get(model, {}), content.get(model, {})
            changed |= {f"{key} ({model})": None for key in keys
                        if key in then and then[key] != now.get(key, then[key])}
        if not changed:
            return ""
        first = next(iter(changed))
        return f"the files of {len(changed)} answered clips have changed, the first: {first}"

    def has_any(self, model: str) -> bool:
        """Whether this model has answered anything."""
        return any(answering == model for answering, _ in self.places)

    def has(self, model: str, sample_key: str, question_number: int) -> bool:
        """Whether this model has answered this question about this sample."""
        return sample_key in self.places.get((model, question_number), ())

    def read(self, model: str, sample_key: str, question_number: int) -> dict:
        """That answer, from the disk."""
        entry = self.file.read(self.places[model, question_number][sample_key])
        wanted = {"model": model, "key": sample_key, "question_idx": question_number}
        if any(entry.get(name) != value for name, value in wanted.items()):
            raise UserError(f"{self.path}: the answer of {model} to question {question_number} "
                            f"about {sample_key} is not where it was written; the file was "
                            "changed: give the same command again")
        return entry

    def close(self) -> None:
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


class Journal(Recorded):
    """A journal that is written: answers in the order in which they came."""

    def __init__(self, output_file: Path, settings: dict[str, Setting],
                 content: Content | None = None, entries: Iterable[dict] = (), rank: int = 0):
        """Open the journal of this output, or begin it with `entries`: facts and answers of an earlier run.

        content: of the clips now; a clip that was answered when its files were others is not gone
        on with. rank: of the process that writes it. Raises UserError, and changes nothing, when the
        answers there were made with other settings or files.
        """
        super().__init__(self.path_of(output_file, rank))
        content = content or {}
        before = self.check(settings, content)
        clips = {model: {**before.get(model, {}), **content[model]} for model in content}
        head = {"settings": {name: setting.value for name, setting in settings.items()},
                "clips": clips or before}
        if self.file.begin(head, entries):
            self._read()
        if self.places:
            log(f"extract | {self.path} | going on: {len(self)} answers are there already")

    @staticmethod
    def path_of(output_file: Path, rank: int = 0) -> Path:
        """Where the process of this rank writes its journal; the only one has rank 0."""
        part = f".rank{rank}" if rank else ""
        return output_file.with_name(f".{output_file.name}.journal{part}.jsonl")

    # ------------------------------------------------------------------------------------- answers
    def append(self, entries: list[dict]) -> None:
        """Put entries on the disk, then note where they are."""
        for entry, offset in zip(entries, self.file.append(entries)):
            self._take(entry, offset)
        self.file.check_place()


def is_content(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(digests, dict) for digests in value.values())


def is_entry(value: dict) -> bool:
    """Whether a line holds the facts of a model or an answer."""
    kinds = FACTS if "vocab_size" in value else FAILED if "failed" in value else ANSWER
    if not all(isinstance(value.get(name), kind) for name, kind in kinds.items()):
        return False
    return all(type(token) is int for token in value.get("tokens", ()))
