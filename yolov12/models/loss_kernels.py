"""Triton kernels of the detection loss, for matched anchors and their gradients.

Shapes: boxes (images, 4 × bins, anchors), scores (images, classes, anchors), points in cells (2, anchors), strides
(anchors), targets (boxes of labels, 4), kinds (boxes of labels); score and box (images, anchors). Grid axis 1 is the
image. Predictions are rounded to half precision where Ultralytics' loss rounds them in mixed precision.

Constants are written out, see `mas.compile_ahead`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["box_gradient", "box_loss", "entropy", "entropy_gradient"]

_jit = triton.jit(do_not_specialize=["anchors", "classes"])


@triton.jit
def _rounded(value, pointer):
    """Round to the type that a pointer points to."""
    return value.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _sigmoid(value):
    return 1.0 / (1.0 + tl.exp(-value))


@triton.jit
def _softplus(value):
    """Return log(1 + exp(value)) to single precision: 2 artanh(u / (2 + u)) for u = exp(−|value|)."""
    u = tl.exp(-tl.abs(value))
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.maximum(value, 0.0) + 2.0 * s * series


@triton.jit
def _arctan(value):
    """Return the arcus tangent of a value that is not negative, to single precision."""
    large = value > 1.0
    t = tl.where(large, 1.0 / tl.maximum(value, 1.0), value)
    t = t / (1.0 + tl.sqrt(1.0 + t * t))  # half the angle
    q = t * t
    series = 1 / 9 - q * (1 / 11 - q * (1 / 13 - q * (1 / 15 - q / 17)))
    angle = 2.0 * t * (1.0 - q * (1 / 3 - q * (1 / 5 - q * (1 / 7 - q * series))))
    return tl.where(large, 1.5707963267948966 - angle, angle)


@triton.jit
def _overlap(ax1, ay1, ax2, ay2, aw, ah, area, angle, bx1, by1, bx2, by2):
    """Return the complete IoU of boxes a and b, and what its gradient needs (https://arxiv.org/abs/1911.08287).

    Width, height, area and angle of a are given, as they are rounded.
    """
    bw, bh = bx2 - bx1, by2 - by1 + 1e-7
    iw = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    ih = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    union = area + bw * bh - iw * ih + 1e-7
    iou = iw * ih / union
    cw = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1)
    ch = tl.maximum(ay2, by2) - tl.minimum(ay1, by1)
    diagonal = cw * cw + ch * ch + 1e-7
    dx, dy = bx1 + bx2 - ax1 - ax2, by1 + by2 - ay1 - ay2
    distance = (dx * dx + dy * dy) / 4
    turn = _arctan(bw / bh) - angle
    v = 0.4052847345693511 * turn * turn  # 4 / π²
    alpha = v / (1.0 - iou + v + 1e-7)
    return iou - (distance / diagonal + v * alpha), iw, ih, union, iou, cw, ch, diagonal, dx, dy, distance, turn, alpha


@triton.jit
def _bins(boxes, image, at, inside, side: tl.constexpr, anchors, bins: tl.constexpr):
    """Return the numbers of bins, (bins, 1), and the logits of a side, (bins, block)."""
    index = tl.arange(0, bins)[:, None]
    rows = image.to(tl.int64) * (4 * bins) + side * bins + index
    values = tl.load(boxes + rows * anchors + at[None, :], mask=inside[None, :], other=0.0)
    return index, values.to(tl.float32)


@triton.jit
def _distance(index, logits, boxes):
    """Return a distance, rounded as by Ultralytics, and the probabilities of bins."""
    values = tl.exp(logits - tl.max(logits, 0)[None, :])
    chances = values / tl.sum(values, 0)[None, :]
    return _rounded(tl.sum(_rounded(chances, boxes) * index, 0), boxes), chances


@triton.jit
def _matched(boxes, points, strides, targets, box, image, at, inside, anchors):
    """Return points and the boxes of labels in cells, for matched anchors."""
    stride = tl.load(strides + at, mask=inside, other=1.0)
    number = targets + tl.load(box + image * anchors + at, mask=inside, other=0) * 4
    x, y = tl.load(points + at, mask=inside, other=0.0), tl.load(points + anchors + at, mask=inside, other=0.0)
    bx1, by1 = tl.load(number, mask=inside, other=0.0) / stride, tl.load(number + 1, mask=inside, other=0.0) / stride
    bx2, by2 = (
        tl.load(number + 2, mask=inside, other=1.0) / stride,
        tl.load(number + 3, mask=inside, other=1.0) / stride,
    )
    return x, y, bx1, by1, bx2, by2


@triton.jit
def _sides(boxes, x1, y1, x2, y2):
    """Return width, height, area and angle of predicted boxes, rounded as by Ultralytics."""
    w = _rounded(x2 - x1, boxes)
    h = _rounded(_rounded(y2 - y1, boxes) + 1e-7, boxes)
    return w, h, _rounded(w * h, boxes), _rounded(_arctan(_rounded(w / h, boxes)), boxes)


@triton.jit
def _target(distance, bins: tl.constexpr):
    return tl.minimum(tl.maximum(distance, 0.0), bins - 1 - 0.01)


@triton.jit
def _focal(index, logits, target):
    """Return the distribution focal loss of a side (https://arxiv.org/abs/2006.04388)."""
    low = target.to(tl.int32)
    near = tl.where(index == low[None, :], 1.0 - (target - low)[None, :], 0.0)
    near += tl.where(index == (low + 1)[None, :], (target - low)[None, :], 0.0)
    top = tl.max(logits, 0)
    total = tl.log(tl.sum(tl.exp(logits - top[None, :]), 0)) + top
    return total - tl.sum(near * logits, 0), near


@_jit
def box_loss(boxes, points, strides, targets, score, box, partial, anchors, bins: tl.constexpr, block: tl.constexpr):
    """Sum the losses of boxes and of distances over matched anchors. Grid axis 1 is the image."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    image = tl.program_id(1)
    weight = tl.load(score + image * anchors + at, mask=at < anchors, other=0.0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    place = partial + image * tl.num_programs(0) + tl.program_id(0)
    if tl.max(weight, 0) > 0.0:
        inside = weight > 0.0
        x, y, bx1, by1, bx2, by2 = _matched(boxes, points, strides, targets, box, image, at, inside, anchors)
        index, l0 = _bins(boxes, image, at, inside, 0, anchors, bins)
        index, l1 = _bins(boxes, image, at, inside, 1, anchors, bins)
        index, l2 = _bins(boxes, image, at, inside, 2, anchors, bins)
        index, l3 = _bins(boxes, image, at, inside, 3, anchors, bins)
        f0, _ = _focal(index, l0, _target(x - bx1, bins))
        f1, _ = _focal(index, l1, _target(y - by1, bins))
        f2, _ = _focal(index, l2, _target(bx2 - x, bins))
        f3, _ = _focal(index, l3, _target(by2 - y, bins))
        d0, _ = _distance(index, l0, boxes)
        d1, _ = _distance(index, l1, boxes)
        d2, _ = _distance(index, l2, boxes)
        d3, _ = _distance(index, l3, boxes)
        x1, y1, x2, y2 = (
            _rounded(x - d0, boxes),
            _rounded(y - d1, boxes),
            _rounded(x + d2, boxes),
            _rounded(y + d3, boxes),
        )
        w, h, area, angle = _sides(boxes, x1, y1, x2, y2)
        overlap, _, _, _, _, _, _, _, _, _, _, _, _ = _overlap(x1, y1, x2, y2, w, h, area, angle, bx1, by1, bx2, by2)
        tl.store(place, tl.sum(tl.where(inside, (1.0 - overlap) * weight, 0.0), 0))
        tl.store(place + 2 * programs, tl.sum(tl.where(inside, (f0 + f1 + f2 + f3) * 0.25 * weight, 0.0), 0))
    else:
        tl.store(place, 0.0)
        tl.store(place + 2 * programs, 0.0)


@triton.jit
def _store_side(
    out, image, at, inside, side: tl.constexpr, anchors, bins: tl.constexpr, index, chances, near, of_distance, of_focal
):
    """Store the gradient of the logits of a side; 0 where an anchor is not matched."""
    mean = tl.sum(chances * index, 0)
    grad = chances * (index - mean[None, :]) * of_distance[None, :] + (chances - near) * of_focal[None, :]
    rows = image.to(tl.int64) * (4 * bins) + side * bins + index
    tl.store(out + rows * anchors + at[None, :], tl.where(inside[None, :], grad, 0.0), mask=at[None, :] < anchors)


@triton.jit
def _less(a, b):
    """Return the gradient of min(a, b) for a."""
    return tl.where(a < b, 1.0, tl.where(a == b, 0.5, 0.0))


@_jit
def box_gradient(
    boxes, points, strides, targets, score, box, grad, out, anchors, bins: tl.constexpr, block: tl.constexpr
):
    """Compute the gradient of all boxes from those of the three sums. Grid axis 1 is the image."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    image = tl.program_id(1)
    weight = tl.load(score + image * anchors + at, mask=at < anchors, other=0.0)
    inside = weight > 0.0
    if tl.max(weight, 0) > 0.0:
        x, y, bx1, by1, bx2, by2 = _matched(boxes, points, strides, targets, box, image, at, inside, anchors)
        index, l0 = _bins(boxes, image, at, inside, 0, anchors, bins)
        index, l1 = _bins(boxes, image, at, inside, 1, anchors, bins)
        index, l2 = _bins(boxes, image, at, inside, 2, anchors, bins)
        index, l3 = _bins(boxes, image, at, inside, 3, anchors, bins)
        d0, c0 = _distance(index, l0, boxes)
        d1, c1 = _distance(index, l1, boxes)
        d2, c2 = _distance(index, l2, boxes)
        d3, c3 = _distance(index, l3, boxes)
        x1, y1, x2, y2 = (
            _rounded(x - d0, boxes),
            _rounded(y - d1, boxes),
            _rounded(x + d2, boxes),
            _rounded(y + d3, boxes),
        )
        w, h, area, angle = _sides(boxes, x1, y1, x2, y2)
        _, iw, ih, union, iou, cw, ch, diagonal, dx, dy, distance, turn, alpha = _overlap(
            x1, y1, x2, y2, w, h, area, angle, bx1, by1, bx2, by2
        )
        of_overlap = -weight * tl.load(grad)
        of_inter, of_area = (1.0 + iou) / union, -iou / union
        of_iw = tl.where(tl.minimum(x2, bx2) >= tl.maximum(x1, bx1), ih, 0.0) * of_inter
        of_ih = tl.where(tl.minimum(y2, by2) >= tl.maximum(y1, by1), iw, 0.0) * of_inter
        of_cw, of_ch = 2 * cw * distance / (diagonal * diagonal), 2 * ch * distance / (diagonal * diagonal)
        of_angle = alpha * 8 / 9.869604401089358 * turn / (w * w + h * h)
        of_w, of_h = of_area * h + of_angle * h, of_area * w - of_angle * w
        of_x, of_y = dx / (2 * diagonal), dy / (2 * diagonal)
        g0 = of_iw * _less(bx1, x1) + of_cw * _less(x1, bx1) + of_w - of_x
        g1 = of_ih * _less(by1, y1) + of_ch * _less(y1, by1) + of_h - of_y
        g2 = of_iw * _less(x2, bx2) + of_cw * _less(bx2, x2) + of_w + of_x
        g3 = of_ih * _less(y2, by2) + of_ch * _less(by2, y2) + of_h + of_y
        _, n0 = _focal(index, l0, _target(x - bx1, bins))
        _, n1 = _focal(index, l1, _target(y - by1, bins))
        _, n2 = _focal(index, l2, _target(bx2 - x, bins))
        _, n3 = _focal(index, l3, _target(by2 - y, bins))
        of_focal = 0.25 * weight * tl.load(grad + 2)
        _store_side(out, image, at, inside, 0, anchors, bins, index, c0, n0, of_overlap * g0, of_focal)
        _store_side(out, image, at, inside, 1, anchors, bins, index, c1, n1, of_overlap * g1, of_focal)
        _store_side(out, image, at, inside, 2, anchors, bins, index, c2, n2, of_overlap * g2, of_focal)
        _store_side(out, image, at, inside, 3, anchors, bins, index, c3, n3, of_overlap * g3, of_focal)
    else:
        rows = image.to(tl.int64) * (4 * bins) + tl.arange(0, 4 * bins)[:, None]
        zero = tl.zeros((4 * bins, block), tl.float32)
        tl.store(out + rows * anchors + at[None, :], zero, mask=at[None, :] < anchors)


@triton.jit
def _labels(score, box, kinds, image, at, anchors, scores):
    """Return target score and class of anchors."""
    inside = at < anchors
    target = tl.load(score + image * anchors + at, mask=inside, other=0.0)
    number = tl.load(box + image * anchors + at, mask=target > 0.0, other=0)
    kind = tl.load(kinds + number, mask=target > 0.0, other=-1.0)
    return _rounded(target, scores)[None, :], kind.to(tl.int32)[None, :]


@_jit
def entropy(scores, score, box, kinds, partial, anchors, classes, tile: tl.constexpr, block: tl.constexpr):
    """Sum the binary cross-entropies of all scores. Grid axis 1 is the image."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    image = tl.program_id(1)
    target, kind = _labels(score, box, kinds, image, at, anchors, scores)
    total = tl.zeros((tile, block), tl.float32)
    for begin in range(0, classes, tile):
        index = begin + tl.arange(0, tile)[:, None]
        inside = (index < classes) & (at[None, :] < anchors)
        rows = image.to(tl.int64) * classes + index
        value = tl.load(scores + rows * anchors + at[None, :], mask=inside, other=0.0).to(tl.float32)
        # The product is also computed for a target of 0: a score of −inf makes Ultralytics' loss NaN.
        loss = _softplus(value) - value * tl.where(index == kind, target, 0.0)
        total += tl.where(inside, loss, 0.0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    tl.store(partial + programs + image * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@_jit
def entropy_gradient(scores, score, box, kinds, grad, out, anchors, classes, tile: tl.constexpr, block: tl.constexpr):
    """Compute the gradient of all scores from those of the three sums. Grid axis 1 is the image."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    image = tl.program_id(1)
    target, kind = _labels(score, box, kinds, image, at, anchors, scores)
    factor = tl.load(grad + 1)
    for begin in range(0, classes, tile):
        index = begin + tl.arange(0, tile)[:, None]
        inside = (index < classes) & (at[None, :] < anchors)
        rows = image.to(tl.int64) * classes + index
        value = tl.load(scores + rows * anchors + at[None, :], mask=inside, other=0.0).to(tl.float32)
        value = (_sigmoid(value) - tl.where(index == kind, target, 0.0)) * factor
        tl.store(out + rows * anchors + at[None, :], value, mask=inside)
