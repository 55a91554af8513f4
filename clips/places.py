"""Where the files of a data set folder lie: paths that stay inside, and one listing of each folder.

Every path that an index file names must stay inside the data set folder, links followed, unless the
user allowed links to another folder.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from base import UserError, log
from machine.files import is_machine_trouble

MAX_DIGITS = 18            # of a number in a name; a longer run of digits is compared as text


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts names by the value of the numbers in them: clip_9 before clip_10."""
    parts = re.split(r"([0-9]+)", name)
    return [(1, int(part), part) if number % 2 and len(part) <= MAX_DIGITS else (0, 0, part)
            for number, part in enumerate(parts)]


def check_pattern(pattern: str | None) -> None:
    """A UserError unless this is a value of --sequence_pattern: a regular expression of one group."""
    try:
        groups = re.compile(pattern).groups if pattern is not None else 1
    except re.error as error:
        raise UserError(
            f"--sequence_pattern {pattern!r} is no regular expression: {error}") from error
    if groups != 1:
        raise UserError(f"--sequence_pattern {pattern!r} has {groups} groups in parentheses, wanted "
                        "one, around the part of a clip's path that names its sequence")


class Sequences:
    """Which sequence a clip belongs to: its folder, or what a pattern's group finds in its path."""

    def __init__(self, pattern: str | None = None):
        self.pattern = pattern and re.compile(pattern)
        self.clips = self.named = 0                  # clips in all, and those with a sequence
        self.missed: list[str] = []                  # clips that the pattern does not match

    def of(self, path: str) -> tuple[str, str]:
        """(sequence, name of the clip within it). path: of a clip, without its ending:
        "thun_00_a/000017".

        The name is what follows the sequence's folder; where the pattern takes the sequence from
        elsewhere, the whole path.
        """
        self.clips += 1
        match = self.pattern.search(path) if self.pattern else None
        if match and match[1]:
            sequence, name = match[1], path.removeprefix(f"{match[1]}/")
        else:
            sequence, _, name = path.rpartition("/")
            if self.pattern:
                self.missed.append(path)
        self.named += bool(sequence)
        return sequence, name

    def check(self, folder: Path) -> None:
        """Warn where clips don't tell their sequences; a UserError for a pattern that finds none."""
        wanted = self.pattern and f"--sequence_pattern {self.pattern.pattern!r}"
        if self.missed and len(self.missed) == self.clips:
            raise UserError(f"{wanted} finds nothing in the {self.clips} clips of {folder}, of which "
                            f"the first is {self.missed[0]!r}; wanted one that matches their paths")
        if self.missed:
            log(f"data | WARNING | {wanted} finds nothing in {len(self.missed)} of {self.clips} clips, "
                f"of which the first is {self.missed[0]!r}: their folders are their sequences")
        if self.clips and not self.named:
            log(f"data | WARNING | {folder} | nothing tells which clips are of one drive, so that "
                "training and validation may share drives: --sequence_pattern finds the sequence in "
                "a file's name")


class Places:
    """The files of one data set folder as they are while it is read."""

    def __init__(self, root: Path, allow_links: Iterable[Path] = ()):
        """allow_links: folders outside the root that links may lead to."""
        self.root = Path(os.path.realpath(root))
        self.roots = [str(self.root)]
        for folder in allow_links:
            if not folder.is_dir():
                raise UserError(f"--allow_links {folder}: no such folder; wanted one that links in "
                                f"{root} lead to")
            self.roots.append(os.path.realpath(folder))
        self._real: dict[str, str] = {}              # folder -> where it leads, links followed
        self._names: dict[str, set[str] | None] = {}

    def inside(self, *parts: str) -> Path:
        """The path root/parts with all links followed; a ValueError when that leads out of the folder.

        Where folders lead is remembered: following every path from its beginning would take most of
        the time that reading a large index takes.
        """
        path = os.path.join(self.root, *parts)
        # Half a character is a UnicodeEncodeError, a ValueError too
        if b"\0" in os.fsencode(path):
            raise ValueError("a path can't hold a null byte")
        folder, name = os.path.split(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        real = os.path.join(self._real[folder], name)
        if name in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(path)
        if not _within(os.path.normpath(path), self.roots[:1]) or not _within(real, self.roots):
            raise ValueError(f"the path {'/'.join(parts)} leaves the data set folder"
                             f"{'' if _within(real, self.roots) else f' for {real}'} (see --allow_links)")
        return Path(real)

    def has(self, path: Path) -> bool:
        """Whether this is a file that can be found; path: as inside() gives it."""
        folder = str(path.parent)
        if folder not in self._names:
            self._names[folder] = _list_files(folder)
        names = self._names[folder]
        if names is not None:
            return path.name in names
        try:                                         # a folder that may be entered and not listed
            return path.is_file()
        except PermissionError as error:
            raise _no_access(folder, error) from error
        except OSError as error:                     # a name that no disk can hold is no file
            if is_machine_trouble(error):
                raise
            return False

    def walk(self, *parts: str) -> Iterator[tuple[str, ...]]:
        """The files in this folder and all below it, as parts of their paths. Hidden files are left out.

        A link to a folder is followed if it leads to one that was allowed; no folder is visited
        twice.
        """
        yield from self._walk(parts, set())

    def _walk(self, parts: tuple[str, ...], visited: set[str]) -> Iterator[tuple[str, ...]]:
        try:
            folder = str(self.inside(*parts))
        except ValueError:
            return
        if folder in visited:
            return
        visited.add(folder)
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: natural_key(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise _no_access(folder, error) from error
        for entry in entries:
            if entry.name.startswith("."):           # what a killed writer left half done
                continue
            if _leads_to(entry.is_dir):
                yield from self._walk((*parts, entry.name), visited)
            else:
                yield (*parts, entry.name)


def _within(path: str, roots: list[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def _list_files(folder: str) -> set[str] | None:
    """The names of the files in this folder, none where there is no folder; None where it can't be
    listed.
    """
    try:
        with os.scandir(folder) as listing:
            names = {entry.name for entry in listing if _leads_to(entry.is_file)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except PermissionError:
        return None
    except OSError as error:
        if is_machine_trouble(error):
            raise _no_access(folder, error) from error
        raise
    if names and not os.access(folder, os.X_OK):
        raise _no_access(folder, PermissionError(13, os.strerror(13)))
    return names


def _leads_to(kind: Callable[[], bool]) -> bool:
    """kind(): is_file or is_dir of an entry; a link in a circle leads to neither."""
    try:
        return kind()
    except OSError:
        return False


def _no_access(folder: str, error: OSError) -> UserError:
    return UserError(f"can't read the folder {folder} of the data set: {error.strerror}; correct "
                     "its permissions, or look after its disk")
