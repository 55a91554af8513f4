"""The training loop: the steps of one phase, and one pass over the pairs.

A step reads answers and drafts in one forward pass, and nothing is read from the device before the
epoch is over. On a GPU the step runs in bfloat16 and, where launching its many small kernels would
take longer than they run, from CUDA graphs.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from acceptance.tensors import TokenTensors
from base import UserError, log
from machine.graphs import side_stream
from token_adapter import NOT_SCORED, TokenAdapter
from training.loss import loss_of
from training.together import ALONE, Group

WARM_UP = 0.05     # share of the steps in which the learning rate rises: post-norm encoders need it
MAX_GRADIENT_NORM = 1.0


class Diverged(UserError):
    """A loss is no finite number."""


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up to 1, then a cosine to 0 (Loshchilov and Hutter 2017, SGDR). Steps count from
    0.
    """
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def rounded(width: int, longest: int, limit: int) -> int:
    """The width rounded up to a multiple of 16, so that there are few widths.

    At most `longest` rounded up to a multiple of 8 (attention kernels copy masks of other widths),
    and `limit`, which is all that the adapter holds.
    """
    return min(-(-width // 16) * 16, -(-longest // 8) * 8, limit)


class Trainer:
    """The steps of one phase; on a GPU each width of a batch has its CUDA graph, in shared memory.

    A width's first batch runs eagerly, which sets up what no capture may; at its second a graph is
    captured. Both are steps like any other. What a graph reads and writes (weights, optimizer,
    learning rate, batch) stays at its address.
    """

    group: Group = ALONE                 # the processes that share each batch

    def __init__(self, adapter: TokenAdapter, batch_size: int, rate: float, steps: int,
                 draft_text: float = 0.0, graphs: bool = True):
        """rate: the peak of the learning rate; steps: of the whole phase; graphs: use them on a
        GPU.
        """
        self.adapter, self.batch_size = adapter, batch_size
        self.peak, self.steps, self.done = rate, steps, 0
        self.of_draft = not adapter.config.sees_prefix
        self.device = next(adapter.parameters()).device
        self.draft_text = 0.0 if self.of_draft else draft_text
        on_gpu = self.device.type == "cuda"
        weights = list(adapter.parameters())
        decayed = [weight for weight in weights if self.of_draft or weight.dim() > 1]
        others = [weight for weight in weights if not self.of_draft and weight.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01 if self.of_draft else 0.1},
             {"params": others, "weight_decay": 0.0}],
            betas=(0.9, 0.999 if self.of_draft else 0.98), fused=True, capturable=on_gpu,
            lr=torch.zeros((), device=self.device) if on_gpu else rate)
        # On a GPU forward and backward run in bfloat16 on a copy: autocast spent a fifth of a step
        # on casts.
        self.model = copy.deepcopy(adapter).bfloat16() if on_gpu else adapter
        self.weights, self.copies = list(adapter.parameters()), list(self.model.parameters())
        if on_gpu:
            for weight in self.weights:
                weight.grad = torch.zeros_like(weight)
        # (widths) -> (graph, its output)
        self.graphs: dict | None = {} if graphs and on_gpu else None
        self.buffers: dict[tuple, tuple] = {}               # (widths) -> target, draft, its lengths
        if on_gpu:
            with torch.cuda.device(self.device):
                self.stream, self.pool = side_stream(), torch.cuda.graph_pool_handle()

    @property
    def rate(self) -> float:
        return self.peak * learning_rate_factor(self.done, self.steps)

    def take_up(self, optimizer: dict, done: int) -> None:
        """Go on from the moments in an optimizer's state dict after `done` steps.

        Its settings (learning rate, capturable, fused, ...) stay ours: those of the file are of the
        device that wrote it. Raises ValueError if the moments are not those of these weights.
        """
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        # the fused kernels check no shape: they would overrun
        for number, state in optimizer["state"].items():
            moments = [state[name] for name in ("exp_avg", "exp_avg_sq")]
            if any(moment.shape != weights[number].shape or moment.dtype != weights[number].dtype
                   for moment in moments) or state["step"].numel() != 1:
                raise ValueError(f"the optimizer's state {number} has another shape than its weights")
        ours = self.optimizer.state_dict()["param_groups"]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({"state": optimizer["state"], "param_groups": ours})
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate          # on a GPU the very tensor that `step` fills and graphs read
        self.done = done

    @contextlib.contextmanager
    def on_stream(self):
        """Run all steps in one stream of our own: graphs can't be captured in the default stream.
        """
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                yield
            torch.cuda.current_stream().wait_stream(self.stream)

    def step(self, tokens: TokenTensors, rows: torch.Tensor, width: int) -> torch.Tensor:
        """One step on these rows, `width` targets wide -> (2,) of loss_of, until the next step."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.rate)
            else:
                group["lr"] = self.rate
        self.done += 1
        if self.device.type == "cuda":
            return self._replay(self._fill(tokens, rows, width))
        draft_width = width if self.of_draft else max(1, int(tokens.draft_lengths[rows].max()))
        batch = (tokens.targets(rows, width), tokens.drafts(rows, draft_width),
                 tokens.draft_lengths[rows])
        if (missing := self.group.world - len(rows)) > 0:      # each process needs a row
            batch = tuple(torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) for rows in batch)
            batch[0][-missing:], batch[2][-missing:] = NOT_SCORED, 0
        return self._step(*batch)

    def _step(self, target, draft, draft_lengths) -> torch.Tensor:
        if self.model is not self.adapter:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.weights)
        loss, figures = loss_of(self.model, target, draft, draft_lengths, self.draft_text,
                                self.group.part)
        loss.backward()
        if self.model is not self.adapter:
            used = [(weight.grad, copied.grad) for weight, copied in zip(self.weights, self.copies)
                    if copied.grad is not None]
            torch._foreach_copy_(*map(list, zip(*used)))
        self.group.sum([weight.grad for weight in self.weights if weight.grad is not None])
        # The optimizer clips: it divides by grad_scale as it reads, which saves a pass over the
        # gradients.
        norm = nn.utils.get_total_norm(
            [weight.grad for weight in self.weights if weight.grad is not None])
        self.optimizer.grad_scale = (norm / MAX_GRADIENT_NORM).clamp(min=1)
        self.optimizer.step()
        self.model.zero_grad()        # to None: in a graph, gradients get the same memory each time
        return figures

    def _fill(self, tokens: TokenTensors, rows: torch.Tensor, width: int) -> tuple[int, int]:
        """Copy these rows into the buffers of their widths, rounded up to be few -> the widths.

        Rows that a last, smaller batch lacks score nothing.
        """
        longest, limit = max(1, tokens.draft_width), self.adapter.config.max_seq_len
        answer = rounded(width, tokens.width, limit)
        widths = answer, answer if self.of_draft else rounded(longest, longest, limit)
        if widths not in self.buffers:
            target, draft = (torch.zeros(self.batch_size, size, dtype=torch.long,
                                         device=self.device) for size in widths)
            self.buffers[widths] = target.fill_(NOT_SCORED), draft, torch.zeros_like(draft[:, 0])
        target, draft, lengths = self.buffers[widths]
        target[len(rows):], draft[len(rows):], lengths[len(rows):] = NOT_SCORED, 0, 0
        for buffer, read, longest in ((target, tokens.targets, tokens.width),
                                      (draft, tokens.drafts, max(tokens.width, tokens.draft_width))):
            filled = min(buffer.shape[1], longest)
            buffer[:len(rows), :filled] = read(rows, filled)
        lengths[:len(rows)] = tokens.draft_lengths[rows]
        return widths

    def _replay(self, widths: tuple[int, int]) -> torch.Tensor:
        batch = self.buffers[widths]
        if self.graphs is None:
            return self._step(*batch)
        if widths not in self.graphs:
            self.graphs[widths] = None
            return self._step(*batch)
        if self.graphs[widths] is None:
            try:
                self.graphs[widths] = self._capture(batch)
            except RuntimeError as error:        # CUDA's refusals while capturing are RuntimeErrors
                log(f"train | WARNING | no CUDA graphs, every step runs eagerly: {error!s:.300}")
                self.graphs = None
                self.model.zero_grad()         # nothing was computed: the gradients hold no numbers
                return self._step(*batch)
        graph, figures = self.graphs[widths]
        graph.replay()
        return figures

    def _capture(self, batch: tuple) -> tuple:
        """(a CUDA graph of a step on these buffers, its output)."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream,
                              capture_error_mode="thread_local"):
            figures = self._step(*batch)
        return graph, figures


def train_epoch(trainer: Trainer, tokens: TokenTensors, generator: torch.Generator,
                on_step: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """One pass: (loss in nats a token, alpha), with dropout and while the weights change.

    Raises Diverged if the loss of a step is no finite number.
    """
    steps = math.ceil(len(tokens.lengths) / trainer.batch_size)
    # Left on the device until the pass is over: reading a loss earlier would make the host wait for
    # the GPU.
    figures, positions = torch.zeros(steps, 2, device=tokens.device), []
    trainer.model.train()
    with trainer.on_stream():
        for step, (rows, width, scored) in enumerate(tokens.batches(trainer.batch_size, generator)):
            figures[step] = trainer.step(tokens, rows, width)
            positions.append(scored)
            on_step()
        trainer.group.sum([figures])
        losses, right = figures.T.tolist()
    check_finite(losses)
    trainer.group.check_equal(trainer.weights)
    return float(np.average(losses, weights=positions)), sum(right) / int(tokens.lengths.sum())


def check_finite(losses: list[float]) -> None:
    """Raises Diverged for the first of an epoch's losses that is no finite number."""
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            raise Diverged(f"the loss became {loss} in step {step} of {len(losses)}")
