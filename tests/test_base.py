"""Flags, log lines, progress and the check of packages."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

import base
from base import UserError


def test_segments_of_one_drive_share_its_name():
    assert {base.drive_of(f"zurich_city_14{letter}")
            for letter in ("_a", "_c", "")} == {"zurich_city_14"}
    assert base.drive_of("thun_01_a") == "thun_01"


@pytest.mark.parametrize(("texts", "duration"), [
    (["train_tokens_500ms.json", "my_1s"], "500ms"), (["tokens.json", "my_egpt_dsec_seq_1s"], "1s"),
    (["top10s5.json", "/data/2s/pairs"], "2s"), (["tokens"], None)])
def test_the_window_length_is_found_in_the_first_text_that_names_one(texts, duration):
    assert base.duration_of(*texts) == duration


# ------------------------------------------------------------------------------------------ flags
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


def test_a_config_from_json_takes_the_default_of_a_field_that_an_older_version_did_not_write(tmp_path):
    values = base.as_json(Config([Path("a")], limit=3))
    assert base.from_json(Config, values, tmp_path) == Config([tmp_path / "a"], limit=3)
    for name in ("num_epochs", "plots", "limit", "mode"):
        del values[name]
    assert base.from_json(Config, values, tmp_path) == Config([tmp_path / "a"], 50, "fast", None, True)
    values["limit"] = None                         # written, and None: kept
    assert base.from_json(Config, values, tmp_path).limit is None


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


# --------------------------------------------------------------------------------- log and errors
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


@pytest.mark.parametrize(("message", "line"), [
    ("\n  \nout of memory\nat x", "out of memory"), ("", "ValueError"), (" \n", "ValueError"), ("a", "a")])
def test_the_first_line_of_an_error_is_its_first_that_says_something(message, line):
    assert base.first_line(ValueError(message)) == line


def test_progress_asks_each_ten_seconds_whether_the_work_is_in_vain(monkeypatch):
    seconds = iter([0, 1, 11, 12])
    monkeypatch.setattr(base.time, "monotonic", lambda: next(seconds))
    calls = []
    monkeypatch.setattr(base.Progress, "checks", [lambda: calls.append(1)])
    progress = base.Progress("extract", 5)
    for done in range(1, 4):
        progress.update(done)
    assert calls == [1]


def test_nothing_in_a_log_line_hides_or_acts(capsys):
    base.log("clip a\r\nb\x1b[31m\x00\x08\x9b \u202e \u2066 \ud83d é 漢 \u2028 end")
    line = capsys.readouterr().out
    assert line.rstrip("\n").isprintable() and line.count("\n") == 1
    assert r"clip a b\x1b[31m\x00\x08\x9b \u202e \u2066 \ud83d é 漢   end" in line


# --------------------------------------------------------------------------------------- packages
def test_packages_that_are_not_installed_are_named_whatever_their_import_is_called(tmp_path, monkeypatch):
    (tmp_path / "dev.txt").write_text("-r some.txt\npytest>=8\nno-such-tool==1  # why\n")
    (tmp_path /
     "some.txt").write_text("# a comment\n\npillow>=10\nprotobuf>=4\nno_such.thing[extra]>=1\n")
    monkeypatch.setattr(base, "ROOT", tmp_path)
    words = r"^not installed: no-such-tool, no_such.thing; install with: .* -r .*dev.txt$"
    with pytest.raises(UserError, match=words):
        base.check_packages("dev.txt")


def test_an_older_python_is_told_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(base.sys, "version_info", (3, 10, 12))
    with pytest.raises(SystemExit) as ended:
        base.check_python()
    assert ended.value.code == 2 and "wanted 3.11 or newer" in capsys.readouterr().out
