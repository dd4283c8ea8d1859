"""One place of Ultralytics, and how a function of this package comes to stand there. `seams.py` lists the places."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from yolov12.errors import SeamError

__all__ = ["PINNED", "Seam", "around", "changed", "find", "replace"]

PINNED = "8.4.190"
"""Ultralytics release that the seams are made for and tested with."""

_MARK = "__yolov12_seam__"  # attribute of a function that replaces a function of Ultralytics


@dataclass(frozen=True)
class Seam:
    """One row of the table."""

    reference: str
    """Function of this package, as `module:name` below `yolov12`."""
    once: bool = False  # True if the function is called when the module is joined, not when the place is called

    def target(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, _, name = self.reference.partition(":")
        return getattr(importlib.import_module(f"yolov12.{module}"), name)  # type: ignore[no-any-return]

    def replace(self, stock: Any) -> Any:
        """Return the replacement of Ultralytics' function or value."""
        if self.once:
            return self.target()(stock)

        @functools.wraps(stock)  # sets module and name as well: pickle stores a function by these
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self.target()(stock, *args, **kwargs)

        return wrapper


around, changed = Seam, functools.partial(Seam, once=True)


def find(module: ModuleType, path: str) -> tuple[Any, str]:
    """Return the module or class that a place is in, and the name of the attribute.

    Raises:
        SeamError: There is no such place.
    """
    *parents, attribute = path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent, None)
    if not hasattr(owner, attribute):
        raise SeamError(
            f"ultralytics has no {module.__name__}.{path}, which yolov12 patches: install ultralytics=={PINNED}, "
            "or set YOLOV12_AUTOPATCH=0 to use Ultralytics unpatched"
        )
    return owner, attribute


def replace(module: ModuleType, path: str, row: Seam) -> None:
    """Put the function or value of a row at its place, unless it is there already.

    Args:
        module: Module of Ultralytics.
        path: Place in it: an attribute, or `Class.attribute`.
        row: What comes there.

    Raises:
        SeamError: There is no such place.
    """
    owner, attribute = find(module, path)
    old = getattr(owner, attribute)
    if getattr(old, _MARK, False):
        return
    new = row.replace(old)
    if callable(new):
        setattr(new, _MARK, True)
    setattr(owner, attribute, new)
    if owner is module and new is not old:
        _rebind(old, new)


def _rebind(old: Any, new: Any) -> None:
    # If `apply()` is called after `import ultralytics`, other modules have imported the old value by its name.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ultralytics":
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)
