"""Pixels of augmented training images: the bytes that Ultralytics computes, with less work.

Ultralytics makes an image in steps, each of which returns a whole new one: a canvas four times as large as the image
for mosaic, its warp, three images for the colours, a copy with other channels first, and one more in the batch. A
`Recipe` says what these steps would do, and `Renderer` does it. OpenCV gets the same source, matrix and size as in
Ultralytics, as its fixed-point arithmetic depends on them. Only what has no effect on the bytes is left out:

- parts of the canvas that the warp does not read are neither filled nor pasted;
- rows above and below the images of a mosaic are all grey: one of them is computed and copied;
- hue, saturation and value are changed in planes, by arithmetic where it gives the entries of Ultralytics' table;
- one pass puts the channels in order and writes them to their place in the batch;
- the arrays in between are used again for the next image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["BACKGROUND", "Array", "Blend", "Canvas", "Image", "Recipe", "Rectangle", "Renderer", "Tile", "Warp"]
__all__ += ["area_of", "color_tables", "overlap"]

Array: TypeAlias = npt.NDArray[np.uint8]
Rectangle: TypeAlias = tuple[int, int, int, int]
"""Left and upper edge, and the first column and row beyond it."""

BACKGROUND = 114
"""Grey of what no image covers."""
_MARGIN = 2  # pixels beyond the area of a warp that interpolation may read
_FARTHEST = 1e6  # pixels from which on the area of a warp is not computed: OpenCV's coordinates may overflow
_ROWS = 32  # rows that are blended at once, so that their floats stay in the cache
_RAMP = np.arange(256, dtype=np.uint8)[None]
_ROUNDING = 2e-5  # more than the error of a product below 256 and a sum in 32-bit floats


@dataclass(frozen=True)
class Tile:
    """Part of a mosaic."""

    image: Array
    """Decoded image, (height, width, channels)."""
    left: int
    top: int
    """First column and row of the image that are shown."""
    place: Rectangle
    """Place on the canvas."""


@dataclass(frozen=True)
class Canvas:
    """Mosaic of four tiles on a square canvas. What they leave free is grey."""

    side: int
    center: tuple[int, int]
    """Column and row in which the tiles meet."""
    tiles: tuple[Tile, Tile, Tile, Tile]
    """Upper left, upper right, lower left and lower right tile."""

    @property
    def cells(self) -> tuple[Rectangle, ...]:
        """Parts of the canvas, one for each tile."""
        (x, y), side = self.center, self.side
        return (0, 0, x, y), (x, 0, side, y), (0, y, x, side), (x, y, side, side)

    @property
    def channels(self) -> int:
        """Number of channels of all tiles."""
        return self.tiles[0].image.shape[2]


@dataclass(frozen=True)
class Warp:
    """Affine or perspective transformation of an image or a mosaic."""

    source: Canvas | Array
    matrix: npt.NDArray[np.float32]
    """Matrix from coordinates of the source to those of the result, (3, 3)."""
    size: tuple[int, int]
    """Width and height of the result."""
    is_perspective: bool


@dataclass(frozen=True)
class Blend:
    """Weighted mean of two images."""

    first: Warp | Array
    second: Warp | Array
    fraction: float
    """Weight of the first image."""


Image: TypeAlias = Warp | Blend | Array


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the pixels of one image of a batch."""

    image: Image
    """Image in the order of OpenCV: blue, green, red."""
    shape: tuple[int, int, int]
    """Channels, height and width of the result."""
    gains: Sequence[float] | None
    """Shift of the hue as a fraction of the circle; gains of saturation and value, less one. None changes no colour."""
    flips_rows: bool
    flips_columns: bool
    """True if the image is upside down, and if left and right are exchanged."""
    swaps_channels: bool
    """True for the order red, green, blue."""


