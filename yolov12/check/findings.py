"""Finds problems, which make training impossible, and warnings, which do not.

The functions are pure functions of a `Report`, so tests cover machines that nobody has at hand.
"""

from __future__ import annotations

import re

from yolov12.check.report import AttentionProbe, Cuda, Gpu, Report

__all__ = ["cuda_problem", "format_bytes", "problems", "warnings"]

MIN_FREE_BYTES = 2**30
"""Free GPU memory that PyTorch's kernels and the smallest training step need, 1 GiB."""

MIN_SHM_BYTES = 2**30
"""Free space in /dev/shm below which `warnings` reports a risk for data loader workers, 1 GiB."""

# CUDA major version → the oldest Linux driver that runs every minor version of it:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}

# Compute capabilities of Jetsons. Kernels built for desktop GPUs of the same major version do not run on them:
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility
_TEGRA = {(5, 3), (6, 2), (7, 2), (8, 7)}


def problems(report: Report) -> list[str]:
    """List the reasons why training on `report.devices` cannot work.

    Returns:
        One line for each reason, a cause before its consequences. Empty if training can work.
    """
    found = []
    if report.versions.get("ultralytics") is None:
        found.append(f"Ultralytics is not installed: pip install ultralytics=={report.pinned_ultralytics}")
    wanted = [int(name.partition(":")[2]) for name in report.devices if name.startswith("cuda:")]
    if "mps" in report.devices and not report.host.has_mps:
        return [*found, "device=mps: PyTorch sees no Apple GPU here. device=cpu trains without one"]
    if wanted and (cause := cuda_problem(report)):
        return [*found, cause]
    seen = {gpu.index: gpu for gpu in report.gpus if gpu.index is not None}
    missing = [index for index in wanted if index not in seen]
    if missing:
        there = f"{len(seen)} GPU{'s are' if len(seen) > 1 else ' is'} visible to PyTorch (device={_join(seen)})"
        return [*found, f"device={report.device}: there is no GPU {_join(missing)}, {there}"]
    for index in wanted:
        found += _gpu_problems(seen[index], report.cuda.arch_list)
    for step in report.training:
        if step.failure:
            found.append(f"a small training step in {step.dtype} fails on {step.device}: {step.failure}")
    for probe in report.attention:
        if probe.failure and probe.needed:
            found.append(_broken(probe))
    return found


def warnings(report: Report) -> list[str]:
    """List what may slow training down or stop it later, although it can start.

    Returns:
        One line for each warning.
    """
    found = []
    host, cuda = report.host, report.cuda
    if report.devices == ("cpu",) and report.device != "cpu":
        found.append(f"training runs on the CPU: {cuda_problem(report) or 'no GPU was found'}")
    if host.shm_total_bytes is not None and host.shm_total_bytes < MIN_SHM_BYTES:
        found.append(
            f"/dev/shm has {format_bytes(host.shm_total_bytes)}: data loader workers die with a bus error when it is "
            "full. Start the container with --shm-size=8g or --ipc=host, or train with workers=0"
        )
    elif host.shm_free_bytes is not None and host.shm_free_bytes < MIN_SHM_BYTES:
        found.append(
            f"/dev/shm has only {format_bytes(host.shm_free_bytes)} free: data loader workers die with a bus error "
            "when it is full. Remove what other processes left there, or train with workers=0"
        )
    installed = report.versions.get("ultralytics")
    if installed not in (None, report.pinned_ultralytics):
        found.append(
            f"Ultralytics {installed} is installed, but this package was tested with "
            f"{report.pinned_ultralytics}. Install it: pip install ultralytics=={report.pinned_ultralytics}"
        )
    built_for = _version(cuda.torch_cuda)
    if not cuda.error and built_for and cuda.driver_cuda and cuda.driver_cuda < built_for:
        found.append(
            f"the driver supports CUDA {_dotted(cuda.driver_cuda)}, but PyTorch was built for {cuda.torch_cuda}: "
            "PyTorch's own kernels run, code that torch.compile generates may not. Update the driver if you use compile"
        )
    found += [_broken(probe) for probe in report.attention if probe.failure and not probe.needed]
    return found


