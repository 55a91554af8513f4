"""Training: from token pairs to an adapter, phase by phase, each epoch one tight loop.

A step reads answers and drafts in one forward, its output layer and loss are one function that never holds all
logits, and nothing is read from the device before the epoch is over. On a GPU the step runs in bfloat16 and, where
launching its many small kernels would cost more than they take, from CUDA graphs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from acceptance.metrics import measure
from acceptance.tensors import TokenTensors, predict
from base import Progress, UserError, first_line, log
from machine.files import reading
from machine.graphs import side_stream
from pairs.formats import Pairs
from pairs.splits import MAX_VOCAB_SIZE, Data, check_drafts, check_ids
from token_adapter import NOT_SCORED, AdapterConfig, TokenAdapter, load_adapter, save_adapter
from training.checkpoints import ANEW, Checkpoint, Resume, load_weights, random_state, set_random_state

if TYPE_CHECKING:
    from train_and_evaluate import TrainConfig

DRAFT_DROPOUT = 0.5        # share of training rows whose draft is hidden, so that the adapter can do without
WARM_UP = 0.05             # share of the steps in which the learning rate rises: post-norm encoders need it
MAX_GRADIENT_NORM = 1.0
CHUNK = {"cpu": 2**23, "cuda": 2**27}    # logits held at a time: 262 or 4,194 positions of 32,000 ids
MOST = 0.9                 # of the positions scored: picking them out costs more than it saves


# ---------------------------------------------------------------------------------------------------- adapter
def make_adapter(config: TrainConfig, data: Data, known: Pairs | None) -> TokenAdapter:
    """The checkpoint that was asked for, or a new adapter with the vocabulary that the pairs need.

    known: the pairs it is trained on, whose target tokens are all that --draft_vocab scores.
    """
    if config.checkpoint:
        adapter = load_adapter(config.checkpoint)
        check_ids(data.largest_ids, adapter.config.vocab_size, "a checkpoint needs pairs of its tokenizer")
        if config.conditioning not in ("auto", adapter.config.conditioning):
            raise UserError(f"{config.checkpoint} was trained in {adapter.config.conditioning} conditioning, wanted "
                            f"--conditioning {config.conditioning}; leave the flag out to measure it by its own")
        if adapter.config.conditioning == "draft":
            check_drafts(data.test)
        log(f"checkpoint | {config.checkpoint} | {adapter.config.contract}")
        return adapter
    enough = min(max(data.largest_ids)[0] // 64 * 64 + 64, MAX_VOCAB_SIZE)
    vocab_size = config.vocab_size or data.vocab_size or enough
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"the pair files record a vocabulary of {vocab_size} ids, wanted 1 to {MAX_VOCAB_SIZE}; mend "
                        "them, or set --vocab_size")
    check_ids(data.largest_ids, vocab_size, "mend the file, or set --vocab_size to that of the models")
    if config.conditioning == "draft":
        check_drafts(data.test)
        check_drafts(known)
    torch.manual_seed(config.seed)
    outputs = torch.from_numpy(known.ids("target")).long() if config.draft_vocab else None
    sizes = AdapterConfig(
        vocab_size=vocab_size, embed_dim=config.embed_dim, num_layers=config.num_layers,
        num_heads=config.num_heads, feedforward_dim=4 * config.embed_dim, max_seq_len=config.max_seq_len,
        conditioning=config.conditioning, dropout=config.dropout,
        draft_vocab=0 if outputs is None else len(outputs))
    try:
        return TokenAdapter(sizes, outputs)
    except (RuntimeError, MemoryError) as error:           # of PyTorch's allocator
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError("not enough memory for an adapter of this size: a smaller --embed_dim, --num_layers or "
                        f"--vocab_size ({first_line(error)[:200]})") from error


# ------------------------------------------------------------------------------------------------------- loss
class LinearCrossEntropy(torch.autograd.Function):
    """Output layer and loss in one, a chunk of positions at a time: gradients and hits come on the way.

    The idea of Liger Kernel and of "Cut Your Losses" (Wijmans et al. 2024), in plain PyTorch: logits and their
    gradient exist for one chunk alone, and both gradients are made while they do.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, labels, share):
        """x (N, D), weight (V, D), bias (V,), labels (N,) int64; share (N,): the factor of each position's loss.

        A position that is not scored has a share of 0. Returns the loss, sum(share * losses), to learn from; losses
        (N,) in nats and hits (N,) bool to look at.
        """
        labels, share = labels.clamp(min=0)[:, None], share[:, None]
        x_grad, weight_grad, bias_grad = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
        losses, hits = torch.empty_like(share), torch.empty_like(labels, dtype=torch.bool)
        size = max(1, CHUNK.get(x.device.type, CHUNK["cpu"]) // len(weight))
        for one, one_grad, label, factor, loss, hit in zip(
                *(part.split(size) for part in (x, x_grad, labels, share, losses, hits))):
            logits = torch.addmm(bias, one, weight.t())
            top, best = logits.max(-1, keepdim=True)
            grad = torch.softmax(logits, -1)
            # Not -log(chance): that of a label far from the top is rounded to 0.
            loss.copy_((top.to(loss) - logits.gather(1, label)) - grad.gather(1, best).to(loss).log())
            torch.eq(best, label, out=hit)
            grad.scatter_(1, label, grad.gather(1, label) - 1)              # of logits, but for the factor
            torch.mul(grad @ weight, factor, out=one_grad)
            weight_grad.addmm_(grad.t(), (one * factor).to(one))
            bias_grad.add_((factor.to(grad).t() @ grad)[0])
        ctx.save_for_backward(x_grad, weight_grad, bias_grad)
        losses, hits = losses[:, 0], hits[:, 0]
        ctx.mark_non_differentiable(losses, hits)
        return (losses * share[:, 0]).sum(), losses, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, *_):
        x_grad, weight_grad, bias_grad = ctx.saved_tensors
        return x_grad.mul_(factor), weight_grad.mul_(factor), bias_grad.mul_(factor), None, None


