"""The TokenAdapter as a drafter, over known answers and live; in draft conditioning and in prefix
conditionings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from drafting.baselines import LiveCopy
from drafting.branches import LOOK_AHEAD, NOTHING_TO_SAY, Branch, BranchSteps, Row
from drafting.contract import NOTHING, TOP, Costs, NoDrafts, Timer, seconds_per_token
from drafting.parts import LiveParts, SimulationParts
from drafting.steps import TOP_K, AdapterSteps, for_proposing, on_host
from drafting.tree import MAX_CHILDREN, Sources, Tree, Upcoming, none_upcoming
from machine.graphs import capture
from pairs.pairs import Pairs
from token_adapter import NOT_SCORED, TokenAdapter

MAX_LOGITS = {"cpu": 2**23, "cuda": 2**28}  # held at a time: 262 or 8,388 positions of 32,000 ids
MAX_STORED = 20_000  # answers whose proposals an adapter stores for a hybrid: 10 KB each
ONLINE_STEPS, ONLINE_RATE = 8, 0.1   # plain gradient descent on each verified answer


class Adapter:
    """Simulated. With online steps, a copy of the adapter also learns each verified answer by
    gradient descent.

    Dynamic evaluation (Krause et al. 2018): plain SGD follows a drive far better than Adam does
    here.
    """

    def __init__(self, adapter: TokenAdapter, pairs: Pairs, online: bool = False,
                 shuffled: int | None = None, batch_size: int = 64):
        """shuffled: the seed of the control, in which every answer gets another clip's draft."""
        self.adapter = copy.deepcopy(adapter).eval() if online else adapter.eval()
        self.online, self.device = online, next(adapter.parameters()).device
        self.pairs = self.drafts = pairs
        if shuffled is not None:
            self.drafts = pairs.select(np.random.default_rng(shuffled).permutation(len(pairs)))
        self.lengths = pairs.lengths("target")
        self.batch_size = batch_size
        self.stored: dict[int, tuple] = {}           # answer number -> its (ids, probabilities)
        self.learned: set[int] = set()

    def hidden(self, rows: np.ndarray) -> torch.Tensor:
        """Teacher-forced pass over these answers: x (B, T, D) before the output layer; output i
        proposes target i + first_position."""
        longest, drafts = self.adapter.config.max_seq_len, self.drafts.select(rows)
        width = min(int(self.lengths[rows].max()), longest)
        if not self.adapter.config.sees_prefix:
            width = max(width - self.adapter.config.first_position, 1)
            return self.adapter.hidden(self._on_device(drafts.padded("draft", width)))
        lengths = np.minimum(drafts.lengths("draft"), longest)
        return self.adapter.hidden(self._on_device(drafts.padded("draft", int(lengths.max()))),
                                   self._on_device(lengths), self.targets(rows, width - 1))

    # (B, width) int64, filled up with 0
    def targets(self, rows: np.ndarray, width: int) -> torch.Tensor:
        return self._on_device(self.pairs.select(rows).padded("target", width))

    def _on_device(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.device).long()

    @torch.no_grad()
    def _best(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T, TOP_K) ids and probabilities, best first; NOTHING and 0 where the logits are no
        numbers.
        """
        x = self.hidden(rows)
        parts = [F.softmax(logits, -1).topk(min(TOP_K, logits.shape[-1]))
                 for logits in logit_chunks(self.adapter, x)]
        probabilities, columns = (torch.cat(part).view(*x.shape[:2], -1) for part in zip(*parts))
        numbers = probabilities.isfinite()
        ids = self.adapter.ids_of(columns).where(numbers, NOTHING)
        before = self.adapter.config.first_position
        ids = F.pad(ids, (0, 0, before, 0), value=NOTHING)
        probabilities = F.pad(probabilities.where(numbers, 0.0), (0, 0, before, 0))
        return ids.int().cpu().numpy(), probabilities.cpu().numpy()

    def best(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(T, TOP_K) ids and their probabilities, best first; T is at most max_seq_len.

        Stored, so that a hybrid of the same adapter costs nothing: those of the last MAX_STORED
        answers, with online steps of all, since they can't be computed again.
        """
        if number not in self.stored:
            count = 1 if self.online else min(self.batch_size, len(self.pairs) - number)
            rows = np.arange(number, number + count)
            ids, probabilities = self._best(rows)
            while len(self.stored) + len(rows) > MAX_STORED and not self.online:
                del self.stored[next(iter(self.stored))]
            for k, length in enumerate(self.lengths[rows]):
                self.stored[number + k] = ids[k, :length].copy(), probabilities[k, :length].copy()
        return self.stored[number]

    def predict(self, number: int) -> np.ndarray:
        ids = self.best(number)[0][:, :TOP]
        # NOTHING past max_seq_len
        proposals = np.full((self.lengths[number], TOP), NOTHING, np.int32)
        proposals[:len(ids), :ids.shape[1]] = ids
        return proposals

    def learn(self, number: int) -> None:
        if not self.online or number in self.learned:
            return
        self.learned.add(number)
        rows = np.array([number])
        width = min(int(self.lengths[number]), self.adapter.config.max_seq_len)
        parameters = list(self.adapter.parameters())
        label = self.adapter.labels_of(self.targets(rows, width))
        for _ in range(ONLINE_STEPS):
            norm, weight, bias = self.adapter.output()
            logits = F.linear(norm(self.hidden(rows)[0]), weight, bias)
            losses = F.cross_entropy(logits, label[0], reduction="sum")
            loss = losses / (label[0] != NOT_SCORED).sum().clamp(min=1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter -= ONLINE_RATE * parameter.grad
                        parameter.grad = None


def logit_chunks(adapter: TokenAdapter, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the logits (n, V) float32 of all positions of x (B, T, D) in order, at most MAX_LOGITS
    at a time.

    All logits of 64 answers of 128 tokens over 262,144 ids would take 8 GiB.
    """
    norm, weight, bias = adapter.output()
    size = max(1, MAX_LOGITS.get(x.device.type, MAX_LOGITS["cpu"]) // len(weight))
    for part in x.flatten(0, 1).split(size):
        yield F.linear(norm(part), weight, bias).float()


class LiveAdapter(NoDrafts):
    """Live, prefix conditionings: the adapter's own best tokens, chained on the device with one
    wait a proposal; or a tree of its best tokens.

    A tree waits for the device at each step: on an H100 it brought 6.3 tokens a pass instead of 5.0,
    for three times the time.
    """

    prefers_chains = True

    def __init__(self, adapter: TokenAdapter):
        self.steps = AdapterSteps(adapter, top_k=MAX_CHILDREN)
        self.branches = BranchSteps(self.steps)
        self.chains: dict[int, list[Row]] = {}       # tokens of the prefix -> rows of its chain

    def begin(self, draft: list[int], question: Sequence[int] = ()) -> None:
        self.steps.begin(draft)
        self.chains = {}

    def propose(self, prefix: list[int], gamma: int, price: float = 0.0) -> list[int]:
        gamma = min(gamma, self.steps.config.max_seq_len - len(prefix))
        if gamma < 1 or not self.steps.can_follow(prefix):
            return []
        proposed, reached = [], 1.0
        rows = self.chains[len(prefix)] = self.steps.after(prefix, gamma - 1)
        for ids, probabilities in rows:
            reached *= probabilities[0] if ids else 0.0
            if not ids or reached < self.costs.token_s * price:
                break
            proposed.append(ids[0])
        return proposed

    def place_after(self, prefix: list[int]) -> Branch:
        return self.branches.open(prefix)

    def next_place(self, place: Branch, token: int) -> Branch:
        return self.branches.below(place, token)

    def choices(self, place: Branch, reached: float, price: float,
                upcoming: Upcoming = none_upcoming) -> list[tuple[float, int]]:
        if place.row is None and place.can_follow:
            others = [other for other, _ in upcoming(LOOK_AHEAD) if other.row is None and other.can_follow]
            self.branches.read([place, *others])
        ids, probabilities = place.row or NOTHING_TO_SAY
        return list(zip(probabilities, ids))

    def sources(self, prefix: list[int], proposed: Tree) -> Sources:
        rows = [place.row for place in proposed.before] or self.chains.get(len(prefix), [])
        return {"adapter": [chance(row, token) for row, token in zip(rows, proposed.tokens)]}

    def measure(self, draft: list[int], question: Sequence[int], answer: list[int], timer: Timer,
                verify_s: float = 0.0) -> Costs:
        step_s = self.steps.measure_step(draft, answer, timer)
        proposal_s = seconds_per_token(self, draft, question, answer, timer)
        self.costs = Costs(proposal_s, proposal_s + verify_s, step_s, proposal_s + verify_s)
        return self.costs


def chance(row: Row | None, token: int) -> float | None:
    """The probability of a token in a row of the adapter, None where it is not among the listed."""
    return dict(zip(*row)).get(token) if row else None


class LiveDraftAdapter(LiveCopy):
    """Live, draft conditioning: one pass over the draft proposes a token for every position of the
    answer.
    """

    def __init__(self, adapter: TokenAdapter):
        super().__init__()
        self.adapter, self.graph = for_proposing(adapter), None
        width = adapter.config.max_seq_len - adapter.config.first_position
        self.draft = torch.zeros(1, width, dtype=torch.long, device=adapter.embedding.weight.device)
        self.best = self.draft[0].clone()
        if self.draft.is_cuda:
            with torch.cuda.device(self.draft.device):
                self.graph, _ = capture(self._forward)

    @torch.inference_mode()
    def begin(self, draft: list[int], question: Sequence[int] = ()) -> None:
        width, config = self.draft.shape[1], self.adapter.config
        ids = config.draft_embeddings or config.vocab_size
        known = [token if 0 <= token < ids else 0 for token in draft]
        self.draft[0].copy_(on_host([*known, *[0] * width][:width], self.draft), non_blocking=True)
        if self.graph:
            self.graph.replay()
        else:
            self._forward()
        self.table = [NOTHING] * config.first_position + self.best.tolist()

    def sources(self, prefix: list[int], proposed: Tree) -> Sources:
        return {"adapter": [True] * len(proposed.tokens)}

    def _forward(self) -> None:
        top, columns = self.adapter(self.draft)[0].max(-1)
        best = self.adapter.ids_of(columns)
        self.best.copy_(best.where(top.isfinite(), NOTHING))


# ---------------------------------------------------------------------------------------- factories
def adapter_passes(parts: SimulationParts, online: bool = False) -> Adapter:
    """The simulated adapter: its passes over the answers are computed once, for the hybrid too."""
    return parts.once(f"adapter, online={online}",
                      lambda: Adapter(parts.adapter, parts.pairs, online))


def simulated_adapter(parts: SimulationParts) -> Adapter:
    return adapter_passes(parts)


def simulated_prefix(parts: SimulationParts) -> Adapter | None:
    if parts.prefix_adapter is None or not _has_ablation(parts):
        return None
    return Adapter(parts.prefix_adapter, parts.pairs)


def simulated_shuffled(parts: SimulationParts) -> Adapter | None:
    if not _has_ablation(parts):
        return None
    return Adapter(parts.adapter, parts.pairs, shuffled=parts.seed)


def simulated_online(parts: SimulationParts) -> Adapter | None:
    if not parts.online or not parts.adapter.config.sees_prefix:
        return None
    return adapter_passes(parts, online=True)


def _has_ablation(parts: SimulationParts) -> bool:
    """Whether there is an adapter without drafts to compare with."""
    return parts.prefix_adapter is not None and parts.adapter.config.conditioning == "prefix+draft"


def live_adapter(parts: LiveParts) -> LiveAdapter | LiveDraftAdapter:
    assert parts.adapter is not None
    kind = LiveAdapter if parts.adapter.config.sees_prefix else LiveDraftAdapter
    return kind(parts.adapter)
