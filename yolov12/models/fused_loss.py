"""The detection loss in a dozen Triton kernels, where PyTorch's operations need several hundred launches.

The result is that of `detection_loss` with PyTorch's operations: the same matches, and terms that differ by rounding.
Pairs need 13 bytes each, and no tensor has an entry for each pair of an anchor and a class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from yolov12.mas.triton_launch import compiles, launch, unfilled
from yolov12.models.candidates import Rectangles, split_images, to_device

try:
    from yolov12.models import loss_kernels, matching_kernels
except ImportError:  # PyTorch supports platforms that Triton does not
    loss_kernels = matching_kernels = None  # type: ignore[assignment]

__all__ = ["fused_terms", "note", "supports"]

_BLOCK, _TILE = 128, 16  # anchors and classes that a program takes at once
_PAIRS = 256  # pairs that a program takes at once
_WARPS = 4


def supports(criterion: Any, predictions: Any) -> bool:
    """Return whether the kernels can compute a loss as PyTorch's operations do.

    Args:
        criterion: `v8DetectionLoss` with `use_dfl`.
        predictions: Predictions of a model, see `detection_loss`.
    """
    boxes, scores, assigner = predictions["boxes"], predictions["scores"], criterion.assigner
    half = torch.float16, torch.bfloat16
    return (
        boxes.is_cuda
        and boxes.dtype == scores.dtype
        and torch.get_default_dtype() == torch.float32
        # Mixed precision rounds where the kernels do.
        and (boxes.dtype in half if torch.is_autocast_enabled() else boxes.dtype == torch.float32)
        and boxes.is_contiguous()
        and scores.is_contiguous()
        and (assigner.alpha, assigner.beta, assigner.eps) == (0.5, 6.0, 1e-9)
        and criterion.reg_max & (criterion.reg_max - 1) == 0
        and _compiles(boxes.device, boxes.dtype)
    )


@functools.cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    return loss_kernels is not None and compiles(lambda: _try(device, dtype))


def note(dtype: torch.dtype) -> None:
    """Note the kernels of the loss for predictions of a type, see `compile_ahead.noted`."""
    if loss_kernels is not None:
        _try(torch.device("meta"), dtype)


def _try(device: torch.device, dtype: torch.dtype) -> None:
    boxes = torch.zeros(1, 64, 1, device=device, dtype=dtype)
    ones = torch.ones(2, 1, device=device)
    score, box, grad = (
        ones[:1].clone(),
        torch.zeros(1, 1, device=device, dtype=torch.int32),
        torch.zeros(3, device=device),
    )
    fields = _Fields(ones, ones[0], torch.ones(1, 4, device=device), score, box, ones[0])
    _sums(boxes, boxes, fields)
    _gradients(boxes, boxes, fields, grad)
    corners = torch.empty(1, 4, 1, device=device)
    launch(matching_kernels.corners_of, (1, 1, 1), (boxes, ones, ones[0], corners), (1,), (16, _BLOCK), _WARPS)
    table = torch.zeros(8, device=device, dtype=torch.int32)
    _match(boxes, corners, fields, (table, table), (1, 1, 1), 10)


class _Fields(NamedTuple):
    """What the kernels read besides predictions."""

    points: Tensor
    strides: Tensor
    targets: Tensor
    score: Tensor
    box: Tensor
    kinds: Tensor
    launch: Callable[..., None] = launch

    def of_boxes(self) -> tuple[Tensor, ...]:
        return self[:5]

    def of_scores(self) -> tuple[Tensor, ...]:
        return self[3:6]


@unfilled
def fused_terms(
    criterion: Any,
    predictions: Mapping[str, Any],
    rectangles: Rectangles,
    anchors: tuple[Tensor, Tensor],
    kinds: Tensor,
    pairs_per_image: int,
    launch: Callable[..., None] = launch,
) -> tuple[Tensor, Tensor]:
    """Compute the numerators of the loss.

    Args:
        criterion: Criterion that the kernels support.
        predictions: Predictions that the kernels support.
        rectangles: Candidate pairs.
        anchors: Points in cells, (2, anchors), and strides, (anchors).
        kinds: Class of each box, (boxes,).
        pairs_per_image: Most pairs that are matched at once, per image.
        launch: Launches a kernel, see `triton_launch.launch`.

    Returns:
        Sums of boxes, classes and distances, (3,), and the sum of target scores.
    """
    boxes, scores = predictions["boxes"], predictions["scores"]
    images, _, count = scores.shape
    device = scores.device
    if not len(kinds):  # an empty tensor has no address
        kinds, targets = torch.zeros(1, device=device), torch.zeros(1, 4, device=device)
    else:
        targets = to_device(torch.from_numpy(rectangles.corners), device)
    score = torch.zeros(images, count, device=device)
    box = torch.empty(images, count, dtype=torch.int32, device=device)
    fields = _Fields(*anchors, targets, score, box, kinds.float(), launch)
    corners = torch.empty(images, 4, count, device=device)
    grid, constants = (-(-count // _BLOCK), images, 1), (criterion.reg_max, _BLOCK)
    launch(matching_kernels.corners_of, grid, (boxes, *anchors, corners), (count,), constants, _WARPS)
    for mine in split_images(rectangles.of_images(images), pairs_per_image * images):
        rows, spans, pairs = rectangles.tables(mine)
        if pairs:
            tables = to_device(torch.from_numpy(np.concatenate((rows.ravel(), spans.ravel()))), device)
            sizes = len(rows), len(spans), pairs
            _match(scores, corners, fields, tables.split((rows.size, spans.size)), sizes, criterion.assigner.topk)
    sums: Tensor = _Terms.apply(boxes, scores, fields)  # type: ignore[no-untyped-call]
    return sums, score.sum()


def _match(
    scores: Tensor,
    corners: Tensor,
    fields: _Fields,
    tables: Sequence[Tensor],
    sizes: tuple[int, int, int],
    most: int,
) -> None:
    """Fill in the target scores and boxes of anchors.

    Args:
        scores: Logits of classes.
        corners: Predicted boxes in pixels.
        fields: Labels, and the tensors to fill.
        tables: Rectangles and spans, see `matching_kernels`.
        sizes: Numbers of rectangles, of spans and of pairs.
        most: Most anchors that a box takes.
    """
    (_, classes, anchors), device = scores.shape, scores.device
    (rectangles, spans), (rows, boxes, pairs) = tables, sizes
    anchor_of = torch.empty(pairs, dtype=torch.int32, device=device)
    alignment, overlaps = torch.empty(pairs, device=device), torch.empty(pairs, device=device)
    values = alignment, overlaps, anchor_of
    fields.launch(
        matching_kernels.pair_values,
        (rows, 1, 1),
        (scores, corners, rectangles, fields.targets, fields.kinds, anchor_of, alignment, overlaps),
        (anchors, classes),
        (_PAIRS,),
        _WARPS,
    )
    taken = torch.zeros(pairs, dtype=torch.uint8, device=device)
    takers = torch.zeros_like(fields.box)
    highest = torch.zeros_like(fields.score)
    pair_of = torch.full_like(takers, pairs)
    grid = boxes, 1, 1
    fields.launch(matching_kernels.take, grid, (*values, spans, taken, takers, highest), (), (most, _PAIRS), _WARPS)
    tensors = overlaps, taken, anchor_of, spans, takers, highest, pair_of
    fields.launch(matching_kernels.resolve, grid, tensors, (), (_PAIRS,), _WARPS)
    fields.launch(
        matching_kernels.won, grid, (*values, spans, pair_of, fields.score, fields.box), (), (_PAIRS,), _WARPS
    )


def _sums(boxes: Tensor, scores: Tensor, fields: _Fields) -> Tensor:
    images, classes, anchors = scores.shape
    grid = -(-anchors // _BLOCK), images, 1
    partial = torch.empty(3, grid[0] * images, device=scores.device)
    constants = boxes.shape[1] // 4, _BLOCK
    fields.launch(loss_kernels.box_loss, grid, (boxes, *fields.of_boxes(), partial), (anchors,), constants, _WARPS)
    tensors = scores, *fields.of_scores(), partial
    fields.launch(loss_kernels.entropy, grid, tensors, (anchors, classes), (_TILE, _BLOCK), _WARPS)
    return partial.sum(1)


@unfilled
def _gradients(boxes: Tensor, scores: Tensor, fields: _Fields, grad: Tensor) -> tuple[Tensor, Tensor]:
    images, classes, anchors = scores.shape
    grid = -(-anchors // _BLOCK), images, 1
    of_boxes, of_scores = torch.empty_like(boxes), torch.empty_like(scores)
    constants = boxes.shape[1] // 4, _BLOCK
    fields.launch(
        loss_kernels.box_gradient, grid, (boxes, *fields.of_boxes(), grad, of_boxes), (anchors,), constants, _WARPS
    )
    tensors = scores, *fields.of_scores(), grad, of_scores
    fields.launch(loss_kernels.entropy_gradient, grid, tensors, (anchors, classes), (_TILE, _BLOCK), _WARPS)
    return of_boxes, of_scores


class _Terms(torch.autograd.Function):
    """Sums of the losses of boxes, classes and distances."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, fields: _Fields) -> Tensor:
        """Return the sums, (3,)."""
        ctx.save_for_backward(boxes, scores)
        ctx.fields = fields
        return _sums(boxes, scores, fields)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of boxes and scores."""
        boxes, scores = ctx.saved_tensors
        return *_gradients(boxes, scores, ctx.fields, grad.contiguous()), None
