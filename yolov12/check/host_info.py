"""Reads the host: CPUs, memory, shared memory and installed versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch

from yolov12 import __version__
from yolov12.check.report import Host
from yolov12.mas.memory.cgroups import CGROUPS, MEMBERSHIP, read_cgroup_memory, read_text, usable_cores

__all__ = ["installed_version", "read_cgroup_memory", "read_host", "read_versions"]

# Reported name → distributions that provide it. The first installed one counts.
_DISTRIBUTIONS = {
    "ultralytics": ("ultralytics",),
    "torchvision": ("torchvision",),
    "flash-attn": ("flash-attn",),
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    # TensorRT for RTX is a separate product with nearly the same interface.
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu12-libs", "tensorrt-rtx-cu13-libs"),
}


def read_host() -> Host:
    """Read CPUs, memory and device files of the host, or the limits of this container.

    Returns:
        The readings, memory in bytes. A missing file is not an error.
    """
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    limit, limit_available = read_cgroup_memory() or (total, available)
    shm = _shm()
    return Host(
        cpu_count=usable_cores(CGROUPS, MEMBERSHIP),
        ram_total_bytes=min(total, limit),
        ram_available_bytes=min(available, limit_available),
        ram_limited_by_cgroup=limit < total,
        shm_total_bytes=shm and shm[0],
        shm_free_bytes=shm and shm[1],
        in_container=_in_container(),
        has_gpu_device_files=any(
            any(Path("/dev").glob(pattern)) for pattern in ("nvidia[0-9]*", "nvidiactl", "nvhost-*gpu*", "nvgpu", "dxg")
        ),
        has_mps=torch.backends.mps.is_available(),
    )


def read_versions() -> dict[str, str | None]:
    """Read the versions of this package and of the libraries that it uses, without importing them.

    Returns:
        Name → version. None means: not installed.
    """
    versions: dict[str, str | None] = {
        "yolov12": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "CUDA of torch": torch.version.cuda,
        "cuDNN": _cudnn(),
    }
    return versions | {name: installed_version(name) for name in _DISTRIBUTIONS}


def installed_version(library: str) -> str | None:
    """Read the version of a library without importing it.

    Args:
        library: A name that `read_versions` reports, such as `flash-attn` or `tensorrt`.

    Returns:
        The version of the first distribution that provides the library, or None if none is installed.
    """
    for name in _DISTRIBUTIONS[library]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _cudnn() -> str | None:
    try:
        number: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call,unused-ignore]
    except RuntimeError as error:  # the library path holds another cuDNN version than PyTorch was built with
        return str(error).strip().split("\n")[0]
    if not number:
        return None
    major = number // 10_000 if number >= 90_000 else number // 1000  # 8.9.2 is 8902, 9.1.0 is 90100
    rest = number - major * (10_000 if number >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _shm() -> tuple[int, int] | None:
    try:
        stat = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return None
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def _in_container() -> bool:
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return True
    groups = read_text(Path("/proc/1/cgroup"))
    return any(word in groups for word in ("docker", "kubepods", "containerd", "lxc"))
