"""Tests of what the engine knows of Ultralytics. It takes over nothing else, in training, validation or prediction."""

from __future__ import annotations

from typing import Any

from torch import nn

from yolov12.training.adapter.users_code import is_ultralytics, module_of

__all__ = ["is_stock", "joins_outputs", "why_not_split"]

_MODULE = "ultralytics.nn.tasks"
_MODELS = ("DetectionModel", "OBBModel", "SegmentationModel", "PoseModel")
# Their outputs have one entry per image as well, but their batches have other labels.
_OTHERS = ("ClassificationModel", "SemanticSegmentationModel", "DepthModel")


def why_not_split(model: nn.Module, args: Any) -> str | None:
    """Return the reason why the batches of a model are not split in training and validation; None if they are.

    Args:
        model: Model without wrappers.
        args: Ultralytics' arguments of the training or validation.
    """
    for name in ("compile", "distill_model"):
        if getattr(args, name, None):
            return f"{name} is set"
    return None if _is_one_of(model, _MODELS) else f"{type(model).__name__} is not split up"


def joins_outputs(model: nn.Module) -> bool:
    """Return whether outputs of a model on parts of a batch can be joined to those of the batch."""
    return _is_one_of(model, _MODELS + _OTHERS)


def is_stock(owner: Any, name: str) -> bool:
    """Return whether a method is Ultralytics' own: in every class that defines it, and not set on the object.

    What this package puts around such a method, see `seams`, does not count.
    """
    methods = [_without_seam(vars(kind)[name]) for kind in type(owner).__mro__ if name in vars(kind)]
    return name not in vars(owner) and all(map(is_ultralytics, methods))


def _without_seam(method: Any) -> Any:
    return getattr(method, "__wrapped__", method) if module_of(method).startswith("yolov12.") else method


def _is_one_of(model: nn.Module, names: tuple[str, ...]) -> bool:
    return type(model).__module__ == _MODULE and type(model).__name__ in names