def loss_of(adapter: TokenAdapter, target, draft, draft_lengths, draft_text: float) -> tuple:
    """(the loss to learn from, (2,): mean loss of the answers' tokens and how many of them were proposed right).

    target (B, T) int64, NOT_SCORED past the end; draft (B, Td) int64 of draft_lengths (B,). draft_text: weight of the
    mean loss of the drafts' tokens, each from those before it, as if drafts were answers (one that isn't scored costs
    nothing). The adapter in training mode: its dropout, and half of all drafts hidden in prefix+draft.
    """
    labels = adapter.labels_of(target)
    scored = (labels != NOT_SCORED).float()
    shares = answers = scored / scored.sum().clamp(min=1)
    if not adapter.config.sees_prefix:
        x = adapter.hidden(draft)
    else:
        shown = draft_lengths
        if adapter.config.conditioning == "prefix+draft":
            shown = draft_lengths * (torch.rand(len(draft), device=draft.device) >= DRAFT_DROPOUT)
        prefix = target[:, :-1].clamp(min=0)                                # past the end any id will do
        x = adapter.hidden(draft, shown, prefix, draft if draft_text else None)
        if draft_text:
            inside = torch.arange(draft.shape[1], device=draft.device) < draft_lengths[:, None]
            text = adapter.labels_of(draft.masked_fill(~inside, NOT_SCORED))
            share = draft_text * (text != NOT_SCORED) / inside.sum().clamp(min=1)
            labels, shares = torch.cat([labels, text], 1), torch.cat([shares, share], 1)
            answers = torch.cat([answers, torch.zeros_like(share)], 1)
    x, labels, shares, answers = x.flatten(0, 1), labels.flatten(), shares.flatten(), answers.flatten()
    scored = labels != NOT_SCORED
    # On another device counting would wait for it; all others have a share of 0, and few of them cost little.
    if x.device.type == "cpu" and scored.sum() < MOST * len(scored):
        scored = scored.nonzero()[:, 0]
        x, labels, shares, answers = x.index_select(0, scored), labels[scored], shares[scored], answers[scored]
    norm, weight, bias = adapter.output()
    loss, losses, hits = LinearCrossEntropy.apply(norm(x), weight, bias, labels, shares)
    return loss, torch.stack([(losses * answers).sum(), (hits & (answers > 0)).sum().to(losses)])


