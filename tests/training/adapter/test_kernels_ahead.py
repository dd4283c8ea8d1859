"""The kernels that are compiled ahead are those that a training launches, and no user's code sees the look for them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from ultralytics.cfg import get_cfg
from ultralytics.nn.modules.conv import Conv

from tests.models.test_blocks import Run, device, made  # noqa: F401 (a fixture)
from yolov12 import YOLO
from yolov12.mas import compile_ahead
from yolov12.mas.batchnorm import launch_grid
from yolov12.mas.step import upsampling
from yolov12.training.adapter import kernels_ahead

GPU = SimpleNamespace(type="cuda")


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", ["c3k2", "a2c2f v1", "a2c2f turbo", "detector"])
def test_a_training_launches_what_is_wanted(device, name, monkeypatch):  # noqa: F811
    launched = set()

    def noting(launch):
        def run(kernel, grid, tensors, *others):
            if tensors[0].device.type == "meta":
                launch(kernel, grid, tensors, *others)
            else:
                _, constants, warps = others
                types = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
                launched.add((kernel.fn.__name__, types, constants, warps))

        return run

    for module in (launch_grid, upsampling):
        monkeypatch.setattr(module, "launch", noting(module.launch))
    half = torch.bfloat16  # autocast on a CPU of PyTorch 2.3 knows no other type
    monkeypatch.setattr(upsampling, "_HALF", (half,))
    model, x = made(name, device)
    monkeypatch.setattr(kernels_ahead, "scaled", lambda images, dtype: torch.empty_like(x, dtype=dtype, device="meta"))
    monkeypatch.setattr(kernels_ahead, "_GROUPS", (2, 1))
    wanted = kernels_ahead.wanted(model, half)
    for apart in (False, True):
        with torch.autocast(device, half):
            Run(model, x, apart=apart)
    blocks = [each for each in wanted if ".mas." in each.module]
    assert launched == {(each.name, each.types, each.constants, each.warps) for each in blocks}


@pytest.fixture
def begun(monkeypatch):
    """Return what was begun for a trainer, if its GPU were one for that."""
    kernels = []
    monkeypatch.setattr(compile_ahead, "begin", lambda wanted, _: kernels.extend(wanted))
    monkeypatch.setattr(compile_ahead, "can_begin", lambda place: place is GPU)
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def begin(model, **changes):
        kernels.clear()
        trainer = SimpleNamespace(device=GPU, model=model, amp=True, args=get_cfg(overrides=changes))
        kernels_ahead.begin(trainer)
        return len(kernels)

    return begin


def test_kernels_of_mixed_precision_are_found_on_the_gpu(begun, small_model):
    model = YOLO(small_model).model
    before = [tensor.clone() for tensor in model.state_dict().values()]
    assert begun(model) > 20
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_no_random_number_is_drawn(begun, small_model):
    model, before = YOLO(small_model).model, torch.get_rng_state()
    assert begun(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("place", "kernels"), [("auto", 2), ("device", 2), ("host", 0)])
def test_kernels_that_augment_are_compiled_where_they_may_run(begun, small_model, place, kernels):
    model = YOLO(small_model).model
    assert begun(model, augment_on=place) == begun(model, augment_on="host") + kernels


@pytest.mark.parametrize("changes", [{"mas": False}, {"compile": True}])
def test_nothing_is_looked_for_where_the_engine_does_not_run(begun, small_model, changes):
    assert begun(YOLO(small_model).model, **changes) == 0


def test_nothing_is_looked_for_on_another_device(begun, small_model, monkeypatch):
    monkeypatch.setattr(compile_ahead, "can_begin", lambda place: False)
    assert begun(YOLO(small_model).model) == 0


def own_forward(model, monkeypatch):
    model.model[1].forward = model.model[1].forward


def own_module(model, monkeypatch):
    class Own(nn.SiLU):
        def forward(self, x):
            raise AssertionError

    model.model[1].act = Own()


def own_hook(model, monkeypatch):
    model.model[1].register_forward_hook(seen)


def own_global_hook(model, monkeypatch):
    handle = nn.modules.module.register_module_forward_hook(seen)
    monkeypatch.setattr(model, "handle", handle, raising=False)


def own_method(model, monkeypatch):
    model.predict = seen


def own_method_of_a_class(model, monkeypatch):
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", seen)


def seen(*_):
    pytest.fail("seen")


CHANGES = [own_forward, own_module, own_hook, own_global_hook, own_method, own_method_of_a_class]


@pytest.mark.parametrize("change", CHANGES)
def test_users_code_sees_nothing(begun, small_model, change, monkeypatch):
    model = YOLO(small_model).model
    change(model, monkeypatch)
    try:
        assert begun(model) == 0
    finally:
        if handle := vars(model).get("handle"):
            handle.remove()


def test_another_rank_of_the_machine_begins_nothing(begun, small_model, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert begun(YOLO(small_model).model) == 0


def test_a_model_that_needs_data_is_left_alone(begun, small_model, monkeypatch):
    monkeypatch.setattr(Conv, "forward", lambda self, x: self.act(self.bn(self.conv(x))) * x.mean().item())
    monkeypatch.setattr(kernels_ahead, "LIBRARIES", ("torch.", "ultralytics.", "yolov12.", "tests."))
    assert begun(YOLO(small_model).model) == 0


def test_a_cache_that_cannot_be_read_ends_no_training(begun, small_model, monkeypatch):
    def refuse(wanted, place):
        raise PermissionError

    monkeypatch.setattr(compile_ahead, "begin", refuse)
    assert begun(YOLO(small_model).model) == 0


def test_convolutions_have_the_layout_of_cuda():
    """On the meta device, newer versions of PyTorch give them another one."""
    x = torch.empty(2, 16, 4, 4, device="meta").to(memory_format=torch.channels_last)
    with kernels_ahead._LikeCuda():
        y = nn.functional.conv2d(x.contiguous(), torch.empty(16, 16, 3, 3, device="meta"), padding=1)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_training_begins_before_its_data_is_read_and_ends_with_its_first_batch(
    trainings, small_model, tmp_path, monkeypatch
):
    told = []
    monkeypatch.setattr(
        kernels_ahead, "begin", lambda trainer: told.append(("begin", hasattr(trainer, "train_loader")))
    )
    monkeypatch.setattr(compile_ahead, "end", lambda: told.append("end"))
    trainings.train(tmp_path, small_model, epochs=1, callbacks=[("on_train_batch_end", lambda _: told.append("batch"))])
    assert told[:3] == [("begin", False), "end", "batch"]
    assert told[-1] == "end"


TRAINING = """
import sys, pathlib, torch
from yolov12 import YOLO
from yolov12.mas import compile_ahead
from yolov12.training.adapter import kernels_ahead

cache, data = pathlib.Path(sys.argv[1]), sys.argv[2]
there = []

def begin(kernels, device):
    stock(kernels, device)
    for process in compile_ahead._processes._all:
        for key in process._places:
            process.wait_for(key)
    there.extend(path for path in cache.rglob("*.cubin"))

stock, compile_ahead.begin = compile_ahead.begin, begin
YOLO("yolo12n.yaml").train(data=data, epochs=1, batch=8, imgsz=64, device=0, workers=0, plots=False, val=False,
                           project=str(cache / "runs"), recipe=False, pretrained=False)
new = set(cache.rglob("*.cubin")) - set(there)
print("ahead", len(there), *sorted(path.stem for path in new))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
def test_a_training_on_a_gpu_compiles_no_kernel_itself(tmp_path):
    from benchmarks.drawings import noise

    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", TRAINING, str(tmp_path), str(noise(16))]
    run = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr[-2000:]
    word, count, *new = run.stdout.splitlines()[-1].split()
    assert word == "ahead", run.stdout[-2000:]
    assert int(count) > 30
    assert not new
