"""Names of the layers of an Ultralytics model, as used in `disable_mas_layers`, checkpoint plans and journals."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["layer_names"]


def layer_names(model: Any) -> dict[str, nn.Module]:
    """Name the layers of a model.

    The layers of the yaml's `backbone` are `backbone.0`, `backbone.1` and so on. The layers of the yaml's `head` are
    `neck.0`, `neck.1` and so on, except the last one, which is `head`.

    Args:
        model: A model of Ultralytics with its yaml.

    Returns:
        Name → layer, in the order of the model.
    """
    layers = list(model.model)
    backbone = len(model.yaml["backbone"])
    names = [f"backbone.{index}" if index < backbone else f"neck.{index - backbone}" for index in range(len(layers))]
    return dict(zip([*names[:-1], "head"], layers, strict=True))
