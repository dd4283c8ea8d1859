"""What a meter measures on a device: memory now, its peak since a mark, time, and utilisation."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

__all__ = ["ClockStopwatch", "Meter", "Reading", "Sensors", "Stopwatch", "limited_bytes"]


@dataclass(frozen=True)
class Reading:
    """Memory of one device at one moment, in bytes."""

    reserved_bytes: int
    """Reserved by this process: allocated tensors and the allocator's cache; on the host, its resident size."""
    allocated_bytes: int
    """Allocated in tensors; on the host, an estimate (see `HostMeter`)."""
    free_bytes: int
    """Still available on the device, regardless of the limit."""
    total_bytes: int
    """Memory of the device, or the limit if it is smaller."""
    others_bytes: int | None
    """Used by other processes; None if unknown."""
    outside_bytes: int = 0
    """Held by this run in the same memory, but not part of `reserved_bytes`. On the host: by child processes, such as
    loader workers. On an integrated GPU: by child processes and by this process on the host."""

    @property
    def reachable_bytes(self) -> int:
        """Bytes that this process could reserve: what it has and what is free, within the total for the whole run."""
        return min(self.reserved_bytes + self.free_bytes, self.total_bytes - self.outside_bytes)

    def budget_bytes(self, safety_ratio: float) -> int:
        """Return the bytes that this process may use, at least 0.

        The budget is the memory that this process has reserved or that is free, minus the safety fraction of the total.
        A limit has the effect of a card of that size: this process and `outside_bytes` together get at most
        `(1 - safety_ratio) * total_bytes`.

        Args:
            safety_ratio: Fraction of the total that stays free, 0 to 1.
        """
        return max(0, int(self.reachable_bytes - safety_ratio * self.total_bytes))

    def without_others(self) -> Reading:
        """Return the reading as it would be if no other process used the device."""
        return replace(self, free_bytes=self.free_bytes + (self.others_bytes or 0), others_bytes=0)


@dataclass(frozen=True)
class Sensors:
    """State of a device at one moment. A value is None if it is unknown."""

    power_w: float | None = None
    """Power in watts: of the GPU, or of the whole module that an integrated GPU is part of."""
    temperature_c: float | None = None
    """Temperature of the GPU in degrees Celsius."""


def limited_bytes(device_bytes: int, limit: int | float | None) -> int:
    """Return the bytes of a device that a limit allows.

    Args:
        device_bytes: Memory of the device.
        limit: Bytes (int), a fraction of the device (float, above 0 and up to 1), or None. A limit above the memory of
            the device has no effect.
    """
    if limit is None:
        return device_bytes
    return min(device_bytes, int(limit * device_bytes) if isinstance(limit, float) else limit)


class Stopwatch(Protocol):
    """Times work on a device, from its creation to `stop`. Neither creation nor `stop` waits for the device."""

    def stop(self) -> None:
        """Record the time at which the device has finished all work launched so far."""

    def elapsed_ms(self) -> float | None:
        """Return milliseconds from creation to `stop`; None before `stop`, or while the device is still at work."""


class Meter(Protocol):
    """Measures memory and time on one device. Only `release` may wait for the device."""

    kind: str
    """Kind of memory: `cuda`, `integrated` (a GPU that uses the host's memory) or `host`."""

    def read(self) -> Reading:
        """Read the memory now."""

    def mark(self) -> int:
        """Reset the peak; return the bytes allocated now."""

    def peak_bytes(self) -> int:
        """Return the highest allocated bytes since the last mark."""

    def release(self, *, thorough: bool = True) -> None:
        """Return cached memory of the allocator to the device.

        Args:
            thorough: Collect Python's garbage first, which takes tenths of a second. On the host, nothing is returned
                without this, as the next step would have to get the pages of the heap again.
        """

    def stopwatch(self) -> Stopwatch:
        """Start a stopwatch."""

    def limited(self) -> AbstractContextManager[None]:
        """Return a context in which the process is held to the meter's limit, where something can enforce it."""

    def held_to(self, most_bytes: int) -> AbstractContextManager[None] | None:
        """Return a context in which more than `most_bytes` of reserved memory are refused; None if nothing refuses it.

        Images that nobody knows the memory of can run in it: what they take is not missing for other processes.
        """

    def busy_percent(self) -> float | None:
        """Return the percentage of the last sample period in which the GPU was busy; None if unknown."""

    def sensors(self) -> Sensors:
        """Return power and temperature, at most a second old."""


class ClockStopwatch:
    """A stopwatch for work that has finished when its call returns.

    Args:
        now_ms: Clock, in milliseconds; by default that of the host.
    """

    def __init__(self, now_ms: Callable[[], float] = lambda: time.perf_counter() * 1000) -> None:
        self._now_ms = now_ms
        self._started_ms = now_ms()
        self._elapsed_ms: float | None = None

    def stop(self) -> None:
        """Record the time."""
        self._elapsed_ms = self._now_ms() - self._started_ms

    def elapsed_ms(self) -> float | None:
        """Return milliseconds from creation to `stop`; None before `stop`."""
        return self._elapsed_ms
