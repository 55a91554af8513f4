"""Shared by test files: pairs to train on, and one shortened demo that the real workflow script
runs once.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.recordings import BAD, GOOD, write_sequence
from tests.warm import Warm

ROOT = Path(__file__).parents[1]
# A shell ignores it in what it starts with &
signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup ignores it in what it starts
signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)      # the models are tiny: two threads only get in each other's way


def flat(answers: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The answers as Pairs holds them: (tokens, start of each answer, length of each answer)."""
    lengths = np.array([len(answer) for answer in answers], np.int32)
    tokens = np.concatenate([np.array(answer, np.int32) for answer in answers])
    return tokens, np.cumsum(lengths) - lengths, lengths


def write_pairs(path: Path, sequences: list[str], pairs_each: int = 20, seed: int = 0,
                **recorded) -> Path:
    """Pairs whose target tokens are the draft's, each mapped to another id: only the draft predicts them."""
    rng, ids = np.random.default_rng(seed), np.arange(3, 43)
    mapping = dict(zip(ids, np.random.default_rng(99).permutation(ids)))
    rows = []
    for sequence in sequences:
        for clip in range(pairs_each):
            draft = rng.choice(ids, rng.integers(4, 10))
            rows.append({"sample_idx": len(rows), "sequence": sequence, "clip": clip,
                         "egpt_tokens": draft.tolist(),
                         "vl_tokens": [int(mapping[token]) for token in draft]})
    path.write_text(json.dumps({**recorded, "results": rows}))
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("data")
    drives = ["zurich_00_a", "zurich_00_b", "thun_01_a", "bern_02_a"]
    return {"train": write_pairs(folder / "train_tokens_500ms.json", drives),
            "test": write_pairs(folder / "test_tokens_500ms.json", ["basel_03_a"], seed=1)}


@dataclasses.dataclass(frozen=True)
class Demo:
    """The folders of a `run_full_workflow.sh --demo`; `log`: its output, `again`: that of a second start."""

    data: Path
    tokens: Path
    tasks: Path
    log: str
    again: str
    models: Path = ROOT / "demo" / "models"

    @property
    def test_1s(self) -> Path:
        return self.data / "my_egpt_dsec_test" / "my_egpt_dsec_seq_1s"


def names_of(task: Path) -> list[str]:
    """The names in a task folder, without its lock."""
    return sorted(path.name for path in task.iterdir() if path.name != ".lock")


def run_workflow(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    """The workflow script in the environment that runs the tests, writing below `folder`."""
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHON": sys.executable,
                   "DATA_ROOT": str(folder / "data"), "TOKENS_DIR": str(folder / "tokens"),
                   "TASK_DIR": str(folder / "task"), **settings}
    return subprocess.run(["bash", str(ROOT / "run_full_workflow.sh"), *arguments], env=environment,
                          text=True, capture_output=True, timeout=600, stdin=subprocess.DEVNULL)


def wait_until_gone(group: int) -> None:
    """Wait until no process of this group is left; zombies, which nobody has waited for, don't count."""
    deadline = time.monotonic() + 30
    while True:
        states = set()
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
                states |= {state} if int(of_group) == group else set()
        if not states - {"Z"}:
            return
        assert time.monotonic() < deadline, f"orphans of {group}"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Demo:
    """Made once, by the first of the pytest processes that needs it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent                    # that of all workers
    folder = base / "demo"
    logs = folder / "logs.json"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not logs.exists():
            logs.write_text(json.dumps(run_demo_twice(folder)))
    return Demo(folder / "data", folder / "tokens", folder / "task", *json.loads(logs.read_text()))


def run_demo_twice(folder: Path) -> tuple[str, str]:
    """The outputs of a demo workflow and of its second start."""
    shorter = {"DEMO_FLAGS": "--train_clips 24 --test_clips 20",
               "EXTRACT_FLAGS": "--max_new_tokens 80 --batch_size 16 --num_workers 2",
               "TRAIN_FLAGS": "--embed_dim 32 --num_layers 1 --num_heads 2 --num_epochs 2 "
                              "--no-refit --no-online",
               "DECODE_FLAGS": "--max_samples 3 --max_new_tokens 80 --num_workers 1"}
    first, second = (run_workflow(folder, "--demo", **shorter) for _ in range(2))
    assert first.returncode == 0, first.stdout + first.stderr
    assert second.returncode == 0, second.stdout + second.stderr
    return first.stdout, second.stdout


@pytest.fixture(scope="session")
def warm():
    warm = Warm()
    yield warm
    warm.close()


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a disk with these options ("size=4k"), or remounts it with others."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        options = f"{'remount,' * os.path.ismount(place)}{options}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place],
                              capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
        return place

    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", place], check=True)


_figures: list[tuple] = []         # (what, number, result), printed as a table at the end


@pytest.fixture(scope="session")
def figures() -> list[tuple]:
    return _figures


def pytest_terminal_summary(terminalreporter) -> None:
    for row in [("what", "number", "result"), ("---", "---", "---"), *_figures] if _figures else ():
        terminalreporter.write_line(f"| {' | '.join(map(str, row))} |")


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Call prepare_dsec.main() with flags; -> (the data set folder, what it logged)."""
    import prepare_dsec

    def call(*flags, root=tmp_path / "dsec", output=tmp_path / "data", split="test", duration="1s"):
        words = ["--dsec_root", root, "--output_root", output, "--split", split, "--duration", duration,
                 *flags]
        monkeypatch.setattr(sys, "argv", ["prepare_dsec.py", *map(str, words)])
        capsys.readouterr()
        prepare_dsec.main()
        kind = {"train": "train", "test": "seq"}[split]
        folder = output / f"my_egpt_dsec_{split}" / f"my_egpt_dsec_{kind}_{duration}"
        return folder, capsys.readouterr().out
    return call


@pytest.fixture(scope="session")
def good_root(tmp_path_factory):
    """A root with one sequence of 2.25 s, never changed by a test."""
    root = tmp_path_factory.mktemp("one")
    return root, write_sequence(root, GOOD)


@pytest.fixture
def mixed_root(tmp_path):
    """A root with a good sequence and one to be damaged, 1.25 s each: one window of 1 s."""
    root = tmp_path / "dsec"
    return root, write_sequence(root, GOOD, frames=26), write_sequence(root, BAD, frames=26, seed=1)


# --------------------------------------------------------------------------------------- extraction
@pytest.fixture
def extract(demo, tmp_path, monkeypatch):
    """Call main() of extract_tokens_train.py with flags; returns the output as JSON, or None if
    there is none.
    """
    import extract_tokens_train

    def call(*flags, dataset_dir=demo.test_1s, output_file=tmp_path / "pairs.json"):
        defaults = {"--dataset_dir": dataset_dir, "--output_file": output_file, "--max_samples": 5,
                    "--draft_model": demo.models / "eventgpt", "--target_model": demo.models / "video_llava",
                    "--max_new_tokens": 80, "--device": "cpu"}
        changes = dict(zip(flags[::2], flags[1::2]))
        words = [str(word) for item in {**defaults, **changes}.items() for word in item if word is not None]
        monkeypatch.setattr(sys, "argv", ["extract_tokens_train.py", *words])
        extract_tokens_train.main()
        return json.loads(output_file.read_text()) if output_file.exists() else None
    return call


@pytest.fixture
def copy(demo, tmp_path):
    """A data set folder that a test may damage."""
    return shutil.copytree(demo.test_1s, tmp_path / "set")


def rows_of(output: dict) -> list[dict]:
    return output["results"]
