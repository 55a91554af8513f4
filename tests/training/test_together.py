"""Processes that train together take the steps of one: the same gradient, the same curve, one writer."""

import copy
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from acceptance.tensors import TokenTensors, predict
from tests.acceptance.builders import pairs_of
from tests.launch import Launch, has_ended
from tests.training.test_training import VOCAB, small_adapter
from training import together
from training.loop import Diverged, Trainer, train_epoch
from training.together import Group, Validation

PROGRAM = "train_and_evaluate.py"


def some_pairs(count: int):
    random = np.random.default_rng(0)
    drafts, targets = ([random.integers(0, VOCAB, random.integers(2, 7)).tolist() for _ in range(count)]
                       for _ in range(2))
    return pairs_of(drafts, targets)


class Meeting:
    """torch.distributed's collectives between threads of one process."""

    def __init__(self, world: int):
        self.barrier, self.values, self.world = threading.Barrier(world, timeout=30), {}, world

    def all_gather_object(self, values: list, value) -> None:
        self.values[threading.current_thread()] = value
        self.barrier.wait()
        values[:] = [self.values[thread] for thread in sorted(self.values, key=lambda one: one.name)]
        self.barrier.wait()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        values: list = [None] * self.world
        self.all_gather_object(values, tensor.clone())
        tensor.copy_(sum(values))


@pytest.fixture
def in_threads(monkeypatch):
    """Call work(group) in `world` threads that meet; what each returned, by rank."""
    def call(work, world: int) -> list:
        meeting, results = Meeting(world), [None] * world
        monkeypatch.setattr(together, "dist", SimpleNamespace(
            all_reduce=meeting.all_reduce, all_gather_object=meeting.all_gather_object))

        def process(rank: int) -> None:
            results[rank] = work(Group(rank, world))

        threads = [threading.Thread(target=process, args=(rank,), name=str(rank)) for rank in range(world)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        return results
    return call


@pytest.mark.parametrize("conditioning", ["prefix", "draft"])
@pytest.mark.parametrize("world", [2, 3])
def test_a_step_of_several_is_that_of_one(in_threads, conditioning, world):
    """Also in a last batch with fewer rows than processes: 13 rows in batches of 4."""
    pairs, made = some_pairs(13), small_adapter(conditioning, dropout=0.0)

    def work(group: Group):
        adapter = copy.deepcopy(made)                # threads share one generator of weights
        trainer = Trainer(adapter, batch_size=4, rate=1e-2, steps=8, draft_text=0.5)
        trainer.group = group
        tokens = TokenTensors.of(pairs, 8, torch.device("cpu"))
        figures = [train_epoch(trainer, tokens, torch.Generator().manual_seed(1)) for _ in range(2)]
        return figures, [weight.detach().clone() for weight in adapter.parameters()]

    alone, _ = work(Group())
    processes = in_threads(work, world)
    for figures, weights in processes:
        np.testing.assert_allclose(figures, alone, rtol=1e-4)
        assert all(map(torch.equal, weights, processes[0][1]))


def test_weights_that_are_no_numbers_are_a_diverged_training_in_all_processes(in_threads):
    made = small_adapter("prefix", dropout=0.0)
    with torch.no_grad():
        made.output()[1].fill_(torch.nan)

    def work(group: Group) -> str:
        trainer = Trainer(copy.deepcopy(made), batch_size=4, rate=1e-2, steps=8)
        trainer.group = group
        group.check_equal(trainer.weights)           # NaN in all is no difference
        with pytest.raises(Diverged, match="the loss became nan in step 1"):
            train_epoch(trainer, TokenTensors.of(some_pairs(8), 8, torch.device("cpu")),
                        torch.Generator().manual_seed(1))
        return "diverged"

    assert in_threads(work, 2) == ["diverged"] * 2


@pytest.mark.parametrize(("rows", "world"), [(7, 2), (7, 3), (2, 3)])
def test_every_validation_row_is_counted_once(in_threads, rows, world):
    pairs, adapter = some_pairs(rows), small_adapter("prefix", dropout=0.0)
    wanted = predict(adapter, TokenTensors.of(pairs, 8, torch.device("cpu")), 4)
    for found in in_threads(lambda group: Validation(pairs, 8, torch.device("cpu"), group).predict(
            adapter, 4), world):
        assert (found[0] == wanted[0]).all() and (found[1] == wanted[1]).all()
        assert found[2] == pytest.approx(wanted[2], rel=1e-6)


def test_two_gloo_processes_train_like_one_and_go_on_as_three(warm, files, tmp_path):
    log = tmp_path / "log"
    flags = ["--train_benchmark", files["train"], "--test_benchmark", files["test"], "--embed_dim", 16,
             "--num_layers", 1, "--num_heads", 2, "--num_epochs", 4, "--conditioning", "prefix", "--device",
             "cpu", "--dropout", 0, "--early_stopping", 0, "--no-refit", "--no-online", "--no-plots"]
    alone, several = tmp_path / "alone", tmp_path / "several"
    assert warm.wait(warm.start([*flags, "--task_folder", alone], log, PROGRAM)) == 0
    launch = Launch(warm, 2, log, PROGRAM).start(*flags, "--task_folder", several)
    while not (several / "resume.pt").exists() and not (several / "RESULTS.md").exists():
        assert not has_ended(launch.processes[0]), log.read_text()
        time.sleep(0.005)
    launch.kill(1)
    codes = launch.wait()
    if any(codes):                     # else it was through before it could be killed
        assert codes[0] != 0
        assert Launch(warm, 3, log, PROGRAM).start("--resume", several, "--no-plots").wait() == [0] * 3
    curves = [[(epoch["train_loss"], epoch["validation_loss"], epoch["validation_alpha"])
               for epoch in json.loads((folder / "results.json").read_text())["history"]]
              for folder in (alone, several)]
    np.testing.assert_allclose(*curves, rtol=1e-3)
    assert {path.name for path in several.iterdir()} == {path.name for path in alone.iterdir()}
    assert "Traceback" not in log.read_text()
    few = Launch(warm, 2, log, PROGRAM).start(*flags, "--batch_size", 1, "--task_folder", tmp_path / "few")
    assert any(few.wait()) and "--batch_size 1 gives 2 processes no row each" in log.read_text()
