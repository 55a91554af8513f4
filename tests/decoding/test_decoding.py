"""Speculative decoding says exactly what plain decoding says, and as fast as simulation foretells.
"""

import collections
import dataclasses

import numpy as np
import pytest
import torch

from acceptance.simulation import stream
from base import UserError
from decoding.limits import Limits
from decoding.loop import Decoded, decode
from decoding.rules import Sampling
from drafting.adapter import Adapter, LiveAdapter, LiveDraftAdapter
from drafting.baselines import Copy, LiveCopy, LiveLookup
from drafting.contract import Costs, NoDrafts, matching
from drafting.hybrid import Hybrid, LiveHybrid
from drafting.memory import LiveMemory, Memory, load_memory, save_memory
from drafting.ngrams import NGrams
from drafting.steps import AdapterSteps
from drafting.tree import Tree
from pairs.pairs import Pairs
from tests.conftest import flat
from tests.drafting.builders import counts_of
from token_adapter import AdapterConfig, TokenAdapter

VOCABULARY, EOS = 23, 2


@dataclasses.dataclass
class Following:
    best: torch.Tensor
    logits: torch.Tensor | None = None


class Automaton:
    """A target whose next token hangs on its last three, enough to notice a wrong rollback.
    Prompts: token lists.
    """

    vocab_size = VOCABULARY

    def __init__(self, seed: int = 0, eos_every: int = 0):
        self.logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (VOCABULARY,) * 4))
        self.logits[..., EOS] = 9.0 if eos_every == 1 else -9.0
        if eos_every > 1:
            self.logits[::eos_every, :, :, EOS] = 9.0
        self.fed: list[int] = []

    def ask(self, prompt: list[int]) -> None:
        self.prompt, self.fed = prompt, []

    def _after(self, tokens: list[int], count: int) -> Following:
        rows = [
            self.logits[tuple(tokens[at - 3:at])]
            for at in range(len(tokens) - count + 1,
                            len(tokens) + 1)
        ]
        return Following(torch.stack(rows).argmax(-1), torch.stack(rows))

    def prefill(self, proposed: list[int]) -> Following:
        self.fed = [*self.prompt, *proposed]
        return self._after(self.fed, len(proposed) + 1)

    def verify(self, tokens: list[int]) -> Following:
        self.fed = [*self.fed, *tokens]
        return self._after(self.fed, len(tokens))

    def keep(self, tokens: int) -> None:
        assert 0 <= tokens <= len(self.fed) - len(self.prompt)
        self.fed = self.fed[:len(self.prompt) + tokens]

    def plain(self, prompt: list[int], length: int) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + length and tokens[len(prompt):][-1:] != [EOS]:
            tokens.append(int(self.logits[tuple(tokens[-3:])].argmax()))
        return tokens[len(prompt):]


class Knowing(NoDrafts):
    """Proposes the true answer, wrong wherever `wrong(position)` says so, and on past its end."""

    def __init__(self, answer: list[int], wrong):
        self.answer, self.wrong = answer, wrong

    def propose(self, prefix, gamma, price=0.0):
        truth = [*self.answer, *[5] * 40][len(prefix):len(prefix) + gamma]
        return [(token + 1) % VOCABULARY if self.wrong(len(prefix) + k) else token
                for k, token in enumerate(truth)]


PROMPTS = ([1, 7, 9], [3, 3, 4], [20, 11, 8])
QUALITY = {
    "never": lambda at: True, "always": lambda at: False, "sometimes": lambda at: at % 4 == 3,
    "odd": lambda at: at * at % 7 in (2, 3)
}


