"""Concatenations between the layers of a detection model, without copies where the engine runs the layers.

A layer whose output is concatenated later writes it there at once. If other layers read it, too, it writes it twice:
convolutions want their input dense.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["predict_once"]


def predict_once(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `BaseModel._predict_once` that gives layers a place in the concatenations after them.

    Args:
        stock: Ultralytics' own method.
    """

    @functools.wraps(stock)
    def run(self: Any, x: Tensor, profile: bool = False, embed: Any = None) -> Any:
        # A compiler cannot trace what follows, and the engine runs no compiled model.
        if profile or embed or torch.compiler.is_compiling():
            return stock(self, x, profile, embed)
        places = _places(self.model)
        return _run(self.model, self.save, places, x) if places else stock(self, x, profile, embed)

    return run


def _run(layers: Any, saved: Sequence[int], places: dict[int, tuple[int, int, int]], x: Any) -> Any:
    """Run all layers.

    Args:
        layers: The layers. `f` says which outputs a layer gets.
        saved: Layers whose output is needed later.
        places: Layer → the concatenation that it is a part of, its first channel there, and the channels of all.
        x: Images.

    Returns:
        The output of the last layer.
    """
    from yolov12.models.blocks import new_join, part

    outs: list[Any] = []
    joins: dict[int, Any] = {}
    read = _reads(layers)
    for index, layer in enumerate(layers):
        sources = [layer.f] if isinstance(layer.f, int) else layer.f
        given = [x if source == -1 else outs[source] for source in sources]
        join = joins.pop(index, None)
        if join is not None and join.is_complete():
            x = join.result()
        elif index in places and isinstance(layer.f, int):
            target, start, channels = places[index]
            joins.setdefault(target, new_join(channels))  # no variable may hold it: its parts would stay in memory
            x = part(layer, given[0], joins[target].slot(start), None if read[index] == [target] else 0)
        else:
            x = layer(given[0] if isinstance(layer.f, int) else given)
        outs.append(x if layer.i in saved else None)
    return x


def _reads(layers: Any) -> list[list[int]]:
    """Return which layers read the output of each layer."""
    found: list[list[int]] = [[] for _ in layers]
    for index, layer in enumerate(layers):
        for source in [layer.f] if isinstance(layer.f, int) else layer.f:
            if (at := index + source if source < 0 else source) >= 0:
                found[at].append(index)
    return found


def _places(layers: Any) -> dict[int, tuple[int, int, int]]:
    """Return the layers that can write to a concatenation: the concatenation, their first channel, and all channels."""
    from yolov12.models.blocks import joins

    if not isinstance(layers, nn.Sequential) or not any(joins(layer) for layer in layers):
        return {}
    found: dict[int, tuple[int, int, int]] = {}
    widths: list[int | None] = []
    for index, layer in enumerate(layers):
        sources = [layer.f] if isinstance(layer.f, int) else layer.f
        sources = [index + source if source < 0 else source for source in sources]
        width = _width(layer)
        if isinstance(layer, nn.Upsample):
            width = widths[sources[0]] if sources[0] >= 0 else None
        if _is_concatenation(layer):
            parts = [widths[source] for source in sources]
            width = None if None in parts else sum(filter(None, parts))
            if width is not None and not found.keys() & set(sources) and len(set(sources)) == len(sources):
                starts = [sum(filter(None, parts[:number])) for number in range(len(parts))]
                found |= {source: (index, start, width) for source, start in zip(sources, starts, strict=True)}
        widths.append(width)
    return found


def _is_concatenation(layer: Any) -> bool:
    from ultralytics.nn.modules.conv import Concat

    from yolov12.models.blocks import is_code_of

    is_stock = type(layer) is Concat and is_code_of("ultralytics.", Concat.forward)
    return is_stock and layer.d == 1 and "forward" not in vars(layer)


def _width(layer: Any) -> int | None:
    """Return the number of channels that a layer gives; None if that is not known."""
    last = layer if type(layer).__name__ == "Conv" else getattr(layer, "cv2", None)
    is_known = type(layer).__name__ in ("Conv", "A2C2f", "C2f", "C3k2")
    conv = getattr(last, "conv", None) if is_known else None
    return conv.out_channels if isinstance(conv, nn.Conv2d) else None
