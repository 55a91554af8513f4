"""Errors of other libraries in our words, and which of them are a lack of memory."""

import re

import torch

from base import first_line

# Advice of other libraries that would let a file run code of its own.
UNSAFE_ADVICE = re.compile(
    r"trust_remote_code|weights_only|allow_pickle|add_safe_globals|safe_globals"
)
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def in_words(error: BaseException) -> str:
    """An error's kind and its first line, without advice to let a file's own code run."""
    words = first_line(error)
    if UNSAFE_ADVICE.search(words):
        return f"{type(error).__name__}: it wants code of its own to be run, which is refused"
    return f"{type(error).__name__}: {words}"


def short_of_memory(error: BaseException) -> bool:
    """Whether this error is a lack of memory. On a CPU and inside CUDA's libraries it is a plain
    RuntimeError.
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in MEMORY_WORDS))