# ----------------------------------------------------------------------------------------- lossless
@pytest.mark.parametrize("quality", QUALITY)
@pytest.mark.parametrize("gamma", [1, 2, 3, 5, 8, 12])
def test_whatever_is_proposed_the_answer_is_that_of_plain_decoding(quality, gamma):
    # 1: the first token ends the answer; 2, 5: EOS inside a draft
    for eos_every in (0, 1, 2, 5):
        target = Automaton(eos_every, eos_every)
        for prompt in PROMPTS:
            for length in (1, 2, 7, 30):              # the limit falls inside a draft
                plain = target.plain(prompt, length)
                target.ask(prompt)
                decoded = decode(target, Knowing(plain, QUALITY[quality]),
                               Limits(length, (EOS, ), gamma))
                assert decoded.tokens == plain
                assert sum(decoded.accepted) <= sum(decoded.proposed) and len(
                    decoded.accepted) <= len(plain)
                if quality == "always":
                    assert len(decoded.accepted) == -(-len(plain) // (gamma + 1))
                if quality == "never":
                    assert len(decoded.accepted) == len(plain) and not any(decoded.accepted)


def test_ids_that_the_target_does_not_have_are_never_fed_to_it():
    target = Automaton()
    for strange in (VOCABULARY, -1, 10**6):
        plain = target.plain(PROMPTS[0], 12)
        drafter = NoDrafts()
        drafter.propose = lambda prefix, gamma, _, odd=strange, plain=plain: [
            plain[len(prefix)], odd, 3
        ][:gamma]
        target.ask(PROMPTS[0])
        decoded = decode(target, drafter, Limits(12, (EOS,), 5))
        assert decoded.tokens == plain and max(decoded.proposed) == 1


def test_every_verified_answer_is_learnt_once_and_whole():
    target, learnt = Automaton(5, 5), []
    for prompt in PROMPTS:
        drafter = NoDrafts()
        drafter.learn = learnt.append
        target.ask(prompt)
        decoded = decode(target, drafter, Limits(9, (EOS,), 4))
        assert learnt[-1] == decoded.tokens
    assert len(learnt) == len(PROMPTS)


def test_a_drafter_is_asked_for_what_still_fits_and_told_what_is_worth_it():
    requests = []

    class Asked(NoDrafts):
        def propose(self, prefix, gamma, price=0.0):
            requests.append((len(prefix), gamma, price))
            return []

    target = Automaton()
    target.ask(PROMPTS[0])
    decode(target, Asked(), Limits(6, (EOS,), 3), price=lambda: 0.25)
    assert requests == [(0, 3, 0.25), (1, 3, 0.25), (2, 3, 0.25), (3, 2, 0.25), (4, 1, 0.25)]


# -------------------------------------------------------------------------------------- temperature
def test_sampling_gives_the_targets_own_distribution_whatever_is_proposed():
    """Pairs of tokens drawn with proposals against their exact chances: chi-square over many seeds.
    """
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, 1.5, 5), rng.normal(0, 1.5, (5, 5))
    temperature, seeds, draws = 0.7, (11, 12, 13), 3000

    def softmax(logits):
        chances = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
        return chances / chances.sum(-1, keepdims=True)

    expected = (softmax(first)[:, None] * softmax(second)).ravel() * draws * len(seeds)
    likely = int(first.argmax())
    for proposed in ([likely, 1], [(likely + 1) % 5, 3], []):
        counts = collections.Counter()
        for rule in (rule for seed in seeds for rule in [Sampling(temperature, seed)] * draws):
            rows = np.stack([first, *(second[token] for token in proposed)])
            tree = Tree.chain(proposed)
            following = Following(None, torch.from_numpy(rows))
            emitted = tree.follow(rule([], tree.depths(), following))[1]
            # the second token comes from a plain pass
            if len(emitted) == 1:
                emitted = emitted + rule(
                    emitted, [0], Following(None, torch.from_numpy(second[emitted[0]][None])))
            counts[emitted[0] * 5 + emitted[1]] += 1
        observed = np.array([counts[cell] for cell in range(25)])
        # too few for chi-square one by one: taken together
        rare = expected < 5
        observed, wanted = (np.append(decoded[~rare], decoded[rare].sum())
                            for decoded in (observed, expected))
        free = len(wanted) - 1
        # 0.1 % of runs exceed it
        limit = free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3
        assert ((observed - wanted) ** 2 / wanted).sum() < limit, proposed


def test_a_sampled_answer_is_the_same_for_the_same_seed_and_near_greedy_when_cold():
    target = Automaton(5, 5)
    for temperature, seeds in ((1.0, (4, 4)), (1e-3, (1, 2))):
        answers = []
        for seed in seeds:
            target.ask(PROMPTS[1])
            drafter = Knowing(target.plain(PROMPTS[1], 20), QUALITY["odd"])
            answers.append(
                decode(target, drafter, Limits(20, (EOS, ), 5), rule=Sampling(temperature,
                                                                              seed)).tokens)
        assert answers[0] == answers[1]
    assert answers[0] == target.plain(PROMPTS[1], 20)


# ----------------------------------------------------------------------------------------- drafters
def pairs_of(targets: list[list[int]], drafts: list[list[int]]) -> Pairs:
    return Pairs(*flat(drafts), *flat(targets), [""] * len(targets), list(range(len(targets))), [])


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.fixture(scope="module")
def world() -> tuple:
    """(automaton, training pairs, test pairs, prompts of the test answers): answers of 12 tokens at
    most.
    """
    target, rng = Automaton(7, 5), np.random.default_rng(1)
    prompts = [rng.integers(3, VOCABULARY, 3).tolist() for _ in range(60)]
    answers = [target.plain(prompt, 12) for prompt in prompts]
    drafts = [rng.integers(3, VOCABULARY, rng.integers(0, 9)).tolist() for _ in prompts]
    drafts[41] = []
    return (target, pairs_of(answers[:40], drafts[:40]), pairs_of(answers[40:],
                                                                  drafts[40:]), prompts[40:])


