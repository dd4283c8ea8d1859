"""Ultralytics' detection loss without synchronisation between host and device.

Values and gradients are those of `v8DetectionLoss`, except for rounding. Its parts are called where they do not wait:
the decoding of boxes, the overlaps, and the loss of boxes. What differs:

- The numbers of boxes and of candidate pairs come from the labels on the host (`candidates`, `matching`).
- The loss of boxes runs on the matched anchors, in a list whose length the host knows. Unmatched anchors fill it up.
- Target scores are not stored for each class: binary cross-entropy is the softplus of all scores, minus score × target
  of each matched anchor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov12.mas import triton_launch
from yolov12.models import fused_loss
from yolov12.models.candidates import Labels, Levels, Rectangles, split_images, to_device
from yolov12.models.matching import Matches, match

__all__ = ["PAIRS_PER_IMAGE", "detection_loss", "levels_of"]

PAIRS_PER_IMAGE = 32768
"""Limit of the candidate pairs that are matched at once, per image of the batch."""


def levels_of(criterion: Any, predictions: Mapping[str, Any]) -> Levels:
    """Return the levels of a model's predictions."""
    strides = criterion.assigner.stride  # on the host, unlike `criterion.stride`
    return Levels(tuple(tuple(each.shape[2:]) for each in predictions["feats"]), tuple(map(float, strides)))


