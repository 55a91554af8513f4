"""The demo: data sets of a made-up world in the real layout, and two tiny models that describe it.

    python make_demo.py                    renders the four data sets into demo/data, unless they exist
    python make_demo.py --check_models     and tells how often the models describe test clips right
    python make_demo.py --train_models     makes those models again from nothing, then checks them

    demo/data/my_egpt_dsec_train/my_egpt_dsec_train_{1s,500ms}    index file, event_image/, mp4/
    demo/data/my_egpt_dsec_test/my_egpt_dsec_seq_{1s,500ms}
    demo/models/eventgpt                   the layout of EventGPT's published checkpoint, float16
    demo/models/video_llava                the layout that VideoLlavaForConditionalGeneration saves, float16

Everything is seeded: the same pictures and, on the same kind of CPU, the same weights.
"""

import dataclasses
import sys
from pathlib import Path

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import ROOT, check_counts, option, parse_config
from machine.files import make_folder, only_writer
from machine.running import run


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Render the demo's data sets; also check its two models, or train them again, where asked to."""

    output_dir: Path = option(ROOT / "demo" / "data", "where the four data sets go")
    models_dir: Path = option(ROOT / "demo" / "models",
                              "holds the two models, eventgpt and video_llava")
    train_clips: int = option(312, "clips of each training set, at least one for each of its 24 sequences")
    test_clips: int = option(100, "clips of each test set, at least one for each of its 10 sequences")
    check_models: bool = option(False, "report how often the models describe the test clips right")
    train_models: bool = option(False,
                                "make both models again from nothing (minutes), then check them")
    wait: bool = option(False, "wait when another process is making these, instead of ending")

    def __post_init__(self):
        check_counts(self, ("train_clips", "test_clips"))


def main():
    config = parse_config(DemoConfig)
    if config.train_models:
        from demo.learning import train_models

        with only_writer(make_folder(config.models_dir), config.wait):
            train_models(config.models_dir)

    from demo.data_sets import make_data_sets

    with only_writer(make_folder(config.output_dir), config.wait):
        make_data_sets(config.output_dir, {"train": config.train_clips, "test": config.test_clips})
    if config.train_models or config.check_models:
        from demo.checking import check_models

        check_models(config.models_dir, config.output_dir)


if __name__ == "__main__":
    run(main)
