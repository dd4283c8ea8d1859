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
from yolov12.training.adapter.deferred_tensor import TensorFacts
from yolov12.training.adapter.logical_batch import SAME, UNKNOWN

__all__ = ["BOXES", "DetectionTask", "criterion_of", "drawing_from", "knows_call", "knows_loss", "loss_is_exact"]

BOXES = "yolov12_boxes"
"""Key of a part: list of the number of boxes in each image, on the host."""

# These tensors have one row per object; all other tensors have one entry per image.
_OBJECTS = ("cls", "bboxes", "keypoints", "segments", "obb")
_EXACT = ("v8DetectionLoss", "v8OBBLoss")
_MODELS, _LOSSES = "ultralytics.nn.tasks", "ultralytics.utils.loss"


def criterion_of(model: Any) -> Any:
    """Return a model's criterion; create it if there is none yet, as Ultralytics does at the first loss."""
    if getattr(model, "criterion", None) is None:
        model.criterion = model.init_criterion()
    return model.criterion


def knows_loss(model: Any) -> bool:
    """Return whether a model's loss is one of Ultralytics' own, so that the losses of parts can be combined exactly.

    A user may assign `loss`, `criterion`, `init_criterion`, or a part of the criterion, at any time.
    """
    return not _is_own(model, "loss") and _is_stock(criterion_of(model))


def knows_call(model: Any) -> bool:
    """Return whether calling a model with a batch gives that loss: its `forward` is Ultralytics' own."""
    return not _is_own(model, "forward")


def _is_own(model: Any, name: str) -> bool:
    return name in vars(model) or getattr(type(model), name).__module__ != _MODELS


def _is_stock(criterion: Any) -> bool:
    """Return whether a criterion is Ultralytics' own, and so is everything that it calls."""
    if type(criterion).__module__ != _LOSSES:
        return False
    for part in vars(criterion).values():
        module = getattr(part, "__module__", None) or type(part).__module__
        if callable(part) and module != _LOSSES and module.partition(".")[0] not in ("torch", "ultralytics"):
            return False
        if module == _LOSSES and not isinstance(part, type) and not _is_stock(part):
            return False
    return True


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
        self.draw: Any = None
        """State of `random` from which all parts of the batch at hand draw the same size; None if they draw none."""
        self.is_preprocessed = False
        """True if the batch at hand has been through `preprocess`."""
        self.facts: dict[str, TensorFacts | str] = {}
        """Key → facts of the batch after preprocessing, as far as its parts tell them; see `LogicalBatch.describe`."""

    def splits(self, batch: Mapping[str, Any]) -> bool:
        """Return whether every value of a batch has an entry for each image, or for each object of an image."""
        images, image_of = batch.get("img"), batch.get("batch_idx")
        if not isinstance(images, Tensor) or not isinstance(image_of, Tensor) or images.ndim != 4 or image_of.ndim != 1:
            return False
        if len(image_of) and not 0 <= int(image_of.min()) <= int(image_of.max()) < len(images):
            return False
        for key, value in batch.items():
            has_entries = value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, (list, tuple))
            if not has_entries or len(value) != len(image_of if key in (*self._objects, "batch_idx") else images):
                return False
        return True

    def workload(self, batch: Mapping[str, Any]) -> Workload:
        """Return the properties of a batch on the host, see `mas.Task`."""
        images: Tensor = batch["img"]
        self._images = len(images)
        self._rows = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        self.draw = random.getstate() if self._multi_scale and not self.is_preprocessed else None
        if self.draw is not None:
            # A user's own preprocessing may look at more than images, and write on it.
            one = {key: _copy(value) for key, value in self.part(batch, 0, 1).items() if key != BOXES}
            try:
                images = self.preprocess(one)["img"]
            except BaseException:
                random.setstate(self.draw)
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
        if self._ascending:  # as Ultralytics collates: a slice stays in pinned memory
            first, last = torch.searchsorted(image_of, image_of.new_tensor([start, stop])).tolist()
            mine = slice(first, last)
        part = {key: value[mine] if key in self._objects else value[start:stop] for key, value in batch.items()}
        return {**part, "batch_idx": image_of[mine] - start, BOXES: self._boxes[start:stop]}

    def loss(self, model: nn.Module, part: dict[str, Any]) -> Loss:
        """Preprocess a part and run the model's loss on it, see `mas.Task`."""
        boxes, part = part[BOXES], {key: value for key, value in part.items() if key != BOXES}
        if not self.is_preprocessed:
            given = dict(part)
            rows = {key: len(value) for key, value in part.items() if isinstance(value, Tensor) and value.ndim}
            with drawing_from(self.draw):
                part = self.preprocess(part)
            self._learn_facts(part, given, rows)
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

    def _learn_facts(self, part: Mapping[str, Any], given: Mapping[str, Any], rows: Mapping[str, int]) -> None:
        """Note what a part is after preprocessing; tensors whose rows it changed tell nothing of the batch."""
        self.facts = {}
        for key, value in part.items():
            self.facts[key] = UNKNOWN
            if isinstance(value, Tensor):
                if value.ndim and rows.get(key) == len(value) and key in self._rows:
                    shape = torch.Size((self._rows[key], *value.shape[1:]))
                    self.facts[key] = TensorFacts(shape, value.dtype, value.device)
            elif value is given.get(key):
                self.facts[key] = SAME


@contextmanager
def drawing_from(state: Any) -> Iterator[None]:
    """Draw from `random` in this state, and leave the generator as it was.

    Args:
        state: See `random.setstate`; None for the state there is.
    """
    if state is None:
        yield
        return
    now = random.getstate()
    random.setstate(state)
    try:
        yield
    finally:
        random.setstate(now)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
