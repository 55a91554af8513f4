"""Decoding a data set with the demo's models: every answer the target's own, and mistakes said in one line."""

import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import decoding
import speculative_decode
from base import UserError
from decoding import Pace, judge
from speculative_decode import DRAFTERS, Task, check_target
from token_adapter import AdapterConfig, TokenAdapter, save_adapter


@pytest.fixture(scope="module")
def task(demo) -> Path:
    """The 1s task of the shortened demo."""
    return next(folder for folder in demo.tasks.glob("1s_2*"))


def run_main(monkeypatch, demo, task: Path, out: Path, *flags: str) -> dict:
    arguments = ["--task", str(task), "--dataset_dir", str(demo.test_1s), "--output_folder", str(out),
                 "--draft_model", str(demo.models / "eventgpt"), "--target_model", str(demo.models / "video_llava"),
                 "--max_samples", "4", "--max_new_tokens", "80", "--num_workers", "1", "--device", "cpu",
                 "--no-plots", *flags]
    monkeypatch.setattr(sys, "argv", ["speculative_decode.py", *arguments])
    speculative_decode.main()
    return json.loads((out / "decode.json").read_text())


@pytest.fixture(scope="module")
def compared(demo, task, tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_main(monkeypatch, demo, task, tmp_path_factory.mktemp("decode"), "--compare", "--gamma", "8")


def test_every_drafter_gives_the_answers_of_transformers_and_of_plain_decoding(compared):
    assert set(compared["totals"]["runs"]) == set(DRAFTERS)
    assert compared["totals"]["verdicts"] == {"exact": 4 * (len(DRAFTERS) + 1)}
    assert compared["totals"]["runs"]["none"]["tau"] == 1.0 < compared["totals"]["runs"]["hybrid"]["tau"]
    for answer in compared["answers"]:
        assert answer["generate"]["tokens"] == len(answer["tokens"])
        for run in answer["runs"].values():
            assert run["tokens"] == len(answer["tokens"]) <= sum(run["accepted"]) + len(run["accepted"])
            assert all(a <= p <= 8 for a, p in zip(run["accepted"], run["proposed"]))


def test_the_answers_are_those_that_extraction_wrote_for_these_clips(compared, demo):
    pairs = json.loads((demo.tokens / "test_tokens_1s.json").read_text())["results"]
    wanted = {(row["sequence"], row["clip"]): (row["vl_tokens"], row["vl_text"]) for row in pairs}
    for answer in compared["answers"]:
        assert (answer["tokens"], answer["text"]) == wanted[answer["sequence"], answer["clip"]]


def test_costs_are_measured_for_every_length_and_every_drafter(compared):
    costs = compared["costs_ms"]
    assert list(map(int, costs["verify"])) == list(range(1, 18)) and set(costs["proposal"]) == set(DRAFTERS)
    assert all(cost > 0 for cost in (*costs["verify"].values(), costs["vision"], costs["prefill"],
                                     *costs["eventgpt"]["verify"].values(), costs["proposal"]["hybrid"]))
    assert 0 < compared["noise"] < 1e-3


def test_clips_of_a_sequence_come_in_order_unless_shuffled(monkeypatch, demo, task, tmp_path):
    from vlm.dataset import read_dataset

    samples = read_dataset(demo.test_1s)
    ordered = speculative_decode.in_order(samples[::-1], SimpleNamespace(shuffle=False))
    by_sequence = [sample.sequence for sample in ordered]
    assert sum(a != b for a, b in itertools.pairwise(by_sequence)) == len(set(by_sequence)) - 1
    assert all(a.clip < b.clip for a, b in itertools.pairwise(ordered) if a.sequence == b.sequence)
    shuffled = speculative_decode.in_order(samples, SimpleNamespace(shuffle=True, seed=1))
    assert shuffled != ordered and sorted(map(id, shuffled)) == sorted(map(id, samples))


def test_several_questions_auto_gamma_and_shuffled_clips_are_lossless_too(monkeypatch, demo, task, tmp_path):
    (tmp_path / "questions.txt").write_text("What are the key elements in this scene?\nIs there a vehicle?\n")
    found = run_main(monkeypatch, demo, task, tmp_path / "out", "--compare", "--questions_file",
                     str(tmp_path / "questions.txt"), "--shuffle", "--max_samples", "3")
    assert found["gamma"] == "auto" and len(found["answers"]) == 6
    assert found["totals"]["verdicts"] == {"exact": 6 * (len(DRAFTERS) + 1)}


def test_a_temperature_samples_and_the_same_seed_samples_alike(monkeypatch, demo, task, tmp_path):
    flags = ["--temperature", "1.5", "--gamma", "3", "--max_samples", "2", "--drafter", "memory"]
    texts = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        found = run_main(monkeypatch, demo, task, tmp_path / name, *flags, "--seed", seed)
        texts.append([answer["text"] for answer in found["answers"]])
    assert texts[0] == texts[1] != texts[2]


def test_a_wrong_answer_ends_with_exit_3_and_the_report_says_where(monkeypatch, demo, task, tmp_path):
    right = decoding.greedy

    def careless(answer, proposed, following):             # believes a first proposal without a look
        emitted = right(answer, proposed, following)
        return proposed[:1] or emitted if len(answer) > 3 else emitted

    monkeypatch.setattr(decoding, "greedy", careless)
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, demo, task, tmp_path / "out", "--compare", "--max_samples", "1", "--gamma", "2")
    assert ended.value.code == 3
    found = json.loads((tmp_path / "out" / "decode.json").read_text())
    assert found["totals"]["verdicts"]["WRONG"] >= 1
    assert "WRONG" in (tmp_path / "out" / "DECODE.md").read_text()


