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
def in_slices(assigner: Any, boxes: Sequence[int] | None = None) -> Iterator[list[Tensor]]:
    """Make an assigner run in slices, and collect its sums of target scores.

    The slices follow the boxes that the assigner is given, whatever the batch was before a user's own code changed it.

    After a failed allocation, Ultralytics' assigner retries image by image, in every batch again. Here a failed
    allocation raises, because a smaller micro-batch is faster.

    Args:
        assigner: A `TaskAlignedAssigner` of Ultralytics, or a subclass.
        boxes: Number of boxes of each image, for tensors without values, from which they cannot be counted.

    Yields:
        A list. Each call of the assigner appends its sum of target scores, a scalar tensor.

    Raises:
        MemoryError: An allocation failed in the assigner.
        ValueError: `boxes` are those of another batch.
    """
    sums: list[Tensor] = []
    assign = assigner._forward

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return _sliced(assigner, assign, boxes, *args, **kwargs)
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
    boxes: Sequence[int] | None,
    scores: Tensor,
    predicted: Tensor,
    anchors: Tensor,
    *truths: Tensor,
    **more: Tensor,
) -> Any:
    """Run the assigner on each slice. All inputs except `anchors` have images as the first dimension.

    The second dimension of `truths` is the boxes of an image, padded to the largest number of boxes.
    """
    images, most = assigner.bs, assigner.n_max_boxes
    if most <= ROWS_PER_IMAGE:  # one slice: nothing has to be counted, which waits for the device
        return assign(scores, predicted, anchors, *truths, **more)
    counts = _rows_in_use(truths[-1]) if boxes is None else boxes
    if len(counts) != images or max(counts) > most:
        raise ValueError(f"{images} images with up to {most} boxes are not the {len(counts)} with up to {max(counts)}")
    results: tuple[Tensor, ...] = ()
    try:
        for chosen in split_by_boxes(counts):
            count = max(1, *(counts[index] for index in chosen))
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


def _rows_in_use(mask: Tensor) -> list[int]:
    """Return the number of rows of each image up to its last box.

    Args:
        mask: True for each row that is a box, (images, rows, 1).
    """
    rows = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    found: list[int] = (mask[..., 0].bool() * rows).amax(1).tolist()
    return found
