"""Triton kernel that renders packed images. `device_rendering` has the same arithmetic in PyTorch."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["render"]


@triton.jit
def _address(entry, layer: tl.constexpr, x, y, channels: tl.constexpr):
    """Return the offset of pixels of a layer from the image's place, below 0 where no tile is."""
    found = x * 0 - 1
    for tile in tl.static_range(4):
        at = entry + (4 + 20 * layer + 5 * tile)  # see `packing.TILES`
        offset, left, top = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        right, bottom = tl.load(at + 3), tl.load(at + 4)
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        found = tl.where(inside, offset + ((y - top) * (right - left) + x - left) * channels, found)
    return found


@triton.jit
def _mean(buffer, a, b, c, d, x, y, is_fine):
    """Return the bilinear mean of four pixels, upper ones first; `x` and `y` are fractions."""
    upper, lower = _pixel(buffer, a), _pixel(buffer, c)
    upper += (_pixel(buffer, b) - upper) * x
    lower += (_pixel(buffer, d) - lower) * x
    mean = upper + (lower - upper) * y
    even = (mean + 12582912.0) - 12582912.0  # rounds halves to even, as all bits of such sums stand for whole numbers
    return tl.where(is_fine, even, mean + 0.5).to(tl.int32)


@triton.jit
def _pixel(buffer, at):
    return tl.load(buffer + at, mask=at >= 0, other=114).to(tl.float32)


@triton.jit
def _layer(buffer, entry, flags, layer: tl.constexpr, row, column, inside, height, width, channels: tl.constexpr):
    """Return three channels of a layer; the same one three times if there is one."""
    at = entry + 44 + 2 * layer * (width + height)  # see `packing.HEAD`
    x = tl.load(at + column, mask=inside, other=0)
    y = tl.load(at + width + column, mask=inside, other=0)
    is_fine = (flags & 32) != 0
    kept = tl.where(is_fine, -1, -2048)  # bits
    x = (x + tl.load(at + 2 * width + row, mask=inside, other=0)) & kept
    y = (y + tl.load(at + 2 * width + height + row, mask=inside, other=0)) & kept
    across, down = (x & 65535).to(tl.float32) * (1.0 / 65536), (y & 65535).to(tl.float32) * (1.0 / 65536)
    x, y = x >> 16, y >> 16
    a = _address(entry, layer, x, y, channels)
    b = _address(entry, layer, x + 1, y, channels)
    c = _address(entry, layer, x, y + 1, channels)
    d = _address(entry, layer, x + 1, y + 1, channels)
    first = _mean(buffer, a, b, c, d, across, down, is_fine)
    second, third = first, first
    if channels == 3:
        second = _mean(buffer + 1, a, b, c, d, across, down, is_fine)
        third = _mean(buffer + 2, a, b, c, d, across, down, is_fine)
    return first, second, third


@triton.jit
def _blend(tables, entry, first, second):
    """Return the weighted mean of two layers, rounded down."""
    ratio = tl.load(entry + 2).to(tl.int64) * 67108864 + tl.load(entry + 3)  # see `packing.RATIO_BITS`
    mean = second + (((first - second).to(tl.int64) * ratio) >> 52).to(tl.int32)
    return tl.where(first == second, tl.load(tables + 768 + first).to(tl.int32), mean)


@triton.jit
def _change_colors(tables, blue, green, red):
    """Return blue, green and red with other hue, saturation and value, as OpenCV computes them."""
    value = tl.maximum(tl.maximum(blue, green), red)
    spread = value - tl.minimum(tl.minimum(blue, green), red)
    per_value = (2 * 255 * 4096 + value) // tl.maximum(2 * value, 1)
    per_spread = (2 * 30 * 4096 + spread) // tl.maximum(2 * spread, 1)
    saturation = (spread * per_value + 2048) >> 12
    hue = tl.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    hue = (tl.where(value == red, green - blue, hue) * per_spread + 2048) >> 12
    hue = tl.load(tables + tl.where(hue < 0, hue + 180, hue)).to(tl.int32)
    saturation = tl.load(tables + 256 + saturation).to(tl.int32)
    value = tl.load(tables + 512 + value).to(tl.int32)
    sector = hue // 30
    past = hue - sector * 30
    low = value * (255 - saturation) // 255
    falling = value * (7650 - saturation * past) // 7650
    rising = value * (7650 - saturation * (30 - past)) // 7650
    blue = tl.where(sector < 2, low, tl.where(sector == 2, rising, tl.where(sector == 5, falling, value)))
    green = tl.where(sector > 3, low, tl.where(sector == 0, rising, tl.where(sector == 3, falling, value)))
    red = tl.where(sector == 1, falling, tl.where(sector == 4, rising, value))
    red = tl.where((sector == 2) | (sector == 3), low, red)
    return blue, green, red


@triton.jit(do_not_specialize=["base", "height", "width"])
def render(
    out, numbers, buffer, base, height, width,
    channels: tl.constexpr, is_planar: tl.constexpr, pixel_block: tl.constexpr,
):  # fmt: skip
    """Render images. Grid axis 1 is the image.

    A planar result has the bytes of each channel together; any other has the channels of a pixel side by side, divided
    by 255.
    """
    index = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * pixel_block + tl.arange(0, pixel_block)
    size = height * width
    inside = at < size
    row = at // width
    column = at - row * width
    entry = numbers + index * (44 + 4 * (width + height))
    tables = buffer + (tl.load(entry) - base).to(tl.int64) * 16  # see `packing.UNIT`
    flags = tl.load(entry + 1)
    row = tl.where((flags & 1) != 0, height - 1 - row, row)
    column = tl.where((flags & 2) != 0, width - 1 - column, column)
    blue, green, red = _layer(tables, entry, flags, 0, row, column, inside, height, width, channels)
    if (flags & 16) != 0:
        blue_2, green_2, red_2 = _layer(tables, entry, flags, 1, row, column, inside, height, width, channels)
        blue = _blend(tables, entry, blue, blue_2)
        green = _blend(tables, entry, green, green_2)
        red = _blend(tables, entry, red, red_2)
    if (flags & 8) != 0:
        blue, green, red = _change_colors(tables, blue, green, red)
    swaps = (flags & 4) != 0
    first, third = tl.where(swaps, red, blue), tl.where(swaps, blue, red)
    base_of_image = out + index * (size * channels)
    if is_planar:
        _store_bytes(base_of_image + at, first, inside)
        if channels == 3:
            _store_bytes(base_of_image + at + size, green, inside)
            _store_bytes(base_of_image + at + 2 * size, third, inside)
    else:
        _store_scaled(base_of_image + at * channels, first, inside)
        if channels == 3:
            _store_scaled(base_of_image + at * channels + 1, green, inside)
            _store_scaled(base_of_image + at * channels + 2, third, inside)


@triton.jit
def _store_bytes(at, values, inside):
    tl.store(at, values.to(tl.uint8), mask=inside)


@triton.jit
def _store_scaled(at, values, inside):
    # Rounded to half precision, the product is the quotient for each of the 256 values.
    tl.store(at, (values.to(tl.float32) * (1.0 / 255.0)).to(at.dtype.element_ty), mask=inside)
