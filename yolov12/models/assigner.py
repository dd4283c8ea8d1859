"""Runs Ultralytics' assigner in slices of images, so that one image with many boxes does not enlarge all tables.

The assigner matches boxes to anchors. Its tables have the size images × largest number of boxes × anchors: one image
with 900 boxes among 32 images makes them thirty times as large. Images are matched independently of each other. Slices
of images with similar numbers of boxes therefore give the same result with much smaller tables. How images are split
into slices depends only on their numbers of boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.oom import is_out_of_memory

__all__ = ["ROWS_PER_IMAGE", "in_slices", "split_by_boxes"]

ROWS_PER_IMAGE = 64
"""Limit of the table rows of a slice, per image of the batch. A slice has as many rows as its images × the boxes of its
fullest image."""


def split_by_boxes(boxes: Sequence[int]) -> list[list[int]]:
    """Split images into slices whose tables have about the same size, `images × largest number of boxes`.

    Args:
        boxes: Number of boxes of each image.

    Returns:
        Image indices of each slice. The slice with the fullest image comes first.
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
    """Make an assigner run in slices, and collect its sums of target scores.

    After a failed allocation, Ultralytics' assigner retries image by image, in every batch again. Here a failed
    allocation raises, because a smaller micro-batch is faster.

    Args:
        assigner: A `TaskAlignedAssigner` of Ultralytics, or a subclass.
        boxes: Number of boxes of each image of the next batch.

    Yields:
        A list. Each call of the assigner appends its sum of target scores, a scalar tensor.

    Raises:
        MemoryError: An allocation failed in the assigner.
    """
    sums: list[Tensor] = []
    slices = split_by_boxes(boxes)
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
        raise MemoryError(message)  # not a RuntimeError, which the assigner would catch

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
    """Run the assigner on each slice. All inputs except `anchors` have images as the first dimension.

    The second dimension of `truths` is the boxes of an image, padded to the largest number of boxes.
    """
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
