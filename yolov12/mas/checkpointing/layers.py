"""The layers that a checkpoint plan may name, and their names.

Candidates are the outermost layers of a model and the blocks inside them, down to two levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from torch import nn

from yolov12.errors import ConfigError

__all__ = ["candidates", "outermost"]

# Depth of blocks below an outermost layer. Deeper layers are too small to matter.
_DEPTH = 2


def candidates(
    model: nn.Module, names: Mapping[str, nn.Module] | None = None, disabled: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Return the layers that a plan may name, in the order of definition, outer layers before the layers inside.

    Args:
        model: A model.
        names: Name → outermost layer. By default the children of the model; if it has a single child, the children of
            that child.
        disabled: Layers that always keep everything, together with all layers inside and around them. Each entry is a
            name of an outermost layer, such a name and a path inside it (`backbone.4.m.0`), or a module's full path in
            the model.

    Returns:
        Name → layer.

    Raises:
        ConfigError: `disabled` names a layer that does not exist.
    """
    top = dict(_outermost(model) if names is None else names)
    found: dict[str, nn.Module] = {}
    for name, layer in top.items():
        found |= {name: layer, **_blocks(name, layer, _DEPTH)}
    off = {id(part) for name in disabled for part in _find(name, model, top).modules()}
    # A layer around a disabled layer would run it again, so it is left out as well.
    return {name: layer for name, layer in found.items() if not off & {id(part) for part in _own(layer)}}


def outermost(layers: Iterable[str]) -> list[str]:
    """Return the names that are not inside another named layer.

    Args:
        layers: Names with dots, such as `backbone.4.m.0`.
    """
    names = list(layers)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _own(layer: nn.Module) -> list[nn.Module]:
    return [part for part in layer.modules() if list(part.parameters()) or part is layer]


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    children = dict(model.named_children())
    inner = {name: child for name, child in children.items() if list(child.children())}
    if len(inner) == 1 and len(children) == 1:
        return _outermost(next(iter(inner.values()))) or children
    return _called_children(children)


def _blocks(prefix: str, layer: nn.Module, depth: int) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, child in _called_children(dict(layer.named_children())).items():
        if depth and list(child.children()):
            found |= {f"{prefix}.{name}": child, **_blocks(f"{prefix}.{name}", child, depth - 1)}
    return found


def _called_children(children: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the children that are called: a `ModuleList` is not called, its members are."""
    found: dict[str, nn.Module] = {}
    for name, child in children.items():
        if isinstance(child, nn.ModuleList):
            found |= _called_children({f"{name}.{index}": part for index, part in enumerate(child)})
        elif type(child).forward is not nn.Module.forward:
            found[name] = child
    return found


def _find(name: str, model: nn.Module, top: Mapping[str, nn.Module]) -> nn.Module:
    for outer, layer in top.items():
        if name == outer:
            return layer
        if name.startswith(f"{outer}."):
            inside: dict[str, nn.Module] = dict(layer.named_modules())
            if (rest := name.removeprefix(f"{outer}.")) in inside:
                return inside[rest]
    paths: dict[str, nn.Module] = dict(model.named_modules())
    if name and name in paths:
        return paths[name]
    near = get_close_matches(name, [*top, *paths], n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Layers are {', '.join(top)}"
    raise ConfigError(f"disable_mas_layers: there is no layer '{name}'. {hint}")
