"""Reads the host's memory: all of it, the part that control groups allow, and the part that this process uses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov12.errors import ConfigError
from yolov12.mas.memory.cgroups import CGROUPS, read_cgroup_memory, read_fields
from yolov12.mas.memory.process_tree import ChildProcesses
from yolov12.mas.memory.reading import ClockStopwatch, Reading, Sensors, Stopwatch, limited_bytes

__all__ = ["HostMemory", "HostMeter", "trim_heap"]

_PROC = Path("/proc")


@dataclass(frozen=True)
class HostMemory:
    """Memory of the host, read from `/proc` and the control groups.

    Raises:
        ConfigError: There is no `/proc`, from any method but `forget_peak`.
    """

    proc: Path = _PROC
    """Folder where `/proc` is mounted."""
    cgroups: Path = CGROUPS
    """Folder where the control groups are mounted."""

    def machine_bytes(self) -> tuple[int, int]:
        """Read total and available bytes of the machine, without regard to control groups.

        Available memory is free or can be given up on demand, such as page cache.
        """
        fields = self._fields("meminfo")
        return fields["MemTotal"], fields["MemAvailable"]

    def room_bytes(self) -> tuple[int, int]:
        """Read total and available bytes for this process: the machine's, or the control groups' if they are less."""
        total, available = self.machine_bytes()
        limit, room = read_cgroup_memory(self.cgroups, self.proc / "self/cgroup") or (total, available)
        return min(total, limit), min(available, room)

    def resident_bytes(self) -> tuple[int, int]:
        """Read this process' resident size now and its peak since `forget_peak` (the present size if unknown)."""
        fields = self._fields("self/status")
        return fields["VmRSS"], max(fields["VmRSS"], fields.get("VmHWM", 0))

    def _fields(self, name: str) -> Mapping[str, int]:
        fields = read_fields(self.proc / name)
        if not fields:
            raise ConfigError(f"memory cannot be read, as {self.proc / name} is missing: use Linux, with /proc mounted")
        return fields

    def forget_peak(self) -> None:
        """Reset the peak of the resident size, if permitted (Linux' proc_pid_clear_refs(5))."""
        with contextlib.suppress(OSError):
            (self.proc / "self/clear_refs").write_text("5")


_TRIM_EVERY = 64
"""Most marks from one trim of the heap to the next."""


class HostMeter:
    """Measures a process that computes on the host.

    Freed memory mostly stays in the C library's heap. The resident size alone therefore measures the largest step so
    far: on YOLO12-N at 320 pixels, 1 image after a step of 8 adds 0 MiB, not 83. So `mark` first returns the heap to
    the system. After that, resident memory is allocated memory, and its peak grows by 71 to 89 MiB per image, whatever
    ran before.

    This costs 6 to 19 ms per mark, and a step takes 20 to 30 % longer to get its pages again (2 cores). It is therefore
    done at marks 1, 2, 4, 8 and so on, as a cost model learns most from the first ones, and at least at every 64th
    mark. It is also done where memory is short and something else, such as a validation, has made the heap larger than
    the last step did. At other marks, and where the C library cannot return memory (no glibc), the allocated bytes are
    taken as the smallest resident size at any mark. After a larger step the measured increments are then too high,
    never too low.

    If the peak cannot be reset (not Linux, or not permitted), a peak below an earlier one is not visible. The larger of
    the resident sizes at `mark` and at `peak_bytes` is used in its place.

    Pages of program files count as reserved, although the kernel can drop them (about 230 MiB with PyTorch).

    The memory is one pool: the limit holds for this process and its child processes together. Images that are cached in
    memory are part of this process. Loader workers are child processes, and what they hold is no longer there for the
    model. The memory that is free, on the machine or in the control group, is less by all of them anyway.

    Args:
        limit: Bytes (int), a fraction of the memory (float, 0 to 1), or None. Only the budget enforces it.
        memory: Source of the numbers.
    """

    kind = "host"

    def __init__(self, limit: int | float | None = None, memory: HostMemory | None = None) -> None:
        self._memory = memory or HostMemory()
        self._limit = limit
        self._children = ChildProcesses(self._memory.proc)
        self._allocated_bytes: int | None = None
        self._marks = 0
        self._free_bytes = 0  # within the limit, at the last reading
        self._peak_bytes = 0  # of the last step
        self._at_mark_bytes, self._peak_at_mark_bytes = self._memory.resident_bytes()

    def read(self) -> Reading:
        """Read the memory now. Allocated bytes are those of the last mark, or the resident size if it is smaller."""
        reserved, _ = self._memory.resident_bytes()
        total, free = self._memory.room_bytes()
        children = self._children.held_bytes()
        self._free_bytes = min(free, limited_bytes(total, self._limit) - children - reserved)
        return Reading(
            reserved_bytes=reserved,
            allocated_bytes=reserved if self._allocated_bytes is None else min(reserved, self._allocated_bytes),
            free_bytes=free,
            total_bytes=limited_bytes(total, self._limit),
            others_bytes=max(0, total - free - children - reserved),
            outside_bytes=children,
        )

    def mark(self) -> int:
        """Return the heap to the system if it is due, reset the peak, and return the bytes allocated now."""
        self._marks += 1
        is_due = self._marks & (self._marks - 1) == 0 or self._marks % _TRIM_EVERY == 0
        trimmed = (is_due or self._is_misleading()) and trim_heap()
        self._memory.forget_peak()
        self._at_mark_bytes, self._peak_at_mark_bytes = self._memory.resident_bytes()
        if trimmed or self._allocated_bytes is None:
            self._allocated_bytes = self._at_mark_bytes
        else:
            self._allocated_bytes = min(self._allocated_bytes, self._at_mark_bytes)
        return self._allocated_bytes

    def peak_bytes(self) -> int:
        """Return the highest resident size since the last mark."""
        now, peak = self._memory.resident_bytes()
        self._peak_bytes = peak if peak > self._peak_at_mark_bytes else max(now, self._at_mark_bytes)
        return self._peak_bytes

    def _is_misleading(self) -> bool:
        """Return whether memory is short, and the heap has grown since the last step, whose size would count."""
        resident_bytes, _ = self._memory.resident_bytes()
        return resident_bytes > max(self._peak_bytes, self._free_bytes)

    def release(self, *, thorough: bool = True) -> None:
        """Collect garbage and return the heap to the system; do nothing unless `thorough`, see `Meter.release`."""
        if thorough:
            gc.collect()
            trim_heap()

    def limited(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing: only the budget enforces a limit on the host."""
        return contextlib.nullcontext()

    def held_to(self, most_bytes: int) -> None:
        """Return None: nothing refuses memory on the host."""

    def stopwatch(self) -> Stopwatch:
        """Start a stopwatch."""
        return ClockStopwatch()

    def busy_percent(self) -> float | None:
        """Return None, because there is no GPU."""
        return None

    def sensors(self) -> Sensors:
        """Return no values, because there is no GPU."""
        return Sensors()


def trim_heap() -> bool:
    """Return freed memory from the C library's heap to the system. Return False where it cannot (no glibc)."""
    if _MALLOC_TRIM is None:
        return False
    _MALLOC_TRIM(0)
    return True


def _find_malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # TypeError: on Windows, a library needs a name
        return None


_MALLOC_TRIM = _find_malloc_trim()
