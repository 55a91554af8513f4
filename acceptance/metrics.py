"""How often proposals are right: one definition of every metric, and the baselines that stand beside them.

Every target position counts, position 0 too. One for which nothing is proposed (past the draft's end in plain
copying, past --max_seq_len for anything, before a checkpoint's first position) is a miss and never left out.

The expected tokens for each target pass follow Leviathan et al. 2023, "Fast Inference from Transformers via
Speculative Decoding", equation 1. It takes positions for independent; those of answers by template are not.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from base import log
from drafting.adapter import Adapter
from drafting.baselines import direct_copy
from drafting.contract import TOP
from drafting.hybrid import MEMORY_SHARES, Hybrid
from drafting.memory import MAX_TRAINING_ANSWERS, Memory, NGrams, remembered
from drafting.table import SIMULATED, SimulationParts
from pairs.formats import BLOCK, Pairs, numbered, numbered_drives
from token_adapter import NOT_SCORED, TokenAdapter

GAMMAS = range(1, 11)
SIMULATED_GAMMAS = (1, 2, 3, 5, 8, 12)
PASSES_SHOWN = (5, 10, 15, 20, 30)
COMPARED = ("copy of the draft", "n-gram", "prefix", "adapter, drafts shuffled")     # paired with the adapter
MIN_SEQUENCES, CLIPS_TOGETHER, BOOTSTRAPS = 8, 20, 2000
DRAWN_AT_A_TIME = 2**20        # group numbers of the bootstrap: all 2000 x 50,000 of a million clips are 800 MB
GPU_LOGITS = 2**28             # at a time, 1 GiB: small batches on a GPU are launching and little else


# ---------------------------------------------------------------------------------------------------- metrics
def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens for each target pass when each of gamma proposals is right with chance alpha, independently."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def blocks(count: int) -> Iterator[slice]:
    """Rows 0 to count, so many at a time that what is reckoned of them stays small beside the hits themselves."""
    return (slice(first, first + BLOCK) for first in range(0, count, BLOCK))


def number_right(top1: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(N,) int64 right proposals within each answer; top1 (N, T) bool, lengths (N,)."""
    found = np.empty(len(lengths), np.int64)
    for rows in blocks(len(lengths)):
        found[rows] = (top1[rows] & (np.arange(top1.shape[1]) < lengths[rows, None])).sum(1)
    return found


def measure(top1: np.ndarray, lengths: np.ndarray, top5: np.ndarray | None = None) -> dict:
    """All metrics of one drafter on N answers.

    top1, top5: (N, T) bool, proposal right at that position; past an answer's end they are not looked at.
    lengths: (N,) tokens in each target, uncut: those past T count as misses. One of them reaches T.
    """
    width, run = top1.shape[1], 0
    count, right1, right5 = (np.zeros(width, np.int64) for _ in range(3))
    for rows in blocks(len(lengths)):
        inside = np.arange(width) < lengths[rows, None]
        right = top1[rows] & inside
        run += np.where(right.all(1), width, right.argmin(1)).sum()
        count, right1 = count + inside.sum(0), right1 + right.sum(0)
        if top5 is not None:
            right5 += (top5[rows] & inside).sum(0)
    positions = int(lengths.sum())
    alpha = float(right1.sum() / positions)
    return {
        "alpha": alpha,
        "top5": None if top5 is None else float(right5.sum() / positions),
        "first_token": float(right1[0] / len(lengths)),
        "mean_run": float(run / len(lengths)),
        "expected_tokens": {str(gamma): expected_tokens(alpha, gamma) for gamma in GAMMAS},
        "per_position": {
            "count": count.tolist(),
            "alpha": (right1 / count).tolist(),
            "top5": None if top5 is None else (right5 / count).tolist(),
        },
    }


