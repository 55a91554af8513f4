"""Flags, whole-file writes, and how a program ends."""

import dataclasses
import os
import signal
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


def ran(body: str, *before: str, **how) -> subprocess.CompletedProcess:
    """A program of its own whose main() is this, as if started by the words before."""
    program = (f"import errno, os, pathlib, signal, base\nimport machine.files as files\n"
               f"def main():{body}\nbase.run(main)")
    return subprocess.run([*before, sys.executable, "-c", program], cwd=base.ROOT, text=True,
                          **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how})


@pytest.mark.parametrize(("number", "code"), [("TERM", 143), ("HUP", 129), ("INT", 130)])
def test_a_stopped_program_cleans_up_and_says_how_to_go_on(number, code):
    ended = ran(f"""
        base.goes_on_with(['train.py', '--name', 'a b'])
        try:
            os.kill(os.getpid(), signal.SIG{number})
        finally:
            base.log('cleaned')""")
    assert (ended.returncode, ended.stderr) == (code, "")
    first, last = ended.stdout.splitlines()
    assert "cleaned" in first and last.endswith(f"] RESUME | {sys.executable} train.py --name 'a b'")


@pytest.mark.parametrize(("number", "code"), [("TERM", 143), ("HUP", 129), ("INT", 130)])
def test_what_is_in_hand_is_finished_first_unless_a_second_signal_comes(number, code):
    for signals in (1, 2):
        ended = ran(f"""
        base.goes_on_with(['train.py'])
        base.SAME_STOP_S = 0
        with base.finishing('this') as stopping:
            for _ in range({signals}):
                os.kill(os.getpid(), signal.SIG{number})
            base.log(f'finished {{stopping()}}')
        base.log('not reached')""")
        assert (ended.returncode, ended.stderr) == (code, "")
        said = [line.split("] ")[1] for line in ended.stdout.splitlines()]
        assert said == ["stopping | this first; once more stops at once", *["finished True"] * (signals == 1),
                        f"RESUME | {sys.executable} train.py"]


def test_the_signals_of_one_stop_count_as_one():
    """A terminal that is closed hangs up the workflow and its step; then the workflow sends TERM to the step."""
    ended = ran("""
        with base.finishing('this'):
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
            base.log('finished')""")
    assert ended.returncode == 129 and ended.stdout.endswith("finished\n")


def test_without_a_signal_nothing_is_stopped_and_those_before_hold_again():
    before = signal.getsignal(signal.SIGTERM)
    with base.finishing("this") as stopping:
        assert not stopping() and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hang_up_is_ignored_under_nohup():
    for body in ("os.kill(os.getpid(), signal.SIGHUP)", """
        with base.finishing('this') as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping()"""):
        ended = ran(f"""
        {body}
        base.log('RESULT')""", "nohup")
        assert ended.returncode == 0 and ended.stdout.endswith("RESULT\n")


@pytest.mark.parametrize("out", ["/dev/full", "a pipe that nobody reads"])
def test_a_log_that_cannot_be_written_ends_no_work(tmp_path, out):
    reader, writer = os.pipe()
    os.close(reader)
    with open(out, "w") if out == "/dev/full" else os.fdopen(writer, "w") as file:
        ended = ran(f"""
        base.log('x')
        pathlib.Path({str(tmp_path / 'done')!r}).touch()
        raise base.UserError('the end')""", stdout=file)
    assert (ended.returncode, ended.stderr) == (2, "") and (tmp_path / "done").exists()


def test_nothing_in_a_log_line_hides_or_acts(capsys):
    base.log("clip a\r\nb\x1b[31m\x00\x08\x9b \u202e \u2066 \ud83d é 漢 \u2028 end")
    line = capsys.readouterr().out
    assert line.rstrip("\n").isprintable() and line.count("\n") == 1
    assert r"clip a b\x1b[31m\x00\x08\x9b \u202e \u2066 \ud83d é 漢   end" in line
