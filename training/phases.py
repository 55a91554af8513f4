"""Training: from token pairs to an adapter, phase by phase; the best epoch is selected on
validation.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import torch

from acceptance.metrics import measure
from acceptance.tensors import TokenTensors
from base import Progress, UserError, log
from drafting.checkpoints import save_adapter
from machine.files import reading
from pairs.pairs import Pairs
from pairs.splits import Data
from token_adapter import TokenAdapter
from training.adapters import condition
from training.checkpoints import ANEW, TaskFiles, load_weights, random_state, set_random_state
from training.loop import Diverged, Trainer, train_epoch
from training.together import ALONE, Group, Validation


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an adapter is trained; each field is the flag of the same name of train_and_evaluate.py.
    """

    conditioning: str
    num_epochs: int
    batch_size: int
    learning_rate: float
    draft_text: float
    early_stopping: int
    refit: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """Training in one conditioning; a phase begins with the best weights of the one before."""

    name: str                              # its conditioning
    number: int                            # 0 for the first phase
    epochs: int                            # over which the learning rate goes to 0


def phases_of(settings: Settings) -> list[Phase]:
    """The phases in their order.

    prefix+draft learns the target's language first, without drafts, and then to use them: an
    adapter that sees drafts from the start learns 1,000 of them by heart and is worse on unseen
    drives. If the drafts don't help on validation, the adapter of the first phase is selected: on
    validation prefix+draft is never the worse of the two.
    """
    if settings.conditioning == "prefix+draft":
        return [Phase("prefix", 0, settings.num_epochs),
                Phase("prefix+draft", 1, max(1, settings.num_epochs // 2))]
    return [Phase(settings.conditioning, 0, settings.num_epochs)]


# ---------------------------------------------------------------------------------------- one phase
@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the training pairs, measured while it ran."""

    number: int                            # 1 for the first of its phase
    loss: float                            # nats a token
    alpha: float
    learning_rate: float                   # after its last step
    seconds: float


class PhaseRun:
    """One phase at work: trainer, order of the pairs, and where it stands."""

    def __init__(self, adapter: TokenAdapter, phase: Phase, tokens: TokenTensors, settings: Settings,
                 group: Group = ALONE):
        """The adapter is trained in place."""
        condition(adapter, phase.name)
        self.phase, self.tokens, self.learning_rate = phase, tokens, settings.learning_rate
        steps = phase.epochs * math.ceil(len(tokens.lengths) / settings.batch_size)
        self.trainer = Trainer(adapter, settings.batch_size, settings.learning_rate, steps,
                               settings.draft_text)
        self.trainer.group, self.seed = group, settings.seed + phase.number
        self.generator = torch.Generator().manual_seed(settings.seed + phase.number)
        torch.manual_seed(settings.seed + phase.number)
        self.done = self.current = 0                       # epochs: finished, at work

    def resume(self, saved: dict) -> None:
        """Go on from the state of resume.pt."""
        with reading(saved["file"], ANEW):
            restore(saved, self.trainer, self.generator)
        self.done = self.current = saved["epoch"]

    def state(self) -> dict:
        """All that the next epoch depends on."""
        return {"phase": self.phase.name, "epoch": self.done,
                "adapter": self.trainer.adapter.state_dict(),
                "optimizer": self.trainer.optimizer.state_dict(), "done": self.trainer.done,
                "order": self.generator.get_state(), "random": random_state()}

    def epochs(self, last: int) -> Iterator[Epoch]:
        """Train up to epoch `last`; the consumer may stop earlier."""
        name, trainer = self.phase.name, self.trainer
        progress = Progress(f"train | {name}", trainer.steps, trainer.done, unit="steps")

        def show() -> None:
            progress.update(trainer.done, f"epoch {self.current:2}/{self.phase.epochs}")

        while self.done < last:
            start, self.current = time.monotonic(), self.done + 1
            if trainer.group.world > 1:              # dropout that differs between processes
                torch.manual_seed((self.seed * 1009 + self.current) * 4099 + trainer.group.rank)
            loss, alpha = train_epoch(trainer, self.tokens, self.generator, show)
            self.done += 1
            yield Epoch(self.done, loss, alpha, trainer.rate, time.monotonic() - start)

    @contextlib.contextmanager
    def advising(self) -> Iterator[None]:
        """Inside, an error about a loss says where it arose and what to do."""
        try:
            yield
        except Diverged as error:
            raise UserError(f"{self.phase.name}, epoch {self.current}: {error}; the best epoch "
                            "before it, if any, is kept in best_model.pt; try a --learning_rate "
                            f"below {self.learning_rate}, in a new task folder") from error


def restore(saved: dict, trainer: Trainer, generator: torch.Generator) -> None:
    """Set all that the epoch after this state depends on."""
    load_weights(trainer.adapter, saved["adapter"])
    trainer.take_up(saved["optimizer"], saved["done"])
    try:
        generator.set_state(saved["order"])
        set_random_state(saved["random"])
    except RuntimeError as error:             # about their size and content: no memory is asked for
        raise ValueError(str(error)) from error


# ---------------------------------------------------------------------------------------- selection
@dataclasses.dataclass
class Best:
    """The best epoch of a phase; its weights lie in memory that a better one overwrites."""

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

    @property
    def model(self) -> TokenAdapter:
        """The adapter, once an epoch was taken."""
        assert self.adapter is not None
        return self.adapter


def take_up(saved: dict, phases: list[Phase],
            adapter: TokenAdapter) -> tuple[dict[str, Best], list[dict]]:
    """(best epoch of each phase begun, history) from resume.pt; an error if no training of these
    phases wrote it.
    """
    epochs = {phase.name: phase.epochs for phase in phases}
    begun = list(epochs)[:list(epochs).index(saved["phase"]) + 1]
    is_epoch = 0 < saved["epoch"] <= epochs[saved["phase"]]
    if list(saved["best"]) != begun or not is_epoch or saved["done"] < 0:
        raise ValueError(f"epoch {saved['epoch']} of {saved['phase']}, best of "
                         f"{', '.join(saved['best'])}")
    history = [{**epoch, "epoch": int(epoch["epoch"])} for epoch in saved["history"]]
    best = {}
    for name, facts in saved["best"].items():
        model = copy.deepcopy(adapter)
        condition(model, name)
        load_weights(model, facts["adapter"])
        best[name] = Best(float(facts["alpha"]), int(facts["epoch"]), int(facts["number"]), model)
    return best, history


class Selection:
    """The search for the best epoch over all phases; keeps the files of the task up to date."""

    def __init__(self, settings: Settings, adapter: TokenAdapter, data: Data, files: TaskFiles,
                 group: Group = ALONE):
        """adapter: on its device, trained in place. Continues from files.resume.saved."""
        self.settings, self.adapter, self.files, self.group = settings, adapter, files, group
        self.phases, resume = phases_of(settings), files.resume
        self.best, self.history = {phase.name: Best() for phase in self.phases}, []
        device, width = next(adapter.parameters()).device, adapter.config.max_seq_len
        self.tokens = TokenTensors.of(data.training.train, width, device)
        self.validation = Validation(data.training.validation, width, device, group)
        if resume.saved:
            with reading(resume.path, ANEW):
                known, self.history = take_up(resume.saved, self.phases, adapter)
            self.best |= known
            best = self.best[self.chosen()]              # best_model.pt may be older than resume.pt
            files.checkpoint.offer(best.model, epoch=best.epoch, validation_alpha=best.alpha)

    def chosen(self) -> str:
        """The phase with the best epoch."""
        return max(self.best, key=lambda name: self.best[name].alpha)

    def run(self) -> None:
        """Run all phases that are left."""
        saved = self.files.resume.saved
        first = 0
        if saved:
            first = next(phase.number for phase in self.phases if phase.name == saved["phase"])
        for phase in self.phases:
            best = self.best[phase.name]
            if phase.number >= first:
                self._run_phase(phase)
                log(f"train | {phase.name} | best validation in epoch {best.epoch}, accepted "
                    f"{best.alpha:.1%}")
            self.adapter.load_state_dict(best.model.state_dict())

    def _run_phase(self, phase: Phase) -> None:
        run = PhaseRun(self.adapter, phase, self.tokens, self.settings, self.group)
        saved = self.files.resume.of(phase.name)
        if saved:
            run.resume(saved)
        if saved and saved["over"]:
            return
        with run.advising():
            for epoch in run.epochs(phase.epochs):
                is_over = self._validate(phase, epoch) or epoch.number == phase.epochs
                self._save_if_due(over=is_over, run=run)
                if is_over:
                    break

    def _validate(self, phase: Phase, epoch: Epoch) -> bool:
        """Measure the adapter after an epoch and keep it if it is the best -> whether to stop
        early.
        """
        top1, top5, loss = self.validation.predict(self.adapter, self.settings.batch_size)
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss became {loss}")
        figures = measure(top1, self.validation.lengths, top5)
        self.history.append({
            "epoch": len(self.history) + 1, "phase": phase.name, "train_loss": epoch.loss,
            "train_alpha": epoch.alpha, "validation_loss": loss,
            "validation_alpha": figures["alpha"], "validation_top5": figures["top5"],
            "learning_rate": epoch.learning_rate, "seconds": epoch.seconds})
        self.files.track({key: value for key, value in self.history[-1].items() if key != "epoch"},
                         len(self.history))
        best, checkpoint = self.best[phase.name], self.files.checkpoint
        is_best_of_all = figures["alpha"] > self.best[self.chosen()].alpha
        if figures["alpha"] > best.alpha:
            best.take(self.adapter, figures["alpha"], epoch.number, len(self.history))
        if is_best_of_all:
            checkpoint.offer(best.model, epoch=epoch.number, validation_alpha=figures["alpha"])
        checkpoint.write_if_due()
        patience = self.settings.early_stopping
        return bool(patience) and epoch.number - best.epoch >= patience

    def _save_if_due(self, over: bool, run: PhaseRun) -> None:
        """Write resume.pt; over: the phase has ended."""
        if self.files.resume.is_due():
            best = {name: {"alpha": best.alpha, "epoch": best.epoch, "number": best.number,
                           "adapter": best.adapter.state_dict()}
                    for name, best in self.best.items() if best.adapter}
            self.files.resume.write(history=self.history, best=best, over=over, **run.state())
            self.files.show(self.history)


# ----------------------------------------------------------------------------------------- training
@dataclasses.dataclass
class Trained:
    adapter: TokenAdapter               # of the best epoch; with --refit trained again on all pairs
    selected: TokenAdapter                # of the best epoch, never trained on the validation pairs
    prefix: TokenAdapter | None    # the ablation of prefix+draft: the same, but never shown a draft
    history: list[dict]
    best_epoch: int                        # counted over all phases


def train(settings: Settings, adapter: TokenAdapter, data: Data, files: TaskFiles,
          new_adapter: Callable[[Pairs], TokenAdapter], group: Group = ALONE) -> Trained:
    """Select the epoch (and whether drafts help) on validation; then train again on all pairs up to
    there.

    adapter: on its device. new_adapter: makes one for the second training, for the pairs given,
    with the same random weights; the second training is not resumed, but done again.
    """
    selection = Selection(settings, adapter, data, files, group)
    try:
        selection.run()
    finally:                                         # whatever ends it: the best so far is kept
        files.checkpoint.write()
    best = selection.best
    chosen = best[selection.chosen()]
    prefix = best["prefix"].adapter if "prefix" in best else None
    trained = Trained(chosen.model, chosen.model, prefix, selection.history, chosen.number)
    if settings.refit and settings.conditioning != "draft":
        pairs = data.training.all_train
        log(f"train | again, with the validation pairs: {len(pairs)} pairs")
        refit(trained, selection, new_adapter(pairs), pairs)
        if files.checkpoint.writes:
            save_adapter(trained.adapter, files.checkpoint.path, epoch=trained.best_epoch,
                         refitted=True)
    return trained


def refit(trained: Trained, selection: Selection, adapter: TokenAdapter, pairs: Pairs) -> None:
    """Train a new adapter on all pairs, in each phase as long as was best on validation."""
    tokens = TokenTensors.of(pairs, adapter.config.max_seq_len, next(adapter.parameters()).device)
    for phase in selection.phases:
        run = PhaseRun(adapter, phase, tokens, selection.settings, selection.group)
        with run.advising():
            for _ in run.epochs(selection.best[phase.name].epoch):
                pass
        if phase.name == "prefix":
            trained.prefix = copy.deepcopy(adapter)
        if phase.name == selection.chosen():
            break
    trained.adapter = adapter
