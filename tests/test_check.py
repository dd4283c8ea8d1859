"""`yolov12 check`: invented machines are judged, this one is read."""

import json
import os
import uuid
from dataclasses import replace
from types import SimpleNamespace

import pynvml
import pytest
import torch

from yolov12 import check
from yolov12.check import gpu, host, probe, problems, warnings
from yolov12.check.devices import parse_device, resolve_device
from yolov12.check.render import as_json, as_text, verdict
from yolov12.check.report import Attention, Cuda, Gpu, Host, Process, Report, TrainingStep
from yolov12.errors import ConfigError

GIB = 2**30

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB, "NVML", False, 3, "UUID", ())
T4 = Gpu(0, "Tesla T4", (7, 5), 15 * GIB, 14 * GIB, "NVML", False, 0, "UUID", ())
ORIN = Gpu(0, "Orin", (8, 7), 30 * GIB, 21 * GIB, "MemAvailable", integrated=True)
WHEEL = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
WORKING = Cuda("535.161.08", (12, 2), "12.1", WHEEL, None, None)
NO_CUDA = replace(WORKING, arch_list=(), error="No CUDA GPUs are available")
HOST = Host(16, 128 * GIB, 120 * GIB, False, 8 * GIB, 8 * GIB, True, True)
NO_DRIVER = replace(NO_CUDA, driver=None, driver_cuda=None, error="Found no NVIDIA driver on your system.")


def machine(*gpus: Gpu, device: str = "0", cuda: Cuda = WORKING, host: Host = HOST, **changes: object) -> Report:
    report = Report(
        device=device,
        devices=resolve_device(parse_device(device), gpus, cuda.visible_devices),
        cuda=cuda,
        gpus=gpus,
        attention=(),
        training=(),
        host=host,
        versions={"torch": "2.3.1+cu121", "ultralytics": "8.4.190", "flash-attn": None},
        pinned_ultralytics="8.4.190",
    )
    return replace(report, **changes)


def only_problem(report: Report) -> str:
    (problem,) = problems(report)
    assert "\n" not in problem
    assert as_text(report).splitlines()[-1].endswith(problem)
    return problem


# Judgement


def test_h100_can_train_and_gives_no_warning():
    report = machine(H100)
    assert problems(report) == []
    assert warnings(report) == []
    assert verdict(report) == "Training on device=0 can work."
    assert "GPU 3 (same UUID)" in as_text(report)


def test_old_driver_is_named_with_what_it_supports_and_what_is_needed():
    old = replace(NO_CUDA, driver="450.80.02", driver_cuda=(11, 0), error="The NVIDIA driver on your system is too old")
    report = machine(replace(T4, index=None), cuda=old)
    problem = only_problem(report)
    for word in ("450.80.02", "11.0", "12.1", "525.60.13"):
        assert word in problem
    assert "Tesla T4" in as_text(report)


def test_driver_of_an_earlier_minor_version_is_a_warning():
    report = machine(T4, cuda=replace(WORKING, driver="525.60.13", driver_cuda=(12, 0)))
    assert problems(report) == []
    (warning,) = warnings(report)
    assert "12.0" in warning


@pytest.mark.parametrize(
    ("cuda", "host", "says"),
    [
        (replace(NO_CUDA, torch_cuda=None), HOST, "built without CUDA"),
        (NO_DRIVER, replace(HOST, has_gpu_device_files=False), "--gpus all"),
        (NO_DRIVER, replace(HOST, has_gpu_device_files=False, in_container=False), "no NVIDIA driver"),
        (NO_DRIVER, HOST, "no NVIDIA driver"),
        (replace(NO_CUDA, visible_devices=""), HOST, "CUDA_VISIBLE_DEVICES=''"),
        (replace(NO_CUDA, error="CUDA unknown error"), HOST, "CUDA unknown error"),
    ],
)
def test_no_cuda_is_told_apart(cuda, host, says):
    assert says in only_problem(machine(cuda=cuda, host=host))


def test_without_a_gpu_the_default_is_the_cpu_and_a_warning_says_why():
    report = machine(device="", cuda=NO_DRIVER, host=replace(HOST, has_gpu_device_files=False))
    assert report.devices == ("cpu",)
    assert problems(report) == []
    (warning,) = warnings(report)
    assert "--gpus all" in warning


