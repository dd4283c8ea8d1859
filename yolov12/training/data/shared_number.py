"""Number that a training shares with the workers of its loader."""

from __future__ import annotations

from multiprocessing.context import get_spawning_popen
from multiprocessing.sharedctypes import RawValue
from typing import Any

__all__ = ["SharedNumber"]


class SharedNumber:
    """Number in memory that a process shares with those that it forks or spawns.

    A copy, also one that was pickled, has a memory of its own: users copy the data set of a training.

    Args:
        kind: Its type, of `ctypes`.
        value: Value at first.
    """

    def __init__(self, kind: Any, value: Any) -> None:
        self._kind, self._raw = kind, RawValue(kind, value)

    @property
    def value(self) -> Any:
        """The number."""
        return self._raw.value

    @value.setter
    def value(self, value: Any) -> None:
        self._raw.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is not None:
            return _joined, (self._kind, self._raw)
        return SharedNumber, (self._kind, self.value)


def _joined(kind: Any, raw: Any) -> SharedNumber:
    number = SharedNumber.__new__(SharedNumber)
    number._kind, number._raw = kind, raw
    return number
