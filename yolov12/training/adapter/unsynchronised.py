"""Runs Ultralytics' detection loss without synchronisation with the device, where everything that it calls is stock.

The loss itself is `models.detection_loss`. It replaces functions of Ultralytics, so it only runs if their source is the
one that it was made for: a function that a user has replaced or edited runs as it is.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from yolov12.models.assigner import in_slices
from yolov12.models.candidates import Labels
from yolov12.models.detection_loss import detection_loss, levels_of
from yolov12.training.adapter.users_code import module_of

__all__ = ["Given", "expects_kernels", "labels_of", "replaces", "running"]

_LOSS, _ASSIGNER = "ultralytics.utils.loss", "ultralytics.utils.tal"
_REPLACED = {
    _LOSS: {
        "": ("make_anchors", "xywh2xyxy", "bbox_iou", "bbox2dist", "dist2bbox"),
        "v8DetectionLoss": (
            *("preprocess", "bbox_decode", "get_assigned_targets_and_loss", "parse_output", "__call__", "loss"),
        ),
        "BboxLoss": ("forward",),
        "DFLoss": ("__call__",),
    },
    _ASSIGNER: {
        "": ("xyxy2xywh", "xywh2xyxy", "bbox_iou"),
        "TaskAlignedAssigner": (
            *("forward", "_forward", "get_pos_mask", "get_box_metrics", "pair_overlaps", "iou_calculation"),
            *("select_topk_candidates", "get_targets", "select_candidates_in_gts", "select_highest_overlaps"),
        ),
    },
}
"""Module → class ("" for functions of the module) → functions that the loss replaces or whose arguments it knows."""
_SOURCE = "de96b08970421345edec0a26fc9e61a695a3e16d7d74f4c05cd51f9fe4234344"
"""SHA-256 of their source in the pinned release."""


class Given:
    """Labels of a part on the host, and their copies that the model was given.

    Args:
        labels: Labels on the host; None if they are elsewhere.
        part: The part on the device, before any code of the user's.
    """

    _KEYS = ("batch_idx", "cls", "bboxes")

    def __init__(self, labels: Labels | None, part: Mapping[str, Any]) -> None:
        self._labels, self._copies = labels, tuple(part.get(key) for key in self._KEYS)
        self._versions = self._versions_now()

    @property
    def is_on_host(self) -> bool:
        """Whether labels are on the host."""
        return self._labels is not None

    def labels(self, batch: Mapping[str, Any]) -> Labels | None:
        """Return the labels on the host; None if the loss gets a batch with others."""
        same = all(batch.get(key) is copy for key, copy in zip(self._KEYS, self._copies, strict=True))
        return self._labels if same and self._versions == self._versions_now() else None

    def _versions_now(self) -> list[int]:
        return [copy._version if isinstance(copy, Tensor) and not copy.is_inference() else -1 for copy in self._copies]


def labels_of(part: Mapping[str, Any]) -> Labels | None:
    """Return the labels of a part on the host; None if they are not there, or have another form than Ultralytics'."""
    image_of, boxes, classes = (part.get(key) for key in ("batch_idx", "bboxes", "cls"))
    tensors = isinstance(image_of, Tensor) and isinstance(boxes, Tensor) and isinstance(classes, Tensor)
    if not tensors or not image_of.device.type == boxes.device.type == classes.device.type == "cpu":  # type: ignore[union-attr]
        return None
    fits = boxes.shape == (len(image_of), 4) and classes.numel() == len(image_of)  # type: ignore[union-attr,arg-type]
    is_known = fits and boxes.dtype == torch.get_default_dtype()  # type: ignore[union-attr]
    return Labels(image_of, boxes, classes) if is_known else None  # type: ignore[arg-type]


