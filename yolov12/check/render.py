"""Formats a report as text or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from yolov12.check.findings import format_bytes, problems, warnings
from yolov12.check.report import AttentionProbe, Cuda, Gpu, GpuPackage, Host, Image, Lock, Report, TrainingProbe

__all__ = ["as_json", "as_text", "verdict"]

# Threshold for reporting memory that no visible process uses. Every GPU reserves less than this for itself.
_UNSEEN_BYTES = 2**30


def as_json(report: Report) -> str:
    """Format the report as one JSON object, with memory in bytes and time in milliseconds.

    The keys are the fields of `Report` and, before them, `can_train`, `problems` and `warnings`.
    """
    found = problems(report)
    findings = {"can_train": not found, "problems": found, "warnings": warnings(report)}
    return json.dumps(findings | dataclasses.asdict(report), indent=2)


def as_text(report: Report) -> str:
    """Format the report as text. The last line is the verdict."""
    lines = ["GPU", *_indent(_cuda_lines(report.cuda)), *_indent(line for gpu in report.gpus for line in _gpu(gpu))]
    if report.attention:
        lines += ["Attention", *_indent(line for probe in report.attention for line in _attention(probe))]
    if report.training:
        lines += ["Training step", *_indent(map(_training, report.training))]
    lines += ["Host", *_indent(_host(report.host))]
    lines += ["Versions", *_indent(f"{name:14}{_found(value)}" for name, value in report.versions.items())]
    lines += ["Installation", *_indent(_installation(report))]
    if found := warnings(report):
        lines += ["Warnings", *_indent(found)]
    return "\n".join([*lines, "", verdict(report)])


def verdict(report: Report) -> str:
    """Format one line that says whether training can work, and if not, why."""
    device = f"device={report.device}" if report.device else f"{', '.join(report.devices)} (default device)"
    if found := problems(report):
        return f"Training on {device} cannot work: {'; '.join(found)}"
    return f"Training on {device} can work."


def _cuda_lines(cuda: Cuda) -> Iterator[str]:
    supports = f", supports CUDA {'.'.join(map(str, cuda.driver_cuda))}" if cuda.driver_cuda else ""
    yield f"{'driver':14}{cuda.driver or ('version not available' if cuda.driver_cuda else 'none')}{supports}"
    if cuda.error:
        yield f"{'PyTorch':14}cannot use CUDA: {cuda.error}"


def _gpu(gpu: Gpu) -> Iterator[str]:
    capability = ".".join(map(str, gpu.capability or ())) or "unknown"
    index = "-" if gpu.index is None else str(gpu.index)
    yield f"{index:3}{gpu.name}, compute capability {capability}{', integrated' if gpu.integrated else ''}"
    free, total = format_bytes(gpu.free_bytes), format_bytes(gpu.total_bytes)
    yield f"   {'memory':11}{free} free of {total} ({gpu.memory_source})"
    if gpu.index is None:
        yield f"   {'PyTorch':11}does not see it (nvidia-smi: GPU {gpu.nvml_index})"
    elif gpu.matched_by:
        yield f"   {'nvidia-smi':11}GPU {'?' if gpu.nvml_index is None else gpu.nvml_index} (same {gpu.matched_by})"
    else:
        yield f"   {'nvidia-smi':11}not available"
    if gpu.processes is None:
        yield f"   {'others':11}not available"
        return
    for process in gpu.processes:
        name = process.name or "name not available"
        yield f"   {'others':11}{process.pid:<8}{format_bytes(process.used_bytes):>10}  {name}"
    if not gpu.processes:
        yield f"   {'others':11}no other process"
    seen = gpu.own_bytes + sum(process.used_bytes or 0 for process in gpu.processes)
    unseen = (gpu.total_bytes or 0) - (gpu.free_bytes or 0) - seen
    if unseen > _UNSEEN_BYTES and gpu.memory_source == "NVML":
        yield f"   {'':11}{format_bytes(unseen)} is used by what is not visible here, such as other containers"


def _attention(probe: AttentionProbe) -> Iterator[str]:
    how = f"{probe.backend} ({probe.kernel} kernel)" if probe.kernel else probe.backend
    works = f"BROKEN: {probe.failure}" if probe.failure else f"works, relative error {probe.relative_error:.1e}"
    yield f"{probe.device} {probe.dtype}, {probe.use}: {how}, {works}"
    yield f"   because {probe.reason}"


def _training(step: TrainingProbe) -> str:
    return f"{step.device} {step.dtype}: {step.failure or f'works, {step.step_ms:.0f} ms including device start'}"


def _host(host: Host) -> Iterator[str]:
    limited = " (limit of this container)" if host.ram_limited_by_cgroup else ""
    yield f"{'CPUs':14}{host.cpu_count}"
    available, total = format_bytes(host.ram_available_bytes), format_bytes(host.ram_total_bytes)
    yield f"{'RAM':14}{available} available of {total}{limited}"
    if host.shm_total_bytes is not None:
        yield f"{'/dev/shm':14}{format_bytes(host.shm_free_bytes)} free of {format_bytes(host.shm_total_bytes)}"


def _installation(report: Report) -> Iterator[str]:
    yield f"{'image':14}{_image(report.image) if report.image else 'this is no image of this project'}"
    if report.lock:
        yield f"{'lock':14}{_lock(report.lock)}"
    for package in report.gpu_packages:
        yield f"{package.name:14}{_gpu_package(package)}"


def _image(image: Image) -> str:
    bases = ", ".join(dict.fromkeys(image.bases.values()))
    digest = image.digest or "digest unknown (docker run -e YOLOV12_IMAGE_DIGEST=... tells it)"
    return f"version {image.version}, revision {image.revision or 'unknown'}, built on {bases}, {digest}"


def _lock(lock: Lock) -> str:
    which = f"requirements/{lock.name}.txt, sha256 {lock.sha256[:12]}"
    if not lock.differing:
        return f"{which}: all {lock.locked} distributions have its versions"
    some = ", ".join(f"{name} {version or 'missing'}" for name, version in [*lock.differing.items()][:5])
    return f"{which}: {len(lock.differing)} of {lock.locked} distributions differ, such as {some}"


def _gpu_package(package: GpuPackage) -> str:
    if package.version is None:
        return "not installed"
    return f"{package.version}, {f'BROKEN: {package.failure}' if package.failure else 'can be imported'}"


def _found(version: str | None) -> str:
    return version or "not installed"


def _indent(lines: Iterator[str] | list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
