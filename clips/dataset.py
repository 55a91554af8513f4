"""A data set folder: its clips, and what each model sees of them.

    EventGPT_Instruction_Subset.json     one row a clip, sorted; without it the clips are found by their paths
    event_image/<sequence>/<clip>_<k>.png   event pictures, k = 0..4
    event_npy/<sequence>/<clip>.npy         raw events, used where a clip has no pictures
    mp4/<sequence>/<clip>.mp4               the video

Every path that an index file names must stay inside the folder.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from base import UserError, log
from clips.event_files import read_events
from clips.events import event_frames
from clips.limits import MediaError
from clips.pictures import read_event_image
from clips.videos import read_video
from machine.files import read_json

INDEX_FILE = "EventGPT_Instruction_Subset.json"
MAX_DIGITS = 18            # of a clip's number; a longer one is a name


@dataclasses.dataclass(frozen=True)
class Sample:
    """One clip: where its pictures, raw events and video should be; `trouble` when the row itself is unusable."""

    index: int
    id: str
    sequence: str                     # interlaken_00_a
    clip: int | str                   # 17 for 000017
    event_images: tuple[Path, ...] = ()
    events: Path | None = None
    video: Path | None = None
    trouble: str | None = None

    @property
    def key(self) -> str:
        return f"{self.sequence}/{self.clip}" if self.sequence else str(self.clip) or self.id


def read_dataset(folder: Path) -> list[Sample]:
    """The clips of a data set folder in the order of its index file, or of their paths where there is none."""
    if not folder.is_dir():
        raise UserError(f"no such data set folder: {folder}")
    index = folder / INDEX_FILE
    if not index.is_file():           # older sets name it otherwise
        others = [path for path in sorted(folder.glob("*.json"))
                  if "instruction" in path.name.lower() and "output" not in path.name.lower()]
        index = others[0] if others else None
    if index:
        rows = read_json(index)
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{index}: wanted a list of clips, found "
                            f"{f'{len(rows)} of them' if isinstance(rows, list) else type(rows).__name__}")
    else:
        rows = rows_by_path(folder)
        if not rows:
            raise UserError(f"{folder} holds no data set: found neither {INDEX_FILE} nor pictures in event_image/ "
                            "nor videos in mp4/")
    log(f"data | {folder} | {len(rows)} clips from {index.name if index else 'the paths in event_image/ and mp4/'}")
    samples, seen, inside = [], set(), functools.partial(path_inside, folder.resolve(), {})
    for number, row in enumerate(rows):
        sample = read_row(inside, number, row)
        if sample.key in seen and not sample.trouble:
            sample = dataclasses.replace(sample, trouble=f"{index.name if index else folder} lists the clip twice")
        seen.add(sample.key)
        samples.append(sample)
    return samples


def index_row(set_name: str, clip_name: str, pictures: list[str]) -> dict:
    """The fields of the published data sets. The id is the same whenever the set is made."""
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{set_name}/{clip_name}")), "split": set_name,
            "event_data": f"{clip_name}.npy", "video_data": clip_name, "mp4_data": f"{clip_name}.mp4",
            "event_image": pictures,
            "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}]}


def rows_by_path(folder: Path) -> list[dict]:
    """Rows like those of the index file from event_image/**/<clip>_<k>.png and mp4/**/<clip>.mp4 alone."""
    clips = collections.defaultdict(list)
    for path in sorted((folder / "event_image").rglob("[!.]*.png")):      # .*: what a killed writer left half done
        relative = path.relative_to(folder / "event_image")
        clips[(relative.parent / re.sub(r"_\d$", "", relative.stem)).as_posix()].append(relative.as_posix())
    for path in (folder / "mp4").rglob("[!.]*.mp4"):
        clips[path.relative_to(folder / "mp4").with_suffix("").as_posix()] += []
    return [{"video_data": clip, "event_image": pictures} for clip, pictures in sorted(clips.items())]


def path_inside(root: Path, folders: dict[str, str], *parts: str) -> Path:
    """The path root/parts with all links followed; a ValueError when that leads out of the root.

    folders: remembers where folders lead. To follow every path from its beginning would take most of the time that
    reading a large index takes.
    """
    path = os.path.join(root, *parts)
    if b"\0" in os.fsencode(path):               # nor can half a character be in a name: a UnicodeEncodeError
        raise ValueError("a path can't hold a null byte")
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    real = os.path.join(folders[folder], name)
    if name in ("", ".", "..") or os.path.islink(real):
        real = os.path.realpath(path)
    if real != str(root) and not real.startswith(f"{root}{os.sep}"):
        raise ValueError(f"the path {'/'.join(parts)} leaves the data set folder")
    return Path(real)


def read_row(inside: Callable[..., Path], number: int, row) -> Sample:
    """One row of the index file -> Sample. The forms met in the wild differ in which fields they have.

    inside: a path in the data set folder from its parts.
    """
    row = row if isinstance(row, dict) else {}
    names = {name: row[name] for name in ("event_data", "video_data", "mp4_data") if isinstance(row.get(name), str)}
    pictures = row.get("event_image")
    pictures = [pictures] if isinstance(pictures, str) else pictures if isinstance(pictures, list) else []
    pictures = [name for name in pictures if isinstance(name, str)]
    # event_data names the clip; older rows have no clip in video_data ("interlaken_00_a").
    stems = [re.sub(r"\.(npy|mp4)$", "", name) for name in names.values()]
    stems += [re.sub(r"(_\d)?\.\w+$", "", name) for name in pictures[:1]]
    sample_id = str(row["id"]) if isinstance(row.get("id"), (str, int)) else stems[0] if stems else str(number)
    if not stems:
        return Sample(number, sample_id, "", "", trouble="the row names no event_data, video_data or event_image")
    sequence, _, clip = stems[0].rpartition("/")
    clip = int(clip) if clip.isascii() and clip.isdigit() and len(clip) <= MAX_DIGITS else clip

    try:
        images = [inside("event_image", name) for name in pictures]
        if not images:                # the index was written before the pictures were rendered
            images = [inside(path) for path in sorted(inside("event_image", stems[0]).parent.glob(
                re.sub(r"([*?[])", r"[\1]", Path(stems[0]).name) + "_[0-9].png"))]
        videos = [inside("mp4", f"{stem}.mp4") for stem in dict.fromkeys(stems)]
        events = inside("event_npy", names["event_data"]) if "event_data" in names else None
        video = next((path for path in videos if path.is_file()), videos[0])
    except (ValueError, OSError, RuntimeError) as error:         # bytes of 0, names too long, links in a circle
        return Sample(number, sample_id, sequence, clip, trouble=str(error))
    return Sample(number, sample_id, sequence, clip, tuple(images), events, video)


def content_of(samples: list[Sample], which: Literal["first", "all"]) -> dict[str, dict[str, str]]:
    """Model -> clip's key -> digest of the names and sizes of the files that the model sees of the clip.

    Cheap enough for ten thousand clips at every start. Times are left out: copying a data set changes them.
    """
    found = {"eventgpt": {}, "videollava": {}}
    for sample in samples:
        pictures = sample.event_images[:1] if which == "first" else sample.event_images
        if not sample.trouble:
            found["eventgpt"][sample.key] = digest_of(pictures or [sample.events])
            found["videollava"][sample.key] = digest_of([sample.video])
    return found


def digest_of(paths: Iterable[Path | None]) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for path in paths:
        try:
            size = os.stat(path).st_size if path else -1
        except OSError:
            size = -1                 # missing: the clip will fail, and may be mended later
        digest.update(f"{path.name if path else ''}\0{size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def draft_pictures(sample: Sample, which: Literal["first", "all"]) -> list[np.ndarray]:
    """What EventGPT sees: the event PNGs; where a row lists none, pictures rendered from its raw events."""
    if sample.event_images:
        wanted = sample.event_images[:1] if which == "first" else sample.event_images
        return [read_event_image(path) for path in wanted]
    if sample.events is None or not sample.events.is_file():
        raise MediaError("no event picture listed or found in event_image/, and no raw events in event_npy/")
    pictures = event_frames(read_events(sample.events))
    return pictures[:1] if which == "first" else pictures


def target_pictures(sample: Sample, num_frames: int) -> list[np.ndarray]:
    """What Video-LLaVA sees: frames of the clip's MP4."""
    return read_video(sample.video, num_frames)


def read_ahead(prepare: Callable, samples: Iterable[Sample], workers: int, ahead: int) -> Iterator[tuple]:
    """Yield (sample, prepared or the MediaError) in order, while threads work on the next `ahead` samples."""
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        waiting, remaining = collections.deque(), iter(samples)
        while True:
            while len(waiting) < max(ahead, workers) and (sample := next(remaining, None)) is not None:
                waiting.append((sample, pool.submit(prepare, sample)))
            if not waiting:
                return
            sample, future = waiting.popleft()
            try:
                result = future.result()
            except MediaError as error:
                result = error
            yield sample, result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
