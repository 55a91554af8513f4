"""Models of the Hugging Face hub: the snapshot in the local cache, downloaded first where it is not
whole.

A snapshot that is whole is used without asking the hub, so that nothing waits for a network and the
commit does not change between two runs. HF_HUB_OFFLINE=1 forbids downloads, HF_HOME names the
cache; both are the hub's own settings.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from base import UserError, first_line, log

COMMIT = re.compile(r"[0-9a-f]{40}")
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TIMEOUT_S = 10                     # for the hub's answer to the first question
PIXEL_SETTINGS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# Of tokenizers and prompts whatever a processor of transformers reads.
DOWNLOADED = re.compile(
    r"[^/]+\.json|tokenizer\.model|[^/]+\.jinja|merges\.txt|vocab\.txt"
    r"|(model|pytorch_model)[^/]*\.(safetensors|bin)"
)


def is_id(name: str) -> bool:
    """Whether a name looks like a hub's: LanguageBind/Video-LLaVA-7B-hf."""
    return ID.fullmatch(name) is not None


def snapshot(name: str, lacks: Callable[[Path], str | None]) -> tuple[Path, str | None]:
    """(folder of the model's files, its commit) of a hub id; lacks(folder): what is missing there,
    or None.

    Raises UserError where the snapshot is not whole and can't be downloaded.
    """
    from huggingface_hub import constants

    # its warnings of retries: one line is ours
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    folder = _cached(name)
    reason = lacks(folder) if folder else "the hub's cache does not hold it"
    if folder and not reason and any((folder / file).is_file() for file in PIXEL_SETTINGS):
        return folder, commit_of(folder)
    if not constants.HF_HUB_OFFLINE:
        try:
            folder = _download(name)
            return folder, commit_of(folder)
        except Exception as error:        # of the network, of the hub's answers, of rights
            failure = f"{type(error).__name__}: {first_line(error)}"
    else:
        failure = "HF_HUB_OFFLINE forbids to ask the hub"
    if folder and not reason:  # whole, but for the pixel settings, which not every model has
        log(f"load | WARNING | {name} | taken from the hub's cache as it is: {failure}")
        return folder, commit_of(folder)
    raise UserError(
        f"no such model folder: {name}; as a model of the hub it can't be loaded either: {reason}, "
        f"and it can't be downloaded ({failure}); give the folder of a copy, or download it where "
        "there is a network and set HF_HUB_OFFLINE=1 here"
    )


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot, which is the name of its folder in the hub's cache."""
    return folder.name if COMMIT.fullmatch(folder.name) else None


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # not there, or a damaged cache: what is wrong is said by the download
        return None


def _download(name: str) -> Path:
    """Ask the hub for the model and fetch what is missing; one unanswered question ends it, without
    retries.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    info = HfApi().model_info(name, timeout=TIMEOUT_S, files_metadata=True)
    files = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if DOWNLOADED.fullmatch(file.rfilename)
    }
    if any(file.endswith(".safetensors") for file in files):
        files = {
            file: size
            for file, size in files.items()
            if not file.endswith((".bin", ".bin.index.json"))
        }
    log(
        f"load | {name} | from the hub: {len(files)} files, {sum(files.values()) / 1e9:.1f} GB, "
        f"commit {info.sha}"
    )
    return Path(snapshot_download(name, revision=info.sha, allow_patterns=sorted(files)))