def replaces(criterion: Any) -> bool:
    """Return whether the loss of a criterion can run without synchronisation: it is Ultralytics' own, without hooks.

    Args:
        criterion: Criterion whose methods and those of its parts are Ultralytics' own.
    """
    loss, tal = sys.modules.get(_LOSS), sys.modules.get(_ASSIGNER)
    if loss is None or tal is None or type(criterion) is not loss.v8DetectionLoss:
        return False
    assigner, bce = criterion.assigner, criterion.bce
    modules = assigner, bce, criterion.bbox_loss
    return (
        type(assigner) is tal.TaskAlignedAssigner
        and type(criterion.bbox_loss) is loss.BboxLoss
        and type(criterion.bbox_loss.dfl_loss) is loss.DFLoss
        and type(bce) is nn.BCEWithLogitsLoss
        and bce.weight is bce.pos_weight is criterion.class_weights is None
        and bce.reduction == "none"
        and criterion.use_dfl
        and assigner.topk == assigner.topk2
        and not any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in modules)
        and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        and not any(map(_has_own_functions, (criterion, *modules)))
        and _is_pinned(tuple(_functions(loss, tal)))
    )


def expects_kernels(criterion: Any, given: Given) -> bool:
    """Return whether the loss is going to run without synchronisation, as far as that is known before the model runs.

    Its kernels read predictions in Ultralytics' layout, (images, channels, anchors).

    Args:
        criterion: Criterion whose methods and those of its parts are Ultralytics' own.
        given: What the model is given.
    """
    return given.is_on_host and replaces(criterion) and _waits(criterion.device)


@contextmanager
def running(criterion: Any, given: Given | None) -> Iterator[list[Tensor]]:
    """Run a criterion's loss without synchronisation if that is known to give the same, otherwise as it is.

    Args:
        criterion: Criterion of Ultralytics' with one normaliser.
        given: What the model is given; None if the labels are not on the host.

    Yields:
        A list. Each call of the loss appends its sum of target scores, a scalar tensor.
    """
    if given is None or not replaces(criterion):
        with in_slices(criterion.assigner) as sums:
            yield sums
        return
    sums, stock = [], criterion.loss

    def loss(predictions: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        labels = given.labels(batch)
        # A kernel cannot raise an error, as Ultralytics' loss does for a class that the model does not have.
        if labels is None or not labels.has_classes_of(criterion.nc) or not _is_due(criterion, predictions):
            with in_slices(criterion.assigner) as found:
                result: tuple[Tensor, dict[str, Tensor]] = stock(predictions, batch)
            sums.extend(found)
            return result
        value, items, total = detection_loss(criterion, predictions, labels, batch["cls"])
        sums.append(total)
        return value, items

    vars(criterion)["loss"] = loss
    try:
        yield sums
    finally:
        del vars(criterion)["loss"]


def _is_due(criterion: Any, predictions: Mapping[str, Any]) -> bool:
    """Return whether there is a device to wait for, and its points of anchors are those that the host computes."""
    is_exact = levels_of(criterion, predictions).is_exact(predictions["feats"][0].dtype)
    return is_exact and _waits(predictions["scores"].device)


def _waits(device: torch.device) -> bool:
    return device.type == "cuda"


def _has_own_functions(part: Any) -> bool:
    return any(callable(value) and not isinstance(value, (nn.Module, Tensor)) for value in vars(part).values())


def _functions(*modules: Any) -> Iterator[Any]:
    for module, kinds in zip(modules, _REPLACED.values(), strict=True):
        for kind, names in kinds.items():
            owner = getattr(module, kind) if kind else module
            for name in names:
                yield getattr(owner, name)


@functools.lru_cache(maxsize=8)
def _is_pinned(functions: tuple[Any, ...]) -> bool:
    return _digest(functions) == _SOURCE


def _digest(functions: tuple[Any, ...]) -> str:
    found = hashlib.sha256()
    for function in functions:
        try:
            if module_of(function) == "torch.utils._contextlib":  # of `torch.no_grad()`
                function = function.__wrapped__
            found.update(inspect.getsource(function.__code__).encode())
        except (AttributeError, OSError):
            return ""
    return found.hexdigest()
