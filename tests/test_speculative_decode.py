"""Decoding a data set with the demo's models: every answer the target's own, and mistakes said in
one line.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import decoding.answers
import decoding.parallel
import decoding.rules
import speculative_decode
import vlm.contract
import vlm.roles
from base import UserError
from decoding.clips import in_order
from decoding.costs import Pace
from decoding.limits import MAX_NODES, MEASURED_SIZES
from decoding.loop import Decoded
from decoding.results import title_of
from decoding.task import Task, check_model, read_task
from decoding.verdict import judge
from drafting.checkpoints import save_adapter
from drafting.parts import LiveParts
from drafting.table import LIVE_NAMES
from machine.files import only_writer
from token_adapter import AdapterConfig, TokenAdapter
from vlm.roles import DRAFT, ROLES, TARGET
from vlm.video_llava import VideoLlava


@pytest.fixture(scope="module")
def task(demo) -> Path:
    """The 1s task of the shortened demo."""
    return next(folder for folder in demo.tasks.glob("1s_2*"))


def run_main(monkeypatch, demo, task: Path, out: Path, *flags: str,
             without: tuple[str, ...] = ()) -> dict:
    """without: flags that are left out, with their values."""
    arguments = [
        "--task",
        str(task), "--dataset_dir",
        str(demo.test_1s), "--output_folder",
        str(out), "--draft_model",
        str(demo.models / "eventgpt"), "--target_model",
        str(demo.models / "video_llava"), "--max_samples", "4", "--max_new_tokens", "80",
        "--num_workers", "1", "--device", "cpu", "--no-plots", *flags
    ]
    for flag in without:
        at = arguments.index(flag)
        del arguments[at:at + 2]
    monkeypatch.setattr(sys, "argv", ["speculative_decode.py", *arguments])
    speculative_decode.main()
    return json.loads((out / "decode.json").read_text())


@pytest.fixture(scope="module")
def compared(demo, task, tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_main(monkeypatch, demo, task, tmp_path_factory.mktemp("decode"), "--compare",
                        "--gamma", "8")


def test_every_drafter_gives_the_answers_of_transformers_and_of_plain_decoding(compared):
    assert set(compared["totals"]["runs"]) == set(LIVE_NAMES)
    assert compared["totals"]["verdicts"] == {"exact": 4 * (len(LIVE_NAMES) + 1)}
    assert compared["totals"]["runs"]["none"]["tau"] == 1.0 < compared["totals"]["runs"]["hybrid"][
        "tau"]
    for answer in compared["answers"]:
        assert answer["generate"]["tokens"] == len(answer["tokens"])
        for run in answer["runs"].values():
            assert run["tokens"] == len(
                answer["tokens"]) <= sum(run["accepted"]) + len(run["accepted"])
            assert all(a <= p <= MAX_NODES for a, p in zip(run["accepted"], run["proposed"]))


def test_the_text_of_tokens_is_told_for_answers_whose_proposals_are_not_kept_too(
        monkeypatch, demo, task, tmp_path):
    monkeypatch.setattr(decoding.answers, "RECORDED_ANSWERS", 1)
    results = run_main(monkeypatch, demo, task, tmp_path, "--max_samples", "3", "--drafter", "memory")
    assert ["passes" in answer for answer in results["answers"]] == [True, False, False]
    tokens = {str(token) for answer in results["answers"] for token in answer["tokens"]}
    assert tokens <= results["words"].keys()


def test_a_model_of_another_kind_is_called_by_its_own_name(tmp_path):
    for kind in ("video_llava", "qwen2_5_vl"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind}))
    models = ("video_llava", "qwen2_5_vl", "gone")
    assert [title_of(TARGET, {"name": str(tmp_path / name)}) for name in models] == [
        "Video-LLaVA", "qwen2_5_vl", "gone"]
    assert title_of(DRAFT, None) == "EventGPT"                       # no draft model ran


def test_the_answers_are_those_that_extraction_wrote_for_these_clips(compared, demo):
    pairs = json.loads((demo.tokens / "test_tokens_1s.json").read_text())["results"]
    wanted = {(row["sequence"], row["clip"]): (row["vl_tokens"], row["vl_text"]) for row in pairs}
    for answer in compared["answers"]:
        assert (answer["tokens"], answer["text"]) == wanted[answer["sequence"], answer["clip"]]


def test_costs_are_measured_for_every_length_and_every_drafter(compared):
    costs = compared["costs_ms"]
    assert list(map(int, costs["verify"])) == list(MEASURED_SIZES)
    assert set(costs["proposal"]) == set(LIVE_NAMES)
    assert all(cost > 0
               for cost in (*costs["verify"].values(), costs["vision"], costs["prefill"],
                            *costs["eventgpt"]["verify"].values(), costs["proposal"]["hybrid"]))
    assert 0 < compared["noise"] < 1e-3


def test_clips_of_a_sequence_come_in_order_unless_shuffled(monkeypatch, demo, task, tmp_path):
    from clips.dataset import read_dataset

    samples = read_dataset(demo.test_1s)
    ordered = in_order(samples[::-1])
    by_sequence = [sample.sequence for sample in ordered]
    assert sum(a != b for a, b in itertools.pairwise(by_sequence)) == len(set(by_sequence)) - 1
    assert all(a.clip < b.clip for a, b in itertools.pairwise(ordered) if a.sequence == b.sequence)
    shuffled = in_order(samples, shuffled_by=1)
    assert shuffled != ordered and sorted(map(id, shuffled)) == sorted(map(id, samples))


def test_several_questions_auto_gamma_and_shuffled_clips_are_lossless_too(
        monkeypatch, demo, task, tmp_path):
    (tmp_path /
     "questions.txt").write_text("What are the key elements in this scene?\nIs there a vehicle?\n")
    found = run_main(monkeypatch, demo, task, tmp_path / "out", "--compare", "--questions_file",
                     str(tmp_path / "questions.txt"), "--shuffle", "--max_samples", "3")
    assert found["gamma"] == "auto" and len(found["answers"]) == 6
    assert found["totals"]["verdicts"] == {"exact": 6 * (len(LIVE_NAMES) + 1)}


def test_what_one_decoding_verified_the_next_one_can_begin_with(monkeypatch, demo, task, tmp_path):
    flags = ["--drafter", "memory", "--gamma", "8", "--tree", "0"]
    first = run_main(monkeypatch, demo, task, tmp_path / "a", *flags)
    memory = ["--memory", str(tmp_path / "a" / "memory.npz")]
    again = run_main(monkeypatch, demo, task, tmp_path / "b", *flags, *memory)
    assert [row["tokens"]
            for row in again["answers"]] == [row["tokens"] for row in first["answers"]]
    assert again["totals"]["runs"]["memory"]["passes"] < first["totals"]["runs"]["memory"]["passes"]
    with pytest.raises(UserError, match="not the memory of a task"):
        run_main(monkeypatch, demo, task, tmp_path / "c", *flags, "--memory",
                 str(tmp_path / "none.npz"))


def test_a_temperature_samples_and_the_same_seed_samples_alike(monkeypatch, demo, task, tmp_path):
    flags = ["--temperature", "1.5", "--gamma", "3", "--max_samples", "2", "--drafter", "memory"]
    texts = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        found = run_main(monkeypatch, demo, task, tmp_path / name, *flags, "--seed", seed)
        texts.append([answer["text"] for answer in found["answers"]])
    assert texts[0] == texts[1] != texts[2]


def test_sampled_answers_are_those_of_sampling_without_drafts_and_sooner(monkeypatch, demo, task, tmp_path):
    found = run_main(monkeypatch, demo, task, tmp_path / "out", "--temperature", "0.7", "--compare",
                     "--max_samples", "2")
    sums = found["totals"]
    assert sums["verdicts"] == {"exact": 2 * len(LIVE_NAMES)} and sums["generate"] is None
    assert sums["runs"]["none"]["tau"] == 1.0 < sums["runs"]["memory"]["tau"]
    page = (tmp_path / "out" / "DECODE.md").read_text()
    assert "word for word those of sampling without drafts from the same seeds" in page
    assert "the speed of our own loop without drafts" in page


def test_a_wrong_answer_ends_with_exit_3_and_the_report_says_where(monkeypatch, demo, task,
                                                                   tmp_path):
    right = decoding.rules.greedy

    # says something else wherever something is proposed
    def careless(answer, depths, following):
        chosen = right(answer, depths, following)
        return [token + 1 for token in chosen] if len(answer) > 3 and len(depths) > 1 else chosen

    monkeypatch.setattr(decoding.answers, "rule_of", lambda *_: careless)
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, demo, task, tmp_path / "out", "--compare", "--max_samples", "1",
                 "--gamma", "2")
    assert ended.value.code == 3
    found = json.loads((tmp_path / "out" / "decode.json").read_text())
    assert found["totals"]["verdicts"]["WRONG"] >= 1
    assert "WRONG" in (tmp_path / "out" / "DECODE.md").read_text()


def test_a_difference_is_a_tie_only_within_the_noise():
    class Target:
        """Says 0 first, then 1 or almost as surely 2, then 0 again."""

        rows = torch.tensor([[9.0, 0.0, 0.0], [0.0, 5.0, 4.9], [9.0, 8.0, torch.nan]])

        def ask(self, embeds):
            pass

        def prefill(self, tokens):
            return SimpleNamespace(logits=self.rows[:len(tokens) + 1])

    def verdict(ours: list[int], plain: list[int], noise: float) -> str:
        return judge(ours, plain, Target(), None, noise)["verdict"]

    assert judge([0, 1], [0, 1], Target(), None, 0.0) == {"verdict": "exact"}
    found = judge([0, 2], [0, 1], Target(), None, 0.2)
    assert (found["verdict"], found["position"], found["ours"], found["plain"]) == ("tie", 1, [2],
                                                                                    [1])
    assert found["gap"] == pytest.approx(0.1, abs=1e-3)
    assert verdict([0, 2], [0, 1], 0.05) == "WRONG"                 # beyond the noise
    # the two best are near, but ours is neither
    assert verdict([0, 0], [0, 1], 0.2) == "WRONG"
    # nor may the plain answer be far from the best
    assert verdict([0, 2], [0, 0], 0.2) == "WRONG"
    # a tie first, and then a mistake; and a NaN
    assert verdict([0, 2, 1], [0, 1, 0], 0.2) == "WRONG"
    assert verdict([0], [0, 1], 9.0) == "WRONG"                     # ended too early


def test_the_price_of_a_second_counts_all_passes_but_the_prefill():
    """A prefill costs the same whatever is proposed: with its tokens and without its seconds
    drafting looks dear.
    """
    pace = Pace(0.01)
    assert pace.price() == pytest.approx(100)
    # Prefill: 1 + 4 tokens. Then 9 tokens in 2 passes: 10 in 0.02 s with the plain step.
    pace.add(
        Decoded([1] * 14, [4, 4, 4], [4, 4, 3],
                draft_s=0.007,
                opening_s=0.003,
                prefill_s=0.3,
                verify_s=0.006))
    assert pace.price() == pytest.approx(500)
    # EOS was proposed
    pace.add(Decoded([1] * 4 + [2], [8], [5], draft_s=0.002, opening_s=0.002, prefill_s=0.3))
    pace.add(Decoded([1], [0], [0], prefill_s=0.3))
    assert pace.price() == pytest.approx(500)


# --------------------------------------------------------------------------------------- no numbers
@pytest.fixture(scope="module")
def unnamed_task(task, tmp_path_factory) -> Path:
    """The task without a record of the models that it was trained for."""
    other = tmp_path_factory.mktemp("unnamed") / "task"
    shutil.copytree(task, other, ignore=shutil.ignore_patterns("decode_*"))
    results = json.loads((other / "results.json").read_text())
    for file in results["files"]["train"]:
        file.pop("models", None)
    (other / "results.json").write_text(json.dumps(results))
    return other


def overflowing(folder: Path, source: Path, value: float = 6e4) -> Path:
    """A copy of a model whose first block scales up so far that float16 overflows; or holds this
    value.
    """
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        for name in [name for name in state if name.endswith("layers.0.mlp.down_proj.weight")]:
            weight = state[name].float()
            state[name] = (weight * (value / weight.abs().max())).to(state[name].dtype).contiguous()
        save_file(state, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("flags", [[], ["--compare"], ["--temperature", "1"], ["--gamma", "3"]],
                         ids=" ".join)
@pytest.mark.parametrize("model", ["video_llava", "eventgpt"])
def test_when_no_answer_has_numbers_one_error_names_the_dtype(monkeypatch, demo, unnamed_task,
                                                              tmp_path, flags, model):
    folder = overflowing(tmp_path / model, demo.models / model)
    flag = {"video_llava": "--target_model", "eventgpt": "--draft_model"}[model]
    with pytest.raises(
            UserError,
            match=r"none of 4 clips .* in float16 are no numbers .*--dtype bfloat16 or float32"):
        run_main(monkeypatch, demo, unnamed_task, tmp_path / "out", flag, str(folder), "--dtype",
                 "float16", *flags)
    assert not (tmp_path / "out" / "decode.json").exists() and not (tmp_path / "out" /
                                                                    "DECODE.md").exists()
    if not flags:
        run_main(monkeypatch, demo, unnamed_task, tmp_path / "out", flag, str(folder),
                 "--max_samples", "1", "--restart")


@pytest.mark.parametrize("model", ["video_llava", "eventgpt"])
def test_a_model_without_numbers_from_the_start_is_not_tried_on_all_clips(monkeypatch, demo, unnamed_task,
                                                                          tmp_path, capsys, model):
    monkeypatch.setattr(vlm.contract, "FAILURES_AT_START", 2)
    folder = overflowing(tmp_path / model, demo.models / model)
    flag = {"video_llava": "--target_model", "eventgpt": "--draft_model"}[model]
    with pytest.raises(UserError, match=r"none of the first 2 could be answered.* in float16 are no numbers"):
        run_main(monkeypatch, demo, unnamed_task, tmp_path / "out", flag, str(folder), "--dtype", "float16")
    assert capsys.readouterr().out.count("failed: the model's logits") == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_answer_without_numbers_fails_and_the_others_are_those_of_a_run_without_it(
        monkeypatch, demo, task, tmp_path, dtype):
    """NaN from the vision tower, in the middle of the run and at its first clip."""
    wanted = run_main(monkeypatch, demo, task, tmp_path / "whole", "--compare", "--dtype",
                      dtype)["answers"]
    features, seen = VideoLlava.visual_features, []

    def spoilt(self, pixels):
        if (digest := float(pixels.double().sum())) not in seen:
            seen.append(digest)
        return features(self, pixels) * (torch.nan if seen.index(digest) in (0, 2) else 1)

    monkeypatch.setattr(VideoLlava, "visual_features", spoilt)
    results = run_main(monkeypatch, demo, task, tmp_path / "out", "--compare", "--dtype", dtype)
    assert [row["tokens"]
            for row in results["answers"]] == [wanted[1]["tokens"], wanted[3]["tokens"]]
    assert [(row["clip"], row["model"], row["question_idx"]) for row in results["failed"]] == [
        (wanted[0]["clip"], "videollava", 0), (wanted[2]["clip"], "videollava", 0)]
    assert all(f"in {dtype} are no numbers" in row["reason"] for row in results["failed"])
    assert sum(results["totals"]["verdicts"].values()) == 2 * (len(LIVE_NAMES) + 1)


def test_a_figure_that_is_nan_is_null_in_decode_json(monkeypatch, demo, task, tmp_path):
    measure = decoding.answers.measure_costs
    monkeypatch.setattr(decoding.answers, "measure_costs",
                        lambda *given: dataclasses.replace(measure(*given), prefill=math.nan))
    results = run_main(monkeypatch, demo, task, tmp_path / "out", "--gamma", "2", "--max_samples",
                       "1")
    assert results["costs_ms"]["prefill"] is None and results["costs_ms"]["vision"] > 0
    assert (tmp_path / "out" / "DECODE.md").exists()


def test_one_token_each_shows_no_speed_up(monkeypatch, demo, task, tmp_path):
    results = run_main(monkeypatch, demo, task, tmp_path / "out", "--compare", "--max_new_tokens",
                       "1")
    page = (tmp_path / "out" / "DECODE.md").read_text()
    assert results["totals"]["verdicts"] == {"exact": 4 * (len(LIVE_NAMES) + 1)}
    assert "the speed of our own loop" not in page
    assert "pays most" not in page and "no drafter pays" not in page


# --------------------------------------------------------------------------------- without EventGPT
@pytest.mark.parametrize("drafter", ["memory", "lookup", "none"])
def test_a_drafter_that_reads_no_draft_needs_no_draft_model_and_no_event_pictures(
        monkeypatch, demo, task, tmp_path, drafter):
    data = tmp_path / "data"
    shutil.copytree(demo.test_1s, data, ignore=shutil.ignore_patterns("event_image", "event_npy"))
    flags = ["--drafter", drafter, "--gamma", "3", "--tree", "0", "--max_samples", "2"]
    with_draft = run_main(monkeypatch, demo, task, tmp_path / "with", *flags)
    without = run_main(monkeypatch,
                       demo,
                       task,
                       tmp_path / "without",
                       *flags,
                       "--dataset_dir",
                       str(data),
                       without=("--draft_model", ))
    assert [row["tokens"]
            for row in without["answers"]] == [row["tokens"] for row in with_draft["answers"]]
    assert without["totals"]["runs"][drafter]["passes"] == with_draft["totals"]["runs"][drafter][
        "passes"]
    assert without["totals"]["eventgpt_s"] == 0 < with_draft["totals"]["eventgpt_s"]
    assert "eventgpt" not in without["costs_ms"] and "eventgpt" not in without["models"]


@pytest.mark.parametrize(("flags", "reason"),
                         [(["--drafter", "copy"], "--drafter copy reads EventGPT's answers"),
                          (["--drafter", "copy", "--compare"], "read none: .*memory"),
                          (["--drafter", "none", "--parallel"], "--parallel measures")])
def test_without_a_draft_model_a_drafter_that_reads_drafts_is_refused(
        monkeypatch, demo, task, tmp_path, flags, reason):
    with pytest.raises(UserError, match=f"--draft_model is missing: .*{reason}"):
        run_main(monkeypatch, demo, task, tmp_path / "out", *flags, without=("--draft_model",))


# --------------------------------------------------------------------------- before any model loads
@pytest.fixture
def never_loaded(monkeypatch):
    """Loading a model fails the test."""
    def load(*_):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(vlm.roles.Role, "load", load)


def half_of(source: Path, folder: Path, lacking: str) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(lacking))
    return folder


@pytest.mark.parametrize(("model", "lacking", "words"),
                         [("video_llava", "*.safetensors", "has no weights"),
                          ("video_llava", "tokenizer*", "has no tokenizer"),
                          ("eventgpt", "*.safetensors", "has no weights"),
                          ("eventgpt", "tokenizer*", "has no tokenizer"),
                          ("video_llava", "config.json", "no config.json")])
def test_half_a_download_is_said_before_any_model_is_loaded(
        monkeypatch, demo, task, tmp_path, never_loaded, model, lacking, words):
    flag = {"video_llava": "--target_model", "eventgpt": "--draft_model"}[model]
    with pytest.raises(UserError, match=words):
        run_main(monkeypatch, demo, task, tmp_path / "out", flag,
                 str(half_of(demo.models / model, tmp_path / model, lacking)))


@pytest.mark.parametrize(("flags", "words"),
                         [(["--target_model", "demo/models/nope"], "no such model folder"),
                          (["--query", "What is <image> here?"], "<image>"),
                          (["--query", "Where is <event>?"], "<event>"),
                          (["--max_new_tokens", "100000"], "positions"),
                          (["--num_frames", "900"], "positions"),
                          (["--memory", "none.npz"], "not the memory of a task")])
def test_mistakes_are_said_before_any_model_is_loaded(monkeypatch, demo, task, tmp_path,
                                                      never_loaded, flags, words):
    with pytest.raises(UserError, match=words):
        run_main(monkeypatch, demo, task, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["video_llava", "eventgpt"])
def test_other_weights_of_the_same_names_and_sizes_are_refused_before_any_model_is_loaded(
        monkeypatch, demo, task, tmp_path, never_loaded, model):
    flag = {"video_llava": "--target_model", "eventgpt": "--draft_model"}[model]
    folder = overflowing(tmp_path / model, demo.models / model, 1.0)
    with pytest.raises(
            UserError,
            match=r"was trained on answers of .* \(revision content .*has revision content"):
        run_main(monkeypatch, demo, task, tmp_path / "out", flag, str(folder))


# ----------------------------------------------------------------------------------------- mistakes
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


CONTENT, OTHER_CONTENT = f"content {'a' * 20}", f"content {'b' * 20}"
COMMIT, OTHER_COMMIT = "1" * 40, "2" * 40


def trained_on(role, *recorded: dict) -> Task:
    return Task(Path("task"), LiveParts(), {},
                {role.name: [{"name": "other", **facts} for facts in recorded]})


@pytest.mark.parametrize("role", ROLES.values(), ids=ROLES)
def test_a_task_of_other_models_is_refused_with_both_named(role):
    facts = {"vocab_size": 691, "revision": CONTENT}
    with pytest.raises(UserError,
                       match=r"answers of other \(vocab_size 32064\), but mine has vocab_size 691"):
        check_model(trained_on(role, {"vocab_size": 32064}), role, "mine", facts)
    with pytest.raises(UserError, match=f"revision {OTHER_CONTENT}.*has revision {CONTENT}"):
        check_model(trained_on(role, {"vocab_size": 691, "revision": OTHER_CONTENT}), role, "mine",
                    facts)
    with pytest.raises(UserError, match=f"revision {OTHER_COMMIT}.*has revision {COMMIT}"):
        check_model(trained_on(role, {"revision": OTHER_COMMIT}), role, "mine",
                    {**facts, "revision": COMMIT})
    # of two training files, one is of others
    with pytest.raises(UserError, match="revision"):
        check_model(trained_on(role, {"revision": CONTENT}, {"revision": OTHER_CONTENT}), role,
                    "mine", facts)


@pytest.mark.parametrize("role", ROLES.values(), ids=ROLES)
def test_the_models_of_the_task_are_taken_and_what_can_not_be_told_is_a_warning(role, capsys):
    facts = {"vocab_size": 691, "revision": CONTENT}
    check_model(trained_on(role, facts), role, "mine", facts)
    check_model(trained_on(role), role, "mine", facts)
    check_model(trained_on(role, {"vocab_size": 691}), role, "mine", facts)
    assert "WARNING" not in capsys.readouterr().out
    for recorded, loaded in (("unknown", "unknown"), ("unknown", COMMIT), (COMMIT, "unknown"),
                             (COMMIT, CONTENT), ("local", CONTENT), ("local 0123456789ab",
                                                                     CONTENT)):
        check_model(trained_on(role, {"revision": recorded}), role, "mine",
                    {**facts, "revision": loaded})
        assert f"nothing tells whether its revision, {loaded}, is {recorded}" in capsys.readouterr(
        ).out


def test_an_adapter_of_a_larger_vocabulary_still_decodes_losslessly(monkeypatch, demo, task,
                                                                    tmp_path):
    """Its ids beyond the target's are never fed; a task without memory.npz begins with an empty
    memory.
    """
    other = tmp_path / "task"
    shutil.copytree(task, other, ignore=shutil.ignore_patterns("memory.npz", "decode_*"))
    torch.manual_seed(0)
    save_adapter(TokenAdapter(AdapterConfig(900, "prefix", 32, 1, 2, 64, 60)),
                 other / "best_model.pt")
    found = run_main(monkeypatch, demo, other, tmp_path / "out", "--compare", "--max_samples", "2",
                     "--gamma", "3")
    assert found["totals"]["verdicts"] == {"exact": 2 * (len(LIVE_NAMES) + 1)}


def test_an_adapter_that_does_not_know_all_ids_proposes_nothing_from_there_on(
        monkeypatch, demo, task, tmp_path):
    """Of pairs that recorded no vocabulary the adapter has ids up to the largest that it met."""
    other = tmp_path / "task"
    shutil.copytree(task, other, ignore=shutil.ignore_patterns("decode_*"))
    torch.manual_seed(0)
    for conditioning in ("prefix+draft", "draft"):
        adapter = TokenAdapter(AdapterConfig(120, conditioning, 32, 1, 2, 64, 60))
        save_adapter(adapter, other / "best_model.pt")
        found = run_main(monkeypatch, demo, other, tmp_path / conditioning, "--compare",
                         "--max_samples", "1")
        assert found["totals"]["verdicts"] == {"exact": len(LIVE_NAMES) + 1}
        assert max(found["answers"][0]["tokens"]) >= 120
        assert ("hybrid" in found["reads_draft"]) == (conditioning == "prefix+draft")


def test_both_models_at_work_at_once_are_timed_over_the_clips_that_were_decoded(
        monkeypatch, demo, task, tmp_path):
    monkeypatch.setattr(decoding.parallel, "PARALLEL_CLIPS", 2)
    data = tmp_path / "data"
    shutil.copytree(demo.test_1s, data)
    for broken in sorted(data.glob("mp4/*/*.mp4"))[:1]:
        broken.unlink()
    found = run_main(monkeypatch, demo, task, tmp_path / "out", "--dataset_dir", str(data),
                     "--parallel")
    parallel = found["totals"]["parallel"]
    assert len(found["answers"]) == 3 and len(found["failed"]) == 1 and parallel["clips"] == 2
    assert parallel["all_s"] > 0 < parallel["plain_all_s"] and parallel["draft_device"] == "cpu"
    # what ran beside it changed no figure
    assert set(found["costs_ms"]["proposal"]) == {"hybrid"}
    assert "EventGPT on cpu" in (tmp_path / "out" / "DECODE.md").read_text()


def test_a_task_file_that_is_damaged_or_old_is_one_clear_error_or_does_without(
        monkeypatch, demo, task, tmp_path):
    other = tmp_path / "task"
    shutil.copytree(task, other, ignore=shutil.ignore_patterns("decode_*"))
    results = json.loads((other / "results.json").read_text())
    results["files"], results["metrics"]["test"]["memory_share"] = None, {"hybrid": None}
    for drafter in results["metrics"]["test"]["drafters"].values():
        del drafter["simulated"]
    (other / "results.json").write_text(json.dumps(results))
    read = read_task(other)
    assert read.parts.memory_share == 0.5 and read.models == {} and not any(read.simulated.values())
    whole = (other / "memory.npz").read_bytes()
    # a flipped byte is seen or changes nothing
    for at in range(60, len(whole), 41):
        (other / "memory.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:])
        with contextlib.suppress(UserError):
            read_task(other)


def test_a_clip_that_is_listed_twice_is_decoded_once(monkeypatch, demo, task, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(demo.test_1s, data)
    index = data / "EventGPT_Instruction_Subset.json"
    rows = json.loads(index.read_text())
    index.write_text(json.dumps([rows[0], rows[0], rows[1]]))
    found = run_main(monkeypatch, demo, task, tmp_path / "out", "--dataset_dir", str(data))
    assert len(found["answers"]) == 2 and [row["reason"] for row in found["failed"]] == [
        "EventGPT_Instruction_Subset.json lists the clip twice"]


def test_a_data_set_without_media_is_one_clear_error(monkeypatch, demo, task, tmp_path):
    bare = tmp_path / "data"
    bare.mkdir()
    shutil.copy(demo.test_1s / "EventGPT_Instruction_Subset.json", bare)
    with pytest.raises(UserError, match=r"none of 4 clips could be .*the first reason: "):
        run_main(monkeypatch, demo, task, tmp_path / "out", "--dataset_dir", str(bare))
    shutil.copytree(demo.test_1s / "event_image", bare / "event_image")
    with pytest.raises(UserError, match="none of 4 clips could be decoded; the first reason: "):
        run_main(monkeypatch, demo, task, tmp_path / "out", "--dataset_dir", str(bare))


@pytest.mark.parametrize(
    ("flags", "words"), [(["--gamma", "0"], "--gamma must be auto or from 1 to 16, got 0"),
                         (["--gamma", "17"], "--gamma"), (["--temperature", "-1"], "--temperature"),
                         (["--max_new_tokens", "0"], "--max_new_tokens"),
                         (["--max_samples", "0"], "--max_samples"),
                         (["--query", " "], "--query is empty"),
                         (["--draft_model", "nowhere"], "no such folder: nowhere"),
                         (["--drafter", "oracle"], "--drafter"),
                         (["--temperature", "1e-9"], "from 0.01"),
                         (["--temperature", "1", "--parallel"], "--parallel measures greedy"),
                         (["--draft_device", "cpu"], "--draft_device belongs to --parallel"),
                         (["--draft_device", "cuda:99", "--parallel"], "CUDA devices"),
                         (["--output_folder", "README.md"], "can't write to"),
                         (["--task", "nowhere"], "nowhere is no finished task")])
def test_a_mistake_in_the_flags_is_a_user_error(monkeypatch, demo, task, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run_main(monkeypatch, demo, task, tmp_path / "out", *flags)


def test_a_task_is_not_written_over_and_no_two_write_one_folder(monkeypatch, demo, task, tmp_path):
    before = (task / "memory.npz").read_bytes()
    with pytest.raises(UserError,
                       match=r"is a task folder, whose memory\.npz would be written over"):
        run_main(monkeypatch, demo, task, task)
    assert (task / "memory.npz").read_bytes() == before
    with only_writer(tmp_path), pytest.raises(UserError, match="is being written by process"):
        run_main(monkeypatch, demo, task, tmp_path)


def test_a_finished_decoding_is_not_touched(monkeypatch, demo, task, tmp_path):
    (tmp_path / "DECODE.md").write_text("done")
    with pytest.raises(UserError, match="holds a finished decoding"):
        run_main(monkeypatch, demo, task, tmp_path)
    assert (tmp_path / "DECODE.md").read_text() == "done"
