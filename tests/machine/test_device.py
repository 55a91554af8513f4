"""The choice of device and dtype."""

import pytest
import torch

from base import UserError
from machine.device import Runtime, choose_device


def test_float32_on_a_gpu_means_float32(monkeypatch):
    """PyTorch leaves TF32 on for convolutions; whichever program asks for a device, it is off for all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for name in ("auto", "cuda", "cuda:0"):
            for backend in backends:
                backend.allow_tf32 = True
            assert choose_device(name).type == "cuda"
            assert not any(backend.allow_tf32 for backend in backends)
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


def test_without_a_gpu_everything_runs_on_the_cpu_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Runtime.choose() == Runtime(torch.device("cpu"), torch.float32, "none")


@pytest.mark.parametrize("name", ["gpu", "cuda:7", "mps", "cuda:x", ""])
def test_a_device_that_is_not_there_is_a_user_error(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--device"):
        choose_device(name)
