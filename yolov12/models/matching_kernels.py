"""Triton kernels that match boxes to anchors, see `matching`.

Shapes: boxes (images, 4 × bins, anchors), scores (images, classes, anchors), corners (images, 4, anchors), points in
cells (2, anchors), strides (anchors). Values of anchors are (images, anchors).

A rectangle is a row of eight numbers: box, image, columns, first anchor, columns of its level, first pair, pairs, and
one that is not used. A span is a row of four: first pair, pairs, image, box. Grid axis 0 is the rectangle or span.
"""

from __future__ import annotations

import triton
import triton.language as tl

from yolov12.models.loss_kernels import _arctan, _bins, _distance, _overlap, _rounded, _sigmoid

__all__ = ["corners_of", "pair_values", "resolve", "take", "won"]

_jit = triton.jit(do_not_specialize=["anchors", "classes"])


@_jit
def corners_of(boxes, points, strides, corners, anchors, bins: tl.constexpr, block: tl.constexpr):
    """Decode all boxes to pixels. Grid axis 1 is the image."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside, image = at < anchors, tl.program_id(1)
    stride = tl.load(strides + at, mask=inside, other=1.0)
    for side in tl.static_range(4):
        index, logits = _bins(boxes, image, at, inside, side, anchors, bins)
        distance, _ = _distance(index, logits, boxes)
        point = tl.load(points + (side % 2) * anchors + at, mask=inside, other=0.0)
        corner = _rounded(_rounded(point + (distance if side > 1 else -distance), boxes) * stride, boxes)
        tl.store(corners + (image.to(tl.int64) * 4 + side) * anchors + at, corner, mask=inside)


@_jit
def pair_values(
    scores, corners, rectangles, targets, kinds, anchor_of, alignment, overlaps, anchors, classes, block: tl.constexpr
):
    """Fill in the anchor, the alignment and the overlap of all pairs. Grid axis 0 is the rectangle."""
    row = rectangles + tl.program_id(0) * 8
    box, image, columns = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    first, width, start, count = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    x1, y1 = tl.load(targets + box * 4), tl.load(targets + box * 4 + 1)
    x2, y2 = tl.load(targets + box * 4 + 2), tl.load(targets + box * 4 + 3)
    kind = tl.load(kinds + box).to(tl.int32)
    # The label is the first box of the overlap here, and the second in the loss.
    w, h = x2 - x1, y2 - y1 + 1e-7
    angle = _arctan(w / h)
    values = scores + (image.to(tl.int64) * classes + kind) * anchors
    base = corners + image.to(tl.int64) * 4 * anchors
    for begin in range(0, count, block):
        cell = begin + tl.arange(0, block)
        inside = cell < count
        at = first + cell // columns * (width - columns) + cell
        px1 = tl.load(base + at, mask=inside, other=0.0)
        py1 = tl.load(base + anchors + at, mask=inside, other=0.0)
        px2 = tl.load(base + 2 * anchors + at, mask=inside, other=1.0)
        py2 = tl.load(base + 3 * anchors + at, mask=inside, other=1.0)
        overlap, _, _, _, _, _, _, _, _, _, _, _, _ = _overlap(x1, y1, x2, y2, w, h, w * h, angle, px1, py1, px2, py2)
        overlap = tl.where(overlap == overlap, tl.maximum(overlap, 0.0), float("inf"))  # makes the loss NaN
        score = _rounded(_sigmoid(tl.load(values + at, mask=inside, other=0.0).to(tl.float32)), scores)
        square = overlap * overlap
        tl.store(anchor_of + start + cell, at + image * anchors, mask=inside)
        tl.store(overlaps + start + cell, overlap, mask=inside)
        tl.store(alignment + start + cell, tl.sqrt(score) * (square * square * square), mask=inside)


@_jit
def take(alignment, overlaps, anchor_of, spans, taken, takers, highest, most: tl.constexpr, block: tl.constexpr):
    """Take the best pairs of each box; count how often an anchor is taken, and find its highest overlap."""
    row = spans + tl.program_id(0) * 4
    start, count = tl.load(row), tl.load(row + 1)
    last_value, last = float("inf"), -1
    for _ in range(most):
        top, chosen = -1.0, 0
        for begin in range(0, count, block):
            index = begin + tl.arange(0, block)
            value = tl.load(alignment + start + index, mask=index < count, other=-1.0)
            value = tl.where(value == value, value, float("inf"))
            later = (value < last_value) | ((value == last_value) & (index > last))
            value = tl.where(later & (value > 0.0), value, -1.0)
            best = tl.max(value, 0)
            where = tl.min(tl.where(value == best, index, count), 0)
            chosen = tl.where(best > top, where, chosen)
            top = tl.maximum(best, top)
        is_one = top > 0.0
        tl.store(taken + start + chosen, 1, mask=is_one)
        tl.atomic_add(takers + tl.load(anchor_of + start + chosen), 1, mask=is_one)
        last_value, last = top, chosen
    for begin in range(0, count, block):
        index = begin + tl.arange(0, block)
        inside = index < count
        at = tl.load(anchor_of + start + index, mask=inside, other=0)
        tl.atomic_max(highest + at, tl.load(overlaps + start + index, mask=inside, other=0.0), mask=inside)


@_jit
def resolve(overlaps, taken, anchor_of, spans, takers, highest, pair_of, block: tl.constexpr):
    """Choose one pair of each anchor: the one that took it or, of several, the one with the highest overlap."""
    row = spans + tl.program_id(0) * 4
    start, count = tl.load(row), tl.load(row + 1)
    for begin in range(0, count, block):
        index = begin + tl.arange(0, block)
        inside = index < count
        at = tl.load(anchor_of + start + index, mask=inside, other=0)
        overlap = tl.load(overlaps + start + index, mask=inside, other=-1.0)
        is_highest = overlap >= tl.load(highest + at, mask=inside, other=0.0)
        one = tl.load(taken + start + index, mask=inside, other=0) > 0
        several = tl.load(takers + at, mask=inside, other=0) > 1
        tl.atomic_min(pair_of + at, start + index, mask=inside & ((several & is_highest) | (one & (several == 0))))


@_jit
def won(alignment, overlaps, anchor_of, spans, pair_of, score, box, block: tl.constexpr):
    """Compute the target scores of the anchors that each box has won."""
    row = spans + tl.program_id(0) * 4
    start, count, number = tl.load(row), tl.load(row + 1), tl.load(row + 3)
    best, overlap = 0.0, 0.0
    for begin in range(0, count, block):
        index = begin + tl.arange(0, block)
        at = tl.load(anchor_of + start + index, mask=index < count, other=0)
        mine = (index < count) & (tl.load(pair_of + at) == start + index)
        best = tl.maximum(best, tl.max(tl.load(alignment + start + index, mask=mine, other=0.0), 0))
        overlap = tl.maximum(overlap, tl.max(tl.load(overlaps + start + index, mask=mine, other=0.0), 0))
    for begin in range(0, count, block):
        index = begin + tl.arange(0, block)
        at = tl.load(anchor_of + start + index, mask=index < count, other=0)
        mine = (index < count) & (tl.load(pair_of + at) == start + index)
        value = tl.load(alignment + start + index, mask=mine, other=0.0)
        tl.store(score + at, value * overlap / (best + 1e-9), mask=mine)
        tl.store(box + at, number, mask=mine)
