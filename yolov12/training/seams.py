"""Functions around Ultralytics' validator and predictor, with the signatures of those they stand around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from yolov12.training.adapter import prediction, validation

__all__ = ["inference", "validate"]


def validate(
    stock: Callable[..., Any], validator: Any, /, trainer: Any = None, model: Any = None, **kwargs: Any
) -> Any:
    """Run Ultralytics' `BaseValidator.__call__` in slices that fit into memory.

    Args:
        stock: Ultralytics' own method.
        validator: Ultralytics' validator.
        trainer: Trainer whose model is validated, or None.
        model: Model that is validated without a trainer.
        kwargs: Keyword arguments for `stock`.

    Returns:
        What Ultralytics returns: the metrics.
    """
    return validation.validate(stock, validator, trainer, model, **kwargs)


def inference(stock: Callable[..., Any], predictor: Any, /, im: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `BasePredictor.inference` in slices that fit into memory.

    Args:
        stock: Ultralytics' own method.
        predictor: Ultralytics' predictor.
        im: Batch of images, (images, channels, height, width), on the device.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.

    Returns:
        Outputs of the model for the whole batch.
    """
    return prediction.predict(stock, predictor, im, *args, **kwargs)