# ------------------------------------------------------------------------------------------------------ steps
def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up to 1, then a cosine to 0 (Loshchilov and Hutter 2017, SGDR). Steps count from 0."""
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def rounded(width: int, longest: int, most: int) -> int:
    """Up to the next 16, so that there are few; beyond the longest no more than to the next 8 (attention kernels copy
    masks of other widths); `most` is all that the adapter holds."""
    return min(-(-width // 16) * 16, -(-longest // 8) * 8, most)


class Trainer:
    """The steps of one phase. On a GPU each width of a batch has its CUDA graph, in memory that all of them share.

    A width's first batch runs eagerly, which sets up what no capture may; at its second a graph is captured. Both are
    steps like any other. What a graph reads and writes (weights, optimizer, rate, batch) stays where it is.
    """

    def __init__(self, adapter: TokenAdapter, batch_size: int, rate: float, steps: int, draft_text: float = 0.0,
                 graphs: bool = True):
        """rate: the peak; steps: in the whole phase. graphs: False = eager on a GPU too."""
        self.adapter, self.batch_size, self.peak, self.steps, self.done = adapter, batch_size, rate, steps, 0
        self.of_draft, self.device = not adapter.config.sees_prefix, next(adapter.parameters()).device
        self.draft_text = 0.0 if self.of_draft else draft_text
        on_gpu = self.device.type == "cuda"
        decayed = [weight for weight in adapter.parameters() if self.of_draft or weight.dim() > 1]
        others = [weight for weight in adapter.parameters() if not self.of_draft and weight.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01 if self.of_draft else 0.1},
             {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.999 if self.of_draft else 0.98),
            lr=torch.zeros((), device=self.device) if on_gpu else rate, fused=True, capturable=on_gpu)
        # On a GPU forward and backward are in bfloat16, on a copy: under autocast a fifth of a step went into casts.
        self.model = copy.deepcopy(adapter).bfloat16() if on_gpu else adapter
        self.weights, self.copies = list(adapter.parameters()), list(self.model.parameters())
        if on_gpu:
            for weight in self.weights:
                weight.grad = torch.zeros_like(weight)
        self.graphs: dict | None = {} if graphs and on_gpu else None      # (widths) -> (graph, what it writes)
        self.buffers: dict[tuple, tuple] = {}                             # (widths) -> target, draft, its lengths
        if on_gpu:
            with torch.cuda.device(self.device):
                self.stream, self.pool = side_stream(), torch.cuda.graph_pool_handle()

    @property
    def rate(self) -> float:
        return self.peak * learning_rate_factor(self.done, self.steps)

    def take_up(self, optimizer: dict, done: int) -> None:
        """Go on from the optimizer's state after so many steps; a ValueError if it is not that of these weights."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for number, kept in optimizer["state"].items():      # the fused kernels look at no shape: they would run over
            if any(kept[name].shape != weights[number].shape or kept[name].dtype != weights[number].dtype
                   for name in ("exp_avg", "exp_avg_sq")) or kept["step"].numel() != 1:
                raise ValueError(f"the optimizer's state {number} has another shape than its weights")
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(optimizer)
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate                   # on a GPU the very tensor that `step` fills and graphs read
        self.done = done

    @contextlib.contextmanager
    def on_stream(self):
        """All steps run in one stream of our own: graphs can't be captured in the default one."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                yield
            torch.cuda.current_stream().wait_stream(self.stream)

    def step(self, tokens: TokenTensors, rows: torch.Tensor, width: int) -> torch.Tensor:
        """One step on these rows, `width` targets wide -> the (2,) of loss_of, good until the next step."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.rate)
            else:
                group["lr"] = self.rate
        self.done += 1
        if self.device.type == "cuda":
            return self._replay(self._fill(tokens, rows, width))
        draft_width = width if self.of_draft else max(1, int(tokens.draft_lengths[rows].max()))
        return self._step(tokens.targets(rows, width), tokens.drafts(rows, draft_width), tokens.draft_lengths[rows])

    def _step(self, target, draft, draft_lengths) -> torch.Tensor:
        if self.model is not self.adapter:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.weights)
        loss, found = loss_of(self.model, target, draft, draft_lengths, self.draft_text)
        loss.backward()
        if self.model is not self.adapter:
            used = [(weight.grad, copy.grad) for weight, copy in zip(self.weights, self.copies)
                    if copy.grad is not None]
            torch._foreach_copy_(*map(list, zip(*used)))
        # Clipped by the optimizer itself, which divides by grad_scale as it reads: one pass over the gradients less.
        norm = nn.utils.get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])
        self.optimizer.grad_scale = (norm / MAX_GRADIENT_NORM).clamp(min=1)
        self.optimizer.step()
        self.model.zero_grad()                   # to None: in a graph, gradients get the same memory each time
        return found

    def _fill(self, tokens: TokenTensors, rows: torch.Tensor, width: int) -> tuple[int, int]:
        """Put these rows into the buffers of their widths, which are rounded up so that there are few -> the widths.

        Rows that the last batch lacks score nothing.
        """
        longest, most = max(1, tokens.draft_width), self.adapter.config.max_seq_len
        answer = rounded(width, tokens.width, most)
        widths = answer, answer if self.of_draft else rounded(longest, longest, most)
        if widths not in self.buffers:
            empty = [torch.zeros(self.batch_size, size, dtype=torch.long, device=self.device) for size in widths]
            self.buffers[widths] = empty[0].fill_(NOT_SCORED), empty[1], torch.zeros_like(empty[1][:, 0])
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
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    found = self._step(*batch)
                self.graphs[widths] = graph, found
            except RuntimeError as error:        # CUDA's refusals while capturing are RuntimeErrors
                log(f"train | WARNING | no CUDA graphs, every step runs eagerly: {error!s:.300}")
                self.graphs = None
                self.model.zero_grad()           # nothing was computed: they hold no numbers
                return self._step(*batch)
        graph, found = self.graphs[widths]
        graph.replay()
        return found


