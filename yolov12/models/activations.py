"""Activations of an Ultralytics model: those that follow a BatchNorm, and those that models share."""

from __future__ import annotations

import copy

from torch import nn
from ultralytics.nn.modules import Conv

from yolov12.mas.modules import module_of

__all__ = ["activations", "unshare"]


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


def unshare(model: nn.Module) -> None:
    """Give a model activations of its own, as a copy or a loaded model has them.

    Ultralytics builds all models of a process with one activation, an attribute of the class of their layers. The
    engine changes the activations of its model for a while, which a training in another thread would see.

    Args:
        model: A model built from Ultralytics' layers.
    """
    own: dict[nn.Module, nn.Module] = {}
    for block in model.modules():
        shared = getattr(type(block), "default_act", None)
        if not isinstance(shared, nn.Module):
            continue
        for name, part in block._modules.items():
            if part is shared:
                # Hooks stay those that the user has attached or will attach, as their dictionaries are shared.
                block._modules[name] = own.setdefault(shared, copy.copy(shared))
