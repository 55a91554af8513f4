"""Extraction goes on where it was stopped, and with clips that failed; with nothing that differs now."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm.contract
from base import UserError
from clips.limits import MediaError
from extraction import output as output_module
from extraction.model_pass import earlier_revision
from machine.journal import line_of
from pairs.journal import Journal
from tests.conftest import ROOT, rows_of
from vlm.batches import Batches
from vlm.roles import DRAFT, TARGET, Role


def stop_before_the_output(monkeypatch, extract, *flags, **where) -> None:
    """Answer everything, and end as if the machine had stopped before the output was written."""
    with monkeypatch.context() as stopped, pytest.raises(ZeroDivisionError):
        stopped.setattr(output_module, "write_output", lambda *_: 1 / 0)
        extract(*flags, **where)


def journal_of(folder) -> list[dict]:
    lines = (folder / ".pairs.json.journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def answered(folder) -> list[tuple]:
    return [(line["model"], line["key"]) for line in journal_of(folder) if "key" in line]


@pytest.fixture
def answers(monkeypatch):
    """The number of clips that each model was asked about, in order."""
    counts, answer = [], Batches.answer

    def counted(batches, pixels, *how):
        counts.append(len(pixels))
        return answer(batches, pixels, *how)

    monkeypatch.setattr(Batches, "answer", counted)
    return counts


def test_a_stopped_run_goes_on_where_it_was(extract, tmp_path, monkeypatch):
    undisturbed = extract("--batch_size", 2, output_file=tmp_path / "whole.json")
    append, calls = Journal.append, []

    def append_until_killed(journal, entries):
        append(journal, entries)
        calls.append(entries)
        if len(calls) in (3, 7):          # each load of a model counts as one: after 2 and 1 batches
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", append_until_killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            extract("--batch_size", 2)
        assert not (tmp_path / "pairs.json").exists()
    journal = tmp_path / ".pairs.json.journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])              # and the last line is torn
    resumed = extract("--batch_size", 2)
    assert rows_of(resumed) == rows_of(undisturbed)
    assert resumed["models"] == undisturbed["models"]
    assert [facts["bos_id"] for facts in resumed["models"].values()] == [1, 1]
    assert not journal.exists()
    answers = [(e["model"], e["key"]) for entries in calls for e in entries if "key" in e]
    # Only the torn one was answered twice
    assert len(answers) == len(set(answers)) + 1


def test_a_model_that_answered_in_an_earlier_start_may_fail_first_in_the_next(extract, monkeypatch):
    monkeypatch.setattr(vlm.contract, "FAILURES_AT_START", 1)
    answer, calls = Batches.answer, []

    def answer_or_fail(batches, pixels, *how):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        if len(calls) == 4:
            return lambda: [vlm.contract.NotNumbers("float32")] * len(pixels)
        return answer(batches, pixels, *how)

    monkeypatch.setattr(Batches, "answer", answer_or_fail)
    with pytest.raises(KeyboardInterrupt):
        extract("--batch_size", 1)
    resumed = extract("--batch_size", 1)
    assert len(rows_of(resumed)) == 4 and len(resumed["failed"]) == 1


def test_a_finished_output_is_not_touched_again(extract, tmp_path):
    extract()
    before = (tmp_path / "pairs.json").read_bytes()
    extract()
    assert (tmp_path / "pairs.json").read_bytes() == before
    with pytest.raises(UserError, match="max_new_tokens: 80 there, 9 now"):
        extract("--max_new_tokens", 9)
    (tmp_path / "pairs.json").write_text('{"results": []}')
    with pytest.raises(UserError, match="--restart"):
        extract()
    assert len(rows_of(extract("--restart", None))) == 5


def test_a_finished_output_of_a_data_set_that_changed_since_is_not_called_finished(extract, copy, tmp_path):
    extract(dataset_dir=copy)
    before = (tmp_path / "pairs.json").read_bytes()
    picture = next((copy / "event_image").rglob("*_0.png"))
    picture.write_bytes(picture.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"made differently \(dataset_content: .*--restart"):
        extract(dataset_dir=copy)
    assert (tmp_path / "pairs.json").read_bytes() == before
    old = {**json.loads(before)}
    del old["dataset_content"]                                # as earlier versions wrote it
    (tmp_path / "pairs.json").write_text(json.dumps(old))
    extract(dataset_dir=copy)


def test_a_finished_output_needs_no_model_and_no_heavy_import(extract, tmp_path, monkeypatch):
    extract()
    monkeypatch.setattr(Role, "load", None)
    extract()
    code = ("import sys, extract_tokens_train\nextract_tokens_train.main()\n"
            "assert not {'torch', 'transformers', 'av'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, *sys.argv[1:]], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "finished before: 5 pairs" in done.stdout, done.stderr


def test_clips_that_change_between_two_starts_are_refused_and_mended_ones_are_not(
        extract, copy, monkeypatch):
    rows = json.loads((copy / "EventGPT_Instruction_Subset.json").read_text())
    bad, good = (copy / "mp4" / rows[number]["mp4_data"] for number in (0, 1))
    png_bytes = bad.read_bytes()
    bad.write_bytes(b"junk")
    with monkeypatch.context() as stopped, pytest.raises(ZeroDivisionError):
        stopped.setattr(output_module, "write_output", lambda *_: 1 / 0)
        extract(dataset_dir=copy)
    video = good.read_bytes()
    good.write_bytes(video + b"\0")
    with pytest.raises(UserError, match=r"files of 1 answered clips have changed.* \(videollava"):
        extract(dataset_dir=copy)
    good.write_bytes(video)
    bad.write_bytes(png_bytes)                # it had failed: nothing depends on what it was
    output = extract(dataset_dir=copy)
    assert len(rows_of(output)) == 5 and not output["failed"]


def test_a_journal_of_other_settings_is_refused(extract, tmp_path):
    journal = tmp_path / ".pairs.json.journal.jsonl"
    answer = {"model": "eventgpt", "key": "a/1", "question_idx": 0, "tokens": [2], "text": "",
              "finished": True}
    journal.write_bytes(line_of({"settings": {"max_new_tokens": 3}}) + line_of(answer))
    with pytest.raises(UserError, match="max_new_tokens: 3 there, 80 now"):
        extract()
    assert journal.exists()


@pytest.mark.parametrize("content", [b"", b'{"results": [', b'{"results": []}'])
def test_a_damaged_output_says_what_can_be_done(extract, tmp_path, content):
    output = extract()
    path = tmp_path / "pairs.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="choose another --output_file, or --restart to replace it"):
        extract()
    path.write_text(json.dumps({**output, "results": output["results"][1:]}))
    with pytest.raises(UserError, match="was changed: it holds 4 pairs and says that it has 5"):
        extract()
    assert "--restart" not in sys.argv


# ------------------------------------------------------------------ clips that failed, tried again
def files_of(folder, number: int) -> tuple:
    """(the first event picture, the video) of a clip."""
    row = json.loads((folder / "EventGPT_Instruction_Subset.json").read_text())[number]
    return folder / "event_image" / row["event_image"][0], folder / "mp4" / row["mp4_data"]


def unreadable():
    raise MediaError("as if broken")


def test_clips_that_failed_are_tried_again_by_the_same_command_and_no_others(
        extract, copy, tmp_path, answers):
    wanted = extract(dataset_dir=copy, output_file=tmp_path / "whole.json")
    (picture, _), (_, video), (_, broken) = (files_of(copy, number) for number in (0, 3, 4))
    for file in (picture, video):
        file.rename(tmp_path / file.name)
    broken.write_bytes(b"junk")
    output = extract(dataset_dir=copy)
    assert [row["sample_idx"] for row in output["failed"]] == [0, 3, 4]

    answers.clear()
    before = (tmp_path / "pairs.json").read_bytes()
    # As broken as before: no model is loaded for that
    assert extract(dataset_dir=copy) and not answers
    assert (tmp_path / "pairs.json").read_bytes() == before
    for file in (picture, video):
        (tmp_path / file.name).rename(file)
    output = extract(dataset_dir=copy)
    assert answers == [3, 2]                            # clips 0, 3, 4; then 0, 3: 4 has no video
    assert rows_of(output) == rows_of(wanted)[:4] and [row["sample_idx"] for row in output["failed"]] == [4]
    assert not (tmp_path / ".pairs.json.journal.jsonl").exists()


def test_trying_failed_clips_again_is_stopped_without_losing_an_answer(
        extract, copy, tmp_path, monkeypatch, answers):
    """The output is there until a better one replaces it, and its answers are in the journal at once."""
    picture, _ = files_of(copy, 0)
    picture.rename(tmp_path / "picture")
    extract(dataset_dir=copy)
    before = (tmp_path / "pairs.json").read_bytes()
    (tmp_path / "picture").rename(picture)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(Batches, "answer", lambda *_: exec("raise KeyboardInterrupt"))
        extract(dataset_dir=copy)
    assert (tmp_path / "pairs.json").read_bytes() == before and len(answered(tmp_path)) == 8
    answers.clear()
    output = extract(dataset_dir=copy)
    assert answers == [1, 1] and len(rows_of(output)) == 5 and not output["failed"]


def test_an_output_of_an_earlier_version_goes_on_with_its_failed_clips(
        extract, demo, tmp_path, monkeypatch, answers):
    """Its failed rows say nothing of the files, its revisions tell names and sizes alone."""
    with monkeypatch.context() as broken:
        read = Role.pictures
        broken.setattr(Role, "pictures", lambda role, sample, view: unreadable() if (
            role is TARGET and sample.index == 2) else read(role, sample, view))
        output = extract()
    del output["format"]
    for row in output["failed"]:
        del row["content"]
    for role in (DRAFT, TARGET):
        folder = demo.models / {"draft": "eventgpt", "target": "video_llava"}[role.role]
        output["models"][role.name]["revision"] = earlier_revision(folder)
        del output["models"][role.name]["dtype"], output["models"][role.name]["quantization"]
    (tmp_path / "pairs.json").write_text(json.dumps(output))
    answers.clear()
    output = extract()
    assert answers == [1, 1] and len(rows_of(output)) == 5 and output["failed"] == []


@pytest.mark.parametrize("change", [
    {"--max_new_tokens": 9}, {"--num_frames": 4}, {"--event_images": "all"}, {"--query": "Why?"},
    {"--dtype": "bfloat16"}, {"--max_samples": 4}])
def test_failed_clips_are_not_tried_again_with_other_settings(extract, copy, tmp_path, change):
    picture, _ = files_of(copy, 0)
    picture.rename(tmp_path / "picture")
    extract(dataset_dir=copy)
    before = (tmp_path / "pairs.json").read_bytes()
    (tmp_path / "picture").rename(picture)
    with pytest.raises(UserError, match=r"made differently|its own settings alone"):
        extract(*next(iter(change.items())), dataset_dir=copy)
    assert (tmp_path / "pairs.json").read_bytes() == before


def test_failed_clips_are_not_tried_again_when_another_clip_has_changed(extract, copy, tmp_path):
    picture, _ = files_of(copy, 0)
    _, video = files_of(copy, 1)
    picture.rename(tmp_path / "picture")
    extract(dataset_dir=copy)
    (tmp_path / "picture").rename(picture)
    video.write_bytes(video.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"made differently \(dataset_content"):
        extract(dataset_dir=copy)


def test_a_row_of_the_data_set_that_was_mended_is_tried_again(extract, copy, answers):
    index = copy / "EventGPT_Instruction_Subset.json"
    rows = json.loads(index.read_text())
    index.write_text(json.dumps([rows[0], {**rows[1], "event_image": ["../../outside.png"]}, *rows[2:]]))
    assert [row["content"] for row in extract(dataset_dir=copy)["failed"]] == [None]
    index.write_text(json.dumps(rows))
    answers.clear()
    output = extract(dataset_dir=copy)
    assert answers == [1, 1] and len(rows_of(output)) == 5 and not output["failed"]


# --------------------------------------------------------------------------- a disk that goes away
@pytest.mark.parametrize("what", ["mp4", "event_image"])
def test_a_folder_that_goes_away_ends_the_run_and_the_same_command_goes_on(
        extract, copy, tmp_path, monkeypatch, what):
    wanted = extract("--max_samples", 20, output_file=tmp_path / "whole.json")
    role = {"mp4": TARGET, "event_image": DRAFT}[what]
    read, reads = Role.pictures, []

    def unmounted(self, sample, view):
        if self is role:
            reads.append(sample)
            if len(reads) == 9:
                (copy / what).rename(tmp_path / "unmounted")
        return read(self, sample, view)

    with monkeypatch.context() as gone, pytest.raises(UserError, match="when this run began and is gone"):
        gone.setattr(Role, "pictures", unmounted)
        extract("--max_samples", 20, "--batch_size", 2, "--num_workers", 1, dataset_dir=copy)
    assert not (tmp_path / "pairs.json").exists()
    answers_before = answered(tmp_path)
    assert 4 <= sum(model == role.name for model, _ in answers_before) < 20
    # Not mounted yet: nothing is given up for that
    with pytest.raises(UserError):
        extract("--max_samples", 20, dataset_dir=copy)
    assert answered(tmp_path) == answers_before
    (tmp_path / "unmounted").rename(copy / what)
    output = extract("--max_samples", 20, "--batch_size", 2, dataset_dir=copy)
    assert rows_of(output) == rows_of(wanted) and not output["failed"]


def test_a_machine_without_descriptors_fails_no_clip(extract, monkeypatch):
    def none_left(role, sample, view):
        raise OSError(24, "Too many open files", str(sample.video))

    monkeypatch.setattr(Role, "pictures", none_left)
    with pytest.raises(UserError, match=r"Too many open files.*no fault of the clip"):
        extract()


# ----------------------------------------------------------------------------------- other weights
@pytest.fixture
def models(demo, tmp_path) -> dict:
    """Copies of both model folders, which a test may change."""
    return {"--draft_model": shutil.copytree(demo.models / "eventgpt", tmp_path / "eventgpt"),
            "--target_model": shutil.copytree(demo.models / "video_llava", tmp_path / "video_llava")}


def change_weights(folder, change, name: str = "") -> None:
    """The same names, shapes and sizes; change(weights) of those whose name holds `name`."""
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        weights |= {key: change(weights[key]).contiguous() for key in weights if name in key}
        save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("flag", ["--draft_model", "--target_model"])
def test_other_weights_in_the_same_folder_are_refused_before_anything_is_loaded(
        extract, models, monkeypatch, tmp_path, flag):
    flags = [word for pair in models.items() for word in pair]
    stop_before_the_output(monkeypatch, extract, *flags)
    shutil.copytree(models[flag], tmp_path / "before")
    change_weights(models[flag], lambda values: values * 1.01, "layers.0")
    with monkeypatch.context() as light, pytest.raises(UserError, match=r"other weights of .*content"):
        light.setattr(Role, "load", None)
        extract(*flags)
    shutil.rmtree(models[flag])
    shutil.copytree(tmp_path / "before", models[flag])                # a copy, with other times
    assert len(rows_of(extract(*flags))) == 5


@pytest.mark.parametrize("recorded, goes_on", [
    ("local", True), ("local 0123456789ab", False), ("unknown", False), ("a" * 40, False)])
def test_revisions_that_do_not_tell_the_content(
        extract, demo, monkeypatch, tmp_path, capsys, recorded, goes_on):
    """"local ..." is what earlier versions recorded of names and sizes; "unknown" is equal to nothing."""
    stop_before_the_output(monkeypatch, extract)
    lines = journal_of(tmp_path)
    for line in lines:
        line.pop("crc")
        line.pop("of", None)
        if line.get("model") == "videollava" and "revision" in line:
            same = recorded == "local"
            line["revision"] = earlier_revision(demo.models / "video_llava") if same else recorded
    # Of the first format
    head = {"settings": lines[0]["settings"], "clips": lines[0]["clips"]}
    (tmp_path / ".pairs.json.journal.jsonl").write_bytes(b"".join(map(line_of, [head, *lines[1:]])))
    if goes_on:
        assert len(rows_of(extract())) == 5
        assert "does not tell the content of the weights" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=f"has answers of other weights of .*{recorded} there"):
            extract()


# ---------------------------------------------------------------------- logits that are no numbers
def spoilt(values: torch.Tensor) -> torch.Tensor:
    return torch.full_like(values, float("nan"))


@pytest.mark.parametrize("flag, name", [
    ("--draft_model", "layers.0.mlp"), ("--draft_model", "visual_projector"), ("--target_model", "lm_head"),
    ("--target_model", "layers.1.self_attn"), ("--target_model", "video_tower")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_of_no_numbers_is_one_error_and_no_output(extract, models, tmp_path, flag, name, dtype):
    change_weights(models[flag], spoilt, name)
    with pytest.raises(UserError,
                       match=rf"none of 5 clips could be answered.*{dtype} are no numbers"):
        extract(flag, models[flag], "--dtype", dtype)
    assert not (tmp_path / "pairs.json").exists()
    journal = answered(tmp_path)
    assert [model for model, _ in journal] == (["eventgpt"] * 5 if flag == "--target_model" else [])


def test_clips_without_numbers_fail_alone_and_are_tried_again(extract, tmp_path, monkeypatch, answers):
    wanted = extract("--batch_size", 4, output_file=tmp_path / "whole.json")
    read = Batches._read

    def one_spoilt(batches, pixels):
        pixels = [part * float("nan") if number == 2 else part for number, part in enumerate(pixels)]
        read(batches, pixels)

    with monkeypatch.context() as broken:
        broken.setattr(Batches, "_read", one_spoilt)
        output = extract("--batch_size", 4, "--parity_check", 9)
    failed = [(row["sample_idx"], row["model"]) for row in output["failed"]]
    assert failed == [(2, "eventgpt"), (3, "videollava")]
    assert all("float32 are no numbers" in row["reason"] for row in output["failed"])
    assert rows_of(output) == [row for row in rows_of(wanted) if row["sample_idx"] not in (2, 3)]
    assert output["models"]["videollava"]["parity"] == {"answers": 3, "equal": 3}
    answers.clear()
    output = extract("--batch_size", 4)
    assert rows_of(output) == rows_of(wanted) and not output["failed"] and answers == [2, 2]


# ------------------------------------------------------------ the output's folder, and the command
def test_a_folder_that_is_renamed_while_it_runs_is_noticed_at_the_next_batch(extract, tmp_path, monkeypatch):
    place, append = tmp_path / "place", Journal.append
    place.mkdir()

    def renamed(journal, rows):
        if len(journal) == 2:
            place.rename(tmp_path / "other")
        append(journal, rows)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="was removed or renamed while"):
        patch.setattr(Journal, "append", renamed)
        extract("--batch_size", 2, output_file=place / "pairs.json")
    (tmp_path / "other").rename(place)
    answers_before = len(answered(place))
    assert 4 <= answers_before <= 5
    assert len(rows_of(extract("--batch_size", 2, output_file=place / "pairs.json"))) == 5


def test_the_resume_line_survives_being_pasted(demo, tmp_path):
    """Two spaces, quotes, dollars, stars and a backslash in names: the shell gives the same words back."""
    folder = tmp_path / """two  spaces 'n "quotes" $HOME * \\ ?"""
    folder.mkdir()
    words = ["extract_tokens_train.py", "--dataset_dir", str(demo.test_1s), "--output_file",
             str(folder / "o.json"), "--query", "What's  *this* $HOME?", "--draft_model",
             str(demo.models / "eventgpt")]
    code = ("import extract_tokens_train, os, signal\n"
            "from machine import device, running\n"
            "device.Runtime.choose = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
            "running.run(extract_tokens_train.main)")
    code = f"import sys; sys.argv = {words!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 143, done.stderr
    line = done.stdout.splitlines()[-1].split(" RESUME | ")[1]
    printed = f"printf '%s\\n' {line}"
    pasted = subprocess.run(["bash", "-c", printed], text=True, capture_output=True, check=True)
    assert pasted.stdout.splitlines() == [sys.executable, *words]


