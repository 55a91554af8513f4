"""The demo's data sets: which scene each clip shows, and their folders in the real layout.

Everything is seeded: the same clips, and the same bytes on the same kind of CPU.
"""

import functools
import json
import zlib
from pathlib import Path

import numpy as np

from base import Progress, drive_of, log
from clips.dataset import INDEX_FILE, index_row
from demo import filming
from demo.world import Scene, following_scenes, random_scene
from machine.files import make_folder, write_text
from machine.workers import cores, in_workers

SEED = 2028
DRIVES = {"train": [f"demo{place}_0{k}" for place in ("field", "hill", "town") for k in range(4)],
          "test": ["demofield_10", "demohill_10", "demolake_10", "demolake_11", "demotown_10"]}
DATA_SETS = (("train", "my_egpt_dsec_train/my_egpt_dsec_train_1s",
              20),  # split, folder, frames a clip
             ("train", "my_egpt_dsec_train/my_egpt_dsec_train_500ms",
              10), ("test", "my_egpt_dsec_test/my_egpt_dsec_seq_1s", 20),
             ("test", "my_egpt_dsec_test/my_egpt_dsec_seq_500ms", 10))
NUM_PICTURES = 5                   # event pictures a clip


def seed_of(*names: str | int) -> list[int]:
    """Names -> a seed for numpy's generators; Python's own hash differs from run to run."""
    return [SEED, *(zlib.crc32(str(name).encode()) for name in names)]


def sequences_of(split: str) -> list[str]:
    return [f"{drive}_{letter}" for drive in DRIVES[split] for letter in "ab"]


def scenes_of(sequence: str, count: int) -> list[Scene]:
    """The first `count` scenes of a sequence; its drive fixes road, light and background."""
    first = random_scene(np.random.default_rng(seed_of(drive_of(sequence))))
    return following_scenes(first, np.random.default_rng(seed_of(sequence)), count)


def make_data_sets(output_dir: Path, clips: dict[str, int]) -> None:
    """Render every data set that isn't there; a folder is whole with its index file, written last.

    clips: split -> clips of each of its data sets.
    """
    for split, name, num_frames in DATA_SETS:
        folder = output_dir / name
        if (folder / INDEX_FILE).exists():
            log(f"demo | {folder} | skipped, it is there")
            continue
        rows = render_data_set(folder, sequences_of(split), clips[split], num_frames,
                               min(16, cores()))
        log(f"RESULT | {folder} | {len(rows)} clips of {num_frames} frames")


def clips_per_sequence(clips: int, sequences: int) -> list[int]:
    """Spread the clips over the sequences, at least one each."""
    return [max(1, (clips + number) // sequences) for number in range(sequences)]


def render_data_set(folder: Path, sequences: list[str], clips: int, num_frames: int,
                    workers: int = 1) -> list[dict]:
    """Render `clips` clips, spread over the sequences, and write the index file; -> its rows."""
    scenes = {}
    for sequence, count in zip(sequences, clips_per_sequence(clips, len(sequences))):
        make_folder(folder / "event_image" / sequence)
        make_folder(folder / "mp4" / sequence)
        scenes |= {f"{sequence}/{clip:06d}": scene
                   for clip, scene in enumerate(scenes_of(sequence, count))}
    log(f"demo | {folder} | rendering {len(scenes)} clips")
    progress, rows = Progress(f"demo | {folder.name}", len(scenes), unit="clips"), []
    work = functools.partial(render_clip, folder=folder, num_frames=num_frames)
    for _, row in in_workers(work, list(scenes.items()), workers):
        rows.append(row)
        progress.update(len(rows))
    rows.sort(key=lambda row: row["event_data"])
    write_text(folder / INDEX_FILE, json.dumps(rows, indent=2))
    return rows


def render_clip(clip: tuple[str, Scene], folder: Path, num_frames: int) -> dict:
    """Write the video and the event pictures of one clip (name, scene); -> its row of the index file."""
    from clips.events import event_frames
    from clips.pictures import write_png
    from clips.videos import write_video

    name, scene = clip
    seed = seed_of(name, num_frames)
    write_video(folder / "mp4" / f"{name}.mp4", filming.frames_of(scene, seed, num_frames),
                fps=filming.FPS)
    pictures = [f"{name}_{k}.png" for k in range(NUM_PICTURES)]
    events = filming.events_of(scene, seed, num_frames)
    for file, picture in zip(pictures,
                             event_frames(events, NUM_PICTURES, (filming.SIZE, filming.SIZE))):
        write_png(folder / "event_image" / file, picture)
    return index_row(folder.name, name, pictures)
