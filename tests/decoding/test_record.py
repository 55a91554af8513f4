"""What is recorded of an answer's proposals is what was proposed, and who proposed it."""

import pytest

from decoding.limits import Limits
from decoding.loop import decode
from decoding.record import DIGITS, PROPOSING, Record, Words, proposers
from drafting.adapter import LiveAdapter
from drafting.baselines import LiveCopy
from drafting.contract import NoDrafts
from drafting.hybrid import LiveHybrid
from drafting.memory import LiveMemory
from drafting.ngrams import NGrams
from tests.decoding.test_decoding import EOS, tiny, world  # noqa: F401  (a fixture)
from tests.decoding.test_trees import Branched


def recorded(drafter, world, nodes: int) -> list:  # noqa: F811
    """[(what was decoded, its record)] of the answers of a world."""
    _, _, test, prompts = world
    target, rows = Branched(7, 5), []
    for prompt, draft in zip(prompts, test.answers("draft")):
        record = Record()
        drafter.begin(draft, [])
        target.ask(prompt)
        rows.append((decode(target, drafter, Limits(12, (EOS,), 5, nodes), record=record), record))
    return rows


def drafters(world) -> dict:  # noqa: F811
    answers = list(world[1].answers("target"))
    return {
        "memory": LiveMemory(NGrams(answers)),
        "adapter": LiveAdapter(tiny("prefix")),
        "hybrid": LiveHybrid(NGrams(answers), tiny("prefix"), 0.5),
        "copy": LiveCopy(),
        "none": NoDrafts(),
    }


@pytest.mark.parametrize("nodes", [0, 16])
@pytest.mark.parametrize("name", ["memory", "adapter", "hybrid", "copy", "none"])
def test_every_proposal_is_kept_with_who_proposed_it(world, name, nodes):  # noqa: F811
    seen = set()
    for decoded, record in recorded(drafters(world)[name], world, nodes):
        assert [len(row["tokens"]) for row in record.passes] == decoded.proposed
        at = 0
        for row, accepted in zip(record.passes, decoded.accepted):
            places = set(zip(row.get("parents", range(-1, len(row["tokens"]))), row["tokens"]))
            node = -1
            for token in decoded.tokens[at : at + accepted]:  # the accepted path is in the record
                assert (node, token) in places
                node = (
                    row["tokens"].index(token)
                    if "parents" not in row
                    else next(
                        child
                        for child, (parent, its) in enumerate(zip(row["parents"], row["tokens"]))
                        if (parent, its) == (node, token)
                    )
                )
            at += accepted + 1
            for who, column in row.get("by", {}).items():
                seen.add(who)
                assert len(column) == len(row["tokens"])
                assert all(
                    chance is None or chance is True or 0 <= chance <= 1 for chance in column
                )
            if row["tokens"]:
                assert all(
                    any(chance is not None for chance in chances)
                    for chances in zip(*row["by"].values())
                ), "a proposal of nobody"
    assert (
        seen
        == {
            "memory": {"memory"},
            "adapter": {"adapter"},
            "hybrid": {"memory", "adapter"},
            "copy": {"draft"},
            "none": set(),
        }[name]
    )


def test_recording_changes_no_answer_and_no_proposal(world):  # noqa: F811
    for name in ("memory", "hybrid"):
        with_record = [decoded for decoded, _ in recorded(drafters(world)[name], world, 16)]
        again, target, rows = drafters(world)[name], Branched(7, 5), []
        for prompt, draft in zip(world[3], world[2].answers("draft")):
            again.begin(draft, [])
            target.ask(prompt)
            rows.append(decode(target, again, Limits(12, (EOS,), 5, 16)))
        assert [(one.tokens, one.proposed, one.accepted) for one in rows] == [
            (one.tokens, one.proposed, one.accepted) for one in with_record
        ]


def test_a_memorys_probabilities_are_those_before_it_learns_the_answer(world):  # noqa: F811
    memory, untaught = drafters(world)["memory"], drafters(world)["memory"]
    _decoded, record = recorded(memory, world, 0)[0]
    distribution = untaught.ngrams.distribution([])
    first = record.passes[0]
    assert first["by"]["memory"][0] == pytest.approx(
        distribution[first["tokens"][0]], abs=0.1**DIGITS
    )


def test_a_source_that_gives_little_is_no_proposer_where_another_gives_more():
    assert proposers({"memory": [0.9, 0.05, PROPOSING], "adapter": [0.02, 0.01, 0.3]}) == {
        "memory": [0.9, 0.05, PROPOSING],
        "adapter": [None, None, 0.3],
    }
    assert proposers({"memory": [0.5], "adapter": [None]}) == {"memory": [0.5]}
    assert proposers({"draft": [True, True]}) == {"draft": [True, True]}


def test_a_word_keeps_the_blank_before_it():
    class Tokenizer:
        """As sentencepiece does it: the first word of a text loses its blank."""

        texts = (" a", " bus", "es", "</s>")

        def __call__(self, text, add_special_tokens):
            return type("Encoded", (), {"input_ids": [0]})

        def decode(self, tokens, **how):
            return "".join(self.texts[token] for token in tokens).removeprefix(" ")

    words = Words(Tokenizer())
    assert words.new({1, 2}) == {"1": " bus", "2": "es"}
    assert words.new({2, 3}) == {"3": "</s>"}
