"""A data set folder: its clips, and what each model sees of them.

    EventGPT_Instruction_Subset.json     one row a clip, sorted; without it the clips are found by their paths
    event_image/<sequence>/<clip>_<k>.png   event pictures, k = 0..4
    event_npy/<sequence>/<clip>.npy         raw events, used where a clip has no pictures
    mp4/<sequence>/<clip>.mp4               the video

A folder with none of these is a folder of videos: each video in it and below it is a clip.

Every path that an index file names must stay inside the folder (places.py).

A file that is missing, damaged or not listed is the fault of one clip: MediaError. A file that was
there when the folder was read and is gone, and an error of the machine, is none: MachineTrouble, a
UserError that ends the run.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from base import UserError, log
from clips.event_files import read_events
from clips.events import event_frames
from clips.limits import MediaError, is_file, machine_trouble, still_there
from clips.pictures import read_event_image
from clips.places import MAX_DIGITS, Places, Sequences, natural_key
from clips.videos import read_video
from machine.files import is_machine_trouble, read_json

INDEX_FILE = "EventGPT_Instruction_Subset.json"
# Of files that FFmpeg is allowed to open (videos.CONTAINERS).
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".h264", ".hevc")
Read = TypeVar("Read")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One clip: where its files should be; `trouble` says why, where the row itself is unusable."""

    index: int
    id: str
    sequence: str                     # interlaken_00_a
    clip: int | str                   # 17 for 000017
    event_images: tuple[Path, ...] = ()
    events: Path | None = None
    video: Path | None = None
    trouble: str | None = None
    present: frozenset[Path] = frozenset()      # of these files, when the data set was read

    @property
    def key(self) -> str:
        return f"{self.sequence}/{self.clip}" if self.sequence else str(self.clip) or self.id


# ---------------------------------------------------------------------------------------- the index
def read_dataset(folder: Path, allow_links: Iterable[Path] = (),
                 sequence_pattern: str | None = None) -> list[Sample]:
    """The clips of a data set folder in the order of its index file, or of their paths where there is none.

    allow_links: folders outside the data set folder that links in it may lead to.
    sequence_pattern: as for places.Sequences.
    """
    if not folder.is_dir():
        raise UserError(f"no such data set folder: {folder}")
    places = Places(folder, allow_links)
    index = find_index(folder)
    if index:
        rows = read_json(index)
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{index}: wanted a list of clips, found "
                            f"{f'{len(rows)} of them' if isinstance(rows, list) else type(rows).__name__}")
        source = index.name
    elif rows := rows_by_path(places):
        source = "the paths in event_image/ and mp4/"
    else:
        rows, source = rows_of_videos(places, folder), "a folder of videos"
    log(f"data | {folder} | {len(rows)} clips from {source}")
    samples, keys, sequences = [], set(), Sequences(sequence_pattern)
    for number, row in enumerate(rows):
        sample = read_row(places, number, row, sequences)
        if sample.key in keys and not sample.trouble:
            place = index.name if index else folder
            sample = dataclasses.replace(sample, trouble=f"{place} lists the clip twice")
        keys.add(sample.key)
        samples.append(sample)
    sequences.check(folder)
    return samples


def find_index(folder: Path) -> Path | None:
    """The index file, also under the names that older sets gave it."""
    if (folder / INDEX_FILE).is_file():
        return folder / INDEX_FILE
    others = [path for path in sorted(folder.glob("*.json")) if "instruction" in path.name.lower()]
    return next((path for path in others if "output" not in path.name.lower()), None)


def index_row(set_name: str, clip_name: str, pictures: list[str]) -> dict:
    """The fields of the published data sets. The id is the same whenever the set is made."""
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{set_name}/{clip_name}")), "split": set_name,
            "event_data": f"{clip_name}.npy", "video_data": clip_name,
            "mp4_data": f"{clip_name}.mp4",
            "event_image": pictures,
            "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}]}


def rows_by_path(places: Places) -> list[dict]:
    """Rows like those of the index file from event_image/**/<clip>_<k>.png and mp4/**/<clip>.mp4 alone."""
    clips = collections.defaultdict(list)
    for _, *parts in places.walk("event_image"):
        if parts[-1].endswith(".png"):
            name = "/".join(parts)
            clips[re.sub(r"(_\d)?\.png$", "", name)].append(name)
    for _, *parts in places.walk("mp4"):
        if parts[-1].endswith(".mp4"):
            clips["/".join(parts).removesuffix(".mp4")] += []
    return [{"video_data": clip, "event_image": clips[clip]}
            for clip in sorted(clips, key=natural_key)]


