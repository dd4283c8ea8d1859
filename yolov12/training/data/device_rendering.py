"""Rendering of packed images on any device: a Triton kernel, or the same arithmetic in PyTorch.

With OpenCV 4, mosaic, warp and mixup give the bytes of the host. OpenCV 5 interpolates with floats, so a value may
differ by 1. With either, a value may differ by 1 where colours change, because OpenCV converts hue, saturation and
value back with floats. The gains of colours may amplify a difference of an earlier step.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from yolov12.mas.oom import is_out_of_memory
from yolov12.mas.triton_launch import compiles, launch
from yolov12.training.adapter.deferred_tensor import DeferredTensor, TensorFacts, made
from yolov12.training.data import packing
from yolov12.training.data.packing import PackedImages
from yolov12.training.data.pixels import BACKGROUND

try:
    from yolov12.training.data import render_kernel
except ImportError:  # PyTorch supports platforms that Triton does not
    render_kernel = None  # type: ignore[assignment]

__all__ = ["PackedTensor", "has_kernel", "note", "rendered"]

_BLOCK, _WARPS = 512, 4
_AT_ONCE = 16  # images that are rendered at once for readers on the host, outside of the engine's micro-batches


def rendered(packed: PackedImages, dtype: torch.dtype | None = None) -> Tensor:
    """Return images, (images, channels, height, width), on the device of the packed ones.

    Args:
        packed: The images.
        dtype: None for uint8 from 0 to 255; fp16 or bf16 for values from 0 to 1 in channels_last.
    """
    if len(packed.numbers) and has_kernel(packed.pixels.device):
        return _with_kernel(packed, dtype)
    images = _in_pytorch(packed)
    return images if dtype is None else (images.float() / 255).to(dtype, memory_format=torch.channels_last)


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Return whether the kernel runs on a device."""
    if render_kernel is None or device.type != "cuda":
        return False
    return compiles(lambda: _with_kernel(_smallest(device), torch.float16))


def note(dtype: torch.dtype) -> None:
    """Note the kernels for images of a type and for images of bytes, see `compile_ahead.noted`."""
    if render_kernel is not None:
        for each in (dtype if dtype.itemsize == 2 else None, None):
            _with_kernel(_smallest(torch.device("meta")), each)


def _smallest(device: torch.device) -> PackedImages:
    numbers = torch.zeros(1, packing.HEAD + 4 * 2, dtype=torch.int32, device=device)
    return PackedImages(torch.zeros(packing.TABLES, dtype=torch.uint8, device=device), numbers, 0, (3, 1, 1))


class PackedTensor(DeferredTensor):
    """Images of uint8 that are rendered, all of them, when the values of some are used. Use `PackedTensor.of`."""

    packed: PackedImages

    @staticmethod
    def of(packed: PackedImages) -> PackedTensor:
        """Return images that are not rendered yet, on the device of the packed ones."""
        place, device = packed.pixels.device, packed.device or packed.pixels.device
        shape = torch.Size((len(packed.numbers), *packed.shape))
        is_there = place.type == device.type
        make = rendered if is_there else functools.partial(_rendered_for_host, device=device)
        tensor = PackedTensor(TensorFacts(shape, torch.uint8, place), functools.partial(make, packed))
        tensor.packed = packed
        return tensor

    @property
    def is_rendered(self) -> bool:
        """True if somebody has used the values, and may have changed them."""
        return self._value is not None

    def part(self, start: int, stop: int) -> Tensor:
        """Return images `start` to `stop`, which are still packed if nobody has used the values.

        Args:
            start: First image.
            stop: Image after the last.
        """
        return made(self)[start:stop] if self.is_rendered else PackedTensor.of(self.packed.part(start, stop))


def _rendered_for_host(packed: PackedImages, device: torch.device) -> Tensor:
    """Return images on the host that a device renders, or the host if the device has no memory left."""
    out = torch.empty((len(packed.numbers), *packed.shape), dtype=torch.uint8)
    for start in range(0, len(out), _AT_ONCE):
        part = packed.part(start, min(start + _AT_ONCE, len(out)))
        try:
            moved = part._replace(pixels=part.pixels.to(device), numbers=part.numbers.to(device))
            out[start : start + _AT_ONCE] = rendered(moved)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            out[start : start + _AT_ONCE] = rendered(part)
    return out


