"""Counts of the tokens that follow contexts, made for building trees: a place in an answer is a
state that moves on.

A context is the last 1 to MAX_ORDER tokens. Contexts form a trie with suffix links (as in a suffix
automaton): the longest context that occurred holds all shorter ones by its links, and the state
after one more token is found by one or two look-ups. Each context lists its commonest tokens, so
that its best continuations are read off.
"""

from __future__ import annotations

from collections.abc import Iterable

# Chosen on the training drives of 1,100 real 1s pairs, leaving one drive out at a time
# (WORKFLOW.md, section 6).
MAX_ORDER = 12                       # tokens of the longest context
TRAINING_WEIGHT = 0.05               # of a training answer; an answer of this stream counts 1
BACK_OFF = 0.3                       # share of the Witten-Bell weight that goes to shorter contexts

TOP_TOKENS = 8                       # commonest tokens that a context lists
MAX_CONTEXTS = 2**19                 # of a level; when it is full the level before it is forgotten
NEGLIGIBLE = 0.004                   # weight of the shorter contexts at which `best` stops


NONE_LONGER: dict[int, Context] = {}     # of contexts without a longer one, never written to


class Context:
    """One context and the tokens that followed it."""

    __slots__ = ("counts", "longer", "order", "suffix", "top", "total")

    def __init__(self, order: int, suffix: Context | None, older: Context | None = None):
        """suffix: this context without its first token. older: this context in an older level."""
        self.order, self.suffix = order, suffix
        self.longer: dict[int, Context] = NONE_LONGER                # by one more token at the end
        self.counts: dict[int, float] = dict(older.counts) if older else {}
        self.total: float = older.total if older else 0.0
        # The commonest tokens, the commonest first; None for a single token, which nearly all
        # contexts have.
        self.top: list[int] | None = list(older.top) if older and older.top else None

    def rank(self, token: int) -> None:
        """Move a token whose count has grown to its place among the commonest."""
        counts, top = self.counts, self.top
        count = counts[token]
        if top is None:
            if len(counts) == 1:
                return
            top = self.top = [other for other in counts if other != token]
        if token in top:
            at = top.index(token)
        elif len(top) < TOP_TOKENS:
            at = len(top)
            top.append(token)
        elif counts[top[-1]] < count:
            at = len(top) - 1
        else:
            return
        while at and counts[top[at - 1]] < count:
            top[at] = top[at - 1]
            at -= 1
        top[at] = token


# of a place in an answer: the longest context that occurred, in each level
State = tuple[Context, ...]


class NGrams:
    """Counts interpolated over context lengths (Witten and Bell 1991), in levels: the newest copies
    what it changes.

    A level holds at most MAX_CONTEXTS contexts. When the newest is full, a new level begins and all
    but the full level are forgotten: memory is bounded, and what came up recently is kept.
    """

    BEGIN = -2                       # precedes every answer: a context token like any other

    def __init__(self, training: Iterable[list[int]] = (), before: NGrams | None = None):
        """training: token lists of the training answers. before: counts to begin with, which stay
        unchanged.
        """
        self.levels: list[Context] = [Context(0, None), *(before.levels if before else ())]
        self.size = 0                                                # contexts in the newest level
        for answer in training:
            self.add(answer, TRAINING_WEIGHT)

    def add(self, answer: list[int], weight: float = 1.0) -> None:
        """Count the tokens of one answer."""
        if self.size > MAX_CONTEXTS:
            self.levels = [Context(0, None), self.levels[0]]
            self.size = 0
        root, older = self.levels[0], tuple(self.levels[1:])
        chain: list[Context] = []  # contexts of order 1, 2, ... before the token
        before = self.BEGIN
        for token in answer:
            if older:
                older = self.after(older, before)
            suffix, chain, copied = root, [root, *chain[:MAX_ORDER - 1]], None
            for at, parent in enumerate(chain):
                context = parent.longer.get(before)
                if context is None:
                    if copied is None:
                        copied = by_order(older)
                    context = Context(at + 1, suffix, copied.get(at + 1))
                    if parent.longer is NONE_LONGER:
                        parent.longer = {}
                    parent.longer[before] = context
                    self.size += 1
                counts = context.counts
                counts[token] = counts.get(token, 0.0) + weight
                context.total += weight
                if context.top is None or context.top[0] != token:
                    context.rank(token)
                chain[at] = suffix = context
            before = token

    # --------------------------------------------------------------------------------------- states
    def begin(self) -> State:
        """The state at the beginning of an answer."""
        return self.after(tuple(self.levels), self.BEGIN)

    def after(self, state: State, token: int) -> State:
        return tuple([following(context, token) for context in state])

    def at(self, prefix: list[int]) -> State:
        """The state after a prefix of an answer."""
        state = tuple(self.levels)
        for token in [self.BEGIN, *prefix] if len(prefix) < MAX_ORDER else prefix[-MAX_ORDER:]:
            state = self.after(state, token)
        return state

    def contexts(self, state: State) -> list[Context]:
        """Contexts of orders n, n - 1, ..., 1 of a state; of each order the one in the newest level
        that has it.
        """
        newest, contexts = state[0], []
        if len(state) == 2:
            context: Context | None = state[1]
            while context and context.order > newest.order:
                contexts.append(context)
                context = context.suffix
        elif len(state) > 2:
            older = by_order(state[1:])
            contexts = [older[order] for order in range(max(older, default=0), newest.order, -1)]
        context = newest
        while context and context.order:
            contexts.append(context)
            context = context.suffix
        return contexts

    def distribution_at(self, state: State) -> dict[int, float]:
        """{token: probability} of the next token."""
        contexts = self.contexts(state)
        if not contexts:
            return {}
        # a shorter context knows all tokens
        probabilities, weight = dict.fromkeys(contexts[-1].counts, 0.0), 1.0
        for context in contexts:
            counts = context.counts
            back_off = BACK_OFF * len(counts)
            share = weight / (context.total + back_off)
            for token, count in counts.items():
                probabilities[token] += share * count
            weight = share * back_off
        return probabilities

    def distribution(self, prefix: list[int]) -> dict[int, float]:
        """{token: probability} of the token after BEGIN + prefix, interpolated over all contexts
        that occurred.
        """
        return self.distribution_at(self.at(prefix))

    def best(self, state: State, count: int) -> list[tuple[float, int]]:
        """(probability, token) of the next token, best first: of TOP_TOKENS tokens of each context,
        approximately.
        """
        probabilities: dict[int, float] = {}
        weight = 1.0
        for context in self.contexts(state):
            counts = context.counts
            back_off = BACK_OFF * len(counts)
            share = weight / (context.total + back_off)
            for token in context.top or counts:
                probabilities[token] = probabilities.get(token, 0.0) + share * counts[token]
            weight = share * back_off
            if weight < NEGLIGIBLE:
                break
        rows = [(probability, token) for token, probability in probabilities.items()]
        rows.sort(reverse=True)
        return rows[:count]


def following(context: Context, token: int) -> Context:
    """The longest context that occurred after one more token."""
    while True:
        longer = context.longer.get(token) if context.order < MAX_ORDER else None
        if longer is not None:
            return longer
        if context.suffix is None:
            return context
        context = context.suffix


def by_order(state: State) -> dict[int, Context]:
    """order -> the context of that order, from the first level that has it."""
    contexts: dict[int, Context] = {}
    for longest in reversed(state):
        context = longest
        while context.suffix is not None:
            contexts[context.order] = context
            context = context.suffix
    return contexts
