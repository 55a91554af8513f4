"""The tokenizers that the ids of pairs belong to, as far as their files tell."""

from __future__ import annotations

import dataclasses

from base import UserError

COPY = "egpt_vl_tokens"  # key of a row: the draft's text in the target's tokens, where they differ


@dataclasses.dataclass(frozen=True)
class Tokenizers:
    """Digests of the vocabularies of both models' answers (vlm/vocabulary.py); "" where unknown.

    Files of earlier versions know neither; pairs of the target alone have no draft's.
    """

    draft: str = ""
    target: str = ""
    # Whether an id is the same token in both; None where unknown, and then it is taken to be so.
    are_same: bool | None = None

    def check(self, other: Tokenizers, ours: str, theirs: str, with_drafts: bool = True) -> None:
        """A UserError where both are known and differ. ours, theirs: whose tokenizers these are.

        with_drafts: drafts are read too.
        """
        for which in ("target", "draft") if with_drafts else ("target",):
            here, there = getattr(self, which), getattr(other, which)
            if here and there and here != there:
                raise UserError(f"{ours} and {theirs} are of different {which} tokenizers ({here} "
                                f"and {there}): their ids are different tokens; use those of one "
                                "tokenizer")
        same = {self.are_same, other.are_same}
        if with_drafts and same == {True, False}:
            raise UserError(f"draft and target have one tokenizer in {ours if self.are_same else theirs} "
                            f"and different ones in {theirs if self.are_same else ours}: their ids are "
                            "different tokens; use those of the same two models")
        if with_drafts and False in same and UNKNOWN in (self, other):
            unknown, known = (ours, theirs) if self == UNKNOWN else (theirs, ours)
            raise UserError(f"{unknown} does not tell of which tokenizers its ids are, and in {known} "
                            "draft and target have different ones; use pairs that "
                            "extract_tokens_train.py of this version wrote")

    def joined(self, other: Tokenizers) -> Tokenizers:
        """What both tell together, once checked."""
        known = [same for same in (self.are_same, other.are_same) if same is not None]
        return Tokenizers(self.draft or other.draft, self.target or other.target,
                          known[0] if known else None)


UNKNOWN = Tokenizers()
