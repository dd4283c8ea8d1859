"""Packed images: what a batch's recipes read, in one buffer of bytes, for rendering on the device.

A worker that packs a batch copies the parts of decoded images that the recipes read, and does nothing else to the
pixels. `device_rendering` makes the images from them. Coordinates are integers with 16 fractional bits, of which OpenCV
4 uses 5, and colours go through tables of bytes. What an image has in floats, its matrix and its gains, is used here in
the order of operations of OpenCV and Ultralytics.

Layout of the buffer, for each image: four tables of 256 bytes (hue, saturation, value, and the blend of two equal
values), then the tiles of one layer, or of two for mixup, each (height, width, channels).

Layout of the numbers of an image: see the constants of this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from yolov12.training.data.pixels import (
    Array,
    Blend,
    Canvas,
    Image,
    Recipe,
    Rectangle,
    Renderer,
    Tile,
    Warp,
    area_of,
    color_tables,
    overlap,
)

__all__ = [
    "FLIPS_COLUMNS",
    "FLIPS_ROWS",
    "HAS_COLORS",
    "HAS_SECOND",
    "HEAD",
    "MOST",
    "RATIO_BITS",
    "SWAPS_CHANNELS",
    "TABLES",
]
__all__ += ["TILES", "UNIT", "PackedImages", "pack"]

UNIT = 16
"""Alignment of an image in the buffer, in bytes. The first number of an image is its place in these units."""
FLIPS_ROWS, FLIPS_COLUMNS, SWAPS_CHANNELS, HAS_COLORS, HAS_SECOND, IS_FINE = 1, 2, 4, 8, 16, 32
"""Bits of the second number: see `Recipe`; `HAS_COLORS` if it has gains, `HAS_SECOND` if it blends two layers, and
`IS_FINE` if all fractional bits of coordinates count, and not only 5, and halves are rounded to even numbers."""
RATIO_BITS = 26
"""The third and fourth number are the upper and lower bits, so many each, of the weight of the first layer."""
TILES = 4
"""From here on, five numbers for each of the four tiles of both layers: offset from the image's place in bytes, left,
top, right, bottom. An empty tile has zeros."""
HEAD = TILES + 2 * 4 * 5
"""From here on, coordinates in the source with 16 fractional bits for both layers: what each column of the result adds
to the horizontal and to the vertical one, and what each row adds to both."""
TABLES = 4 * 256
"""Bytes of the tables of an image."""
MOST = 2.0
"""Largest size of a buffer without its tables, in sizes of the images. The mean is 1.1 with Ultralytics' defaults."""

_ONE = 65536  # pixel, in units of coordinates
_FARTHEST = 8000  # pixels: the sum of three such parts of a coordinate fits into 32 bits
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

# Tiles, each with the part of its place that is read, and six numbers: the inverse of the matrix.
_Layer: TypeAlias = tuple[Sequence[tuple[Tile, Rectangle]], Sequence[float]]


class PackedImages(NamedTuple):
    """Images of a batch, or of a part of it."""

    pixels: Tensor
    """Buffer, uint8."""
    numbers: Tensor
    """Numbers of each image, (images, numbers), int32."""
    first: int
    """Place of the buffer's first byte in the buffer of the whole batch, in units."""
    shape: tuple[int, int, int]
    """Channels, height and width of each image."""
    device: torch.device | None = None
    """Device that renders them if somebody looks at them on the host; None for the host."""

    def part(self, start: int, stop: int) -> PackedImages:
        """Return images `start` to `stop`, without a copy. The numbers have to be on the host.

        Args:
            start: First image.
            stop: Image after the last.
        """
        count = len(self.numbers)
        first, last = (
            int(self.numbers[index, 0]) if index < count else self.first + len(self.pixels) // UNIT
            for index in (start, stop)
        )
        pixels = self.pixels[(first - self.first) * UNIT : (last - self.first) * UNIT]
        return self._replace(pixels=pixels, numbers=self.numbers[start:stop], first=first)


