"""The target alone, on a folder of videos without events: from extraction to DECODE.md and the summary."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import report
import speculative_decode
import train_and_evaluate
from base import UserError
from drafting.table import LIVE_NAMES
from pairs.formats import load_pairs
from pairs.journal import Journal
from tests.conftest import rows_of

TINY = [
    "--embed_dim",
    "32",
    "--num_layers",
    "1",
    "--num_heads",
    "2",
    "--num_epochs",
    "2",
    "--no-refit",
    "--no-online",
    "--device",
    "cpu",
    "--no-plots",
]


def call(monkeypatch, program, *words) -> None:
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    program.main()


@pytest.fixture(scope="module")
def videos(demo, tmp_path_factory) -> Path:
    """The videos of the demo's test clips alone, sequence by sequence."""
    return Path(shutil.copytree(demo.test_1s / "mp4", tmp_path_factory.mktemp("videos") / "test"))


@pytest.fixture(scope="module")
def videos_task(demo, videos, tmp_path_factory) -> dict:
    """All steps once: {"pairs", "task", "decoding": folders and files, "log"}."""
    import extract_tokens_train

    folder = tmp_path_factory.mktemp("target_alone")
    places = {
        "pairs": folder / "pairs.json",
        "task": folder / "task",
        "decoding": folder / "decoding",
    }
    target = (
        "--target_model",
        demo.models / "video_llava",
        "--draft_model",
        "none",
        "--device",
        "cpu",
        "--max_new_tokens",
        80,
        "--dataset_dir",
        videos,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, extract_tokens_train, *target, "--output_file", places["pairs"])
        call(
            monkeypatch,
            train_and_evaluate,
            "--train_benchmark",
            places["pairs"],
            "--test_benchmark",
            places["pairs"],
            "--task_folder",
            places["task"],
            *TINY,
        )
        call(
            monkeypatch,
            speculative_decode,
            *target,
            "--task",
            places["task"],
            "--max_samples",
            3,
            "--compare",
            "--no-plots",
            "--output_folder",
            places["decoding"],
        )
    return places


def test_rows_have_empty_drafts_and_the_targets_own_answers(videos_task, demo):
    output = json.loads(videos_task["pairs"].read_text())
    assert output["eventgpt_success"] == 0 < output["videollava_success"] == output["total_samples"]
    assert set(output["models"]) == {"videollava"} and output["settings"]["draft_model"] == "none"
    assert not {"event_images", "draft_sees"} & set(output["settings"])
    both = json.loads((demo.tokens / "test_tokens_1s.json").read_text())
    answers = {(row["sequence"], row["clip"]): row["vl_tokens"] for row in rows_of(both)}
    for row in rows_of(output):
        assert (row["egpt_tokens"], row["egpt_text"], row["egpt_finished"]) == ([], "", False)
        assert row["vl_tokens"] == answers[row["sequence"], row["clip"]]
    pairs = load_pairs([videos_task["pairs"]])
    assert not pairs.has_drafts and not pairs.files[0]["flagged"]


def test_training_chooses_prefix_and_shows_no_copy_of_drafts(videos_task):
    results = json.loads((videos_task["task"] / "results.json").read_text())
    assert results["config"]["conditioning"] == results["adapter"]["conditioning"] == "prefix"
    assert results["metrics"]["test"]["direct_copy"] is None
    assert "copy of the draft" not in results["metrics"]["test"]["drafters"]
    page = (videos_task["task"] / "RESULTS.md").read_text()
    assert "these pairs have no drafts" in page and "| - |" in page


@pytest.mark.parametrize("conditioning", ["draft", "prefix+draft"])
def test_a_conditioning_that_reads_drafts_is_refused(
    videos_task, monkeypatch, tmp_path, conditioning
):
    with pytest.raises(
        UserError, match=r"holds no draft token at all, which .* --conditioning prefix"
    ):
        call(
            monkeypatch,
            train_and_evaluate,
            "--train_benchmark",
            videos_task["pairs"],
            "--test_benchmark",
            videos_task["pairs"],
            "--task_dir",
            tmp_path,
            *TINY,
            "--conditioning",
            conditioning,
        )
    assert not list(tmp_path.iterdir())


