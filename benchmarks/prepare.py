"""From a raw recording to a data set folder: `python benchmark.py prepare`.

Times how fast events are painted, compared with a plain loop over them and with a copy of their
bytes. Then it writes a synthetic recording in DSEC's layout and runs prepare_dsec.py on it, while
the memory of all its processes is sampled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

import clips.dsec as dsec
from base import ROOT, UserError, check_counts, log, option
from clips.events import EventPicture
from clips.pictures import write_png
from clips.windows import size_of

HEIGHT, WIDTH = 480, 640
EVENT_BYTES = 5                    # that painting reads: x and y in two bytes each, p in one
FILE_BYTES = 4                     # of the event file for each event: 2.9 were measured
FPS, DISTINCT_FRAMES = 20, 40      # camera pictures a second; different ones, which come in turn
PART_EVENTS = 2**20                # drawn and written at a time
SEQUENCE = "synthetic_00_a"
REPEATS = 3

NOTES = (
    "Paint: events a second in one thread, columns as in the file, at random places; the loop paints one "
    "event after the other. Share of copy: of the events whose columns one thread could copy in that time.",
    "Read: all columns of the recording through HDF5 and Blosc, times and polarity checked.",
    "Prepare: prepare_dsec.py as a process of its own. Memory: resident memory of all its processes, the "
    "highest of samples 20 ms apart; pages that processes share count in each of them.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the painting of events; time and memory from a recording to its data set folder."""

    events: int = option(300_000_000, "of the recording")
    seconds: int = option(30, "length of the recording")
    duration: str = option("1s", "window length of the data set")
    workers: int | None = option(None, "processes of prepare_dsec.py; if not said: its default")
    video_size: str = option("1440x1080", "width x height of the camera pictures and of the videos")
    painted: int = option(20_000_000,
                          "events to time painting with; the loop paints a hundredth of them")
    output: Path = option(Path("benchmark_prepare.json"), "where all numbers go")
    compare: Path | None = option(None,
                                  "an earlier output: print old, new and ratio of each figure")
    seed: int = option(42, "of events and pictures")

    def __post_init__(self):
        check_counts(self, ("seconds", *(["workers"] if self.workers is not None else [])))
        for name in ("events", "painted"):
            if getattr(self, name) < 1000:
                raise UserError(f"--{name} must be 1000 or more, got {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, got {self.seed}")


