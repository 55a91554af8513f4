"""From a raw DSEC download to a data set folder that extraction reads, for any window length.

    python prepare_dsec.py --dsec_root /data/DSEC --output_root data --split train --duration 1s

    data/my_egpt_dsec_train/my_egpt_dsec_train_1s     (test: my_egpt_dsec_test/my_egpt_dsec_seq_1s)
      event_image/<sequence>/<clip>_<k>.png           pictures of the clip's events, equally many in each
      mp4/<sequence>/<clip>.mp4                       its camera pictures as H.264, 20 a second
      prepare_dsec.json                               how it was made, and what was left out
      EventGPT_Instruction_Subset.json                one row a clip; written last: with it the folder is whole

Windows start at a sequence's first picture and then every half window, as long as they end by its last picture.
Events are read and painted in slices, so memory depends neither on the recording nor on the window. What can't be
used is named and the rest goes on; the same command makes what is missing. Only with --allow_missing is a folder
that lacks something called whole.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

import clips.dsec as dsec
from base import (
    Progress,
    UserError,
    as_json,
    check_counts,
    log,
    now,
    option,
    parse_config,
    provenance,
    required,
)
from clips.dataset import INDEX_FILE
from clips.media import (
    MAX_SIDE,
    EventPicture,
    MediaError,
    Render,
    equal_parts,
    read_event_image,
    write_png,
    write_video,
)
from machine.files import make_folder, only_writer, read_json, write_json, write_text
from machine.running import run

MADE_FILE = "prepare_dsec.json"
# What the files depend on: a folder that was begun with other values of these is not continued.
SETTINGS = ("split", "duration", "stride", "event_images", "render", "canvas", "video_size")
BLOCK = 8                          # neighbouring clips that one worker makes one after the other, at most
MOST_FRAMES_KEPT = 40              # decoded frames that wait for the next clip: 187 MB at 1440 x 1080


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Make a data set folder of one window length from raw DSEC recordings."""

    dsec_root: Path = required("the download: holds train/ and test/ with a folder for each sequence")
    split: Literal["train", "test"] = required("which of DSEC's lists of sequences")
    duration: str = required("window length: 500ms, 1s, 2s, 4s, ...")
    output_root: Path = option(Path("data"), "where the data set folder goes")
    sequences: list[str] | None = option(None, "only these, also ones that DSEC doesn't list; if not said: its list")
    stride: str = option("half", "from window to window: half of one, none (no overlap), or milliseconds")
    event_images: int = option(5, "event pictures a clip, 1 to 10, with equally many events")
    render: Render = option("time", "a pixel shows its last event (time), or blue if any was (blue_over_red)")
    canvas: str = option("640x480", "width x height of event pictures")
    video_size: str = option("1440x1080", "width x height of videos; frames of another size are resized")
    workers: int | None = option(None, "processes that make clips; if not said: one a core, 16 at most")
    allow_missing: bool = option(False, "write the index and end well although something had to be left out")
    wait: bool = option(False, "wait when another process is making this folder, instead of ending")

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d{0,5}(ms|s)", self.duration):
            raise UserError(f"--duration must be milliseconds or seconds like 500ms or 2s, got {self.duration!r}")
        if not re.fullmatch(r"half|none|[1-9]\d{0,8}", self.stride):
            raise UserError(f"--stride must be half, none or milliseconds (1 or more), got {self.stride!r}")
        for name, step in (("canvas", 1), ("video_size", 2)):
            sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", getattr(self, name))
            if not sides or not all(0 < int(side) <= MAX_SIDE and int(side) % step == 0 for side in sides.groups()):
                raise UserError(f"--{name} must be WIDTHxHEIGHT of 1 to {MAX_SIDE} px a side"
                                f"{' and even (H.264 needs it)' if step == 2 else ''}, got {getattr(self, name)!r}")
        if not 1 <= self.event_images <= 10:
            raise UserError(f"--event_images must be from 1 to 10, got {self.event_images}")
        if self.workers is None:
            object.__setattr__(self, "workers", min(16, len(os.sched_getaffinity(0))))
        check_counts(self, ("workers",))
        if not self.dsec_root.is_dir():
            raise UserError(f"--dsec_root {self.dsec_root}: no such folder; wanted that which holds train/ and test/")
        for name in self.sequences or ():
            other = "test" if self.split == "train" else "train"
            if not dsec.is_name(name) or name in dsec.SEQUENCES[other]:
                why = f"belongs to DSEC's {other} list" if dsec.is_name(name) else "is no name of a sequence"
                raise UserError(f"--sequences {name!r} {why}")

    @property
    def folder(self) -> Path:
        kind = {"train": "train", "test": "seq"}[self.split]
        return self.output_root / f"my_egpt_dsec_{self.split}" / f"my_egpt_dsec_{kind}_{self.duration}"

    @property
    def duration_us(self) -> int:
        number, unit = re.fullmatch(r"(\d+)(ms|s)", self.duration).groups()
        return int(number) * {"ms": 1000, "s": 1_000_000}[unit]

    @property
    def stride_us(self) -> int:
        known = {"half": self.duration_us // 2, "none": self.duration_us}
        return known[self.stride] if self.stride in known else int(self.stride) * 1000


def main():
    config = parse_config(PrepareConfig)
    dsec.check_reader()
    left_out = LeftOut()
    recordings = find_recordings(config, left_out)
    clips = [clip for recording in recordings for clip in clips_of(recording, config)]
    make_folder(config.folder)
    with only_writer(config.folder, config.wait):
        check_settings(config)
        make_clips(clips, config, left_out)
        finish(clips, config, left_out)


def check_settings(config: PrepareConfig) -> None:
    """A folder belongs to one set of settings; a new one is marked with them before anything is made."""
    made, wanted = config.folder / MADE_FILE, {name: getattr(config, name) for name in SETTINGS}
    if made.exists():
        found = read_json(made)
        found = found.get("settings") if isinstance(found, dict) else None
        if found != wanted:
            old = found if isinstance(found, dict) else {}
            changed = [f"--{name} {old.get(name)} there, {wanted[name]} now" for name in SETTINGS
                       if old.get(name) != wanted[name]]
            raise UserError(f"{config.folder} was made with other settings: {'; '.join(changed)}. Name another "
                            "--output_root, or remove that folder")
    elif foreign := [name for name in ("event_image", "mp4", INDEX_FILE) if (config.folder / name).exists()]:
        raise UserError(f"{config.folder} holds {', '.join(foreign)} but no {MADE_FILE}: another program made it. "
                        "Name another --output_root, or remove that folder")
    else:
        write_json(made, {"settings": wanted})


# ---------------------------------------------------------------------------------------------------- what there is
class LeftOut:
    """What could not be used and why: whole sequences (clip None) and single clips."""

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

    def as_json(self) -> list[dict]:
        return [{"sequence": sequence, "clip": clip, "reason": reason}
                for sequence, reasons in sorted(self.reasons.items()) for clip, reason in sorted(reasons.items())]

    def lines(self) -> Iterator[str]:
        """The summary: one line a sequence."""
        for sequence, reasons in sorted(self.reasons.items()):
            clips = sorted(clip for clip in reasons if clip is not None)
            named = ", ".join(f"{clip:06d}" for clip in clips[:10]) + (", ..." if len(clips) > 10 else "")
            what = f"{len(clips)} clips: {named} | the first" if clips else "the whole sequence"
            yield f"{sequence} | {what}: {reasons[clips[0] if clips else None]}"


def find_recordings(config: PrepareConfig, left_out: LeftOut) -> list[dsec.Recording]:
    """The wanted sequences that can be used; folders that nobody asked for are named."""
    wanted = sorted(set(config.sequences or dsec.SEQUENCES[config.split]))
    if others := [name for name in dsec.other_sequences(config.dsec_root, config.split) if name not in wanted]:
        log(f"prepare | not in DSEC's {config.split} list, so not used unless --sequences names them: "
            f"{', '.join(others)}")
    found = []
    for sequence in wanted:
        try:
            recording = dsec.find_recording(config.dsec_root, config.split, sequence)
            with dsec.EventFile(recording.events):
                found.append(recording)
        except MediaError as error:
            left_out.add(sequence, None, str(error))
        except OSError as error:
            left_out.add(sequence, None, f"can't be read: {error}")
    if not found:
        raise UserError(f"none of {len(wanted)} {config.split} sequences can be used; wanted in {config.dsec_root}: "
                        f"{config.split}/<sequence>/ with events/left/events.h5, images/left/rectified/*.png and "
                        "images/timestamps.txt")
    return found


@dataclasses.dataclass(frozen=True)
class Clip:
    """One window of a recording, start <= time < end, and the pictures taken in it."""

    sequence: str
    number: int
    start_us: int
    end_us: int
    events: Path
    frames: list[Path]

    @property
    def name(self) -> str:
        return f"{self.sequence}/{self.number:06d}"


def window_starts(first_us: int, last_us: int, duration_us: int, stride_us: int) -> range:
    """Where windows start: at the first picture, then every stride, as long as they end by the last picture."""
    return range(first_us, last_us - duration_us + 1, stride_us)


def clips_of(recording: dsec.Recording, config: PrepareConfig) -> list[Clip]:
    starts = window_starts(recording.times[0], recording.times[-1], config.duration_us, config.stride_us)
    if not starts:
        log(f"prepare | {recording.sequence} is shorter than {config.duration}: no clips")
    return [Clip(recording.sequence, number, start, start + config.duration_us, recording.events,
                 recording.between(start, start + config.duration_us)) for number, start in enumerate(starts)]


# -------------------------------------------------------------------------------------------------------- one clip
def size_of(text: str) -> tuple[int, int]:
    """"640x480" -> (640, 480), width and height."""
    width, height = text.split("x")
    return int(width), int(height)


def draw_events(events: dsec.EventFile, clip: Clip, config: PrepareConfig) -> list[np.ndarray]:
    """The clip's event pictures, (H, W, 3) uint8 RGB each; no more than a slice of its events is in memory."""
    first, last = events.between(clip.start_us, clip.end_us)
    (width, height), pictures = size_of(config.canvas), []
    for start, end in equal_parts(last - first, config.event_images):
        picture = EventPicture(height, width, config.render)
        for x, y, p in events.slices(first + start, first + end):
            picture.paint(x, y, p)
        pictures.append(picture.image())
    return pictures


def read_frame(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A camera picture -> (H, W, 3) uint8 RGB of this width and height."""
    frame = read_event_image(path)
    if frame.shape[1::-1] != size:
        frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    return frame


def make_clip(events: dsec.EventFile, clip: Clip, config: PrepareConfig, frame_of: Callable) -> None:
    """Write the clip's files. All is read before the first is there, but for the frames: the video is first."""
    if not clip.frames:
        raise MediaError("no pictures")
    pictures = draw_events(events, clip, config)
    # One thread: other clips keep the other cores busy, and the bytes don't depend on their number.
    write_video(config.folder / "mp4" / f"{clip.name}.mp4", map(frame_of, clip.frames), threads=1)
    for name, picture in zip(picture_names(clip, config), pictures):
        write_png(config.folder / "event_image" / name, picture)


def make_block(clips: list[Clip], config: PrepareConfig) -> list[str | None]:
    """Make neighbouring clips of one sequence; -> why each could not be made, None if it was.

    Frames that two of them share are decoded once. Measured on one core with 1 s windows at full size: a sixth
    less time; reading the events once too would save another 3 % and hold half a window of them in memory.
    """
    shared = max((len({*a.frames} & {*b.frames}) for a, b in itertools.pairwise(clips)), default=0)
    frame_of = functools.lru_cache(shared if shared <= MOST_FRAMES_KEPT else 0)(
        functools.partial(read_frame, size=size_of(config.video_size)))
    reasons = []
    try:
        with dsec.EventFile(clips[0].events) as events:
            for clip in clips:
                try:
                    make_clip(events, clip, config, frame_of)
                    reasons.append(None)
                except MediaError as error:
                    reasons.append(str(error))
    except MediaError as error:                    # the file went away, or is another now
        return [str(error)] * len(clips)
    except OSError as error:                       # whatever goes wrong in reading is a MediaError
        raise UserError(f"can't write to {config.folder}: {error}") from error
    return reasons


# -------------------------------------------------------------------------------------------------------- all clips
def picture_names(clip: Clip, config: PrepareConfig) -> list[str]:
    return [f"{clip.name}_{k}.png" for k in range(config.event_images)]


def files_of(clip: Clip, config: PrepareConfig) -> list[str]:
    """Relative to the data set folder."""
    return [f"mp4/{clip.name}.mp4", *(f"event_image/{name}" for name in picture_names(clip, config))]


def tidy_folders(clips: list[Clip], folder: Path) -> set[str]:
    """Make the sequences' folders, remove what a killed run left half written; -> the whole files that are there."""
    there = set()
    for sequence in dict.fromkeys(clip.sequence for clip in clips):
        for kind in ("event_image", "mp4"):
            place = make_folder(folder / kind / sequence)
            if not place.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{place} is a link that leads out of {folder}: extraction would refuse its clips")
            for entry in os.scandir(place):
                if re.fullmatch(r"\..*\.\d+\.tmp\.(png|mp4)", entry.name):
                    os.unlink(entry)
                elif entry.stat().st_size:
                    there.add(f"{kind}/{sequence}/{entry.name}")
    return there


def make_clips(clips: list[Clip], config: PrepareConfig, left_out: LeftOut) -> None:
    """Make the clips whose files are not all there; those that can't be made go to left_out."""
    there = tidy_folders(clips, config.folder)
    missing = [clip for clip in clips if not there.issuperset(files_of(clip, config))]
    done, failed = len(clips) - len(missing), 0
    log(f"prepare | {config.folder} | {len(clips)} clips, {done} of them are there | {config.workers} workers")
    progress = Progress("prepare", len(clips), done, unit="clips")
    try:
        for block, reasons in in_workers(functools.partial(make_block, config=config),
                                         blocks_of(missing, config.workers), config.workers):
            for clip, reason in zip(block, reasons):
                if reason:
                    failed += 1
                    left_out.add(clip.sequence, clip.number, reason)
            done += len(block)
            progress.update(done, f"left out {failed}")
    except BaseException:
        tidy_folders(clips, config.folder)
        raise


def blocks_of(clips: list[Clip], workers: int) -> list[list[Clip]]:
    """Runs of neighbours in one sequence, short enough that every worker gets some."""
    size, blocks = max(1, min(BLOCK, math.ceil(len(clips) / workers))), []
    for _, group in itertools.groupby(clips, key=lambda clip: clip.sequence):
        neighbours = list(group)
        blocks += [neighbours[start:start + size] for start in range(0, len(neighbours), size)]
    return blocks


def in_workers(work: Callable, items: list, workers: int) -> Iterable[tuple]:
    """Yield (item, work(item)) as they are done. An exception or an exit here ends the workers at once."""
    if min(workers, len(items)) <= 1:
        yield from ((item, work(item)) for item in items)
        return
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(items)), multiprocessing.get_context("spawn"),
                                                  begin_worker)
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in concurrent.futures.as_completed(futures):
            yield futures.pop(future), future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a worker died, perhaps for lack of memory: the same command goes on; use fewer "
                        "--workers") from error
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def begin_worker() -> None:
    """Ctrl-C is the main process's to handle; when that one is gone, even by kill -9, this one ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------------------------------------------- end
def row_of(clip: Clip, config: PrepareConfig) -> dict:
    """The fields of the published data sets, then `sequence` and `clip`. The id is the same whenever it is made."""
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{config.folder.name}/{clip.name}")),
            "split": config.folder.name, "event_data": f"{clip.name}.npy", "video_data": clip.name,
            "mp4_data": f"{clip.name}.mp4", "event_image": picture_names(clip, config),
            "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}],
            "sequence": clip.sequence, "clip": clip.number}


def finish(clips: list[Clip], config: PrepareConfig, left_out: LeftOut) -> None:
    """Say what is missing and write the index, unless something is and that was not allowed."""
    for line in left_out.lines():
        log(f"missing | {line}")
    made, missing = config.folder / MADE_FILE, left_out.as_json()
    if read_json(made).get("left_out") != missing:
        write_json(made, {"settings": {name: getattr(config, name) for name in SETTINGS}, "date": now(),
                          "config": as_json(config), "left_out": missing, "provenance": provenance()})
    rows = [row_of(clip, config) for clip in clips if clip.number not in left_out.reasons.get(clip.sequence, ())]
    rows.sort(key=lambda row: row["event_data"])
    if not rows:
        raise UserError(f"{config.folder}: not one clip could be made; {left_out}")
    if left_out.reasons and not config.allow_missing:
        raise UserError(f"{config.folder} is not whole: {left_out}, {len(rows)} clips are there. No index was "
                        "written: mend what the lines above name and run this again, or add --allow_missing")
    index, text = config.folder / INDEX_FILE, json.dumps(rows, indent=2)
    changed = not index.exists() or index.read_text("utf-8") != text
    if changed:
        write_text(index, text)
    log(f"RESULT | {config.folder} | {len(rows)} clips of {len({row['sequence'] for row in rows})} sequences | "
        f"{left_out}{'' if changed else ' | nothing to do, all was there'}")


if __name__ == "__main__":
    run(main)
