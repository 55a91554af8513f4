"""A training step learns from exactly the loss that is meant, from a CUDA graph as well; what is
best is kept.
"""

import copy
import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import training.checkpoints as checkpoints
import training.loop as loop
import training.loss as loss_module
from acceptance.tensors import TokenTensors
from base import ROOT, UserError
from drafting.checkpoints import load_adapter
from pairs.splits import Data
from tests.acceptance.builders import pairs_of
from token_adapter import NOT_SCORED, AdapterConfig, TokenAdapter
from training.adapters import new_adapter
from training.checkpoints import SAVING_SHARE, Checkpoint, Fingerprint
from training.loop import Trainer, train_epoch
from training.loss import LinearCrossEntropy, loss_of
from training.phases import Best

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONDITIONINGS = ("prefix", "prefix+draft", "draft")
VOCAB, LONGEST = 40, 30


def small_adapter(conditioning: str, dropout: float = 0.0,
                  draft_vocab: bool = False) -> TokenAdapter:
    torch.manual_seed(0)
    config = AdapterConfig(VOCAB, conditioning, 32, 2, 4, 64, LONGEST, dropout,
                           draft_vocab=20 if draft_vocab else 0)
    return TokenAdapter(config, torch.arange(0, VOCAB, 2) if draft_vocab else None)


def answers(count: int, device: str = "cpu", shortest: int = 1) -> TokenTensors:
    """Pairs of very different lengths; targets follow from the drafts, some drafts are missing."""
    rng = np.random.default_rng(0)
    drafts = [rng.integers(0, VOCAB, rng.integers(shortest, LONGEST)) for _ in range(count)]
    targets = [(np.resize(draft, rng.integers(shortest, LONGEST + 1)) + 3) % VOCAB for draft in drafts]
    drafts = [draft[:0] if number % 7 == 5 else draft for number, draft in enumerate(drafts)]
    pairs = pairs_of([draft.tolist() for draft in drafts], [target.tolist() for target in targets])
    return TokenTensors.of(pairs, LONGEST, torch.device(device))


def batch_of(tokens: TokenTensors, rows: torch.Tensor) -> tuple:
    return (tokens.targets(rows, tokens.width), tokens.drafts(rows, tokens.draft_width),
            tokens.draft_lengths[rows])


