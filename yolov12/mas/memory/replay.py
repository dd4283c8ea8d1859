"""A meter without a device: replays what other processes held, for tests and simulation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from yolov12.mas.memory.reading import ClockStopwatch, Reading, Stopwatch, limited_bytes

__all__ = ["ReplayMeter"]


class ReplayMeter:
    """A card that is not there, for tests and simulation: other processes hold what a trace says, step by step.

    Its allocator keeps no cache, and its clock moves on `tick` alone.

    Args:
        total_bytes: What the card has.
        others_bytes: What others hold, for each step; the last one stays.
        live_bytes: This process' own live tensors. May be set at any time.
        limit: See `meter_for`.
    """

    kind = "cuda"

    def __init__(
        self, total_bytes: int, others_bytes: Sequence[int], live_bytes: int = 0, limit: int | float | None = None
    ) -> None:
        self.live_bytes = live_bytes
        self._card_bytes, self._limited_bytes = total_bytes, limited_bytes(total_bytes, limit)
        self._others_bytes = list(others_bytes)
        self._step = 0
        self._peak_bytes = live_bytes
        self._now_ms = 0.0

    def advance(self) -> None:
        """Go on to the next step of the trace; stay at the last."""
        self._step = min(self._step + 1, len(self._others_bytes) - 1)

    def tick(self, ms: float) -> None:
        """Move the clock."""
        self._now_ms += ms

    def use(self, peak_bytes_above_live: int) -> None:
        """Take memory for a moment, as a micro-batch does.

        Raises:
            torch.cuda.OutOfMemoryError: It does not fit beside the live tensors and the others, or into the limit.
        """
        peak_bytes = self.live_bytes + peak_bytes_above_live
        room_bytes = min(self._card_bytes - self._others_bytes[self._step], self._limited_bytes)
        if peak_bytes > room_bytes:
            raise torch.cuda.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {peak_bytes_above_live / 2**20:.2f} MiB. "
                f"GPU 0 has {(room_bytes - self.live_bytes) / 2**20:.2f} MiB left for this process (replayed)."
            )
        self._peak_bytes = max(self._peak_bytes, peak_bytes)

    def read(self) -> Reading:
        """Read the memory at this step of the trace."""
        others = self._others_bytes[self._step]
        free = max(0, self._card_bytes - others - self.live_bytes)
        return Reading(self.live_bytes, self.live_bytes, free, self._limited_bytes, others)

    def mark(self) -> int:
        """Forget the peak; return the live bytes."""
        self._peak_bytes = self.live_bytes
        return self.live_bytes

    def peak_bytes(self) -> int:
        """Return the highest bytes since the mark."""
        return max(self._peak_bytes, self.live_bytes)

    def release(self) -> None:
        """Do nothing: there is no cache."""

    def limited(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: tests decide what fits."""
        return nullcontext()

    def stopwatch(self) -> Stopwatch:
        """Return a stopwatch on the replay's clock."""
        return ClockStopwatch(lambda: self._now_ms)

    def busy_percent(self) -> float | None:
        """Return None: nothing runs."""
        return None