# ------------------------------------------------------------------------------------------ simulated decoding
def simulate(top1: np.ndarray, lengths: np.ndarray, gamma: int) -> dict:
    """Greedy speculative decoding of N answers with gamma proposals a pass, told by the hits alone.

    top1 (N, T) bool: the proposal for that position, given the true tokens before it, is right. That is all that
    decides: after a wrong proposal the rest of a round is thrown away. The prefill is a pass too, with the opening
    proposals verified inside it; each pass emits its accepted proposals and one token of the target's own, unless
    the answer ends before that.
    """
    passes, histogram = np.zeros(len(lengths), np.int64), np.zeros(gamma + 1, np.int64)
    for rows in blocks(len(lengths)):
        passes[rows] = _passes(top1[rows], lengths[rows], gamma, histogram)
    return {"tau": float(lengths.sum() / passes.sum()), "tau_mean": float((lengths / passes).mean()),
            "accepted_lengths": histogram.tolist(), "passes": passes}


def _passes(top1: np.ndarray, lengths: np.ndarray, gamma: int, histogram: np.ndarray) -> np.ndarray:
    """(B,) passes of each answer; all advance together. Accepted lengths are counted into `histogram`."""
    inside = np.arange(top1.shape[1]) < lengths[:, None]
    right = np.pad(top1 & inside, ((0, 0), (0, 1)))
    run = np.zeros(right.shape, np.int64)                     # right proposals in a row from each position on
    for at in range(top1.shape[1] - 1, -1, -1):
        run[:, at] = np.where(right[:, at], run[:, at + 1] + 1, 0)
    rows, at = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    passes = np.zeros(len(lengths), np.int64)
    while (going := at < lengths).any():
        # Past the width that was proposed for, nothing is accepted and each pass emits one token.
        accepted = np.where(going, np.minimum(run[rows, np.minimum(at, top1.shape[1])], gamma), 0)
        histogram += np.bincount(accepted[going], minlength=gamma + 1)
        at, passes = np.where(going, at + accepted + 1, at), passes + going
    return passes


