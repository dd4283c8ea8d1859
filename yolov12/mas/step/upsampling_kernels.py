"""Triton kernels for nearest upsampling in channels_last by a whole factor.

Tensors have shape (images * height * width, channels). A program takes a block of pixels of the smaller image and a
block of channels. For units see `batchnorm.kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["enlarge", "gather"]

_jit = triton.jit(do_not_specialize=["pixels", "width", "units", "row_units"])


@triton.jit
def _place(pixels, width, channels, factor, row_block: tl.constexpr, channel_block: tl.constexpr):
    """Return pixels of the small image, the first of their pixels in the large image, channels, and a mask."""
    channel_blocks = tl.cdiv(channels, channel_block)
    pixel = (tl.program_id(0) // channel_blocks) * row_block + tl.arange(0, row_block)
    c = (tl.program_id(0) % channel_blocks) * channel_block + tl.arange(0, channel_block)
    row = pixel // width
    large = row.to(tl.int64) * factor * (width * factor) + (pixel - row * width) * factor
    return pixel.to(tl.int64), large, c, (pixel < pixels)[:, None] & (c < channels)[None, :]


@_jit
def enlarge(
    x,
    out,
    pixels,
    width,
    row_units,
    units,
    unit: tl.constexpr,
    factor: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Copy each pixel to a square of pixels."""
    channels = units * unit
    pixel, large, c, inside = _place(pixels, width, channels, factor, row_block, channel_block)
    value = tl.load(x + pixel[:, None] * channels + c[None, :], mask=inside, other=0.0)
    for y in tl.static_range(factor):
        for x_ in tl.static_range(factor):
            at = large + (y * (width * factor) + x_)
            tl.store(out + at[:, None] * (row_units * unit) + c[None, :], value, mask=inside)


@_jit
def gather(
    grad,
    out,
    pixels,
    width,
    row_units,
    units,
    unit: tl.constexpr,
    factor: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Sum up the gradients of a square of pixels in fp32."""
    channels = units * unit
    pixel, large, c, inside = _place(pixels, width, channels, factor, row_block, channel_block)
    total = tl.zeros((row_block, channel_block), tl.float32)
    for y in tl.static_range(factor):
        for x_ in tl.static_range(factor):
            at = large + (y * (width * factor) + x_)
            place = at[:, None] * (row_units * unit) + c[None, :]
            total += tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + pixel[:, None] * channels + c[None, :], total.to(out.dtype.element_ty), mask=inside)
