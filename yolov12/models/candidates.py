"""Pairs of a box and an anchor inside of it, counted on the host from the labels of a batch.

Ultralytics' loss matches boxes with the anchors whose points lie inside of them. Which these are depends on labels and
sizes alone, and labels come from the loader. So the host knows how many pairs there are, and the device is not waited
for. A box covers a rectangle of cells on each level, so a few numbers describe all its pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Labels", "Levels", "Pairs", "Rectangles", "split_images", "to_device"]

_Array = NDArray[Any]


@dataclass(frozen=True)
class Labels:
    """Boxes of a part of a batch on the host. It is no container, so the values stay there."""

    image_of: Tensor
    """Index of the image of each box, (boxes,)."""
    boxes: Tensor
    """Centre, width and height of each box as fractions of the image, (boxes, 4)."""
    classes: Tensor
    """Class of each box, (boxes,) or (boxes, 1)."""

    def has_classes_of(self, count: int) -> bool:
        """Return whether all classes are numbers from 0 to `count` − 1.

        Args:
            count: Number of classes of the model.
        """
        return bool(((self.classes >= 0) & (self.classes < count)).all())


@dataclass(frozen=True)
class Levels:
    """Levels of the feature pyramid, the one with most anchors first."""

    sizes: tuple[tuple[int, int], ...]
    """Height and width of each level in cells."""
    strides: tuple[float, ...]
    """Side of a cell of each level in pixels."""

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Return whether all points of anchors are exact numbers of a type, and so do not depend on how it rounds."""
        largest = max(max(size) for size in self.sizes)
        return largest * torch.finfo(dtype).eps <= 1 and all(
            stride > 0 and np.frexp(stride)[0] == 0.5 for stride in self.strides
        )


class Pairs(NamedTuple):
    """Candidate pairs on the device, box by box. All have the shape (pairs,)."""

    box: Tensor
    """Index of the box."""
    image: Tensor
    """Index of the image."""
    anchor: Tensor
    """Index of the anchor in its image."""


class Rectangles:
    """Rectangles of cells whose points lie inside of a box.

    Args:
        labels: Boxes of a part.
        levels: Levels of the feature pyramid.
        least_side: Side in pixels to which the sides of smaller boxes are enlarged.
    """

    def __init__(self, labels: Labels, levels: Levels, least_side: float) -> None:
        boxes = labels.boxes.numpy()
        image_of = labels.image_of.numpy().astype(np.int64)
        height, width = (side * levels.strides[0] for side in levels.sizes[0])
        # The same operations in the same precision as on the device, so that both agree on points on an edge.
        scaled = boxes * np.array([width, height, width, height], boxes.dtype)
        low, high = _corners(scaled[:, :2], scaled[:, 2:])
        self.corners = np.concatenate((low, high), 1)
        """Left, top, right and bottom of each box in pixels, (boxes, 4)."""
        is_box = low.sum(1) + high.sum(1) > 0
        sides = high - low
        low, high = _corners((low + high) / 2, np.where(sides < least_side, boxes.dtype.type(least_side), sides))
        strides = np.array(levels.strides)
        cells = np.array([(level_width, level_height) for level_height, level_width in levels.sizes])
        with np.errstate(invalid="ignore"):  # of a box that is not a number; no point lies inside of it
            first = np.floor(low[:, None].astype(np.float64) / strides[:, None] - 0.5) + 1
            last = np.ceil(high[:, None].astype(np.float64) / strides[:, None] - 0.5)
        first, last = (np.clip(np.nan_to_num(each), 0, cells).astype(np.int64) for each in (first, last))
        sides_in_cells = np.maximum(last - first, 0) * is_box[:, None, None]  # (boxes, levels, 2)
        areas = sides_in_cells.prod(2)
        box, level = areas.nonzero()
        offsets = np.cumsum([0, *(h * w for h, w in levels.sizes[:-1])])
        columns, corner = sides_in_cells[box, level, 0], first[box, level]
        level_widths = cells[level, 0]
        self._areas = areas[box, level]
        self._table = np.stack(
            (box, image_of[box], columns, offsets[level] + corner[:, 1] * level_widths + corner[:, 0], level_widths)
        )
        self.of_box = areas.sum(1)
        """Number of pairs of each box, (boxes,)."""
        self._image_of = image_of

    def of_images(self, images: int) -> list[int]:
        """Return the number of pairs of each image."""
        return np.bincount(self._image_of, self.of_box, images).astype(np.int64).tolist()  # type: ignore[no-any-return]

    def pairs(self, images: slice, device: torch.device) -> Pairs:
        """Make the pairs of some images on the device, without waiting for it.

        Args:
            images: First image, and image after the last.
            device: Where the pairs are made.
        """
        table = self._rows_of(images)
        total = int(table[-1].sum())
        rows = to_device(torch.from_numpy(table), device)
        which = torch.repeat_interleave(rows[-1], output_size=total)
        box, image, columns, first, width, start = rows[:-1, which].unbind()
        within = torch.arange(total, device=device) - start
        down = torch.div(within, columns, rounding_mode="floor")
        return Pairs(box, image, first + down * (width - columns) + within)

    def tables(self, images: slice) -> tuple[_Array, _Array, int]:
        """Return the rectangles and spans of some images as the kernels read them, and their number of pairs.

        Args:
            images: First image, and image after the last.

        Returns:
            Rectangles (rows, 8), spans of boxes (boxes with pairs, 4), see `matching_kernels`, and the number of pairs.
        """
        table = self._rows_of(images)
        box, image, _, _, _, starts, areas = table
        first = np.flatnonzero(np.diff(box, prepend=-1))  # a box has a rectangle on each level
        spans = np.stack((starts[first], self.of_box[box[first]], image[first], box[first]), 1)
        return np.stack((*table, areas), 1).astype(np.int32), spans.astype(np.int32), int(areas.sum())

    def _rows_of(self, images: slice) -> _Array:
        """Return box, image, columns, first anchor, columns of the level, first pair and pairs of some rectangles."""
        mine = (self._table[1] >= images.start) & (self._table[1] < images.stop)
        areas = self._areas[mine]
        return np.stack((*self._table[:, mine], np.cumsum(areas) - areas, areas))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host, without waiting for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def split_images(pairs: Sequence[int], most: int) -> list[slice]:
    """Split images into slices with at most so many pairs, or one image.

    Args:
        pairs: Number of pairs of each image.
        most: Most pairs of a slice.
    """
    slices, start, total = [], 0, 0
    for index, count in enumerate(pairs):
        if index > start and total + count > most:
            slices.append(slice(start, index))
            start, total = index, 0
        total += count
    slices.append(slice(start, len(pairs)))
    return slices


def _corners(centre: _Array, sides: _Array) -> tuple[_Array, _Array]:
    return centre - sides / 2, centre + sides / 2
