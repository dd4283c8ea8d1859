"""Memory of a trainer that the engine cannot see: what its first update makes and changes, and what can shrink."""

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
    """Copy what an optimizer step changes besides parameters and optimizer; return what puts it back."""
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
    """Return the bytes that the optimizer's first update will allocate; 0 after it, or if it is not known."""
    name = type(optimizer).__name__
    if optimizer.state or name not in OPTIMIZERS:
        return 0
    return optimizer_state(model, name)[1]


def ways_out(trainer: Any, fraction: float) -> Sequence[str]:
    """Return what the user could set so that a run fits, cheapest first.

    Args:
        trainer: Trainer of Ultralytics.
        fraction: Fraction of one image's activations that would fit.
    """
    size = int(trainer.args.imgsz * math.sqrt(fraction)) // trainer.stride * trainer.stride
    smaller = [f"imgsz={size}"] if trainer.stride <= size < trainer.args.imgsz else []
    amp = [] if trainer.amp or trainer.device.type == "cpu" else ["amp=True"]
    return [*amp, *smaller]
