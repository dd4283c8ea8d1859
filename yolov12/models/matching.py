"""Matches boxes to anchors as Ultralytics' task-aligned assigner does, without waiting for the device.

The assigner finds the pairs of a box and an anchor inside of it on the device, and has to ask it for their number. Here
the pairs come from the host (`candidates`), and all tables have one row for each pair, not one for each box and anchor.
Method: C. Feng et al., TOOD: Task-aligned One-stage Object Detection, ICCV 2021.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov12.models.candidates import Pairs

__all__ = ["Matches", "match"]


class Matches(NamedTuple):
    """What each anchor is matched to. All tensors have the shape (images × anchors)."""

    is_match: Tensor
    """True for an anchor that is matched to a box."""
    box: Tensor
    """Index of its box; 0 without one."""
    score: Tensor
    """Target score of the class of its box; 0 without one."""


def match(assigner: Any, pairs: Pairs, shape: tuple[int, int], boxes: int, scores: Tensor, overlaps: Tensor) -> Matches:
    """Choose the anchors of each box, and one box for each anchor.

    A box takes the `topk` anchors with the highest alignment, score^alpha · overlap^beta. An anchor that several boxes
    take goes to the box with the highest overlap. An alignment of zero is none: it can only be chosen by chance.

    Args:
        assigner: Ultralytics' assigner, for its constants.
        pairs: Candidate pairs.
        shape: Number of images, and of anchors of each.
        boxes: Number of boxes.
        scores: Predicted score of the box's class at the anchor, (pairs,).
        overlaps: Overlap of the box and the anchor's prediction, at least 0, (pairs,).
    """
    alignment = scores.pow(assigner.alpha) * overlaps.pow(assigner.beta)
    anchor, count, index = pairs.image * shape[1] + pairs.anchor, len(pairs.box), _arange(pairs.box)
    taken = _among_best(alignment, pairs.box, boxes, assigner.topk) & ~(
        alignment <= 0
    )  # NaN stays, as a NaN loss tells
    takers = taken.new_zeros(shape[0] * shape[1], dtype=torch.int32).scatter_add_(0, anchor, taken.int())
    best = _largest(overlaps, anchor, len(takers))
    taken = torch.where(takers[anchor] > 1, ~(overlaps < best[anchor]), taken)
    # The first of equal boxes wins.
    pair_of = torch.full_like(takers, count, dtype=torch.int64)
    pair_of = pair_of.scatter_reduce_(0, anchor, torch.where(taken, index, count), "amin")
    wins = pair_of[anchor] == index
    alignment, overlaps = alignment * wins, overlaps * wins
    highest, overlap = (_largest(each, pairs.box, boxes)[pairs.box] for each in (alignment, overlaps))
    score = alignment * overlap / (highest + assigner.eps)
    return Matches(pair_of < count, _at(pairs.box, pair_of), _at(score, pair_of))


def _among_best(values: Tensor, row: Tensor, rows: int, most: int) -> Tensor:
    """Return for each value if it is among the `most` largest of its row. Values of a row stand side by side."""
    order = values.argsort(descending=True, stable=True)
    sorted_row, by_row = row[order].sort(stable=True)
    order = order[by_row]
    sizes = torch.zeros(rows, dtype=torch.int64, device=row.device).scatter_add_(0, row, torch.ones_like(row))
    rank = _arange(row) - (sizes.cumsum(0) - sizes)[sorted_row]
    return torch.empty_like(row, dtype=torch.bool).scatter_(0, order, rank < most)


def _largest(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Return the largest value of each row, at least 0."""
    return values.new_zeros(rows).scatter_reduce_(0, row, values, "amax")


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return values at indices; 0 for the index after the last."""
    return torch.cat((values, values.new_zeros(1)))[index]


def _arange(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)
