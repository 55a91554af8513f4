"""A .pt file is read only if it holds no more than it has bytes, and no advice to run it is passed
on.
"""

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

import machine.tensors as tensors
from base import UserError
from machine.tensors import check_weights, read_tensors, write_tensors

LIMIT = 2**30


def repacked(path: Path, **changes) -> None:
    """The same archive with other records or another compression."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    kind = changes.pop("compression", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in {**records, **changes}.items():
            archive.writestr(name, content)


def test_what_was_written_comes_back(tmp_path):
    write_tensors(tmp_path / "a.pt", {"x": torch.arange(5), "epoch": 3})
    loaded = read_tensors(tmp_path / "a.pt", LIMIT, "{reason}")
    assert torch.equal(loaded["x"], torch.arange(5)) and loaded["epoch"] == 3


def test_compressed_records_are_refused_before_they_are_unpacked(tmp_path):
    """PyTorch never compresses: 45 MiB of deflated zeros would unpack to gigabytes."""
    path = tmp_path / "bomb.pt"
    write_tensors(path, {"x": torch.zeros(2**26)})
    repacked(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.pt can't be used: it has compressed records"):
        read_tensors(path, LIMIT, "can't be used: {reason}")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_file_larger_than_announced_is_refused(tmp_path):
    path = tmp_path / "sparse.pt"
    write_tensors(path, {"x": torch.zeros(4)})
    with open(path, "r+b") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(UserError, match="it has 20480 MiB, wanted at most 1024"):
        read_tensors(path, LIMIT, "{reason}")


def test_records_that_overlap_are_refused(tmp_path):
    path = tmp_path / "overlapping.pt"
    write_tensors(path, {str(i): torch.full((2**16,), i) for i in range(9)})
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = next(record.file_size for record in archive.infolist()
                    if record.filename.endswith("data/0"))
    large = (4 * size).to_bytes(4, "little")
    path.write_bytes(content.replace(size.to_bytes(4, "little"), large))
    with pytest.raises(UserError, match="its records are larger than the file"):
        read_tensors(path, LIMIT, "{reason}")


@pytest.mark.parametrize(("content", "words"), [
    (b"", "it is empty"), (b"not a checkpoint", "no zip archive"), (bytes(10**6), "no zip archive"),
    (pickle.dumps({"a": 1}, 2), "no zip archive"), (b"PK\3\4" + bytes(99), "no zip archive")])
def test_what_is_no_archive_is_refused(tmp_path, content, words):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_tensors(tmp_path / "a.pt", LIMIT, "{reason}")


def test_an_archive_behind_other_bytes_is_refused_before_pytorch_takes_it_for_an_old_file(
        tmp_path, monkeypatch):
    """zipfile reads it all the same, PyTorch as a tar file of before 1.6, into a temporary folder."""
    path = tmp_path / "a.pt"
    write_tensors(path, {"x": torch.arange(5)})
    path.write_bytes(bytes(2**16) + path.read_bytes())
    assert zipfile.is_zipfile(path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("PyTorch was asked"))
    with pytest.raises(UserError, match="it is no zip archive"):
        read_tensors(path, LIMIT, "{reason}")


def test_a_large_directory_or_pickle_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_tensors(path, {str(i): torch.zeros(1) for i in range(30)})
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"a directory of \d+ bytes"):
        patch.setattr(tensors, "MAX_DIRECTORY", 1000)
        read_tensors(path, LIMIT, "{reason}")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="its pickle has more than"):
        patch.setattr(tensors, "MAX_PICKLE", 100)
        read_tensors(path, LIMIT, "{reason}")


class NotPlain:
    """Something that only arbitrary code could load."""


@pytest.mark.parametrize("value", [NotPlain(), Path("a"), torch.nn.Linear(2, 2)])
def test_no_advice_to_run_what_a_file_holds_is_passed_on(tmp_path, value):
    torch.save({"config": value}, tmp_path / "a.pt")
    with pytest.raises(UserError) as raised:
        read_tensors(tmp_path / "a.pt", LIMIT, "{reason}")
    text = str(raised.value).lower()
    assert "more than tensors and plain values" in text
    advice = ("weights_only", "weights only", "trust", "safe_globals", "arbitrary")
    assert not any(word in text for word in advice)


@pytest.mark.parametrize(("state", "words"), [
    ({"w": torch.zeros(2, dtype=torch.long)}, "w must be torch.float16 or"),
    ({"w": torch.zeros(2, dtype=torch.int8)}, "w must be"),
    ({"w": torch.zeros(2, dtype=torch.bool)}, "w must be"),
    ({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, "w must be"),
    ({"w": torch.zeros(2) * 1j}, "w must be"),
    ({"ids": torch.zeros(2)}, "ids must be torch.int64, got torch.float32"),
    ({"w": torch.zeros(1).expand(9)}, "w is no whole tensor"),
    ({"w": torch.empty(2, device="meta")}, "no whole tensor"),
    ({"w": torch.zeros(3).to_sparse()}, "no whole tensor"), ({"w": 5}, "no whole tensor"),
    ({5: torch.zeros(2)}, "5 is"),
    ({"w": torch.zeros(3)}, r"w has the shape \(3,\), wanted \(2,\)"), ({}, "missing w; not known nothing"),
    ({"w": torch.zeros(2), "v": torch.zeros(2)}, "missing nothing; not known v")])
def test_weights_are_whole_tensors_of_floats_with_the_wanted_shapes(state, words):
    check_weights({"w": torch.zeros(2)}, wanted={"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=words):
        check_weights(state, integers=("ids",), wanted={"w": torch.zeros(2)})
