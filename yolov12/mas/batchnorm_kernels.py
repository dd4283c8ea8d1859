"""Batch normalisation of all groups of a micro-batch in one go, on CUDA, for tensors in channels_last.

Calling PyTorch's kernels once a group costs a launch each and two copies to put the results together: a quarter of a
training step at 128 images in groups of 32. These kernels read and write the whole tensor with the group as one more
grid dimension. Sums are in fp32 and in a fixed order, so results repeat bit for bit.

Triton compiles them when they are first used, for which it needs a C compiler; where it finds none they do not apply.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from yolov12.mas.failures import is_out_of_memory

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform PyTorch is on
    triton = None

__all__ = ["applies", "grouped_batch_norm"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PROGRAMS = 2048  # enough for the largest cards to have their memory busy
_BLOCK = 2048  # elements a program works on at once


def applies(x: Tensor) -> bool:
    """Whether these kernels can normalise a tensor, and faster than PyTorch's, group by group."""
    return (
        x.is_cuda
        and x.dtype in _DTYPES
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() * x.element_size() >= _worthwhile_bytes(x.device)
        and _compiles(x.device)
    )


@functools.cache
def _worthwhile_bytes(device: torch.device) -> int:
    # Launches from Python cost the host about what the copies cost a card this size for a tensor this small.
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * 2**17


@functools.cache
def _compiles(device: torch.device) -> bool:
    if triton is None:
        return False
    x = torch.zeros(2, 1, 1, 1, device=device)
    try:
        _GroupedBatchNorm.apply(x, x[0, 0, 0], x[0, 0, 0], x[:, 0, 0], x[:, 0, 0].clone(), (1, 1), 1.0)
    except Exception as error:  # whatever a compiler that is not there, or not for this card, makes of it
        if is_out_of_memory(error):
            raise
        logging.getLogger("yolov12.mas").warning("BatchNorm goes group by group, as Triton does not compile: %s", error)
        return False
    return True


def grouped_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor, sizes: Sequence[int], eps: float
) -> Tensor:
    """Normalise groups of images with their own statistics.

    Args:
        x: (images, channels, height, width), channels_last.
        weight, bias: (channels,), fp32.
        means, variances: (groups, channels), fp32: are filled with mean and unbiased variance of each group.
        sizes: Images in each group.
        eps: Added to the biased variance.

    Returns:
        As `x`.
    """
    out: Tensor = _GroupedBatchNorm.apply(x, weight, bias, means, variances, tuple(sizes), eps)
    return out


class _GroupedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        means, variances, sizes, eps = rest
        shape = _shape(x.shape[1], x.shape[2] * x.shape[3], sizes, x.device)
        partial = x.new_empty(2, len(sizes), shape.splits, shape.channels, dtype=torch.float32)
        saved = x.new_empty(2, len(sizes), shape.channels, dtype=torch.float32)  # mean, 1/sqrt(variance + eps)
        out = torch.empty_like(x)
        with _on(x.device):
            _launch(_sums, shape.grid, (x, shape.ends, partial, *shape.numbers, *shape.blocks))
            rows = (x, shape.ends, partial, saved, means, variances, means.stride(0), *shape.numbers, eps)
            _launch(_statistics, shape.channel_grid, (*rows, shape.blocks[1]))
            _launch(_normalize, shape.grid, (x, shape.ends, saved, weight, bias, out, *shape.numbers, *shape.blocks))
        ctx.save_for_backward(x, weight, saved)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        shape = _shape(x.shape[1], x.shape[2] * x.shape[3], ctx.sizes, x.device)
        partial = x.new_empty(2, len(ctx.sizes), shape.splits, shape.channels, dtype=torch.float32)
        out = torch.empty_like(x)
        with _on(x.device):
            _launch(_gradient_sums, shape.grid, (x, grad, shape.ends, saved, partial, *shape.numbers, *shape.blocks))
            sums = partial.sum(2)  # of grad, and of grad times the normalised value
            _launch(
                _gradient, shape.grid, (x, grad, shape.ends, saved, sums, weight, out, *shape.numbers, *shape.blocks)
            )
        of_bias, of_weight = sums.sum(1)
        return out, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None, None, None


def _on(device: torch.device) -> Any:
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


