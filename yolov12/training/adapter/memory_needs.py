"""Memory facts of a trainer that the engine cannot see: the first update's state, and settings that save memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from yolov12.mas.step.first_update import Undo, copy_on_host
from yolov12.models.optimizer_state import OPTIMIZERS, optimizer_state

__all__ = ["optimizer_bytes", "remember", "ways_out"]


def remember(trainer: Any) -> Undo:
    """Copy the gradient scaler and the moving average of a trainer, which its optimizer step changes.

    Args:
        trainer: Ultralytics trainer.

    Returns:
        A function that restores them.
    """
    scaler = copy.deepcopy(trainer.scaler)
    ema = trainer.ema
    updates = ema.updates if ema else 0
    values = copy_on_host(list(ema.ema.state_dict().values()) if ema else [])

    def undo() -> None:
        trainer.scaler = scaler
        if ema:
            ema.updates = updates
        values()

    return undo


def optimizer_bytes(optimizer: Optimizer, model: nn.Module) -> int:
    """Return the bytes of state that the optimizer's first update will allocate.

    Args:
        optimizer: Optimizer of the model's parameters.
        model: Model that is trained.

    Returns:
        0 after the first update, or if the kind of optimizer is not known.
    """
    name = type(optimizer).__name__
    if optimizer.state or name not in OPTIMIZERS:
        return 0
    return optimizer_state(model, name)[1]


def ways_out(trainer: Any, fraction: float) -> Sequence[str]:
    """Return the arguments that the user could set so that a run fits, cheapest first.

    Args:
        trainer: Ultralytics trainer.
        fraction: Fraction of one image's activations that would fit.
    """
    size = int(trainer.args.imgsz * math.sqrt(fraction)) // trainer.stride * trainer.stride
    smaller = [f"imgsz={size}"] if trainer.stride <= size < trainer.args.imgsz else []
    amp = [] if trainer.amp or trainer.device.type == "cpu" else ["amp=True"]
    return [*amp, *smaller]
