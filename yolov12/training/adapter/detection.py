"""Joins Ultralytics' detection-like trainings to the engine: how to cut a batch, and what the loss was divided by."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from yolov12.mas.task import Loss, Workload
from yolov12.models.assigner import in_slices

__all__ = ["BOXES", "DetectionTask"]

BOXES = "yolov12_boxes"
"""Of a part: number of boxes of each image, on the host."""

# One row an object in these, one entry an image in the others.
_OBJECTS = ("cls", "bboxes", "keypoints", "segments", "obb")


class DetectionTask:
    """Implements `mas.Task` for Ultralytics' trainings with boxes.

    Detection and oriented boxes are exact: their losses are numerators over one sum S of target scores, clamped at 1,
    times the number of images. S is read off the assigner's output. The masks of segment and the keypoints of pose are
    divided by other things besides, as are the two heads of an end-to-end model; their parts are weighted by images.

    Args:
        model: Without wrappers.
        preprocess: Ultralytics' `trainer.preprocess_batch`, which scales pixels and draws the size for `multi_scale`.
        multi_scale: Whether it draws one.
        overlapping_masks: Whether masks are one entry an image rather than one an object.
    """

    floor = 1.0

    def __init__(
        self, model: nn.Module, preprocess: Callable[[Any], Any], *, multi_scale: bool, overlapping_masks: bool
    ) -> None:
        self._preprocess, self._multi_scale = preprocess, multi_scale
        self._objects = _OBJECTS if overlapping_masks else (*_OBJECTS, "masks")
        self.of_all = 0
        """Images of the batch at hand on all ranks, for the one who knows; 0 for one rank."""
        self._images = self._whole = 0
        self._boxes: list[int] = []  # of each of them
        self._ascending = False
        self._draw: Any = None  # the state of `random` from which all parts of a batch draw the same size
        criterion = getattr(model, "criterion", None)
        if criterion is None:  # Ultralytics makes it with the first loss
            criterion = model.criterion = model.init_criterion()
        self.exact = type(criterion).__name__ in ("v8DetectionLoss", "v8OBBLoss")
        """Whether the gradient does not depend on how a batch is cut."""

    def workload(self, batch: Mapping[str, Any]) -> Workload:
        """See `mas.Task`."""
        images: Tensor = batch["img"]
        self._images = len(images)
        self._whole = self.of_all or self._images
        self._draw = random.getstate() if self._multi_scale else None
        if self._multi_scale:
            # A user's own preprocessing may look at more than images, and write on it.
            one = {key: _copy(value) for key, value in self.part(batch, 0, 1).items() if key != BOXES}
            try:
                images = self._preprocess(one)["img"]
            except BaseException:
                random.setstate(self._draw)
                raise
        image_of = batch["batch_idx"]
        self._ascending = bool((image_of[1:] >= image_of[:-1]).all())
        self._boxes = torch.bincount(batch["batch_idx"].long(), minlength=self._images).tolist()
        return Workload(images.shape[2], images.shape[3], tuple(self._boxes))

    def part(self, batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        """See `mas.Task`."""
        if stop - start == self._images:
            return {**batch, BOXES: self._boxes}
        image_of = batch["batch_idx"]
        mine: slice | Tensor = (image_of >= start) & (image_of < stop)
        if self._ascending:  # as Ultralytics collates: a slice stays in pinned memory
            first, last = torch.searchsorted(image_of, torch.tensor([start, stop], dtype=image_of.dtype)).tolist()
            mine = slice(first, last)
        part = {key: value[mine] if key in self._objects else value[start:stop] for key, value in batch.items()}
        return {**part, "batch_idx": image_of[mine] - start, BOXES: self._boxes[start:stop]}

    def loss(self, model: nn.Module, part: dict[str, Any]) -> Loss:
        """See `mas.Task`."""
        boxes, part = part[BOXES], {key: value for key, value in part.items() if key != BOXES}
        with self._same_draw():
            part = self._preprocess(part)
        return self.measured(model, boxes, lambda: model(part))

    def measured(self, model: nn.Module, boxes: Sequence[int], run: Callable[[], Any]) -> Loss:
        """Run the model's loss on a part and see what it is divided by.

        Args:
            model: Its criterion is the one that runs.
            boxes: Of each image of the part.
            run: Returns the loss and its items.
        """
        assigner: Any = getattr(model.criterion, "assigner", None)
        none: list[Tensor] = []
        with nullcontext(none) if assigner is None else in_slices(assigner, boxes) as sums:
            loss, items = run()
        images = len(boxes)
        normaliser: Tensor | float = sums[0] if self.exact else float(images)
        # The loss is times the images it is of; make it times those of the batch.
        return Loss(loss if images == self._whole else loss * (self._whole / images), normaliser, items)

    @contextmanager
    def _same_draw(self) -> Iterator[None]:
        if self._draw is None:
            yield
            return
        now = random.getstate()
        random.setstate(self._draw)
        try:
            yield
        finally:
            random.setstate(now)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
