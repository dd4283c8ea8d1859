"""Classes of two models or data sets, matched by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeGuard

__all__ = ["counted", "listed", "match", "tells_names"]

_LISTED = 8  # most names in one line of the log


def match(old: Mapping[int, str], new: Mapping[int, str]) -> list[int | None]:
    """Return for each new class the old class of the same name.

    Spaces around a name do not count. Names that differ only in upper and lower case are the same class, unless another
    class has exactly this name. No old class is returned twice.

    Args:
        old: Class id → name.
        new: Class id → name, for the ids from 0.

    Returns:
        For each new class id, an old class id; None for a class that has no counterpart.
    """
    found: dict[int, int] = {}
    for form in (str.strip, lambda name: name.strip().lower()):
        free: dict[str, int] = {}
        for index, name in old.items():
            if index not in found.values():
                free.setdefault(form(str(name)), index)
        for index, name in new.items():
            if index not in found and (counterpart := free.pop(form(str(name)), None)) is not None:
                found[index] = counterpart
    return [found.get(index) for index in range(len(new))]


def tells_names(names: object) -> TypeGuard[Mapping[int, str]]:
    """Return whether these are names that somebody gave, not the numbers that Ultralytics gives a model from a yaml."""
    return isinstance(names, Mapping) and any(str(index) != str(name) for index, name in names.items())


def listed(names: Iterable[str]) -> str:
    """Return names as a text for one line of the log, the first few if there are many."""
    all_names = list(names)
    more = len(all_names) - _LISTED
    return ", ".join(all_names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def counted(count: int) -> str:
    """Return `1 class` or `2 classes`."""
    return f"{count} class{'' if count == 1 else 'es'}"
