"""Drafters: what proposes the target's next tokens, and what each of them learns from a verified answer.

By agreement every drafter has the same two verbs:

    predict(number) -> (T, TOP) int32     for answer `number` of the pairs it was made for: the best proposals at each
                                          position given the true tokens before it, NOTHING where there is none
    learn(number)                         the answer has been verified: use it for the next ones

Answers come in clip order, so a drafter that learns knows what this drive's clips were answered a moment ago and
nothing of later ones. For greedy verification these proposals decide everything: proposals after a wrong one are
thrown away, and up to there the proposed prefix is the true one. decoding.py has the same drafters live.
"""

import copy
import itertools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from base import UserError
from machine.files import check_plain, write_whole
from pairs.pairs import Pairs
from pairs.splits import clip_order
from token_adapter import NOT_SCORED, TokenAdapter

TOP = 5
KEPT = 24                      # of the adapter's distribution, what the hybrid mixes: the rest holds no winner
NOTHING = -1                   # where a drafter proposes nothing: equal to no id

# Chosen on the training drives of 1,100 real 1s pairs, leaving one drive out at a time (WORKFLOW.md, section 6).
MAX_ORDER = 12                 # tokens of context
TRAINING_WEIGHT = 0.05         # a training answer counts 1/20 of one verified in this stream
BACK_OFF = 0.3                 # share of the Witten-Bell weight that goes to shorter contexts
MEMORY_SHARES = (0.3, 0.5, 0.7)      # of the memory in the hybrid; the run's own validation chooses one
SURE = 0.7                           # chance from which the memory's word is taken without asking the adapter
MAX_REMEMBERED = 20_000              # training answers a memory begins with: 1,403 real ones take 38 MiB
MAX_MEMORY_BYTES = 2**31             # of an unpacked memory.npz: a million answers take 0.2 GB
MAX_KEPT = 20_000                    # answers whose proposals an adapter keeps for a hybrid: 10 KB each
ONLINE_STEPS, ONLINE_RATE = 8, 0.1   # plain gradient descent on each verified answer


def top_of(distribution: dict[int, float]) -> list[int]:
    best = sorted(distribution, key=distribution.get, reverse=True)[:TOP]
    return best + [NOTHING] * (TOP - len(best))


# -------------------------------------------------------------------------------------------- fixed proposals
def direct_copy(pairs: Pairs, width: int) -> np.ndarray:
    """(N, width) int32: the draft's own tokens as proposals; NOTHING past its end."""
    inside = np.arange(width) < pairs.lengths("draft")[:, None]
    return np.where(inside, pairs.padded("draft", width), NOTHING)


def commonest_tokens(training: Pairs, width: int) -> np.ndarray:
    """(width, TOP) int32: the commonest target tokens at each position, then NOTHING.

    Column 0 is the constant string: proposed for every clip alike, it shows how much of an alpha is template.
    """
    lengths = training.lengths("target")
    commonest = np.full((width, TOP), NOTHING, np.int32)
    for position in range(min(width, int(lengths.max()))):
        counts = np.bincount(training.target[training.target_start[lengths > position] + position])
        best = np.argsort(-counts, kind="stable")[:TOP]
        best = best[counts[best] > 0]
        commonest[position, :len(best)] = best
    return commonest


class Fixed:
    """Proposals that are known before the first answer: (N, T, TOP), or (T, TOP) alike for every clip."""

    def __init__(self, proposals: np.ndarray, pairs: Pairs):
        self.lengths = pairs.lengths("target")
        self.proposals = np.broadcast_to(proposals, (len(pairs), *proposals.shape[-2:]))

    def predict(self, number: int) -> np.ndarray:
        return self.proposals[number, :self.lengths[number]]

    def learn(self, number: int) -> None:
        pass


class Copy:
    """The draft's own tokens; NOTHING past its end."""

    def __init__(self, pairs: Pairs):
        self.pairs, self.lengths = pairs, pairs.lengths("target")

    def predict(self, number: int) -> np.ndarray:
        proposals = np.full((self.lengths[number], TOP), NOTHING, np.int32)
        draft = self.pairs.answer("draft", number)[:len(proposals)]
        proposals[:len(draft), 0] = draft
        return proposals

    def learn(self, number: int) -> None:
        pass


# ----------------------------------------------------------------------------------------------------- memory
def remembered(training: Pairs) -> Iterator[list[int]]:
    """The target answers that a memory begins with: all, or the last MAX_REMEMBERED as a stream brings them."""
    if len(training) > MAX_REMEMBERED:
        training = training.select(clip_order(training.sequence, training.clip)[-MAX_REMEMBERED:])
    return training.answers("target")


