"""The GPU readers, with a simulated driver and NVML, and with the GPU of this machine."""

import os
import uuid
from types import SimpleNamespace

import pynvml
import pytest
import torch

from yolov12 import check
from yolov12.check import gpu_info
from yolov12.check.report import OtherProcess

GIB = 2**30

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")


class FakeDriver:
    """A libcuda that numbers two GPUs in another order than NVML does."""

    uuids = (uuid.UUID(int=7), uuid.UUID(int=8))

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0

    def cuDeviceGetUuid_v2(self, raw, device):
        raw._obj.raw = self.uuids[device.value].bytes
        return 0

    def cuDeviceGetPCIBusId(self, bus_id, length, device):
        bus_id.value = b"0000:0%d:00.0" % device.value
        return 0

    def cuDriverGetVersion(self, number):
        number._obj.value = 12020
        return 0


@pytest.fixture
def two_gpus(monkeypatch):
    """Simulate two GPUs. Returns function name → answer of NVML."""
    card = SimpleNamespace(name="Card", major=8, minor=0, is_integrated=0, total_memory=8 * GIB)
    for name, value in (
        ("init", lambda: None),
        ("device_count", lambda: 2),
        ("get_device_properties", lambda index: card),
        ("get_arch_list", lambda: ["sm_80"]),
        ("mem_get_info", lambda index: (3 * GIB, 8 * GIB)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_info, "driver_api", FakeDriver)
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "535.1",
        "nvmlDeviceGetHandleByUUID": {f"GPU-{uuid.UUID(int=8)}": "nvml0", f"MIG-{uuid.UUID(int=7)}": "nvml1"}.get,
        "nvmlDeviceGetIndex": lambda handle: int(handle[-1]),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(free=5 * GIB, total=8 * GIB),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
            SimpleNamespace(pid=2**30, usedGpuMemory=None),
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB),
        ],
    }

    def answer(name, *arguments):
        if name not in answers:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return answers[name](*arguments)

    for name in [name for name in dir(pynvml) if name.startswith(("nvmlDeviceGet", "nvmlSystemGet", "nvmlInit"))]:
        monkeypatch.setattr(pynvml, name, lambda *arguments, name=name: answer(name, *arguments))
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    return answers


def test_gpus_are_matched_by_uuid_where_the_orders_differ(two_gpus):
    cuda, gpus = gpu_info.read_cuda(0)
    assert cuda.driver == "535.1"
    assert cuda.driver_cuda == (12, 2)
    assert [(one.index, one.nvml_index, one.matched_by) for one in gpus] == [(0, 1, "UUID"), (1, 0, "UUID")]
    assert (gpus[0].free_bytes, gpus[0].memory_source) == (5 * GIB, "NVML")
    assert gpus[0].processes == (OtherProcess(2**30, None, None),)
    assert gpus[0].own_bytes == GIB


def test_gpus_are_matched_by_bus_id_without_uuid(two_gpus):
    del two_gpus["nvmlDeviceGetHandleByUUID"]
    two_gpus["nvmlDeviceGetHandleByPciBusId"] = {"0000:00:00.0": "nvml1", "0000:01:00.0": "nvml0"}.get
    _, gpus = gpu_info.read_cuda(0)
    assert [(one.nvml_index, one.matched_by) for one in gpus] == [(1, "PCI bus id"), (0, "PCI bus id")]


def test_nvml_that_refuses_everything(two_gpus):
    two_gpus.clear()
    cuda, gpus = gpu_info.read_cuda(0)
    assert cuda.driver is None
    assert (gpus[0].free_bytes, gpus[0].memory_source) == (3 * GIB, "torch.cuda.mem_get_info")
    assert gpus[0].matched_by is None
    assert gpus[0].processes is None


def test_integrated_gpu_has_what_the_host_has_available(two_gpus):
    torch.cuda.get_device_properties(0).is_integrated = 1
    _, gpus = gpu_info.read_cuda(ram_available_bytes=6 * GIB)
    assert (gpus[0].free_bytes, gpus[0].memory_source, gpus[0].integrated) == (6 * GIB, "MemAvailable", True)


def test_gpus_that_pytorch_cannot_use_are_listed(two_gpus, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(torch.cuda, "init", init)
    two_gpus |= {
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: "nvml0",
        "nvmlDeviceGetName": lambda handle: "Tesla T4",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (7, 5),
    }
    cuda, (card,) = gpu_info.read_cuda(0)
    assert cuda.error == "The NVIDIA driver on your system is too old"
    assert (card.index, card.name, card.capability) == (None, "Tesla T4", (7, 5))


@pytest.mark.gpu
@needs_gpu
def test_gpu_0_of_this_machine():
    report = check.read_report("0")
    assert report.devices == ("cuda:0",)
    assert report.gpus[0].total_bytes >= report.gpus[0].free_bytes > 0
    assert report.cuda.driver_cuda
