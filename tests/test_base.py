"""The pair formats and their odd rows, flags, whole-file writes, and how a program ends."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import base
from base import UserError

DRAFT, TARGET = [512, 278, 9088, 2], [450, 1820, 3161, 297]


def extraction(number: int, draft=DRAFT, target=TARGET, **more) -> dict:
    return {"sample_idx": number, "question_idx": 0, "egpt_tokens": draft, "egpt_text": "In the scene",
            "vl_tokens": target, "vl_text": "The key elements", **more}


def benchmark(number: int, draft=DRAFT, target=TARGET) -> dict:
    return {"sample_idx": number, "eventgpt": {"output_tokens": draft},
            "videollava": {"output_tokens": target}}


def inference(number: int, draft=DRAFT, target=TARGET) -> dict:
    return {"id": f"id-{number}", "egpt_token_ids": draft, "llava_token_ids": target,
            "event_data": f"interlaken_00_c/{number:06}.npy"}


def load(folder: Path, content) -> base.Pairs:
    path = folder / "pairs.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return base.load_pairs([path])


# ------------------------------------------------------------------------------------------------- pair files
@pytest.mark.parametrize(("content", "form"), [
    ({"results": [extraction(0), extraction(1)]}, "extraction"),
    ({"results": [benchmark(0), benchmark(1)]}, "benchmark"),
    ([inference(0), inference(1)], "inference"),
    ([extraction(0), extraction(1)], "extraction"),
])
def test_a_format_is_told_by_its_content(tmp_path, content, form):
    pairs = load(tmp_path, content)
    assert pairs.files[0]["format"] == form
    assert pairs.padded("draft", 4).tolist() == [DRAFT, DRAFT]
    assert pairs.padded("target", 4).tolist() == [TARGET, TARGET]


@pytest.mark.parametrize(("row", "reason"), [
    (extraction(1, draft=None), "no token list"),
    (extraction(1, target="450 1820"), "no token list"),
    (extraction(1, target=[450, 1.5]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, True]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, "1820"]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, None]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, float("nan")]), "token ids that are not whole numbers"),
    (extraction(1, target=[450, -1]), "negative or absurd token ids"),
    (extraction(1, target=[450, 2**31]), "negative or absurd token ids"),
    (extraction(1, target=[1, 450, 1820, 3161]), "prompt included (starts with BOS)"),
    (extraction(1, target=[29889, 2]), "fewer tokens than words in the text"),
    (extraction(1, target=[], vl_text=""), "empty target"),
    (extraction(0), "duplicate row"),
    ("not a row", "no token list"),
])
def test_an_unusable_row_is_dropped_and_counted_by_its_reason(tmp_path, row, reason):
    pairs = load(tmp_path, {"results": [extraction(0), row, extraction(2)]})
    assert len(pairs) == 2
    assert pairs.files[0]["dropped"] == {reason: 1}


@pytest.mark.parametrize(("row", "flag"), [
    (extraction(1, target=[10887] * 8), "one id repeated"),
    (extraction(1, draft=[], egpt_text=""), "empty draft"),
    (extraction(1, target=[10887, 2], vl_text="ms"), "target under 4 tokens"),
])
def test_a_suspicious_row_is_kept_and_flagged(tmp_path, capsys, row, flag):
    pairs = load(tmp_path, {"results": [extraction(0), row]})
    assert len(pairs) == 2 and pairs.files[0]["flagged"] == {flag: 1}
    assert "WARNING" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is not JSON"), (b'{"results": [', "is not JSON"), (b"\xff\xfe", "is not JSON"),
    (b"[" * 10**5, "is not JSON"),
    (b"7", "holds no pairs"), (b'{"rows": []}', "holds no pairs"), (b'{"results": {}}', "holds no pairs"),
    (b'{"results": [], "errors": [{"sample_idx": 0}]}', "lists 1 errors"), (b"[{}]", "no usable rows"),
    (json.dumps([extraction(0, target=[1, 2])]).encode(), "all dropped"),
])
def test_a_file_without_usable_pairs_is_a_user_error_that_says_why(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, content)


def test_questions_about_one_clip_are_no_duplicates(tmp_path):
    rows = [extraction(0), {**extraction(0), "question_idx": 1}]
    assert len(load(tmp_path, {"results": rows})) == 2


def test_sequence_and_clip_come_from_the_row_or_from_its_event_path(tmp_path):
    pairs = load(tmp_path, [inference(7)])
    assert (pairs.sequence, pairs.clip) == (["interlaken_00_c"], [7])
    pairs = load(tmp_path, [extraction(0, sequence="thun_01_a", clip=3), extraction(1)])
    assert (pairs.sequence, pairs.clip[0]) == (["thun_01_a", ""], 3)


def test_several_files_become_one_set_and_select_keeps_rows_whole(tmp_path):
    for name, target in (("a", [4, 5, 6, 7]), ("b", [8, 9, 10, 11, 12])):
        content = {"vocab_size": 32064, "results": [extraction(0, target=target)]}
        (tmp_path / name).write_text(json.dumps(content))
    pairs = base.load_pairs([tmp_path / "a", tmp_path / "b"])
    assert pairs.vocab_size == 32064 and pairs.lengths("target").tolist() == [4, 5]
    assert [(largest, Path(name).name) for largest, name in pairs.largest_ids()] == [(9088, "a"), (9088, "b")]
    turned = pairs.select(np.array([1, 0]))
    assert turned.padded("target", 6).tolist() == [[8, 9, 10, 11, 12, 0], [4, 5, 6, 7, 0, 0]]
    assert turned.padded("target", 2).tolist() == [[8, 9], [4, 5]]


def test_segments_of_one_drive_share_its_name():
    assert {base.drive_of(f"zurich_city_14{letter}") for letter in ("_a", "_c", "")} == {"zurich_city_14"}
    assert base.drive_of("thun_01_a") == "thun_01"


@pytest.mark.parametrize(("texts", "duration"), [
    (["train_tokens_500ms.json", "my_1s"], "500ms"), (["tokens.json", "my_egpt_dsec_seq_1s"], "1s"),
    (["top10s5.json", "/data/2s/pairs"], "2s"), (["tokens"], None)])
def test_the_window_length_is_found_in_the_first_text_that_names_one(texts, duration):
    assert base.duration_of(*texts) == duration


# ------------------------------------------------------------------------------------------------------ flags
@dataclasses.dataclass(frozen=True)
class Config:
    """A config with every kind of field."""

    files: list[Path] = base.required("files")
    num_epochs: int = base.option(50, "100 % of the epochs")
    mode: Literal["fast", "slow"] = base.option("fast", "how")
    limit: int | None = base.option(None, "at most")
    plots: bool = base.option(True, "draw")

    def __post_init__(self):
        if self.num_epochs < 1:
            raise UserError(f"--num_epochs must be 1 or more, got {self.num_epochs}")


def test_flags_are_read_into_the_types_of_the_fields():
    config = base.parse_config(Config, ["--files", "a", "b", "--mode", "slow", "--limit", "3", "--no-plots"])
    assert config == Config([Path("a"), Path("b")], 50, "slow", 3, False)
    assert base.as_json(config)["files"] == ["a", "b"]


def test_a_positional_field_needs_no_flag():
    @dataclasses.dataclass(frozen=True)
    class Tasks:
        tasks: list[Path] = base.required("task folders", positional=True)

    assert base.parse_config(Tasks, ["a", "b"]).tasks == [Path("a"), Path("b")]
    with pytest.raises(UserError, match="tasks"):
        base.parse_config(Tasks, [])


@pytest.mark.parametrize("arguments", ["", "--files", "--files a --mode none", "--files a --num_epochs x",
                                       "--files a --num_epochs 0", "--files a --num_epoch 3"])
def test_a_wrong_flag_is_a_user_error(arguments):
    with pytest.raises(UserError):
        base.parse_config(Config, arguments.split())


@pytest.mark.parametrize("program", ["train_and_evaluate", "report"])
def test_help_needs_no_heavy_import(program):
    code = (f"import sys; sys.argv = ['{program}.py', '--help']; sys.path.insert(0, {str(base.ROOT)!r})\n"
            f"import {program}\ntry: {program}.main()\nexcept SystemExit as end: assert end.code == 0\n"
            "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules), 'heavy import'")
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------------ files
def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "results.json"
    base.write_whole(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        base.write_whole(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_a_task_folder_is_always_new(tmp_path):
    first, second = (base.new_task_folder(tmp_path / "task", "1s") for _ in range(2))
    assert first != second and first.is_dir() and second.is_dir()


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write to the folder"):
        base.make_folder(tmp_path / "file" / "task")


# ----------------------------------------------------------------------------------------- log and errors
def test_a_log_message_stays_on_one_line(capsys):
    base.log("one\ntwo\r\nthree")
    assert capsys.readouterr().out.count("\n") == 1


def test_progress_logs_once_in_ten_seconds_and_at_the_end(capsys, monkeypatch):
    seconds = iter([0, 1, 9, 11, 12, 13])
    monkeypatch.setattr(base.time, "monotonic", lambda: next(seconds))
    progress = base.Progress("extract", 5)
    for done in range(1, 6):
        progress.update(done)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines] == ["3/5", "5/5"]


@pytest.mark.parametrize(("body", "code", "ending"), [
    ("raise base.UserError('found 1, wanted 2')", 2, "ERROR | found 1, wanted 2\n"),
    ("import no_such_package", 2, "requirements.txt\n"),
    ("raise KeyboardInterrupt", 130, "ERROR | interrupted\n"),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
    ("base.log('RESULT')", 0, "RESULT\n"),
])
def test_a_program_ends_with_its_exit_code_and_one_line(body, code, ending):
    program = f"import os, signal, base\ndef main():\n    {body}\nbase.run(main)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=base.ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.stdout.endswith(ending) and ended.stdout.count("\n") == bool(ending)


def test_a_bug_keeps_its_traceback():
    def main():
        raise AssertionError("shape (3, 4)")

    with pytest.raises(AssertionError, match="shape"):
        base.run(main)
