"""The benchmark replays recorded answers exactly, counts passes as simulation does, and compares
what it wrote.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmark
from base import ROOT, UserError
from benchmark import figures
from benchmarks import decode, replay
from benchmarks.decode import Config, read_answers
from decoding.limits import MEASURED_SIZES
from decoding.task import read_task
from drafting.table import LIVE_NAMES
from machine.device import Runtime
from tests.test_train_and_evaluate import run_main
from vlm import peers
from vlm.peers import generate, random_model
from vlm.video_llava import VideoLlava

ANSWERS, PART, GAMMA = 10, 4, 3
MODES = ("generate", "generate, static cache", "generate, prompt lookup")
# A folder with another version of transformers to test against, first on the path of one more run
# of these tests.
OTHER = os.environ.get("OTHER_TRANSFORMERS")


def write_pairs(path: Path, sequences: list[str], seed: int = 0) -> Path:
    """Answers from three sentences with some words changed, 8 to 15 tokens: part can be guessed,
    part can't.
    """
    rng, rows = np.random.default_rng(seed), []
    sentences = np.random.default_rng(99).integers(3, 60, (3, 15))
    for sequence in sequences:
        for clip in range(ANSWERS):
            sentence = sentences[rng.integers(3)].copy()
            sentence[rng.random(15) < 0.2] = 60 + rng.integers(3)
            target, draft = sentence[:rng.integers(8, 16)], np.where(
                rng.random(15) < 0.5, sentence, 5)
            rows.append({"sample_idx": len(rows), "sequence": sequence, "clip": ANSWERS - clip,
                         "egpt_tokens": draft.tolist(), "vl_tokens": target.tolist()})
    path.write_text(json.dumps({"results": rows}))
    return path


@pytest.fixture(scope="module", params=["prefix+draft", "draft"])
def trained(request, tmp_path_factory) -> tuple[Path, Path]:
    """(test pairs, folder of a task trained on others)."""
    folder = tmp_path_factory.mktemp("benchmark")
    train = write_pairs(folder / "train.json",
                        ["zurich_00_a", "thun_01_a", "bern_02_a", "genf_04_a"])
    test = write_pairs(folder / "test.json", ["basel_03_a"], seed=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        task, results = run_main(monkeypatch, folder / "task", train, test, "--conditioning",
                                 request.param, "--max_seq_len", "13", "--no-online",
                                 "--num_epochs", "30", "--early_stopping", "0")
    assert request.param == "draft" or results["metrics"]["test"]["adapter"]["alpha"] > 0.3
    return test, task


@pytest.fixture(scope="module")
def measured(trained) -> tuple[dict, Path]:
    """(results, their file) of one run with a fixed gamma."""
    output = trained[1] / "benchmark.json"
    benchmark.measure("decode", settings(trained, gamma=str(GAMMA), output=output))
    return json.loads(output.read_text()), output


def settings(trained: tuple[Path, Path], **changes) -> Config:
    return Config(
        **{
            "pairs": [trained[0]], "task": trained[1], "size": "small", "peer_answers": PART,
            "dtype": "float32", "device": "cpu", **changes
        })


# ------------------------------------------------------------------------------------------- replay
def test_every_drafter_replays_the_recorded_answers_in_clip_order(measured, trained):
    """That the tokens are the recorded ones is asserted where they come out."""
    rows = json.loads(trained[0].read_text())["results"]
    lengths = [len(row["vl_tokens"]) for row in sorted(rows, key=lambda row: row["clip"])]
    for name, outcome in measured[0]["runs"].items():
        part = PART if name in (*MODES, *decode.ON_A_PART) else ANSWERS
        assert [row["tokens"] for row in outcome["rows"]] == lengths[:part], name
        assert outcome["answers"] == part and outcome["part"]["answers"] == PART


def test_live_tau_is_the_simulated_one(measured):
    runs = measured[0]["runs"]
    for name in ("memory", "adapter", "hybrid", "copy", "none"):
        assert math.isclose(runs[name]["tau"], runs[name]["tau_simulated"]), name
    # else the comparison would say little
    assert runs["memory"]["tau"] > 1.2 and runs["none"]["tau"] == 1
    # the same answers, measured in training
    assert runs["memory"]["tau_of_training"] == runs["memory"]["tau"]


def test_the_passes_of_each_answer_add_up_to_its_tokens(measured):
    for name in LIVE_NAMES:
        for row in measured[0]["runs"][name]["rows"]:
            assert row["accepted"] <= row["proposed"] <= GAMMA * row["passes"]
            assert row["tokens"] - row["passes"] == row["accepted"] or row["tokens"] == 1
            assert 0 < row["decode_s"] < row["end_s"] and row["prefill_s"] < row["end_s"]


def test_a_step_that_cannot_be_compiled_runs_uncompiled_and_says_so(monkeypatch, capsys):
    model, calls = random_model(VideoLlava, "small", Runtime.choose("cpu"), 64), []

    def refusing(model, pixels, answer, length, **mode):
        calls.append(mode["disable_compile"])
        if not mode["disable_compile"]:
            raise RuntimeError("no compiler\nhere")
        return generate(model, pixels, answer, length, **mode)

    monkeypatch.setattr(peers, "generate", refusing)
    mode, pixels = {"cache_implementation": "static",
                    "disable_compile": False}, torch.randn(8, 3, 28, 28)
    outcome = replay.run_mode("static", mode, model, pixels, [[4, 5, 6]])
    assert "runs uncompiled: no compiler here" in capsys.readouterr().out
    assert calls[0] is False and all(calls[1:]) and len(
        outcome["rows"]) == 1 and not outcome["compiled"]
    # a wrong answer is no compiler's refusal
    with pytest.raises(AssertionError, match="gave"):
        monkeypatch.setattr(peers, "generate", lambda *_, **__: [1])
        replay.run_mode("static", {"disable_compile": False}, model, pixels, [[4, 5, 6]])


def test_warming_up_teaches_nothing(trained, monkeypatch):
    """Else tau would be better than in real life: the first answers would be known."""
    from drafting.memory import LiveMemory

    learnt = []
    monkeypatch.setattr(LiveMemory, "learn", lambda self, answer: learnt.append(answer))
    config = settings(trained, max_answers=3)
    decode.measure(config)
    answers = read_answers(config, read_task(trained[1])).answers("target")
    learning = ("hybrid", "memory", "hybrid, tree", "memory, tree")
    assert learnt == [answer for answer in answers for _ in learning]


# ------------------------------------------------------------------------------------------ figures
def test_the_output_holds_everything(measured, trained):
    results, _ = measured
    assert set(results) == {
        "kind", "date", "size", "device", "dtype", "quantization", "gamma", "tree", "temperature", "what",
        "config", "answers", "peer_answers", "prompt_positions", "limits", "memory_mib", "runs",
        "costs_ms", "wanted", "seconds", "provenance"
    }
    # one pass over the draft says a token for each position and has no second choices
    branching = {"hybrid", "memory", *["adapter"] * read_task(trained[1]).adapter.config.sees_prefix}
    assert set(results["runs"]) == {*MODES, *LIVE_NAMES, *(f"{name}, tree" for name in branching)}
    assert list(results["costs_ms"]["verify"]) == [str(k) for k in MEASURED_SIZES]
    assert set(results["costs_ms"]["propose_8"]) == {"adapter", "hybrid", "memory"}
    assert all(results["costs_ms"][name] > 0 for name in ("vision", "prefill"))
    assert (results["costs_ms"]["adapter_step"]
            is None) == (not read_task(trained[1]).adapter.config.sees_prefix)
    assert all(value > 0 for value in results["limits"].values())
    assert {"torch", "transformers"} <= set(results["provenance"]["versions"]) and len(
        results["wanted"]) == 14
    assert "Replayed" in results["what"][1] and f"first {PART} of {ANSWERS} answers" in results[
        "what"][-1]
    spread = results["runs"]["hybrid"]["ms_per_token_by_answer"]
    assert spread["min"] <= spread["median"] <= spread["max"]


def test_ratios_are_of_the_same_answers(measured):
    runs = measured[0]["runs"]
    for name in LIVE_NAMES:
        faster = runs[name]["times_faster_than"]
        for peer in (*MODES, "none"):
            for key in ("decode_s", "end_s"):
                theirs, ours = (sum(row[key] for row in runs[one]["rows"][:PART])
                                for one in (peer, name))
                assert faster[peer][key.removesuffix("_s")] == pytest.approx(theirs / ours)
        assert faster["fastest generate"]["end"] == min(faster[peer]["end"] for peer in MODES)
    assert runs["none"]["times_faster_than"]["none"]["decode"] == 1


def test_a_replayed_pass_waits_for_the_draw_and_takes_the_recorded_token():
    following = SimpleNamespace(logits=torch.zeros(3, 8), best=torch.zeros(3, dtype=torch.long))
    assert replay.replay([5, 6, 7], 0.7)([5], [0, 1, 1], following) == [6, 7, 7]
    following.logits = None                            # what sampling can't do without
    assert replay.replay([5, 6, 7])([5], [0, 1, 1], following) == [6, 7, 7]
    with pytest.raises(AttributeError):
        replay.replay([5, 6, 7], 0.7)([5], [0], following)


def test_gamma_auto_runs_and_an_earlier_output_is_compared(trained, measured, tmp_path, capsys):
    # written over while it is compared with
    output = tmp_path / "again.json"
    output.write_text(measured[1].read_text())
    benchmark.measure("decode", settings(trained, max_answers=3, output=output, compare=output,
                                          temperature=0.7))
    printed = capsys.readouterr().out
    assert "WARNING | another gamma: 3 -> auto" in printed and "compare | runs.hybrid.tau | " in printed
    assert json.loads(
        output.read_text())["answers"] == 3 and "RESULT | " in printed.splitlines()[-1]


def test_compare_prints_old_new_and_ratio(tmp_path, capsys, monkeypatch):
    for name, ms, more in (("old", 4.0, {"x": 1}), ("new", 3.0, {"y": {"z": 2}})):
        (tmp_path / name).write_text(json.dumps({
            "kind": "benchmark decode", "runs": {"hybrid": {"ms": ms, "rows": [1], "ok": True}}, "zero": 0,
            "config": {"seed": 1}, **more}))
    monkeypatch.setattr(sys, "argv",
                        ["benchmark.py", "compare",
                         str(tmp_path / "old"),
                         str(tmp_path / "new")])
    benchmark.main()
    lines = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == ["compare | runs.hybrid.ms | 4 -> 3 | 0.750", "compare | zero | 0 -> 0 | -",
                         "compare | only in one of them: x, y.z"]


def test_figures_are_numbers_of_the_whole(measured):
    outcome = figures(measured[0])
    assert "runs.hybrid.times_faster_than.generate.decode" in outcome and "costs_ms.verify.9" in outcome
    assert not any("rows" in name or name.startswith(("config", "provenance")) for name in outcome)


# ------------------------------------------------------------------------------------- command line
def call(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "benchmark.py", *flags],
                          text=True,
                          capture_output=True,
                          timeout=120,
                          env={**os.environ, **environment})


@pytest.mark.parametrize("flags", [["--help"], ["decode", "--help"], ["train", "--help"],
                                   ["adapter", "--help"], ["compare", "-h"]])
def test_help_is_quick_and_imports_no_torch(flags):
    before = os.times()
    outcome = call(*flags, PYTHONPROFILEIMPORTTIME="1")
    after = os.times()
    assert outcome.returncode == 0 and "benchmark.py" in outcome.stdout
    assert after.children_user - before.children_user < 1.5         # CPU seconds: other work may run here
    assert not any(line.endswith((" torch", " transformers")) for line in outcome.stderr.splitlines())
    assert flags[0] == "--help" or f"usage: benchmark.py {flags[0]} " in outcome.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [([], "decode, load, compare"), (["run"], "'run': wanted one of "),
     (["train", "--pairs", "a"], "--pairs and --test_pairs belong together"),
     (["train", "--num_epochs", "1"], "--num_epochs must be 2 or more"),
     (["adapter", "--max_seq_len", "30"], "--max_seq_len must be 47 or more, got 30"),
     (["decode"], "--pairs, --task"),
     (["decode", "--pairs", "a", "--task", "b", "--gamma", "17"], "--gamma must be"),
     (["decode", "--pairs", "a", "--task", "b", "--peer_answers", "0"
       ], "--peer_answers must be 1 or more"),
     (["decode", "--pairs", "a", "--task", "b", "--max_answers", "-2"
       ], "--max_answers must be 1 or more"),
     (["decode", "--pairs", "a", "--task", "b", "--compare", "none.json"
       ], "no such file: none.json"),
     (["decode", "--pairs", "a", "--task", "b", "--size", "13b"], "invalid choice"),
     (["decode", "--pairs", "a", "--task", "b", "--output", "/tmp/no_task.json"
       ], "b is no finished task"), (["compare", "a"], "required: new"),
     (["compare", str(ROOT / "demo" / "models" / "video_llava" / "config.json"), "b"
       ], "is no output of benchmark.py")])
def test_a_mistake_is_one_line(flags, words):
    outcome = call(*flags)
    assert outcome.returncode == 2 and not outcome.stderr and len(outcome.stdout.splitlines()) == 1
    assert words in outcome.stdout and "ERROR" in outcome.stdout


def test_ids_beyond_the_adapter_are_refused(trained, tmp_path):
    (tmp_path / "odd.json").write_text(trained[0].read_text().replace('"vl_tokens": [',
                                                                      '"vl_tokens": [70, '))
    with pytest.raises(
            UserError,
            match=r"odd\.json holds the token id 70, wanted ids below the vocabulary size 64"):
        read_answers(settings((tmp_path / "odd.json", trained[1])), read_task(trained[1]))


@pytest.mark.skipif(not OTHER, reason="OTHER_TRANSFORMERS names no second transformers")
def test_another_transformers_is_forced_too(trained, tmp_path):
    outcome = call("decode",
                 "--pairs",
                 str(trained[0]),
                 "--task",
                 str(trained[1]),
                 "--size",
                 "small",
                 "--dtype",
                 "float32",
                 "--device",
                 "cpu",
                 "--output",
                 str(tmp_path / "out.json"),
                 PYTHONPATH=OTHER)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    version = json.loads(
        (tmp_path / "out.json").read_text())["provenance"]["versions"]["transformers"]
    assert version == next(
        Path(OTHER).glob("transformers-*.dist-info")).name.split("-")[1].removesuffix(".dist")
