"""Blocks that users have changed compute what they compute without the engine, from the output to every gradient."""

import copy
import functools

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import block as blocks
from ultralytics.nn.modules.conv import Concat, Conv
from ultralytics.nn.tasks import DetectionModel

from tests.models.test_blocks import CHANNELS, Run, device, made  # noqa: F401


class LowRank(nn.Module):
    """A convolution with an adapter of low rank beside it (LoRA)."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    """A layer that writes on its input."""

    def forward(self, x):
        return x.mul_(2)


def wrap(owner, around):
    """Return a change that replaces the forward pass of a class by a function with the same name and module."""

    def change(model, monkeypatch):
        stock = owner.forward

        @functools.wraps(stock)
        def forward(self, x):
            return around(stock, self, x)

        monkeypatch.setattr(owner, "forward", forward)

    return change


def double(stock, layer, x):
    return 2 * stock(layer, x)


def double_parts(stock, layer, parts):
    return stock(layer, [2 * part for part in parts])


def attach_adapters(model, monkeypatch):
    for part in [part for part in model.modules() if type(part) is Conv]:
        part.conv = LowRank(part.conv)


def activate_by_function(model, monkeypatch):
    del model.m[0].cv2.act
    model.m[0].cv2.act = torch.relu


def write_on_input(model, monkeypatch):
    model.m[1] = nn.Sequential(Doubled(), model.m[1])


def narrow(model, monkeypatch):
    """Remove channels, as pruning does, and leave `c` as it was."""
    model.cv1, model.cv2 = Conv(CHANNELS, 8), Conv(16, 40)
    model.m = nn.ModuleList(blocks.Bottleneck(4, 4) for _ in range(2))


def own_activation(owner, name):
    def change(model, monkeypatch):
        getattr(owner(model), name).forward = torch.relu

    return change


CHANGES = {
    "class of convolutions": ("c3k2", wrap(Conv, double)),
    "class of bottlenecks": ("c3k2", wrap(blocks.Bottleneck, double)),
    "class of attention": ("a2c2f v1", wrap(blocks.AAttn, double)),
    "class of concatenations": ("detector", wrap(Concat, double_parts)),
    "activation": ("c3k2", own_activation(lambda model: model.m[1].cv2, "act")),
    "no activation": ("a2c2f v1", own_activation(lambda model: model.m[0][0].mlp[1], "act")),
    "function as activation": ("c3k2", activate_by_function),
    "adapters": ("a2c2f turbo", attach_adapters),
    "width": ("c3k2", narrow),
    "in-place layer": ("a2c2f c3k", write_on_input),
}


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_users_change_compute_what_they_compute_without_the_engine(device, change, monkeypatch):  # noqa: F811
    name, apply = CHANGES[change]
    model, x = made(name, device)
    model = copy.deepcopy(model)  # Ultralytics' layers share an activation with all models
    apply(model, monkeypatch)
    assert_same(model.to(device), x)


NECKS = {
    "a layer reads the second to last one and writes on it": [
        [-1, 1, "Conv", [16]],
        [-1, 1, "Conv", [16]],
        [0, 1, "Conv", [16]],
        [-2, 1, "nn.ReLU", [True]],
        [[1, 2], 1, "Concat", [1]],
    ],
    "a concatenation is written on, one of whose parts another layer reads": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [-1, 1, "Conv", [16]],
        [[-1, 1], 1, "Concat", [1]],
        [-1, 1, "nn.ReLU", [True]],
    ],
}


@pytest.mark.parametrize("neck", NECKS)
def test_layers_that_write_on_their_input_change_what_they_change_without_the_engine(device, neck):  # noqa: F811
    torch.manual_seed(0)
    layers = {"nc": 2, "backbone": NECKS[neck], "head": [[[-1], 1, "Detect", ["nc"]]]}
    model = copy.deepcopy(DetectionModel(layers, ch=CHANNELS, verbose=False)).train().to(device)
    assert_same(model, torch.randn(3, CHANNELS, 8, 8, device=device))


def assert_same(model, x):
    """Compare a model in the engine's groups with the same model without the engine, group by group."""
    x = torch.cat((x, x[:1].flip(2)))  # two groups of two
    joined = Run(model.to(memory_format=torch.channels_last), x)
    assert joined.joins
    model.to(memory_format=torch.contiguous_format).zero_grad()
    x = x.contiguous().requires_grad_()
    outs = [model(group) for group in x.split(2)]
    out = torch.cat([torch.cat((out["boxes"], out["scores"]), 1) if isinstance(out, dict) else out for out in outs])
    torch.testing.assert_close(joined.out, out, rtol=1e-3, atol=2e-4)
    (out * torch.linspace(-1, 1, out[0].numel(), device=x.device).view_as(out[0])).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    gradients = [gradient for gradient in gradients if gradient is not None]
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    for one, two in zip(joined.gradients, gradients, strict=True):
        torch.testing.assert_close(one / scale, two / scale, rtol=1e-3, atol=1e-4)