# --------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 7 * 11, 2**20])
def test_the_fused_loss_and_its_gradients_are_those_of_cross_entropy(monkeypatch, kind, tolerance, chunk):
    monkeypatch.setitem(loss_module.LOGITS_AT_A_TIME, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (3 * torch.randn(*size, generator=generator, dtype=kind)
                       for size in ((23, 5), (11, 5), (11, )))
    labels = torch.randint(0, 11, (23,), generator=generator)
    labels[::4] = NOT_SCORED
    share = torch.rand(23, generator=generator, dtype=kind).masked_fill(labels == NOT_SCORED, 0)
    ours, theirs = ([part.clone().requires_grad_() for part in (x, weight, bias)] for _ in range(2))
    loss, losses, hits = LinearCrossEntropy.apply(*ours, labels, share)
    logits = F.linear(*theirs)
    wanted = F.cross_entropy(logits, labels, reduction="none")
    (2 * (wanted * share).sum()).backward()
    (2 * loss).backward()
    scored = labels != NOT_SCORED
    assert torch.allclose(losses[scored], wanted[scored],
                          rtol=tolerance) and not losses.requires_grad
    assert torch.equal(hits[scored], (logits.argmax(-1) == labels)[scored]) and hits[scored].any()
    assert loss.item() == pytest.approx((wanted * share).sum().item(), rel=tolerance)
    for one, other in zip(ours, theirs):
        assert (one.grad - other.grad).abs().max() < tolerance * other.grad.abs().max()


def test_a_label_without_any_chance_costs_what_it_should_and_no_number_stays_none():
    weight, bias, share = torch.tensor([[0.0], [1.0]]), torch.zeros(2), torch.ones(1)
    label = torch.zeros(1, dtype=torch.long)
    assert LinearCrossEntropy.apply(torch.tensor([[300.0]]), weight, bias, label, share)[0] == 300
    assert math.isnan(LinearCrossEntropy.apply(torch.tensor([[math.nan]]), weight, bias, label, share)[0])


def plain_loss(adapter, target, draft, lengths, draft_text: float) -> tuple:
    """The definition, in two passes over whole logits: (loss to learn from, loss of the answers,
    hits).
    """
    if not adapter.config.sees_prefix:
        logits = adapter(draft)
    else:
        logits = adapter(draft, lengths, target[:, :-1].clamp(min=0))
    labels = adapter.labels_of(target)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    hits = (logits.argmax(-1) == labels).sum()
    if not draft_text or not adapter.config.sees_prefix:
        return loss, loss, hits
    x = adapter._blocks(adapter._embed_answer(adapter.embedding(draft[:, :-1])) + adapter.as_draft)
    inside = torch.arange(draft.shape[1]) < lengths[:, None]
    text = F.cross_entropy(adapter._logits(x).flatten(0, 1),
                           adapter.labels_of(draft.masked_fill(~inside, NOT_SCORED)).flatten(),
                           reduction="sum") / inside.sum()
    return loss + draft_text * text, loss, hits


@pytest.mark.parametrize("draft_text", [0.0, 0.5])
@pytest.mark.parametrize("conditioning", [*CONDITIONINGS, "draft_vocab"])
def test_one_pass_over_answers_and_drafts_learns_what_two_passes_would(
        monkeypatch, conditioning, draft_text):
    monkeypatch.setattr(loss_module, "DRAFT_DROPOUT", 0.0)
    vocab = conditioning == "draft_vocab"
    adapter = small_adapter("prefix+draft" if vocab else conditioning, draft_vocab=vocab)
    tokens = answers(9)
    target, draft, lengths = batch_of(tokens, torch.arange(9))
    if conditioning == "draft":
        draft, draft_text = tokens.drafts(torch.arange(9), tokens.width), 0.0
    gradients = []
    for found in (plain_loss(adapter, target, draft, lengths, draft_text),
                  loss_of(adapter, target, draft, lengths, draft_text)):
        found[0].backward()
        weights = adapter.named_parameters()
        gradients.append({name: weight.grad for name, weight in weights if weight.grad is not None})
        adapter.zero_grad()
        results = found if len(found) == 3 else [found[0], *found[1]]
        gradients[-1] |= {"loss": results[0], "answers": results[1], "hits": results[2].float()}
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        assert (gradients[1][name] - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max()), name


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_batch_that_was_filled_up_for_a_graph_gives_the_numbers_of_its_own_rows(monkeypatch, conditioning):
    monkeypatch.setattr(loss_module, "DRAFT_DROPOUT", 0.0)
    adapter, tokens, rows = small_adapter(conditioning), answers(9), torch.tensor([3, 8, 1])
    trainer = Trainer(adapter, batch_size=5, rate=1e-3, steps=3, draft_text=0.5)
    width = int(tokens.lengths[rows].max())
    before = trainer._fill(tokens, torch.arange(5), width)             # what other rows leave there
    widths = trainer._fill(tokens, rows, width)
    assert widths == before and len(trainer.buffers) == 1 and len(trainer.buffers[widths][0]) == 5
    draft = tokens.drafts(rows, width if conditioning == "draft" else tokens.draft_width)
    found = [loss_of(adapter, *batch, trainer.draft_text) for batch in (
        trainer.buffers[widths], (tokens.targets(rows, width), draft, tokens.draft_lengths[rows]))]
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-5)
    assert found[0][1].tolist() == pytest.approx(found[1][1].tolist(), rel=1e-5)


