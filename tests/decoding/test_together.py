"""Several processes decode together: whole sequences each, the figures of one process for each."""

import json
import re
import time
from pathlib import Path

from drafting.memory import LiveMemory, load_memory
from drafting.ngrams import NGrams
from tests.launch import Launch
from tests.test_killed_decoding import flags_of, task, without_times  # noqa: F401

PROGRAM = "speculative_decode.py"


def read(folder: Path) -> tuple:
    """What must be the same however many processes decoded. The noise, and so a tie, is measured."""
    results = json.loads((folder / "decode.json").read_text())
    same = {key: results[key] for key in ("answers", "failed", "target", "models", "drafter")}
    assert (folder / "DECODE.md").stat().st_size > 1000
    return without_times(same), load_memory(folder / "memory.npz")


def test_a_memory_forgets_what_it_learnt_and_keeps_what_it_began_with():
    memory, other = (LiveMemory(NGrams([[5, 6, 7]])) for _ in range(2))
    memory.forget()
    before = memory.propose([5], 2)
    for _ in range(9):
        memory.learn([5, 8, 9])
    assert memory.propose([5], 2) == [8, 9] != before
    memory.forget()
    assert memory.propose([5], 2) == before == other.propose([5], 2) == [6, 7]


def test_two_processes_decode_what_one_decodes_and_one_goes_on_after_a_kill(
        demo, warm, task, tmp_path):  # noqa: F811
    alone, log = tmp_path / "alone", tmp_path / "log"
    assert warm.wait(warm.start(flags_of(demo, task, "--output_folder", alone, "--fresh_sequences"),
                                log, PROGRAM)) == 0
    several = tmp_path / "several"
    flags = flags_of(demo, task, "--output_folder", several)
    launch = Launch(warm, 2, log, PROGRAM).start(*flags)
    second = several / ".journal.rank1.jsonl"
    while not second.exists() or b'"answer":' not in second.read_bytes():
        launch.check_running()
        time.sleep(0.005)
    launch.kill(0)
    launch.wait()
    assert not (several / "DECODE.md").exists()
    kept = second.read_bytes()
    # More processes than sequences: one is without work
    assert Launch(warm, 4, log, PROGRAM).start(*flags).wait() == [0] * 4, log.read_text()
    assert read(several) == read(alone) and kept
    counts = re.findall(r"decode \| (?:drafts|answers) \| (\d+)/(\d+)", log.read_text())
    assert counts and all(int(done) <= int(total) for done, total in counts), counts
    assert {path.name for path in several.glob(".*")} == {".lock"}
    flags = flags_of(demo, task, "--output_folder", tmp_path / "none", "--shuffle")
    assert any(Launch(warm, 2, log, PROGRAM).start(*flags).wait())
    assert "--shuffle belongs to one process" in log.read_text()
