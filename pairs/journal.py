"""What an extraction has answered so far, on the disk beside its output, so that the same command goes on with it.

    .<output>.journal.jsonl   first line: the settings, and for each clip a digest of its files; then an answer a line
    .<output>.lock            locked while a process writes; its text says which one and since when

Rows are found by model, clip and question. Imports no torch.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

from base import UserError, log
from machine.files import check_plain, sync_folder, write_whole

MARK = b', "crc": '                              # in front of each line's checksum, its last item
BEGIN = b'{"settings": '
OF_TARGET = ("target_model", "num_frames")       # settings that touch the target's answers alone
Content = dict[str, dict[str, str]]              # model -> clip's key -> digest of the files that the model sees


def differences(found: dict, wanted: dict) -> str:
    return "; ".join(f"{name}: {json.dumps(found.get(name))} there, {json.dumps(wanted[name])} now"
                     for name in wanted if found.get(name) != wanted[name])


class Journal:
    """Answers in the order they came, one JSON line each, fsynced by batch; found again when a run goes on.

    A torn last line, from a crash in the middle of a write, is cut off. In memory is only where each answer's line
    begins, so that a million answers fit.
    """

    def __init__(self, output_file: Path, settings: dict, restart: bool, content: Content | None = None):
        """content: of the clips now; a clip that was answered when its files were others is not gone on with."""
        self.path = self.path_of(output_file)
        # (model, question number) -> {sample key: offset of the line}; flat keys would take twice the memory
        self.places: dict[tuple[str, int], dict[str, int]] = collections.defaultdict(dict)
        self.models: dict[str, dict] = {}                         # model -> name, revision, vocab_size, prompt
        check_plain(self.path, follow=False)
        if restart:
            self.path.unlink(missing_ok=True)
        self._read(settings, content or {})
        # Without a buffer: what a full disk refuses must not be tried again, later, by close().
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
        self.reader = open(self.path, "rb")  # noqa: SIM115 - closed by __exit__
        if self.file.tell() == 0:
            self._write([line_of({"settings": settings, "clips": content or {}})])
            sync_folder(self.path.parent)

    @staticmethod
    def path_of(output_file: Path) -> Path:
        return output_file.with_name(f".{output_file.name}.journal.jsonl")

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    # ------------------------------------------------------------------------------------------ going on
    def _read(self, settings: dict, content: Content) -> None:
        if not self.path.exists():
            return
        head, first = self._read_lines()
        if head is None:
            return
        models = {model for model, _ in self.places}
        binding = {name: settings[name] for name in settings if name not in OF_TARGET or "videollava" in models}
        before = head.get("clips") or {}
        differs = [differences(head["settings"], binding), self._changed(before, content)] if models else []
        if differs := "; ".join(filter(None, differs)):
            raise UserError(f"{self.path} is the journal of an extraction with other settings ({differs}); give "
                            "those again, choose another --output_file, or start afresh with --restart")
        # No answer depends on what differs (a clip that failed was mended, say): it goes on under the new ones.
        clips = {model: {**before.get(model, {}), **content[model]} for model in content} or before
        wanted = {"settings": settings, "clips": clips}
        if head != wanted:
            self._change_first_line(line_of(wanted), first)
        if models:
            log(f"extract | {self.path} | going on: {len(self)} answers are there already")

    def _read_lines(self) -> tuple[dict | None, int]:
        """Note where each answer is; -> (the first line's value, its length). What is damaged is done again."""
        with open(self.path, "r+b") as file:
            # first: length of the first line; at, end: behind this, the last good one; bad, inside: bad ones so far
            head, first, at, end, bad, inside = None, 0, 0, 0, 0, 0
            for number, line in enumerate(file):
                entry = entry_at(number, line)
                if number and entry:
                    self._take(entry, at)
                elif entry:
                    head, first = entry, len(line)
                elif number == 0 and not is_begun(line):
                    raise UserError(f"{self.path}: the first line of this journal is damaged, so nobody knows "
                                    "what its answers belong to; start afresh with --restart")
                at += len(line)
                if entry:
                    end, inside = at, bad
                else:
                    bad += 1
            if bad:
                log(f"extract | {self.path} | {bad} torn or damaged lines: dropped, to be done again")
            file.truncate(end)
        if inside:
            self._drop_damaged()
            return self._read_lines()
        return head, first

    def _drop_damaged(self) -> None:
        """Write the journal anew, without the damaged lines among the others."""
        def write(temporary: Path) -> None:
            with open(self.path, "rb") as before, open(temporary, "wb") as after:
                for number, line in enumerate(before):
                    if entry_at(number, line):
                        after.write(line)

        write_whole(self.path, write)
        self.places.clear()
        self.models.clear()

    def _changed(self, before: Content, content: Content) -> str:
        """Which answered clips had other files then, in words. What is known of one time only is not compared."""
        changed = {}
        for (model, _), keys in self.places.items():
            then, now = before.get(model, {}), content.get(model, {})
            changed |= {f"{key} ({model})": None for key in keys
                        if key in then and then[key] != now.get(key, then[key])}
        if not changed:
            return ""
        return f"the files of {len(changed)} answered clips have changed, the first: {next(iter(changed))}"

    def _change_first_line(self, line: bytes, old: int) -> None:
        """Put another line in place of the first, which has `old` bytes."""
        def write(temporary: Path) -> None:
            with open(self.path, "rb") as before, open(temporary, "wb") as after:
                before.seek(old)
                after.write(line)
                shutil.copyfileobj(before, after)

        write_whole(self.path, write)
        for places in self.places.values():
            for key in places:
                places[key] += len(line) - old

    def _take(self, entry: dict, offset: int) -> None:
        if "vocab_size" in entry:
            self.models[entry["model"]] = entry
        else:
            self.places[entry["model"], entry["question_idx"]][sys.intern(entry["key"])] = offset

    # ------------------------------------------------------------------------------------------ answers
    def _write(self, lines: list[bytes]) -> None:
        """All of these lines, on the disk, or none: a full disk or a signal in the middle leaves no half of them."""
        whole, left = self.file.tell(), memoryview(b"".join(lines))
        try:
            while left:
                left = left[self.file.write(left):]
            os.fsync(self.file.fileno())
        except BaseException as error:
            full = isinstance(error, OSError)
            if full or left:
                with contextlib.suppress(OSError):               # if this fails too, the next start cuts it off
                    self.file.truncate(whole)
            if full:
                error.filename = str(self.path)                  # a failed write doesn't say of which file
            raise

    def append(self, entries: list[dict]) -> None:
        """Put entries on the disk, then note where they are."""
        lines, offset = [line_of(entry) for entry in entries], self.file.tell()
        self._write(lines)
        for entry, line in zip(entries, lines):
            self._take(entry, offset)
            offset += len(line)

    def has(self, which: str, sample_key: str, question_number: int) -> bool:
        """Whether this model has answered this question about this sample."""
        return sample_key in self.places.get((which, question_number), ())

    def read(self, which: str, sample_key: str, question_number: int) -> dict:
        """That answer, from the disk."""
        self.reader.seek(self.places[which, question_number][sample_key])
        if (entry := entry_of(self.reader.readline())) is None:
            raise UserError(f"{self.path}: a line has changed since it was written; the same command, given again, "
                            "drops it")
        return entry

    def check_model(self, which: str, facts: dict) -> None:
        """The model's answers so far must be those of the same weights: a path can hold others by now."""
        then, now = self.models.get(which, facts).get("revision"), facts["revision"]
        if then != now and any(model == which for model, _ in self.places):
            raise UserError(f"{self.path} has answers of other weights of {facts['name']} ({then} there, {now} now); "
                            "choose another --output_file, or start afresh with --restart")

    def remove(self) -> None:
        """The output is whole: the journal has done its work."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.file.close()
        self.reader.close()
        if kind is not None and len(self):
            log(f"extract | {len(self)} answers are kept in {self.path}; the same command goes on from there")


def line_of(entry: dict) -> bytes:
    """A line of the journal, with its checksum."""
    text = json.dumps(entry).encode()[:-1]
    return text + MARK + b"%d}\n" % zlib.crc32(text)


def is_begun(line: bytes) -> bool:
    """Whether this is a first line that the machine did not finish: nothing came after it."""
    return not line.endswith(b"\n") and (line.startswith(BEGIN[:len(line)]) or not line.strip(b"\0"))


def entry_at(number: int, line: bytes) -> dict | None:
    """What the line of this number says; None if it is damaged or not in its place."""
    entry = entry_of(line)
    return entry if entry and ("settings" in entry) == (number == 0) else None


def entry_of(line: bytes) -> dict | None:
    """What a line says: {"settings", ...}, facts of a model or an answer; None if it is torn or damaged.

    No text can hold MARK: JSON writes its quotes with a backslash.
    """
    text, _, checksum = line.rpartition(MARK)
    if checksum != b"%d}\n" % zlib.crc32(text):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    entry.pop("crc", None)
    clips = entry.get("clips", {})
    if not isinstance(clips, dict) or not all(isinstance(digests, dict) for digests in clips.values()):
        return None
    kinds = {"settings": dict} if "settings" in entry else (
        {"model": str, "vocab_size": int} if "vocab_size" in entry else
        {"model": str, "key": str, "question_idx": int, "tokens": list, "text": str, "finished": bool})
    if not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        return None
    return entry if all(type(token) is int for token in entry.get("tokens", ())) else None
