"""Blocks whose BatchNorm kernels add residuals and write to concatenations, compared with Ultralytics' own blocks.

Without a GPU, the kernels run on the CPU.
"""

import copy
import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import block as blocks
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import DetectionModel

from yolov12.mas.batchnorm import fused, launch_grid
from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Checkpointing, Plan
from yolov12.mas.checkpointing.layers import candidates
from yolov12.mas.step import upsampling
from yolov12.mas.step.upsampling import Upsampling
from yolov12.models.activations import activations
from yolov12.models.blocks import new_join
from yolov12.models.layouts import TURBO, V1, building

CHANNELS = 64


def a2c2f(layout, **options):
    with building(layout):
        return blocks.A2C2f(CHANNELS, 64, n=2, area=4, **options)


MODELS = {
    "a2c2f v1": lambda: a2c2f(V1),
    "a2c2f turbo": lambda: a2c2f(TURBO, residual=True),
    "a2c2f c3k": lambda: blocks.A2C2f(CHANNELS, 64, n=2, a2=False),
    "c3k2": lambda: blocks.C3k2(CHANNELS, 40, n=2, e=0.25),
    "c3k2 c3k": lambda: blocks.C3k2(CHANNELS, 32, c3k=True),
    "c3k2 psa": lambda: blocks.C3k2(CHANNELS, 64, attn=True),
    "detector": lambda: DetectionModel(copy.deepcopy(DETECTOR), ch=CHANNELS, verbose=False),
}
DETECTOR = {
    "nc": 2,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C3k2", [32, False]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "A2C2f", [64, True, 1]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 1], 1, "Concat", [1]],
        [-1, 1, "A2C2f", [64, False, -1]],
        [-1, 1, "Conv", [32, 3, 2]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 1, "C3k2", [64, True]],
        [[6, 9], 1, "Detect", ["nc"]],
    ],
}
# With 8 pixels, the smallest BatchNorm group has 4 values: if each weight moves by a relative 6e-8, the rounding of
# fp32, gradients move by up to 1e-3 of the largest (found in fp64). On a GPU, the two runs differ by such roundings, as
# a residual is added in a fused multiply-add. With 32 pixels, gradients move by 8e-7 and the bound is 1e-5.
DETECTOR_SIDE = {"cpu": 8, "cuda": 32}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request, monkeypatch):
    """Return the device of the test. On the CPU, the kernels run without a GPU."""
    monkeypatch.setattr(upsampling, "_HALF", (torch.float32,))  # the tests need its precision
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        return request.param
    pytest.importorskip("triton")
    from tests.interpreter import run_on_cpu
    from yolov12.mas.batchnorm import kernels
    from yolov12.mas.step import upsampling_kernels

    run_on_cpu(monkeypatch, kernels, _sigmoid=torch.sigmoid)
    run_on_cpu(monkeypatch, upsampling_kernels)
    monkeypatch.setattr(upsampling, "_applies", lambda x: x.is_contiguous(memory_format=torch.channels_last))
    monkeypatch.setattr(fused, "_SUMS", dataclasses.replace(fused._SUMS, values=1024, unroll=1, programs=1))
    monkeypatch.setattr(fused, "_grids", fused._grids.__wrapped__)
    monkeypatch.setattr(fused, "applies", lambda x, *_: x.is_contiguous(memory_format=torch.channels_last))
    monkeypatch.setattr(fused, "writes_into", lambda device: True)
    monkeypatch.setattr(launch_grid, "stream", lambda device: 0)
    monkeypatch.setattr(launch_grid, "_scratches", {})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    return request.param


class Run:
    """A forward and backward pass of a model in groups, with the names of its operations."""

    def __init__(self, model, x, plan=KEEP_ALL, apart=False):
        model.zero_grad()
        norms = GroupedBatchNorm(model, activations(model))
        norms.begin()
        norms.may_join = norms.may_join and not apart
        upsampled = Upsampling(model)
        checkpointing = Checkpointing(model, candidates(model), norms)
        x = x.clone(memory_format=torch.channels_last).requires_grad_()
        groups = (2, len(x) - 2)
        with norms.within(groups, 0), upsampled.within(), checkpointing.within(plan):
            self.out = model(x)
            if isinstance(self.out, dict):
                self.out = torch.cat([self.out["boxes"], self.out["scores"]], 1)
            self.joins, self.operations = norms.joins, operations(self.out.grad_fn)
            weights = torch.linspace(-1, 1, self.out[0].numel(), device=x.device).view_as(self.out[0])
            (self.out * weights).sum().backward()
        gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
        self.gradients = [gradient for gradient in gradients if gradient is not None]
        self.statistics = norms.averages(groups, len(x))
        self.fused = norms.fused

    def assert_close(self, other):
        close = {"rtol": 1e-3, "atol": 2e-4}
        torch.testing.assert_close(self.out, other.out, **close)
        torch.testing.assert_close(self.statistics, other.statistics, **close)
        scale = max(float(gradient.abs().max()) for gradient in other.gradients)
        for one, two in zip(self.gradients, other.gradients, strict=True):
            torch.testing.assert_close(one / scale, two / scale, rtol=1e-3, atol=1e-5)


def operations(node):
    """Return the names of all operations that led to a result, with repetitions."""
    found, left = {node}, [node]
    while left:
        new = {each for each, _ in left.pop().next_functions if each is not None} - found
        found |= new
        left += new
    return [each.name() for each in found]


