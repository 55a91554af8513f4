"""Extraction on the demo's clips with the shipped tiny models: the pairs, and that nothing is lost."""

import fcntl
import gc
import json
import os
import re
import shutil
import signal
import weakref

import pytest
import torch
from safetensors.torch import load_file

import extract_tokens_train
from base import UserError
from extraction import output as output_module
from machine.running import Stopped
from pairs.formats import load_pairs
from pairs.journal import Journal
from tests.conftest import rows_of
from tests.vlm import tiny_models
from tests.vlm.test_steps import needs_gpu
from vlm import batches as module
from vlm.batches import Batches
from vlm.roles import Role

ROW_KEYS = {
    "sample_idx", "question_idx", "sample_id", "sequence", "clip", "query", "egpt_tokens",
    "egpt_text", "egpt_finished", "vl_tokens", "vl_text", "vl_finished"
}


def test_rows_hold_what_the_documentation_says(extract):
    output = extract()
    assert output["total_samples"] == output["eventgpt_success"] == output["videollava_success"] == 5
    assert output["failed"] == []
    assert output["models"]["eventgpt"]["prompt"].endswith("<ev_end>\n{query} ASSISTANT:")
    for number, row in enumerate(rows_of(output)):
        assert set(row) == ROW_KEYS
        assert (row["sample_idx"], row["question_idx"]) == (number, 0)
        for model in ("egpt", "vl"):
            tokens = row[f"{model}_tokens"]
            assert tokens and tokens[0] != 1                              # no BOS
            assert row[f"{model}_finished"] == (tokens[-1] == 2) and 2 not in tokens[:-1]
            assert len(tokens) <= 80 and max(tokens) < output["vocab_size"]
        assert "scene" in row["egpt_text"] and "key elements" in row["vl_text"]


def test_the_file_has_one_row_a_line_and_loads_as_pairs(extract, tmp_path):
    output = extract()
    lines = (tmp_path / "pairs.json").read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines
            if line.startswith('{"sample_idx"')] == rows_of(output)
    pairs = load_pairs([tmp_path / "pairs.json"])
    assert len(pairs) == 5 and pairs.vocab_size == output["vocab_size"]
    assert pairs.sequence[0] == rows_of(output)[0]["sequence"] and pairs.clip[:2] == [0, 1]


def test_batches_answer_as_one_by_one(extract, tmp_path):
    single = extract("--batch_size", 1)
    for size in (2, 5):
        together = extract("--batch_size", size, output_file=tmp_path / f"batch{size}.json")
        assert rows_of(together) == rows_of(single)


def test_short_memory_halves_the_batch_and_loses_nothing(extract, tmp_path, monkeypatch, capsys):
    wanted, answer = extract("--batch_size", 2), Batches.answer

    def short(batches, pixels, *how):
        if len(pixels) > 2:
            raise torch.OutOfMemoryError(f"no room for {len(pixels)}\nand more")
        return answer(batches, pixels, *how)

    monkeypatch.setattr(Batches, "answer", short)
    output = extract("--batch_size", 5, output_file=tmp_path / "halved.json")
    assert rows_of(output) == rows_of(wanted) and not output["failed"]
    printed = capsys.readouterr().out
    assert "WARNING | out of memory with 5 clips at a time: no room for 5; going on with 2" in printed


def test_memory_that_gets_shorter_twice_in_a_batch_loses_no_clip(extract, tmp_path, monkeypatch):
    """And with a batch in flight: whoever waits for its answers holds none of its memory."""
    wanted = extract("--batch_size", 8, "--max_samples", 11)
    answer = Batches.answer
    engines = weakref.WeakSet()

    def short(batches, pixels, *how):
        engines.add(batches)
        gc.collect()
        if len(pixels) > 2 or len(engines) > 1:
            raise torch.OutOfMemoryError("no room")
        return answer(batches, pixels, *how)

    monkeypatch.setattr(Batches, "answer", short)
    output = extract("--batch_size", 8, "--max_samples", 11, output_file=tmp_path / "halved.json")
    assert rows_of(output) == rows_of(wanted) and not output["failed"]
    assert output["models"]["videollava"]["batch_size"] == 2


