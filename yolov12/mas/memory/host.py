"""Reads the host's memory: what there is, what control groups leave of it, and what this process holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov12.mas.memory.cgroups import CGROUPS, read_cgroup_memory, read_fields
from yolov12.mas.memory.reading import ClockStopwatch, Reading, Stopwatch, limited_bytes

__all__ = ["HostMemory", "HostMeter", "trim_heap"]

_PROC = Path("/proc")


@dataclass(frozen=True)
class HostMemory:
    """The host's memory; asks psutil where there is no `/proc`."""

    proc: Path = _PROC
    cgroups: Path = CGROUPS

    def machine_bytes(self) -> tuple[int, int]:
        """Read bytes in all and bytes available (free, or given up on demand), whatever the control groups say."""
        fields = read_fields(self.proc / "meminfo")
        if fields:
            return fields["MemTotal"], fields["MemAvailable"]
        import psutil  # type: ignore[import-untyped,unused-ignore]

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)

    def room_bytes(self) -> tuple[int, int]:
        """Read bytes in all and bytes available, to this process: the machine's, or its control groups' if less."""
        total, available = self.machine_bytes()
        limit, room = read_cgroup_memory(self.cgroups, self.proc / "self/cgroup") or (total, available)
        return min(total, limit), min(available, room)

    def resident_bytes(self) -> tuple[int, int]:
        """Read this process' resident size: now, and at its highest since `forget_peak` (now, where not told)."""
        fields = read_fields(self.proc / "self/status")
        if fields:
            return fields["VmRSS"], max(fields["VmRSS"], fields.get("VmHWM", 0))
        import psutil

        now = int(psutil.Process().memory_info().rss)
        return now, now

    def forget_peak(self) -> None:
        """Set the highest resident size to the present one, where permitted (Linux' proc_pid_clear_refs(5))."""
        with contextlib.suppress(OSError):
            (self.proc / "self/clear_refs").write_text("5")


_TRIMMED_MARKS = 16
_TRIM_EVERY_S = 10.0


class HostMeter:
    """Measures a process that computes on the host.

    Memory that was freed mostly stays in the C library's heap, so resident size alone measures the largest step so
    far: on YOLO12-N at 320 pixels, 1 image after 8 adds 0 MiB to it, not 83. `mark` therefore gives the heap back
    first. Then what is resident is what is live, and peak − live is 71 to 89 MiB an image in any order. That costs
    6 to 19 ms a mark, and a step takes 20 to 30 % longer, to take pages anew (2 cores), so it is done for the first
    marks, which a cost model learns most from, and then every ten seconds. In between, or where the C library cannot
    (no glibc), `live` is the smallest resident size at any mark: after a larger step, increments are then too high,
    never too low.

    Where the peak cannot be reset (not Linux, or not permitted), one below an earlier peak is not seen, and the larger
    of the resident sizes at `mark` and at `peak_bytes` stands for it.

    Pages of program files count as held although the kernel can drop them (about 230 MiB with PyTorch).

    Args:
        limit: Bytes (int), a share of the memory (float, 0 to 1), or None. Nothing enforces it but the budget.
        memory: Where to read.
    """

    kind = "host"

    def __init__(self, limit: int | float | None = None, memory: HostMemory | None = None) -> None:
        self._memory = memory or HostMemory()
        self._limit = limit
        self._live_bytes: int | None = None
        self._marks, self._trim_at_s = 0, 0.0
        self._at_mark_bytes, self._peak_at_mark_bytes = self._memory.resident_bytes()

    def read(self) -> Reading:
        """Read the memory now; live bytes are those of the last mark, or the resident size if that is smaller."""
        held, _ = self._memory.resident_bytes()
        total, free = self._memory.room_bytes()
        return Reading(
            held_bytes=held,
            live_bytes=held if self._live_bytes is None else min(held, self._live_bytes),
            free_bytes=free,
            total_bytes=limited_bytes(total, self._limit),
            others_bytes=max(0, total - free - held),
        )

    def mark(self) -> int:
        """Give the heap back, forget the peak; return the live bytes now."""
        self._marks += 1
        trimmed = (self._marks <= _TRIMMED_MARKS or time.monotonic() >= self._trim_at_s) and trim_heap()
        if trimmed:
            self._trim_at_s = time.monotonic() + _TRIM_EVERY_S
        self._memory.forget_peak()
        self._at_mark_bytes, self._peak_at_mark_bytes = self._memory.resident_bytes()
        if trimmed or self._live_bytes is None:
            self._live_bytes = self._at_mark_bytes
        else:
            self._live_bytes = min(self._live_bytes, self._at_mark_bytes)
        return self._live_bytes

    def peak_bytes(self) -> int:
        """Return the highest resident size since the mark."""
        now, peak = self._memory.resident_bytes()
        return peak if peak > self._peak_at_mark_bytes else max(now, self._at_mark_bytes)

    def release(self) -> None:
        """Collect garbage and give the heap back."""
        gc.collect()
        trim_heap()

    def limited(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing: only the budget enforces a limit on the host."""
        return contextlib.nullcontext()

    def stopwatch(self) -> Stopwatch:
        """Return a stopwatch that is running."""
        return ClockStopwatch(lambda: time.perf_counter() * 1000)

    def busy_percent(self) -> float | None:
        """Return None: there is no GPU."""
        return None


def trim_heap() -> bool:
    """Give the freed memory that the C library keeps back to the system; False where it cannot (no glibc)."""
    if _MALLOC_TRIM is None:
        return False
    _MALLOC_TRIM(0)
    return True


def _find_malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # TypeError: Windows has no library without a name
        return None


_MALLOC_TRIM = _find_malloc_trim()