def cuda_problem(report: Report) -> str | None:
    """Explain in one line why PyTorch cannot use any GPU, and what to do. None if it can use one."""
    cuda, host = report.cuda, report.host
    if cuda.error is None:
        return None
    if cuda.torch_cuda is None:
        return f"PyTorch {report.versions.get('torch')} was built without CUDA: install a CUDA build of it"
    if not host.has_gpu_device_files and host.in_container:
        return "this container was given no GPU: start it with --gpus all (on a Jetson with --runtime nvidia)"
    if cuda.visible_devices is not None and cuda.visible_devices.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES='{cuda.visible_devices}' hides every GPU: unset it"
    if cuda.driver is None and cuda.driver_cuda is None:
        return f"no NVIDIA driver was found: install one ({_driver_for(cuda)})"
    built_for = _version(cuda.torch_cuda)
    if built_for and cuda.driver_cuda and cuda.driver_cuda[0] < built_for[0]:
        return (
            f"the NVIDIA driver {cuda.driver or ''} is too old: it supports CUDA {_dotted(cuda.driver_cuda)} and "
            f"PyTorch was built for {cuda.torch_cuda}. Update it ({_driver_for(cuda)})"
        ).replace("  ", " ")
    return f"PyTorch cannot use CUDA: {cuda.error}"


def format_bytes(count: int | None) -> str:
    """Format bytes in MiB, or in GiB from 1 GiB on. None gives `unknown`."""
    if count is None:
        return "unknown"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _gpu_problems(gpu: Gpu, arch_list: tuple[str, ...]) -> list[str]:
    found = []
    if gpu.capability and not _has_kernels(gpu.capability, arch_list):
        found.append(
            f"this PyTorch has no kernels for GPU {gpu.index} ({gpu.name}, compute capability "
            f"{_dotted(gpu.capability)}), only for {_join(arch_list)}: install a build of PyTorch that has them"
        )
    if gpu.free_bytes is not None and gpu.free_bytes < MIN_FREE_BYTES:
        largest = sorted(gpu.processes or (), key=lambda process: process.used_bytes or 0, reverse=True)[:3]
        held = [f"{process.name or 'process'} {process.pid}: {format_bytes(process.used_bytes)}" for process in largest]
        found.append(
            f"GPU {gpu.index} ({gpu.name}) has {format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}, "
            f"training needs at least {format_bytes(MIN_FREE_BYTES)}. Free memory, or choose another GPU with device="
            + (f". Other processes hold: {_join(held)}" if held else "")
        )
    return found


def _has_kernels(capability: tuple[int, int], arch_list: tuple[str, ...]) -> bool:
    arches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)f?", arch) for arch in arch_list]
    if not any(arches):
        return True  # PyTorch was not built for NVIDIA GPUs, or does not list its kernels
    for arch in filter(None, arches):
        kind, exact_only, built_for = arch[1], arch[4] or capability in _TEGRA, (int(arch[2]), int(arch[3]))
        if built_for == capability:
            return True
        if kind == "compute" and not arch[4] and built_for < capability:
            return True  # the driver compiles PTX for every newer GPU
        if kind == "sm" and not exact_only and built_for[0] == capability[0] and built_for < capability:
            return True
    return False


def _broken(probe: AttentionProbe) -> str:
    how = f"{probe.backend} ({probe.kernel})" if probe.kernel else probe.backend
    return f"attention in {probe.dtype} through {how} on {probe.device}, for {probe.use}, is broken: {probe.failure}"


def _driver_for(cuda: Cuda) -> str:
    oldest = _OLDEST_DRIVER.get((_version(cuda.torch_cuda) or (0, 0))[0])
    return f"CUDA {cuda.torch_cuda} needs {oldest} or later" if oldest else f"one that supports CUDA {cuda.torch_cuda}"


def _version(text: str | None) -> tuple[int, int] | None:
    numbers = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _join(things: object) -> str:
    return ", ".join(map(str, things))  # type: ignore[call-overload]
