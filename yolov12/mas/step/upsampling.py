"""Nearest upsampling in the type of its input.

Autocast runs `nn.Upsample` in fp32, although nearest upsampling only copies values. The result then has twice the
bytes, and so has its concatenation with others. The gradient is the sum of a few gradients, which PyTorch's kernel adds
in fp32 in any case. On CUDA and in channels_last, Triton kernels take an eighth of the time of PyTorch's, and read the
gradient from where it is in that of a concatenation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from yolov12.mas.batchnorm.fused import row_stride
from yolov12.mas.batchnorm.joined import Slot
from yolov12.mas.modules import has_global_hooks, has_hooks, overridden, with_own_code
from yolov12.mas.triton_launch import compiles, launch, launches_on, unfilled, unit_of

try:
    from yolov12.mas.step import upsampling_kernels as kernels
except ImportError:  # PyTorch supports platforms that Triton does not
    kernels = None  # type: ignore[assignment]

__all__ = ["Upsampling"]

_HALF = (torch.float16, torch.bfloat16)
_VALUES, _CHANNELS, _WARPS = 2048, 128, 4  # of a program


class Upsampling:
    """Runs the nearest upsampling layers of a model in the type of their inputs.

    The model is changed only inside `within`. If a module of the model has a hook, or if one that holds no such layer
    has code of the user's own, all layers are left alone: either may see that type.

    Args:
        model: Model with the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.find_layers()
        self.begin()

    def find_layers(self) -> None:
        """Look for the layers again, as modules of the model were replaced."""
        self._modules = list(self._model.modules())
        self._upsamplings = [module for module in self._modules if type(module) is nn.Upsample]
        found = set(self._upsamplings)
        above = (module for module in self._modules if module not in found)
        self._above = {module for module in above if not found.isdisjoint(module.modules())}

    def begin(self) -> None:
        """Start a batch: read how the layers are switched, and whether there are hooks."""
        self._layers: list[nn.Upsample] = []
        if self._upsamplings and not has_global_hooks() and not self._may_be_seen():
            layers = [layer for layer in self._upsamplings if layer.mode == "nearest"]
            self._layers = [layer for layer in layers if "forward" not in vars(layer)]  # or it is the user's own

    def _may_be_seen(self) -> bool:
        """Return whether code of the user's own may look at what goes into a module."""
        return any(has_hooks(module) or module not in self._above for module in with_own_code(self._modules))

    @contextmanager
    def within(self) -> Iterator[None]:
        """Give the layers their other forward pass while one micro-batch runs forward and backward."""
        with overridden({layer: _Forward(layer, layer.forward) for layer in self._layers}):
            yield


class _Forward:
    """Forward pass of a layer in the type of its input."""

    def __init__(self, layer: nn.Upsample, forward: Callable[[Tensor], Tensor]) -> None:
        self._layer, self._forward = layer, forward

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype not in _HALF:
            return self._forward(x)
        if factor := self._factor(x):
            out: Tensor = _Nearest.apply(x, factor)  # type: ignore[no-untyped-call]
            return out
        with torch.autocast(x.device.type, enabled=False):
            return self._forward(x)

    def part_of(self, slot: Slot, x: Tensor) -> Tensor:
        """Run the layer, and make its output a part of a concatenation."""
        factor = self._factor(x)
        part = slot.place(_large(x, factor), x) if factor else None
        out: Tensor = self(x) if part is None else _Nearest.apply(x, factor, (part,))  # type: ignore[no-untyped-call]
        slot.add(out, in_place=part is not None)
        return out

    def _factor(self, x: Tensor) -> int:
        """Return the factor by which the kernels enlarge `x`; 0 if they do not apply."""
        factor = self._layer.scale_factor
        known = self._layer.size is None and isinstance(factor, float) and factor in (2.0, 3.0, 4.0)
        return int(factor) if known and x.dtype in _HALF and _applies(x) else 0  # type: ignore[arg-type]


def _applies(x: Tensor) -> bool:
    return (
        launches_on(x.device)
        and x.ndim == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and (x.is_meta or _compiles(x.device, x.dtype))
    )


@functools.cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    if kernels is None:
        return False
    x = torch.zeros(1, _CHANNELS, 1, 1, device=device, dtype=dtype)  # for kernels that most models need, too
    return compiles(lambda: _shrunk(_enlarged(x, 2), 2))  # BatchNorm's kernels, which come first, log the reason


class _Nearest(torch.autograd.Function):
    @staticmethod
    @unfilled
    def forward(ctx: Any, x: Tensor, factor: int, slices: tuple[Tensor, ...] = ()) -> Tensor:
        ctx.factor = factor
        return _enlarged(x, factor, *slices)

    @staticmethod
    @unfilled
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("upsampling in half precision cannot be differentiated twice")
        return _shrunk(grad, ctx.factor), None, None


def _large(x: Tensor, factor: int) -> tuple[int, int, int, int]:
    images, channels, height, width = x.shape
    return images, channels, height * factor, width * factor


def _enlarged(x: Tensor, factor: int, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(_large(x, factor), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    stride = row_stride(out)
    assert stride is not None
    _run(kernels.enlarge, (x, out), x.shape, factor, (stride,))
    return out


def _shrunk(grad: Tensor, factor: int) -> Tensor:
    if (stride := row_stride(grad)) is None:
        grad, stride = grad.contiguous(memory_format=torch.channels_last), grad.shape[1]
    images, channels, height, width = grad.shape
    shape = torch.Size((images, channels, height // factor, width // factor))
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    _run(kernels.gather, (grad, out), shape, factor, (stride,))
    return out


def _run(kernel: Any, tensors: tuple[Tensor, ...], small: torch.Size, factor: int, strides: tuple[int, ...]) -> None:
    images, channels, height, width = small
    channel_block = min(1 << (channels - 1).bit_length(), _CHANNELS)
    row_block = _VALUES // channel_block
    pixels, unit = images * height * width, unit_of(channels, *strides)
    programs = -(-pixels // row_block) * -(-channels // channel_block)
    launch(
        kernel,
        (programs, 1, 1),
        tensors,
        (pixels, width, *[stride // unit for stride in strides], channels // unit),
        (unit, factor, row_block, channel_block),
        _WARPS,
    )