def interval(hits: np.ndarray, lengths: np.ndarray, sequences: list[str], other: np.ndarray | None = None) -> dict:
    """95 % interval of alpha, or of its difference to another drafter's on the same answers (paired bootstrap).

    hits, other: (N,) right proposals within each answer of lengths (N,). Resampled are whole sequences; with fewer
    than eight of them, blocks of 20 neighbouring clips. "left_out" are the lowest and the highest value when any one
    drive is left out, None with a single drive.
    """
    if other is not None:
        hits = hits - other
    drives, drive = numbered_drives(sequences)
    ours, positions = np.bincount(drive, hits), np.bincount(drive, lengths)
    rest = (hits.sum() - ours) / (lengths.sum() - positions) if len(drives) > 1 else None
    names, group = numbered(sequences)
    unit = "sequences"
    if len(names) < MIN_SEQUENCES:
        group, unit = np.arange(len(lengths)) // CLIPS_TOGETHER, f"blocks of {CLIPS_TOGETHER} clips"
    hits, positions = np.bincount(group, hits), np.bincount(group, lengths)
    random, at_a_time, drawn_alphas = np.random.default_rng(0), max(1, DRAWN_AT_A_TIME // len(hits)), []
    for first in range(0, BOOTSTRAPS, at_a_time):
        drawn = random.integers(len(hits), size=(min(at_a_time, BOOTSTRAPS - first), len(hits)))
        drawn_alphas.append(hits[drawn].sum(1) / positions[drawn].sum(1))
    low, high = np.quantile(np.concatenate(drawn_alphas), (0.025, 0.975))
    return {"value": float(hits.sum() / positions.sum()), "low": float(low), "high": float(high), "by": unit,
            "left_out": None if rest is None else [float(rest.min()), float(rest.max())]}


def by_drive(hits: np.ndarray, lengths: np.ndarray, sequences: list[str]) -> dict:
    """alpha of each drive alone, and of all the others together when it is left out; hits as for `interval`."""
    drives, drive = numbered_drives(sequences)
    clips, ours, positions = np.bincount(drive), np.bincount(drive, hits), np.bincount(drive, lengths)
    return {name: {"clips": int(clips[i]), "alpha": float(ours[i] / positions[i]),
                   "without_it": float((hits.sum() - ours[i]) / (lengths.sum() - positions[i]))
                   if len(drives) > 1 else None}
            for i, name in enumerate(drives)}


def stream(drafter, pairs: Pairs) -> dict:
    """Let a drafter propose for every answer in order and learn each one afterwards; everything measured of it."""
    lengths = pairs.lengths("target")
    top1 = np.zeros((len(pairs), int(lengths.max())), bool)
    top5, start = top1.copy(), time.monotonic()
    for number, target in enumerate(pairs.views("target")):
        right = drafter.predict(number) == target[:, None]
        top1[number, :len(target)], top5[number, :len(target)] = right[:, 0], right.any(1)
        drafter.learn(number)
    seconds = time.monotonic() - start
    simulated = {}
    for gamma in SIMULATED_GAMMAS:
        found = simulate(top1, lengths, gamma)
        passes = found.pop("passes")
        found["more_passes_than"] = {str(n): float((passes > n).mean()) for n in PASSES_SHOWN}
        simulated[str(gamma)] = found
    found, hits = measure(top1, lengths, top5), number_right(top1, lengths)
    return {"top1": top1, **found, "simulated": simulated,
            "expected_by_gamma": {str(gamma): expected_tokens(found["alpha"], gamma) for gamma in SIMULATED_GAMMAS},
            "interval": interval(hits, lengths, pairs.sequence),
            "drives": by_drive(hits, lengths, pairs.sequence), "seconds_per_answer": seconds / len(pairs)}


def measure_drafters(parts: SimulationParts, selected: Selected | None) -> dict:
    """Every drafter of the table streams over the answers in clip order: {"drafters": {name: ...}, ...}.

    selected: what the memory's share in the hybrids is chosen on; None: there are no hybrids.
    """
    if selected and parts.adapter.config.sees_prefix:
        names = ["hybrid", *["hybrid, online"] * parts.online]
        parts.memory_share.update({name: choose_share(selected, parts, name) for name in names})
    if parts.training and len(parts.training) > MAX_TRAINING_ANSWERS:
        log(f"drafters | a memory begins with the last {MAX_TRAINING_ANSWERS} of {len(parts.training)} training "
            "answers")
    figures, hits, lengths = {}, {}, parts.pairs.lengths("target")
    for name, entry in SIMULATED.items():
        start, drafter = time.monotonic(), entry.make_simulated(parts)
        if drafter is None:
            continue
        rows = stream(drafter, parts.pairs)
        hits[name] = number_right(rows.pop("top1"), lengths)
        figures[name] = {**rows, "parameters": parts.adapter.num_parameters() if entry.needs_adapter else 0}
        log(f"drafters | {name} | accepted {rows['alpha']:.1%} | tau {rows['simulated']['8']['tau']:.2f} at gamma 8 "
            f"| {time.monotonic() - start:.1f} s")
    return {"drafters": figures, "memory_share": parts.memory_share, "stream": parts.streaming,
            "adapter_minus": {name: interval(hits["adapter"], lengths, parts.pairs.sequence, hits[name])
                              for name in COMPARED if name in hits},
            "step_ms": step_ms(parts.adapter, parts.pairs) if parts.adapter.config.sees_prefix else None}


@dataclasses.dataclass(frozen=True)
class Selected:
    """The adapter that was selected on validation pairs, which it was not trained on."""

    adapter: TokenAdapter
    training: Pairs
    validation: Pairs

    @functools.cached_property
    def training_counts(self) -> NGrams:
        return NGrams(remembered(self.training))


def choose_share(selected: Selected, parts: SimulationParts, name: str) -> float:
    """The memory's share in this hybrid with the best acceptance rate on the validation pairs."""
    drafter = Adapter(selected.adapter, selected.validation, online=name == "hybrid, online")
    alphas = {}
    for share in MEMORY_SHARES:
        memory = Memory(selected.training_counts, selected.validation, parts.streaming)
        alphas[share] = stream(Hybrid(drafter, memory, share), selected.validation)["alpha"]
    return max(alphas, key=alphas.__getitem__)


@torch.inference_mode()
def step_ms(adapter, pairs: Pairs) -> float:
    """Milliseconds of one cached proposal step at batch 1, eager, the median of 30."""
    device, times = next(adapter.parameters()).device, []
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    draft = torch.from_numpy(pairs.select([0]).padded("draft", adapter.config.max_seq_len)).to(device).long()
    _, cache = adapter.start(draft, torch.tensor([draft.shape[1]], device=device))
    for _ in range(min(40, adapter.config.max_seq_len - 1)):
        start = time.perf_counter()
        int(adapter.step(token, cache)[0, -1].argmax())
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[-30:]))