class Renderer:
    """Renders images; it keeps the arrays that it works in for the next one."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": {}}  # another process makes its own

    def render(self, recipe: Recipe, out: Array) -> None:
        """Render an image.

        Args:
            recipe: What to render.
            out: Array for the result, with the recipe's shape.
        """
        image, first, last = self._made(recipe.image, "image")
        image = image[first : last + 1]
        if recipe.gains is not None:
            self._change_colors(image, recipe.gains)
        if recipe.flips_rows or recipe.flips_columns:
            axis = int(recipe.flips_columns) if not recipe.flips_rows else -int(recipe.flips_columns)
            flipped = self._array("flipped", image.shape)
            cv2.flip(image, axis, dst=flipped)
            image = flipped
            if recipe.flips_rows:
                first, last = out.shape[1] - 1 - last, out.shape[1] - 1 - first
        planes = [plane[first : last + 1] for plane in out]
        cv2.split(image, planes[::-1] if recipe.swaps_channels else planes)
        for plane in out:
            plane[:first], plane[last + 1 :] = plane[first], plane[last]

    def rendered(self, image: Image | Canvas) -> Array:
        """Return a new array with an image, (height, width, channels)."""
        if isinstance(image, Canvas):
            return self._canvas(image, (0, 0, image.side, image.side)).copy()
        return self._whole(image, "image").copy()

    def _array(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return an array with any content. The next call with its name returns the same memory."""
        size, array = math.prod(shape), self._arrays.get(name)
        if array is None or array.size < size:
            array = self._arrays[name] = np.empty(size, np.uint8)
        return array[:size].reshape(shape)

    def _made(self, image: Image, name: str) -> tuple[Array, int, int]:
        """Return an image in the array of this name, and its first and last row.

        All rows before the first one are equal to it, and all rows after the last one to that one.
        """
        if isinstance(image, Warp):
            return self._warped(image, name)
        if isinstance(image, Blend):
            made = self._blended(image, name)
        else:
            made = self._array(name, image.shape)
            made[:] = image
        return made, 0, len(made) - 1

    def _whole(self, image: Image, name: str) -> Array:
        """Return an image with all its rows in the array of this name."""
        made, first, last = self._made(image, name)
        made[:first], made[last + 1 :] = made[first], made[last]
        return made

    def _warped(self, warp: Warp, name: str) -> tuple[Array, int, int]:
        source = warp.source
        if isinstance(source, Canvas):
            tops, bottoms = [tile.place[1] for tile in source.tiles], [tile.place[3] for tile in source.tiles]
            rows = min(tops), max(bottoms)
            source = self._canvas(source, area_of(warp, source.side, source.side))
        else:
            rows = 0, len(source)
        first, last = _rows(warp, *rows)
        size = warp.size[0], last + 1
        made = self._array(name, (warp.size[1], warp.size[0], source.shape[2]))
        grey = (BACKGROUND,) * 4
        if warp.is_perspective:
            cv2.warpPerspective(source, warp.matrix, dsize=size, dst=made[: last + 1], borderValue=grey)
        else:
            cv2.warpAffine(source, warp.matrix[:2], dsize=size, dst=made[: last + 1], borderValue=grey)
        return made, first, last

    def _canvas(self, canvas: Canvas, area: Rectangle) -> Array:
        """Return a canvas that is painted in an area."""
        result = self._array("canvas", (canvas.side, canvas.side, canvas.channels))
        for tile, cell in zip(canvas.tiles, canvas.cells, strict=True):
            left, top, right, bottom = overlap(cell, area)
            x1, y1, x2, y2 = overlap(tile.place, (left, top, right, bottom))
            x, y = tile.left - tile.place[0], tile.top - tile.place[1]
            result[y1:y2, x1:x2] = tile.image[y1 + y : y2 + y, x1 + x : x2 + x]
            result[top:y1, left:right] = result[y2:bottom, left:right] = BACKGROUND
            result[y1:y2, left:x1] = result[y1:y2, x2:right] = BACKGROUND
        return result

    def _blended(self, blend: Blend, name: str) -> Array:
        first, second = self._whole(blend.first, name), self._whole(blend.second, "second")
        for row in range(0, len(first), _ROWS):
            rows = slice(row, row + _ROWS)
            first[rows] = (first[rows] * blend.fraction + second[rows] * (1 - blend.fraction)).astype(np.uint8)
        return first

    def _change_colors(self, image: Array, gains: Sequence[float]) -> None:
        """Change hue, saturation and value of an image by gains, see `Recipe`."""
        hsv = self._array("hsv", image.shape)
        cv2.cvtColor(image, cv2.COLOR_BGR2HSV, dst=hsv)
        planes = [self._array(name, image.shape[:2]) for name in ("hue", "saturation", "value")]
        cv2.split(hsv, planes)
        for plane, table, factor in zip(planes, color_tables(gains), (None, gains[1] + 1, gains[2] + 1), strict=True):
            _look_up(plane, table, factor)
        cv2.merge(planes, dst=hsv)
        cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR, dst=image)


