"""Prediction in slices that fit into memory, and what it shares with validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from yolov12.mas import Config
from yolov12.mas.inference import Slices
from yolov12.mas.memory.meter import meter_for
from yolov12.training.adapter.known import joins_outputs
from yolov12.training.adapter.users_code import has_own_layers

__all__ = ["SLICES", "joined", "predict", "settings_of", "slices_of", "tell_once"]

SLICES = "_yolov12_slices"
"""Attribute of validators and predictors: their `Slices`, as the next call uses what was learned."""
_FEATURES = "_feats"
"""Attribute of predictors: what the head got in the latest forward pass, from which trackers know objects again."""
_TOLD = "_yolov12_told"  # attribute of validators and predictors: what the log last said of them


def predict(stock: Callable[..., Any], predictor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' inference on a batch of images in slices that fit into memory.

    Hooks and layers of the user's own may keep what they see, so they get the whole batch if it may fit.

    Args:
        stock: Ultralytics' own method.
        predictor: Ultralytics predictor.
        images: Images on the device, (images, channels, height, width).
        args: Positional arguments for `stock`, which may belong to the whole batch.
        kwargs: Keyword arguments for `stock`, like `args`.

    Returns:
        Outputs of the model for the whole batch.

    Raises:
        DoesNotFitError: Not even one image fits into memory.
    """
    settings, model = predictor.args, predictor.model
    splits = (
        getattr(settings, "mas", False)
        and isinstance(images, Tensor)
        and images.ndim == 4
        and (len(images) > 1 or settings.mem_limit is not None)
        and not (args or kwargs or settings.embed or settings.visualize)
        and getattr(model, "format", None) == "pt"
        and joins_outputs(model.model)
    )
    slices = slices_of(predictor, images.device) if splits else None
    if slices is None:
        return stock(predictor, images, *args, **kwargs)
    count, _, height, width = images.shape

    def work(start: int, stop: int) -> tuple[Any, Any]:
        return stock(predictor, images[start:stop]), getattr(predictor, _FEATURES, None)

    with slices.meter.limited():
        found, features = joined(slices.run(count, height, width, work, lambda: has_own_layers(model.model)))
    if features is not None:
        setattr(predictor, _FEATURES, features)
    if slices.over_limit:
        tell_once(predictor, f"memory: prediction {slices.over_limit}")
    return found


def settings_of(owner: Any) -> dict[str, Any]:
    """Return the settings of a validator or predictor for `Config`."""
    return {**vars(owner.args), "bn_group": None}  # nothing is trained


def slices_of(owner: Any, device: torch.device) -> Slices | None:
    """Return the slices of a validator or predictor; None on a device whose memory cannot be read."""
    if device.type not in ("cuda", "cpu"):
        return None
    if not hasattr(owner, SLICES):
        config = Config.parse(settings_of(owner))
        setattr(owner, SLICES, Slices(config, meter_for(device, config.limit, config.safety_ratio)))
    slices: Slices = getattr(owner, SLICES)
    return slices


def tell_once(owner: Any, line: str) -> None:
    """Log a line about a validator or predictor, unless it was the last one."""
    if getattr(owner, _TOLD, "") != line:
        setattr(owner, _TOLD, line)
        LOGGER.info(line)


def joined(parts: list[Any]) -> Any:
    """Join the outputs of a model on parts of a batch."""
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(joined(list(each)) for each in zip(*parts, strict=True))
    return first
