"""Adapter between the engine and Ultralytics' detection, segmentation and pose trainings: batches and losses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from yolov12.errors import ConfigError
from yolov12.mas.batchnorm.ungrouped import is_plain
from yolov12.mas.task import Loss, Workload
from yolov12.models.predictions import anchors_first
from yolov12.training.adapter.batch_values import Belongs, Nest, Values, entries, is_nest
from yolov12.training.adapter.deferred_tensor import TensorFacts
from yolov12.training.adapter.images import half_type, scaled
from yolov12.training.adapter.logical_batch import SAME, UNKNOWN
from yolov12.training.adapter.loss_terms import has_one_normaliser, has_terms, loss_of_terms
from yolov12.training.adapter.unsynchronised import Given, expects_kernels, labels_of, running
from yolov12.training.adapter.users_code import forward_of, module_of
from yolov12.training.data.device_rendering import PackedTensor
from yolov12.training.data.packing import PackedImages

__all__ = ["BOXES", "DetectionTask", "criterion_of", "drawing_from", "is_exact", "knows_call", "knows_loss"]
__all__ += ["note_on_split"]

BOXES = "yolov12_boxes"
"""Key of a part: list of the number of boxes in each image, on the host."""
_LABELS = "yolov12_labels"
"""Key of a part: its labels on the host, see `unsynchronised.labels_of`."""

# Ultralytics' own values with an entry for each object.
_OBJECTS = ("cls", "bboxes", "keypoints", "segments", "obb")
# Ultralytics' own values that no loss reads, and that code which adds images may have left as they were.
_UNREAD = ("im_file", "ori_shape", "resized_shape", "ratio_pad")
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
    return module_of(forward_of(model)) == _MODELS


def _is_own(model: Any, name: str) -> bool:
    return name in vars(model) or module_of(getattr(model, name)) != _MODELS


def _has_own_methods(kind: type) -> bool:
    """Return whether no method of one of Ultralytics' classes was replaced."""
    methods = [value for value in vars(kind).values() if isinstance(value, (FunctionType, staticmethod, classmethod))]
    own = (module_of(method).startswith(("ultralytics.", "torch.")) for method in methods)
    return kind.__module__ != _LOSSES or all(own)


def _is_stock(criterion: Any) -> bool:
    """Return whether a criterion is Ultralytics' own, and so is everything that it calls."""
    if type(criterion).__module__ != _LOSSES or not all(map(_has_own_methods, type(criterion).__mro__)):
        return False
    for part in vars(criterion).values():
        module = module_of(part)
        if callable(part) and module != _LOSSES and module.partition(".")[0] not in ("torch", "ultralytics"):
            return False
        if module == _LOSSES and not isinstance(part, type) and not _is_stock(part):
            return False
    return True


def note_on_split(model: nn.Module, *, exact: bool) -> str:
    """Return what the log says of the loss of a batch that is split; empty if there is nothing to say.

    Args:
        model: Model whose loss is known, see `knows_loss`.
        exact: Argument of the training.
    """
    criterion = criterion_of(model)
    if has_one_normaliser(criterion):
        return ""
    if exact and has_terms(criterion):
        return (
            "memory: this loss has several normalisers: a batch that is split runs its forward pass twice; with "
            "exact=False once, and its parts are weighted by images"
        )
    return "memory: parts of a batch are weighted by images, as this loss is not divided by one sum"


