"""Adapter between the engine and Ultralytics' detection, segmentation and pose trainings: batches and losses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from yolov12.mas.task import Loss, Workload
from yolov12.models.assigner import in_slices
from yolov12.training.adapter.logical_batch import TensorFacts

__all__ = ["BOXES", "DetectionTask", "criterion_of", "knows_loss", "loss_is_exact"]

BOXES = "yolov12_boxes"
"""Key of a part: list of the number of boxes in each image, on the host."""

# These tensors have one row per object; all other tensors have one entry per image.
_OBJECTS = ("cls", "bboxes", "keypoints", "segments", "obb")
_EXACT = ("v8DetectionLoss", "v8OBBLoss")
_STOCK_LOSSES = "ultralytics.utils.loss"


def criterion_of(model: Any) -> Any:
    """Return a model's criterion; create it if there is none yet, as Ultralytics does at the first loss."""
    if getattr(model, "criterion", None) is None:
        model.criterion = model.init_criterion()
    return model.criterion


def knows_loss(model: Any) -> bool:
    """Return whether a model's loss is one of Ultralytics' own, so that the losses of parts can be combined exactly.

    A user may assign `criterion`, `loss` or `init_criterion` at any time.
    """
    own = "loss" in vars(model) or type(model).loss.__module__ != "ultralytics.nn.tasks"
    return not own and type(criterion_of(model)).__module__ == _STOCK_LOSSES


def loss_is_exact(model: nn.Module) -> bool:
    """Return whether the gradient of a model's loss does not depend on how a batch is split."""
    return type(criterion_of(model)).__name__ in _EXACT


class DetectionTask:
    """Implements `mas.Task` for Ultralytics' trainings with boxes.

    Detection and oriented boxes are exact: their losses are numerators over one sum S of target scores, clamped at 1,
    times the number of images. S is read from the assigner's output. Masks, keypoints and the two heads of an
    end-to-end model have further normalisers; there, parts are weighted by their numbers of images.

    Args:
        preprocess: Ultralytics' `trainer.preprocess_batch`, which scales pixels and, for `multi_scale`, draws an image
            size.
        multi_scale: True if `preprocess` draws a size.
        overlapping_masks: True if masks have one entry per image rather than one per object.
    """

    floor = 1.0
    """Smallest normaliser, as Ultralytics' losses clamp theirs at 1."""

    def __init__(self, preprocess: Callable[[Any], Any], *, multi_scale: bool, overlapping_masks: bool) -> None:
        self.preprocess, self._multi_scale = preprocess, multi_scale
        self._objects = _OBJECTS if overlapping_masks else (*_OBJECTS, "masks")
        self._images = 0  # number of images in the current batch
        self._boxes: list[int] = []  # number of boxes in each of its images
        self._rows: dict[str, int] = {}  # number of rows in each of its tensors
        self._ascending = False
        self._draw: Any = None  # state of `random`, so that all parts of a batch draw the same size
        self.facts: dict[str, TensorFacts] = {}
        """Key → shape, dtype and device of the batch's tensor after preprocessing, as far as parts of it tell."""

    def workload(self, batch: Mapping[str, Any]) -> Workload:
        """Return the properties of a batch on the host, see `mas.Task`."""
        images: Tensor = batch["img"]
        self._images = len(images)
        self._rows = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        self._draw = random.getstate() if self._multi_scale else None
        if self._multi_scale:
            # The user's own preprocessing may read more than images, and change tensors in place.
            one = {key: _copy(value) for key, value in self.part(batch, 0, 1).items() if key != BOXES}
            try:
                images = self.preprocess(one)["img"]
            except BaseException:
                random.setstate(self._draw)
                raise
        image_of = batch["batch_idx"]
        self._ascending = bool((image_of[1:] >= image_of[:-1]).all())
        self._boxes = torch.bincount(batch["batch_idx"].long(), minlength=self._images).tolist()
        return Workload(images.shape[2], images.shape[3], tuple(self._boxes))

    def part(self, batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        """Return images `start` to `stop` of a batch, with their numbers of boxes, see `mas.Task`."""
        if stop - start == self._images:
            return {**batch, BOXES: self._boxes}
        image_of = batch["batch_idx"]
        mine: slice | Tensor = (image_of >= start) & (image_of < stop)
        if self._ascending:  # always so after Ultralytics' collate function; a slice stays in pinned memory
            first, last = torch.searchsorted(image_of, torch.tensor([start, stop], dtype=image_of.dtype)).tolist()
            mine = slice(first, last)
        part = {key: value[mine] if key in self._objects else value[start:stop] for key, value in batch.items()}
        return {**part, "batch_idx": image_of[mine] - start, BOXES: self._boxes[start:stop]}

    def loss(self, model: nn.Module, part: dict[str, Any]) -> Loss:
        """Preprocess a part and run the model's loss on it, see `mas.Task`."""
        boxes, part = part[BOXES], {key: value for key, value in part.items() if key != BOXES}
        rows = {key: len(value) for key, value in part.items() if isinstance(value, Tensor) and value.ndim}
        with self.same_draw():
            part = self.preprocess(part)
        self._learn_facts(part, rows)
        return self.measured(model, boxes, lambda: model(part))

    def measured(self, model: nn.Module, boxes: Sequence[int], run: Callable[[], Any]) -> Loss:
        """Run the model's loss on a part, and read its normaliser.

        Args:
            model: Model whose criterion `run` calls.
            boxes: Number of boxes in each image of the part.
            run: Runs the loss; returns it with its items.
        """
        assigner: Any = getattr(criterion_of(model), "assigner", None)
        none: list[Tensor] = []
        with nullcontext(none) if assigner is None else in_slices(assigner, boxes) as sums:
            loss, items = run()
        normaliser: Tensor | float = sums[0] if loss_is_exact(model) else float(len(boxes))
        return Loss(loss, normaliser, items, times_images=True)

    @contextmanager
    def same_draw(self) -> Iterator[None]:
        """Return a context with the random state of the current batch, so that all of its parts draw the same size."""
        if self._draw is None:
            yield
            return
        now = random.getstate()
        random.setstate(self._draw)
        try:
            yield
        finally:
            random.setstate(now)

    def _learn_facts(self, part: Mapping[str, Any], rows: Mapping[str, int]) -> None:
        """Note the tensors of a part after preprocessing, except those with another number of rows than before."""
        self.facts = {
            key: TensorFacts(torch.Size((self._rows[key], *value.shape[1:])), value.dtype, value.device)
            for key, value in part.items()
            if isinstance(value, Tensor) and value.ndim and rows.get(key) == len(value) and key in self._rows
        }


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
