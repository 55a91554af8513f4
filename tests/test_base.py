"""Flags, whole-file writes, and how a program ends."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

import base
from base import UserError


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
