"""The files of an adapter that was handed on: a folder of export_adapter.py, or the hub's snapshot of
one.

A snapshot that is whole is used without asking the hub, as models are (vlm/hub.py).
"""

from __future__ import annotations

from pathlib import Path

from base import ROOT, UserError, first_line, log
from machine.files import digest_of_file, read_json
from reports.adapter_card import EXPORT_AGAIN, METRICS_FILE, read_metrics
from reports.shapes import check_shape, optional
from vlm.hub import TIMEOUT_S, is_id

__all__ = ["EXPORT_AGAIN", "read_metrics"]           # of the files, for decoding/task.py too
CONFIG_FILE, WEIGHTS_FILE, MEMORY_FILE = "config.json", "model.safetensors", "memory.npz"
NEEDED = (CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE)
MAX_DOWNLOAD = 4 * 2**30               # bytes: the largest adapter, memory and figures


def files_of(name: Path) -> Path:
    """The folder with the files of this task, exported folder or hub id (downloaded where needed).

    Raises UserError where there is nothing of that name.
    """
    if name.is_dir():
        return name
    if name.exists() or not is_id(str(name)):
        raise UserError(f"{name} is no finished task: there is no such folder; wanted one of "
                        "train_and_evaluate.py or export_adapter.py, or an id on the hub, ORG/NAME")
    folder = cached(str(name))
    return folder or download(str(name))


def results_folder_of(name: Path) -> Path:
    """Where decodings with this task go: into its folder, for a hub id into one beside the scripts."""
    return name if name.is_dir() else ROOT / "task" / str(name).replace("/", "--")


def is_exported(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() and not (folder / "results.json").exists()


def read_facts(folder: Path) -> dict:
    """What config.json of an exported folder says beside the adapter's own settings: models, memory."""
    config = read_json(folder / CONFIG_FILE)
    check_shape(folder / CONFIG_FILE, config,
                {"models": optional(dict), "memory": optional(bool)}, EXPORT_AGAIN)
    return config


def digest_of(folder: Path) -> str:
    """Of the files that answers and times depend on."""
    names = (*NEEDED, MEMORY_FILE)
    return " ".join(digest_of_file(folder / name) for name in names if (folder / name).is_file())


def cached(name: str) -> Path | None:
    """The whole snapshot in the hub's cache, if there is one."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        has_all = all((folder / file).is_file() for file in NEEDED)
        if not has_all or (read_facts(folder).get("memory") and not (folder / MEMORY_FILE).is_file()):
            return None
        return folder
    except (OSError, ValueError, UserError):  # not there, or damaged: the download says what is wrong
        return None


def download(name: str) -> Path:
    """The files of this id, from the hub; one unanswered question ends it, without retries."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        if constants.HF_HUB_OFFLINE:
            raise ValueError("HF_HUB_OFFLINE forbids to ask the hub")
        info = HfApi().model_info(name, timeout=TIMEOUT_S, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()
                 if file.rfilename in (*NEEDED, MEMORY_FILE)}
        if missing := [file for file in NEEDED if file not in sizes]:
            raise ValueError(f"it has no {', '.join(missing)}")
        if sum(sizes.values()) > MAX_DOWNLOAD:
            raise ValueError(f"its files have {sum(sizes.values()):,} bytes, wanted at most "
                             f"{MAX_DOWNLOAD:,}")
        log(f"decode | {name} | from the hub: {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB, "
            f"commit {info.sha}")
        return Path(snapshot_download(name, allow_patterns=sorted(sizes)))
    except Exception as error:             # of the network, of the hub's answers, of rights
        raise UserError(
            f"{name} is no finished task: there is no such folder, and no adapter of the hub can be read "
            f"({type(error).__name__}: {first_line(error)}); give the folder of a copy") from error
