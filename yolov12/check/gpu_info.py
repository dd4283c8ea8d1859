"""Reads GPUs, their driver and their memory from NVML. PyTorch is the fallback."""

from __future__ import annotations

import ctypes
import os
import warnings
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch

from yolov12.check.report import Cuda, Gpu, OtherProcess
from yolov12.mas.memory.nvml import ask, driver_api, nvml_session, same_gpu, used_bytes

__all__ = ["read_cuda"]


def read_cuda(ram_available_bytes: int) -> tuple[Cuda, tuple[Gpu, ...]]:
    """Read the driver and the GPUs that PyTorch sees. If PyTorch cannot use CUDA, read the GPUs that NVML sees.

    If NVML answers, no CUDA context is created, so reading does not change the free memory.

    Args:
        ram_available_bytes: Available host memory in bytes, which counts as free memory of an integrated GPU.

    Returns:
        The driver and PyTorch's CUDA, and one entry per GPU.
    """
    error = _torch_cuda_error()
    with nvml_session():
        driver = driver_api()
        cuda = Cuda(
            driver=ask("nvmlSystemGetDriverVersion"),
            driver_cuda=_driver_cuda(driver),
            torch_cuda=torch.version.cuda,
            arch_list=tuple(torch.cuda.get_arch_list()) if error is None else (),
            error=error,
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        )
        if error is None:
            found = [_torch_gpu(index, driver, ram_available_bytes) for index in range(torch.cuda.device_count())]
        else:
            handles = [ask("nvmlDeviceGetHandleByIndex", i) for i in range(ask("nvmlDeviceGetCount") or 0)]
            found = [_nvml_gpu(handle) for handle in handles if handle]
    return cuda, tuple(found)


def _torch_cuda_error() -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns, then raises the same message
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call,unused-ignore]
        except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
            return str(error).strip().split("\n")[0]
    return None


def _torch_gpu(index: int, driver: Any, ram_available_bytes: int) -> Gpu:
    properties: Any = torch.cuda.get_device_properties(index)
    handle, matched_by = same_gpu(index, driver)
    memory = handle and ask("nvmlDeviceGetMemoryInfo", handle)
    integrated = bool(properties.is_integrated)
    if integrated:
        # CUDA and NVML count the page cache in the shared memory as used, but the kernel frees it on demand.
        free, total, source = ram_available_bytes, int(properties.total_memory), "MemAvailable"
    elif memory:
        free, total, source = int(memory.free), int(memory.total), "NVML"
    else:
        free, total = torch.cuda.mem_get_info(index)
        source = "torch.cuda.mem_get_info"
    used = used_bytes(handle) if handle else None
    return Gpu(
        index=index,
        name=properties.name,
        capability=(properties.major, properties.minor),
        total_bytes=total,
        free_bytes=free,
        memory_source=source,
        integrated=integrated,
        nvml_index=ask("nvmlDeviceGetIndex", handle) if handle else None,
        matched_by=matched_by,
        processes=_other_processes(used),
        own_bytes=(used or {}).get(os.getpid()) or 0,
    )


def _nvml_gpu(handle: Any) -> Gpu:
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    capability = ask("nvmlDeviceGetCudaComputeCapability", handle)
    return Gpu(
        index=None,
        name=ask("nvmlDeviceGetName", handle) or "NVIDIA GPU",
        capability=(capability[0], capability[1]) if capability else None,
        total_bytes=memory and int(memory.total),
        free_bytes=memory and int(memory.free),
        memory_source="NVML",
        nvml_index=ask("nvmlDeviceGetIndex", handle),
        processes=_other_processes(used_bytes(handle)),
    )


def _other_processes(used: dict[int, int | None] | None) -> tuple[OtherProcess, ...] | None:
    if used is None:
        return None
    return tuple(
        OtherProcess(pid, _process_name(pid), held) for pid, held in sorted(used.items()) if pid != os.getpid()
    )


def _process_name(pid: int) -> str | None:
    try:
        name: str = psutil.Process(pid).name()
    except psutil.Error:
        return None
    return name


def _driver_cuda(driver: Any) -> tuple[int, int] | None:
    number = ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        number.value = ask("nvmlSystemGetCudaDriverVersion") or 0
    return (number.value // 1000, number.value % 1000 // 10) if number.value else None