def pack(
    images: Sequence[Recipe | Tensor],
    renderer: Renderer,
    empty: Callable[[tuple[int, ...]], Tensor],
    most: float = MOST,
) -> PackedImages:
    """Pack the images of a batch.

    Args:
        images: Recipes, or finished images, (channels, height, width), uint8. All have the same shape.
        renderer: Renders what has to be a whole image.
        empty: Returns an uninitialised tensor of bytes of a shape.
        most: Largest size of the buffer, in sizes of the images. An image that would exceed it is rendered.
    """
    channels, height, width = images[0].shape
    numbers = np.zeros((len(images), HEAD + 4 * (width + height)), np.int32)
    packed: list[tuple[int, Array]] = []  # place in the buffer, and what is copied there
    place = 0
    for index, (row, image) in enumerate(zip(numbers, images, strict=True)):
        recipe = image if isinstance(image, Recipe) else _finished(image)
        layers = _layers(recipe, renderer)
        if place + _size(layers, channels) > most * (index + 1) * channels * height * width:
            rendered = torch.empty(recipe.shape, dtype=torch.uint8)
            renderer.render(recipe, rendered.numpy())
            recipe = _finished(rendered)
            layers = _layers(recipe, renderer)
        row[:2] = place // UNIT, _flags(recipe)
        packed.append((place, _tables(recipe, row)))
        used = TABLES
        for layer, (tiles, inverse) in enumerate(layers):
            for number, (tile, rectangle) in enumerate(tiles):
                left, top, right, bottom = rectangle
                if left == right or top == bottom:
                    continue
                begin = TILES + 5 * (4 * layer + number)
                row[begin : begin + 5] = used, *rectangle
                x, y = tile.left - tile.place[0], tile.top - tile.place[1]
                packed.append((place + used, tile.image[top + y : bottom + y, left + x : right + x]))
                used += (right - left) * (bottom - top) * channels
            begin = HEAD + 2 * layer * (width + height)
            row[begin : begin + 2 * (width + height)] = _coordinates(inverse, width, height)
        place += -(-used // UNIT) * UNIT
    pixels = empty((place,))
    buffer = pixels.numpy()
    for begin, part in packed:
        buffer[begin : begin + part.size].reshape(part.shape)[...] = part
    return PackedImages(pixels, torch.from_numpy(numbers), 0, (channels, height, width))


def _finished(image: Tensor) -> Recipe:
    """Return the recipe of a finished image."""
    channels, height, width = image.shape
    return Recipe(image.permute(1, 2, 0).numpy(), (channels, height, width), None, False, False, swaps_channels=False)


def _flags(recipe: Recipe) -> int:
    return (
        FLIPS_ROWS * recipe.flips_rows
        + FLIPS_COLUMNS * recipe.flips_columns
        + SWAPS_CHANNELS * recipe.swaps_channels
        + HAS_COLORS * (recipe.gains is not None)
        + HAS_SECOND * isinstance(recipe.image, Blend)
        + IS_FINE * _is_fine()
    )


def _tables(recipe: Recipe, row: npt.NDArray[np.int32]) -> Array:
    """Return the tables of an image, and set its weight of the first layer."""
    tables = np.zeros((4, 256), np.uint8)
    if recipe.gains is not None:
        tables[:3] = color_tables(recipe.gains)
    if isinstance(recipe.image, Blend):
        fraction, ramp = recipe.image.fraction, np.arange(256, dtype=np.uint8)
        row[2:4] = divmod(round(fraction * 2 ** (2 * RATIO_BITS)), 2**RATIO_BITS)
        # The sum of the products with the fraction and with the rest may be rounded to a number below.
        tables[3] = (ramp * fraction + ramp * (1 - fraction)).astype(np.uint8)
    return tables


def _layers(recipe: Recipe, renderer: Renderer) -> list[_Layer]:
    """Return one layer, or two that are blended."""
    image = recipe.image
    return [_layer(each, renderer) for each in ((image.first, image.second) if isinstance(image, Blend) else (image,))]


def _size(layers: Sequence[_Layer], channels: int) -> int:
    """Return the number of bytes of all tiles."""
    places = [place for tiles, _ in layers for _, place in tiles]
    return sum((right - left) * (bottom - top) for left, top, right, bottom in places) * channels


def _layer(image: Image, renderer: Renderer) -> _Layer:
    """Return a layer. An image that is not made by an affine transformation is rendered."""
    inverse = _inverse(image) if isinstance(image, Warp) and not image.is_perspective else None
    if inverse is None or not isinstance(image, Warp):
        tile, everything = _whole(image if isinstance(image, np.ndarray) else renderer.rendered(image))
        return [(tile, everything)], _IDENTITY
    source = image.source
    if isinstance(source, Canvas):
        area = area_of(image, source.side, source.side)
        return [(tile, overlap(tile.place, area)) for tile in source.tiles], inverse
    tile, everything = _whole(source)
    return [(tile, overlap(everything, area_of(image, *everything[2:])))], inverse


def _whole(image: Array) -> tuple[Tile, Rectangle]:
    everything = 0, 0, image.shape[1], image.shape[0]
    return Tile(image, 0, 0, everything), everything


@functools.cache
def _is_fine() -> bool:
    """Return whether OpenCV interpolates at the very coordinates, as OpenCV 5 does, and not with 5 fractional bits."""
    step = np.array([[0, 250]], np.uint8)
    warped = cv2.warpAffine(step, np.array([[1.0, 0.0, -0.4], [0.0, 1.0, 0.0]]), dsize=(1, 1))
    return int(warped[0, 0]) < 101  # else 250 × 13 / 32


def _inverse(warp: Warp) -> tuple[float, ...] | None:
    """Return the inverse of an affine matrix as `cv2.warpAffine` computes it.

    The result is zeros if there is no inverse, and None if coordinates are too large.
    """
    (a, b, x), (c, d, y), _ = warp.matrix.tolist()
    determinant = a * d - b * c
    factor = 1 / determinant if determinant else 0.0
    a, b, c, d = d * factor, b * -factor, c * -factor, a * factor
    inverse = a, b, -a * x - b * y, c, d, -c * x - d * y
    side = max(warp.size)
    is_near = all(abs(value) * size < _FARTHEST for value, size in zip(inverse, (side, side, 1) * 2, strict=True))
    return inverse if is_near else None


def _coordinates(inverse: Sequence[float], width: int, height: int) -> npt.NDArray[np.int32]:
    """Return the coordinates of a layer, see `HEAD`. OpenCV, too, rounds both parts of a sum."""
    a, b, x, c, d, y = inverse
    columns, rows = np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)
    parts = np.concatenate([a * columns, c * columns, b * rows + x, d * rows + y])
    scale = _ONE if _is_fine() else 1024
    found: npt.NDArray[np.int32] = np.rint(parts * scale).astype(np.int32) * (_ONE // scale)
    if not _is_fine():
        found[2 * width :] += _ONE // 64  # half of the last bit that counts
    return found
