"""Which activation follows which BatchNorm in an Ultralytics model."""

from __future__ import annotations

from torch import nn
from ultralytics.nn.modules import Conv

__all__ = ["activations"]


def activations(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """BatchNorm → the activation that is applied to its output, which nothing else uses."""
    blocks = [part for part in model.modules() if isinstance(part, Conv) and type(part).forward is Conv.forward]
    # `fuse()` takes the BatchNorm away and gives the block another forward pass.
    return {block.bn: block.act for block in blocks if "forward" not in vars(block) and hasattr(block, "bn")}
