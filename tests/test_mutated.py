"""Whatever is wrong with a file costs a row in `failed` or is one ERROR line: no crash, no hang, no
file touched.

The readers run in a process of their own (tests/isolated.py) on what tests/mutations.py makes of
whole files.
"""

import collections
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from clips.pictures import write_png
from clips.videos import write_video
from machine.journal import checksum_of, line_of
from reports.adapter_card import metrics_of
from tests.conftest import ROOT
from tests.isolated import Isolated, small_adapter

hypothesis = pytest.importorskip("hypothesis", reason="needs requirements-dev.txt")
STRATEGIES = pytest.importorskip("tests.mutations").STRATEGIES

# Inputs of each kind in the long run: 10,000 in all. Loading a model takes a good deal longer than
# reading a picture.
LONG = {
    "pairs": 1500, "index": 1300, "journal": 900, "png": 1800, "mp4": 1500, "npy": 1200, "pt": 700,
    "npz": 300, "results": 300, "resume": 200, "config": 150, "safetensors": 100, "preprocessor": 50,
    "exported_config": 240, "exported_metrics": 240, "exported_weights": 240
}
QUICK = 30                     # times fewer in the tests of every day


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with `inside`, where the readers work on a small data set and a model, and `outside`."""
    folder = tmp_path_factory.mktemp("mutated")
    pictures, videos = (folder / "inside" / "set" / kind / "town_00_a"
                        for kind in ("event_image", "mp4"))
    for path in (pictures, videos, folder / "inside" / "task", folder / "outside"):
        path.mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (10, 32, 48, 3), dtype=np.uint8)
    for clip in range(2):
        write_png(pictures / f"00000{clip}_0.png", frames[clip])
        write_video(videos / f"00000{clip}.mp4", frames)
    write_png(folder / "outside" / "secret.png", frames[0])
    shutil.copytree(ROOT / "demo" / "models" / "video_llava", folder / "inside" / "model")
    return folder


@pytest.fixture(scope="module")
def intact(world, demo) -> dict[str, bytes]:
    """A whole file of each kind."""
    import torch

    results = next(demo.tasks.glob("1s_2*/results.json")).read_bytes()
    exported = world / "inside" / "exported"
    models = {"videollava": [{"name": "x", "revision": "content 0", "vocab_size": 16}]}
    small_adapter().save_pretrained(exported, config={"models": models, "memory": False})
    (exported / "metrics.json").write_text(json.dumps(metrics_of(json.loads(results), [])))
    adapter(world / "inside" / "task" / "best_model.pt")
    place, model = world / "inside" / "set", world / "inside" / "model"
    rows = [{
        "sample_idx": i, "question_idx": 0, "sequence": "town_00_a", "clip": i,
        "egpt_tokens": [5, 6, 7, 2], "egpt_text": "a b", "vl_tokens": [7, 8, 9, i], "vl_text": "c d"
    } for i in range(3)]
    clips = [{
        "id": f"id {i}", "event_data": f"town_00_a/00000{i}.npy",
        "video_data": f"town_00_a/00000{i}", "mp4_data": f"town_00_a/00000{i}.mp4",
        "event_image": [f"town_00_a/00000{i}_0.png"]
    } for i in range(2)]
    head = line_of({
        "format": 2, "run": "a", "settings": {}, "clips": {"eventgpt": {"town/1": "a"}}
    })
    lines = [{"model": "eventgpt", "vocab_size": 64}, *({
        "model": "eventgpt", "key": f"town/{i}", "question_idx": 0, "tokens": [3, 2], "text": "a",
        "finished": True
    } for i in range(3))]
    columns = {
        name: np.arange(25, dtype=np.uint16) % {"p": 2, "t": 25}.get(name, 7) for name in "xytp"
    }
    events = {**columns, "time_start": np.int64(7),
              "duration_ms": 0.5, "image_indices_in_clip": [1, 2]}
    return {
        "pairs": json.dumps({
            "vocab_size": 64, "models": {"eventgpt": {"name": "x"}}, "results": rows
        }).encode(), "index": json.dumps(clips).encode(),
        "journal": head + b"".join(line_of(line, checksum_of(head)) for line in lines),
        "png": (place / "event_image" / "town_00_a" / "000000_0.png").read_bytes(),
        "mp4": (place / "mp4" / "town_00_a" / "000000.mp4").read_bytes(), "npy": saved(
            np.save, events, allow_pickle=True), "pt": adapter(world / "adapter.pt"), "npz": saved(
                np.savez_compressed, target=np.arange(9, dtype=np.int32),
                target_start=np.array([0, 4, 9])), "results": results, "resume": saved(
                    lambda file, counts: torch.save(counts, file),
                    state()), "config": (model / "config.json").read_bytes(),
        "safetensors": (model / "model.safetensors").read_bytes(),
        "preprocessor": (model / "preprocessor_config.json").read_bytes(),
        "exported_config": (exported / "config.json").read_bytes(),
        "exported_metrics": (exported / "metrics.json").read_bytes(),
        "exported_weights": (exported / "model.safetensors").read_bytes()
    }


def saved(save, *what, **how) -> bytes:
    file = io.BytesIO()
    save(file, *what, **how)
    return file.getvalue()


def adapter(path: Path) -> bytes:
    from drafting.checkpoints import save_adapter

    save_adapter(small_adapter(), path)
    return path.read_bytes()


def state() -> dict:
    """What training keeps after an epoch."""
    import torch

    from training.checkpoints import random_state
    from training.loop import Trainer

    trainer = Trainer(small_adapter(), 4, 1e-3, 9)
    for weight in trainer.weights:
        weight.grad = torch.ones_like(weight)
    trainer.optimizer.step()
    weights = trainer.adapter.state_dict()
    best = {"alpha": 0.5, "epoch": 1, "number": 1, "adapter": weights}
    return {"format": 1, "data": {"train tokens": 1}, "history": [{"epoch": 1}],
            "best": {"prefix": best}, "phase": "prefix", "epoch": 1, "over": False,
            "done": 1, "adapter": weights, "optimizer": trainer.optimizer.state_dict(),
            "order": torch.Generator().get_state(), "random": random_state()}


@pytest.fixture(scope="module")
def process(world):
    with Isolated(world / "inside") as process:
        yield process


def contents(folder: Path) -> dict[str, str]:
    """Every file below: its name, and a digest of what is in it."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")
        if path.is_file()
    }


