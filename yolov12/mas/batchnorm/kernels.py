"""Triton kernels for CUDA and channels_last: BatchNorm of all groups of a micro-batch, and SiLU after it.

PyTorch reads or writes a whole tensor thirteen times for BatchNorm and SiLU, forward and backward, and keeps two
tensors for the backward pass. With one call per group it also needs one launch per group and two more copies to join
the results. These kernels read or write the tensor eight times, treat the group as one more grid dimension, and keep
only BatchNorm's input (as in "In-Place Activated BatchNorm", Rota Bulò, Porzi, Kontschieder, 2018,
https://arxiv.org/abs/1712.02616). Sums are accumulated in fp32 in a fixed order, so results are reproducible bit for
bit.

Triton compiles the kernels on first use and needs a C compiler for that. Without one, `applies` returns False.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.oom import is_out_of_memory

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch supports platforms that Triton does not
    triton = None

__all__ = ["applies", "batch_norm"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK = 4096  # elements that a program processes at a time
_WARPS = 8  # per program
_PROGRAMS = 4  # programs per multiprocessor, enough to keep the memory busy


def applies(x: Tensor, weight: Tensor, means: Tensor) -> bool:
    """Return whether these kernels can normalise a tensor with these parameters and statistics.

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
    if triton is None:
        return False
    x, ones = torch.zeros(2, 1, 1, 1, device=device, dtype=dtype), torch.ones(1, device=device)
    plan, rows = _plan(1, 1, (1, 1), device), torch.zeros(2, 2, 1, device=device)
    try:
        plan.launch(_statistics, (x, rows, *rows.clone()), (1, 1.0))
        _normalized(plan, rows, ones, ones, True, x)
        _gradients(plan, True, x, x, rows, ones, ones)
    except Exception as error:  # the type depends on what is missing: compiler, headers, or support for the card
        if is_out_of_memory(error):
            raise
        logging.getLogger("yolov12.mas").warning("BatchNorm goes group by group, as Triton does not compile: %s", error)
        return False
    return True


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
    plan = _plan(x.shape[1], x.shape[2] * x.shape[3], tuple(sizes), x.device)
    statistics = torch.empty(2, len(sizes), x.shape[1], device=x.device)  # mean, 1/sqrt(variance + eps)
    out: Tensor = _BatchNorm.apply(x, weight, bias, statistics, means, variances, plan, float(eps), silu)
    return out, partial(_normalized, plan, statistics, weight, bias, silu)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, *rest: Any) -> Tensor:
        means, variances, plan, eps, silu = rest
        plan.launch(_statistics, (x, statistics, means, variances), (means.stride(0), eps))
        out = _normalized(plan, statistics, weight, bias, silu, x)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.plan, ctx.silu = plan, silu
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # cheaper than `once_differentiable`
            raise RuntimeError("grouped BatchNorm cannot be differentiated twice")
        x, weight, bias, statistics = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        return *_gradients(ctx.plan, ctx.silu, x, grad, statistics, weight, bias), None, None, None, None, None, None


