"""Arrangement of a batch: every micro-batch gets images with many and with few boxes.

Images are sorted by their number of boxes, and then taken in the order of the van der Corput sequence. Every stretch of
this sequence is spread evenly over the whole, so groups of any size need about the same memory. The arrangement depends
only on the batch and never on memory, so the gradient is that of the same groups on any device.
https://en.wikipedia.org/wiki/Van_der_Corput_sequence
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["arranged"]


def arranged(boxes: Sequence[int]) -> list[int]:
    """Return the indices of images in the order in which they are trained on.

    Args:
        boxes: Number of boxes in each image.
    """
    by_boxes = sorted(range(len(boxes)), key=lambda index: -boxes[index])
    positions = sorted(range(len(boxes)), key=_reversed_bits)
    order = [0] * len(boxes)
    for position, index in zip(positions, by_boxes, strict=True):
        order[position] = index
    return order


def _reversed_bits(number: int) -> float:
    """Return the van der Corput number of an index: its binary digits in reverse order after the point."""
    value, digit = 0.0, 0.5
    while number:
        value += digit * (number & 1)
        number, digit = number >> 1, digit / 2
    return value
