"""Nested containers of tensors: batches, and what layers are given and give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["each_tensor"]

_PLAIN = frozenset((str, int, float, bool, type(None)))
"""What batches have the most of, and what is not looked into."""


def each_tensor(nest: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Change all tensors, or other leaves of a kind, in nested tuples, lists and dictionaries."""
    if isinstance(nest, kind):
        return change(nest)
    if type(nest) in _PLAIN:
        return nest
    if type(nest) in (list, tuple):
        return type(nest)([each_tensor(value, change, kind) for value in nest])
    if isinstance(nest, Mapping):
        return {key: each_tensor(value, change, kind) for key, value in nest.items()}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(each_tensor(value, change, kind) for value in nest))
    return nest
