"""Finds the activation that follows each BatchNorm of an Ultralytics model."""

from __future__ import annotations

from torch import nn
from ultralytics.nn.modules import Conv

from yolov12.mas.modules import module_of

__all__ = ["activations"]


def activations(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Find pairs of a BatchNorm and an activation in which only the activation uses the BatchNorm's output.

    Args:
        model: A model built from Ultralytics' layers.

    Returns:
        BatchNorm → its activation.
    """
    if not module_of(Conv.forward).startswith("ultralytics."):
        return {}
    blocks = [part for part in model.modules() if isinstance(part, Conv) and type(part).forward is Conv.forward]
    # `fuse()` removes the BatchNorm of a block and replaces the block's `forward`.
    return {block.bn: block.act for block in blocks if "forward" not in vars(block) and hasattr(block, "bn")}
