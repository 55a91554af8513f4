"""A pair file from JSON of another layout: token ids under keys that you name.

    python convert_pairs.py --in answers.jsonl --draft_key eventgpt.ids --target_key video_llava.ids

A key may be nested (a.b.c); lists on the way stand for all of their elements, and a list of token
lists gives as many pairs. Without --draft_key drafts are empty. Rows that give no pair are counted by
reason; where none does, the ERROR line says which keys hold token ids.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import UserError, log, option, parse_config, required
from machine.files import make_folder
from machine.running import run
from pairs.convert import MAX_KEY, Conversion, Keys
from pairs.rows import write_rows
from pairs.splits import MAX_VOCAB_SIZE


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Make a pair file from JSON of another layout."""

    in_: Path = required("the file: a list of objects, an object, or JSON Lines (.json, .jsonl)")
    target_key: str = required("dotted key of the target's token ids, or of lists of them")
    draft_key: str | None = option(None, "dotted key of the draft's; default: drafts are empty")
    sequence_key: str | None = option(
        None, "dotted key of the recording's name, by which drives are kept together; default: sequence")
    clip_key: str | None = option(None, "dotted key of the clip's number or name; default: clip")
    vocab_size: int = option(0, "ids of the models' vocabulary, recorded in the file; 0: not recorded")
    out: Path | None = option(None, "the pair file; default: beside the input, with _pairs.json behind "
                              "its name")

    def __post_init__(self):
        for name in ("target_key", "draft_key", "sequence_key", "clip_key"):
            key = getattr(self, name)
            if key is not None and not 0 < len(key.strip(".")) <= MAX_KEY:
                raise UserError(f"--{name} must be a key like eventgpt.output_tokens, got {key[:80]!r}")
        if not 0 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise UserError(f"--vocab_size must be from 0 to {MAX_VOCAB_SIZE}, got {self.vocab_size}")
        if self.output.resolve() == self.in_.resolve():
            raise UserError(f"--out would write over the input, {self.in_}; name another file")

    @property
    def output(self) -> Path:
        return self.out or self.in_.with_name(f"{self.in_.stem}_pairs.json")


def main() -> None:
    config = parse_config(ConvertConfig)
    keys = Keys(config.target_key, config.draft_key, config.sequence_key, config.clip_key)
    conversion = Conversion(config.in_, keys)
    head = {"source": config.in_.name, "keys": dataclasses.asdict(keys)}
    if config.vocab_size:
        head["vocab_size"] = config.vocab_size
    make_folder(config.output.resolve().parent)
    write_rows(config.output, head, conversion, [])
    for reason, count in conversion.dropped.most_common():
        log(f"convert | WARNING | {count} of {conversion.rows} rows dropped: {reason}")
    log(f"RESULT | {config.output} | {conversion.pairs} pairs from {conversion.rows} rows")


if __name__ == "__main__":
    run(main)
