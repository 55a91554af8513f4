"""Vocabularies of tokenizers, compared by id and token: do the ids of two models mean the same text?

Added tokens are left out: they mark pictures, ends and turns, no answer is made of them, and two
models of one tokenizer (EventGPT and Video-LLaVA, both LLaMA's) give the ids behind the vocabulary to
different ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vlm.checkpoints import open_checkpoint
from vlm.roles import ANY, module_of
from vlm.tokenizers import guarded, load_tokenizer, silent_panics


def tokenizer_of(name: str | Path) -> Any:
    """The tokenizer of a checkpoint, by its folder or hub id; no weights are read."""
    folder = open_checkpoint(name).folder
    if (Path(folder) / "tokenizer.json").is_file() or module_of(name) != ANY:
        return load_tokenizer(folder)
    with silent_panics():
        return guarded(f"can't load a tokenizer from {folder}", lambda: AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False))


def ends_of(name: str | Path) -> list[int]:
    """The ids of a checkpoint's generation_config.json that end an answer, beside its tokenizer's EOS."""
    return open_checkpoint(name).eos_ids()


def tokens_by_id(tokenizer) -> dict[int, str]:
    """Id -> token, without added tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        ids = fast.get_vocab(with_added_tokens=False)
    else:
        added = tokenizer.get_added_vocab()
        ids = {token: number for token, number in tokenizer.get_vocab().items()
               if token not in added}
    return {number: token for token, number in ids.items()}


def digest_of(tokenizer) -> str:
    """16 hex digits of the ids and tokens: equal for the same vocabulary, wherever its files lie."""
    digest = hashlib.blake2b(digest_size=8)
    for number, token in sorted(tokens_by_id(tokenizer).items()):
        digest.update(f"{number}\0{token}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


def is_same(one, other) -> bool:
    """Whether every id that both vocabularies hold is the same token in both, whatever their sizes."""
    ours, theirs = tokens_by_id(one), tokens_by_id(other)
    shared = ours.keys() & theirs.keys()
    return bool(shared) and all(ours[number] == theirs[number] for number in shared)


def translation_between(draft: str | Path, target: str | Path) -> Translation | None:
    """Drafts in the target's tokens; None where both models share a tokenizer. By folder or hub id."""
    ours, theirs = tokenizer_of(draft), tokenizer_of(target)
    return None if is_same(ours, theirs) else Translation(ours, theirs, ends_of(draft))


class Translation:
    """Draft answers in the target's tokens: the same text, encoded as the target would write it."""

    def __init__(self, draft: Any, target: Any, ends: Iterable[int] = ()):
        """draft, target: tokenizers; ends: ids that end a draft answer beside its tokenizer's EOS."""
        self.draft, self.target = draft, target
        self.ends = {draft.eos_token_id, *ends}

    def __call__(self, tokens: list[int]) -> list[int]:
        """tokens: of a draft answer, with EOS where the model produced it."""
        text = guarded("the draft's tokenizer can't decode an answer",
                       lambda: self.draft.decode(tokens, skip_special_tokens=True))
        return self.of_text(text.strip(), ended=bool(tokens) and tokens[-1] in self.ends)

    def of_text(self, text: str, ended: bool) -> list[int]:
        """ended: the answer had an EOS, and gets the target's."""
        with silent_panics():
            ids = guarded("the target's tokenizer can't encode a draft",
                          lambda: self.target(text, add_special_tokens=False).input_ids)
        return [*ids, *[self.target.eos_token_id] * ended]