def mutate(kind: str, number: int, intact: dict, process: Isolated) -> collections.Counter:
    """How so many damaged files of this kind came out; fails at the first crash or hang."""
    outcomes = collections.Counter()

    @hypothesis.settings(max_examples=number, derandomize=True, database=None, deadline=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(STRATEGIES[kind](intact[kind]))
    def every(content: bytes) -> None:
        outcome = process.read(kind, content)
        outcomes[outcome.split(":")[0]] += 1
        assert not outcome.startswith(("crash", "hang")), outcome

    every()
    return outcomes


@pytest.mark.parametrize("kind", LONG)
def test_damaged_files_are_user_errors_or_failed_rows(kind, intact, world, process):
    assert process.read(kind, intact[kind]) == "read"
    before = contents(world)
    outcomes = mutate(kind, max(8, LONG[kind] // QUICK), intact, process)
    assert contents(world) == before
    # Else the damage was none
    assert outcomes["UserError"] + outcomes["MediaError"] or kind == "index"


@pytest.mark.faults
def test_ten_thousand_damaged_files(intact, world, process, figures):
    before, counts = contents(world), collections.Counter()
    for kind, number in LONG.items():
        outcomes = mutate(kind, number, intact, process)
        figures.append((f"damaged {kind} files", outcomes.total(),
                        f"{outcomes['read']} could be read all the same"))
        counts += outcomes
    touched = contents(world).items() ^ before.items()
    figures.append(("all damaged files", counts.total(),
                    f"crashes {counts['crash']}, hangs {counts['hang']}, files "
                    f"touched outside the output {len(touched)}"))
    assert not touched and counts.total() >= 10_000