# ---------------------------------------------------------------------------------- formats, order
def test_a_newer_output_is_refused_with_one_clear_line(extract, tmp_path):
    output = extract()
    assert output["format"] == 1
    (tmp_path / "pairs.json").write_text(json.dumps({**output, "format": 2}))
    with pytest.raises(UserError, match="has format 2, this version reads formats up to 1"):
        extract()


def test_pairs_come_in_the_natural_order_of_their_clips(extract, copy):
    """Without an index file the names tell the order: clip 9 comes before clip 10."""
    picture, video = files_of(copy, 0)
    (copy / "EventGPT_Instruction_Subset.json").unlink()
    for number in (9, 10, 11):
        for kind, file, name in (("event_image", picture, f"clip_of_a_long_name_{number}_0.png"),
                                 ("mp4", video, f"clip_of_a_long_name_{number}.mp4")):
            (copy / kind / "aa_first").mkdir(exist_ok=True)
            shutil.copy(file, copy / kind / "aa_first" / name)
    output = extract("--max_samples", 3, dataset_dir=copy)
    clips = [row["clip"] for row in rows_of(output)]
    assert clips == [f"clip_of_a_long_name_{number}" for number in (9, 10, 11)]
    assert [row["sample_idx"] for row in rows_of(output)] == [0, 1, 2]