def test_every_drafter_that_reads_no_draft_decodes_losslessly(videos_task, monkeypatch, capsys):
    decoding = json.loads((videos_task["decoding"] / "decode.json").read_text())
    names = set(LIVE_NAMES) - {"copy"}
    assert set(decoding["totals"]["runs"]) == names
    assert decoding["totals"]["verdicts"] == {"exact": 3 * (len(names) + 1)}
    assert set(decoding["models"]) == {"videollava"}
    page = (videos_task["decoding"] / "DECODE.md").read_text()
    assert "| no draft model ran | 3 |" in page and "draft charged" not in page
    call(monkeypatch, report, videos_task["task"])
    assert "these pairs have no drafts" in capsys.readouterr().out


def test_going_on_needs_the_same_choice_of_a_draft_model(
    videos_task, videos, extract, demo, monkeypatch
):
    """The answers of the target alone become pairs with drafts only under another name."""
    with pytest.raises(UserError, match=r'made differently .*draft_model: "none" there'):
        extract("--max_samples", -1, dataset_dir=videos, output_file=videos_task["pairs"])
    again = extract(
        "--max_samples",
        -1,
        "--draft_model",
        "none",
        dataset_dir=videos,
        output_file=videos_task["pairs"],
    )
    assert len(rows_of(again)) == again["videollava_success"]


def test_a_stopped_extraction_of_the_target_alone_goes_on(videos, extract, tmp_path, monkeypatch):
    append, calls = Journal.append, []

    def append_until_stopped(journal, entries):
        append(journal, entries)
        calls.append([entry["key"] for entry in entries if "key" in entry])
        if len(calls) == 2:                            # the facts of the model, then one batch
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", append_until_stopped)
    flags = ("--draft_model", "none", "--batch_size", 2)
    with pytest.raises(KeyboardInterrupt):
        extract(*flags, dataset_dir=videos)
    output = extract(*flags, dataset_dir=videos)
    keys = [key for entries in calls for key in entries]
    assert len(rows_of(output)) == len(keys) == len(set(keys)) == 5


def test_a_draft_model_may_answer_from_the_frames_of_clips_without_events(videos, extract, demo):
    """The demo's target as its own draft: both say the same."""
    output = extract(
        "--draft_model", demo.models / "video_llava", "--draft_sees", "frames", "--max_samples", 2,
        dataset_dir=videos)
    assert [row["egpt_tokens"] for row in rows_of(output)] == [
        row["vl_tokens"] for row in rows_of(output)] and output["same_tokenizer"]


def test_unreadable_videos_cost_their_clips_alone(videos_task, videos, extract, tmp_path):
    broken = Path(shutil.copytree(videos, tmp_path / "broken"))
    first, *others = sorted(broken.rglob("*.mp4"))
    first.write_bytes(first.read_bytes()[:300])
    for path in others[2:]:
        path.unlink()
    output = extract("--draft_model", "none", dataset_dir=broken)
    assert len(rows_of(output)) == 2
    assert [(row["model"], row["clip"]) for row in output["failed"]] == [
        ("videollava", int(first.stem))
    ]
    for path in others[:2]:
        path.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"none of 3 clips could be answered; the first reason"):
        extract("--draft_model", "none", dataset_dir=broken, output_file=tmp_path / "none.json")


def test_events_are_missed_only_by_a_draft_model_that_reads_them(videos, extract, tmp_path):
    with pytest.raises(
        UserError, match=r"none of 5 clips .* --draft_sees frames, or --draft_model none"
    ):
        extract(dataset_dir=videos, output_file=tmp_path / "events.json")
    with pytest.raises(UserError, match=r"is an EventGPT, .* reads no video frames"):
        extract("--draft_sees", "frames", dataset_dir=videos, output_file=tmp_path / "frames.json")