# -------------------------------------------------------------------------------------- a recording
def write_events(path: Path, parts: Iterable[tuple], t_offset: int, chunk: int = 2**16) -> None:
    """events.h5 as DSEC's: columns packed with Blosc/ZSTD, t relative to t_offset in uint32, and ms_to_idx.

    parts: x, y, p, t (us, never falling, the first part not empty) one after the other.
    """
    import h5py
    import hdf5plugin

    packed = dict(hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE))
    table: list[int] = []
    count = 0
    with h5py.File(path, "w") as file:
        columns = {
            name: file.create_dataset(f"events/{name}", (0, ), dtype, maxshape=(None, ),
                                      chunks=(chunk, ), **packed)
            for name, dtype in (("x", "u2"), ("y", "u2"), ("p", "u1"), ("t", "u4"))
        }
        for part in parts:
            for name, values in zip("xypt", part):
                columns[name].resize((count + len(values),))
                columns[name][count:] = values
            times = np.asarray(part[3])
            starts = 1000 * np.arange(len(table),
                                      int(times[-1]) // 1000 + 1)  # of each millisecond begun so far
            table += np.asarray(count + np.searchsorted(times, starts)).tolist()
            count += len(times)
        file.create_dataset("ms_to_idx", data=np.array(table, np.uint64), **packed)
        file.create_dataset("t_offset", data=np.int64(t_offset))


def synthetic_events(count: int, seconds: float, seed: int) -> Iterator[tuple]:
    """x, y, p, t in parts: random places and signs (real events resemble their neighbours), even
    times.
    """
    random = np.random.default_rng(seed)
    for start in range(0, count, PART_EVENTS):
        size = min(PART_EVENTS, count - start)
        t = (np.arange(start, start + size) * (seconds * 1e6 / count)).astype(np.uint32)
        yield (random.integers(0, WIDTH, size, np.uint16),
               random.integers(0, HEIGHT, size, np.uint16),
               random.integers(0, 2, size, np.uint8), t)


@dataclasses.dataclass(frozen=True)
class Recording:
    """Sizes of a synthetic recording."""

    events: int
    seconds: int
    picture_size: str              # 1440x1080
    seed: int


def write_recording(root: Path, recording: Recording) -> None:
    """One sequence of the test split. Its pictures are few, each under many names: encoding takes
    longest.
    """
    from PIL import Image

    folder, t_offset = root / "test" / SEQUENCE, 50_000_000_000
    pictures = folder / "images" / "left" / "rectified"
    pictures.mkdir(parents=True)
    (folder / "events" / "left").mkdir(parents=True)
    write_events(folder / "events" / "left" / "events.h5",
                 synthetic_events(recording.events, recording.seconds, recording.seed), t_offset)
    width, height = size_of(recording.picture_size)
    random, count = np.random.default_rng(recording.seed), FPS * recording.seconds + 1
    scene = Image.fromarray(random.integers(0, 256, (height // 9, width // 8, 3), np.uint8))
    scene = np.asarray(scene.resize((2 * width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    for number in range(count):
        # The camera turns; each pixel has noise of its own
        if number < DISTINCT_FRAMES:
            left = number * width // DISTINCT_FRAMES
            frame = scene[:, left:left + width] + random.normal(0, 2, (height, width, 3)).astype(np.int16)
            write_png(pictures / f"{number:06d}.png", frame.clip(0, 255).astype(np.uint8))
        else:
            os.link(pictures / f"{number % DISTINCT_FRAMES:06d}.png", pictures / f"{number:06d}.png")
    times = (t_offset + 280 + number * 1_000_000 // FPS for number in range(count))
    (folder / "images" / "timestamps.txt").write_text("".join(f"{time}\n" for time in times))


# ------------------------------------------------------------------------------------------ measure
def plain_loop(x: np.ndarray, y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The usual first version; equal to the renderer `time`."""
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    for column, row, sign in zip(x, y, p):
        image[row, column] = (255, 0, 0) if sign else (0, 0, 255)
    return image


def time_painting(events: int, seed: int) -> dict:
    """Events a second of both renderers and of the loop, and their shares of what a copy would
    reach.
    """
    import torch

    from benchmarks.limits import copy_rate
    from machine.timing import median_s

    torch.set_num_threads(1)
    device, few = torch.device("cpu"), events // 100
    parts = synthetic_events(events, 1, seed)
    x, y, p = (np.concatenate(column) for column in list(zip(*parts))[:3])

    def paint(render):
        picture = EventPicture(HEIGHT, WIDTH, render)
        for start in range(0, len(x), dsec.SLICE):         # as prepare_dsec.py does
            part = slice(start, start + dsec.SLICE)
            picture.paint(x[part], y[part], p[part])
        return picture.image()

    paint("time")                                          # the first call takes longer
    rates = {render: len(x) / median_s(functools.partial(paint, render), device, REPEATS)
             for render in ("time", "blue_over_red")}
    rates["loop"] = few / median_s(lambda: plain_loop(x[:few], y[:few], p[:few]), device, REPEATS)
    copied = copy_rate(device)                             # bytes a second, read and written
    return {"events_per_s": rates, "copy_bytes_per_s": copied,
            "over_loop": {render: rates[render] / rates["loop"]
                          for render in ("time", "blue_over_red")},
            "share_of_copy": {name: rate * 2 * EVENT_BYTES / copied
                              for name, rate in rates.items()}}


def time_reading(path: Path, events: int) -> float:
    """Events a second from the file, which lies in the page cache."""
    start = time.perf_counter()
    with dsec.EventFile(path) as file:
        count = sum(len(x) for x, _, _ in file.slices(0, file.count))
    assert count == events
    return count / (time.perf_counter() - start)


def tree_mib(pid: int) -> list[float]:
    """Resident memory of a process and of all that it started, as far as they still run."""
    sizes = []
    with contextlib.suppress(OSError):                     # it ended meanwhile
        status = Path(f"/proc/{pid}/status").read_text()
        sizes = [int(size) / 1024 for size in re.findall(r"^VmRSS:\s+(\d+)", status, re.M)]
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            sizes += tree_mib(int(child))
    return sizes


def time_preparing(root: Path, flags: list[str]) -> dict:
    """Run prepare_dsec.py on the recording in root, and watch the memory of its processes."""
    command = [sys.executable, str(ROOT / "prepare_dsec.py"), "--dsec_root", str(root), "--output_root",
               str(root / "data"), "--split", "test", "--sequences", SEQUENCE, *flags]
    start, peak, largest = time.perf_counter(), 0.0, 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while process.poll() is None:
            sizes = tree_mib(process.pid)
            peak = max(peak, sum(sizes))
            largest = max([largest, *sizes])
            time.sleep(0.02)
        log_text = process.stdout.read()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise UserError(f"prepare_dsec.py ended with status {process.returncode}: "
                        f"{log_text.splitlines()[-1]}")
    folder, = (root / "data" / "my_egpt_dsec_test").iterdir()
    videos = [*folder.glob("mp4/*/*.mp4")]
    pictures = [*folder.glob("event_image/*/*.png")]
    return {"seconds": seconds, "clips": len(videos), "clips_per_s": len(videos) / seconds,
            "peak_mib": peak, "largest_process_mib": largest,
            "mp4_mib": sum(path.stat().st_size for path in videos) / 2**20,
            "png_mib": sum(path.stat().st_size for path in pictures) / 2**20}


def measure(config: Config) -> dict:
    """The benchmark's main: nothing below it is given the configuration."""
    if not Path("/proc/self/task").exists():
        raise UserError("memory is read from /proc, which this system lacks; run this benchmark on Linux")
    dsec.check_reader()
    log(f"benchmark | painting {config.painted} events")
    paint = time_painting(config.painted, config.seed)
    recording = Recording(config.events, config.seconds, config.video_size, config.seed)
    flags = ["--duration", config.duration, "--video_size", config.video_size]
    if config.workers:
        flags += ["--workers", str(config.workers)]
    with tempfile.TemporaryDirectory(prefix="recording_") as folder:
        check_room(Path(folder), config.events)
        log(f"benchmark | writing a recording of {config.seconds} s with {config.events} events")
        write_recording(Path(folder), recording)
        events = Path(folder, "test", SEQUENCE, "events", "left", "events.h5")
        read = {"events_per_s": time_reading(events, config.events),
                "file_mib": events.stat().st_size / 2**20}
        log("benchmark | prepare_dsec.py")
        preparation = time_preparing(Path(folder), flags)
    return {"what": list(NOTES), "device": f"CPU, {os.cpu_count()} cores", "paint": paint, "read": read,
            "prepare": preparation, "wanted_of": f"of {config.events} events in {config.seconds} s",
            "wanted": [{"what": "peak memory of all processes, MiB",
                        "measured": preparation["peak_mib"], "wanted": "<= 2048"}]}


def check_room(folder: Path, events: int) -> None:
    """A UserError unless the disk has room for the recording and its data set folder."""
    need, free = events * FILE_BYTES + 2**30, shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"{events} events take about {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} "
                        "are free; set TMPDIR to a folder with more room, or use fewer --events")


def show(results: dict) -> None:
    """The table, as log lines."""
    for line in results["what"]:
        log(f"benchmark | {line}")
    paint, read, folder = results["paint"], results["read"], results["prepare"]
    for name, rate in paint["events_per_s"].items():
        log(f"table | paint {name} | {rate / 1e6:.1f} million events/s | share of copy "
            f"{paint['share_of_copy'][name]:.2%}" +
            (f" | {paint['over_loop'][name]:.0f} x the loop" if name in paint["over_loop"] else ""))
    log(f"table | copy | {paint['copy_bytes_per_s'] / 1e9:.1f} GB/s read and written")
    log(f"table | read | {read['events_per_s'] / 1e6:.1f} million events/s | file "
        f"{read['file_mib']:.0f} MiB")
    log(f"table | prepare | {folder['clips']} clips in {folder['seconds']:.1f} s, "
        f"{folder['clips_per_s']:.2f} a second | peak {folder['peak_mib']:.0f} MiB, largest process "
        f"{folder['largest_process_mib']:.0f} | mp4 {folder['mp4_mib']:.1f} MiB, event pictures "
        f"{folder['png_mib']:.1f} MiB")


def one_line(results: dict) -> str:
    paint, folder = results["paint"], results["prepare"]
    return (f"painted {paint['events_per_s']['time'] / 1e6:.0f} million events/s, "
            f"{paint['over_loop']['time']:.0f} times the loop; {folder['clips_per_s']:.2f} clips/s, "
            f"peak {folder['peak_mib']:.0f} MiB")