def color_tables(gains: Sequence[float]) -> tuple[Array, Array, Array]:
    """Return new hues, saturations and values, each for the 256 old ones.

    Args:
        gains: See `Recipe`.
    """
    ramp = np.arange(256.0)
    hue = ((ramp + gains[0] * 180) % 180).astype(np.uint8)
    saturation, value = (np.clip(ramp * (gain + 1), 0, 255).astype(np.uint8) for gain in gains[1:])
    saturation[0] = 0  # white and grey stay what they are
    return hue, saturation, value


def _look_up(plane: Array, table: Array, factor: float | None = None) -> None:
    """Replace the values of a plane by the entries of a table.

    Args:
        plane: Values, (height, width).
        table: Entry of each of the 256 values.
        factor: Factor that gives the entries, rounded down. Multiplication is faster, and used if its rounding cannot
            give other values.
    """
    if np.array_equal(table, _RAMP[0]):
        return
    if factor is not None:
        bounds = [cv2.convertScaleAbs(_RAMP, alpha=factor, beta=beta - 0.5)[0] for beta in (_ROUNDING, 3 * _ROUNDING)]
        if all(np.array_equal(table, bound) for bound in bounds):
            cv2.convertScaleAbs(plane, dst=plane, alpha=factor, beta=2 * _ROUNDING - 0.5)
            return
    cv2.LUT(plane, table, dst=plane)


def area_of(warp: Warp, width: int, height: int) -> Rectangle:
    """Return the area of a source that a warp reads.

    Args:
        warp: The warp.
        width: Width of the source.
        height: Height of the source.
    """
    everything = (0, 0, width, height)
    (a, b, x), (c, d, y), _ = warp.matrix.tolist()
    determinant = a * d - b * c
    if warp.is_perspective or not determinant:
        return everything
    corners = [(column - x, row - y) for column in (0, warp.size[0]) for row in (0, warp.size[1])]
    columns = [(d * u - b * v) / determinant for u, v in corners]
    rows = [(a * v - c * u) / determinant for u, v in corners]
    if not all(abs(value) < _FARTHEST for value in columns + rows):
        return everything
    first = math.floor(min(columns)) - _MARGIN, math.floor(min(rows)) - _MARGIN
    last = math.ceil(max(columns)) + _MARGIN, math.ceil(max(rows)) + _MARGIN
    return overlap((*first, *last), everything)


def _rows(warp: Warp, top: int, bottom: int) -> tuple[int, int]:
    """Return the first and the last row of a warp that have to be computed.

    Rows before and after them are as grey as they are.

    Args:
        warp: The warp.
        top: First row of the source that is not grey.
        bottom: Row of the source from which on all rows are grey.
    """
    height = warp.size[1]
    _, (across, scale, shift), _ = warp.matrix.tolist()
    if warp.is_perspective or across or not scale > 0:
        return 0, height - 1
    first = max(math.floor(min((top - _MARGIN) * scale + shift, height)) - 1, 0)
    last = min(math.ceil(max((bottom + _MARGIN) * scale + shift, 0)), height - 1)
    return min(first, last), last


def overlap(one: Rectangle, other: Rectangle) -> Rectangle:
    """Return the common part of two rectangles.

    Args:
        one: A rectangle.
        other: A rectangle. If they have no common part, the result is empty and at an edge of this one.
    """
    left, top = min(max(one[0], other[0]), other[2]), min(max(one[1], other[1]), other[3])
    return left, top, max(min(one[2], other[2]), left), max(min(one[3], other[3]), top)
