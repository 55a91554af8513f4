"""CUDA graphs: replaying one graph is cheaper than launching its many small kernels anew.

All captures on a device share one stream: cuBLAS keeps a workspace for each stream that it ever saw
(32 MiB on an H200) and never frees it. With a stream each, a GPU that is short of memory would lose
more at every try.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def side_stream() -> torch.cuda.Stream:
    """The capture stream of the current device; PyTorch's own belongs to the first that captured."""
    return _side_stream(torch.cuda.current_device())


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@torch.inference_mode()
def capture(work: Callable, pool=None) -> tuple:
    """Capture work(). Returns (the CUDA graph, the output of work(), which each replay overwrites).

    work() runs three times first, because what it sets up (cuBLAS handles, caches) can't be
    captured.
    """
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: threads that prepare the next clip may allocate pinned memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = work()
    return graph, output
