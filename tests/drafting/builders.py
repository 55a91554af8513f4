"""What a memory counted, and the plain way to count and interpolate that it must agree with."""

from drafting.ngrams import BACK_OFF, MAX_ORDER, TRAINING_WEIGHT, Context, NGrams


def counts_of(ngrams: NGrams) -> dict[tuple[int, ...], dict[int, float]]:
    """{context: {token: count}} of the newest level."""
    counts = {}

    def visit(context: Context, tokens: tuple[int, ...]) -> None:
        if context.order:
            counts[tokens] = dict(context.counts)
        for token, longer in context.longer.items():
            visit(longer, (*tokens, token))

    visit(ngrams.levels[0], ())
    return counts


class PlainNGrams:
    """NGrams as they are defined: one table of contexts, walked from the shortest to the longest.
    """

    def __init__(self, training=()):
        self.counts: dict[tuple[int, ...], dict[int, float]] = {}
        for answer in training:
            self.add(answer, TRAINING_WEIGHT)

    def add(self, answer: list[int], weight: float = 1.0) -> None:
        tokens = [NGrams.BEGIN, *answer]
        for at in range(1, len(tokens)):
            for order in range(1, min(MAX_ORDER, at) + 1):
                following = self.counts.setdefault(tuple(tokens[at - order:at]), {})
                following[tokens[at]] = following.get(tokens[at], 0.0) + weight

    def distribution(self, prefix: list[int]) -> dict[int, float]:
        tokens, probabilities = [NGrams.BEGIN, *prefix][-MAX_ORDER:], {}
        for order in range(1, len(tokens) + 1):
            following = self.counts.get(tuple(tokens[len(tokens) - order:]))
            if not following:
                break
            back_off = BACK_OFF * len(following)
            total = sum(following.values()) + back_off
            probabilities = {token: value * back_off / total for token, value in probabilities.items()}
            for token, count in following.items():
                probabilities[token] = probabilities.get(token, 0.0) + count / total
        return probabilities