def test_a_difference_is_a_tie_only_within_the_noise():
    class Target:
        def ask(self, embeds):
            pass

        def prefill(self, tokens):
            self.said = tokens
            return SimpleNamespace(logits=torch.tensor([[0.0, 5.0, 4.9]]))

    target = Target()
    assert judge([4, 5], [4, 5], target, None, 0.0) == {"verdict": "exact"}
    found = judge([4, 5, 6], [4, 7, 6], target, None, 0.2)
    assert target.said == [4] and found["position"] == 1 and found["gap"] == pytest.approx(0.1, abs=1e-3)
    assert found["verdict"] == "tie" and judge([4, 5], [4, 7], target, None, 0.05)["verdict"] == "WRONG"


def test_the_price_of_a_second_is_what_it_brought_so_far():
    pace = Pace(0.01)
    assert pace.price() == pytest.approx(100)
    pace.add(decoding.Decoded([1] * 9, draft_s=0.004, verify_s=0.006))      # 10 tokens in 0.02 s
    assert pace.price() == pytest.approx(500)


# ----------------------------------------------------------------------------------------------- mistakes
def test_a_folder_that_is_no_finished_task_is_refused(monkeypatch, demo, task, tmp_path):
    for missing in ("best_model.pt", "results.json"):
        broken = tmp_path / missing
        shutil.copytree(task, broken)
        (broken / missing).unlink()
        with pytest.raises(UserError, match=f"no finished task: it has no {missing}"):
            run_main(monkeypatch, demo, broken, tmp_path / "out")
    (broken / "results.json").write_text("[]")
    with pytest.raises(UserError, match="is not the results"):
        run_main(monkeypatch, demo, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_of_another_target_is_refused_with_both_named():
    def trained(**recorded) -> Task:
        return Task(Path("task"), None, [], 0.5, {}, {"name": "other", **recorded})

    with pytest.raises(UserError, match=r"answers of other \(vocab_size 32064\), but mine has vocab_size 691"):
        check_target(trained(vocab_size=32064), "mine", "local abc", 691)
    with pytest.raises(UserError, match=r"revision local abc.*has revision local def"):
        check_target(trained(vocab_size=691, revision="local abc"), "mine", "local def", 691)
    check_target(trained(vocab_size=691, revision="local"), "mine", "local def", 691)
    check_target(Task(Path("task"), None, [], 0.5, {}, {}), "mine", "local def", 691)


def test_an_adapter_of_a_larger_vocabulary_still_decodes_losslessly(monkeypatch, demo, task, tmp_path):
    """Its ids beyond the target's are never fed; a task without memory.npz begins with an empty memory."""
    other = tmp_path / "task"
    shutil.copytree(task, other, ignore=shutil.ignore_patterns("memory.npz", "decode_*"))
    torch.manual_seed(0)
    save_adapter(TokenAdapter(AdapterConfig(900, "prefix", 32, 1, 2, 64, 60)), other / "best_model.pt")
    found = run_main(monkeypatch, demo, other, tmp_path / "out", "--compare", "--max_samples", "2", "--gamma", "3")
    assert found["totals"]["verdicts"] == {"exact": 2 * (len(DRAFTERS) + 1)}


def test_a_data_set_without_media_is_one_clear_error(monkeypatch, demo, task, tmp_path):
    bare = tmp_path / "data"
    bare.mkdir()
    shutil.copy(demo.test_1s / "EventGPT_Instruction_Subset.json", bare)
    with pytest.raises(UserError, match=r"none of 4 clips could be .*the first reason: "):
        run_main(monkeypatch, demo, task, tmp_path / "out", "--dataset_dir", str(bare))
    shutil.copytree(demo.test_1s / "event_image", bare / "event_image")
    with pytest.raises(UserError, match="none of 4 clips could be decoded; the first reason: "):
        run_main(monkeypatch, demo, task, tmp_path / "out", "--dataset_dir", str(bare))


@pytest.mark.parametrize(("flags", "words"), [
    (["--gamma", "0"], "--gamma must be auto or from 1 to 16, got 0"), (["--gamma", "17"], "--gamma"),
    (["--temperature", "-1"], "--temperature"), (["--temperature", "1", "--compare"], "--compare needs greedy"),
    (["--max_new_tokens", "0"], "--max_new_tokens"), (["--max_samples", "0"], "--max_samples"),
    (["--query", " "], "--query is empty"), (["--draft_model", "nowhere"], "no such folder: nowhere"),
    (["--drafter", "oracle"], "--drafter"), (["--task", "nowhere"], "nowhere is no finished task")])
def test_a_mistake_in_the_flags_is_a_user_error(monkeypatch, demo, task, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run_main(monkeypatch, demo, task, tmp_path / "out", *flags)


def test_a_finished_decoding_is_not_touched(monkeypatch, demo, task, tmp_path):
    (tmp_path / "DECODE.md").write_text("done")
    with pytest.raises(UserError, match="holds a finished decoding"):
        run_main(monkeypatch, demo, task, tmp_path)
    assert (tmp_path / "DECODE.md").read_text() == "done"
