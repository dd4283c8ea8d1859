"""Launches of Triton kernels that skip Triton's checks of the arguments once a kernel is compiled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from yolov12.mas import compile_ahead
from yolov12.mas.oom import is_out_of_memory

try:
    import triton
except ImportError:  # PyTorch supports platforms that Triton does not
    triton = None

__all__ = ["UNIT", "compiles", "launch", "launches_on", "stream", "unfilled", "unit_of"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

UNIT = 16
"""Largest unit in which kernels are given channels and strides, see `unit_of`."""

_HANDS_OUT_KERNELS = triton is not None and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 4)
# Compiled kernels for aligned tensors. The key has everything for which Triton compiles another kernel.
_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: tuple[int, ...],
    warps: int,
) -> None:
    """Launch a kernel on the current stream of the first tensor's device.

    Triton's checks take 50 to 100 microseconds per launch, and a step has hundreds of launches.

    Args:
        kernel: Kernel whose arguments are the following three groups in order.
        grid: Number of programs along each axis.
        tensors: Tensors. Only the type of the first may vary between launches. With meta tensors, the launch is only
            noted, see `compile_ahead.noted`.
        numbers: Numbers on which the kernel is not specialised.
        constants: Compile-time constants.
        warps: Number of warps of a program.
    """
    device = tensors[0].device
    if device.type == "meta":
        return compile_ahead.note(kernel, tensors, numbers, constants, warps)
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, constants, warps)
    addresses = [tensor.data_ptr() for tensor in tensors]
    # Triton compiles another kernel for a tensor that is not aligned to 16 bytes.
    aligned = not any(address & 15 for address in addresses)
    key = kernel, device.index, tensors[0].dtype, constants
    if aligned and (known := _compiled.get(key)) is not None:
        known.run(
            *grid, stream(device), known.function, known.packed_metadata, None, None, None,
            *addresses, *numbers, *constants,
        )  # fmt: skip
        return None
    compile_ahead.wait_for(kernel, tensors[0].dtype, constants)
    found = kernel[grid](*tensors, *numbers, *constants, num_warps=warps)
    if _HANDS_OUT_KERNELS and aligned:
        _compiled[key] = found
    return None


def compiles(run: Callable[[], object], otherwise: str | None = None) -> bool:
    """Return whether kernels compile and run.

    Args:
        run: Runs the kernels once, on small tensors.
        otherwise: What happens without them, for a warning that gives the reason; None to log nothing.

    Raises:
        RuntimeError: There was not enough memory, which tells nothing about the kernels.
    """
    try:
        run()
    except Exception as error:  # the type depends on what is missing: compiler, headers, or support for the card
        if is_out_of_memory(error):
            raise
        if otherwise is not None:
            logging.getLogger("yolov12.mas").warning("%s, as Triton does not compile: %s", otherwise, error)
        return False
    return True


def launches_on(device: torch.device) -> bool:
    """Return whether `launch` takes tensors of a device."""
    return device.type in ("cuda", "meta")


def stream(device: torch.device) -> int:
    """Return the address of the device's current stream; 0 for meta tensors, see `launch`."""
    if device.type == "meta":
        return 0
    if _HANDS_OUT_KERNELS:  # Triton's own way; several times faster than a stream object
        return int(triton.runtime.driver.active.get_current_stream(device.index))
    return int(torch.cuda.current_stream(device).cuda_stream)


def unfilled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function make tensors that are not filled, because its kernels write all of them.

    In deterministic mode, which is Ultralytics' default, PyTorch fills every tensor that `torch.empty` makes. That is
    a launch and a pass over memory for each.

    Args:
        function: Function that makes tensors and launches kernels.
    """
    mode: Any = torch.utils.deterministic

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not (torch.are_deterministic_algorithms_enabled() and mode.fill_uninitialized_memory):
            return function(*args, **kwargs)
        mode.fill_uninitialized_memory = False
        try:
            return function(*args, **kwargs)
        finally:
            mode.fill_uninitialized_memory = True

    return run


def unit_of(*sizes: int) -> int:
    """Return the largest power of two, at most `UNIT`, that divides all sizes.

    A kernel that is given sizes as multiples of this constant can load several values at once.
    """
    bits = UNIT
    for size in sizes:
        bits |= size
    return bits & -bits
