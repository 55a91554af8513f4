"""Where and how a model runs: the choice of device, dtype and quantisation, for every program."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Literal

import torch

from base import UserError, install_command
from machine.ranks import Ranks

Quantization = Literal["auto", "4bit", "8bit", "none"]


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto": the first GPU, or the CPU where there is none.

    Turns TF32 off, for matrix products and for convolutions, where PyTorch leaves it on: float32 on
    a GPU then means float32, whichever program computes. Raises UserError for an unknown name or a
    device that is absent.
    """
    try:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(automatic if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: wanted auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: wanted auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: this PyTorch ({torch.__version__}) sees {count} "
                            "CUDA devices; use --device cpu, or a PyTorch built for your driver")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return device


def see_own_gpu(ranks: Ranks) -> None:
    """Show this process of several the GPU of its local rank alone; call it before CUDA is used.

    What takes the first GPU by default (streams, kernels, other libraries) then takes the right
    one. Nothing changes where the launcher shows each process one GPU already.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(torch.cuda.device_count())]
    if shown is not None:
        names = [name for name in shown.split(",") if name.strip()]
    if ranks.local_rank < len(names) > 1 and not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = names[ranks.local_rank]


def gpu_of(device: torch.device) -> str:
    """What tells this GPU from all others, on whichever host; empty for a CPU."""
    if device.type != "cuda":
        return ""
    return f"{os.uname().nodename} {torch.cuda.get_device_properties(device).uuid}"


def device_name(device: torch.device) -> str:
    """The device in words, for results and logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where and how a model runs."""

    device: torch.device
    dtype: torch.dtype
    quantization: Literal["4bit", "8bit", "none"]

    @staticmethod
    def choose(device: str = "auto", dtype: str = "auto",
               quantization: Quantization = "auto") -> Runtime:
        """"auto": bfloat16 and 4bit on the first GPU, or float32 and none on a CPU."""
        place = choose_device(device)
        on_gpu = place.type == "cuda"
        if dtype == "auto":
            dtype = "bfloat16" if on_gpu else "float32"
        if quantization == "auto":
            quantization = "4bit" if on_gpu else "none"
        if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"--quantization {quantization} needs bitsandbytes: "
                            f"{install_command('requirements.txt')}, or --quantization none")
        return Runtime(place, getattr(torch, dtype), quantization)
