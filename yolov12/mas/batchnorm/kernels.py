"""Triton kernels for BatchNorm of all groups of a micro-batch, and SiLU after it.

In all kernels x, grad and out have shape (images * pixels, channels), where a row is the channels of one pixel, and
ends has shape (groups + 1). A program takes a block of channels (grid axis 0) of one group (axis 2). The programs of
axis 1 take turns: they read neighbouring blocks of rows at the same time, and go through the group together.

The number of channels and strides are given in units of `unit` values. The compiler then knows that they can be divided
by it, and loads several values at once, without another kernel for each number of channels.

An output that is a slice of a concatenation can have a copy outside of it, the tail, which begins at channel `first`.
Both have a gradient then, and the kernels add them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["gradient", "gradient_sums", "normalize", "statistics"]

_NUMBERS = ["out_units", "grad_units", "tail_units", "first_units", "residual_units"]
_jit = triton.jit(do_not_specialize=["pixels", "units", "groups", "splits", "stride", *_NUMBERS])


@triton.jit
def _sigmoid_ptx(value):
    """Return 1 / (1 + exp(-value)) to 1e-6. The approximations of the hardware take a third of the instructions.

    They are used without Triton's treatment of numbers below 1e-38, as here these are added to 1, or zero will do.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.ftz.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [value],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


# One of two functions, and not one that reads a constant: see `compile_ahead`.
_sigmoid = tl.sigmoid if torch.version.hip else _sigmoid_ptx


@triton.jit
def _group(ends, pixels):
    """Return the first row and the number of rows of this program's group."""
    group = tl.program_id(2)
    first = tl.load(ends + group).to(tl.int64) * pixels
    return first, tl.load(ends + group + 1).to(tl.int64) * pixels - first


@triton.jit
def _channels(statistics, weight, bias, channels, groups, channel_block: tl.constexpr):
    """Return this program's channels, which of them exist, their place in statistics of its group, and their values."""
    c = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
    ok = c < channels
    of = tl.program_id(2) * channels + c
    mean = tl.load(statistics + of, mask=ok, other=0.0)
    deviation = tl.load(statistics + groups * channels + of, mask=ok, other=0.0)
    scale = deviation * tl.load(weight + c, mask=ok, other=0.0)
    return c, ok, of, mean, deviation, scale, tl.load(bias + c, mask=ok, other=0.0)


@triton.jit
def _place(tensor, row, r, c, stride):
    """Return the addresses of a block of values: channels `c` of rows `row + r`."""
    return tensor + row * stride + (r[:, None] * stride + c[None, :])