def rows_of_videos(places: Places, folder: Path) -> list[dict]:
    """Rows of a folder of videos, in natural order of their paths.

    Two videos that differ in their endings alone keep these in their clips' names.
    """
    files = list(places.walk())
    names = ["/".join(parts) for parts in files if parts[-1].lower().endswith(VIDEO_ENDINGS)]
    sets = [parts for parts in files if parts[-1] == INDEX_FILE or "event_image" in parts[:-1]]
    if sets:
        raise UserError(f"{folder} is no data set but holds some ({'/'.join(sets[0])}): name one of "
                        "them")
    if not names:
        raise UserError(f"{folder} holds no data set: found neither {INDEX_FILE} nor pictures in "
                        "event_image/ nor videos in mp4/, and no video "
                        f"({' '.join(VIDEO_ENDINGS)})")
    stems = [os.path.splitext(name)[0] for name in names]
    several = {stem for stem, count in collections.Counter(stems).items() if count > 1}
    return [{"video_data": name if stem in several else stem, "video_file": name}
            for name, stem in zip(names, stems)]


def read_row(places: Places, number: int, row, sequences: Sequences) -> Sample:
    """One row of the index file -> Sample. The forms met in the wild differ in which fields they have."""
    row = row if isinstance(row, dict) else {}
    fields = ("event_data", "video_data", "mp4_data")
    names = {name: row[name] for name in fields if isinstance(row.get(name), str)}
    pictures = row.get("event_image")
    pictures = [pictures] if isinstance(pictures,
                                        str) else pictures if isinstance(pictures, list) else []
    pictures = [name for name in pictures if isinstance(name, str)]
    # event_data names the clip; older rows have no clip in video_data ("interlaken_00_a").
    stems = [re.sub(r"\.(npy|npz|mp4)$", "", name) for name in names.values()]
    stems += [re.sub(r"(_\d)?\.\w+$", "", name) for name in pictures[:1]]
    sample_id = stems[0] if stems else str(number)
    if isinstance(row.get("id"), (str, int)):
        sample_id = str(row["id"])
    if not stems:
        trouble = "the row names no event_data, video_data or event_image"
        return Sample(number, sample_id, "", "", trouble=trouble)
    sequence, name = sequences.of(stems[0])
    clip = int(name) if name.isascii() and name.isdigit() and len(name) <= MAX_DIGITS else name

    try:
        images = [places.inside("event_image", name) for name in pictures]
        if not images:                # the index was written before the pictures were rendered
            candidates = [places.inside("event_image", f"{stems[0]}_{k}.png") for k in range(10)]
            images = [path for path in candidates if places.has(path)]
        videos = [places.inside("mp4", f"{stem}.mp4") for stem in dict.fromkeys(stems)]
        if isinstance(row.get("video_file"), str):
            videos = [places.inside(row["video_file"])]
        events = places.inside("event_npy", names["event_data"]) if "event_data" in names else None
        video = next(filter(places.has, videos), videos[0])
        files = [*images, video, *([events] if events else [])]
        present = frozenset(filter(places.has, files))
    # Null bytes, long names, circles of links
    except (ValueError, OSError, RuntimeError) as error:
        return Sample(number, sample_id, sequence, clip, trouble=str(error))
    return Sample(number, sample_id, sequence, clip, tuple(images), events, video, present=present)


def digest_of(paths: Iterable[Path | None]) -> str:
    """A digest of the names and sizes of files, None for one that a row doesn't name.

    Cheap enough for ten thousand clips at every start. Times are left out: copying a data set
    changes them.
    """
    digest = hashlib.blake2b(digest_size=4)
    for path in paths:
        name, size = (path.name if path else ""), -1
        if path:
            try:
                size = os.stat(path).st_size
            except OSError as error:      # missing: the clip will fail, and may be mended later
                if is_machine_trouble(error):
                    raise machine_trouble(path, error) from error
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


# ------------------------------------------------------------------------------ what the models see
def draft_pictures(sample: Sample, which: Literal["first", "all"]) -> list[np.ndarray]:
    """What EventGPT sees: the event PNGs; where a row lists none, pictures rendered from its raw events.

    (H, W, 3) uint8 RGB each. Raises MediaError for this clip alone, MachineTrouble to end the run.
    """
    if sample.event_images:
        paths = sample.event_images[:1] if which == "first" else sample.event_images
        return [_read_file(sample, path, read_event_image) for path in paths]
    if sample.events is None or not (sample.events in sample.present or is_file(sample.events)):
        raise MediaError("no event picture listed or found in event_image/, and no raw events in "
                         "event_npy/; clips without events need --draft_sees frames, or "
                         "--draft_model none")
    pictures = event_frames(_read_file(sample, sample.events, read_events))
    return pictures[:1] if which == "first" else pictures


def target_pictures(sample: Sample, num_frames: int) -> list[np.ndarray]:
    """What Video-LLaVA sees: frames of the clip's MP4, (H, W, 3) uint8 RGB each; raises likewise."""
    if sample.video is None:
        raise MediaError("the row names no video")
    return _read_file(sample, sample.video, lambda path: read_video(path, num_frames))


def _read_file(sample: Sample, path: Path, read: Callable[[Path], Read]) -> Read:
    with still_there(path, path in sample.present):
        return read(path)


def read_ahead(prepare: Callable, samples: Iterable[Sample], workers: int,
               ahead: int) -> Iterator[tuple]:
    """Yield (sample, prepared or the MediaError) in order, while threads work on the next `ahead`
    samples.
    """
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
