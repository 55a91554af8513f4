"""CUDA graphs: launching many small kernels anew costs more than they take.

All that capture share one stream of their device: cuBLAS keeps a workspace for each stream that it ever saw (32 MiB
on an H200) and gives none back. With a stream each, a GPU whose memory is short would lose more at every try.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def side_stream() -> torch.cuda.Stream:
    """That of the current device. PyTorch's own for captures belongs to the device that captured first."""
    return _side_stream(torch.cuda.current_device())


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@torch.inference_mode()
def capture(work: Callable, pool=None) -> tuple:
    """(a CUDA graph of work(), what it returned); work() first runs three times: what is set up can't be captured."""
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
