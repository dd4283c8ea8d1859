"""What the layers of an Ultralytics model are called in `disable_mas_layers`, plans and journals."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["layer_names"]


def layer_names(model: Any) -> dict[str, nn.Module]:
    """Name → layer: `backbone.0` on as in the yaml's `backbone`, `neck.0` on as in its `head`, whose last is `head`."""
    layers = list(model.model)
    backbone = len(model.yaml["backbone"])
    names = [f"backbone.{index}" if index < backbone else f"neck.{index - backbone}" for index in range(len(layers))]
    return dict(zip([*names[:-1], "head"], layers, strict=True))
