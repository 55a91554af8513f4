"""Processes that train one adapter together: each computes its rows of every batch, gradients are summed.

A batch and its loss are those of one process: rows are split, the losses are divided by the positions
of the whole batch, and the sum of the gradients is then its gradient. Every process takes the same
step, so weights and optimizer stay equal. Collectives wait for each other's steps alone, never for
a file that the first process writes for longer than TIMEOUT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from acceptance.tensors import TokenTensors, hits_of
from base import UserError, first_line
from machine.team import KEPT, Team, Work
from pairs.pairs import Pairs

if TYPE_CHECKING:
    from token_adapter import TokenAdapter

TIMEOUT = datetime.timedelta(hours=1)


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a training; by default one alone."""

    rank: int = 0
    world: int = 1

    @property
    def part(self) -> slice:
        """The rows of a batch that this process computes."""
        return slice(self.rank, None, self.world)

    def sum(self, tensors: list[torch.Tensor]) -> None:
        """Replace these tensors, float32 and of equal shapes everywhere, by their sums over all
        processes.
        """
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with reaching_all():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view_as(tensor))

    def gather(self, value: Any) -> list:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        with reaching_all():
            dist.all_gather_object(values, value)
        return values

    def check_equal(self, weights: list[torch.Tensor]) -> None:
        """Assert that all processes have the same weights."""
        if self.world > 1:
            total = float(sum(weight.detach().double().sum() for weight in weights))
            sums = self.gather(repr(total))          # as text NaN equals NaN: validation names it
            assert len(set(sums)) == 1, f"the weights of the processes have drifted apart: {sums}"


ALONE = Group()


@contextlib.contextmanager
def reaching_all() -> Iterator[None]:
    """A UserError in place of a collective's error: another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"another process of this training has ended ({first_line(error)}); "
                        f"{KEPT}, with --resume and the task folder") from error


@contextlib.contextmanager
def group_of(team: Work, device: torch.device, batch_size: int) -> Iterator[Group]:
    """The group of this launch's processes."""
    if not isinstance(team, Team):
        yield ALONE
        return
    ranks = team.ranks
    if batch_size < ranks.world:
        raise UserError(f"--batch_size {batch_size} gives {ranks.world} processes no row each: wanted "
                        f"{ranks.world} or more, or fewer processes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=ranks.rank,
                            world_size=ranks.world, timeout=TIMEOUT,
                            store=dist.PrefixStore("training", team.store))
    try:
        yield Group(ranks.rank, ranks.world)
    finally:
        dist.destroy_process_group()


class Validation:
    """The validation pairs: each row is measured by one process, and all know all figures."""

    def __init__(self, pairs: Pairs, width: int, device: torch.device, group: Group):
        """width: max_seq_len of the adapter."""
        # With fewer rows than processes, every process measures all: none may be without a row.
        self.group = group if len(pairs) >= group.world else ALONE
        self.lengths = pairs.lengths("target")
        self.width = int(self.lengths.clip(max=width).max())
        shard = pairs
        if self.group.world > 1:
            shard = pairs.select(np.arange(len(pairs))[self.group.part])
        self.tokens = TokenTensors.of(shard, width, device)

    def predict(self, adapter: TokenAdapter, batch_size: int) -> tuple[np.ndarray, np.ndarray, float]:
        """As acceptance.tensors.predict, over all rows."""
        shares = self.group.gather(hits_of(adapter, self.tokens, batch_size))
        hits = np.zeros((2, len(self.lengths), self.width), bool)
        for rank, (*both, _, _) in enumerate(shares):
            for which, rows in enumerate(both):
                hits[which, rank::self.group.world, :rows.shape[1]] = rows
        loss, scored = (sum(share[at] for share in shares) for at in (2, 3))
        return hits[0], hits[1], loss / max(scored, 1)