def compare(top1: np.ndarray, top5: np.ndarray, pairs: Pairs, commonest: np.ndarray | None) -> dict:
    """The adapter's hits (N, T) on these pairs, with both baselines over the same T positions."""
    width, lengths = top1.shape[1], pairs.lengths("target")
    copied, constant1, constant5 = (np.zeros(top1.shape, bool) for _ in range(3))
    for rows, part in zip(blocks(len(pairs)), pairs.parts(BLOCK)):
        target = part.padded("target", width)
        copied[rows] = direct_copy(part, width) == target
        if commonest is not None:
            right = commonest[:width] == target[:, :, None]
            constant1[rows], constant5[rows] = right[:, :, 0], right.any(-1)
    adapter, copied = measure(top1, lengths, top5), measure(copied, lengths)
    constant = None if commonest is None else measure(constant1, lengths, constant5)
    return {
        "pairs": len(pairs),
        "positions": int(lengths.sum()),
        "positions_past_max_seq_len": int(np.maximum(lengths - width, 0).sum()),
        "improvement": adapter["alpha"] - copied["alpha"],
        "adapter": adapter,
        "direct_copy": copied,
        "constant_string": constant,
    }


# ----------------------------------------------------------------------------------------- adapter on tensors
@dataclasses.dataclass(frozen=True, eq=False)
class TokenTensors:
    """N pairs on a device, as flat as Pairs holds them; a batch is padded when it is asked for.

    On a CPU the flat tokens are those of the pairs themselves. Answers are cut at max_seq_len.
    """

    flat: dict[str, torch.Tensor]    # {"draft", "target"}: all tokens of the files, int32
    start: dict[str, torch.Tensor]   # where each answer begins in them, (N,) int64
    draft_lengths: torch.Tensor      # (N,) int64, cut
    target_lengths: torch.Tensor     # (N,) int64, cut
    lengths: np.ndarray              # (N,) int64 target tokens, uncut
    width: int                       # of the longest target, cut
    draft_width: int                 # of the longest draft, cut; at least 1

    @classmethod
    def of(cls, pairs: Pairs, max_seq_len: int, device: torch.device) -> TokenTensors:
        flat, start, cut = {}, {}, {}
        for which in ("draft", "target"):
            tokens = getattr(pairs, which)
            tokens = tokens if len(tokens) else np.zeros(1, np.int32)     # so that there is something to point at
            flat[which] = torch.from_numpy(tokens).to(device)
            start[which] = torch.from_numpy(getattr(pairs, f"{which}_start")).to(device)
            cut[which] = torch.from_numpy(pairs.lengths(which)).clamp(max=max_seq_len)
        return cls(flat, start, cut["draft"].to(device), cut["target"].to(device), pairs.lengths("target"),
                   int(cut["target"].max()), max(int(cut["draft"].max()), 1))

    @property
    def device(self) -> torch.device:
        return self.draft_lengths.device

    def targets(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """(B, width) int64 tokens of these rows (B,) int64, NOT_SCORED past an answer's end."""
        return self._padded("target", self.target_lengths, rows, width, NOT_SCORED)

    def drafts(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """(B, width) int64, filled up with 0."""
        return self._padded("draft", self.draft_lengths, rows, width, 0)

    def _padded(self, which: str, lengths: torch.Tensor, rows: torch.Tensor, width: int, fill: int) -> torch.Tensor:
        at = torch.arange(width, device=self.device)
        inside = at < lengths[rows, None]
        at = (self.start[which][rows, None] + at).where(inside, 0)
        return self.flat[which][at].long().where(inside, fill)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator:
        """Yield (rows (B,) int64 on the device, width, positions) with targets of like length side by side.

        A batch is as wide as its own longest target. With a generator, equal lengths are mixed anew each time
        and the batches come in random order. Lengths are read on the host: the device is never waited for.
        """
        def shuffled(n: int) -> torch.Tensor:
            return torch.arange(n) if generator is None else torch.randperm(n, generator=generator)

        lengths = torch.from_numpy(self.lengths).clamp(max=self.width)
        order = shuffled(len(lengths))
        order = order[torch.argsort(lengths[order], stable=True)]
        lengths, order = lengths[order], order.to(self.device)
        for number in shuffled(-(-len(lengths) // batch_size)):
            batch = slice(int(number) * batch_size, (int(number) + 1) * batch_size)
            yield order[batch], int(lengths[batch][-1]), int(lengths[batch].sum())


def score(adapter, tokens: TokenTensors, rows: torch.Tensor, width: int, first: int,
          shown: torch.Tensor | None = None) -> tuple:
    """(logits (B, width - first, V), labels (B, width - first) int64); `first` is the adapter's position.

    Labels are columns of the logits, NOT_SCORED past the end and for ids that the adapter doesn't score.
    shown (B,) bool: the rows whose draft a prefix+draft adapter may see; None: no draft at all.
    """
    target = tokens.targets(rows, width)
    labels = adapter.labels_of(target[:, first:])
    if not adapter.config.sees_prefix:
        return adapter(tokens.drafts(rows, width - first)), labels
    prefix = target[:, :-1].clamp(min=0)                                  # past the end any id will do
    if shown is None:
        return adapter(tokens.drafts(rows, 0), None, prefix), labels
    return adapter(tokens.drafts(rows, tokens.draft_width), tokens.draft_lengths[rows] * shown, prefix), labels


@torch.inference_mode()
def predict(adapter, tokens: TokenTensors, batch_size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The adapter's hits by its own contract: top1, top5 (N, T) bool, and the loss in nats a token it scores.

    In float32 on every device, whatever it was trained in; on a GPU batches are as large as their logits allow.
    """
    adapter.eval()
    if tokens.device.type == "cuda":
        batch_size = max(batch_size, GPU_LOGITS // (tokens.width * adapter.config.outputs))
    first = adapter.config.first_position
    top1 = torch.zeros(len(tokens.lengths), tokens.width, dtype=torch.bool, device=tokens.device)
    top5 = top1.clone()
    loss = torch.zeros((), dtype=torch.float64, device=tokens.device)
    scored = torch.zeros((), dtype=torch.long, device=tokens.device)
    for rows, width, _ in tokens.batches(batch_size):
        if width <= first:
            continue
        shown = torch.ones_like(rows, dtype=torch.bool) if adapter.config.conditioning == "prefix+draft" else None
        logits, labels = score(adapter, tokens, rows, width, first, shown)
        best = logits.topk(min(TOP, logits.shape[-1])).indices == labels[:, :, None]
        top1[rows, first:width], top5[rows, first:width] = best[:, :, 0], best.any(-1)
        loss += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        scored += (labels != NOT_SCORED).sum()
    return top1.cpu().numpy(), top5.cpu().numpy(), float(loss) / max(int(scored), 1)