def train_epoch(trainer: Trainer, tokens: TokenTensors, generator: torch.Generator,
                on_step: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """One pass: (loss in nats a token, alpha), both of the pass itself: dropout on, weights on the move."""
    steps = math.ceil(len(tokens.lengths) / trainer.batch_size)
    # Kept on the device until the pass is over: reading a loss earlier would make the host wait for the GPU.
    found, positions = torch.zeros(steps, 2, device=tokens.device), []
    trainer.model.train()
    with trainer.on_stream():
        for step, (rows, width, scored) in enumerate(tokens.batches(trainer.batch_size, generator)):
            found[step] = trainer.step(tokens, rows, width)
            positions.append(scored)
            on_step()
        losses, right = found.T.tolist()
    for step, value in enumerate(losses, 1):
        if not math.isfinite(value):
            raise UserError(f"the loss became {value} in step {step} of {steps}")
    return float(np.average(losses, weights=positions)), sum(right) / int(tokens.lengths.sum())


# ----------------------------------------------------------------------------------------------------- phases
def phases_of(config: TrainConfig) -> dict[str, int]:
    """What is trained one after the other, with how many epochs.

    prefix+draft learns the target's language first, without drafts, and only then to use them: an adapter that
    sees drafts from the start learns 1,000 of them by heart and is worse on unseen drives. When the drafts don't
    help on validation, the first phase's adapter is what is kept: prefix+draft is never the worse of the two there.
    """
    if config.conditioning == "prefix+draft":
        return {"prefix": config.num_epochs, "prefix+draft": max(1, config.num_epochs // 2)}
    return {config.conditioning: config.num_epochs}


def run_phase(adapter, name: str, config: TrainConfig, tokens, last_epoch: int, after_epoch, number: int,
              resumed: dict | None = None, keep: Callable = lambda **_: None) -> None:
    """Up to `last_epoch` epochs of one phase; after_epoch(epoch, loss, alpha, rate, seconds) -> whether to stop.

    keep(**state): all that the next epoch depends on; resumed: such a state, to go on from.
    """
    adapter.condition(name)
    epochs = phases_of(config)[name]
    steps = epochs * math.ceil(len(tokens.lengths) / config.batch_size)
    trainer = Trainer(adapter, config.batch_size, config.learning_rate, steps, config.draft_text)
    generator = torch.Generator().manual_seed(config.seed + number)
    torch.manual_seed(config.seed + number)
    if resumed:
        with reading(resumed["file"], ANEW):
            restore(resumed, trainer, generator)
    progress = Progress(f"train | {name}", steps, trainer.done, unit="steps")
    for epoch in range(resumed["epoch"] + 1 if resumed else 1, 1 if resumed and resumed["over"] else last_epoch + 1):
        start = time.monotonic()
        try:
            loss, alpha = train_epoch(trainer, tokens, generator,
                                      lambda: progress.update(trainer.done, f"epoch {epoch:2}/{epochs}"))  # noqa: B023
            stop = after_epoch(epoch, loss, alpha, trainer.rate, time.monotonic() - start)
        except UserError as error:
            raise UserError(f"{name}, epoch {epoch}: {error}; the best epoch before it, if any, is kept in "
                            f"best_model.pt; try a --learning_rate below {config.learning_rate}, in a new task "
                            "folder") from error
        keep(phase=name, epoch=epoch, over=stop or epoch == last_epoch, adapter=adapter.state_dict(),
             optimizer=trainer.optimizer.state_dict(), done=trainer.done, order=generator.get_state(),
             random=random_state())
        if stop:
            break


def restore(found: dict, trainer: Trainer, generator: torch.Generator) -> None:
    """All that the epoch after this state depends on."""
    load_weights(trainer.adapter, found["adapter"])
    trainer.take_up(found["optimizer"], found["done"])
    try:
        generator.set_state(found["order"])
        set_random_state(found["random"])
    except RuntimeError as error:                # of their size and content: no memory is asked for
        raise ValueError(str(error)) from error


@dataclasses.dataclass
class Best:
    """The best epoch of a phase, its weights in memory that is written over by a better one."""

    alpha: float = -1.0
    epoch: int = 0                         # in the phase
    number: int = 0                        # over all phases
    adapter: TokenAdapter | None = None

    def take(self, adapter: TokenAdapter, alpha: float, epoch: int, number: int) -> None:
        self.alpha, self.epoch, self.number = alpha, epoch, number
        if self.adapter is None:
            self.adapter = copy.deepcopy(adapter)
        else:
            self.adapter.load_state_dict(adapter.state_dict())


@dataclasses.dataclass
class Trained:
    adapter: TokenAdapter                  # of the best epoch, trained again with the validation pairs if --refit
    selected: TokenAdapter                 # of the best epoch, never trained on the validation pairs
    prefix: TokenAdapter | None            # the ablation of prefix+draft: the same without ever seeing a draft
    history: list[dict]
    best_epoch: int                        # counted over all phases


def train(adapter: TokenAdapter, config: TrainConfig, data: Data, device: torch.device, task: Path, resume: Resume,
          show: Callable[[list[dict]], None] = lambda history: None) -> Trained:
    """Select the epoch (and whether drafts help) on validation; then train again on all pairs up to there.

    show(history): whenever resume.pt was written. The second training is never resumed, but done again.
    """
    adapter.to(device)
    checkpoint, history = Checkpoint(task / "best_model.pt"), []
    best = {name: Best() for name in phases_of(config)}
    if resume.found:
        with reading(resume.path, ANEW):
            take_up(resume.found, phases_of(config), adapter, best, history)
    try:
        select(adapter, best, history, checkpoint, config, data, device, resume, show)
    finally:                                         # whatever ends it: the best so far is kept
        checkpoint.write()
    chosen = max(best, key=lambda name: best[name].alpha)
    selected = best[chosen].adapter
    trained = Trained(selected, selected, best["prefix"].adapter if "prefix" in best else None, history,
                      best[chosen].number)
    if config.refit and config.conditioning != "draft":
        refit(trained, chosen, {name: found.epoch for name, found in best.items()}, config, data, device)
        save_adapter(trained.adapter, checkpoint.path, epoch=trained.best_epoch, refitted=True)
    return trained


def take_up(found: dict, phases: dict[str, int], adapter: TokenAdapter, best: dict[str, Best],
            history: list[dict]) -> None:
    """Fill `best` and `history` with what resume.pt says; an error if no training of these phases wrote it."""
    begun = list(phases)[:list(phases).index(found["phase"]) + 1]
    if list(found["best"]) != begun or not 0 < found["epoch"] <= phases[found["phase"]] or found["done"] < 0:
        raise ValueError(f"epoch {found['epoch']} of {found['phase']}, best of {', '.join(found['best'])}")
    for epoch in found["history"]:
        history.append({**epoch, "epoch": int(epoch["epoch"])})
    for name, kept in found["best"].items():
        model = copy.deepcopy(adapter)
        model.condition(name)
        load_weights(model, kept["adapter"])
        best[name] = Best(float(kept["alpha"]), int(kept["epoch"]), int(kept["number"]), model)


def select(adapter, best: dict[str, Best], history: list[dict], checkpoint: Checkpoint, config: TrainConfig,
           data: Data, device, resume: Resume, show: Callable) -> None:
    """Run all phases and fill `best` and `history`; each phase begins with the best weights of the one before."""
    tokens = TokenTensors.of(data.train, config.max_seq_len, device)
    validation_tokens = TokenTensors.of(data.validation, config.max_seq_len, device)
    if resume.found:                                 # best_model.pt may be older than what is known here
        kept = max(best.values(), key=lambda kept: kept.alpha)
        checkpoint.offer(kept.adapter, epoch=kept.epoch, validation_alpha=kept.alpha)

    def keep(**state) -> None:
        if resume.is_due():
            resume.write(history=history, best={name: {
                "alpha": kept.alpha, "epoch": kept.epoch, "number": kept.number, "adapter": kept.adapter.state_dict()}
                for name, kept in best.items() if kept.adapter}, **state)
            show(history)

    names = list(best)
    first = names.index(resume.found["phase"]) if resume.found else 0
    for number, (name, kept) in enumerate(best.items()):

        def after_epoch(epoch, loss, alpha, rate, seconds, name=name, kept=kept) -> bool:
            top1, top5, validation_loss = predict(adapter, validation_tokens, config.batch_size)
            if not math.isfinite(validation_loss):
                raise UserError(f"the validation loss became {validation_loss}")
            validation = measure(top1, validation_tokens.lengths, top5)
            history.append({
                "epoch": len(history) + 1, "phase": name, "train_loss": loss, "train_alpha": alpha,
                "validation_loss": validation_loss, "validation_alpha": validation["alpha"],
                "validation_top5": validation["top5"], "learning_rate": rate, "seconds": seconds})
            first = validation["alpha"] > max(found.alpha for found in best.values())
            if validation["alpha"] > kept.alpha:
                kept.take(adapter, validation["alpha"], epoch, len(history))
            if first:
                checkpoint.offer(kept.adapter, epoch=epoch, validation_alpha=validation["alpha"])
            checkpoint.write_if_due()
            return bool(config.early_stopping) and epoch - kept.epoch >= config.early_stopping

        if number >= first:
            run_phase(adapter, name, config, tokens, phases_of(config)[name], after_epoch, number, resume.of(name),
                      keep)
            log(f"train | {name} | best validation in epoch {kept.epoch}, accepted {kept.alpha:.1%}")
        adapter.load_state_dict(kept.adapter.state_dict())


def refit(trained: Trained, chosen: str, epochs: dict[str, int], config: TrainConfig, data: Data, device) -> None:
    """Train anew from the same start on train and validation pairs together, as long as was best without them."""
    adapter = make_adapter(config, data, data.all_train).to(device)
    tokens = TokenTensors.of(data.all_train, config.max_seq_len, device)
    log(f"train | again, with the validation pairs: {len(data.all_train)} pairs")
    for number, (name, epoch) in enumerate(epochs.items()):
        run_phase(adapter, name, config, tokens, epoch, lambda *_: False, number)
        if name == "prefix":
            trained.prefix = copy.deepcopy(adapter)
        if name == chosen:
            break
    trained.adapter = adapter
