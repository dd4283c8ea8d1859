"""Compiles Triton kernels for `compile_ahead`, in a process that uses neither PyTorch nor the GPU.

PyTorch would take seconds and 300 MB in each of these processes, and a CUDA context memory of the GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

__all__ = ["COMPILED", "FAILED", "main"]

COMPILED, FAILED = "yolov12: compiled\n", "yolov12: failed\n"

_PATIENCE_S = 300
"""The process ends after this time, so that nobody waits for a compiler that hangs."""


class _Type:
    """Stands in for a `torch.dtype`, of which Triton reads only the name."""

    def __init__(self, name: str) -> None:
        self._name = f"torch.{name}"

    def __repr__(self) -> str:
        return self._name


class _Tensor:
    """Stands in for an aligned tensor."""

    def __init__(self, dtype: _Type) -> None:
        self.dtype = dtype

    @staticmethod
    def data_ptr() -> int:
        """Return an address that is a multiple of 16."""
        return 0

    @staticmethod
    def ptr_range() -> int:
        """Return a number of bytes below 2 GiB."""
        return 0


class _Driver:
    """Tells Triton for which card to compile."""

    binary_ext, CUDA, backend, utils = "cubin", 0, 0, None

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        """Return the card."""
        return self._target

    @staticmethod
    def get_current_device() -> int:
        """Return the number of the card, which does not matter here."""
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        """Return the stream for a launch that does not happen."""
        return device


def main() -> None:
    """Compile the kernels that are given on the standard input, and write `COMPILED` or `FAILED` after each."""
    signal.alarm(_PATIENCE_S)
    given = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what compilers print
    # The kernels' modules ask whether PyTorch is for ROCm, for which nothing is compiled ahead.
    stand_in: Any = SimpleNamespace(version=SimpleNamespace(hip=None))
    sys.modules.setdefault("torch", stand_in)
    _use_card(given["capability"])
    types: dict[str, _Type] = {}
    for module, name, names, numbers, constants, warps in given["kernels"]:
        try:
            kernel = getattr(importlib.import_module(module), name)
            tensors = [_Tensor(types.setdefault(each, _Type(each))) for each in names]
            compiled = kernel.run(*tensors, *numbers, *constants, num_warps=warps, grid=(1, 1, 1), warmup=True)
            _make_launcher(compiled)
        except Exception:  # the first launch tells what is missing
            os.write(out, FAILED.encode())
        else:
            os.write(out, COMPILED.encode())


def _use_card(capability: int) -> None:
    from triton.runtime import driver

    if _triton_version() < 3:
        driver._obj = _Driver(("cuda", capability))
    else:
        from triton.backends.compiler import GPUTarget

        driver.set_active(_Driver(GPUTarget("cuda", capability, 32)))


def _make_launcher(compiled: Any) -> None:
    """Compile the C code that launches a kernel. Triton 2 has done it."""
    if _triton_version() >= 3:
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        CudaUtils()
        CudaLauncher(compiled.src, compiled.metadata)


def _triton_version() -> int:
    import triton

    return int(triton.__version__.split(".")[0])
