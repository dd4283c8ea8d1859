"""Asks NVML about GPUs, which are identified by PyTorch's index.

Every failure, such as no NVML library or no permission, gives None, which means "unknown".
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from yolov12.mas.memory.reading import Sensors

try:
    import pynvml
except ImportError:
    pynvml = None

__all__ = ["NvmlGpu", "OnceASecond", "ask", "driver_api", "nvml_session", "same_gpu", "used_bytes"]

_T = TypeVar("_T")


def ask(question: str, *arguments: Any) -> Any:
    """Call NVML's function `question`. Return None if NVML is missing, or does not support or permit the call."""
    if pynvml is None:
        return None
    try:
        return getattr(pynvml, question)(*arguments)
    except pynvml.NVMLError:
        return None


@contextlib.contextmanager
def nvml_session() -> Iterator[None]:
    """Keep NVML initialised inside the context. NVML counts the sessions, so they may overlap."""
    running = False
    if pynvml is not None:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            running = True
    try:
        yield
    finally:
        if running:
            pynvml.nvmlShutdown()


def driver_api() -> Any:
    """Load the CUDA driver's library; None if there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    library.cuInit(0)  # if this fails, so do the later calls
    return library


def same_gpu(index: int, driver: Any) -> tuple[Any, str | None]:
    """Find the NVML handle of PyTorch's GPU `index`.

    PyTorch and NVML number the GPUs differently, because of CUDA_VISIBLE_DEVICES and CUDA's own order. PyTorch 2.3
    provides neither the UUID nor the bus id of a GPU. The CUDA driver does, and it numbers GPUs as PyTorch does.

    Args:
        index: PyTorch's index of the GPU.
        driver: Library from `driver_api`.

    Returns:
        The handle and the property that identified it; None and None if it was not found.
    """
    if driver is None:
        return None, None
    device, raw, bus_id = ctypes.c_int(), (ctypes.c_char * 16)(), ctypes.create_string_buffer(32)
    if driver.cuDeviceGet(ctypes.byref(device), index):
        return None, None
    # If a card is partitioned (MIG), the second version of the call gives the UUID of the slice.
    if hasattr(driver, "cuDeviceGetUuid_v2") and not driver.cuDeviceGetUuid_v2(ctypes.byref(raw), device):
        for prefix in ("GPU", "MIG"):
            handle = ask("nvmlDeviceGetHandleByUUID", f"{prefix}-{uuid.UUID(bytes=raw.raw)}")
            if handle:
                return handle, "UUID"
    if not driver.cuDeviceGetPCIBusId(bus_id, len(bus_id), device):
        handle = ask("nvmlDeviceGetHandleByPciBusId", bus_id.value.decode())
        if handle:
            return handle, "PCI bus id"
    return None, None


def used_bytes(handle: Any) -> dict[int, int | None] | None:
    """Read the bytes that each process uses on a GPU.

    Args:
        handle: NVML handle of the GPU.

    Returns:
        Process id → bytes. A value, or the whole result, is None if NVML does not provide it.
    """
    asked = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
    answers = [ask(question, handle) for question in asked]
    if answers[0] is None:
        return None
    return {process.pid: process.usedGpuMemory for answer in answers for process in answer or ()}


class OnceASecond(Generic[_T]):
    """Calls a function at most once a second, and returns the last answer in between.

    Args:
        question: Function to call.
        now_s: Clock, in seconds.
    """

    def __init__(self, question: Callable[..., _T], now_s: Callable[[], float] = time.monotonic) -> None:
        self._question, self._now_s = question, now_s
        self._answer: _T
        self._due_s = float("-inf")

    def __call__(self, *arguments: Any) -> _T:
        """Return the answer, at most one second old. The arguments are passed to the function if it is called."""
        now_s = self._now_s()
        if now_s >= self._due_s:
            self._answer, self._due_s = self._question(*arguments), now_s + 1
        return self._answer


class NvmlGpu:
    """NVML's view of PyTorch's GPU `index`. NVML stays open until the process ends, to keep the handle valid."""

    def __init__(self, index: int) -> None:
        ask("nvmlInit")
        self.handle, self.matched_by = same_gpu(index, driver_api())

    def own_bytes(self) -> int | None:
        """Read the bytes that this process uses on the GPU, including its CUDA context.

        The result is None in most containers: the driver reports the host's process ids there, so this process is not
        found. See github.com/NVIDIA/nvidia-docker/issues/1483.
        """
        return (used_bytes(self.handle) or {}).get(os.getpid()) if self.handle else None

    def busy_percent(self) -> float | None:
        """Read the percentage of the last sample period (1/6 to 1 second) in which a kernel ran."""
        rates = self.handle and ask("nvmlDeviceGetUtilizationRates", self.handle)
        return float(rates.gpu) if rates else None

    def sensors(self) -> Sensors:
        """Read the power of the card and the temperature of its GPU."""
        milliwatts = self.handle and ask("nvmlDeviceGetPowerUsage", self.handle)
        degrees = self.handle and ask("nvmlDeviceGetTemperature", self.handle, 0)  # 0: the GPU itself
        return Sensors(
            power_w=None if milliwatts is None else milliwatts / 1000,
            temperature_c=None if degrees is None else float(degrees),
        )