def test_cpu_by_choice_is_no_warning():
    assert warnings(machine(device="cpu", cuda=NO_DRIVER)) == []


def test_gpu_that_is_not_there():
    problem = only_problem(machine(H100, replace(H100, index=1), device="7"))
    assert "7" in problem
    assert "2 GPUs are visible" in problem
    assert "0, 1" in problem


def test_mps_that_is_not_there():
    assert "Apple" in only_problem(machine(device="mps"))
    assert problems(machine(device="mps", host=replace(HOST, has_mps=True))) == []


@pytest.mark.parametrize(
    ("capability", "arch_list", "works"),
    [
        ((8, 9), WHEEL, True),  # an Ada card runs what is built for 8.6
        ((12, 0), WHEEL, False),
        ((12, 0), (*WHEEL, "compute_90"), True),  # PTX
        ((3, 7), WHEEL, False),
        ((8, 7), WHEEL, False),  # desktop kernels do not run on a Jetson
        ((8, 7), ("sm_87",), True),
        ((12, 1), ("sm_120",), True),
        ((10, 0), ("sm_90a", "compute_90a"), False),
        ((9, 0), (), True),
    ],
)
def test_kernels_for_the_gpu(capability, arch_list, works):
    report = machine(replace(H100, capability=capability), cuda=replace(WORKING, arch_list=arch_list))
    assert (problems(report) == []) == works


def test_full_gpu_names_who_holds_its_memory():
    others = (Process(7, None, 100), Process(4120, "python", 13 * GIB))
    problem = only_problem(machine(replace(T4, free_bytes=600 * 2**20, processes=others)))
    assert "600 MiB free of 15.0 GiB" in problem
    assert "python 4120: 13.0 GiB" in problem


def test_each_of_several_gpus_is_judged():
    busy = replace(H100, index=1, free_bytes=0)
    assert problems(machine(H100, busy, device="0")) == []
    assert "GPU 1" in only_problem(machine(H100, busy, device="0,1"))


def test_jetson_without_nvml():
    report = machine(ORIN, cuda=replace(WORKING, driver=None, driver_cuda=(12, 2), arch_list=("sm_87",)))
    assert problems(report) == []
    text = as_text(report)
    assert "integrated" in text
    assert "others     not available" in text
    assert "version not available, supports CUDA 12.2" in text


def test_memory_that_no_visible_process_holds_is_mentioned():
    assert "other containers" in as_text(machine(replace(H100, free_bytes=40 * GIB)))
    assert "other containers" not in as_text(machine(H100))
    assert "other containers" not in as_text(machine(replace(H100, free_bytes=40 * GIB, own_bytes=39 * GIB)))


def test_small_shared_memory():
    (warning,) = warnings(machine(H100, host=replace(HOST, shm_total_bytes=64 * 2**20, shm_free_bytes=64 * 2**20)))
    assert "64 MiB" in warning
    assert "--shm-size=8g or --ipc=host" in warning
    (warning,) = warnings(machine(H100, host=replace(HOST, shm_free_bytes=0)))
    assert "0 MiB free" in warning


def test_ultralytics_missing_or_another():
    assert "pip install ultralytics==8.4.190" in only_problem(machine(H100, versions={"ultralytics": None}))
    (warning,) = warnings(machine(H100, versions={"ultralytics": "8.3.0"}))
    assert "8.3.0" in warning


def test_failed_training_step_and_broken_attention():
    step = TrainingStep("cuda:0", "fp16", None, "RuntimeError: no kernel image is available")
    assert "no kernel image" in only_problem(machine(H100, training=(step,)))
    broken = Attention("cuda:0", "fp16", "training", True, "sdpa", "why", "flash", 0.5, "it is off by 0.5")
    assert "sdpa (flash)" in only_problem(machine(H100, attention=(broken,)))
    unused = machine(H100, attention=(replace(broken, needed=False),))
    assert problems(unused) == []
    assert "BROKEN" in as_text(unused)
    assert len(warnings(unused)) == 1


