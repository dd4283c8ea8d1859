"""What a meter tells: memory at one moment, the highest point since a mark, time, and how busy the device is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

__all__ = ["ClockStopwatch", "Meter", "Reading", "Stopwatch", "limited_bytes"]


@dataclass(frozen=True)
class Reading:
    """Memory of one device at one moment, in bytes."""

    held_bytes: int
    """What this process holds: live tensors and the allocator's cache; on the host, its resident size."""
    live_bytes: int
    """Live tensors alone; on the host, see `HostMeter`."""
    free_bytes: int
    """What the device could still give, whatever the limit."""
    total_bytes: int
    """What the device has, or the limit where that is smaller."""
    others_bytes: int | None
    """Held by other processes and not by this one; None where not known."""

    def budget_bytes(self, safety_ratio: float) -> int:
        """Bytes that this process may hold: what it holds and what is free, less a share of the total, at least 0.

        A limit counts as a card of that size would: the budget is at most `(1 - safety_ratio) * total_bytes`.

        Args:
            safety_ratio: Share of the total that stays free, 0 to 1.
        """
        reachable_bytes = min(self.held_bytes + self.free_bytes, self.total_bytes)
        return max(0, int(reachable_bytes - safety_ratio * self.total_bytes))

    def without_others(self) -> Reading:
        """As if no other process held any of the device."""
        return replace(self, free_bytes=self.free_bytes + (self.others_bytes or 0), others_bytes=0)


def limited_bytes(device_bytes: int, limit: int | float | None) -> int:
    """Return the bytes that a limit leaves of a device.

    Args:
        device_bytes: What the device has.
        limit: Bytes (int), a share of the device (float, above 0 to 1), or None. More than the device is the device.
    """
    if limit is None:
        return device_bytes
    return min(device_bytes, int(limit * device_bytes) if isinstance(limit, float) else limit)


class Stopwatch(Protocol):
    """Times work on a device, from its making to `stop`; neither waits for the device."""

    def stop(self) -> None:
        """Take the time once the device has done all it was given so far."""

    def elapsed_ms(self) -> float | None:
        """Milliseconds from the making to `stop`; None before `stop`, or while the device has not got there yet."""


class Meter(Protocol):
    """Reads one device. Only `release` may wait for the device."""

    kind: str
    """`cuda`, `integrated` (a GPU that shares the host's memory) or `host`."""

    def read(self) -> Reading:
        """Read the memory now."""

    def mark(self) -> int:
        """Forget the peak; return the live bytes now."""

    def peak_bytes(self) -> int:
        """Return the highest live bytes since the mark."""

    def release(self) -> None:
        """Give memory that the allocator holds and no tensor uses back to the device."""

    def stopwatch(self) -> Stopwatch:
        """Return a stopwatch that is running."""

    def limited(self) -> AbstractContextManager[None]:
        """Return a context in which the process is held to the meter's limit, where something can enforce it."""

    def busy_percent(self) -> float | None:
        """Return the share of the last sample period in which the GPU had work; None where not known."""


class ClockStopwatch:
    """A stopwatch for work that is done when the call returns.

    Args:
        now_ms: A clock, in milliseconds.
    """

    def __init__(self, now_ms: Callable[[], float]) -> None:
        self._now_ms = now_ms
        self._started_ms = now_ms()
        self._elapsed_ms: float | None = None

    def stop(self) -> None:
        """Take the time."""
        self._elapsed_ms = self._now_ms() - self._started_ms

    def elapsed_ms(self) -> float | None:
        """Milliseconds from the making to `stop`; None before `stop`."""
        return self._elapsed_ms
