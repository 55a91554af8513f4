"""The place of this process among those of one launch: torchrun, accelerate, srun, mpirun.

Every launcher names a process' rank and their number in variables of its own; here they are read
once, checked against each other, and mapped to those of torchrun. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

import base
from base import UserError

# Launcher -> its names of rank, number of processes, rank within the host, number on the host.
# srun: SLURM_NTASKS stands in a job script too, where no srun has started anything.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
               "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")}
TORCHRUN = LAUNCHERS["torchrun"]
FIRST_PORT, PORTS = 20_000, 12_000         # below those that Linux gives to outgoing connections


@dataclasses.dataclass(frozen=True)
class Ranks:
    """One process of a launch."""

    rank: int = 0                    # of this process, from 0
    world: int = 1                   # number of processes
    local_rank: int = 0              # of this process on its host
    local_world: int = 1             # number of processes on this host
    launcher: str = ""               # empty: none, the process is alone

    @staticmethod
    def of(environment: Mapping[str, str]) -> Ranks:
        """What the environment says; UserError where it is incomplete or contradicts itself."""
        values = {name: numbers_of(environment, names) for name, names in LAUNCHERS.items()}
        launcher = next((name for name, numbers in values.items() if numbers), "")
        if not launcher:
            check_accelerate(environment)
            return Ranks()
        rank, world, local_rank, local_world = values[launcher]
        if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
            raise UserError(f"{launcher} says that this is process {rank} of {world}, and "
                            f"{local_rank} of {local_world} on its host: wanted ranks from 0 to "
                            "below the number of processes")
        if launcher == "torchrun":
            check_nested(environment, values, world)
        return Ranks(rank, world, local_rank, local_world, launcher)

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {os.uname().nodename}"

    def device(self, name: str, count: int) -> str:
        """The device of that name here: "auto" and "cuda" mean the GPU of the local rank.

        count: of the GPUs that this process sees; a launcher may show each process one alone.
        """
        if self.world == 1 or name not in ("auto", "cuda") or not count:
            return name
        return f"cuda:{self.local_rank if count > 1 else 0}"


def numbers_of(environment: Mapping[str, str], names: tuple[str, ...]) -> tuple[int, ...]:
    """(rank, world, local rank, local world) from variables of these names; () if none is set."""
    rank, world, local_rank, local_world = names
    if world not in environment and not (rank == "RANK" and rank in environment):
        return ()
    if absent := [name for name in (rank, world) if name not in environment]:
        there = rank if rank in environment else world
        raise UserError(f"{there} is set and {absent[0]} is not: wanted both or none; start with "
                        "torchrun, or unset them")
    try:
        # "4(x2)": four tasks on each of two nodes
        texts = (environment[rank], environment[world], environment.get(local_rank, "0"),
                 re.split(r"[(,]", environment.get(local_world, environment[world]))[0])
        return tuple(map(int, texts))
    except ValueError as error:
        raise UserError(f"{rank}, {world}: wanted whole numbers ({error})") from error


def check_accelerate(environment: Mapping[str, str]) -> None:
    """accelerate's launcher for a CPU starts one process, whatever --num_processes says."""
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise UserError("accelerate launch was asked for several processes and started one (it "
                        "does so with --cpu): use torchrun --nproc_per_node N, or accelerate "
                        "launch --multi_gpu --num_processes N with ACCELERATE_USE_CPU=true")


def check_nested(environment: Mapping[str, str], values: dict, world: int) -> None:
    """Several torchruns that srun or mpirun started must know of each other."""
    for launcher in LAUNCHERS.keys() - {"torchrun"}:
        started = values[launcher][1] if values[launcher] else 1
        nodes = int(environment.get("GROUP_WORLD_SIZE", started))
        if started > 1 and nodes != started and world != started:
            raise UserError(
                f"{launcher} started {started} tasks, each with a torchrun that knows of {nodes}: "
                f"each of them would do all the work; give torchrun --nnodes {started} "
                "--rdzv_backend c10d --rdzv_endpoint FIRST_HOST:PORT, or start one task a node")


def meeting_place(ranks: Ranks, environment: Mapping[str, str]) -> tuple[str, int]:
    """(host, port) at which the processes of this launch meet."""
    host, port = environment.get("MASTER_ADDR", ""), int(environment.get("MASTER_PORT", 0))
    if ranks.launcher == "srun":
        nodes = re.match(r"([^\[,]+)(?:\[(\d+))?", environment.get("SLURM_STEP_NODELIST", ""))
        job, step = (int(environment.get(f"SLURM_{name}_ID", 0)) for name in ("JOB", "STEP"))
        host = host or "".join(filter(None, nodes.groups()) if nodes else ())
        port = port or FIRST_PORT + (7 * job + step) % PORTS
    if not host and ranks.local_world == ranks.world:
        host = "127.0.0.1"
    if not host:
        raise UserError(f"{ranks.launcher} does not say where its processes meet: export "
                        "MASTER_ADDR (the host of rank 0) and MASTER_PORT (a free port there)")
    return host, port or FIRST_PORT


def this_process(together: bool) -> Ranks:
    """The place of this process; all but the first log trouble alone, under their name.

    together: whether the program can share its work among processes. UserError where it can't and
    is one of several: each of them would do all the work.
    """
    ranks = Ranks.of(os.environ)
    base.name_process(ranks.name if ranks.rank else "")
    if ranks.world > 1 and not together:
        raise UserError(f"{ranks.launcher} started {ranks.world} processes of a program that runs "
                        f"as one: start it without {ranks.launcher}")
    return ranks