def is_exact(model: nn.Module, exact: bool) -> bool:
    """Return whether the gradient of a batch does not depend on how it is split into BatchNorm groups.

    Args:
        model: Model that was trained.
        exact: Argument of the training.
    """
    if not (knows_call(model) and knows_loss(model)):
        return False
    criterion, norms = criterion_of(model), [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    return (has_one_normaliser(criterion) or (exact and has_terms(criterion))) and all(map(is_plain, norms))


class DetectionTask:
    """Implements `mas.Task` for Ultralytics' trainings with boxes.

    The losses of detection and oriented boxes are numerators over one sum S of target scores, clamped at 1, times the
    number of images. S is read from the assigner's output. Masks, keypoints and the two heads of an end-to-end model
    have further normalisers, see `loss_terms`.

    Args:
        preprocess: Ultralytics' `trainer.preprocess_batch`, which scales pixels and, for `multi_scale`, draws an image
            size.
        multi_scale: True if `preprocess` draws a size.
        overlapping_masks: True if masks have one entry per image rather than one per object.
        only_scales: True if `preprocess` is Ultralytics' own, so that without `multi_scale` it only scales pixels.
    """

    floor = 1.0
    """Smallest normaliser, as Ultralytics' losses clamp theirs at 1."""

    def __init__(
        self,
        preprocess: Callable[[Any], Any],
        *,
        multi_scale: bool,
        overlapping_masks: bool,
        only_scales: bool = False,
    ) -> None:
        self.preprocess, self._multi_scale = preprocess, multi_scale
        self._only_scales = only_scales and not multi_scale
        self._values = Values(_OBJECTS if overlapping_masks else (*_OBJECTS, "masks"))
        self._belongs: dict[str, Belongs] = {}  # what each value of the current batch belongs to
        self._images = 0  # number of images in the current batch
        self._boxes: list[int] = []  # number of boxes in each of its images
        self._rows: dict[str, int] = {}  # number of rows in each of its tensors
        self._image_of = torch.empty(0)  # index of the image of each of its objects, on the host
        self._ascending = False
        self.draw: Any = None
        """State of `random` from which all parts of the batch at hand draw the same size; None if they draw none."""
        self.is_preprocessed = False
        """True if the batch at hand has been through `preprocess`."""
        self.facts: dict[str, TensorFacts | str] = {}
        """Key → facts of the batch after preprocessing, as far as its parts tell them; see `LogicalBatch.describe`."""

    def may_replay(self, model: nn.Module) -> bool:
        """Return whether the loss is Ultralytics' own, which neither keeps nor changes what the network returns."""
        return knows_call(model) and knows_loss(model)

    def splits(self, batch: Mapping[str, Any]) -> bool:
        """Return whether a batch has images, and objects of which it is known to which image they belong."""
        images, image_of = batch.get("img"), batch.get("batch_idx")
        if not isinstance(images, Tensor) or not isinstance(image_of, Tensor) or images.ndim != 4 or image_of.ndim != 1:
            return False
        return not len(image_of) or 0 <= int(image_of.min()) <= int(image_of.max()) < len(images)

    def unknown(self, batch: Mapping[str, Any]) -> str:
        """Return a key of the current batch whose value cannot be split up, with its length; empty if there is none."""
        found = (key for key, each in self._belongs.items() if each is Belongs.UNKNOWN and key not in _UNREAD)
        return next((f"'{key}' ({len(batch[key])} entries)" for key in found), "")

    def workload(self, batch: Mapping[str, Any]) -> Workload:
        """Return the properties of a batch on the host, see `mas.Task`."""
        images: Tensor = batch["img"]
        self._images = len(images)
        self._belongs = self._values.of(batch)
        self._rows = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        self._image_of = image_of = batch["batch_idx"].cpu()
        self._ascending = bool((image_of[1:] >= image_of[:-1]).all())
        self._boxes = torch.bincount(image_of.long(), minlength=self._images).tolist()
        self.draw = random.getstate() if self._multi_scale and not self.is_preprocessed else None
        if self.draw is not None:
            # A user's own preprocessing may look at more than images, and write on it.
            one = {key: _copy(value) for key, value in self.opened(self.part(batch, 0, 1)).items()}
            try:
                images = self.preprocess(one)["img"]
            except BaseException:
                random.setstate(self.draw)
                raise
        return Workload(images.shape[2], images.shape[3], tuple(self._boxes))

    def part(self, batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        """Return images `start` to `stop` of a batch, with their numbers of boxes, see `mas.Task`."""
        part = dict(batch)
        if stop - start < self._images:
            image_of = self._image_of
            mine: slice | Tensor = ((image_of >= start) & (image_of < stop)).nonzero()[:, 0]
            if self._ascending:  # as Ultralytics collates: a slice stays in pinned memory
                first, last = torch.searchsorted(image_of, image_of.new_tensor([start, stop])).tolist()
                mine = slice(first, last)
            places = {Belongs.IMAGES: slice(start, stop), Belongs.OBJECTS: mine}
            for key, belongs in self._belongs.items():
                if belongs in places:
                    part[key] = entries(part[key], places[belongs])
            part["batch_idx"] = part["batch_idx"] - start
        nests: dict[str, Any] = {key: Nest(value) for key, value in part.items() if is_nest(value)}
        if isinstance(part["img"], PackedTensor) and not part["img"].is_rendered:
            nests["img"] = part["img"].packed  # copied to the device as it is
        return {**part, **nests, BOXES: self._boxes[start:stop], _LABELS: labels_of(part)}

    @staticmethod
    def opened(part: Mapping[str, Any]) -> dict[str, Any]:
        """Return a part as an ordinary batch."""
        return {key: _opened(value) for key, value in part.items() if key not in (BOXES, _LABELS)}

    def loss(self, model: nn.Module, part: dict[str, Any]) -> Loss:
        """Preprocess a part and run the model's loss on it, see `mas.Task`."""
        boxes, labels, part = part[BOXES], part[_LABELS], self.opened(part)
        labels_given = Given(labels, part)
        if not self.is_preprocessed:
            given = dict(part)
            rows = {key: len(value) for key, value in part.items() if isinstance(value, Tensor) and value.ndim}
            with drawing_from(self.draw):
                part = self._preprocessed(model, part)
            self._learn_facts(part, given, rows)
            if len(part["img"]) != len(boxes):
                raise ConfigError(
                    f"preprocess_batch made {len(part['img'])} images of {len(boxes)}, and memory does not suffice to "
                    "call it with a whole batch: train with a smaller batch"
                )
        is_stock = knows_call(model) and knows_loss(model)
        with anchors_first(is_stock and not expects_kernels(criterion_of(model), labels_given)):
            return self.measured(model, boxes, lambda: model(part), labels_given)

    def _preprocessed(self, model: nn.Module, part: dict[str, Any]) -> dict[str, Any]:
        images = part["img"]
        is_known = self._only_scales and knows_call(model) and knows_loss(model)
        dtype = half_type(model, images) if is_known else None
        if dtype is None:
            found: dict[str, Any] = self.preprocess(part)
            return found
        return {**self.preprocess({**part, "img": torch.empty(0, device=images.device)}), "img": scaled(images, dtype)}

    def measured(
        self, model: nn.Module, boxes: Sequence[int], run: Callable[[], Any], given: Given | None = None
    ) -> Loss:
        """Run the model's loss on a part, and read its normaliser.

        Args:
            model: Model whose criterion `run` calls.
            boxes: Number of boxes in each image of the part.
            run: Runs the loss; returns it with its items.
            given: Labels that the model is given, if they are on the host.
        """
        criterion = criterion_of(model)
        if has_terms(criterion):
            return loss_of_terms(criterion, run)
        if not has_one_normaliser(criterion):
            loss, items = run()
            return Loss(loss, float(len(boxes)), items, times_images=True)
        with running(criterion, given) as sums:
            loss, items = run()
        return Loss(loss, sums[0], items, times_images=True)

    def _learn_facts(self, part: Mapping[str, Any], given: Mapping[str, Any], rows: Mapping[str, int]) -> None:
        """Note what a part is after preprocessing; tensors whose rows it changed tell nothing of the batch."""
        self.facts = {}
        for key, value in part.items():
            self.facts[key] = UNKNOWN
            if isinstance(value, Tensor):
                if value.ndim and rows.get(key) == len(value) and key in self._rows:
                    shape = torch.Size((self._rows[key], *value.shape[1:]))
                    # Ultralytics' images are fp32, also where the model is given half precision.
                    dtype = torch.float32 if self._only_scales and key == "img" else value.dtype
                    self.facts[key] = TensorFacts(shape, dtype, value.device)
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


def _opened(value: Any) -> Any:
    if isinstance(value, PackedImages):
        return PackedTensor.of(value)
    return value.value if isinstance(value, Nest) else value


def _copy(value: Any) -> Any:
    if isinstance(value, PackedTensor):  # Ultralytics' own preprocessing, which alone gets them, looks at the size
        return torch.zeros(value.shape, dtype=value.dtype)
    return value.clone() if isinstance(value, Tensor) else value