@pytest.mark.parametrize(("width", "longest", "most", "wanted"), [
    (1, 50, 128, 16), (17, 50, 128, 32), (50, 50, 128, 56), (97, 98, 100, 100), (5, 5, 128, 8)])
def test_widths_are_few_and_never_beyond_what_the_adapter_holds(width, longest, most, wanted):
    assert loop.rounded(width, longest, most) == wanted


def test_half_of_the_drafts_are_hidden_in_training_alone():
    adapter, tokens = small_adapter("prefix+draft"), answers(30, shortest=5)
    batch, seen = batch_of(tokens, torch.arange(30)), []
    hidden = adapter.hidden
    adapter.hidden = lambda draft, lengths, *rest: seen.append(lengths) or hidden(draft, lengths, *rest)
    loss_of(adapter, *batch, 0.0)
    had = batch[2] > 0
    assert 0.2 < (seen[0][had] > 0).float().mean() < 0.8 and not (seen[0] > batch[2]).any()


# ------------------------------------------------------------------------------------------ keeping
def test_what_was_best_is_not_changed_by_further_training():
    adapter, best = small_adapter("prefix"), Best()
    for alpha in (0.1, 0.2):                          # the second time into the memory of the first
        with torch.no_grad():
            adapter.begin.fill_(alpha)
        best.take(adapter, alpha, epoch=1, number=1)
        kept = best.adapter.begin
        with torch.no_grad():
            adapter.begin.fill_(7)
        assert (kept == alpha).all() and best.alpha == alpha and best.adapter.begin is kept