def detection_loss(
    criterion: Any,
    predictions: Mapping[str, Any],
    labels: Labels,
    classes: Tensor,
    launch: Callable[..., None] | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Compute the loss of `v8DetectionLoss`.

    Args:
        criterion: `v8DetectionLoss` with `use_dfl`, without `class_weights`.
        predictions: "boxes" (images, 4 × bins, anchors), "scores" (images, classes, anchors) and "feats".
        labels: Boxes on the host.
        classes: Class of each box on the device, (boxes,) or (boxes, 1).
        launch: Is called for each launch of a kernel, on any device; None to launch kernels where they are supported.

    Returns:
        Loss (box, cls, dfl) times the number of images, the items, and the sum of target scores.
    """
    levels, device = levels_of(criterion, predictions), predictions["scores"].device
    rectangles = Rectangles(labels, levels, criterion.assigner.stride_val)
    classes, images = classes.reshape(-1), len(predictions["scores"])
    if launch is not None or fused_loss.supports(criterion, predictions):
        sums, total = fused_loss.fused_terms(
            criterion,
            predictions,
            rectangles,
            _rows(levels, device),
            classes,
            PAIRS_PER_IMAGE,
            launch or triton_launch.launch,
        )
        loss = sums / total.clamp(min=1) * _gains(criterion.hyp.box, criterion.hyp.cls, criterion.hyp.dfl, device)
    else:
        anchors = _anchors(levels, predictions["feats"][0].dtype, device)
        loss, total = _loss(criterion, predictions, rectangles, anchors, classes.long())
    return loss * images, dict(zip(criterion.loss_names, loss.detach(), strict=True)), total


def _loss(
    criterion: Any,
    predictions: Mapping[str, Any],
    rectangles: Rectangles,
    anchors: tuple[Tensor, Tensor],
    classes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the loss with PyTorch's operations; return it with the sum of target scores."""
    points, strides = anchors
    scores = predictions["scores"]
    targets = to_device(torch.from_numpy(rectangles.corners), scores.device)
    matches = _matches(criterion, predictions, rectangles, anchors, targets, classes)
    total = matches.score.sum()
    norm = total.clamp(min=1)

    kinds = classes[matches.box] if len(classes) else matches.box
    rows = len(scores), 1, -1
    target = matches.score.to(scores.dtype).view(rows)
    of_classes: Tensor = _CrossEntropy.apply(scores, target, kinds.view(rows)) / norm  # type: ignore[no-untyped-call]

    most = min(int(np.minimum(rectangles.of_box, criterion.assigner.topk).sum()), len(matches.box))
    at = (~matches.is_match).byte().argsort(stable=True)[:most]  # distinct, so that gradients do not have to be added
    image = torch.div(at, scores.shape[2], rounding_mode="floor")
    anchor = at - image * scores.shape[2]
    distances: Tensor = _Columns.apply(predictions["boxes"], image, anchor)  # type: ignore[no-untyped-call]
    distances = distances.where(matches.is_match[at, None], 0)  # a weight of zero does not hide NaN
    of_boxes, of_distances = criterion.bbox_loss(
        distances,
        criterion.bbox_decode(points[anchor], distances[None])[0],
        points[anchor],
        targets[matches.box[at]] / strides[anchor],
        matches.score[at, None],
        norm,
        _All(),
        None,
        strides[anchor],
    )
    hyp, dtype = criterion.hyp, torch.get_default_dtype()
    terms = (of_boxes, hyp.box), (of_classes, hyp.cls), (of_distances, hyp.dfl)
    return torch.stack([term.to(dtype) * gain for term, gain in terms]), total


class _All:
    """Mask of the foreground for which all rows are foreground."""

    def nonzero(self, as_tuple: bool) -> tuple[slice]:
        return (slice(None),)


@torch.no_grad()
def _matches(
    criterion: Any,
    predictions: Mapping[str, Any],
    rectangles: Rectangles,
    anchors: tuple[Tensor, Tensor],
    targets: Tensor,
    classes: Tensor,
) -> Matches:
    """Match the boxes of all images, in slices of images if there are many pairs."""
    (points, strides), scores, assigner = anchors, predictions["scores"].detach(), criterion.assigner
    boxes = criterion.bbox_decode(points, predictions["boxes"].detach().permute(0, 2, 1))
    boxes = (boxes * strides).type(targets.dtype)
    images = len(scores)
    found = []
    for mine in split_images(rectangles.of_images(images), PAIRS_PER_IMAGE * images):
        pairs = rectangles.pairs(mine, scores.device)
        overlaps = assigner.iou_calculation(targets[pairs.box], boxes[pairs.image, pairs.anchor])
        score = scores[pairs.image, classes[pairs.box], pairs.anchor].sigmoid()
        shape = mine.stop - mine.start, scores.shape[2]
        pairs = pairs._replace(image=pairs.image - mine.start)
        found.append(match(assigner, pairs, shape, len(classes), score, overlaps))
    return found[0] if len(found) == 1 else Matches(*map(torch.cat, zip(*found, strict=True)))


@functools.lru_cache(maxsize=32)
def _anchors(levels: Levels, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the points of all anchors in cells, (anchors, 2), and their strides, (anchors, 1)."""
    points, strides = [], []
    for (height, width), stride in zip(levels.sizes, levels.strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        points.append(torch.stack((x, y), -1).view(-1, 2))
        strides.append(torch.full((height * width, 1), stride))
    return to_device(torch.cat(points).to(dtype), device), to_device(torch.cat(strides).to(dtype), device)


@functools.lru_cache(maxsize=32)
def _rows(levels: Levels, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return points and strides as the kernels read them, (2, anchors) and (anchors)."""
    points, strides = _anchors(levels, torch.float32, device)
    return points.T.contiguous(), strides[:, 0].contiguous()


@functools.lru_cache(maxsize=8)
def _gains(box: float, cls: float, dfl: float, device: torch.device) -> Tensor:
    return to_device(torch.tensor([box, cls, dfl]), device)


class _Columns(torch.autograd.Function):
    """Predictions of some anchors, each of which occurs once."""

    @staticmethod
    def forward(ctx: Any, predictions: Tensor, image: Tensor, anchor: Tensor) -> Tensor:
        """Return (anchors, channels) of predictions (images, channels, anchors)."""
        ctx.save_for_backward(image, anchor)
        ctx.shape = predictions.shape
        return predictions[image, :, anchor]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the predictions."""
        image, anchor = ctx.saved_tensors
        out = grad.new_zeros(ctx.shape)
        out[image, :, anchor] = grad
        return out, None, None


class _CrossEntropy(torch.autograd.Function):
    """Sum of the binary cross-entropies of scores, for targets that are not zero in one class of an anchor at most."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
        """Return the sum of scores (images, classes, anchors); targets and classes are (images, 1, anchors)."""
        ctx.save_for_backward(scores, targets, classes)
        dtype = _exact(scores.dtype)
        chosen = scores.gather(1, classes).to(dtype)
        nothing = chosen.new_zeros(())
        first, *rest = [
            F.binary_cross_entropy_with_logits(each.to(dtype), nothing.expand_as(each), reduction="sum")
            for each in _parts(scores)
        ]
        return sum(rest, first) - (chosen * targets).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the scores, (sigmoid(score) − target) × `grad`."""
        scores, targets, classes = ctx.saved_tensors
        dtype = _exact(scores.dtype)
        out = torch.empty_like(scores)
        for each, target in zip(_parts(out), _parts(scores), strict=True):
            each.copy_(target.to(dtype, copy=True).sigmoid_().mul_(grad))
        chosen = (scores.gather(1, classes).to(dtype).sigmoid_() - targets) * grad
        return out.scatter_(1, classes, chosen.to(scores.dtype)), None, None


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _parts(scores: Tensor) -> tuple[Tensor, ...]:
    """Split scores so that copies in full precision stay small. On a GPU, fewer launches count more."""
    return scores.split(1) if scores.device.type == "cpu" else (scores,)
