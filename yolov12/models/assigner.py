"""The matching of boxes to anchors in slices of images, so that one crowded image is not paid for by all.

Ultralytics' assigner makes tables of images × boxes of the fullest image × anchors: among 32 images, one of 900 boxes
makes them thirty times as large. Each image is matched on its own, so slices of images with about as many boxes give
the same result with tables that stay level. What is cut depends on the boxes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.oom import is_out_of_memory

__all__ = ["ROWS_PER_IMAGE", "cut_by_boxes", "in_slices"]

ROWS_PER_IMAGE = 64
"""Of a table, on average: boxes that an image may have before slices are cut."""


def cut_by_boxes(boxes: Sequence[int]) -> list[list[int]]:
    """Indices of the images of each slice: as many as keep `images × boxes of the fullest` level, the fullest first.

    Args:
        boxes: Of each image.
    """
    most_rows = max(ROWS_PER_IMAGE * len(boxes), *boxes)
    order = sorted(range(len(boxes)), key=lambda index: -boxes[index])
    slices: list[list[int]] = []
    start = 0
    while start < len(order):
        stop = start + most_rows // max(boxes[order[start]], 1)
        slices.append(sorted(order[start:stop]))
        start = stop
    return slices


@contextmanager
def in_slices(assigner: Any, boxes: Sequence[int]) -> Iterator[list[Tensor]]:
    """Let an assigner work in slices, and collect the sums of target scores that it gives out.

    By itself it survives failed allocations by going image by image, every time again. Here they fail, as a smaller
    micro-batch is faster.

    Args:
        assigner: A `TaskAlignedAssigner` of Ultralytics, or one of its kind.
        boxes: Of each image of the batch that it will be given.
    """
    sums: list[Tensor] = []
    slices = cut_by_boxes(boxes)
    assign = assigner._forward

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            if len(slices) == 1:
                return assign(*args, **kwargs)
            return _sliced(assigner, assign, slices, boxes, *args, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = str(error)
        raise MemoryError(message)  # which is no RuntimeError, so it is not caught there

    hook = assigner.register_forward_hook(lambda module, inputs, output: sums.append(output[2].sum()))
    assigner._forward = run
    try:
        yield sums
    finally:
        del assigner._forward
        hook.remove()


def _sliced(
    assigner: Any,
    assign: Any,
    slices: Sequence[Sequence[int]],
    boxes: Sequence[int],
    scores: Tensor,
    predicted: Tensor,
    anchors: Tensor,
    *truths: Tensor,
    **more: Tensor,
) -> tuple[Tensor, ...]:
    """Args of the assigner: all but the anchors have an entry for each image, and truths one for each box in it."""
    images, most = assigner.bs, assigner.n_max_boxes
    results: tuple[Tensor, ...] = ()
    try:
        for chosen in slices:
            count = min(max(1, *(boxes[index] for index in chosen)), most)
            at = torch.tensor(chosen, device=scores.device)
            assigner.bs, assigner.n_max_boxes = len(chosen), count
            found = assign(
                scores[at], predicted[at], anchors, *(truth[:, :count][at] for truth in truths),
                **{name: value[at] for name, value in more.items()},
            )  # fmt: skip
            results = results or tuple(each.new_empty((images, *each.shape[1:])) for each in found)
            for result, each in zip(results, found, strict=True):
                result[at] = each
    finally:
        assigner.bs, assigner.n_max_boxes = images, most
    return results
