"""Files that ask for all memory or all time cost one ERROR line or a row in `failed`, soon and
within 4 GiB.

The readers run in a process of their own (tests/isolated.py) on what tests/huge.py makes of whole
files.
"""

import collections
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.huge import cases
from tests.isolated import Isolated
from tests.test_mutated import intact, saved, world  # noqa: F401  (fixtures)

# Inputs of each kind in the long run: 2,000 in all. Opening a model folder takes longer than a
# picture.
LONG = {
    "pairs": 120, "index": 120, "questions": 120, "journal": 120, "results": 100, "decode": 100,
    "config": 80, "tokenizer": 60, "safetensors": 60, "preprocessor": 40, "png": 120, "jpeg": 120,
    "gif": 100, "webp": 100, "npy": 120, "npz": 100, "pt": 100, "resume": 60, "mp4": 100, "mkv": 80,
    "avi": 80, "ts": 80, "h5": 80
}
QUICK = 1                      # of each kind in the tests of every day: the daily suite stays short
OUT_OF_MEMORY = ("MachineTrouble", "MemoryError", "out of memory", "bad_alloc",
                 "DefaultCPUAllocator")


@pytest.fixture(scope="module")
def large(world, intact) -> dict[str, bytes]:  # noqa: F811
    """A whole file of each kind."""
    h5py = pytest.importorskip("h5py")
    frames = np.random.default_rng(0).integers(0, 255, (10, 32, 48, 3), dtype=np.uint8)
    picture, files = Image.fromarray(frames[0]), dict(intact)
    for kind, how in (("jpeg", {"progressive": True}), ("gif", {}), ("webp", {})):
        files[kind] = saved(
            lambda file, kind=kind, how=how: picture.save(file, kind.upper(), **how))
    for kind in ("mkv", "avi", "ts"):
        files[kind] = video_in(world / f"a.{kind}", frames)
    with h5py.File(world / "a.h5", "w") as file:
        for name, dtype in {"x": np.uint16, "y": np.uint16, "p": np.uint8, "t": np.uint32}.items():
            column = np.arange(99).astype(dtype) % (2 if name == "p" else 99)
            file.create_dataset(f"events/{name}", data=column, chunks=(32,), compression="gzip")
        file["ms_to_idx"], file["t_offset"] = np.zeros(2, np.uint64), np.int64(5)
    files["h5"] = (world / "a.h5").read_bytes()
    model = world / "inside" / "model"
    files["tokenizer"] = (model / "tokenizer.json").read_bytes()
    files["questions"] = b"What is on the road?\nIs it night?\nWho drives?\n"
    files["decode"] = json.dumps({"kind": "decoding", "answers": []}).encode()
    return files


def video_in(path: Path, frames: np.ndarray) -> bytes:
    """The frames as MPEG-4 in the container that the path's suffix names."""
    with av.open(str(path), "w", format={".mkv": "matroska",
                                         ".ts": "mpegts"}.get(path.suffix)) as file:
        out = file.add_stream("mpeg4", rate=20)
        out.height, out.width, out.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            file.mux(out.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(out.encode())
    return path.read_bytes()


@pytest.fixture(scope="module")
def process(world):  # noqa: F811
    with Isolated(world / "inside") as process:
        yield process


def faults(kind: str, number: int, content: bytes,
           process: Isolated) -> tuple[collections.Counter, list[str]]:
    """How so many huge files of this kind came out; and each crash, hang or lack of memory."""
    outcomes, wrong = collections.Counter(), []
    for row, case in enumerate(cases(kind, content, number)):
        outcome = process.read(kind, case.content, case.size, case.grows, case.tail)
        fault = outcome.split(":")[0]
        if fault not in ("crash", "hang") and any(word in outcome for word in OUT_OF_MEMORY):
            fault = "memory"
        outcomes[fault] += 1
        if fault in ("crash", "hang", "memory"):
            wrong.append(f"{kind} {row} ({case.what}, {len(case.content)} bytes, size {case.size}, "
                         f"tail {len(case.tail)}): {outcome}")
    return outcomes, wrong


@pytest.mark.parametrize("kind", LONG)
def test_huge_files_end_soon_within_bounds(kind, large, process):
    assert process.read(kind, large[kind]).split(":")[0] in ("read", "UserError")
    _, wrong = faults(kind, QUICK, large[kind], process)
    assert not wrong, wrong[0]


@pytest.mark.faults
def test_two_thousand_huge_files(large, process, figures):
    counts, wrong = collections.Counter(), []
    for kind, number in LONG.items():
        outcomes, faulty = faults(kind, number, large[kind], process)
        figures.append((f"huge {kind} files", outcomes.total(),
                        f"{outcomes['read']} could be read all the same"))
        counts += outcomes
        wrong += faulty
    figures.append(("all huge files", counts.total(),
                    f"crashes {counts['crash']}, hangs over 60 s {counts['hang']}, "
                    f"memory over 4 GiB {counts['memory']}"))
    assert not wrong and counts.total() >= 2000, "\n".join(wrong)
