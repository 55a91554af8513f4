"""Files are written whole or not at all, what is wrong with one is said, and folders are always new."""

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

import base
import machine.files as files
from base import UserError
from machine.files import only_writer
from tests.machine.test_running import ran


# ---------------------------------------------------------------------------------------- written
def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "results.json"
    files.write_whole(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_whole(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_a_task_folder_is_always_new(tmp_path):
    first, second = (files.new_task_folder(tmp_path / "task", "1s") for _ in range(2))
    assert first != second and first.is_dir() and second.is_dir()


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write to the folder"):
        files.make_folder(tmp_path / "file" / "task")


@pytest.mark.parametrize("trouble", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "EFBIG", "ENOENT",
                                     "ENAMETOOLONG"])
def test_a_disk_that_is_full_or_read_only_is_one_error_line_and_names_the_file(tmp_path, trouble):
    (tmp_path / "out.json").write_text("old")
    ended = ran(f"""
        def fail(file):
            raise OSError(errno.{trouble}, os.strerror(errno.{trouble}))
        files.write_whole(pathlib.Path({str(tmp_path / 'out.json')!r}), fail)""")
    assert (ended.returncode, ended.stderr, ended.stdout.count("\n")) == (2, "", 1)
    assert f"ERROR | {tmp_path / 'out.json'}: " in ended.stdout
    assert "give the same command again" in ended.stdout
    assert (tmp_path / "out.json").read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


def test_only_abandoned_temporaries_are_removed_never_those_of_a_living_process_on_any_host(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    host, pid = files.host(), ended.pid
    living = [f".out.{host}.{os.getppid()}.tmp.json",                     # of this host, at work
              f".out.gpu-node-7.{pid}.tmp.json",                          # of another host
              f".out.{pid}.tmp.json",                                     # of an older version: host unknown
              f".other.{host}.{pid}.tmp.json", f".out.{host}.{pid}.tmp.pt"]         # of other files
    gone = [f".out.{host}.{pid}.tmp.json", f".out.{host}.{'9' * 30}.tmp.json"]
    old = [".out.gpu-node-8.7.tmp.json", ".out.7.tmp.json"]
    for name in (*gone, *old, *living):
        (tmp_path / name).touch()
    for name in old:
        os.utime(tmp_path / name, times=(time.time() - 2 * 24 * 3600,) * 2)
    files.write_text(tmp_path / "out.json", "new")
    assert sorted(os.listdir(tmp_path)) == sorted(["out.json", *living])


def test_the_name_of_a_temporary_tells_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(files.socket, "gethostname", lambda: "node 1/x.cluster")
    paths = []
    files.write_whole(tmp_path / "a.png", lambda path: paths.append(path) or path.write_text("x"))
    assert paths[0].name == f".a.node-1-x-cluster.{os.getpid()}.tmp.png"


def test_a_file_is_made_in_its_own_folder_so_that_no_rename_crosses_disks(tmp_path):
    paths = []
    files.write_whole(tmp_path / "a.png", lambda path: paths.append(path) or path.write_text("x"))
    assert paths[0].parent == tmp_path and paths[0].suffix == ".png"


@pytest.mark.parametrize(("content", "words"), [
    (b"", "it is empty"), (b"\x1f\x8b\x08\0\0", r"looks like gzip; unpack it first \(gunzip\)"),
    (b"PK\3\4", "zip archive"), (b'{"a": ', "is not JSON: Expecting value"), (b"[" * 10**5, "recursion"),
    (b'{"a": "\xff"}', "can't decode byte 0xff"),
    ('{"a": 1}'.encode("utf-16"), "can't decode byte 0xff")])
def test_what_is_not_json_is_named(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(("number", "read"), [(None, 0), (0, 0), (1, 1), (2, 2)])
def test_the_formats_up_to_the_known_one_are_read_and_a_file_without_a_number_is_the_oldest(number, read):
    assert files.check_format(Path("a.json"), number, 2) == read


@pytest.mark.parametrize(("number", "words"), [
    (3, "format 3, this version reads formats up to 2.*newer version"), ("2", "wanted a whole number"),
    (True, "wanted a whole number"), (-1, "wanted a whole number"), (1.0, "wanted a whole number")])
def test_an_unknown_format_is_one_clear_line_that_names_the_file(number, words):
    with pytest.raises(UserError, match=f"a.json has format.*{words}|a.json has {words}"):
        files.check_format(Path("a.json"), number, 2)


@pytest.mark.parametrize("name", ["ENFILE", "EMFILE", "ENOMEM", "EIO", "ESTALE", "EACCES", "EPERM",
                                  "ENOTCONN",
                                  "EHOSTDOWN", "ENOSPC", "EROFS", "EREMOTEIO", "ENODEV", "ETIMEDOUT"])
def test_trouble_of_the_machine_is_told_from_that_of_a_file_however_it_is_wrapped(name):
    trouble = OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "clip.mp4")
    assert files.is_machine_trouble(trouble)
    for wrap in (ValueError, OSError):
        try:
            raise wrap("can't read the clip") from trouble
        except wrap as error:
            assert files.is_machine_trouble(error)


@pytest.mark.parametrize(("error", "of_the_machine"), [
    (MemoryError(), True), (RuntimeError("can't start new thread"), True), (RuntimeError("shape"), False),
    (FileNotFoundError(errno.ENOENT, "no such file"), False), (OSError(errno.ENAMETOOLONG, "x"), False),
    (IsADirectoryError(errno.EISDIR, "a folder"), False),
    (OSError("image file is truncated"), False), (ValueError("not a PNG"), False)])
def test_other_errors_are_trouble_of_the_machine_only_when_it_has_run_out_of_something(
        error, of_the_machine):
    assert files.is_machine_trouble(error) == of_the_machine


# --------------------------------------------------------------------------------------- the lock
def test_the_second_writer_is_told_who_holds_the_lock_and_since_when(tmp_path):
    words = rf"written by process {os.getpid()} on {files.host()} since 20\d\d-.*--wait"
    with only_writer(tmp_path / "out.json", wait=False), pytest.raises(UserError, match=words), \
            only_writer(tmp_path / "out.json", wait=False):
        raise AssertionError("two writers")
    # It is free again, and its file may stay
    with only_writer(tmp_path / "out.json", wait=False):
        pass


def test_a_writer_that_waits_goes_on_when_the_first_has_ended(tmp_path, capsys):
    inside, leave, order = threading.Event(), threading.Event(), []

    def first() -> None:
        with only_writer(tmp_path / "out.json", wait=False):
            inside.set()
            leave.wait(60)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    threading.Timer(0.2, leave.set).start()
    with only_writer(tmp_path / "out.json", wait=True):
        order.append("second")
    thread.join(60)
    assert order == ["first", "second"] and "waiting for it to end" in capsys.readouterr().out


def test_a_lock_that_is_no_file_is_refused_and_nothing_is_written_through_it(tmp_path):
    lock = tmp_path / ".out.json.lock"
    (tmp_path / "precious").write_text("x")
    for make, kind in ((lambda: lock.symlink_to(tmp_path / "precious"), "a link"),
                       (lock.mkdir, "a folder"), (lambda: os.mkfifo(lock), "a pipe")):
        make()
        with pytest.raises(UserError, match=f"is {kind}"), only_writer(tmp_path / "out.json"):
            raise AssertionError("locked")
        lock.rmdir() if kind == "a folder" else lock.unlink()
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_on_a_disk_without_locks_a_warning_says_so_and_the_work_goes_on(tmp_path, monkeypatch, capsys, name):
    def no_locks(*_):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with only_writer(tmp_path / "out.json", wait=True):
        pass
    line = capsys.readouterr().out
    assert "WARNING | the disk of" in line and "has no locks" in line and line.count("\n") == 1


@pytest.mark.parametrize("how", ["lock removed", "lock taken by another", "folder renamed", "folder removed"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_writer_notices_that_its_lock_or_its_folder_is_gone(tmp_path, monkeypatch, how, kind):
    folder = tmp_path / "out"
    folder.mkdir()
    lock = folder / (".lock" if kind == "folder" else ".out.json.lock")
    monkeypatch.setattr(base.Progress, "EVERY_S", 0)
    words = "lock was removed or renamed, perhaps with its folder.*put the folder back"
    with pytest.raises(UserError, match=words), \
            only_writer(folder if kind == "folder" else folder / "out.json"):
        progress = base.Progress("extract", 3)
        progress.update(1)
        if how == "folder renamed":
            folder.rename(tmp_path / "other")
        elif how == "folder removed":
            shutil.rmtree(folder)
        else:
            lock.unlink()
        if how == "lock taken by another":
            lock.touch()
        progress.update(2)
    assert base.Progress.checks == []


# ----------------------------------------------------------------------------- numbers and bounds
def test_a_figure_that_is_no_number_becomes_null_and_a_warning_names_it(tmp_path, capsys):
    results = {"tau": 5.9, "n": 3, "name": "é",
               "metrics": {"test": [1.0, float("nan")], "best": float("inf")}}
    files.write_json(tmp_path / "results.json", results)
    assert files.read_json(tmp_path / "results.json") == {
        "tau": 5.9, "n": 3, "name": "é", "metrics": {"test": [1.0, None], "best": None}}
    line = capsys.readouterr().out
    assert "WARNING" in line and "metrics.test[1], metrics.best" in line and line.count("\n") == 1
    files.write_json(tmp_path / "results.json", {"tau": 1})
    assert capsys.readouterr().out == ""


def test_rows_of_a_list_stand_one_a_line(tmp_path, capsys):
    rows = [{"a": [1, 2], "b": '\n "rows": []'}, {"a": [float("nan")]}]
    results = {"first": 1, "text": '"rows": []', "rows": rows, "last": [3]}
    files.write_json(tmp_path / "results.json", results, rows="rows")
    lines = (tmp_path / "results.json").read_text().splitlines()
    assert sum(line.startswith('  {"a"') for line in lines) == 2
    assert files.read_json(tmp_path / "results.json") == {**results, "rows": [rows[0], {"a": [None]}]}
    assert "WARNING" in capsys.readouterr().out
    files.write_json(tmp_path / "results.json", {"rows": []}, rows="rows")
    assert files.read_json(tmp_path / "results.json") == {"rows": []}


def test_a_file_that_grows_while_it_is_read_is_bounded():
    """/dev/zero has no size and no end."""
    with pytest.raises(UserError, match="wanted at most 1 MiB"):
        files.read_within(Path("/dev/zero"), 2**20)


def test_a_json_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(20 * 2**30)                                     # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"config.json has 20,480 MiB, wanted at most 128 MiB"):
        files.read_json(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16        # KiB
    path.write_text('{"a": 1}')
    assert files.read_json(path, max_bytes=8) == {"a": 1}
    with pytest.raises(UserError, match="wanted at most"):
        files.read_json(path, max_bytes=7)


def test_a_json_file_that_grows_while_it_is_read_is_not_followed(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}' + " " * 100)
    real = os.fstat
    monkeypatch.setattr(files.os, "fstat",
                        lambda descriptor: os.stat_result((*real(descriptor)[:6], 8, 0, 0, 0)))
    with pytest.raises(UserError, match="wanted at most"):
        files.read_json(path, max_bytes=50)


def test_a_byte_order_mark_is_no_trouble(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