_compiled: dict[Any, Any] = {}  # by kernel, device and all that Triton compiles another one for
_HANDS_OUT_KERNELS = triton is not None and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 4)


def _launch(kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
    """Launch a kernel; from the second time on, past what Triton asks of the arguments each time.

    That costs the host 50 to 100 microseconds a launch, of which a step has hundreds. Numbers are part of the key as
    they are, tensors by type and alignment: more than Triton looks at.
    """
    key = (kernel.fn, *[_kind(arg) if isinstance(arg, Tensor) else arg for arg in args])
    known = _compiled.get(key)
    if known is None:
        found = kernel[grid](*args)
        if _HANDS_OUT_KERNELS:
            _compiled[key] = found
        return
    stream = torch.cuda.current_stream().cuda_stream
    known.run(*grid, stream, known.function, known.packed_metadata, None, None, None, *args)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.data_ptr() % 16 == 0, tensor.device


class _Shape:
    """How a tensor is cut up: channels × chunks of rows × groups. A row is all channels of a pixel."""

    def __init__(self, channels: int, pixels: int, sizes: tuple[int, ...], device: torch.device) -> None:
        self.channels = channels
        channel_block = min(triton.next_power_of_2(channels), 64)
        row_block = _BLOCK // channel_block
        channel_blocks = triton.cdiv(channels, channel_block)
        enough = triton.cdiv(_PROGRAMS, channel_blocks * len(sizes))
        self.splits = max(1, min(enough, triton.cdiv(max(sizes) * pixels, row_block)))
        self.ends = _ends(sizes, device)
        self.numbers = (pixels, channels, len(sizes), self.splits)
        self.grid = (channel_blocks, self.splits, len(sizes))
        self.channel_grid = (channel_blocks, len(sizes), 1)
        self.blocks = (row_block, channel_block)


_shape = functools.lru_cache(maxsize=512)(_Shape)


@functools.lru_cache(maxsize=64)
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each group ends, in images, after a zero. Kept, as copying it to the device waits for the device."""
    return torch.tensor((0, *sizes)).cumsum(0).to(device, torch.int32)


if triton is not None:
    # In all kernels x, grad and out are (images * pixels, channels); ends is (groups + 1); the others as above.

    @triton.jit
    def _rows(ends, pixels, splits):
        """First row of this program's group, its number of rows, and the range of rows that is this program's."""
        group, split = tl.program_id(2), tl.program_id(1)
        first = tl.load(ends + group).to(tl.int64) * pixels
        count = tl.load(ends + group + 1).to(tl.int64) * pixels - first
        share = tl.cdiv(count, splits)
        start = first + split * share
        return first, count, start, tl.minimum(start + share, first + count)

    @triton.jit
    def _sums(x, ends, partial, pixels, channels, groups, splits, row_block: tl.constexpr, channel_block: tl.constexpr):
        """Sums of x and x² of a chunk, less the group's first row, so that a large mean cancels nothing."""
        first, _, start, stop = _rows(ends, pixels, splits)
        c = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
        ok = c < channels
        shift = tl.load(x + first * channels + c, mask=ok, other=0.0).to(tl.float32)
        total = tl.zeros((row_block, channel_block), tl.float32)
        square = tl.zeros((row_block, channel_block), tl.float32)
        for row in range(start, stop, row_block):
            r = row + tl.arange(0, row_block)
            inside = (r < stop)[:, None] & ok[None, :]
            value = tl.load(x + r[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, value - shift[None, :], 0.0)
            total += value
            square += value * value
        at = (tl.program_id(2) * splits + tl.program_id(1)) * channels + c
        tl.store(partial + at, tl.sum(total, 0), mask=ok)
        tl.store(partial + groups * splits * channels + at, tl.sum(square, 0), mask=ok)

    @triton.jit
    def _statistics(
        x,
        ends,
        partial,
        saved,
        means,
        variances,
        stride,
        pixels,
        channels,
        groups,
        splits,
        eps,
        channel_block: tl.constexpr,
    ):
        group = tl.program_id(1)
        c = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
        ok = c < channels
        first = tl.load(ends + group).to(tl.int64) * pixels
        count = (tl.load(ends + group + 1).to(tl.int64) * pixels - first).to(tl.float32)
        total = tl.zeros((channel_block,), tl.float32)
        square = tl.zeros((channel_block,), tl.float32)
        for split in range(splits):
            at = (group * splits + split) * channels + c
            total += tl.load(partial + at, mask=ok, other=0.0)
            square += tl.load(partial + groups * splits * channels + at, mask=ok, other=0.0)
        off = total / count
        variance = tl.maximum(square / count - off * off, 0.0)
        mean = off + tl.load(x + first * channels + c, mask=ok, other=0.0).to(tl.float32)
        tl.store(saved + group * channels + c, mean, mask=ok)
        tl.store(saved + (groups + group) * channels + c, 1.0 / tl.sqrt(variance + eps), mask=ok)
        tl.store(means + group * stride + c, mean, mask=ok)
        tl.store(variances + group * stride + c, variance * (count / tl.maximum(count - 1.0, 1.0)), mask=ok)

    @triton.jit
    def _normalize(
        x,
        ends,
        saved,
        weight,
        bias,
        out,
        pixels,
        channels,
        groups,
        splits,
        row_block: tl.constexpr,
        channel_block: tl.constexpr,
    ):
        _, _, start, stop = _rows(ends, pixels, splits)
        c = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
        ok = c < channels
        at = tl.program_id(2) * channels + c
        scale = tl.load(saved + groups * channels + at, mask=ok, other=0.0) * tl.load(weight + c, mask=ok, other=0.0)
        shift = tl.load(bias + c, mask=ok, other=0.0)
        mean = tl.load(saved + at, mask=ok, other=0.0)
        for row in range(start, stop, row_block):
            r = row + tl.arange(0, row_block)
            inside = (r < stop)[:, None] & ok[None, :]
            place = r[:, None] * channels + c[None, :]
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
            tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gradient_sums(
        x,
        grad,
        ends,
        saved,
        partial,
        pixels,
        channels,
        groups,
        splits,
        row_block: tl.constexpr,
        channel_block: tl.constexpr,
    ):
        _, _, start, stop = _rows(ends, pixels, splits)
        c = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
        ok = c < channels
        at = tl.program_id(2) * channels + c
        mean = tl.load(saved + at, mask=ok, other=0.0)
        scale = tl.load(saved + groups * channels + at, mask=ok, other=0.0)
        plain = tl.zeros((row_block, channel_block), tl.float32)
        times = tl.zeros((row_block, channel_block), tl.float32)
        for row in range(start, stop, row_block):
            r = row + tl.arange(0, row_block)
            inside = (r < stop)[:, None] & ok[None, :]
            place = r[:, None] * channels + c[None, :]
            slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            plain += slope
            times += slope * (value - mean[None, :]) * scale[None, :]
        at = (tl.program_id(2) * splits + tl.program_id(1)) * channels + c
        tl.store(partial + at, tl.sum(plain, 0), mask=ok)
        tl.store(partial + groups * splits * channels + at, tl.sum(times, 0), mask=ok)

    @triton.jit
    def _gradient(
        x,
        grad,
        ends,
        saved,
        sums,
        weight,
        out,
        pixels,
        channels,
        groups,
        splits,
        row_block: tl.constexpr,
        channel_block: tl.constexpr,
    ):
        _, count, start, stop = _rows(ends, pixels, splits)
        c = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
        ok = c < channels
        at = tl.program_id(2) * channels + c
        mean = tl.load(saved + at, mask=ok, other=0.0)
        scale = tl.load(saved + groups * channels + at, mask=ok, other=0.0)
        of_bias = tl.load(sums + at, mask=ok, other=0.0) / count.to(tl.float32)
        of_weight = tl.load(sums + groups * channels + at, mask=ok, other=0.0) / count.to(tl.float32)
        factor = scale * tl.load(weight + c, mask=ok, other=0.0)
        for row in range(start, stop, row_block):
            r = row + tl.arange(0, row_block)
            inside = (r < stop)[:, None] & ok[None, :]
            place = r[:, None] * channels + c[None, :]
            slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
            value = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
            slope = (slope - of_bias[None, :] - value * of_weight[None, :]) * factor[None, :]
            tl.store(out + place, slope.to(out.dtype.element_ty), mask=inside)
