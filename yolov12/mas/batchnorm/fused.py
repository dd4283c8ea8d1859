"""BatchNorm of all groups of a micro-batch at once, and SiLU after it, on CUDA and in channels_last.

PyTorch reads or writes a whole tensor thirteen times for BatchNorm and SiLU, forward and backward, and keeps two
tensors for the backward pass. With one call per group it also needs one launch per group and two more copies to join
the results. The Triton kernels read or write the tensor eight times, treat the group as one more grid dimension, and
keep only BatchNorm's input (as in "In-Place Activated BatchNorm", Rota Bulò, Porzi, Kontschieder, 2018,
https://arxiv.org/abs/1712.02616). Sums are accumulated in fp32 in a fixed order, so results are reproducible bit for
bit.

Triton compiles the kernels on first use and needs a C compiler for that. Without one, `applies` returns False.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.batchnorm.launch_grid import LaunchGrid, Tuning
from yolov12.mas.triton_launch import compiles, launches_on, unfilled

try:
    from yolov12.mas.batchnorm import kernels
except ImportError:  # PyTorch supports platforms that Triton does not
    kernels = None  # type: ignore[assignment]

__all__ = ["applies", "batch_norm", "batch_norm_into", "row_stride", "writes_into"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Chosen among 15 and 11 variants, by their speed at the shapes of YOLO12-S on an H200.
_SUMS = Tuning(values=1024, channels=64, warps=4, unroll=4, programs=4)
_EACH = Tuning(values=2048, channels=128, warps=4)
_CHANNELS = 64


def applies(x: Tensor, weight: Tensor, means: Tensor) -> bool:
    """Return whether the kernels can normalise a tensor with these parameters and statistics.

    They can if `x` is a 4-dimensional channels_last tensor of fp16, bf16 or fp32 on a CUDA device for which Triton
    compiles, and `weight` and `means` are fp32. On the meta device, see `triton_launch.launch`, Triton is not asked.
    """
    return (
        launches_on(x.device)
        and x.dtype in _DTYPES
        and weight.dtype == means.dtype == torch.float32
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and (x.is_meta or _compiles(x.device, x.dtype))
    )


@functools.cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    if kernels is None:
        return False
    # With the channels of kernels that most models need, too, as each takes time to compile.
    x, ones = torch.zeros(2, _CHANNELS, 1, 1, device=device, dtype=dtype), torch.ones(_CHANNELS, device=device)
    grids, rows = _grids(_CHANNELS, 1, (1, 1), device), torch.zeros(2, 2, _CHANNELS, device=device)

    def run() -> None:
        grids[0].launch(kernels.statistics, (x, rows, *rows.clone()), (_CHANNELS, 1.0))
        _normalized(grids, rows, ones, ones, True, x)
        _gradients(grids, True, x, x, None, rows, ones, ones)

    return compiles(run, "BatchNorm goes group by group")


@unfilled
def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    means: Tensor,
    variances: Tensor,
    sizes: Sequence[int],
    eps: float,
    silu: bool = False,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Normalise groups of images, each with its own statistics.

    Args:
        x: (images, channels, height, width), channels_last.
        weight, bias: (channels,), fp32.
        means, variances: (groups, channels), fp32. Receive the mean and the unbiased variance of each group.
        sizes: Images in each group, in order.
        eps: Value added to the biased variance.
        silu: Whether SiLU is applied to the result.

    Returns:
        The result, with the shape and type of `x`, and a function that computes it again from `x`, bit for bit.
    """
    grids = _grids(x.shape[1], x.shape[2] * x.shape[3], tuple(sizes), x.device)
    statistics = torch.empty(2, len(sizes), x.shape[1], device=x.device)  # mean, 1/sqrt(variance + eps)
    rest = means, variances, grids, float(eps), silu
    out: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, None, statistics, (), None, *rest
    )
    return out, partial(_normalized, grids, statistics, weight, bias, silu)


