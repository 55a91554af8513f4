"""From a raw DSEC download to a data set folder that extraction reads, for any window length.

    python prepare_dsec.py --dsec_root /data/DSEC --output_root data --split train --duration 1s

    data/my_egpt_dsec_train/my_egpt_dsec_train_1s     (test: my_egpt_dsec_test/my_egpt_dsec_seq_1s)
      event_image/<sequence>/<clip>_<k>.png           pictures of the clip's events, equally many in each
      mp4/<sequence>/<clip>.mp4                       its camera pictures as H.264, 20 a second
      prepare_dsec.json                               how it was made, and what was left out
      EventGPT_Instruction_Subset.json                one row a clip; written last, when all is there

Windows start at a sequence's first picture and then every half window, as long as they end by its
last picture. Unusable sequences and clips are named and the rest goes on; the same command makes
what is missing. A folder that lacks something is called whole only with --allow_missing. Several
processes, started by torchrun or srun on hosts with a shared disk, make whole sequences each.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import UserError, as_json, check_counts, option, parse_config, required
from clips import dsec
from clips.events import Render
from clips.prepared import SETTINGS_FILE, LeftOut, PreparedFolder, find_recordings
from clips.windows import Clip, Recipe, clips_of
from machine.files import make_folder, only_writer
from machine.ranks import this_process
from machine.running import run
from machine.team import Team, Work, share_of
from machine.workers import cores


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Make a data set folder of one window length from raw DSEC recordings."""

    dsec_root: Path = required("the download: holds train/ and test/ with a folder for each sequence")
    split: Literal["train", "test"] = required("which of DSEC's lists of sequences")
    duration: str = required("window length: 500ms, 1s, 2s, 4s, ...")
    output_root: Path = option(Path("data"), "where the data set folder goes")
    sequences: list[str] | None = option(None,
                                         "only these, also unlisted ones; default: DSEC's list")
    stride: str = option("half",
                         "from window to window: half of one, none (no overlap), or milliseconds")
    event_images: int = option(5, "event pictures a clip, 1 to 10, with equally many events")
    render: Render = option(
        "time", "a pixel shows its last event (time), or blue if any was (blue_over_red)")
    canvas: str = option("640x480", "width x height of event pictures")
    video_size: str = option("1440x1080",
                             "width x height of videos; frames of another size are resized")
    workers: int | None = option(None, "processes that make clips; default: one a core, 16 at most")
    allow_missing: bool = option(False,
                                 "write the index and exit 0 although something had to be left out")
    wait: bool = option(False, "wait when another process is making this folder, instead of ending")

    def __post_init__(self):
        assert self.recipe                              # it checks its own values
        if self.workers is None:
            object.__setattr__(self, "workers", min(16, cores()))
        check_counts(self, ("workers",))
        if not self.dsec_root.is_dir():
            raise UserError(f"--dsec_root {self.dsec_root}: no such folder; wanted the one that "
                            "holds train/ and test/")
        other = "test" if self.split == "train" else "train"
        for name in self.sequences or ():
            if not dsec.is_name(name):
                raise UserError(f"--sequences {name!r} is no name of a sequence")
            if name in dsec.SEQUENCES[other]:
                raise UserError(f"--sequences {name!r} belongs to DSEC's {other} list")

    @property
    def recipe(self) -> Recipe:
        return Recipe(**{field.name: getattr(self, field.name)
                         for field in dataclasses.fields(Recipe)})

    @property
    def folder(self) -> Path:
        kind = {"train": "train", "test": "seq"}[self.split]
        return self.output_root / f"my_egpt_dsec_{self.split}" / f"my_egpt_dsec_{kind}_{self.duration}"


def main():
    config = parse_config(PrepareConfig)
    dsec.check_reader()
    with Team.meet(this_process(together=True)) as team:
        team.agree({f"--{name}": json.dumps(value) for name, value in as_json(config).items()
                    if name not in ("workers", "wait")})
        left_out = LeftOut()
        recordings = find_recordings(config.dsec_root, config.split, config.sequences, left_out)
        clips = [clip for recording in recordings for clip in clips_of(recording, config.recipe)]
        make_folder(config.folder)
        with only_writer(written_by(config.folder, team.ranks.rank), config.wait):
            make_together(PreparedFolder(config.folder, config.recipe), clips, left_out, config, team)


def written_by(folder: Path, rank: int) -> Path:
    """What the process of this rank locks: the first the folder, each other a name in it."""
    return folder / f"rank{rank}" if rank else folder


def make_together(folder: PreparedFolder, clips: list[Clip], left_out: LeftOut,
                  config: PrepareConfig, team: Work) -> None:
    """Make the sequences that fall to this process; the first writes the index of all."""
    if team.ranks.rank == 0:
        folder.check_settings()
    team.from_first("settings", lambda: "written")
    if not (folder.path / SETTINGS_FILE).exists():
        raise UserError(f"{folder.path} of the first process is not seen here: several hosts need a "
                        "shared disk, or --sequences and a folder for each")
    mine = share_of(clips, lambda clip: clip.sequence, team.ranks)
    workers = max(1, (config.workers or cores()) // team.ranks.local_world)
    folder.make(mine, workers, left_out, team, len(clips))
    for rows in team.gather("left out", json.dumps(left_out.as_json()).encode()):
        left_out.take_up(json.loads(rows))
    if team.ranks.rank == 0:
        team.outlast()
        for lock in config.folder.glob(".rank*.lock"):
            lock.unlink()
        folder.finish(clips, left_out, as_json(config), config.allow_missing)


if __name__ == "__main__":
    run(main, together=True)
