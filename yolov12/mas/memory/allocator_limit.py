"""Limit of PyTorch's allocator for CUDA devices, which contexts set, change and restore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["AllocatorLimit", "allocator_limited", "known_fraction"]


class AllocatorLimit:
    """Limit of an open context.

    Args:
        device: Index of the device.
        fraction: Limit as a fraction of the device's memory, 0 to 1.
    """

    def __init__(self, device: int, fraction: float) -> None:
        self.fraction = fraction
        self._device = device

    def change(self, fraction: float) -> None:
        """Set another fraction. It is in force while no other context is open that opened later."""
        self.fraction = fraction
        if _limits[self._device][-1] is self:
            torch.cuda.set_per_process_memory_fraction(fraction, self._device)


_limits: dict[int, list[AllocatorLimit]] = {}  # device index → the limit found there, and those of open contexts


def known_fraction(device: int) -> float | None:
    """Return the limit of the allocator that is in force, as a fraction of the device's memory; None if it is unknown.

    It is unknown before PyTorch 2.8 outside of all contexts: the user may have set one.

    Args:
        device: Index of the device.
    """
    if _limits.get(device):
        return _limits[device][-1].fraction
    read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    # Without a limit, cudaMallocAsync's is a number that cannot be set.
    return None if read is None else min(float(read(device)), 1.0)


@contextmanager
def allocator_limited(device: int, fraction: float) -> Iterator[AllocatorLimit]:
    """Limit the allocator. On exit, restore the limit of the open context that opened last, or the original limit.

    Contexts may close in any order: a prediction in a callback ends before its training, a streamed one may end after.

    Args:
        device: Index of the device.
        fraction: Limit as a fraction of the device's memory, 0 to 1.
    """
    limits = _limits.setdefault(device, [])
    if not limits:
        found = known_fraction(device)
        limits.append(AllocatorLimit(device, 1.0 if found is None else found))
    mine = AllocatorLimit(device, fraction)
    limits.append(mine)
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    try:
        yield mine
    finally:
        limits.remove(mine)
        torch.cuda.set_per_process_memory_fraction(limits[-1].fraction, device)
        if len(limits) == 1:
            del _limits[device]