class NGrams:
    """Counts of what followed contexts of 1 to MAX_ORDER tokens, interpolated as Witten and Bell 1991."""

    BEGIN = -2                 # stands in front of every answer: a context like any other

    def __init__(self, training: Iterable[list[int]] = (), before: "NGrams | None" = None):
        """training: token lists of the training answers. before: counts to begin with, which are left as they are."""
        self.counts: dict[tuple[int, ...], dict[int, float]] = {}        # with `before`: of the contexts that changed
        self.before = before.counts if before else {}
        for answer in training:
            self.add(answer, TRAINING_WEIGHT)

    def add(self, answer: list[int], weight: float = 1.0) -> None:
        tokens = [self.BEGIN, *answer]
        for at in range(1, len(tokens)):
            for order in range(1, min(MAX_ORDER, at) + 1):
                context = tuple(tokens[at - order:at])
                following = self.counts.get(context)
                if following is None:
                    following = self.counts[context] = dict(self.before.get(context, ()))
                following[tokens[at]] = following.get(tokens[at], 0.0) + weight

    def distribution(self, prefix: list[int]) -> dict[int, float]:
        """Chance of each next token after BEGIN + prefix, from the longest contexts that were met."""
        tokens, chances = ([self.BEGIN, *prefix] if len(prefix) < MAX_ORDER else prefix[-MAX_ORDER:]), {}
        for order in range(1, len(tokens) + 1):
            context = tuple(tokens[len(tokens) - order:])
            following = self.counts.get(context) or self.before.get(context)
            if not following:
                break
            shorter = BACK_OFF * len(following)
            total = sum(following.values()) + shorter
            chances = {token: chance * shorter / total for token, chance in chances.items()}
            for token, count in following.items():
                chances[token] = chances.get(token, 0.0) + count / total
        return chances


def save_memory(answers: Iterable[list[int]], path: Path) -> None:
    """What a memory begins with when it decodes: target answers, as they came."""
    answers = list(answers)
    target = np.array([token for answer in answers for token in answer], np.int32)
    start = np.cumsum([0, *map(len, answers)])

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, target=target, target_start=start)

    write_whole(path, write)