def test_json_holds_the_report_and_the_judgement():
    told = json.loads(as_json(machine(replace(T4, processes=(Process(1, "x", 5),)), device="7")))
    assert told["can_train"] is False
    assert len(told["problems"]) == 1
    assert told["gpus"][0]["free_bytes"] == 14 * GIB
    assert told["gpus"][0]["processes"] == [{"pid": 1, "name": "x", "used_bytes": 5}]


# device=


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ()),
        ("None", ()),
        ("CPU", "cpu"),
        ("mps:0", "mps"),
        ("0", (0,)),
        ("cuda", (0,)),
        ("cuda:1", (1,)),
        ("[0, 1]", (0, 1)),
        ("0,,01", (0, 1)),
        ("-1,-1", (-1, -1)),
    ],
)
def test_device_grammar(text, wanted):
    assert parse_device(text) == wanted


@pytest.mark.parametrize("text", ["gpu", "0;1", "-2", "cuda:x", "0,cpu", "1,1", "xpu"])
def test_malformed_device(text):
    with pytest.raises(ConfigError, match="device="):
        parse_device(text)


def test_device_resolution():
    gpus = [H100, replace(H100, index=1, free_bytes=80 * GIB), replace(H100, index=None)]
    assert resolve_device((), gpus, None) == ("cuda:0",)
    assert resolve_device((-1,), gpus, None) == ("cuda:1",)
    assert resolve_device((-1, 1), gpus, None) == ("cuda:0", "cuda:1")
    assert resolve_device((-1,), [], None) == ("cpu",)
    assert resolve_device((5,), gpus, "4,5") == ("cuda:1",)  # numbers of CUDA_VISIBLE_DEVICES, as Ultralytics allows
    assert resolve_device((1,), gpus, "4,1") == ("cuda:1",)
    assert resolve_device((7,), gpus, None) == ("cuda:7",)


# Readers


