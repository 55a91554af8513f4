"""The place of a process in its launch, as each launcher says it; and what is refused."""

import os

import pytest
import torch

import base
from base import UserError
from machine import ranks
from machine.device import see_own_gpu
from machine.ranks import Ranks, meeting_place
from machine.running import run

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
            "GROUP_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[03-04]"}


@pytest.mark.parametrize(("environment", "wanted"), [
    ({}, Ranks()),
    (TORCHRUN, Ranks(5, 8, 1, 4, "torchrun")),
    (SRUN, Ranks(5, 8, 1, 4, "srun")),
    ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}, Ranks(5, 8, 1, 4, "torchrun")),
    # A job script that srun did not start: its variables speak of the whole job
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Ranks()),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
      "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Ranks(1, 2, 1, 2, "mpirun")),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, Ranks(0, 2, 0, 2, "mpiexec"))])
def test_every_launcher_is_understood(environment, wanted):
    assert Ranks.of(environment) == wanted


@pytest.mark.parametrize(("environment", "message"), [
    ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
    ({**TORCHRUN, "RANK": "8"}, "process 8 of 8"),
    ({**TORCHRUN, "RANK": "x"}, "wanted whole numbers"),
    # Two tasks of srun, each with a torchrun that believes to be alone
    ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", **TORCHRUN, "WORLD_SIZE": "4", "RANK": "1",
      "GROUP_WORLD_SIZE": "1"},
     "srun started 2 tasks, each with a torchrun that knows of 1"),
    # accelerate launch --cpu --num_processes 2 starts one process and says nothing
    ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
     "accelerate launch was asked for several processes and started one")])
def test_a_launch_that_would_do_the_work_twice_is_an_error(environment, message):
    with pytest.raises(UserError, match=message):
        Ranks.of(environment)


def test_the_processes_of_a_launch_know_where_they_meet():
    assert meeting_place(Ranks.of(SRUN), SRUN) == ("gpu03", ranks.FIRST_PORT + 77 * 7)
    named = {**SRUN, "SLURM_STEP_NODELIST": "a,b", "MASTER_PORT": "9"}
    assert meeting_place(Ranks.of(SRUN), named) == ("a", 9)
    here = Ranks(1, 2, 1, 2, "mpirun")
    assert meeting_place(here, {}) == ("127.0.0.1", ranks.FIRST_PORT)
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        meeting_place(Ranks(1, 4, 1, 2, "mpirun"), {})


@pytest.mark.parametrize(("name", "count", "wanted"), [
    ("auto", 4, "cuda:1"), ("cuda", 4, "cuda:1"), ("auto", 1, "cuda:0"), ("auto", 0, "auto"),
    ("cpu", 4, "cpu"), ("cuda:3", 4, "cuda:3")])
def test_each_process_has_the_gpu_of_its_local_rank(name, count, wanted):
    assert Ranks.of(TORCHRUN).device(name, count) == wanted
    assert Ranks().device(name, count) == name


@pytest.mark.parametrize(("shown", "wanted"), [
    (None, "1"), ("2,3", "3"), ("GPU-a,GPU-b", "GPU-b"), ("5", "5"), ("", "")])
def test_each_process_sees_one_gpu(monkeypatch, shown, wanted):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    see_own_gpu(Ranks.of(TORCHRUN))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted


def test_a_program_that_runs_as_one_is_not_started_as_several(monkeypatch, capsys):
    for name, value in {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        run(lambda: None)
    assert end.value.code == 2
    assert "torchrun started 8 processes of a program that runs as one" in capsys.readouterr().out


def test_the_first_process_speaks_for_all(monkeypatch, capsys):
    monkeypatch.setattr(base, "_process_name", "rank 1 on b")
    base.log("going on")
    base.log("WARNING | the disk is full")
    assert capsys.readouterr().out.endswith("] rank 1 on b | WARNING | the disk is full\n")
