"""What a device can do at most, and the memory in use: every benchmark says what share of its limit
it reached.
"""

import torch

from machine.timing import median_s


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy within the device's memory, read and written: its bandwidth.
    """
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    copy.copy_(source)
    return 2 * size / median_s(lambda: copy.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product of random numbers."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * n**3 / median_s(lambda: a @ b, device)


def memory(device: torch.device) -> dict:
    """MiB: "peak" since this was called last, "held" now that what is not in use was given back;
    None on a CPU.
    """
    if device.type != "cuda":
        return {"peak": None, "held": None}
    from vlm.loading import free_memory

    peak = torch.cuda.max_memory_allocated(device)
    free_memory()
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak": peak / 2**20, "held": torch.cuda.memory_allocated(device) / 2**20}
