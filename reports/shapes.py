"""The shape that a JSON file must have before a page is made of it: which keys, of which kinds."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from base import UserError

NUMBER = (int, float)
FIGURE = (int, float, type(None))        # a figure that could not be measured is null
TEXT = (str, int, float, bool, type(None))


def check_shape(path: Path, value, shape, advice: str) -> None:
    """Raise a UserError that names the first place where a file's JSON value lacks something or is
    of another kind.

    shape: a type or a tuple of types; [shape]: a list of such values; {"key": shape}: an object
    with at least these keys; {str: shape}: an object with at least one key, each value of that
    shape; optional(shape): null, or absent as a key's value, will do too.
    """
    if wrong := _mismatch(value, shape, "$"):
        raise UserError(f"{path} does not hold what belongs there: {wrong}; {advice}")


def optional(shape) -> tuple:
    return ("optional", shape)


def _mismatch(value, shape, where: str) -> str | None:
    """What is wrong at the first place that doesn't fit; None if all fits."""
    if isinstance(shape, tuple) and shape[0] == "optional":
        return None if value is None else _mismatch(value, shape[1], where)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is {type(value).__name__}, wanted a list"
        checks = (_mismatch(part, shape[0], f"{where}[{index}]")
                  for index, part in enumerate(value))
        return next(filter(None, checks), None)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is {type(value).__name__}, wanted an object"
        if str in shape:
            if not value:
                return f"{where} is empty"
            checks = (_mismatch(part, shape[str], f"{where}.{key[:40]!a}")
                      for key, part in value.items())
        else:
            checks = (_mismatch(value.get(key), part, f"{where}.{key}")
                      for key, part in shape.items())
        return next(filter(None, checks), None)
    if isinstance(value, shape):
        return None
    kinds = shape if isinstance(shape, tuple) else (shape,)
    return (f"{where} is {type(value).__name__}, wanted "
            f"{' or '.join(kind.__name__ for kind in kinds)}")


@contextlib.contextmanager
def sensible_values(path: Path, advice: str) -> Iterator[None]:
    """Inside, values of the right kinds are computed with: sizes that don't fit together are the
    file's fault.
    """
    try:
        yield
    except (ArithmeticError, IndexError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds values that don't fit together ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]}); {advice}") from error