def test_cgroup_limits(tmp_path):
    membership = tmp_path / "cgroup"
    root = tmp_path / "fs"
    for folder, limit in ((root, "max"), (root / "a", "1000"), (root / "a/b", "max"), (root / "memory/docker", "700")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("600\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 150\n")
    membership.write_text("0::/a/b\n")
    assert host.read_cgroup_memory(root, membership) == (1000, 550)
    membership.write_text("4:memory:/docker/of-the-host\n")
    assert host.read_cgroup_memory(root, membership) == (700, 250)
    membership.write_text("0::/\n")
    assert host.read_cgroup_memory(root, membership) is None
    assert host.read_cgroup_memory(tmp_path / "none", tmp_path / "none") is None


def test_cgroup_v1(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("500")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("100")
    (tmp_path / "cgroup").write_text("3:cpuset:/x\n4:memory:/x\n")
    assert host.read_cgroup_memory(tmp_path, tmp_path / "cgroup") == (500, 400)


def test_host_and_versions_of_this_machine():
    here = host.read_host()
    assert here.cpu_count >= 1
    assert 0 < here.ram_available_bytes <= here.ram_total_bytes
    versions = host.read_versions()
    assert versions["torch"] == str(torch.__version__)
    assert versions["ultralytics"]


@pytest.mark.parametrize(("number", "text"), [(8902, "8.9.2"), (90100, "9.1.0"), (91002, "9.10.2"), (None, None)])
def test_cudnn_version(monkeypatch, number, text):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert host.read_versions()["cuDNN"] == text


class FakeDriver:
    """libcuda that counts two cards in the other order than NVML does."""

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
    """Two GPUs for the readers; returns what NVML answers, by function name."""
    card = SimpleNamespace(name="Card", major=8, minor=0, is_integrated=0, total_memory=8 * GIB)
    for name, value in (
        ("init", lambda: None),
        ("device_count", lambda: 2),
        ("get_device_properties", lambda index: card),
        ("get_arch_list", lambda: ["sm_80"]),
        ("mem_get_info", lambda index: (3 * GIB, 8 * GIB)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu, "_driver_api", FakeDriver)
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
    cuda, gpus = gpu.read_cuda(0)
    assert cuda.driver == "535.1"
    assert cuda.driver_cuda == (12, 2)
    assert [(one.index, one.nvml_index, one.matched_by) for one in gpus] == [(0, 1, "UUID"), (1, 0, "UUID")]
    assert (gpus[0].free_bytes, gpus[0].memory_source) == (5 * GIB, "NVML")
    assert gpus[0].processes == (Process(2**30, None, None),)
    assert gpus[0].own_bytes == GIB


def test_gpus_are_matched_by_bus_id_without_uuid(two_gpus):
    del two_gpus["nvmlDeviceGetHandleByUUID"]
    two_gpus["nvmlDeviceGetHandleByPciBusId"] = {"0000:00:00.0": "nvml1", "0000:01:00.0": "nvml0"}.get
    _, gpus = gpu.read_cuda(0)
    assert [(one.nvml_index, one.matched_by) for one in gpus] == [(1, "PCI bus id"), (0, "PCI bus id")]


def test_nvml_that_refuses_everything(two_gpus):
    two_gpus.clear()
    cuda, gpus = gpu.read_cuda(0)
    assert cuda.driver is None
    assert (gpus[0].free_bytes, gpus[0].memory_source) == (3 * GIB, "torch.cuda.mem_get_info")
    assert gpus[0].matched_by is None
    assert gpus[0].processes is None


def test_integrated_gpu_has_what_the_host_has_available(two_gpus):
    torch.cuda.get_device_properties(0).is_integrated = 1
    _, gpus = gpu.read_cuda(ram_available_bytes=6 * GIB)
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
    cuda, (card,) = gpu.read_cuda(0)
    assert cuda.error == "The NVIDIA driver on your system is too old"
    assert (card.index, card.name, card.capability) == (None, "Tesla T4", (7, 5))


# Probes


def test_cpu_probes_work_and_leave_no_trace():
    (result,) = probe.probe_attention("cpu")
    assert result.failure is None
    assert result.relative_error < probe.MAX_RELATIVE_ERROR
    assert result.kernel in ("flash", "math")
    assert not torch.are_deterministic_algorithms_enabled()
    step = probe.probe_training("cpu")
    assert step.failure is None
    assert step.step_ms > 0


@pytest.mark.parametrize("wrong", [lambda q, k, v: v + 0 * q * k, lambda q, k, v: q * k * v * float("nan")])
def test_broken_attention_is_found(monkeypatch, wrong):
    monkeypatch.setattr(probe, "attention", wrong)
    (result,) = probe.probe_attention("cpu")
    assert "off by" in result.failure


def test_attention_that_raises_is_reported(monkeypatch):
    def attention(q, k, v):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(probe, "attention", attention)
    (result,) = probe.probe_attention("cpu")
    assert result.failure == "RuntimeError: no kernel image"


def test_training_step_that_fails_is_reported():
    assert probe.probe_training("meta").failure


@pytest.mark.gpu
@needs_gpu
def test_cuda_probes_work():
    results = probe.probe_attention("cuda:0")
    assert [result.failure for result in results] == [None] * len(results)
    assert {result.dtype for result in results} == {"fp16", "fp32"}
    assert all(result.kernel for result in results if result.backend == "sdpa")
    assert probe.probe_training("cuda:0").failure is None


@pytest.mark.gpu
@needs_gpu
def test_gpu_0_of_this_machine():
    report = check.read_report("0")
    assert report.devices == ("cuda:0",)
    assert report.gpus[0].total_bytes >= report.gpus[0].free_bytes > 0
    assert report.cuda.driver_cuda


# The command


def test_command_on_the_cpu(capsys):
    assert check.main(["device=cpu"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "Training on device=cpu can work."
    for word in ("Attention", "cpu fp32, training: sdpa", "/dev/shm", "ultralytics"):
        assert word in out


def test_json_is_all_that_is_on_stdout(capsys):
    assert check.main(["--json", "device=4096"]) == 1
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["can_train"] is False
    assert printed.err.strip().splitlines()[-1].startswith("Training on device=4096 cannot work: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["devcie=0"], "Did you mean 'device'"),
        (["--jsn"], "Did you mean 'json'"),
        (["data=coco"], "unknown argument 'data=coco'"),
        (["device"], "device=0"),
        (["device=gpu"], "device=gpu"),
    ],
)
def test_arguments_that_cannot_work(words, says):
    with pytest.raises(ConfigError, match=says):
        check.main(words)