def test_a_checkpoint_is_written_at_once_then_when_it_is_due_and_in_the_end(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    save = checkpoints.save_adapter

    def slow(*arguments, **facts) -> None:
        save(*arguments, **facts)
        clock[0] += 1.0

    monkeypatch.setattr(checkpoints, "save_adapter", slow)
    adapter, path = small_adapter("prefix"), tmp_path / "best_model.pt"
    checkpoint = Checkpoint(path)
    wait = 1 / SAVING_SHARE

    def epoch() -> int:
        assert os.listdir(tmp_path) == ["best_model.pt"] and load_adapter(path)
        return torch.load(path, weights_only=True)["epoch"]

    checkpoint.write()                                            # nothing to write yet
    assert not path.exists()
    checkpoint.offer(adapter, epoch=1)
    assert epoch() == 1
    checkpoint.offer(adapter, epoch=2)
    assert epoch() == 1
    clock[0] += wait
    checkpoint.write_if_due()
    assert epoch() == 2
    checkpoint.offer(adapter, epoch=3)
    checkpoint.write()
    checkpoint.write()                                            # once is enough
    assert epoch() == 3 and clock[0] == 3 + wait


# ----------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("settings", [
    {"capturable": True, "lr": torch.tensor(0.7)}, {"fused": None, "foreach": True},
    {"amsgrad": True, "maximize": True},
    {"betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 9.0}, {"differentiable": True}])
def test_a_resumed_optimizer_keeps_the_settings_of_this_machine(settings):
    """A state that was written on a GPU says capturable, and its learning rate is a tensor; on a
    CPU neither.
    """
    def trainer() -> Trainer:
        return Trainer(small_adapter("prefix"), batch_size=4, rate=1e-3, steps=9)

    tokens, writer, reader, unchanged = answers(8), trainer(), trainer(), trainer()
    rows = torch.arange(4)
    writer.step(tokens, rows, tokens.width)
    state = writer.optimizer.state_dict()
    odd = {**state, "param_groups": [{**group, **settings} for group in state["param_groups"]]}
    for other, saved in ((reader, odd), (unchanged, state)):
        before = [{**group, "params": None} for group in other.optimizer.param_groups]
        other.adapter.load_state_dict(writer.adapter.state_dict())
        other.take_up(copy.deepcopy(saved), 1)           # whose tensors it goes on with
        assert [{**group, "params": None} for group in other.optimizer.param_groups] == before
        torch.manual_seed(3)
        other.step(tokens, rows, tokens.width)
    assert all(torch.equal(one, two) for one, two in zip(reader.weights, unchanged.weights))


def data_of(train, test, **facts) -> Data:
    facts = {"split": {"by": "drive"}, "vocab_size": 40, **facts}
    return Data(train, train, train, test, files={}, warnings=[], largest_ids=[], **facts)


def test_a_fingerprint_tells_everything_that_training_depends_on():
    train = pairs_of([[5, 6], [7], []], [[1, 2, 3], [4], [5, 6]])
    train = dataclasses.replace(train, files=[{"identity": 1}])
    test = dataclasses.replace(pairs_of([[5]], [[6]]), files=[{"identity": 2}])
    data = data_of(train, test)
    ours = Fingerprint.of(data)

    def differences(**changes) -> list[str]:
        pairs = {"train": train, "test": test, **changes}
        return Fingerprint.of(data_of(**pairs)).differences(ours.parts)

    assert differences() == [] and ours.differences(ours.format_0) == []
    assert differences(train=dataclasses.replace(train, sequence=["b"] * 3)) == ["train sequence names"]
    assert differences(test=dataclasses.replace(test, clip=["0"])) == ["test clip names"]
    assert differences(train=dataclasses.replace(train, files=[{"identity": 3}])) == ["train questions"]
    assert differences(train=train.select([1, 0, 2])) == ["split", "train clip names", "train rows"]
    shorter = dataclasses.replace(train, draft_length=train.draft_length * 0)
    assert differences(train=shorter) == ["train rows"]
    assert differences(split={"by": "sequence"}) == ["split"]
    assert differences(vocab_size=41) == ["vocabulary size"]
    changed = dataclasses.replace(train, target=train.target + 1)
    assert differences(train=changed) == ["train tokens"]
    assert Fingerprint.of(data_of(changed, test)).differences(ours.format_0) == ["tokens or rows"]


def test_an_adapter_that_no_checkpoint_could_hold_is_refused_before_it_takes_memory():
    with pytest.raises(UserError,
                       match=r"has \d+\.\d GiB, wanted at most 3; choose a smaller --embed_dim"):
        new_adapter(AdapterConfig(2**20, embed_dim=16384, num_heads=8), seed=1)


# ------------------------------------------------------------------------------------------- graphs
@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is there, which might do it")
def test_without_graphs_every_step_runs_eagerly_after_one_warning(capsys):
    """On a CPU a capture is refused, as by a driver that can't."""
    tokens, losses = answers(23), []
    for refused in (False, True):
        trainer = Trainer(small_adapter("prefix+draft"), batch_size=5, rate=1e-3, steps=10, draft_text=0.5)
        trainer.graphs, trainer.pool, trainer.stream = ({} if refused else None), None, None
        torch.manual_seed(1)
        losses.append([trainer._replay(trainer._fill(tokens, rows, width)).tolist()
                       for _ in range(2) for rows, width, _ in tokens.batches(5)])
        assert trainer.graphs is None
    assert losses[0] == losses[1]
    assert capsys.readouterr().out.count("WARNING | no CUDA graphs, every step runs eagerly") == 1


def run(conditioning: str, graphs: bool, dropout: float = 0.0, epochs: int = 4) -> tuple:
    """(trainer, [(loss, alpha) of each epoch]) of a small training on the GPU: several widths, a
    last batch of 3.
    """
    tokens = answers(43, "cuda")
    vocab = conditioning == "draft_vocab"
    adapter = small_adapter("prefix+draft" if vocab else conditioning, dropout, vocab).cuda()
    trainer = Trainer(adapter, batch_size=8, rate=3e-3, steps=6 * epochs, draft_text=0.5, graphs=graphs)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    return trainer, [train_epoch(trainer, tokens, generator) for _ in range(epochs)]


@needs_gpu
@pytest.mark.parametrize("conditioning", [*CONDITIONINGS, "draft_vocab"])
def test_cuda_graphs_learn_what_eager_steps_learn(monkeypatch, conditioning):
    monkeypatch.setattr(loss_module, "DRAFT_DROPOUT", 0.0)
    (graphed, ours), (eager, theirs) = (run(conditioning, graphs) for graphs in (True, False))
    assert len(graphed.graphs) >= 2 and all(graphed.graphs.values()) and eager.graphs is None
    assert np.allclose(ours, theirs, rtol=0.005, atol=0.02) and ours[-1][0] < ours[0][0] - 0.1
    for one, other in zip(graphed.adapter.parameters(), eager.adapter.parameters()):
        assert (one - other).abs().mean() < 1e-3


@needs_gpu
def test_cuda_steps_learn_what_cpu_steps_learn(monkeypatch):
    monkeypatch.setattr(loss_module, "DRAFT_DROPOUT", 0.0)
    _, ours = run("prefix+draft", graphs=True)
    tokens, adapter = answers(43), small_adapter("prefix+draft")
    trainer, generator = Trainer(adapter, 8, 3e-3, 24, 0.5), torch.Generator().manual_seed(1)
    theirs = [train_epoch(trainer, tokens, generator) for _ in range(4)]
    assert np.allclose(ours, theirs, rtol=0.01, atol=0.03)


@needs_gpu
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_cuda_graphs_draw_new_random_numbers_each_time_and_follow_the_rate(conditioning):
    trainer, losses = run(conditioning, graphs=True, dropout=0.3)
    assert all(trainer.graphs.values()) and losses[-1][0] < losses[0][0]
    tokens = answers(43, "cuda")
    before = [weight.clone() for weight in trainer.adapter.parameters()]
    trainer.peak = 0.0                                   # neither steps nor decay: the weights stay
    with trainer.on_stream():
        rows, width, _ = next(iter(tokens.batches(8)))
        losses = {float(trainer.step(tokens, rows, width)[0]) for _ in range(5)}
    assert len(losses) == 5
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.adapter.parameters()))


