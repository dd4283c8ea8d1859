"""Which images of a batch share a micro-batch: all micro-batches get crowded and empty ones alike.

Images are sorted by their boxes and taken in the order of the van der Corput sequence, in which every stretch is spread
evenly over the whole. So groups of any size need about the same memory. Only the batch itself counts, never memory: the
gradient is that of these groups on any device. https://en.wikipedia.org/wiki/Van_der_Corput_sequence
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["arranged"]


def arranged(boxes: Sequence[int]) -> list[int]:
    """Indices of images in the order to train on them.

    Args:
        boxes: Of each image.
    """
    by_boxes = sorted(range(len(boxes)), key=lambda index: -boxes[index])
    positions = sorted(range(len(boxes)), key=_reversed_bits)
    order = [0] * len(boxes)
    for position, index in zip(positions, by_boxes, strict=True):
        order[position] = index
    return order


def _reversed_bits(number: int) -> float:
    """The number's binary digits, read backwards behind the point."""
    value, digit = 0.0, 0.5
    while number:
        value += digit * (number & 1)
        number, digit = number >> 1, digit / 2
    return value