@unfilled
def batch_norm_into(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    means: Tensor,
    variances: Tensor,
    sizes: Sequence[int],
    eps: float,
    silu: bool = False,
    residual: Tensor | None = None,
    part: Tensor | None = None,
    first: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Normalise groups of images like `batch_norm`, add a residual, and write to a slice of a concatenation.

    Args:
        x, weight, bias, means, variances, sizes, eps, silu: See `batch_norm`.
        residual: Tensor that is added to the result. Its shape and type are those of `x`, see also `row_stride`.
        part: Slice along the channels that receives the result; None for a new tensor. It may have no history.
        first: First channel of the result's copy outside of `part`; None for no copy.

    Returns:
        The result, and the copy of its channels from `first` on, which is contiguous in channels_last.
    """
    grids = _grids(x.shape[1], x.shape[2] * x.shape[3], tuple(sizes), x.device)
    statistics = torch.empty(2, len(sizes), x.shape[1], device=x.device)
    rest = means, variances, grids, float(eps), silu
    # Hidden in a tuple, as autograd makes a view of an argument that is also a result.
    slices = () if part is None else (part,)
    found = _BatchNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, residual, statistics, slices, first, *rest
    )
    return found if first is not None else (found, None)


def writes_into(device: torch.device) -> bool:
    """Return whether `batch_norm_into` may apply to tensors of a device."""
    return kernels is not None and launches_on(device)


def row_stride(x: Tensor) -> int | None:
    """Return the distance of neighbouring pixels in memory, in values; None for other layouts than channels_last.

    All pixels of all images have this distance, as in a slice of a channels_last tensor along its channels.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.shape[1]
    images, channels, height, width = x.shape
    steps = ((width, 1), (height, width), (images, height * width))
    strides = (x.stride(3), x.stride(2), x.stride(0))
    stride = next((found // pixels for found, (size, pixels) in zip(strides, steps, strict=True) if size > 1), channels)
    even = all(size == 1 or found == stride * pixels for found, (size, pixels) in zip(strides, steps, strict=True))
    return stride if even and stride >= channels and (channels == 1 or x.stride(1) == 1) else None


_Grids = tuple[LaunchGrid, LaunchGrid]


@functools.cache  # a captured CUDA graph uses their scratch memory
def _grids(channels: int, pixels: int, sizes: tuple[int, ...], device: torch.device) -> _Grids:
    """Return the grids of kernels that compute sums, and of the others."""
    return LaunchGrid(channels, pixels, sizes, device, _SUMS), LaunchGrid(channels, pixels, sizes, device, _EACH)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        statistics: Tensor,
        slices: tuple[Tensor, ...],
        first: int | None,
        *rest: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        means, variances, grids, eps, silu = rest
        grids[0].launch(kernels.statistics, (x, statistics, means, variances), (means.stride(0), eps))
        out = slices[0] if slices else torch.empty_like(x)
        tail = None if first is None else _empty_tail(x, first)
        _normalize(grids, silu, x, statistics, weight, bias, out, tail, residual)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.grids, ctx.silu, ctx.adds, ctx.first = grids, silu, residual is not None, first
        return out if tail is None else (out, tail)

    @staticmethod
    @unfilled
    def backward(ctx: Any, grad: Tensor, of_tail: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # cheaper than `once_differentiable`
            raise RuntimeError("grouped BatchNorm cannot be differentiated twice")
        x, weight, bias, statistics = ctx.saved_tensors
        if ctx.adds and of_tail is not None:  # the residual needs the sum, too
            grad, of_tail = _with_tail(grad, of_tail, ctx.first), None
        found = _gradients(ctx.grids, ctx.silu, x, grad, of_tail, statistics, weight, bias)
        return *found, grad if ctx.adds else None, *[None] * 8


def _empty_tail(x: Tensor, first: int) -> Tensor:
    images, channels, height, width = x.shape
    shape = images, channels - first, height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _with_tail(grad: Tensor, of_tail: Tensor, first: int) -> Tensor:
    if first == 0:
        return of_tail + grad
    total = grad.clone(memory_format=torch.channels_last)
    total[:, first:] += of_tail
    return total


def _normalize(
    grids: _Grids,
    silu: bool,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    tail: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    strides = _stride(out), *_tail_strides(x, tail), 0 if residual is None else _stride(residual)
    tensors = x, statistics, weight, bias, out, out if tail is None else tail, x if residual is None else residual
    switches = silu, tail is not None, residual is not None
    grids[1].launch(kernels.normalize, tensors, strides=strides, switches=switches)


@unfilled
def _normalized(grids: _Grids, statistics: Tensor, weight: Tensor, bias: Tensor, silu: bool, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _normalize(grids, silu, x, statistics, weight, bias, out)
    return out


def _gradients(
    grids: _Grids,
    silu: bool,
    x: Tensor,
    grad: Tensor,
    tail: Tensor | None,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, tail = _readable(grad), None if tail is None else _readable(tail)
    out, of_weight, of_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    operands = x, grad, grad if tail is None else tail, statistics, weight, bias, torch.empty_like(statistics)
    strides, switches = (_stride(grad), *_tail_strides(x, tail)), (silu, tail is not None)
    grids[0].launch(kernels.gradient_sums, operands, strides=strides, switches=switches)
    grids[1].launch(kernels.gradient, (*operands, out, of_weight, of_bias), strides=strides, switches=switches)
    return out, of_weight, of_bias


def _readable(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last) if row_stride(grad) is None else grad


def _stride(x: Tensor) -> int:
    stride = row_stride(x)
    assert stride is not None
    return stride


def _tail_strides(x: Tensor, tail: Tensor | None) -> tuple[int, int]:
    """Return the row stride of a tail, and the channel of `x` at which it begins."""
    return (0, 0) if tail is None else (_stride(tail), x.shape[1] - tail.shape[1])