def _normalized(plan: _Plan, statistics: Tensor, weight: Tensor, bias: Tensor, silu: bool, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    plan.launch(_normalize, (x, statistics, weight, bias, out), (), (silu,))
    return out


def _gradients(
    plan: _Plan, silu: bool, x: Tensor, grad: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out, of_weight, of_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    operands = x, grad, statistics, weight, bias, torch.empty_like(statistics)
    plan.launch(_gradient_sums, operands, (), (silu,))
    plan.launch(_gradient, (*operands, out, of_weight, of_bias), (), (silu,))
    return out, of_weight, of_bias


_HANDS_OUT_KERNELS = triton is not None and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 4)
# Compiled kernels for aligned tensors. The key has everything else for which Triton compiles another kernel.
_compiled: dict[Any, Any] = {}


class _Plan:
    """Launch grid for one shape: blocks of channels × chunks of rows × groups. A row is the channels of one pixel."""

    def __init__(self, channels: int, pixels: int, sizes: tuple[int, ...], device: torch.device) -> None:
        self._device = device
        channel_block = min(triton.next_power_of_2(channels), 64)
        row_block = _BLOCK // channel_block
        channel_blocks = triton.cdiv(channels, channel_block)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        enough = triton.cdiv(_PROGRAMS * processors, channel_blocks * len(sizes))
        splits = max(1, min(enough, triton.cdiv(max(sizes) * pixels, row_block)))
        self._grid = (channel_blocks, splits, len(sizes))
        self._numbers = (pixels, channels, len(sizes), splits, row_block, channel_block)
        self._ends = _ends(sizes, device)
        self._scratch: dict[int, tuple[tuple[Tensor, ...], list[int]]] = {}

    def launch(
        self, kernel: Any, tensors: tuple[Tensor, ...], more: tuple[Any, ...], switches: tuple[bool, ...] = ()
    ) -> None:
        """Launch a kernel. Once it is compiled, skip Triton's checks of the arguments.

        The checks take 50 to 100 microseconds per launch, and a step has hundreds of launches. Triton compiles separate
        kernels for other tensor types (here only the first tensor's varies), for tensors not aligned to 16 bytes, and
        for channels divisible or not divisible by 16.
        """
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self.launch(kernel, tensors, more, switches)
        stream = _stream(self._device.index)
        scratch, scratch_addresses = self._scratch.get(stream) or self._take_scratch(stream)
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = not any(address & 15 for address in addresses)
        key = kernel, self._device.index, self._numbers[1], tensors[0].dtype, switches
        if aligned and (known := _compiled.get(key)) is not None:
            known.run(
                *self._grid, stream, known.function, known.packed_metadata, None, None, None,
                *addresses, *scratch_addresses, *more, *switches, *self._numbers,
            )  # fmt: skip
            return None
        found = kernel[self._grid](*tensors, *scratch, *more, *switches, *self._numbers, num_warps=_WARPS)
        if _HANDS_OUT_KERNELS and aligned:
            _compiled[key] = found
        return None

    def _take_scratch(self, stream: int) -> tuple[tuple[Tensor, ...], list[int]]:
        """Return memory for sums of chunks and for counters of finished chunks, which are zero between launches."""
        groups, channels, splits = self._grid[2], self._numbers[1], self._grid[1]
        tensors = (self._ends, *_scratch(self._device, stream, 2 * groups * splits * channels, groups * self._grid[0]))
        self._scratch[stream] = tensors, [tensor.data_ptr() for tensor in tensors]
        return self._scratch[stream]


_plan = functools.lru_cache(maxsize=4096)(_Plan)


@functools.lru_cache(maxsize=1024)
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the end of each group in images, after a leading zero. Cached, as the copy waits for the device."""
    return torch.tensor((0, *sizes)).cumsum(0).to(device, torch.int32)


_scratches: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def _scratch(device: torch.device, stream: int, sums: int, counters: int) -> tuple[Tensor, Tensor]:
    """Return scratch memory that all launches on one stream share. They run one after the other."""
    known = _scratches.get((device, stream))
    if known is None or known[0].numel() < sums or known[1].numel() < counters:
        known = torch.empty(sums, device=device), torch.zeros(counters, dtype=torch.int32, device=device)
        _scratches[device, stream] = known
    return known


def _stream(device: int) -> int:
    if _HANDS_OUT_KERNELS:  # Triton's own way; several times faster than a stream object
        return int(triton.runtime.driver.active.get_current_stream(device))
    return int(torch.cuda.current_stream(device).cuda_stream)


if triton is not None:
    # In all kernels x, grad and out have shape (images * pixels, channels), ends has shape (groups + 1), and the others
    # are as above. One compiled kernel serves every number of images: among the sizes only the number of channels helps
    # the compiler, which then loads several values at once.
    _jit = triton.jit(do_not_specialize=["pixels", "groups", "splits", "stride"])

    @triton.jit
    def _rows(ends, pixels, splits):
        """Return the first row and the number of rows of this program's group, and this program's range of rows."""
        group, split = tl.program_id(2), tl.program_id(1)
        first = tl.load(ends + group).to(tl.int64) * pixels
        count = tl.load(ends + group + 1).to(tl.int64) * pixels - first
        share = tl.cdiv(count, splits)
        start = first + split * share
        return first, count, start, tl.minimum(start + share, first + count)

    @triton.jit
    def _is_last(partial, counters, a, b, c, ok, channels, groups, splits):
        """Store two sums of this program's chunk. Return whether all other chunks of its group are stored, too."""
        group = tl.program_id(2)
        at = (group * splits + tl.program_id(1)) * channels + c
        tl.store(partial + at, a, mask=ok)
        tl.store(partial + groups * splits * channels + at, b, mask=ok)
        tl.debug_barrier()
        counter = counters + group * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
        if last:
            tl.store(counter, 0)
        return last

    @triton.jit
    def _total(partial, c, ok, channels, splits, row_block: tl.constexpr, channel_block: tl.constexpr):
        """Sum over the chunks of this program's group. Other processors wrote them, so this one's cache is bypassed."""
        total = tl.zeros((row_block, channel_block), tl.float32)
        for split in range(0, splits, row_block):
            s = split + tl.arange(0, row_block)
            place = (tl.program_id(2) * splits + s)[:, None] * channels + c[None, :]
            inside = (s < splits)[:, None] & ok[None, :]
            total += tl.load(partial + place, mask=inside, other=0.0, cache_modifier=".cg")
        return tl.sum(total, 0)

    @_jit
    def _statistics(
        x,
        statistics,
        means,
        variances,
        ends,
        partial,
        counters,
        stride,
        eps,
        pixels,
        channels,
        groups,
        splits,
        row_block: tl.constexpr,
        channel_block: tl.constexpr,
    ):
        """Compute mean and variance from sums of x and x², shifted by a sample's mean so that no digits cancel."""
        first, count, start, stop = _rows(ends, pixels, splits)
        group = tl.program_id(2)
        c = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
        ok = c < channels
        some = tl.minimum(count, row_block)
        each = tl.arange(0, row_block)
        place = (first + each * (count // some))[:, None] * channels + c[None, :]
        sample = tl.load(x + place, mask=(each < some)[:, None] & ok[None, :], other=0.0).to(tl.float32)
        shift = tl.sum(sample, 0) / some
        total = tl.zeros((row_block, channel_block), tl.float32)
        square = tl.zeros((row_block, channel_block), tl.float32)
        for row in range(start, stop, row_block):
            r = row + tl.arange(0, row_block)
            inside = (r < stop)[:, None] & ok[None, :]
            value = tl.load(x + r[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, value - shift[None, :], 0.0)
            total += value
            square += value * value
        if _is_last(partial, counters, tl.sum(total, 0), tl.sum(square, 0), c, ok, channels, groups, splits):
            off = _total(partial, c, ok, channels, splits, row_block, channel_block) / count
            squares = _total(partial + groups * splits * channels, c, ok, channels, splits, row_block, channel_block)
            variance = tl.maximum(squares / count - off * off, 0.0)
            tl.store(statistics + group * channels + c, off + shift, mask=ok)
            tl.store(statistics + (groups + group) * channels + c, 1.0 / tl.sqrt(variance + eps), mask=ok)
            unbiased = variance * (count.to(tl.float32) / tl.maximum(count - 1, 1).to(tl.float32))
            tl.store(means + group * stride + c, off + shift, mask=ok)
            tl.store(variances + group * stride + c, unbiased, mask=ok)

    @_jit
    def _normalize(
        x,
        statistics,
        weight,
        bias,
        out,
        ends,
        partial,
        counters,
        silu: tl.constexpr,
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
        mean = tl.load(statistics + at, mask=ok, other=0.0)
        scale = tl.load(statistics + groups * channels + at, mask=ok, other=0.0)
        scale *= tl.load(weight + c, mask=ok, other=0.0)
        shift = tl.load(bias + c, mask=ok, other=0.0)
        for row in range(start, stop, row_block):
            r = row + tl.arange(0, row_block)
            inside = (r < stop)[:, None] & ok[None, :]
            place = r[:, None] * channels + c[None, :]
            value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
            if silu:
                value *= tl.sigmoid(value)
            tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _slope(x, grad, place, inside, mean, scale, factor, shift, silu: tl.constexpr):
        """Return the gradient of the normalised and scaled value, and the normalised value."""
        slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        value = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
        if silu:
            scaled = value * factor[None, :] + shift[None, :]
            sigmoid = tl.sigmoid(scaled)
            slope *= sigmoid * (1.0 + scaled * (1.0 - sigmoid))
        return slope, value

    @_jit
    def _gradient_sums(
        x,
        grad,
        statistics,
        weight,
        bias,
        sums,
        ends,
        partial,
        counters,
        silu: tl.constexpr,
        pixels,
        channels,
        groups,
        splits,
        row_block: tl.constexpr,
        channel_block: tl.constexpr,
    ):
        """Sum up the gradient, and the gradient times the normalised value, over each group."""
        _, _, start, stop = _rows(ends, pixels, splits)
        c = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
        ok = c < channels
        at = tl.program_id(2) * channels + c
        mean = tl.load(statistics + at, mask=ok, other=0.0)
        scale = tl.load(statistics + groups * channels + at, mask=ok, other=0.0)
        factor = tl.load(weight + c, mask=ok, other=0.0)
        shift = tl.load(bias + c, mask=ok, other=0.0)
        plain = tl.zeros((row_block, channel_block), tl.float32)
        times = tl.zeros((row_block, channel_block), tl.float32)
        for row in range(start, stop, row_block):
            r = row + tl.arange(0, row_block)
            inside = (r < stop)[:, None] & ok[None, :]
            place = r[:, None] * channels + c[None, :]
            slope, value = _slope(x, grad, place, inside, mean, scale, factor, shift, silu)
            plain += slope
            times += slope * value
        if _is_last(partial, counters, tl.sum(plain, 0), tl.sum(times, 0), c, ok, channels, groups, splits):
            second = partial + groups * splits * channels
            tl.store(sums + at, _total(partial, c, ok, channels, splits, row_block, channel_block), mask=ok)
            of_weight = _total(second, c, ok, channels, splits, row_block, channel_block)
            tl.store(sums + groups * channels + at, of_weight, mask=ok)

    @_jit
    def _gradient(
        x,
        grad,
        statistics,
        weight,
        bias,
        sums,
        out,
        of_weight,
        of_bias,
        ends,
        partial,
        counters,
        silu: tl.constexpr,
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
        mean = tl.load(statistics + at, mask=ok, other=0.0)
        scale = tl.load(statistics + groups * channels + at, mask=ok, other=0.0)
        factor = tl.load(weight + c, mask=ok, other=0.0)
        shift = tl.load(bias + c, mask=ok, other=0.0)
        plain = tl.load(sums + at, mask=ok, other=0.0) / count
        times = tl.load(sums + groups * channels + at, mask=ok, other=0.0) / count
        for row in range(start, stop, row_block):
            r = row + tl.arange(0, row_block)
            inside = (r < stop)[:, None] & ok[None, :]
            place = r[:, None] * channels + c[None, :]
            slope, value = _slope(x, grad, place, inside, mean, scale, factor, shift, silu)
            slope = (slope - plain[None, :] - value * times[None, :]) * (scale * factor)[None, :]
            tl.store(out + place, slope.to(out.dtype.element_ty), mask=inside)
        if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):  # sums over all groups
            plain = tl.zeros((channel_block,), tl.float32)
            times = tl.zeros((channel_block,), tl.float32)
            for group in range(groups):
                plain += tl.load(sums + group * channels + c, mask=ok, other=0.0)
                times += tl.load(sums + (groups + group) * channels + c, mask=ok, other=0.0)
            tl.store(of_bias + c, plain.to(of_bias.dtype.element_ty), mask=ok)
            tl.store(of_weight + c, times.to(of_weight.dtype.element_ty), mask=ok)