def test_clips_with_other_numbers_of_pictures_free_the_memory_of_those_before(extract, copy, monkeypatch):
    index = copy / "EventGPT_Instruction_Subset.json"
    rows = json.loads(index.read_text())
    for number, row in enumerate(rows):
        row["event_image"] = row["event_image"][:1 + number % 3]
    index.write_text(json.dumps(rows))
    make, engines = Batches.__init__, weakref.WeakSet()

    def counted(batches, *how):
        gc.collect()
        assert not engines
        engines.add(batches)
        make(batches, *how)

    monkeypatch.setattr(Batches, "__init__", counted)
    output = extract("--event_images", "all", "--batch_size", 2, "--max_samples", 6, dataset_dir=copy)
    assert len(rows_of(output)) == 6 and not output["failed"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: no room")])
def test_caches_that_find_no_room_are_made_smaller(extract, monkeypatch, capsys, error):
    make = Batches.__init__

    def short(batches, vlm, questions, tokens, pictures, clips, *how):
        if clips > 1:
            raise error
        make(batches, vlm, questions, tokens, pictures, clips, *how)

    monkeypatch.setattr(Batches, "__init__", short)
    output = extract("--batch_size", 4)
    assert len(rows_of(output)) == 5 and not output["failed"]
    assert "; going on with 1" in capsys.readouterr().out


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_memory_that_really_ends_halves_the_batch(extract, tmp_path, capsys, dtype):
    def run(clips: int, name: str, room: int | None = None) -> tuple[dict, int]:
        """(the output, how many bytes PyTorch took for it); room: how many it may take."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((before + room) / total if room else 1.0)
        try:
            output = extract("--max_samples", 20, "--batch_size", clips, "--device", "cuda",
                             "--dtype", dtype, "--quantization", "none",
                             output_file=tmp_path / name)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return output, torch.cuda.max_memory_reserved() - before

    run(1, "first")                                          # sets up what stays: workspaces of cuBLAS
    (_, few), (wanted, many) = run(1, "few"), run(20, "many")
    assert "out of memory" not in capsys.readouterr().out and few < many
    output, taken = run(20, "short", (few + many) // 2)
    logged = capsys.readouterr().out
    words = r"WARNING \| out of memory with 20 clips at a time: CUDA.*going on with 10"
    assert re.search(words, logged), logged
    assert taken < many and output["failed"] == [] and len(rows_of(output)) == 20, (few, many, taken)
    if dtype == "float32":
        assert rows_of(output) == rows_of(wanted)


def test_another_error_of_the_model_is_no_lack_of_memory(extract, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes (3, 4)")

    monkeypatch.setattr(Batches, "answer", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        extract()


def test_a_clip_that_fits_into_no_memory_fails_alone(extract, monkeypatch):
    answer, calls = Batches.answer, []

    def short(batches, pixels, *how):
        calls.append(len(pixels))
        if len(pixels) > 1 or len(calls) == 3:              # the second clip alone
            raise torch.OutOfMemoryError("no room")
        return answer(batches, pixels, *how)

    monkeypatch.setattr(Batches, "answer", short)
    output = extract("--batch_size", 2)
    assert len(rows_of(output)) == 4
    [lost] = output["failed"]
    assert lost["model"] == "eventgpt" and "out of memory with 1 clips at a time: no room" in lost["reason"]


def test_a_batch_is_kept_before_the_next_one_has_ended(extract, monkeypatch):
    """A crash costs the batch in flight and no other."""
    saved, before = [], []
    append, generate = Journal.append, Batches._generate

    def counted(journal, rows):
        saved.extend(row for row in rows if "tokens" in row)
        append(journal, rows)

    monkeypatch.setattr(Journal, "append", counted)
    monkeypatch.setattr(Batches, "_generate",
                        lambda batches, *how: before.append(len(saved)) or generate(batches, *how))
    extract("--batch_size", 2)
    assert before == [0, 2, 4, 5, 7, 9]


def test_a_stopped_run_keeps_the_clips_that_the_model_was_at(extract, monkeypatch, capsys):
    """A signal in the second batch of the target; the third is not begun."""
    generate, calls = Batches._generate, []

    def signalled(batches, *how):
        calls.append(how)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        generate(batches, *how)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(Batches, "_generate", signalled)
        extract("--batch_size", 2)
    assert stopped.value.code == 143 and len(calls) == 5
    logged = capsys.readouterr().out
    assert "the clips in hand are answered first" in logged and "| 9 answers are kept" in logged
    assert len(rows_of(extract("--batch_size",
                               2))) == 5 and "going on: 9 answers" in capsys.readouterr().out


def test_a_parity_check_compares_with_one_by_one(extract, tmp_path, monkeypatch):
    output = extract("--parity_check", 3)
    assert [output["models"][which]["parity"] for which in ("eventgpt", "videollava")] == [
        {"answers": 3, "equal": 3}] * 2
    answers_of, other = module.answers_of, tmp_path / "other.json"
    # After the last answer: the same command checks all the same
    with monkeypatch.context() as stopped:
        stopped.setattr(output_module, "write_output", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract(output_file=other)
    output = extract("--parity_check", 2, output_file=other)
    assert output["models"]["eventgpt"]["parity"] == {"answers": 2, "equal": 2}
    monkeypatch.setattr(module, "answers_of",
                        lambda rows, *how: answers_of([row[1:] for row in rows], *how))
    assert extract("--parity_check", 2, "--restart",
                   None)["models"]["videollava"]["parity"]["equal"] == 0


def test_an_answer_that_is_cut_says_so(extract):
    for row in rows_of(extract("--max_new_tokens", 7)):
        assert len(row["egpt_tokens"]) == len(row["vl_tokens"]) == 7
        assert not row["egpt_finished"] and not row["vl_finished"]


def test_several_questions_a_clip(extract, tmp_path):
    for name, text in (("q.json", '[{"question": "What is there?", "count": 5}, "Why?", "no"]'),
                       ("q.txt", "5\tWhat is there?\nWhy?\n\nno\n")):
        (tmp_path / name).write_text(text)
        output = extract("--questions_file", tmp_path / name, "--num_questions", 2, "--max_samples",
                         3, output_file=tmp_path / f"{name}.out.json")
        questions_asked = [(row["sample_idx"], row["question_idx"], row["query"]) for row in rows_of(output)]
        assert questions_asked == [(i, q, query) for i in range(3)
                         for q, query in enumerate(("What is there?", "Why?"))]
        assert output["videollava_success"] == 6 and output["total_samples"] == 3


def test_all_event_pictures_may_differ_in_number(extract, copy):
    index = copy / "EventGPT_Instruction_Subset.json"
    rows = json.loads(index.read_text())
    rows[1]["event_image"] = rows[1]["event_image"][:2]
    index.write_text(json.dumps(rows))
    assert len(rows_of(extract("--event_images", "all", dataset_dir=copy))) == 5


# -------------------------------------------------------------------------- bad data, nothing lost
def test_clips_with_bad_media_fail_alone_and_say_why(extract, copy):
    rows = json.loads((copy / "EventGPT_Instruction_Subset.json").read_text())
    (copy / "event_image" / rows[0]["event_image"][0]).write_bytes(b"")
    (copy / "mp4" / rows[1]["mp4_data"]).write_bytes(b"junk")
    (copy / "mp4" / rows[2]["mp4_data"]).unlink()
    rows[3]["event_image"] = ["../../outside.png"]
    (copy / "EventGPT_Instruction_Subset.json").write_text(json.dumps(rows))
    output = extract(dataset_dir=copy)
    assert [row["sample_idx"] for row in rows_of(output)] == [4]
    assert output["eventgpt_success"] == 3
    reasons = {entry["sample_idx"]: (entry["model"], entry["reason"]) for entry in output["failed"]}
    assert {index: model for index, (model, _) in reasons.items()} == {
        0: "eventgpt", 1: "videollava", 2: "videollava", 3: "eventgpt"}
    assert "can't read the picture" in reasons[0][1] and "can't read the video" in reasons[1][1]
    assert "no such video" in reasons[2][1] and "leaves the data set folder" in reasons[3][1]


def test_when_nothing_succeeds_it_is_an_error_and_no_output(extract, copy):
    shutil.rmtree(copy / "event_image")
    with pytest.raises(UserError, match="none of 5 clips could be answered; the first reason"):
        extract(dataset_dir=copy)
    assert not (copy.parent / "pairs.json").exists()


def test_a_mistake_in_the_target_costs_nothing_of_the_draft(extract, tmp_path, monkeypatch):
    loaded, load = [], Role.load

    def counted(role, *how, broken=()):
        loaded.append(role.role)
        assert role.role not in broken, "as if the machine had stopped here"
        return load(role, *how)

    monkeypatch.setattr(Role, "load", counted)
    for flags in (("--target_model", tmp_path / "none"), ("--query", "what is <video>?")):
        with pytest.raises(UserError):
            extract(*flags)
    assert not loaded and not (tmp_path / ".pairs.json.journal.jsonl").exists()
    monkeypatch.setattr(Role, "load", lambda role, *how: counted(role, *how, broken=("target",)))
    with pytest.raises(AssertionError):
        extract("--num_frames", 4)
    monkeypatch.setattr(Role, "load", counted)
    # The draft's answers do not depend on it
    assert len(rows_of(extract("--num_frames", 8))) == 5
    assert loaded == ["draft", "target", "target"]


def no_tokenizer(folder) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def a_missing_shard(folder) -> None:
    weights = {name: "model-00001-of-00002.safetensors" for name in load_file(folder / "model.safetensors")}
    last = list(weights)[-1]
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {**weights, last: "model-00002-of-00002.safetensors"}}))


def a_shard_cut_short(folder) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 9)


def quantised_weights(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))


@pytest.mark.parametrize("damage, words", [
    (no_tokenizer, "tokenizer"), (a_missing_shard, "model-00002-of-00002.safetensors"),
    (a_shard_cut_short, "model.safetensors"), (quantised_weights, "quantised already"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"), (shutil.rmtree, "no such")])
@pytest.mark.parametrize("flag", ["--draft_model", "--target_model"])
def test_half_a_model_is_found_before_either_is_loaded(extract, demo, tmp_path, monkeypatch, flag,
                                                       damage, words):
    role = {"--draft_model": "eventgpt", "--target_model": "video_llava"}[flag]
    folder = shutil.copytree(demo.models / role, tmp_path / "model")
    damage(folder)
    monkeypatch.setattr(Role, "load", None)
    with pytest.raises(UserError, match=words):
        extract(flag, folder)
    assert not (tmp_path / ".pairs.json.journal.jsonl").exists()


@pytest.mark.parametrize("flags, words", [
    (("--query", "what is <image>?"), "<image>"), (("--query", "what is <event>?"), "<event>"),
    (("--query", "why " * 3000), "positions"), (("--max_new_tokens", 2040), "positions")])
def test_questions_that_a_model_can_not_take_are_found_before_either_is_loaded(
        extract, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(Role, "load", None)
    with pytest.raises(UserError, match=words):
        extract(*flags)
    assert not (tmp_path / ".pairs.json.journal.jsonl").exists()


def test_two_writers_are_kept_apart(extract, tmp_path):
    with open(tmp_path / ".pairs.json.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 4711")
        lock.flush()
        with pytest.raises(UserError, match="is being written by process 4711"):
            extract()
    # The lock is free: its file may stay
    assert len(rows_of(extract())) == 5


# ----------------------------------------------------------------------------------- user mistakes
@pytest.mark.parametrize("flags, message", [
    (("--draft_model", "nowhere"), "no such folder: nowhere"),
    (("--target_model", "./nowhere"), "no such model folder: ./nowhere"),
    (("--dataset_dir", "nowhere"), "no such data set folder"),
    (("--device", "cuda:99"), "CUDA devices"),
    (("--device", "tpu9"), "--device tpu9"),
    (("--device", "meta"), "--device meta"),
    (("--seed", str(2**70)), "--seed must be"),
    (("--query", " "), "--query is empty"),
    (("--output_file", "/tmp"), "is a folder"),
    (("--batch_size", "0"), "--batch_size must be 1 or more"),
    (("--parity_check", "-1"), "--parity_check must be 0"),
    (("--max_samples", "0"), "--max_samples must be"),
    (("--num_questions", "3"), "needs --questions_file"),
    (("--questions_file", "nowhere.json"), "no such file"),
    (("--query", "what is <video>?"), "<video>"),
    (("--query", "caf\udce9"), r"--query: 'caf\\udce9' is no text in UTF-8"),
    (("--num_frames", str(10**9)), "--num_frames must be at most 1000"),
    (("--num_frames", "400"), "positions, the model has 2048: use fewer pictures"),
    (("--output_file", "/dev/null/out.json"), "can't write to the folder"),
])
def test_mistakes_get_a_clear_error(extract, flags, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        extract(*flags)


def test_what_is_no_file_is_not_waited_for(extract, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for flag in ("--questions_file", "--output_file"):
        with pytest.raises(UserError, match="pipe is a pipe or a device, wanted a file"):
            extract(flag, tmp_path / "pipe")


def test_without_a_draft_model_the_error_says_where_the_weights_are(tmp_path):
    with pytest.raises(UserError, match="linked from https:"):
        extract_tokens_train.ExtractConfig(tmp_path, tmp_path / "out.json")


def test_an_event_model_is_no_target_and_a_text_model_nothing(extract, demo, tmp_path):
    with pytest.raises(UserError, match="EventGPT, which reads event pictures and no video"):
        extract("--target_model", demo.models / "eventgpt")
    text = shutil.copytree(demo.models / "video_llava", tmp_path / "text")
    (text / "config.json").write_text('{"model_type": "llama", "vocab_size": 100}')
    for flag in ("--draft_model", "--target_model"):
        with pytest.raises(UserError, match="llama model, which reads no pictures"):
            extract(flag, text, "--restart", None)


def test_models_that_are_not_ours_answer_as_draft_and_as_target(extract, tmp_path, capsys):
    folder = tiny_models.write(tmp_path / "llava", *tiny_models.llava())
    output = extract("--draft_model", folder, "--target_model", folder, "--max_new_tokens", 12,
                     "--num_frames", 3, "--parity_check", 2, "--query", "Why?")
    for facts in output["models"].values():
        assert facts["parity"] == {"answers": 2, "equal": 2} and "bos_id" not in facts
        assert facts["prompt"].startswith("<|im_start|>user") and "{query}" in facts["prompt"]
    prompts = [facts["prompt"].count("<image>") for facts in output["models"].values()]
    assert prompts == [8, 8] and len(rows_of(output)) == 5
    assert capsys.readouterr().out.count("decodes in our own layers (qwen2)") == 2
