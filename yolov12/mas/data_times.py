"""Times in which a batch was loaded."""

from __future__ import annotations

from dataclasses import dataclass

from yolov12.mas.memory.reading import Stopwatch

__all__ = ["DataTimes"]


@dataclass(frozen=True)
class DataTimes:
    """Times of one batch, from the training loop and from the worker that loaded it."""

    wait: Stopwatch
    """Measures the time in which the device had nothing to do because the batch was not there."""
    decode_ms: float | None = None
    """Milliseconds in which the worker read and decoded images; None if unknown."""
    augment_ms: float | None = None
    """Milliseconds of everything else that made the batch: labels, augmentation, collation; None if unknown."""