def train_where_captures_fail() -> None:
    """Run by the test below in a process of its own: PyTorch's allocator may not get over a capture
    that failed.
    """
    loss_module.DRAFT_DROPOUT, whole = 0.0, loop.loss_of
    _, wanted = run("prefix", graphs=False)

    def waiting(*arguments) -> tuple:
        loss, found = whole(*arguments)
        if torch.cuda.is_current_stream_capturing():
            found.tolist()                              # waits for the device: no capture allows it
        return loss, found

    loop.loss_of = waiting
    trainer, found = run("prefix", graphs=True)
    assert trainer.graphs is None and np.allclose(found, wanted, rtol=0.005, atol=0.02), (found, wanted)
    run("prefix", graphs=True, dropout=0.3)                     # random numbers are still to be had


@needs_gpu
def test_cuda_capture_that_fails_leaves_training_eager_and_right():
    code = "import tests.training.test_training as test; test.train_where_captures_fail()"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                           timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("WARNING | no CUDA graphs, every step runs eagerly") == 2


@needs_gpu
def test_cuda_loss_in_bfloat16_is_near_that_of_float32():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).cuda()
                       for size in ((64, 32), (500, 32), (500, )))
    labels = torch.randint(0, 500, (64,), generator=generator).cuda()
    share = torch.full((64,), 1 / 64).cuda()
    found = []
    for narrow in (True, False):
        leaves = [part.clone().requires_grad_() for part in (x, weight, bias)]
        used = [leaf.bfloat16() for leaf in leaves] if narrow else leaves
        loss = LinearCrossEntropy.apply(*used, labels, share)[0]
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found):
        assert one.dtype == torch.float32 and (one - other).abs().max() < 0.03 * other.abs().max()
