"""Training learns what the draft tells, chooses by validation alone, and leaves whole files always.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import acceptance.evaluation as evaluation
import train_and_evaluate
import training.loop as loop
from base import ROOT, UserError
from decoding.task import read_task
from drafting.checkpoints import load_adapter
from machine.device import choose_device
from machine.files import only_writer
from pairs.formats import load_pairs
from pairs.splits import ValidationSplit, load_data
from reports import task_figures as report
from tests.conftest import names_of, write_pairs
from tests.vlm.test_steps import needs_gpu
from train_and_evaluate import TrainConfig
from training.checkpoints import Fingerprint, Resume

SMALL = [
    "--embed_dim", "32", "--num_layers", "1", "--num_heads", "2", "--num_epochs", "8",
    "--batch_size", "8", "--learning_rate", "1e-2", "--max_seq_len", "9", "--device", "cpu",
    "--no-plots", "--conditioning", "draft"
]


def run_main(monkeypatch, task_dir: Path, train, test, *flags) -> tuple[Path, dict]:
    train_flags = ["--train_benchmark", str(train)] if train else []
    test_flags = ["--test_benchmark", str(test), "--task_dir", str(task_dir)]
    monkeypatch.setattr(sys, "argv",
                        ["train_and_evaluate.py", *train_flags, *test_flags, *SMALL, *flags])
    before = set(task_dir.glob("*"))
    train_and_evaluate.main()
    task = next(iter(set(task_dir.glob("*")) - before))
    return task, json.loads((task / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> tuple[Path, dict]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_main(monkeypatch, tmp_path_factory.mktemp("task"), files["train"], files["test"])


# ----------------------------------------------------------------------------------------- training
def test_the_adapter_learns_what_the_draft_tells_and_no_constant_string_could(trained):
    task, results = trained
    test = results["metrics"]["test"]
    assert test["adapter"]["alpha"] > 0.8 > 0.2 > test["constant_string"]["alpha"]
    assert test["improvement"] == test["adapter"]["alpha"] - test["direct_copy"]["alpha"]
    assert task.name.startswith("500ms_")
    assert names_of(task) == ["REPORT.html", "RESULTS.md", "best_model.pt", "memory.npz", "results.json"]


def test_the_best_epoch_is_the_first_with_the_best_validation_and_it_is_the_one_kept(trained):
    task, results = trained
    alphas = [epoch["validation_alpha"] for epoch in results["history"]]
    assert results["best_epoch"] == 1 + alphas.index(max(alphas))
    assert results["metrics"]["validation"]["adapter"]["alpha"] == max(alphas)
    assert torch.load(task / "best_model.pt", weights_only=True)["epoch"] == results["best_epoch"]


def test_the_same_seed_gives_the_same_numbers_whatever_is_tested_on(trained, monkeypatch, tmp_path, files):
    other = write_pairs(tmp_path / "other_500ms.json", ["basel_04_a"], seed=7)
    task, results = run_main(monkeypatch, tmp_path / "task", files["train"], other)
    for ours, theirs in zip(trained[1]["history"], results["history"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    first, second = (load_adapter(folder / "best_model.pt").state_dict()
                     for folder in (trained[0], task))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_stops_early_without_better_validation(monkeypatch, tmp_path, files):
    monkeypatch.setattr(loop, "learning_rate_factor", lambda step, total: 0.0)
    _, results = run_main(monkeypatch, tmp_path, files["train"], files["test"], "--early_stopping", "2")
    assert len(results["history"]) == 3 and results["best_epoch"] == 1


def test_the_learning_rate_rises_and_then_falls_to_nothing():
    rates = [loop.learning_rate_factor(step, 100) for step in range(101)]
    assert rates.index(max(rates)) in (4, 5) and max(rates) == 1 and rates[-1] == 0
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)


def test_a_loss_that_is_no_number_names_epoch_and_step_and_keeps_the_best_model(
        monkeypatch, tmp_path, files):
    monkeypatch.setattr(loop, "learning_rate_factor", lambda step, _: 1.0 if step < 10 else 1e35)
    words = r"epoch 2: the loss became \w+ in step \d of 8; .*best_model.pt"
    with pytest.raises(UserError, match=words):
        run_main(monkeypatch, tmp_path, files["train"], files["test"])
    task = next(tmp_path.iterdir())
    load_adapter(task / "best_model.pt")
    assert names_of(task) == ["best_model.pt", "results.json", "resume.pt"]


def test_a_kill_leaves_a_best_model_that_loads_and_no_temporary(tmp_path, files):
    task = tmp_path / "task"
    command = [sys.executable, ROOT / "train_and_evaluate.py", "--train_benchmark", files["train"],
               "--test_benchmark", files["test"], "--task_folder", task, *SMALL, "--num_epochs", "100000",
               "--early_stopping", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (task / "resume.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 143 and printed.splitlines()[-1].endswith(
        f"RESUME | {sys.executable} {ROOT / 'train_and_evaluate.py'} --resume {task}")
    load_adapter(task / "best_model.pt")
    assert names_of(task) == ["best_model.pt", "results.json", "resume.pt"]
    assert json.loads((task / "results.json").read_text())["unfinished"] is True
    for program in (report.read_results, read_task):
        with pytest.raises(UserError,
                           match=r"is unfinished: go on with train_and_evaluate\.py --resume"):
            program(task)


# ------------------------------------------------------------------------------------------- resume
PHASES = ["--conditioning", "prefix+draft", "--num_epochs", "4", "--early_stopping", "0", "--dropout", "0.2",
          "--draft_text", "0.5", "--no-online"]


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory) -> tuple[Path, dict]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_main(monkeypatch, tmp_path_factory.mktemp("straight"), files["train"],
                        files["test"], *PHASES)


def stopped(monkeypatch, folder: Path, files: dict, after: int, *flags: str) -> Path:
    """The task folder of the same training, stopped as by a kill when resume.pt was written so
    often.
    """
    write, times = Resume.write, []

    def write_and_die(self, **state):
        write(self, **state)
        times.append(state)
        if len(times) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Resume, "is_due", lambda self: True)
        patch.setattr(Resume, "write", write_and_die)
        run_main(patch, folder, files["train"], files["test"], *PHASES, *flags)
    return next(folder.iterdir())


def resume(monkeypatch, task: Path, *flags: str) -> dict:
    monkeypatch.setattr(sys, "argv",
                        ["train_and_evaluate.py", "--resume",
                         str(task), "--no-plots", *flags])
    train_and_evaluate.main()
    return json.loads((task / "results.json").read_text())


# 4 epochs without drafts, 2 with; then all again, refitted
@pytest.mark.parametrize("after", [1, 3, 4, 5, 6])
def test_a_resumed_training_gives_the_same_numbers_bit_for_bit(straight, monkeypatch, tmp_path,
                                                               files, after):
    task, before = stopped(monkeypatch, tmp_path / "task", files, after), Path.cwd()
    assert json.loads((task / "results.json").read_text())["unfinished"] and len(load_adapter(
        task / "best_model.pt").state_dict())
    monkeypatch.chdir(tmp_path)                                # it goes on from any folder
    results = resume(monkeypatch, task)
    monkeypatch.chdir(before)
    for ours, theirs in zip(results["history"], straight[1]["history"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    for key in ("best_epoch", "refitted", "split", "adapter"):
        assert results[key] == straight[1][key]
    for part in ("train", "validation", "test"):
        assert results["metrics"][part]["adapter"] == straight[1]["metrics"][part]["adapter"]
    first, second = (load_adapter(folder / "best_model.pt").state_dict()
                     for folder in (straight[0], task))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "unfinished" not in results and not (task / "resume.pt").exists() and (
        task / "RESULTS.md").exists()


@needs_gpu
@pytest.mark.parametrize("after", [2, 5])
def test_cuda_training_goes_on_where_it_was(monkeypatch, tmp_path, files, after):
    """Not bit for bit: sums over the batch come in any order there."""
    flags = ["--device", "cuda"]
    _, straight = run_main(monkeypatch, tmp_path / "straight", files["train"], files["test"],
                           *PHASES, *flags)
    task = stopped(monkeypatch, tmp_path / "task", files, after, *flags)
    resumed = resume(monkeypatch, task)
    for ours, theirs in zip(resumed["history"], straight["history"], strict=True):
        assert all(ours[key] == theirs[key] for key in ("epoch", "phase", "learning_rate"))
        assert abs(ours["train_loss"] - theirs["train_loss"]) < 0.1
        assert abs(ours["validation_alpha"] - theirs["validation_alpha"]) < 0.1
    assert resumed["provenance"]["device"] == straight["provenance"]["device"] != "CPU"


def test_resuming_a_finished_task_says_so_and_changes_nothing(straight, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in straight[0].glob("[!.]*")}
    resume(monkeypatch, straight[0])
    assert "finished before" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in straight[0].glob("[!.]*")} == before


def test_what_cannot_be_resumed_is_refused(monkeypatch, tmp_path, files):
    local = {name: Path(shutil.copy(path, tmp_path)) for name, path in files.items()}
    task = stopped(monkeypatch, tmp_path / "task", local, 2)
    with pytest.raises(UserError, match="leave out --num_epochs"):
        resume(monkeypatch, task, "--num_epochs", "9")
    with pytest.raises(UserError, match=r"has no results\.json"):
        resume(monkeypatch, tmp_path)
    write_pairs(local["train"], ["zurich_00_a", "thun_01_a", "bern_02_a"], seed=5)
    with pytest.raises(UserError, match="the pair files are not those"):
        resume(monkeypatch, task)
    shutil.copy(files["train"], local["train"])
    (task / "resume.pt").write_bytes((task / "resume.pt").read_bytes()[:-50])
    with pytest.raises(
            UserError,
            match=r"resume\.pt can't be used: .*; delete it to begin this training anew"):
        resume(monkeypatch, task)
    (task / "resume.pt").write_bytes(b"")                       # as a power cut leaves it
    with pytest.raises(
            UserError,
            match=r"resume\.pt can't be used: .*; delete it to begin this training anew"):
        resume(monkeypatch, task)
    (task / "resume.pt").unlink()
    # killed before it was written: from the beginning
    assert len(resume(monkeypatch, task)["history"]) == 6


def changed_rows(path: Path, change) -> None:
    pairs = json.loads(path.read_text())
    for number, row in enumerate(pairs["results"]):
        change(number, row)
    path.write_text(json.dumps(pairs))


TURNED = dict(zip(["zurich_00_a", "zurich_00_b", "thun_01_a", "bern_02_a"],
                  ["thun_01_a", "bern_02_a", "zurich_00_a", "zurich_00_b"]))


@pytest.mark.parametrize(("change", "words"), [
    (lambda number, row: row.update(sequence=TURNED[row["sequence"]]), "split, train sequence names"),
    (lambda number, row: row.update(clip=row["clip"] + 1), "train clip names"),
    (lambda number, row: row.update(sample_idx=number + 1), "train questions"),
    (lambda number, row: row.update(query="Is it dark?"), "train questions"),
    (lambda number, row: row.update(egpt_tokens=row["egpt_tokens"][:-1]), "train rows, train tokens")])
def test_pairs_of_the_same_tokens_with_other_names_are_not_resumed_with(
        monkeypatch, tmp_path, files, change, words):
    """With the sequences renamed, other drives are validated on: those that were trained on."""
    local = {name: Path(shutil.copy(path, tmp_path)) for name, path in files.items()}
    task = stopped(monkeypatch, tmp_path / "task", local, 2)
    changed_rows(local["train"], change)
    with pytest.raises(UserError, match=rf"are not those that .* began with \(other .*{words}"):
        resume(monkeypatch, task)
    shutil.copy(files["train"], local["train"])
    assert len(resume(monkeypatch, task)["history"]) == 6


def test_a_training_begun_by_an_older_version_goes_on_to_the_same_numbers(
        straight, monkeypatch, tmp_path, files):
    """No file had a format number then, results.json no bos_id, and resume.pt another fingerprint.
    """
    task = stopped(monkeypatch, tmp_path / "task", files, 2)
    results = json.loads((task / "results.json").read_text())
    del results["format"], results["config"]["bos_id"]
    (task / "results.json").write_text(json.dumps(results))
    state = torch.load(task / "resume.pt", weights_only=True)
    data = load_data([files["train"]], [files["test"]], ValidationSplit(0.15, 42))
    del state["format"]
    torch.save({**state, "data": Fingerprint.of(data).format_0}, task / "resume.pt")
    resumed = resume(monkeypatch, task)
    for ours, theirs in zip(resumed["history"], straight[1]["history"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert resumed["metrics"]["test"]["adapter"] == straight[1]["metrics"]["test"]["adapter"]


@pytest.mark.parametrize("name", ["results.json", "resume.pt", "pairs"])
def test_a_file_of_a_newer_version_is_refused_in_one_line(monkeypatch, tmp_path, files, name):
    local = {kind: Path(shutil.copy(path, tmp_path)) for kind, path in files.items()}
    task = stopped(monkeypatch, tmp_path / "task", local, 2)
    path = local["train"] if name == "pairs" else task / name
    if name == "resume.pt":
        torch.save({**torch.load(path, weights_only=True), "format": 99}, path)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError,
                       match="has format 99, this version reads formats up to 1") as raised:
        resume(monkeypatch, task)
    assert path.name in str(raised.value) and "\n" not in str(raised.value)


def test_a_resume_file_larger_than_its_training_can_write_is_not_read(monkeypatch, tmp_path, files):
    task = stopped(monkeypatch, tmp_path / "task", files, 2)
    with open(task / "resume.pt", "r+b") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(UserError,
                       match=r"resume\.pt can't be used: it has 20480 MiB, wanted at most \d+;"):
        resume(monkeypatch, task)


@pytest.mark.parametrize("change", [
    lambda found: found.pop("history"), lambda found: found.update(phase="nope"),
    lambda found: found.update(best=5),
    lambda found: found["adapter"].popitem(), lambda found: found.update(order=torch.zeros(3)),
    lambda found: found["best"]["prefix"].pop("adapter"),
    lambda found: found["optimizer"]["state"][1].pop("step"),
    # read beyond its end, if used
    lambda found: found["optimizer"]["state"][1].update(exp_avg=torch.zeros(3))])
def test_a_state_that_does_not_fit_is_refused(monkeypatch, tmp_path, files, change):
    task = stopped(monkeypatch, tmp_path / "task", files, 2)
    found = torch.load(task / "resume.pt", weights_only=True)
    change(found)
    torch.save(found, task / "resume.pt")
    with pytest.raises(UserError,
                       match=r"resume\.pt does not hold what belongs there.*; delete it to begin"):
        resume(monkeypatch, task)


def test_nobody_else_writes_into_a_task_and_no_unfinished_one_is_begun_anew(
        monkeypatch, tmp_path, files, trained):
    task = stopped(monkeypatch, tmp_path / "task", files, 2)
    before = {path: path.read_bytes() for path in task.glob("[!.]*")}
    with only_writer(task), pytest.raises(
            UserError, match=r"is being written by process \d+ on .* since .*: wait for it$"):
        resume(monkeypatch, task)
    for flags in ([], ["--checkpoint", str(trained[0] / "best_model.pt")]):
        flags += ["--task_folder", str(task)]
        with pytest.raises(UserError, match="holds an unfinished training: go on with --resume"):
            run_main(monkeypatch, tmp_path / "other", files["train"], files["test"], *flags)
    assert {path: path.read_bytes() for path in task.glob("[!.]*")} == before
    with only_writer(tmp_path), pytest.raises(UserError, match="is being written by process"):
        run_main(monkeypatch, tmp_path / "other", files["train"], files["test"], "--task_folder",
                 str(tmp_path))


# -------------------------------------------------------------------------------------- checkpoints
def test_a_measured_checkpoint_gives_the_numbers_of_its_training(trained, monkeypatch, tmp_path, files):
    task, results = trained
    flags = ["--checkpoint", str(task / "best_model.pt")]
    _, again = run_main(monkeypatch, tmp_path, None, files["test"], *flags)
    assert again["metrics"]["test"]["adapter"] == results["metrics"]["test"]["adapter"]
    assert again["metrics"]["test"]["constant_string"] is None and again["history"] == []


def test_a_checkpoint_of_another_conditioning_or_without_drafts_is_refused(
        trained, monkeypatch, tmp_path, files):
    flags = ["--checkpoint", str(trained[0] / "best_model.pt")]
    with pytest.raises(UserError,
                       match=r"trained in draft conditioning, wanted --conditioning prefix\+draft"):
        run_main(monkeypatch, tmp_path, None, files["test"], *flags, "--conditioning",
                 "prefix+draft")
    pairs = json.loads(files["test"].read_text())
    pairs["results"] = [{**row, "egpt_tokens": []} for row in pairs["results"]]
    (tmp_path / "no_drafts.json").write_text(json.dumps(pairs))
    with pytest.raises(UserError, match=r"no_drafts\.json holds no draft token at all"):
        run_main(monkeypatch, tmp_path, None, tmp_path / "no_drafts.json", *flags)


def test_a_checkpoint_whose_logits_overflow_is_a_user_error(trained, monkeypatch, tmp_path, files):
    checkpoint = torch.load(trained[0] / "best_model.pt", weights_only=True)
    checkpoint["model_state_dict"]["output_proj.1.weight"] *= 1e38
    checkpoint["model_state_dict"]["output_proj.0.weight"] *= 1e10
    torch.save(checkpoint, tmp_path / "huge.pt")
    with pytest.raises(UserError, match="logits on the test pairs are no numbers"):
        run_main(monkeypatch, tmp_path, None, files["test"], "--checkpoint", str(tmp_path / "huge.pt"))


def test_a_figure_that_is_no_number_is_written_as_null_and_named(monkeypatch, tmp_path, files, capsys):
    monkeypatch.setattr(evaluation, "step_ms", lambda adapter, pairs: float("nan"))
    task, results = run_main(monkeypatch, tmp_path, files["train"], files["test"], "--conditioning",
                             "prefix", "--num_epochs", "1", "--no-refit", "--no-online")
    assert results["metrics"]["test"]["step_ms"] is None and (task / "RESULTS.md").exists()
    warning = "no finite numbers, written as null: metrics.test.step_ms"
    assert warning in capsys.readouterr().out


def test_the_smallest_width_trains_and_is_measured(monkeypatch, tmp_path, files):
    for conditioning in ("prefix+draft", "draft"):
        _, results = run_main(monkeypatch, tmp_path / conditioning, files["train"], files["test"],
                              "--max_seq_len", "2", "--conditioning", conditioning, "--num_epochs",
                              "1")
        assert results["metrics"]["test"]["adapter"]["alpha"] >= 0


def test_an_original_checkpoint_is_measured_by_its_own_contract(trained, monkeypatch, tmp_path, files):
    checkpoint = torch.load(trained[0] / "best_model.pt", weights_only=True)
    torch.save({**checkpoint, "config": {"num_heads": 2}}, tmp_path / "old.pt")
    flags = ["--checkpoint", str(tmp_path / "old.pt")]
    _, results = run_main(monkeypatch, tmp_path / "task", files["train"], files["test"], *flags)
    assert results["adapter"]["contract"] == "target[i+1] from draft[:i+1]"
    assert results["metrics"]["test"]["adapter"]["first_token"] == 0.0
    assert results["metrics"]["test"]["adapter"]["alpha"] < 0.2
    assert results["metrics"]["train"]["pairs"] == 80


# -------------------------------------------------------------------------------- vocabulary, flags
@pytest.mark.parametrize(("recorded", "flag", "wanted"), [
    ({}, 0, 64), ({"vocab_size": 70}, 0, 70), ({}, 45, 45)])
def test_the_vocabulary_is_the_flag_else_recorded_else_from_the_ids(tmp_path, recorded, flag, wanted):
    path = write_pairs(tmp_path / "pairs.json", ["a_a", "b_b"], **recorded)
    config = TrainConfig(test_benchmark=[path], train_benchmark=[path], vocab_size=flag, embed_dim=8,
                         conditioning="prefix")
    data = train_and_evaluate.open_data(config)
    make = train_and_evaluate.adapter_maker(config, data, torch.device("cpu"))
    assert make(data.train).config.vocab_size == wanted


def test_an_id_outside_the_vocabulary_names_the_file_the_id_and_the_size(tmp_path, files):
    odd = write_pairs(tmp_path / "odd.json", ["c_c"])
    odd.write_text(odd.read_text().replace('"vl_tokens": [', '"vl_tokens": [2000000, ', 1))
    for vocab_size, size in ((0, 2**20), (64, 64)):
        config = TrainConfig(test_benchmark=[files["test"], odd], train_benchmark=[files["train"]],
                             vocab_size=vocab_size)
        with pytest.raises(UserError,
                           match=rf"odd\.json holds the token id 2000000, .* size {size};"):
            data = train_and_evaluate.open_data(config)
            train_and_evaluate.adapter_maker(config, data, torch.device("cpu"))


@pytest.mark.parametrize(("flags", "words"), [
    ({"max_seq_len": 1}, "--max_seq_len must be 2 or more"), ({"bos_id": -1}, "--bos_id must be 0 or more"),
    ({"num_epochs": 0}, "--num_epochs must be 1 or more, got 0"),
    ({"num_heads": 7}, "--num_heads must divide"),
    ({"val_fraction": 1.0}, "--val_fraction"), ({"learning_rate": float("nan")}, "--learning_rate"),
    ({"max_train_samples": 1}, "--max_train_samples"),
    ({"device": "gpu"}, "--device"), ({"seed": -1}, "--seed"),
    ({"task_name": "../1s"}, "--task_name"), ({"vocab_size": 2**21}, "--vocab_size"),
    ({"draft_vocab": True, "conditioning": "draft"}, "--draft_vocab"),
    ({"draft_vocab": True, "checkpoint": Path("a.pt")}, "--draft_vocab"),
    ({"max_test_samples": 0}, "--max_test_samples"),
    ({"embed_dim": 10**20}, "--embed_dim must be at most 16384"),
    ({"max_seq_len": 10**12}, "--max_seq_len must be at most"), ({"device": "cuda:" + "9" * 20}, "--device"),
    ({"train_benchmark": None}, "--train_benchmark is missing")])
def test_an_impossible_setting_is_a_user_error(flags, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**{"test_benchmark": [Path("test")], "train_benchmark": [Path("train")], **flags})


def test_a_gpu_that_is_not_there_is_a_user_error():
    with pytest.raises(UserError, match="CUDA devices"):
        choose_device("cuda:99")


def test_a_finished_task_folder_is_not_touched(monkeypatch, tmp_path, trained, files):
    before = {path: path.read_bytes() for path in trained[0].glob("[!.]*")}
    with pytest.raises(UserError, match="holds a finished task"):
        run_main(monkeypatch, tmp_path, files["train"], files["test"], "--task_folder", str(trained[0]))
    assert {path: path.read_bytes() for path in trained[0].glob("[!.]*")} == before


# ------------------------------------------------------------------------------ prefix conditioning
@pytest.fixture(scope="module")
def by_conditioning(files, tmp_path_factory) -> dict:
    """results.json and folder of one small run each; online steps and a second training on all
    pairs included.
    """
    runs = {}
    for name, flags in (("prefix", ["--no-refit"]), ("prefix+draft", []),
                        ("no stream", ["--no-refit",
                                       "--no-stream"]), ("draft_vocab", ["--draft_vocab"])):
        with pytest.MonkeyPatch.context() as monkeypatch:
            conditioning = name if name.startswith("prefix") else "prefix"
            runs[name] = run_main(monkeypatch, tmp_path_factory.mktemp("task"), files["train"],
                                  files["test"], "--conditioning", conditioning, "--num_epochs",
                                  "6", *flags)
    return runs


def test_prefix_with_drafts_begins_as_the_very_run_without_them(by_conditioning):
    alone, both = (by_conditioning[name][1]["history"] for name in ("prefix", "prefix+draft"))
    numbers = [[(epoch["train_loss"], epoch["validation_alpha"]) for epoch in history
                if epoch["phase"] == "prefix"] for history in (alone, both)]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 6
    assert [epoch["phase"] for epoch in both[6:]] == ["prefix+draft"] * 3


def test_the_kept_adapter_is_of_the_phase_that_validation_chose(by_conditioning):
    task, results = by_conditioning["prefix+draft"]
    best = max(results["history"], key=lambda epoch: epoch["validation_alpha"])
    assert results["best_epoch"] == best["epoch"] and results["refitted"]
    assert load_adapter(task / "best_model.pt").config.conditioning == best["phase"]
    assert results["metrics"]["validation"]["adapter"]["alpha"] == best["validation_alpha"]


def test_every_drafter_is_measured_on_the_same_answers(by_conditioning):
    test = by_conditioning["prefix+draft"][1]["metrics"]["test"]
    assert {
        "copy of the draft", "constant string", "n-gram", "memory", "adapter", "adapter, online",
        "hybrid", "hybrid, online"
    } <= set(test["drafters"])
    assert test["drafters"]["copy of the draft"]["alpha"] == test["direct_copy"]["alpha"]
    assert test["drafters"]["adapter"]["alpha"] == pytest.approx(test["adapter"]["alpha"])
    for drafter in test["drafters"].values():
        assert sum(drafter["per_position"]["count"]) == test["positions"]
        for gamma, found in drafter["simulated"].items():
            assert 1 <= found["tau"] <= int(gamma) + 1


def test_without_streaming_nothing_learns_from_the_test_answers(by_conditioning):
    drafters = by_conditioning["no stream"][1]["metrics"]["test"]["drafters"]
    assert drafters["memory"]["alpha"] == drafters["n-gram"]["alpha"]
    assert "adapter, online" not in drafters


def test_a_draft_vocabulary_scores_the_target_tokens_of_training(by_conditioning, files):
    task, results = by_conditioning["draft_vocab"]
    adapter = load_adapter(task / "best_model.pt")
    assert adapter.output_ids.tolist() == np.unique(load_pairs([files["train"]]).target).tolist()
    assert results["adapter"]["draft_vocab"] == 40 < results["adapter"]["vocab_size"]
    assert results["metrics"]["test"]["drafters"]["hybrid"]["alpha"] > 0


def test_a_large_adapter_on_a_cpu_is_measured_on_a_part_of_every_sequence_and_the_report_says_so(
        by_conditioning, monkeypatch, tmp_path):
    test = write_pairs(tmp_path / "test.json", ["basel_03_a", "bern_07_a"], pairs_each=20)
    flags = ["--conditioning", "prefix", "--checkpoint", str(by_conditioning["prefix"][0] / "best_model.pt")]
    monkeypatch.setattr(train_and_evaluate, "SMALL_ADAPTER", 10)
    monkeypatch.setattr(train_and_evaluate, "CPU_SAMPLES", 8)
    for number, extra in ((8, []), (40, ["--max_test_samples",
                                         "-1"]), (5, ["--max_test_samples", "5"])):
        task, results = run_main(monkeypatch, tmp_path / f"{number}", None, test, *flags, *extra)
        measured = results["metrics"]["test"]
        assert (measured["pairs"], measured["whole_test"]) == (number, 40)
        assert ("of 40 test pairs" in (task / "RESULTS.md").read_text()) == (number < 40)
        assert "adapter, online" not in measured["drafters"]
