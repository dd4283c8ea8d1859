"""Nearest upsampling in the type of its input."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yolov12.mas.step import upsampling
from yolov12.mas.step.upsampling import Upsampling


class Neck(nn.Module):
    """A layer that joins an upsampled tensor with another, as necks of detectors do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(7, 2, 1)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x):
        self.joined = torch.cat((self.up(self.first(x)), x.to(torch.bfloat16)), 1)
        return self.last(self.joined)


class Squares(nn.Conv2d):
    """Layer of the user's own, which computes in the type of its input."""

    def forward(self, x):
        return x.square().sum((1, 2, 3))


def test_half_precision_stays_and_values_are_those_of_fp32():
    torch.manual_seed(0)
    model, x, found = Neck(), torch.randn(2, 3, 8, 8), []
    for within in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if within:
                with Upsampling(model).within():
                    out = model(x)
            else:
                out = model(x.float())
        found.append((out, *torch.autograd.grad(out.float().square().sum(), model.parameters())))
    assert model.joined.dtype == torch.bfloat16
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


class Wide(nn.Conv2d):
    """Class of the user's own, which computes as PyTorch's."""

    def __init__(self):
        super().__init__(7, 2, 1)


def test_a_class_with_other_defaults_only_is_like_that_of_the_library():
    model = Neck()
    model.last = Wide()
    assert Upsampling(model)._layers == [model.up]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wide, "_conv_forward", lambda layer, *inputs: None, raising=False)
        assert Upsampling(model)._layers == []


@pytest.mark.parametrize(
    "change",
    [
        "mode",
        "hook",
        "hook behind",
        "global hook",
        "forward",
        "class",
        "precision",
        "own layer",
        "own forward",
        "own class",
    ],
)
def test_other_layers_are_left_alone(change, monkeypatch):
    model = Neck()
    if change == "mode":
        model.up = nn.Upsample(scale_factor=2, mode="bilinear")
    if change == "hook":
        model.up.register_forward_hook(lambda module, values, out: None)
    if change == "hook behind":
        model.last.register_forward_pre_hook(lambda module, values: None)
    if change == "forward":
        model.up.forward = lambda x: F.interpolate(x, scale_factor=2.0)
    if change == "class":
        monkeypatch.setattr(nn.Upsample, "forward", lambda layer, x: 2 * F.interpolate(x.float(), scale_factor=2.0))
    if change == "own class":
        stock = nn.Conv2d.forward
        own = functools.wraps(stock)(lambda layer, x: stock(layer, x).square())
        monkeypatch.setattr(nn.Conv2d, "forward", own)
    if change == "own layer":
        model.last = Squares(7, 2, 1)
    if change == "own forward":
        model.last.forward = lambda x: x.square().sum((1, 2, 3))
    always = nn.modules.module.register_module_forward_hook(lambda *args: None) if change == "global hook" else None
    x = torch.randn(2, 4, 3, 3, dtype=torch.float32 if change == "precision" else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, own = model.up(x), vars(model.up).get("forward")
        with Upsampling(model).within():
            assert change == "precision" or vars(model.up).get("forward") is own
            found = model.up(x)
    if always is not None:
        always.remove()
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
@pytest.mark.parametrize("channels", [64, 20])
def test_on_a_gpu_outputs_and_gradients_are_those_of_fp32(channels):
    layer = nn.Upsample(scale_factor=2)
    x = torch.randn(4, channels, 9, 10, device="cuda", dtype=torch.half).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    with torch.autocast("cuda", torch.half):
        with Upsampling(layer).within():
            found = layer(x)
        wanted = layer(x)
    assert "Nearest" in type(found.grad_fn).__name__
    assert found.dtype == torch.half
    assert torch.equal(found, wanted.half())
    wide = torch.randn(4, 18, 20, channels + 12, device="cuda", dtype=torch.half).permute(0, 3, 1, 2)
    grad = wide[:, 8 : 8 + channels]  # a slice of the gradient of a concatenation
    assert torch.equal(*(torch.autograd.grad(out, x, grad.to(out.dtype))[0] for out in (found, wanted)))


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the kernels run on the CPU."""
    pytest.importorskip("triton")
    from tests.interpreter import run_on_cpu

    run_on_cpu(monkeypatch, upsampling.kernels)
    monkeypatch.setattr(upsampling, "_VALUES", 128)


@pytest.mark.parametrize(("factor", "channels", "side"), [(2, 5, 7), (2, 16, 4), (3, 70, 2)])
def test_kernels_copy_and_sum_up_squares(on_cpu, factor, channels, side):
    torch.manual_seed(0)
    x = torch.randn(3, channels, side, side + 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = upsampling._Nearest.apply(x, factor)
    wanted = F.interpolate(x, scale_factor=float(factor), mode="nearest")
    assert torch.equal(found, wanted)
    assert found.is_contiguous(memory_format=torch.channels_last)
    wide = torch.randn(*found.shape[:1], *found.shape[2:], channels + 3).permute(0, 3, 1, 2)
    for grad in (wide[:, 2 : 2 + channels], torch.randn(found.shape)):
        torch.testing.assert_close(
            *(torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (found, wanted))
        )