def load_memory(path: Path) -> list[list[int]]:
    """The answers of save_memory, as token lists."""
    check_plain(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > MAX_MEMORY_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_MEMORY_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as found:
            flat, start = found["target"], found["target_start"]
        if (flat.dtype != np.int32 or start.dtype.kind != "i" or start.ndim != 1 or (np.diff(start) < 0).any()
                or flat.ndim != 1 or start[0] != 0 or start[-1] != len(flat) or flat.min(initial=0) < 0):
            raise ValueError("its arrays don't fit together")
    except Exception as error:      # a torn or hostile archive can raise nearly anything
        raise UserError(f"{path} is not the memory of a task: {error}; wanted a memory.npz of training or decoding, "
                        "or leave it out") from error
    return [flat[a:b].tolist() for a, b in itertools.pairwise(start)]


class Memory:
    """NGrams of the training answers and, with `streaming`, of each answer of these pairs once it is verified."""

    def __init__(self, training: NGrams, pairs: Pairs, streaming: bool = True):
        self.ngrams, self.pairs, self.streaming = NGrams(before=training), pairs, streaming

    def predict(self, number: int) -> np.ndarray:
        target = self.pairs.answer("target", number)
        return np.array([top_of(self.ngrams.distribution(target[:at])) for at in range(len(target))], np.int32)

    def learn(self, number: int) -> None:
        if self.streaming:
            self.ngrams.add(self.pairs.answer("target", number))


# ---------------------------------------------------------------------------------------------------- adapter
class Adapter:
    """The TokenAdapter. With online steps, each verified answer is also learnt by gradient descent on a copy.

    Dynamic evaluation (Krause et al. 2018): plain SGD follows a drive far better than Adam does here.
    """

    def __init__(self, adapter: TokenAdapter, pairs: Pairs, online: bool = False, shuffled: int | None = None,
                 batch_size: int = 64):
        self.adapter = copy.deepcopy(adapter).eval() if online else adapter.eval()
        self.online, self.device = online, next(adapter.parameters()).device
        self.pairs = self.drafts = pairs
        if shuffled is not None:                         # the control: another clip's draft
            self.drafts = pairs.select(np.random.default_rng(shuffled).permutation(len(pairs)))
        self.lengths = pairs.lengths("target")
        self.batch_size = batch_size
        self.seen: dict[int, tuple] = {}
        self.learnt: set[int] = set()

    def logits(self, rows: np.ndarray) -> torch.Tensor:
        """Teacher-forced pass over these answers: (B, T, V); output i is what the adapter proposes for target[i]."""
        longest, drafts = self.adapter.config.max_seq_len, self.drafts.select(rows)
        width = min(int(self.lengths[rows].max()), longest)
        if not self.adapter.config.sees_prefix:
            first = self.adapter.config.first_position
            logits = self.adapter(self._on_device(drafts.padded("draft", max(width - first, 1))))
            return F.pad(logits, (0, 0, first, 0))[:, :width]
        lengths = np.minimum(drafts.lengths("draft"), longest)
        return self.adapter(self._on_device(drafts.padded("draft", int(lengths.max()))), self._on_device(lengths),
                            self.targets(rows, width - 1))

    def targets(self, rows: np.ndarray, width: int) -> torch.Tensor:        # (B, width) int64, filled up with 0
        return self._on_device(self.pairs.select(rows).padded("target", width))

    def _on_device(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.device).long()

    @torch.no_grad()
    def _best(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = self.logits(rows)
        chances, columns = F.softmax(logits.float(), -1).topk(min(KEPT, logits.shape[-1]))
        ids = self.adapter.ids_of(columns)
        first = self.adapter.config.first_position
        ids[:, :first] = NOTHING
        return ids.int().cpu().numpy(), chances.cpu().numpy()

    def best(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(T, KEPT) ids and their chances, best first. Kept, so that a hybrid of the same adapter costs nothing.

        Of very many answers those of the last are kept; with online steps all, for they can't be reckoned again.
        """
        if number not in self.seen:
            rows = np.arange(number, number + 1 if self.online else min(number + self.batch_size, len(self.pairs)))
            ids, chances = self._best(rows)
            while len(self.seen) + len(rows) > MAX_KEPT and not self.online:
                del self.seen[next(iter(self.seen))]
            for k, length in enumerate(self.lengths[rows]):
                self.seen[number + k] = ids[k, :length].copy(), chances[k, :length].copy()
        return self.seen[number]

    def predict(self, number: int) -> np.ndarray:
        ids = self.best(number)[0][:, :TOP]
        proposals = np.full((self.lengths[number], TOP), NOTHING, np.int32)     # NOTHING past --max_seq_len
        proposals[:len(ids), :ids.shape[1]] = ids
        return proposals

    def learn(self, number: int) -> None:
        if not self.online or number in self.learnt:
            return
        self.learnt.add(number)
        rows, width = np.array([number]), min(int(self.lengths[number]), self.adapter.config.max_seq_len)
        parameters = list(self.adapter.parameters())
        label = self.adapter.labels_of(self.targets(rows, width))
        for _ in range(ONLINE_STEPS):
            losses = F.cross_entropy(self.logits(rows)[0], label[0], reduction="sum")
            loss = losses / (label[0] != NOT_SCORED).sum().clamp(min=1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter -= ONLINE_RATE * parameter.grad
                        parameter.grad = None


def mixed(ids: list[int], chances: list[float], remembered: dict[int, float], share: float) -> dict[int, float]:
    """chance = (1 - share) x adapter + share x memory."""
    mixture = dict(zip(ids, ((1 - share) * chance for chance in chances)))
    for token, chance in remembered.items():
        mixture[token] = mixture.get(token, 0.0) + share * chance
    return mixture


class Hybrid:
    """Adapter and memory mixed, where the memory isn't SURE."""

    def __init__(self, adapter: Adapter, memory: Memory, share: float):
        self.adapter, self.memory, self.share = adapter, memory, share

    def predict(self, number: int) -> np.ndarray:
        target = self.memory.pairs.answer("target", number)
        ids, chances = (kept.tolist() for kept in self.adapter.best(number))
        proposals = np.full((len(target), TOP), NOTHING, np.int32)
        for at in range(len(target)):
            found = self.memory.ngrams.distribution(target[:at])
            if at < len(ids) and max(found.values(), default=0) < SURE:
                found = mixed(ids[at], chances[at], found, self.share)
            proposals[at] = top_of(found)
        return proposals

    def learn(self, number: int) -> None:
        self.adapter.learn(number)
        self.memory.learn(number)
