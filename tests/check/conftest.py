"""Reports of simulated machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from yolov12.check.devices import parse_device, resolve_device
from yolov12.check.report import Cuda, Gpu, Host, Report

GIB = 2**30

WHEEL = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA = Cuda("535.161.08", (12, 2), "12.1", WHEEL, None, None)
HOST = Host(16, 128 * GIB, 120 * GIB, False, 8 * GIB, 8 * GIB, True, True)


@pytest.fixture
def h100() -> Gpu:
    return Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB, "NVML", False, 3, "UUID", ())


@pytest.fixture
def t4() -> Gpu:
    return Gpu(0, "Tesla T4", (7, 5), 15 * GIB, 14 * GIB, "NVML", False, 0, "UUID", ())


@pytest.fixture
def machine() -> Callable[..., Report]:
    """Make the report of a working machine with the given GPUs. `cuda`, `host` and `changes` replace fields."""

    def report_on(
        *gpus: Gpu,
        device: str = "0",
        cuda: Mapping[str, object] | None = None,
        host: Mapping[str, object] | None = None,
        **changes: object,
    ) -> Report:
        its_cuda = replace(CUDA, **(cuda or {}))
        report = Report(
            device=device,
            devices=resolve_device(parse_device(device), gpus, its_cuda.visible_devices),
            cuda=its_cuda,
            gpus=gpus,
            attention=(),
            training=(),
            host=replace(HOST, **(host or {})),
            versions={"torch": "2.3.1+cu121", "ultralytics": "8.4.190", "flash-attn": None},
            pinned_ultralytics="8.4.190",
        )
        return replace(report, **changes)

    return report_on
