"""How often proposals are right: one definition of every metric, and the baselines that stand beside them.

Every target position counts, position 0 too. One for which nothing is proposed (past the draft's end in plain
copying, past --max_seq_len for anything, before a checkpoint's first position) is a miss and never left out.

The expected tokens for each target pass follow Leviathan et al. 2023, "Fast Inference from Transformers via
Speculative Decoding", equation 1. It takes positions for independent; those of answers by template are not.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

import drafting
from base import Pairs, drive_of, log
from token_adapter import NOT_SCORED

GAMMAS = range(1, 11)
SIMULATED_GAMMAS = (1, 2, 3, 5, 8, 12)
PASSES_SHOWN = (5, 10, 15, 20, 30)
GPU_LOGITS = 2**28             # at a time, 1 GiB: small batches on a GPU are launching and little else
MIN_SEQUENCES, BLOCK, BOOTSTRAPS = 8, 20, 2000


# ---------------------------------------------------------------------------------------------------- metrics
def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens for each target pass when each of gamma proposals is right with chance alpha, independently."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def measure(top1: np.ndarray, lengths: np.ndarray, top5: np.ndarray | None = None) -> dict:
    """All metrics of one drafter on N answers.

    top1, top5: (N, T) bool, proposal right at that position; past an answer's end they are not looked at.
    lengths: (N,) tokens in each target, uncut: those past T count as misses. One of them reaches T.
    """
    width = top1.shape[1]
    inside = np.arange(width) < lengths[:, None]
    positions, count = int(lengths.sum()), inside.sum(0)
    top1 = top1 & inside
    top5 = None if top5 is None else top5 & inside
    run = np.where(top1.all(1), width, top1.argmin(1))
    alpha = float(top1.sum() / positions)
    return {
        "alpha": alpha,
        "top5": None if top5 is None else float(top5.sum() / positions),
        "first_token": float(top1[:, 0].mean()),
        "mean_run": float(run.mean()),
        "expected_tokens": {str(gamma): expected_tokens(alpha, gamma) for gamma in GAMMAS},
        "per_position": {
            "count": count.tolist(),
            "alpha": (top1.sum(0) / count).tolist(),
            "top5": None if top5 is None else (top5.sum(0) / count).tolist(),
        },
    }


# ------------------------------------------------------------------------------------------ simulated decoding
def simulate(top1: np.ndarray, lengths: np.ndarray, gamma: int) -> dict:
    """Greedy speculative decoding of N answers with gamma proposals a pass, told by the hits alone.

    top1 (N, T) bool: the proposal for that position, given the true tokens before it, is right. That is all that
    decides: after a wrong proposal the rest of a round is thrown away. The prefill is a pass too, with the opening
    proposals verified inside it; each pass emits its accepted proposals and one token of the target's own, unless
    the answer ends before that. All answers advance together.
    """
    inside = np.arange(top1.shape[1]) < lengths[:, None]
    right = np.pad(top1 & inside, ((0, 0), (0, 1)))
    run = np.zeros(right.shape, np.int64)                     # right proposals in a row from each position on
    for at in range(top1.shape[1] - 1, -1, -1):
        run[:, at] = np.where(right[:, at], run[:, at + 1] + 1, 0)
    rows, at = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    passes, histogram = np.zeros(len(lengths), np.int64), np.zeros(gamma + 1, np.int64)
    while (going := at < lengths).any():
        # Past the width that was proposed for, nothing is accepted and each pass emits one token.
        accepted = np.where(going, np.minimum(run[rows, np.minimum(at, top1.shape[1])], gamma), 0)
        histogram += np.bincount(accepted[going], minlength=gamma + 1)
        at, passes = np.where(going, at + accepted + 1, at), passes + going
    return {"tau": float(lengths.sum() / passes.sum()), "tau_mean": float((lengths / passes).mean()),
            "accepted_lengths": histogram.tolist(), "passes": passes}


def interval(top1: np.ndarray, lengths: np.ndarray, sequences: list[str], other: np.ndarray | None = None) -> dict:
    """95 % interval of alpha, or of its difference to another drafter's on the same answers (paired bootstrap).

    Resampled are whole sequences; with fewer than eight of them, blocks of 20 neighbouring clips. "left_out" are
    the lowest and the highest value when any one drive is left out, None with a single drive.
    """
    inside = np.arange(top1.shape[1]) < lengths[:, None]
    hits = (top1 & inside).sum(1) - (0 if other is None else (other & inside).sum(1))
    drives, drive = np.unique([drive_of(name) for name in sequences], return_inverse=True)
    rest = [hits[drive != one].sum() / lengths[drive != one].sum() for one in range(len(drives)) if len(drives) > 1]
    names, group = np.unique(sequences, return_inverse=True)
    unit = "sequences"
    if len(names) < MIN_SEQUENCES:
        group, unit = np.arange(len(lengths)) // BLOCK, f"blocks of {BLOCK} clips"
    hits, positions = np.bincount(group, hits), np.bincount(group, lengths)
    drawn = np.random.default_rng(0).integers(len(hits), size=(BOOTSTRAPS, len(hits)))
    low, high = np.quantile(hits[drawn].sum(1) / positions[drawn].sum(1), (0.025, 0.975))
    return {"value": float(hits.sum() / positions.sum()), "low": float(low), "high": float(high), "by": unit,
            "left_out": [float(min(rest)), float(max(rest))] if rest else None}


def by_drive(top1: np.ndarray, lengths: np.ndarray, sequences: list[str]) -> dict:
    """alpha of each drive alone, and of all the others together when it is left out."""
    hits = (top1 & (np.arange(top1.shape[1]) < lengths[:, None])).sum(1)
    drives = np.array([drive_of(name) for name in sequences])
    found = {}
    for drive in sorted(set(drives)):
        ours = drives == drive
        rest = float(hits[~ours].sum() / lengths[~ours].sum()) if not ours.all() else None
        found[drive] = {"clips": int(ours.sum()), "alpha": float(hits[ours].sum() / lengths[ours].sum()),
                        "without_it": rest}
    return found


def stream(drafter, pairs: Pairs) -> dict:
    """Let a drafter propose for every answer in order and learn each one afterwards; everything measured of it."""
    lengths = pairs.lengths("target")
    top1 = np.zeros((len(pairs), int(lengths.max())), bool)
    top5, start = top1.copy(), time.monotonic()
    for number, target in enumerate(pairs.answers("target")):
        right = drafter.predict(number) == np.array(target, np.int32)[:, None]
        top1[number, :len(target)], top5[number, :len(target)] = right[:, 0], right.any(1)
        drafter.learn(number)
    seconds = time.monotonic() - start
    simulated = {}
    for gamma in SIMULATED_GAMMAS:
        found = simulate(top1, lengths, gamma)
        passes = found.pop("passes")
        found["more_passes_than"] = {str(n): float((passes > n).mean()) for n in PASSES_SHOWN}
        simulated[str(gamma)] = found
    found = measure(top1, lengths, top5)
    return {"top1": top1, **found, "simulated": simulated,
            "expected_by_gamma": {str(gamma): expected_tokens(found["alpha"], gamma) for gamma in SIMULATED_GAMMAS},
            "interval": interval(top1, lengths, pairs.sequence),
            "drives": by_drive(top1, lengths, pairs.sequence), "seconds_per_answer": seconds / len(pairs)}


def measure_drafters(adapter, test: Pairs, known: Pairs | None, prefix, selected: tuple | None, streaming: bool,
                     online: bool, seed: int) -> dict:
    """Every drafter streams over the test answers in clip order: {"drafters": {name: ...}, "adapter_minus": ...}.

    adapter: on its device, as are the others. known: the pairs that it was trained on; prefix: the ablation without
    drafts; selected: (adapter, its training pairs, validation pairs) to choose the hybrid's share on. None of the
    three for a checkpoint. streaming: drafters may learn from verified answers; online: by gradient steps too.
    """
    found, hits, lengths = {}, {}, test.lengths("target")
    width, parameters = int(lengths.max()), adapter.num_parameters()
    sees_prefix = adapter.config.sees_prefix

    def run(name: str, drafter, parameters: int = 0) -> None:
        start = time.monotonic()
        found[name] = {**stream(drafter, test), "parameters": parameters}
        hits[name] = found[name].pop("top1")
        log(f"drafters | {name} | accepted {found[name]['alpha']:.1%} | tau "
            f"{found[name]['simulated']['8']['tau']:.2f} at gamma 8 | {time.monotonic() - start:.1f} s")

    copied = np.full((len(test), width, drafting.TOP), drafting.NOTHING, np.int32)
    copied[:, :, 0] = drafting.direct_copy(test, width)
    run("copy of the draft", drafting.Fixed(copied, test))
    if known:
        run("constant string", drafting.Fixed(drafting.commonest_tokens(known, width), test))
        run("n-gram", drafting.Memory(known, test, streaming=False))
        run("memory", drafting.Memory(known, test, streaming))
    if prefix is not None and adapter.config.conditioning == "prefix+draft":
        run("prefix", drafting.Adapter(prefix, test), parameters)
        run("adapter, drafts shuffled", drafting.Adapter(adapter, test, shuffled=seed), parameters)
    kinds = {"hybrid": drafting.Adapter(adapter, test)}
    run("adapter", kinds["hybrid"], parameters)
    if online and sees_prefix:
        kinds["hybrid, online"] = drafting.Adapter(adapter, test, online=True)
        run("adapter, online", kinds["hybrid, online"], parameters)
    shares = {}
    if selected and sees_prefix:
        for name, drafter in kinds.items():
            shares[name] = choose_share(*selected, drafter.online, streaming)
            run(name, drafting.Hybrid(drafter, drafting.Memory(known, test, streaming), shares[name]), parameters)
    return {"drafters": found, "memory_share": shares, "stream": streaming,
            "adapter_minus": {name: interval(hits["adapter"], lengths, test.sequence, hits[name])
                              for name in ("copy of the draft", "n-gram", "prefix", "adapter, drafts shuffled")
                              if name in hits},
            "step_ms": step_ms(adapter, test) if sees_prefix else None}


def choose_share(adapter, training: Pairs, validation: Pairs, online: bool, streaming: bool) -> float:
    """The memory's share in the hybrid that is best on validation pairs, which the adapter was not trained on."""
    drafter = drafting.Adapter(adapter, validation, online)
    alphas = {share: stream(drafting.Hybrid(drafter, drafting.Memory(training, validation, streaming), share),
                            validation)["alpha"] for share in drafting.MEMORY_SHARES}
    return max(alphas, key=alphas.get)


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
    target = pairs.padded("target", width)
    adapter = measure(top1, lengths, top5)
    copied = measure(drafting.direct_copy(pairs, width) == target, lengths)
    constant = None
    if commonest is not None:
        right = commonest[:width] == target[:, :, None]
        constant = measure(right[:, :, 0], lengths, right.any(-1))
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
@dataclasses.dataclass(frozen=True)
class TokenTensors:
    """N pairs on a device, made once; T is the longest target, Td the longest draft, at most max_seq_len each."""

    draft: torch.Tensor              # (N, max(T, Td)) int32, filled up with 0
    draft_lengths: torch.Tensor      # (N,) int64
    target: torch.Tensor             # (N, T) int32, NOT_SCORED after its end
    lengths: np.ndarray              # (N,) int64 target tokens, uncut

    @classmethod
    def of(cls, pairs: Pairs, max_seq_len: int, device: torch.device) -> "TokenTensors":
        lengths, draft_lengths = pairs.lengths("target"), np.minimum(pairs.lengths("draft"), max_seq_len)
        width = min(max_seq_len, int(lengths.max()))
        target = np.where(np.arange(width) < lengths[:, None], pairs.padded("target", width), NOT_SCORED)
        draft = pairs.padded("draft", max(width, int(draft_lengths.max())))
        return cls(torch.from_numpy(draft).to(device), torch.from_numpy(draft_lengths).to(device),
                   torch.from_numpy(target).to(device), lengths)

    device = property(lambda self: self.target.device)
    width = property(lambda self: self.target.shape[1])
    draft_width = functools.cached_property(lambda self: int(self.draft_lengths.max()))

    def targets(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        return self.target[rows, :width].long()

    def drafts(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        return self.draft[rows, :width].long()

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator:
        """Yield (rows (B,) int64 on the device, width, positions) with targets of like length side by side.

        A batch is as wide as its own longest target. With a generator, equal lengths are mixed anew each time
        and the batches come in random order. Lengths are read on the host: the device is never waited for.
        """
        def shuffled(n: int) -> torch.Tensor:
            return torch.arange(n) if generator is None else torch.randperm(n, generator=generator)

        lengths = torch.from_numpy(self.lengths).clamp(max=self.target.shape[1])
        order = shuffled(len(lengths))
        order = order[torch.argsort(lengths[order], stable=True)]
        chunks, rows = lengths[order].split(batch_size), order.to(self.draft.device).split(batch_size)
        for number in shuffled(len(chunks)).tolist():
            yield rows[number], int(chunks[number][-1]), int(chunks[number].sum())


def score(adapter, tokens: TokenTensors, rows: torch.Tensor, width: int, first: int,
          shown: torch.Tensor | None = None) -> tuple:
    """(logits (B, width - first, V), labels (B, width - first) int64); `first` is the adapter's position.

    Labels are columns of the logits, NOT_SCORED past the end and for ids that the adapter doesn't score.
    shown (B,) bool: the rows whose draft a prefix+draft adapter may see; None: no draft at all.
    """
    labels = adapter.labels_of(tokens.target[rows, first:width].long())
    if not adapter.config.sees_prefix:
        return adapter(tokens.draft[rows, :width - first].long()), labels
    prefix = tokens.target[rows, :width - 1].long().clamp(min=0)          # past the end any id will do
    if shown is None:
        return adapter(tokens.draft[rows, :0].long(), None, prefix), labels
    return adapter(tokens.draft[rows].long(), tokens.draft_lengths[rows] * shown, prefix), labels


@torch.inference_mode()
def predict(adapter, tokens: TokenTensors, batch_size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The adapter's hits by its own contract: top1, top5 (N, T) bool, and the loss in nats a token it scores.

    In float32 on every device, whatever it was trained in; on a GPU batches are as large as their logits allow.
    """
    adapter.eval()
    if tokens.device.type == "cuda":
        batch_size = max(batch_size, GPU_LOGITS // (tokens.width * adapter.config.outputs))
    first = adapter.config.first_position
    top1 = torch.zeros_like(tokens.target, dtype=torch.bool)
    top5 = top1.clone()
    loss = torch.zeros((), dtype=torch.float64, device=tokens.target.device)
    scored = torch.zeros((), dtype=torch.long, device=tokens.target.device)
    for rows, width, _ in tokens.batches(batch_size):
        if width <= first:
            continue
        shown = torch.ones_like(rows, dtype=torch.bool) if adapter.config.conditioning == "prefix+draft" else None
        logits, labels = score(adapter, tokens, rows, width, first, shown)
        best = logits.topk(min(drafting.TOP, logits.shape[-1])).indices == labels[:, :, None]
        top1[rows, first:width], top5[rows, first:width] = best[:, :, 0], best.any(-1)
        loss += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        scored += (labels != NOT_SCORED).sum()
    return top1.cpu().numpy(), top5.cpu().numpy(), float(loss) / max(int(scored), 1)
