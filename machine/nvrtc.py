"""CUDA C++ compiled while the program runs, by NVRTC, the library that PyTorch's CUDA build includes.

    kernel = build(source, "product", {"ROWS": 2}, shared=90_000)      # for the current device
    kernel((blocks, 1, 1), 256, x, weights, None, rows, 1.5)           # tensors, None = null, int, float

Needs neither a C compiler, as Triton does, nor a CUDA toolkit, as torch.cuda._compile_kernel does.
"""

import ctypes
from pathlib import Path

import torch

MAX_DYNAMIC_SHARED = 8       # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES in CUDA's driver interface


def build(source: str, name: str, defines: dict[str, int], shared: int = 0) -> "Kernel":
    """The kernel `name` (extern "C") of this source, for the current device.

    defines: preprocessor names; shared: bytes of dynamic shared memory that each launch gets.
    """
    major, minor = torch.cuda.get_device_capability()
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", "--restrict",
               *(f"-D{key}={value}" for key, value in defines.items())]
    return Kernel(compile_to_cubin(source, options), name, shared)


def compile_to_cubin(source: str, options: list[str]) -> bytes:
    """Machine code of this source; RuntimeError with the compiler's log when it is refused."""
    nvrtc, program, size = nvrtc_library(), ctypes.c_void_p(), ctypes.c_size_t()

    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")

    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        flags = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        if nvrtc.nvrtcCompileProgram(program, len(options), flags):
            check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            text = ctypes.create_string_buffer(size.value)
            check(nvrtc.nvrtcGetProgramLog(program, text))
            raise RuntimeError(f"NVRTC: {text.value.decode(errors='replace').strip()}")
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def nvrtc_library() -> ctypes.CDLL:
    """NVRTC of PyTorch's own CUDA version; OSError where there is none."""
    major = str(torch.version.cuda).partition(".")[0]
    name = f"libnvrtc.so.{major}"
    # PyTorch's wheel has CUDA's beside it or inside
    site = Path(torch.__file__).parents[1]
    for folder in (*sorted(site.glob("nvidia/*/lib")), site / "torch" / "lib", None):
        try:
            for part in sorted(folder.glob(f"libnvrtc-builtins.so.{major}*")) if folder else ():
                ctypes.CDLL(str(part))                 # NVRTC itself looks elsewhere for it
            nvrtc = ctypes.CDLL(str(folder / name) if folder else name)
        except OSError:
            continue
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        return nvrtc
    raise OSError(f"{name} was not found beside PyTorch")


class Kernel:
    """A loaded kernel, launched in PyTorch's current stream."""

    def __init__(self, code: bytes, name: str, shared: int):
        self.driver, self.shared = ctypes.CDLL("libcuda.so.1"), shared
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        torch.cuda.current_stream().synchronize()      # makes the device's context current
        self.check(self.driver.cuModuleLoadData(ctypes.byref(module), code))
        self.check(self.driver.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()))
        if shared:
            self.check(self.driver.cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED, shared))

    def __call__(self, grid: tuple[int, int, int], threads: int, *arguments) -> None:
        """arguments as the kernel declares them: pointers (tensors or None), int, float."""
        values = [as_c(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.check(self.driver.cuLaunchKernel(
            self.function, *grid, threads, 1, 1, self.shared, stream, addresses, None))

    def check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()} ({status})")


def as_c(value: torch.Tensor | int | float | None) -> ctypes._SimpleCData:
    """A tensor or None as a pointer, an int as int, a float as float."""
    if isinstance(value, int):
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())