@triton.jit
def _is_last(partial, counters, a, b, c, ok, channels, groups, splits):
    """Store two sums of this program. Return whether all other programs of its group have stored theirs, too."""
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
def _totals(partial, c, ok, channels, groups, splits, row_block: tl.constexpr, channel_block: tl.constexpr):
    """Sum over the programs of this group. They ran on other processors, so this one's cache is bypassed.

    The last program does this alone, and waits for each iteration's loads: a large block saves more time than it costs.
    """
    first = tl.zeros((row_block, channel_block), tl.float32)
    second = tl.zeros((row_block, channel_block), tl.float32)
    for split in range(0, splits, row_block):
        s = split + tl.arange(0, row_block)
        place = partial + (tl.program_id(2) * splits + s)[:, None] * channels + c[None, :]
        inside = (s < splits)[:, None] & ok[None, :]
        first += tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
        second += tl.load(place + groups * splits * channels, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(first, 0), tl.sum(second, 0)


@_jit
def statistics(
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
    units,
    groups,
    splits,
    unit: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
    unroll: tl.constexpr,
):
    """Compute mean and variance from sums of x and x², shifted by a sample's mean so that no digits cancel."""
    channels = units * unit
    first, count = _group(ends, pixels)
    group = tl.program_id(2)
    c = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
    ok = c < channels
    r = tl.arange(0, row_block)
    x += first * channels
    shift = tl.zeros((row_block, channel_block), tl.float32)
    some = tl.minimum(count, row_block * unroll)
    for part in tl.static_range(unroll):
        each = part * row_block + r
        place = (each * (count // some))[:, None] * channels + c[None, :]
        shift += tl.load(x + place, mask=(each < some)[:, None] & ok[None, :], other=0.0).to(tl.float32)
    shift = tl.sum(shift, 0) / some
    total = tl.zeros((row_block, channel_block), tl.float32)
    square = tl.zeros((row_block, channel_block), tl.float32)
    at = r[:, None] * channels + c[None, :]
    for start in range(tl.program_id(1).to(tl.int64) * (row_block * unroll), count, splits * (row_block * unroll)):
        left = tl.minimum(count - start, row_block * unroll).to(tl.int32)
        for part in tl.static_range(unroll):
            inside = (part * row_block + r < left)[:, None] & ok[None, :]
            value = tl.load(x + (start + part * row_block) * channels + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, value - shift[None, :], 0.0)
            total += value
            square += value * value
    if _is_last(partial, counters, tl.sum(total, 0), tl.sum(square, 0), c, ok, channels, groups, splits):
        off, squares = _totals(partial, c, ok, channels, groups, splits, row_block * unroll, channel_block)
        off = off / count
        variance = tl.maximum(squares / count - off * off, 0.0)
        tl.store(statistics + group * channels + c, off + shift, mask=ok)
        tl.store(statistics + (groups + group) * channels + c, 1.0 / tl.sqrt(variance + eps), mask=ok)
        unbiased = variance * (count.to(tl.float32) / tl.maximum(count - 1, 1).to(tl.float32))
        tl.store(means + group * stride + c, off + shift, mask=ok)
        tl.store(variances + group * stride + c, unbiased, mask=ok)


@_jit
def normalize(
    x,
    statistics,
    weight,
    bias,
    out,
    tail,
    residual,
    ends,
    out_units,
    tail_units,
    first_units,
    residual_units,
    pixels,
    units,
    groups,
    splits,
    silu: tl.constexpr,
    has_tail: tl.constexpr,
    adds: tl.constexpr,
    unit: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Normalise, scale, shift and activate; then add the residual."""
    channels = units * unit
    first, count = _group(ends, pixels)
    c, ok, _of, mean, _deviation, scale, shift = _channels(statistics, weight, bias, channels, groups, channel_block)
    r = tl.arange(0, row_block)
    for start in range(tl.program_id(1).to(tl.int64) * row_block, count, splits * row_block):
        row = first + start
        inside = (r < tl.minimum(count - start, row_block).to(tl.int32))[:, None] & ok[None, :]
        value = tl.load(_place(x, row, r, c, channels), mask=inside, other=0.0).to(tl.float32)
        value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
        if silu:
            value *= _sigmoid(value)
        if adds:
            value += tl.load(_place(residual, row, r, c, residual_units * unit), mask=inside, other=0.0).to(tl.float32)
        value = value.to(out.dtype.element_ty)
        tl.store(_place(out, row, r, c, out_units * unit), value, mask=inside)
        if has_tail:
            after = c - first_units * unit
            tl.store(_place(tail, row, r, after, tail_units * unit), value, mask=inside & (after >= 0)[None, :])


@triton.jit
def _slope(
    x, grad, tail, mean, scale, shift, row, r, c, inside, channels, stride, tail_stride, first,
    silu: tl.constexpr, has_tail: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a block of scaled values, and the values of x less the mean."""
    slope = tl.load(_place(grad, row, r, c, stride), mask=inside, other=0.0).to(tl.float32)
    if has_tail:
        after = c - first
        there = inside & (after >= 0)[None, :]
        slope += tl.load(_place(tail, row, r, after, tail_stride), mask=there, other=0.0).to(tl.float32)
    off = tl.load(_place(x, row, r, c, channels), mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    if silu:
        scaled = off * scale[None, :] + shift[None, :]
        sigmoid = _sigmoid(scaled)
        slope *= sigmoid * (1.0 + scaled * (1.0 - sigmoid))
    return slope, off


@_jit
def gradient_sums(
    x,
    grad,
    tail,
    statistics,
    weight,
    bias,
    sums,
    ends,
    partial,
    counters,
    grad_units,
    tail_units,
    first_units,
    pixels,
    units,
    groups,
    splits,
    silu: tl.constexpr,
    has_tail: tl.constexpr,
    unit: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
    unroll: tl.constexpr,
):
    """Sum up the gradient, and the gradient times the normalised value, over each group."""
    channels = units * unit
    first, count = _group(ends, pixels)
    c, ok, of, mean, deviation, scale, shift = _channels(statistics, weight, bias, channels, groups, channel_block)
    plain = tl.zeros((row_block, channel_block), tl.float32)
    times = tl.zeros((row_block, channel_block), tl.float32)
    r = tl.arange(0, row_block)
    for start in range(tl.program_id(1).to(tl.int64) * (row_block * unroll), count, splits * (row_block * unroll)):
        left = tl.minimum(count - start, row_block * unroll).to(tl.int32)
        for part in tl.static_range(unroll):
            inside = (part * row_block + r < left)[:, None] & ok[None, :]
            slope, off = _slope(
                x, grad, tail, mean, scale, shift, first + start + part * row_block, r, c, inside,
                channels, grad_units * unit, tail_units * unit, first_units * unit, silu, has_tail,
            )  # fmt: skip
            plain += slope
            times += slope * off
    if _is_last(partial, counters, tl.sum(plain, 0), tl.sum(times, 0) * deviation, c, ok, channels, groups, splits):
        of_bias, of_weight = _totals(partial, c, ok, channels, groups, splits, row_block * unroll, channel_block)
        tl.store(sums + of, of_bias, mask=ok)
        tl.store(sums + groups * channels + of, of_weight, mask=ok)


@_jit
def gradient(
    x,
    grad,
    tail,
    statistics,
    weight,
    bias,
    sums,
    out,
    of_weight,
    of_bias,
    ends,
    grad_units,
    tail_units,
    first_units,
    pixels,
    units,
    groups,
    splits,
    silu: tl.constexpr,
    has_tail: tl.constexpr,
    unit: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Compute the gradient of x, and sum up those of weight and bias over all groups."""
    channels = units * unit
    first, count = _group(ends, pixels)
    c, ok, of, mean, deviation, scale, shift = _channels(statistics, weight, bias, channels, groups, channel_block)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        plain = tl.zeros((channel_block,), tl.float32)
        times = tl.zeros((channel_block,), tl.float32)
        for group in range(groups):
            plain += tl.load(sums + group * channels + c, mask=ok, other=0.0)
            times += tl.load(sums + (groups + group) * channels + c, mask=ok, other=0.0)
        tl.store(of_bias + c, plain.to(of_bias.dtype.element_ty), mask=ok)
        tl.store(of_weight + c, times.to(of_weight.dtype.element_ty), mask=ok)
    plain = tl.load(sums + of, mask=ok, other=0.0) / count * scale
    times = tl.load(sums + groups * channels + of, mask=ok, other=0.0) / count * deviation * scale
    r = tl.arange(0, row_block)
    for start in range(tl.program_id(1).to(tl.int64) * row_block, count, splits * row_block):
        row = first + start
        inside = (r < tl.minimum(count - start, row_block).to(tl.int32))[:, None] & ok[None, :]
        slope, off = _slope(
            x, grad, tail, mean, scale, shift, row, r, c, inside,
            channels, grad_units * unit, tail_units * unit, first_units * unit, silu, has_tail,
        )  # fmt: skip
        slope = slope * scale[None, :] - plain[None, :] - off * times[None, :]
        tl.store(_place(out, row, r, c, channels), slope.to(out.dtype.element_ty), mask=inside)
