"""Triton kernel that makes a model's input of the pixels of a loader."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["scale"]


@triton.jit(do_not_specialize=["units"])
def scale(out, images, units, unit: tl.constexpr, channels: tl.constexpr, block: tl.constexpr):
    """Divide values by 255, and store the channels of a pixel side by side. Grid axis 1 is the image."""
    pixels = units * unit  # see `batchnorm.kernels`
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < pixels * channels
    pixel = at // channels
    base = tl.program_id(1).to(tl.int64) * (pixels * channels)
    value = tl.load(images + base + (at - pixel * channels) * pixels + pixel, mask=inside, other=0)
    # Rounded to half precision, the product is the quotient for each of the 256 values.
    tl.store(out + base + at, (value.to(tl.float32) * (1.0 / 255.0)).to(out.dtype.element_ty), mask=inside)
