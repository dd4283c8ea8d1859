"""Classes of two models or data sets, matched by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeGuard

from yolov12.errors import ConfigError

__all__ = ["check_rename", "counted", "hint", "listed", "match", "renamed", "tells_names"]

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


def renamed(names: Mapping[int, str], rename: Mapping[str, str] | None) -> dict[int, str]:
    """Return class names after a renaming.

    The renamed classes are last. So if another class has the new name already, `match` finds that class.

    Args:
        names: Class id → name.
        rename: Old name → new name; None for no renaming. Names that no class has are ignored.
    """
    rename = rename or {}
    found = zip(match(names, dict(enumerate(rename))), rename.values(), strict=True)
    new = {index: name for index, name in found if index is not None}
    return {**{index: name for index, name in names.items() if index not in new}, **new}


def check_rename(rename: Mapping[str, str], old: Iterable[str], new: Iterable[str]) -> None:
    """Check that `rename` has names of classes.

    Args:
        rename: Old name → new name.
        old: Class names of the model and of the replayed data.
        new: Class names of the data.

    Raises:
        ConfigError: A class of this name does not exist. The message has the name that is most like it.
    """
    for words, known, what in ((rename, [*old], "no old class is"), (rename.values(), [*new], "no class of data= is")):
        forms = {str(name).strip().lower(): str(name) for name in known}
        for word in words:
            if word.strip().lower() not in forms:
                near = get_close_matches(word.strip().lower(), forms, 1)
                meant = f"did you mean {forms[near[0]]}?" if near else f"there are {listed(known)}"
                raise ConfigError(f"rename={dict(rename)}: {what} called {word} ({meant})")


def hint(old: Iterable[str], new: Iterable[str]) -> str | None:
    """Return a `rename` for classes whose names differ only in case, spaces, `_`, `-` or number; None if none do.

    Args:
        old: Names of classes without a counterpart.
        new: Names of new classes.
    """
    forms = {name: re.sub(r"[\s_-]+", "", name).casefold() for name in map(str, new)}
    pairs: dict[str, str] = {}
    for one in map(str, old):
        like = [name for name, form in forms.items() if _alike(re.sub(r"[\s_-]+", "", one).casefold(), form)]
        if like and like[0] not in pairs.values():
            pairs[one] = like[0]
    return f'rename="{pairs}"' if pairs else None


def _alike(one: str, other: str) -> bool:
    return one == other or any(
        many in (single + "s", single + "es", re.sub("y$", "ies", single))
        for single, many in ((one, other), (other, one))
    )


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
