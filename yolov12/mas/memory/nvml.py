"""Asks NVML about the GPUs that PyTorch numbers. Every failure, from no NVML to no permission, means "not known"."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

try:
    import pynvml
except ImportError:
    pynvml = None

__all__ = ["NvmlGpu", "OnceASecond", "ask", "driver_api", "nvml_session", "same_gpu", "used_bytes"]

_T = TypeVar("_T")


def ask(question: str, *arguments: Any) -> Any:
    """Call NVML's function `question`; None where it is not supported, not permitted, or there is no NVML at all."""
    if pynvml is None:
        return None
    try:
        return getattr(pynvml, question)(*arguments)
    except pynvml.NVMLError:
        return None


@contextlib.contextmanager
def nvml_session() -> Iterator[None]:
    """Hold NVML open for a while. NVML counts the sessions, so they may overlap."""
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
    """Load the CUDA driver's library; None where there is none."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    library.cuInit(0)  # where this fails, so do the calls after it
    return library


def same_gpu(index: int, driver: Any) -> tuple[Any, str | None]:
    """Find the NVML handle of PyTorch's GPU `index`: CUDA_VISIBLE_DEVICES and CUDA's order make the indices differ.

    PyTorch 2.3 tells neither UUID nor bus id, so the CUDA driver is asked, which counts as PyTorch does.

    Args:
        index: As PyTorch counts.
        driver: What `driver_api` gave.

    Returns:
        The handle and what it was matched by, or None and None.
    """
    if driver is None:
        return None, None
    device, raw, bus_id = ctypes.c_int(), (ctypes.c_char * 16)(), ctypes.create_string_buffer(32)
    if driver.cuDeviceGet(ctypes.byref(device), index):
        return None, None
    # The second version of the call gives the UUID of the slice where a card is cut up (MIG).
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
    """Read what each process holds of a GPU, by pid; None for a figure, or for all, that NVML does not tell."""
    asked = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
    answers = [ask(question, handle) for question in asked]
    if answers[0] is None:
        return None
    return {process.pid: process.usedGpuMemory for answer in answers for process in answer or ()}


class OnceASecond(Generic[_T]):
    """A question that is asked at most once a second; in between the last answer is given.

    Args:
        question: What to ask.
        now_s: A clock, in seconds.
    """

    def __init__(self, question: Callable[..., _T], now_s: Callable[[], float] = time.monotonic) -> None:
        self._question, self._now_s = question, now_s
        self._answer: _T
        self._due_s = float("-inf")

    def __call__(self, *arguments: Any) -> _T:
        """Return the answer, at most a second old."""
        now_s = self._now_s()
        if now_s >= self._due_s:
            self._answer, self._due_s = self._question(*arguments), now_s + 1
        return self._answer


class NvmlGpu:
    """What NVML tells of PyTorch's GPU `index`. NVML stays open until the process ends, for the handle's sake."""

    def __init__(self, index: int) -> None:
        ask("nvmlInit")
        self.handle, self.matched_by = same_gpu(index, driver_api())

    def own_bytes(self) -> int | None:
        """Read what this process holds, its CUDA context included.

        None, too, in a container: most drivers tell the host's process numbers there, so this process is not found.
        See github.com/NVIDIA/nvidia-docker/issues/1483.
        """
        return (used_bytes(self.handle) or {}).get(os.getpid()) if self.handle else None

    def busy_percent(self) -> float | None:
        """Read the share of the last sample period (1/6 to 1 second) in which a kernel ran."""
        rates = self.handle and ask("nvmlDeviceGetUtilizationRates", self.handle)
        return float(rates.gpu) if rates else None