def tiny(conditioning: str, draft_vocab: bool = False) -> TokenAdapter:
    torch.manual_seed(0)
    outputs = torch.arange(2, VOCABULARY, 2) if draft_vocab else None
    adapter = TokenAdapter(AdapterConfig(VOCABULARY, conditioning, 16, 2, 2, 32, 10, dropout=0.0,
                                         draft_vocab=len(outputs) if draft_vocab else 0), outputs)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return adapter


def live(drafter: NoDrafts, world: tuple, gamma: int) -> list[Decoded]:
    target, _, test, prompts = world
    decoded = []
    for prompt, draft in zip(prompts, test.answers("draft")):
        drafter.begin(draft, [4, 4])
        target.ask(prompt)
        decoded.append(decode(target, drafter, Limits(12, (EOS,), gamma)))
    assert [one.tokens for one in decoded] == list(test.answers("target"))
    return decoded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gamma", [1, 3, 8])
@pytest.mark.parametrize(
    "kind", ["memory", "copy", "draft", "prefix", "prefix+draft", "hybrid", "draft_vocab"])
def test_live_decoding_needs_the_passes_that_simulation_foretells(world, kind, gamma, device):
    _, training, test, _ = world
    adapter = tiny(kind if kind in ("draft", "prefix") else "prefix+draft",
                   kind == "draft_vocab").to(device)
    answers = list(training.answers("target"))
    if kind == "memory":
        simulated, drafter = Memory(NGrams(answers), test), LiveMemory(NGrams(answers))
    elif kind == "copy":
        simulated, drafter = Copy(test), LiveCopy()
    elif kind == "hybrid":
        memory = Memory(NGrams(answers), test)
        simulated = Hybrid(Adapter(adapter, test), memory, 0.5)
        drafter = LiveHybrid(NGrams(answers), adapter, 0.5)
    else:
        simulated = Adapter(adapter, test)
        drafter = LiveDraftAdapter(adapter) if kind == "draft" else LiveAdapter(adapter)
    wanted = stream(simulated, test)["simulated"]
    decoded = live(drafter, world, gamma)
    passes, tokens = sum(len(one.accepted) for one in decoded), sum(len(one.tokens) for one in decoded)
    assert tokens / passes == pytest.approx(wanted[str(gamma)]["tau"])
    assert kind == "copy" or sum(sum(one.accepted) for one in decoded) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_cached_adapter_follows_a_prefix_that_grows_turns_back_and_turns_off(device):
    """On a GPU that is: what the CUDA graphs compute is what the full pass computes."""
    adapter = tiny("prefix+draft").to(device)
    steps, rng, draft = AdapterSteps(adapter, top_k=5), np.random.default_rng(0), [3, 9, 4]
    assert bool(steps.graphs) == (device == "cuda")
    steps.begin([8] * 10)
    steps.begin(draft)
    steps.begin(draft)
    prefix: list[int] = []
    for _ in range(60):
        turn = rng.integers(4)
        if turn == 0:
            prefix = prefix[:int(rng.integers(0, len(prefix) + 1))]
        elif len(prefix) < 9:
            prefix = prefix + rng.integers(0, VOCABULARY, rng.integers(0,
                                                                       10 - len(prefix))).tolist()
        further = int(rng.integers(0, 10 - len(prefix)))
        rows = steps.after(prefix, further)
        assert len(rows) == further + 1
        written = list(prefix)
        for ids, chances in rows:
            with torch.no_grad():
                parts = (torch.tensor(part, dtype=torch.long, device=device)
                         for part in ([draft], [3], [written]))
                logits = adapter(*parts)
            wanted = logits[0, -1].softmax(-1)
            # On a GPU proposals are made in bfloat16: near ties may change places.
            assert chances == pytest.approx(wanted[ids].tolist(),
                                            rel=1e-4 if device == "cpu" else 0.03)
            assert chances == pytest.approx(wanted.topk(5).values.tolist(),
                                            rel=1e-4 if device == "cpu" else 0.03)
            written.append(ids[0])


@pytest.mark.parametrize("conditioning", ["prefix", "prefix+draft"])
def test_what_a_graph_would_capture_can_run_before_anything_was_begun(conditioning):
    """Capturing runs each size several times on the buffers as they are; a place below 0 would end
    the process.
    """
    steps = AdapterSteps(tiny(conditioning))
    for size in ("start", *reversed(steps.SIZES)):
        for _ in range(4):
            steps._forward(size)
    steps.begin([3, 9])
    fresh = AdapterSteps(tiny(conditioning))
    fresh.begin([3, 9])
    assert steps.after([4, 5], 3) == fresh.after([4, 5], 3)


