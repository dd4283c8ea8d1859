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
from yolov12.mas.triton_launch import compiles, unfilled

try:
    from yolov12.mas.batchnorm import kernels
except ImportError:  # PyTorch supports platforms that Triton does not
    kernels = None  # type: ignore[assignment]

__all__ = ["applies", "batch_norm", "row_stride"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Chosen among 15 and 11 variants, by their speed at the shapes of YOLO12-S on an H200.
_SUMS = Tuning(values=1024, channels=64, warps=4, unroll=4, programs=4)
_EACH = Tuning(values=2048, channels=128, warps=4)


def applies(x: Tensor, weight: Tensor, means: Tensor) -> bool:
    """Return whether the kernels can normalise a tensor with these parameters and statistics.

    They can if `x` is a 4-dimensional channels_last tensor of fp16, bf16 or fp32 on a CUDA device for which Triton
    compiles, and `weight` and `means` are fp32.
    """
    return (
        x.is_cuda
        and x.dtype in _DTYPES
        and weight.dtype == means.dtype == torch.float32
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and _compiles(x.device, x.dtype)
    )


@functools.cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    if kernels is None:
        return False
    x, ones = torch.zeros(2, 1, 1, 1, device=device, dtype=dtype), torch.ones(1, device=device)
    grids, rows = _grids(1, 1, (1, 1), device), torch.zeros(2, 2, 1, device=device)

    def run() -> None:
        grids[0].launch(kernels.statistics, (x, rows, *rows.clone()), (1, 1.0))
        _normalized(grids, rows, ones, ones, True, x)
        _gradients(grids, True, x, x, rows, ones, ones)

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
    out: Tensor = _BatchNorm.apply(x, weight, bias, statistics, *rest)  # type: ignore[no-untyped-call]
    return out, partial(_normalized, grids, statistics, weight, bias, silu)


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


@functools.lru_cache(maxsize=4096)
def _grids(channels: int, pixels: int, sizes: tuple[int, ...], device: torch.device) -> _Grids:
    """Return the grids of kernels that compute sums, and of the others."""
    return LaunchGrid(channels, pixels, sizes, device, _SUMS), LaunchGrid(channels, pixels, sizes, device, _EACH)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, *rest: Any) -> Tensor:
        means, variances, grids, eps, silu = rest
        grids[0].launch(kernels.statistics, (x, statistics, means, variances), (means.stride(0), eps))
        out = _normalized(grids, statistics, weight, bias, silu, x)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.grids, ctx.silu = grids, silu
        return out

    @staticmethod
    @unfilled
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # cheaper than `once_differentiable`
            raise RuntimeError("grouped BatchNorm cannot be differentiated twice")
        x, weight, bias, statistics = ctx.saved_tensors
        return *_gradients(ctx.grids, ctx.silu, x, grad, statistics, weight, bias), None, None, None, None, None, None


@unfilled
def _normalized(grids: _Grids, statistics: Tensor, weight: Tensor, bias: Tensor, silu: bool, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    grids[1].launch(kernels.normalize, (x, statistics, weight, bias, out), switches=(silu,))
    return out


def _gradients(
    grids: _Grids, silu: bool, x: Tensor, grad: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if (stride := row_stride(grad)) is None:
        grad, stride = grad.contiguous(memory_format=torch.channels_last), x.shape[1]
    out, of_weight, of_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    operands = x, grad, statistics, weight, bias, torch.empty_like(statistics)
    grids[0].launch(kernels.gradient_sums, operands, strides=(stride,), switches=(silu,))
    grids[1].launch(kernels.gradient, (*operands, out, of_weight, of_bias), strides=(stride,), switches=(silu,))
    return out, of_weight, of_bias
