"""Tokenizers as their files describe them, and whether one fits the model that it lies beside."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from base import UserError, log
from vlm.errors import in_words

WORDS = "street", "vehicle"        # any tokenizer must tell them apart


def load_tokenizer(folder: str | Path):
    """The tokenizer exactly as the files of a model folder describe it.

    tokenizer.json is read verbatim: transformers' LlamaTokenizer class would rebuild it and drop
    its normaliser. A folder with tokenizer.model alone (EventGPT's published form) goes through
    LlamaTokenizer.
    """
    # PreTrainedTokenizerFast must not see a folder without tokenizer.json: it would make one, and
    # not LLaMA's.
    verbatim = (Path(folder) / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if verbatim else LlamaTokenizer
    with silent_panics():
        return guarded(f"can't load a tokenizer from {folder}",
                       lambda: kind.from_pretrained(folder, local_files_only=True))


def guarded(trouble: str, work: Callable):
    """work(), which calls a tokenizer; a UserError that begins with `trouble` for whatever it
    raises.

    The tokenizers library panics over damaged files, and a panic is no Exception.
    """
    try:
        return work()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError):
        raise
    # the converters raise RuntimeError, their own classes, panics, ...
    except BaseException as error:
        raise UserError(f"{trouble}: {in_words(error)}") from error


@contextlib.contextmanager
def silent_panics() -> Iterator[None]:
    """Inside, standard error is closed: a panic prints a stack there, before it is caught. For one
    thread at a time.
    """
    with open(os.devnull, "w") as nowhere:
        before = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


# -------------------------------------------------------------------------------------- does it fit
def check_tokenizer(tokenizer, name: str | Path, vocab_size: int, needs_bos: bool = True) -> None:
    """A UserError unless it has BOS (Qwen's has none) and EOS, encodes words into ids that the
    model knows, and decodes all ids.
    """
    needed = [("EOS", tokenizer.eos_token_id)]
    if needs_bos:
        needed.insert(0, ("BOS", tokenizer.bos_token_id))
    for kind, token in needed:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(
                f"the tokenizer of {name} has no {kind} that the model knows ({token!r}, wanted an "
                f"id below {vocab_size:,}): tokenizer_config.json or special_tokens_map.json is "
                "missing or belongs to another model"
            )
    first, second = (ids_of(tokenizer, name, word, vocab_size) for word in WORDS)
    if first == second:
        raise UserError(
            f"the tokenizer of {name} knows no words: {' and '.join(WORDS)} both become "
            f"{first[:8]}; its files are damaged or of another model"
        )
    with silent_panics():
        guarded(f"the tokenizer of {name} can't decode its own ids",
                lambda: tokenizer.decode(list(range(vocab_size)), skip_special_tokens=True))


def ids_of(tokenizer, name: str | Path, text: str, vocab_size: int) -> list[int]:
    """The ids of a text; a UserError for ids that the model does not know."""
    with silent_panics():
        ids = guarded(
            f"the tokenizer of {name} can't encode {text[:40]!r}", lambda: tokenizer(text).input_ids
        )
    check_ids(ids, name, vocab_size)
    return ids


def check_ids(ids: list[int], name: str | Path, vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        raise UserError(
            f"the tokenizer of {name} gives id {max(ids):,}, the model has {vocab_size:,} ids: its "
            "files belong to another model"
        )


def warn_of_special_tokens(tokenizer, name: str | Path, questions: list[str]) -> None:
    """A WARNING for questions in which the tokenizer reads words as control tokens: </s> ends a
    text, say.
    """
    special = set(tokenizer.all_special_tokens)
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for question in questions:
        if marks := sorted(mark for mark in special if mark and mark in question):
            log(
                f"load | WARNING | the question {question[:60]!r} contains {', '.join(marks)}: "
                f"{name} reads that as a control token and not as text"
            )
