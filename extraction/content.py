"""Digests of the files that the models see of each clip: they tell whether old answers still hold.

Of names and sizes alone, which is cheap enough for ten thousand clips at every start. Times are
left out: copying a data set changes them.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from pairs.journal import Content

if TYPE_CHECKING:
    from clips.dataset import Sample


def digests_of(sample: Sample, content: Content) -> dict[str, str] | None:
    """Model -> digest of the files that it sees of this sample; None for an unusable row."""
    if sample.trouble:
        return None
    return {model: digests[sample.key] for model, digests in content.items()}


def key_of(row: dict) -> str:
    """The key of the clip that a row of an output is about."""
    from clips.dataset import Sample

    return Sample(row["sample_idx"], row["sample_id"], row["sequence"], row["clip"]).key


def as_of(failed: list[dict], samples: list[Sample], content: Content) -> Content:
    """The content now, but of failed clips that of when they failed: to mend a clip is no change.

    failed: rows of an earlier output; those of earlier versions say nothing of content.
    """
    then = {model: dict(digests) for model, digests in content.items()}
    for row in failed:
        if row.get("content"):
            for model, digest in row["content"].items():
                then[model][key_of(row)] = digest
        elif "content" in row and not samples[row["sample_idx"]].trouble:     # its row was mended
            for digests in then.values():
                digests.pop(key_of(row), None)
    return then


def fingerprint(content: Content) -> str:
    """One digest of all clips."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
