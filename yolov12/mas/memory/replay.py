"""A meter that needs no device: it replays the memory use of other processes, for tests and simulations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from yolov12.mas.memory.reading import ClockStopwatch, Reading, Sensors, Stopwatch, limited_bytes

__all__ = ["ReplayMeter"]


class ReplayMeter:
    """A simulated card on which other processes use memory according to a trace, step by step.

    Its allocator has no cache, and its clock advances only with `tick`.

    Args:
        total_bytes: Memory of the card.
        others_bytes: Memory of other processes at each step. After the last step, its value stays.
        allocated_bytes: Memory allocated by this process. May be changed at any time.
        limit: Memory limit; see `meter_for`.
        outside_bytes: Memory of loader workers of this run at each step, if the card shares its memory with the host.
    """

    kind = "cuda"

    def __init__(
        self,
        total_bytes: int,
        others_bytes: Sequence[int],
        allocated_bytes: int = 0,
        limit: int | float | None = None,
        outside_bytes: Sequence[int] = (0,),
    ) -> None:
        self.allocated_bytes = allocated_bytes
        self._card_bytes, self._limited_bytes = total_bytes, limited_bytes(total_bytes, limit)
        self._others_bytes, self._outside_bytes = list(others_bytes), list(outside_bytes)
        self._step = 0
        self._peak_bytes = allocated_bytes
        self._now_ms = 0.0
        self._most_bytes = math.inf

    def advance(self) -> None:
        """Go to the next step of the trace, or stay at the last."""
        self._step += 1

    def tick(self, ms: float) -> None:
        """Advance the clock."""
        self._now_ms += ms

    def use(self, peak_bytes_above_allocated: int) -> None:
        """Allocate memory and free it at once, like a micro-batch.

        Raises:
            torch.cuda.OutOfMemoryError: The memory does not fit beside this process' and other processes' memory, or it
                exceeds the limit or that of `held_to`.
        """
        peak_bytes = self.allocated_bytes + peak_bytes_above_allocated
        others_bytes, outside_bytes = self._held()
        room_bytes = min(self._card_bytes - others_bytes, self._limited_bytes) - outside_bytes
        if peak_bytes > min(room_bytes, self._most_bytes):
            raise torch.cuda.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {peak_bytes_above_allocated / 2**20:.2f} MiB. "
                f"GPU 0 has {(room_bytes - self.allocated_bytes) / 2**20:.2f} MiB left for this process (replayed)."
            )
        self._peak_bytes = max(self._peak_bytes, peak_bytes)

    def read(self) -> Reading:
        """Read the memory at this step of the trace."""
        others_bytes, outside_bytes = self._held()
        free = max(0, self._card_bytes - others_bytes - outside_bytes - self.allocated_bytes)
        return Reading(
            self.allocated_bytes, self.allocated_bytes, free, self._limited_bytes, others_bytes, outside_bytes
        )

    def _held(self) -> tuple[int, int]:
        """Return the memory of other processes, and of this run's workers, at this step."""
        others_bytes, outside_bytes = (
            trace[min(self._step, len(trace) - 1)] for trace in (self._others_bytes, self._outside_bytes)
        )
        return others_bytes, outside_bytes

    def mark(self) -> int:
        """Reset the peak; return the bytes allocated now."""
        self._peak_bytes = self.allocated_bytes
        return self.allocated_bytes

    def peak_bytes(self) -> int:
        """Return the highest allocated bytes since the last mark."""
        return max(self._peak_bytes, self.allocated_bytes)

    def release(self, *, thorough: bool = True) -> None:
        """Do nothing: there is no cache."""

    def limited(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: tests decide what fits."""
        return nullcontext()

    @contextmanager
    def held_to(self, most_bytes: int) -> Iterator[None]:
        """Return a context in which `use` refuses to go beyond a number of bytes."""
        before, self._most_bytes = self._most_bytes, most_bytes
        try:
            yield
        finally:
            self._most_bytes = before

    def stopwatch(self) -> Stopwatch:
        """Start a stopwatch that uses the simulated clock."""
        return ClockStopwatch(lambda: self._now_ms)

    def busy_percent(self) -> float | None:
        """Return None, because nothing runs."""
        return None

    def sensors(self) -> Sensors:
        """Return no values, because there is no device."""
        return Sensors()