def _with_kernel(packed: PackedImages, dtype: torch.dtype | None) -> Tensor:
    channels, height, width = packed.shape
    out = torch.empty(
        (len(packed.numbers), *packed.shape),
        dtype=dtype or torch.uint8,
        device=packed.pixels.device,
        memory_format=torch.contiguous_format if dtype is None else torch.channels_last,
    )
    launch(
        render_kernel.render,
        (-(-height * width // _BLOCK), len(out), 1),
        (out, packed.numbers, packed.pixels),
        (packed.first, height, width),
        (channels, int(dtype is None), _BLOCK),
        _WARPS,
    )
    return out


def _in_pytorch(packed: PackedImages) -> Tensor:
    """Return images as bytes, (images, channels, height, width)."""
    channels, height, width = packed.shape
    out = torch.empty((len(packed.numbers), height, width, channels), dtype=torch.uint8, device=packed.pixels.device)
    for image, numbers, head in zip(out, packed.numbers, packed.numbers[:, : packing.HEAD].tolist(), strict=True):
        region, flags = packed.pixels[(head[0] - packed.first) * packing.UNIT :], head[1]
        tables = region[: packing.TABLES].view(4, 256)
        values = _layer(region, numbers, head, 0, packed.shape)
        if flags & packing.HAS_SECOND:
            second = _layer(region, numbers, head, 1, packed.shape)
            ratio = (head[2] << packing.RATIO_BITS) + head[3]
            mean = second + ((values - second) * ratio >> 2 * packing.RATIO_BITS)
            values = torch.where(values == second, tables[3][values].long(), mean)
        if flags & packing.HAS_COLORS:
            values = _with_colors(values, tables)
        axes = [axis for axis, bit in enumerate((packing.FLIPS_ROWS, packing.FLIPS_COLUMNS)) if flags & bit]
        axes += [2] if flags & packing.SWAPS_CHANNELS else []
        image.copy_(values.flip(axes))
    return out.permute(0, 3, 1, 2).contiguous()


def _layer(region: Tensor, numbers: Tensor, head: list[int], layer: int, shape: tuple[int, int, int]) -> Tensor:
    """Return a layer, (height, width, channels), int64."""
    channels, height, width = shape
    begin = packing.HEAD + 2 * layer * (width + height)
    columns, rows = numbers[begin : begin + 2 * (width + height)].split([2 * width, 2 * height])
    is_fine = bool(head[1] & packing.IS_FINE)
    kept = -1 if is_fine else -2048  # bits
    x, y = ((columns.view(2, 1, width) + rows.view(2, height, 1)) & kept).unbind()
    across, down = ((each & 65535)[..., None] / 65536 for each in (x, y))
    x, y = x >> 16, y >> 16
    tiles = [head[at : at + 5] for at in range(packing.TILES + 20 * layer, packing.TILES + 20 * layer + 20, 5)]

    def pixel(x: Tensor, y: Tensor) -> Tensor:
        found = torch.full_like(x, -1)
        for offset, left, top, right, bottom in tiles:
            inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
            found = torch.where(inside, offset + ((y - top) * (right - left) + x - left) * channels, found)
        places = found[..., None].long() + torch.arange(channels, device=x.device)
        return torch.where(found[..., None] < 0, BACKGROUND, region[places.clamp(0)]).float()

    upper, lower = (torch.lerp(pixel(x, below), pixel(x + 1, below), across) for below in (y, y + 1))
    mean = torch.lerp(upper, lower, down)
    return (mean.round() if is_fine else mean + 0.5).long()  # halves are rounded to even


def _with_colors(values: Tensor, tables: Tensor) -> Tensor:
    """Return blue, green and red with other hue, saturation and value."""
    blue, green, red = values.unbind(-1)
    value = values.amax(-1)
    spread = value - values.amin(-1)
    per_value = (2 * 255 * 4096 + value) // (2 * value).clamp(1)
    per_spread = (2 * 30 * 4096 + spread) // (2 * spread).clamp(1)
    saturation = (spread * per_value + 2048) >> 12
    hue = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    hue = (torch.where(value == red, green - blue, hue) * per_spread + 2048) >> 12
    hue = tables[0][torch.where(hue < 0, hue + 180, hue)].long()
    saturation, value = tables[1][saturation].long(), tables[2][value].long()
    sector, past = hue // 30, hue % 30
    low = value * (255 - saturation) // 255
    falling = value * (7650 - saturation * past) // 7650
    rising = value * (7650 - saturation * (30 - past)) // 7650
    parts = torch.stack([low, falling, rising, value], -1)
    return parts.gather(-1, torch.tensor(_SECTORS, device=values.device)[sector])


_SECTORS = [[0, 2, 3], [0, 3, 1], [2, 3, 0], [3, 1, 0], [3, 0, 2], [1, 0, 3]]
"""Blue, green and red in each sixth of the circle of hues: indices of low, falling, rising and value."""
