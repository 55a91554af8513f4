"""The memory's file: it comes back as it was, and takes no more time and space than its limits
allow.
"""

import time
import zipfile

import numpy as np
import pytest

from base import UserError
from drafting import memory as memory_module
from drafting.memory import load_memory, save_memory, tempered, with_tempered_best


def write(path, answers: int, tokens: int, token: int = 0) -> None:
    np.savez_compressed(path, target=np.full(answers * tokens, token, np.int32),
                        target_start=np.arange(answers + 1, dtype=np.int64) * tokens)


@pytest.mark.parametrize(("answers", "tokens", "token", "words"), [
    (1, 2**15 + 1, 7, "an answer of 32,769 tokens"), (1024, 2**15 + 1, 0, "unpacks to more than"),
    (1, 5, 2**20, "the token id 1048576")])
def test_a_memory_of_absurd_size_is_one_clear_error(tmp_path, answers, tokens, token, words):
    write(tmp_path / "m.npz", answers, tokens, token)
    start = time.monotonic()
    with pytest.raises(UserError, match=words):
        load_memory(tmp_path / "m.npz")
    assert time.monotonic() - start < 10


def test_a_small_file_of_very_many_tokens_is_read_up_to_its_limit_and_says_so(tmp_path, capsys):
    write(tmp_path / "m.npz", 900, 2**15)  # 118 MB of deflated zeros: 30 million tokens
    assert (tmp_path / "m.npz").stat().st_size < 2**18
    start = time.monotonic()
    answers = load_memory(tmp_path / "m.npz")
    assert len(answers) == 32 and sum(map(len, answers)) == 2**20 and time.monotonic() - start < 20
    assert "WARNING" in capsys.readouterr().out


def test_a_memory_file_that_is_mostly_a_hole_is_not_read(tmp_path):
    with open(tmp_path / "m.npz", "wb") as file:
        file.truncate(2**34)
    start = time.monotonic()
    with pytest.raises(UserError, match="more than 67,108,864 bytes"):
        load_memory(tmp_path / "m.npz")
    assert time.monotonic() - start < 5


def test_an_array_that_says_it_is_larger_than_its_file_is_a_clear_error(tmp_path):
    write(tmp_path / "m.npz", 2, 3)
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["target.npy"] = parts["target.npy"].replace(b"(6,), }", b"(6" + b"0" * 9 + b",), }")[:200]
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="not the memory of a task"):
        load_memory(tmp_path / "m.npz")


def test_of_too_many_answers_the_last_are_remembered(tmp_path, monkeypatch):
    save_memory([[1, 2], [3], [4, 5, 6], []], tmp_path / "m.npz")
    assert load_memory(tmp_path / "m.npz") == [[1, 2], [3], [4, 5, 6], []]
    monkeypatch.setattr(memory_module, "MAX_TRAINING_ANSWERS", 3)
    assert load_memory(tmp_path / "m.npz") == [[3], [4, 5, 6], []]
    monkeypatch.setattr(memory_module, "MAX_TRAINING_TOKENS", 3)
    assert load_memory(tmp_path / "m.npz") == [[4, 5, 6], []]
    save_memory([], tmp_path / "m.npz")
    assert load_memory(tmp_path / "m.npz") == []


def test_a_tempered_probability_is_smaller_and_keeps_the_order_of_choices():
    probabilities = [0.01, 0.3, 0.5, 0.7, 0.95, 0.999, 1.0]
    smaller = [tempered(probability) for probability in probabilities]
    assert smaller == sorted(smaller) and all(q <= p for q, p in zip(smaller, probabilities))
    assert smaller[-1] < 1 and tempered(0.95) < 0.8
    choices = [(0.55, 5), (0.44, 6), (0.01, 7)]
    assert sorted(with_tempered_best(choices), reverse=True) == with_tempered_best(choices)
    assert with_tempered_best([]) == []
