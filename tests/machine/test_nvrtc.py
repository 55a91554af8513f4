"""nvrtc.py: CUDA C++ compiled while the program runs."""

import pytest
import torch

from machine import nvrtc

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles for a CUDA device")
SOURCE = """
extern "C" __global__ void scale(const float* x, float* y, const float* more, int n, float factor) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = factor * x[i] + ADDED + (more ? more[i] : 0.f);
}
"""


def test_without_the_library_an_error_names_it(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    with pytest.raises(OSError, match=r"libnvrtc\.so\.99 was not found"):
        nvrtc.compile_to_cubin(SOURCE, [])


@needs_gpu
def test_a_kernel_gets_tensors_null_ints_and_floats():
    kernel = nvrtc.build(SOURCE, "scale", {"ADDED": 3})
    x, y = torch.randn(1000, device="cuda"), torch.full((1001,), -1.0, device="cuda")
    kernel((4, 1, 1), 256, x, y, None, 1000, 0.5)
    assert torch.equal(y[:1000], 0.5 * x + 3) and y[1000] == -1
    kernel((4, 1, 1), 256, x, y, x, 1000, 1.0)
    assert torch.allclose(y[:1000], 2 * x + 3)


@needs_gpu
def test_what_the_compiler_refuses_is_told():
    with pytest.raises(RuntimeError, match="ADDED"):
        nvrtc.build(SOURCE, "scale", {})
