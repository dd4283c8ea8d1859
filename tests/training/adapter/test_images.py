"""Images that one kernel makes for the first convolution, in place of Ultralytics' `preprocess_batch`."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG

from yolov12.mas.checkpointing.checkpointing import Checkpointing
from yolov12.mas.modules import overridden
from yolov12.training.adapter import images as module
from yolov12.training.adapter.detection import DetectionTask
from yolov12.training.data import device_rendering
from yolov12.training.data.device_rendering import PackedTensor
from yolov12.training.data.packing import PackedImages, pack
from yolov12.training.data.pixels import Renderer

pytest.importorskip("triton")

from tests.interpreter import run_on_cpu


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the kernel run on the CPU, as if autocast were on there."""
    run_on_cpu(monkeypatch, module.image_kernel)
    monkeypatch.setattr(module, "_applies", lambda images: images.dtype == torch.uint8)
    monkeypatch.setattr(module, "_autocast_type", lambda: torch.bfloat16)


@pytest.fixture
def model(small_model):
    model = DetectionModel(small_model, nc=2, verbose=False).train().to(memory_format=torch.channels_last)
    model.args = DEFAULT_CFG
    return model


def batch(images=2, side=32):
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
    boxes = {"cls": torch.zeros(images, 1), "bboxes": torch.full((images, 4), 0.5), "batch_idx": torch.arange(images)}
    return {"img": pixels, **boxes}


def preprocess(part):
    return {**part, "img": part["img"].float() / 255}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (7, 9)])
def test_on_a_gpu_every_value_is_that_of_stock(model, height, width, dtype):
    pixels = torch.arange(2 * 3 * height * width).remainder(256).to("cuda", torch.uint8).view(2, 3, height, width)
    assert torch.equal(module.scaled(pixels, dtype), (pixels.float() / 255).to(dtype))
    assert module.half_type(model.cuda(), pixels) is None
    with torch.autocast("cuda", dtype):
        assert module.half_type(model, pixels) == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_is_that_of_stock_in_half_precision(on_cpu, dtype):
    pixels = torch.arange(2 * 3 * 16 * 24).remainder(256).to(torch.uint8).view(2, 3, 16, 24)
    found = module.scaled(pixels, dtype)
    assert torch.equal(found, (pixels.float() / 255).to(dtype))
    assert found.is_contiguous(memory_format=torch.channels_last)


def packed(images):
    return PackedTensor.of(pack(list(images), Renderer(), lambda shape: torch.empty(shape, dtype=torch.uint8)))


@pytest.mark.parametrize("are_packed", [False, True])
def test_the_model_gets_half_precision_and_users_see_fp32(on_cpu, model, monkeypatch, are_packed):
    task, seen = DetectionTask(preprocess, multi_scale=False, overlapping_masks=True, only_scales=True), []
    whole = batch()
    images = whole["img"]
    if are_packed:
        whole["img"] = packed(images)
    task.workload(whole)
    predict = type(model).predict.__get__(model)
    monkeypatch.setattr(type(model), "predict", lambda self, x, **kwargs: (seen.append(x), predict(x.float()))[1])
    monkeypatch.setattr(module, "is_stock", lambda owner, name: True)
    task.loss(model, task.part(whole, 0, 2))
    assert torch.equal(seen[0], (images / 255).bfloat16())
    assert task.facts["img"].dtype == torch.float32
    assert task.facts["img"].shape == whole["img"].shape


def test_packed_images_travel_packed_and_the_size_of_a_batch_needs_none_of_them(monkeypatch):
    """Ultralytics' preprocessing draws a size, for `multi_scale`."""
    monkeypatch.setattr(device_rendering, "rendered", lambda images: pytest.fail("rendered"))
    task = DetectionTask(
        lambda part: {"img": interpolate(part["img"].float(), 48)}, multi_scale=True, overlapping_masks=True
    )
    whole = batch(4)
    whole["img"] = packed(whole["img"])
    assert task.workload(whole).height == 48
    part = task.part(whole, 1, 3)
    assert isinstance(part["img"], PackedImages)
    assert task.opened(part)["img"].shape == (2, 3, 32, 32)


def hooked(model):
    model.model[0].register_forward_pre_hook(lambda layer, values: None)


def own_forward(model):
    model.model[0].conv.forward = nn.Conv2d.forward.__get__(model.model[0].conv)


def own_layer(model):
    first = model.model[0]
    first.forward = lambda x: type(first).forward(first, x)


def another_layout(model):
    model.to(memory_format=torch.contiguous_format)


def own_predict(model):
    model.predict = type(model).predict.__get__(model)


def another_layer(model):
    model.model[0] = nn.Sequential(model.model[0])


def own_loss(model):
    model.loss = type(model).loss.__get__(model)


def test_it_is_used_only_where_the_users_code_sees_nothing_of_it(on_cpu, model, monkeypatch):
    pixels = batch()["img"]
    assert module.half_type(model, pixels) == torch.bfloat16
    assert module.half_type(model, pixels.float()) is None
    first = model.model[0]
    with overridden({first: functools.partial(Checkpointing._rebuild, None, first.forward)}):  # the engine's own
        assert module.half_type(model, pixels) == torch.bfloat16
    with torch.no_grad():
        for change in (hooked, own_forward, own_layer, another_layout, own_predict, another_layer):
            other = DetectionModel(model.yaml, nc=2, verbose=False).to(memory_format=torch.channels_last)
            change(other)
            assert module.half_type(other, pixels) is None, change


@pytest.mark.parametrize("own", ["preprocess_batch", "loss", "multi_scale"])
def test_the_users_own_code_gets_what_stock_gives_it(on_cpu, model, own):
    task = DetectionTask(
        preprocess, multi_scale=own == "multi_scale", overlapping_masks=True, only_scales=own != "preprocess_batch"
    )
    if own == "loss":
        own_loss(model)
    assert task._preprocessed(model, batch())["img"].dtype == torch.float32
