"""Problems and warnings of simulated machines."""

from dataclasses import replace

import pytest

from yolov12.check import problems, warnings
from yolov12.check.render import as_text, verdict
from yolov12.check.report import AttentionProbe, OtherProcess, Report, TrainingProbe

GIB = 2**30

WHEEL = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
NO_CUDA = {"arch_list": (), "error": "No CUDA GPUs are available"}
NO_DRIVER = {**NO_CUDA, "driver": None, "driver_cuda": None, "error": "Found no NVIDIA driver on your system."}


def only_problem(report: Report) -> str:
    (problem,) = problems(report)
    assert "\n" not in problem
    assert as_text(report).splitlines()[-1].endswith(problem)
    return problem


def test_h100_can_train_and_gives_no_warning(machine, h100):
    report = machine(h100)
    assert problems(report) == []
    assert warnings(report) == []
    assert verdict(report) == "Training on device=0 can work."
    assert "GPU 3 (same UUID)" in as_text(report)


def test_old_driver_is_named_with_what_it_supports_and_what_is_needed(machine, t4):
    old = {"driver": "450.80.02", "driver_cuda": (11, 0), "error": "The NVIDIA driver on your system is too old"}
    report = machine(replace(t4, index=None), cuda=NO_CUDA | old)
    problem = only_problem(report)
    for word in ("450.80.02", "11.0", "12.1", "525.60.13"):
        assert word in problem
    assert "Tesla T4" in as_text(report)


def test_driver_of_an_earlier_minor_version_is_a_warning(machine, t4):
    report = machine(t4, cuda={"driver": "525.60.13", "driver_cuda": (12, 0)})
    assert problems(report) == []
    (warning,) = warnings(report)
    assert "12.0" in warning


@pytest.mark.parametrize(
    ("cuda", "host", "says"),
    [
        (NO_CUDA | {"torch_cuda": None}, {}, "built without CUDA"),
        (NO_DRIVER, {"has_gpu_device_files": False}, "--gpus all"),
        (NO_DRIVER, {"has_gpu_device_files": False, "in_container": False}, "no NVIDIA driver"),
        (NO_DRIVER, {}, "no NVIDIA driver"),
        (NO_CUDA | {"visible_devices": ""}, {}, "CUDA_VISIBLE_DEVICES=''"),
        (NO_CUDA | {"error": "CUDA unknown error"}, {}, "CUDA unknown error"),
    ],
)
def test_no_cuda_is_told_apart(machine, cuda, host, says):
    assert says in only_problem(machine(cuda=cuda, host=host))


def test_without_a_gpu_the_default_is_the_cpu_and_a_warning_says_why(machine):
    report = machine(device="", cuda=NO_DRIVER, host={"has_gpu_device_files": False})
    assert report.devices == ("cpu",)
    assert problems(report) == []
    (warning,) = warnings(report)
    assert "--gpus all" in warning


def test_cpu_by_choice_is_no_warning(machine):
    assert warnings(machine(device="cpu", cuda=NO_DRIVER)) == []


def test_gpu_that_is_not_there(machine, h100):
    problem = only_problem(machine(h100, replace(h100, index=1), device="7"))
    assert "7" in problem
    assert "2 GPUs are visible" in problem
    assert "0, 1" in problem


def test_mps_that_is_not_there(machine):
    assert "Apple" in only_problem(machine(device="mps"))
    assert problems(machine(device="mps", host={"has_mps": True})) == []


@pytest.mark.parametrize(
    ("capability", "arch_list", "works"),
    [
        ((8, 9), WHEEL, True),  # an Ada GPU runs kernels built for 8.6
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
def test_kernels_for_the_gpu(machine, h100, capability, arch_list, works):
    report = machine(replace(h100, capability=capability), cuda={"arch_list": arch_list})
    assert (problems(report) == []) == works


def test_full_gpu_names_the_processes_that_use_its_memory(machine, t4):
    others = (OtherProcess(7, None, 100), OtherProcess(4120, "python", 13 * GIB))
    problem = only_problem(machine(replace(t4, free_bytes=600 * 2**20, processes=others)))
    assert "600 MiB free of 15.0 GiB" in problem
    assert "python 4120: 13.0 GiB" in problem


def test_each_of_several_gpus_is_judged(machine, h100):
    busy = replace(h100, index=1, free_bytes=0)
    assert problems(machine(h100, busy, device="0")) == []
    assert "GPU 1" in only_problem(machine(h100, busy, device="0,1"))


def test_small_shared_memory(machine, h100):
    (warning,) = warnings(machine(h100, host={"shm_total_bytes": 64 * 2**20, "shm_free_bytes": 64 * 2**20}))
    assert "64 MiB" in warning
    assert "--shm-size=8g or --ipc=host" in warning
    (warning,) = warnings(machine(h100, host={"shm_free_bytes": 0}))
    assert "0 MiB free" in warning


def test_ultralytics_missing_or_another(machine, h100):
    assert "pip install ultralytics==8.4.190" in only_problem(machine(h100, versions={"ultralytics": None}))
    (warning,) = warnings(machine(h100, versions={"ultralytics": "8.3.0"}))
    assert "8.3.0" in warning


def test_failed_training_step_and_broken_attention(machine, h100):
    step = TrainingProbe("cuda:0", "fp16", None, "RuntimeError: no kernel image is available")
    assert "no kernel image" in only_problem(machine(h100, training=(step,)))
    broken = AttentionProbe("cuda:0", "fp16", "training", True, "sdpa", "why", "flash", 0.5, "it is off by 0.5")
    assert "sdpa (flash)" in only_problem(machine(h100, attention=(broken,)))
    unused = machine(h100, attention=(replace(broken, needed=False),))
    assert problems(unused) == []
    assert "BROKEN" in as_text(unused)
    assert len(warnings(unused)) == 1
