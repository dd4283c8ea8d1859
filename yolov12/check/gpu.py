"""Reads GPUs, their driver and their memory: NVML where it answers, PyTorch where it does not."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped,unused-ignore]
import pynvml
import torch

from yolov12.check.report import Cuda, Gpu, Process

__all__ = ["read_cuda"]

_T = TypeVar("_T")


def read_cuda(ram_available_bytes: int) -> tuple[Cuda, tuple[Gpu, ...]]:
    """Read the driver and all GPUs that PyTorch sees, or if it sees none those that NVML sees.

    No CUDA context is made where NVML answers, so that reading takes none of the memory it reads.

    Args:
        ram_available_bytes: What an integrated GPU has free.
    """
    error = _torch_cuda_error()
    with _nvml():
        driver_api = _driver_api()
        cuda = Cuda(
            driver=_ask(pynvml.nvmlSystemGetDriverVersion),
            driver_cuda=_driver_cuda(driver_api),
            torch_cuda=torch.version.cuda,
            arch_list=tuple(torch.cuda.get_arch_list()) if error is None else (),
            error=error,
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )
        if error is None:
            found = [_torch_gpu(index, driver_api, ram_available_bytes) for index in range(torch.cuda.device_count())]
        else:
            handles = [_ask(pynvml.nvmlDeviceGetHandleByIndex, i) for i in range(_ask(pynvml.nvmlDeviceGetCount) or 0)]
            found = [_nvml_gpu(handle) for handle in handles if handle]
    return cuda, tuple(found)


def _torch_cuda_error() -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of the same thing first
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call,unused-ignore]
        except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
            return str(error).strip().split("\n")[0]
    return None


def _torch_gpu(index: int, driver_api: Any, ram_available_bytes: int) -> Gpu:
    properties: Any = torch.cuda.get_device_properties(index)
    handle, matched_by = _same_gpu(index, driver_api)
    memory = handle and _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    integrated = bool(properties.is_integrated)
    if integrated:
        # CUDA and NVML count the page cache of the shared memory as used; the kernel gives it up on demand.
        free, total, source = ram_available_bytes, int(properties.total_memory), "MemAvailable"
    elif memory:
        free, total, source = int(memory.free), int(memory.total), "NVML"
    else:
        free, total = torch.cuda.mem_get_info(index)
        source = "torch.cuda.mem_get_info"
    used_bytes = _used_bytes(handle) if handle else None
    return Gpu(
        index=index,
        name=properties.name,
        capability=(properties.major, properties.minor),
        total_bytes=total,
        free_bytes=free,
        memory_source=source,
        integrated=integrated,
        nvml_index=_ask(pynvml.nvmlDeviceGetIndex, handle) if handle else None,
        matched_by=matched_by,
        processes=_others(used_bytes),
        own_bytes=(used_bytes or {}).get(os.getpid()) or 0,
    )


def _nvml_gpu(handle: Any) -> Gpu:
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    capability = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Gpu(
        index=None,
        name=_ask(pynvml.nvmlDeviceGetName, handle) or "NVIDIA GPU",
        capability=(capability[0], capability[1]) if capability else None,
        total_bytes=memory and int(memory.total),
        free_bytes=memory and int(memory.free),
        memory_source="NVML",
        nvml_index=_ask(pynvml.nvmlDeviceGetIndex, handle),
        processes=_others(_used_bytes(handle)),
    )


def _used_bytes(handle: Any) -> dict[int, int | None] | None:
    asked = (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses)
    answers = [_ask(ask, handle) for ask in asked]
    if answers[0] is None:
        return None
    return {process.pid: process.usedGpuMemory for answer in answers for process in answer or ()}


def _others(used_bytes: dict[int, int | None] | None) -> tuple[Process, ...] | None:
    if used_bytes is None:
        return None
    return tuple(
        Process(pid, _process_name(pid), used) for pid, used in sorted(used_bytes.items()) if pid != os.getpid()
    )


def _process_name(pid: int) -> str | None:
    try:
        name: str = psutil.Process(pid).name()
    except psutil.Error:
        return None
    return name


def _same_gpu(index: int, driver_api: Any) -> tuple[Any, str | None]:
    """Find the NVML handle of PyTorch's GPU `index`: CUDA_VISIBLE_DEVICES and CUDA's order make the indices differ.

    PyTorch 2.3 tells neither UUID nor bus id, so the CUDA driver is asked, which counts as PyTorch does.
    """
    if driver_api is None:
        return None, None
    device, raw, bus_id = ctypes.c_int(), (ctypes.c_char * 16)(), ctypes.create_string_buffer(32)
    if driver_api.cuDeviceGet(ctypes.byref(device), index):
        return None, None
    # The second version of the call gives the UUID of the slice where a card is cut up (MIG).
    if hasattr(driver_api, "cuDeviceGetUuid_v2") and not driver_api.cuDeviceGetUuid_v2(ctypes.byref(raw), device):
        for prefix in ("GPU", "MIG"):
            handle = _ask(pynvml.nvmlDeviceGetHandleByUUID, f"{prefix}-{uuid.UUID(bytes=raw.raw)}")
            if handle:
                return handle, "UUID"
    if not driver_api.cuDeviceGetPCIBusId(bus_id, len(bus_id), device):
        handle = _ask(pynvml.nvmlDeviceGetHandleByPciBusId, bus_id.value.decode())
        if handle:
            return handle, "PCI bus id"
    return None, None


def _driver_api() -> Any:
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    library.cuInit(0)  # where this fails, so do the calls after it
    return library


def _driver_cuda(driver_api: Any) -> tuple[int, int] | None:
    number = ctypes.c_int()
    if driver_api is None or driver_api.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        number.value = _ask(pynvml.nvmlSystemGetCudaDriverVersion) or 0
    return (number.value // 1000, number.value % 1000 // 10) if number.value else None


@contextlib.contextmanager
def _nvml() -> Iterator[None]:
    running = False
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        running = True
    try:
        yield
    finally:
        if running:
            pynvml.nvmlShutdown()


def _ask(question: Callable[..., _T], *arguments: Any) -> _T | None:
    try:
        return question(*arguments)
    except pynvml.NVMLError:  # not supported, not permitted, or no NVML at all
        return None