def made(name, device):
    torch.manual_seed(0)
    model = MODELS[name]().train().to(device, memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    side = DETECTOR_SIDE[device] if name == "detector" else 4
    return model, torch.randn(3, CHANNELS, side, side, device=device)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_compute_what_ultralytics_own_do(device, name):
    model, x = made(name, device)
    apart, joined = Run(model, x, apart=True), Run(model, x)
    joined.assert_close(apart)
    assert joined.joins
    assert joined.fused == apart.fused
    # An attention block of another kind is a part that is copied; so are predictions.
    left = {"c3k2 psa": 1, "detector": 3}.get(name, 0)
    assert joined.operations.count("CatBackward0") == left
    assert apart.operations.count("CatBackward0") > left or name == "c3k2 psa"
    assert apart.operations.count("AddBackward0") > joined.operations.count("AddBackward0") or name == "c3k2 psa"


def own_forward(model):
    part = model.m[1].cv2
    stock = part.forward
    part.forward = lambda x: 2 * stock(x)


def own_class(model):
    class Doubled(Conv):
        def forward(self, x):
            return 2 * super().forward(x)

    model.m[0].cv2.__class__ = Doubled


def own_sum(model):
    part = model.m[1]
    part.forward = lambda x: x - part.cv2(part.cv1(x))


CHANGES = {
    "hook": lambda model: model.m[0].cv1.register_forward_hook(lambda module, inputs, out: 2 * out),
    "hook on the sum": lambda model: model.m[1].register_forward_hook(lambda module, inputs, out: 2 * out),
    "forward": own_forward,
    "class": own_class,
    "block": own_sum,
    "eval": lambda model: model.m[1].cv2.bn.eval(),
    "activation": lambda model: setattr(model.m[1].cv2, "act", nn.ReLU()),
    "no shortcut": lambda model: setattr(model.m[1], "add", False),
    "fused": lambda model: setattr(model, "forward", model.forward_split),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_users_change_counts(device, change):
    model, x = made("c3k2", device)
    before = Run(model, x)
    CHANGES[change](model)
    apart, joined = Run(model, x, apart=True), Run(model, x)
    joined.assert_close(apart)
    assert change == "fused" or not torch.allclose(before.out, joined.out, rtol=1e-2)
    assert joined.joins is ("hook" not in change)


def test_a_class_that_users_change_counts(device, monkeypatch):
    stock = Conv.forward
    monkeypatch.setattr(Conv, "forward", lambda self, x: 2 * stock(self, x))
    model, x = made("c3k2", device)
    apart, joined = Run(model, x, apart=True), Run(model, x)
    joined.assert_close(apart)
    assert joined.joins


@pytest.mark.parametrize("layer", [1, 3, 4, 5])
def test_a_layer_of_a_detector_that_users_change_is_concatenated_as_before(device, layer):
    model, x = made("detector", device)
    part = model.model[layer]
    stock = part.forward
    part.forward = lambda x: 2 * stock(x)
    apart, joined = Run(model, x, apart=True), Run(model, x)
    joined.assert_close(apart)
    assert joined.joins
    assert joined.operations.count("CatBackward0") > 3


PLANS = {
    "a2c2f v1": [(("m.0", RECOMPUTE),), (("cv1", REBUILD),), (("cv1", REBUILD), ("m.1", RECOMPUTE))],
    "c3k2": [(("m.0", RECOMPUTE),), (("m.0", REBUILD),)],
    "detector": [
        (("1", RECOMPUTE),),
        (("3", REBUILD), ("6", RECOMPUTE)),
        (("1", REBUILD), ("9.m.0", REBUILD)),
    ],
}


@pytest.mark.parametrize(("name", "modes"), [(name, modes) for name, plans in PLANS.items() for modes in plans])
def test_plans_keep_their_layers_apart_and_join_the_others(device, name, modes):
    """What a layer that runs again returns is copied into a concatenation; what is rebuilt has its own storage."""
    model, x = made(name, device)
    apart, planned, joined = Run(model, x, apart=True), Run(model, x, Plan(modes)), Run(model, x)
    planned.assert_close(apart)
    assert planned.joins
    cats = [run.operations.count("CatBackward0") for run in (joined, planned, apart)]
    assert cats[0] < cats[1] < cats[2] or (cats[0] == 0 and cats[1] == 1)


def test_a_concatenation_that_is_done_is_in_memory_no_longer(device, monkeypatch):
    """If a part comes from a layer that a plan names, the parts are copied."""
    model, x = made("detector", device)
    made_joins, alive = [], []

    def watched(channels):
        join = new_join(channels)
        made_joins.append(weakref.ref(join))
        return join

    monkeypatch.setattr("yolov12.models.blocks.new_join", watched)
    head = model.model[-1]
    usual = head.forward
    head.forward = lambda xs: (alive.extend(ref() is not None for ref in made_joins), usual(xs))[1]
    Run(model, x, Plan((("9", RECOMPUTE), ("3", REBUILD))))
    assert len(alive) > 2
    assert not any(alive)


def test_bits_repeat(device):
    model, x = made("a2c2f v1", device)
    one, other = Run(model, x), Run(model, x)
    assert torch.equal(one.out, other.out)
    for first, second in zip(one.gradients, other.gradients, strict=True):
        assert torch.equal(first, second)