def test_proposals_end_where_they_are_no_longer_likely_enough():
    memory = LiveMemory(NGrams())
    memory.begin([])
    for answer in [[5, 6, 7, 8]] * 3 + [[5, 6, 9, 9]] * 2:
        memory.learn(answer)
    memory.costs = Costs(token_s=0.001)
    sure, unsure = memory.propose([], 4), memory.propose([], 4, price=500.0)
    assert sure == [5, 6, 7, 8] and unsure == [5, 6]
    adapter = LiveAdapter(tiny("prefix"))
    adapter.begin([])
    everything = adapter.propose([3], 6)
    assert len(everything) == 6
    adapter.costs = Costs(token_s=0.001)
    for least in (0.5, 0.1, 0.01, 0.0):
        proposal = adapter.propose([3], 6, 1000 * least)
        assert everything[:len(proposal)] == proposal
        chance = float(
            np.prod([chances[0] for _, chances in adapter.steps.after([3], 5)][:len(proposal) + 1]))
        assert len(proposal) == 6 or chance < least


def test_a_hybrid_asks_its_adapter_only_where_the_memory_doubts_and_only_while_it_pays():
    hybrid, requests = LiveHybrid(NGrams(), tiny("prefix"), 0.5), []
    for answer in [[5, 6, 7, 8]] * 9 + [[5, 6, 9, 9]] * 8:
        hybrid.learn(answer)
    hybrid.begin([])
    after = hybrid.steps.after
    hybrid.steps.after = lambda prefix, further=0: requests.append(list(prefix)) or after(
        prefix, further)
    hybrid.propose([], 3)
    # there alone two tokens are as good as equal
    assert requests == [[5, 6]]
    hybrid.costs = Costs(adapter_step_s=0.001)
    for price, times in ((100.0, 1), (2000.0, 0)):
        requests.clear()
        hybrid.propose([], 3, price)
        assert len(requests) == times


def test_measuring_a_drafter_sets_its_costs_and_teaches_it_nothing():
    def timer(work) -> float:
        work()
        return 0.25

    for drafter in (LiveHybrid(NGrams([[3, 4, 5]]), tiny("prefix"),
                               0.5), LiveMemory(NGrams([[3, 4, 5]])), LiveAdapter(tiny("prefix")),
                    LiveLookup(), LiveCopy(), NoDrafts()):
        before = counts_of(getattr(drafter, "ngrams", NGrams()))
        costs = drafter.measure([3, 4], [5], [3], timer, verify_s=0.5)
        assert costs is drafter.costs and costs.token_s >= 0.5 and costs.proposal_s >= 0
        assert costs.adapter_step_s == (0.25 if hasattr(drafter, "steps") else 0)
        assert counts_of(getattr(drafter, "ngrams", NGrams())) == before


def test_an_adapter_proposes_nothing_past_its_longest_answer():
    adapter = LiveAdapter(tiny("prefix"))
    adapter.begin([])
    assert len(adapter.propose(list(range(3, 11)), 8)) == 2        # 8 tokens said, max_seq_len 10
    assert adapter.propose(list(range(3, 13)), 8) == []


def test_prompt_lookup_proposes_what_followed_the_longest_latest_match():
    lookup = LiveLookup()
    lookup.begin([], [1, 2, 3, 9, 1, 2])
    # ... 1 2 | 4 1 2: the latest "1 2" before
    assert lookup.propose([4, 1, 2], 3) == [4, 1, 2]
    assert lookup.propose([7, 2, 3], 2) == [9, 1]
    assert lookup.propose([8], 3) == []


def test_a_memory_is_saved_and_comes_back_as_it_was(tmp_path, world):
    _, training, _, _ = world
    save_memory(training.answers("target"), tmp_path / "memory.npz")
    answers = load_memory(tmp_path / "memory.npz")
    assert answers == list(training.answers("target"))
    before, after = NGrams(training.answers("target")), NGrams(answers)
    assert counts_of(before) == counts_of(after)
    (tmp_path / "odd.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "other.npz", target=np.zeros(3, np.int32), target_start=np.array([0, 9]))
    for name in ("odd.npz", "other.npz", "none.npz"):
        with pytest.raises(UserError, match="not the memory of a task"):
            load_memory(tmp_path / name)


def test_matching_counts_the_common_beginning():
    assert [matching(a, b)
            for a, b in (([], [1]), ([1, 2], [1, 3]), ([1, 2], [1, 2, 3]))] == [0, 1, 2]
