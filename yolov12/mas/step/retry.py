"""Repeats the small calculations around micro-batches if an allocation fails in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from yolov12.mas.oom import is_out_of_memory

__all__ = ["BESIDE", "IN_A_CAPTURE", "IN_A_COPY", "IN_A_WARM_UP", "Note", "Retry", "no_note"]

BESIDE, IN_A_COPY, IN_A_WARM_UP, IN_A_CAPTURE = (
    f"out-of-memory {where}" for where in ("between micro-batches", "in a copy", "in a warm-up", "in a capture")
)
"""Events of failed allocations outside of micro-batches, see `journal.columns.EVENTS`."""
_ATTEMPTS = 3

Found = TypeVar("Found")
Note = Callable[[str], None]
"""Is called with an event for the journal."""


def no_note(event: str) -> None:
    """Drop an event."""


class Retry:
    """Calls a function again after a failed allocation.

    Args:
        release: Returns cached memory to the device.
        note: Called with an event for each failure.
    """

    def __init__(self, release: Callable[[], None], note: Note) -> None:
        self._release, self._note = release, note

    def __call__(self, function: Callable[[], Found]) -> Found:
        """Return what a function returns. After a failed allocation, release memory and call it again.

        Args:
            function: Allocates all memory that it needs before it changes anything.

        Raises:
            RuntimeError: The third attempt failed, too, or the function failed for another reason than memory.
            MemoryError: The third attempt failed, too, for want of host memory.
        """
        for failures in range(_ATTEMPTS):
            try:
                return function()
            except Exception as error:
                if not is_out_of_memory(error) or failures == _ATTEMPTS - 1:
                    raise
            self._release()
            self._note(BESIDE)
        raise AssertionError  # the last attempt returns or raises
