"""Meter of a CUDA device, with its own memory or with the host's."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from yolov12.mas.memory.allocator_limit import AllocatorLimit, allocator_limited, known_fraction
from yolov12.mas.memory.host import HostMemory
from yolov12.mas.memory.nvml import NvmlGpu, OnceASecond
from yolov12.mas.memory.process_tree import ChildProcesses
from yolov12.mas.memory.reading import Reading, Sensors, Stopwatch, limited_bytes
from yolov12.mas.memory.tegra import TegraSensors

__all__ = ["CudaMeter"]


class CudaMeter:
    """Meter of a CUDA device, through PyTorch's allocator. Only `release` waits for the device.

    An integrated GPU shares one pool of memory with the CPU. Of such a GPU, CUDA counts the page cache as used, so the
    numbers come from the host: MemAvailable, or the room in the control group if that is less. The limit, the budget
    and its margin hold for all that this run takes from the pool: the allocator's memory, the host memory of this
    process (with cached images), and its child processes (loader workers).

    If the pool is over-committed, the kernel kills a process instead of failing an allocation. Inside `limited`, the
    allocator of an integrated GPU is therefore held to what was within reach at the last `read`, less half of the
    margin. The planner uses the memory up to the margin. If an allocation needs more, PyTorch refuses it, and the
    engine goes on in smaller micro-batches. The other half of the margin is for other processes and for loader
    workers, until the next reading.

    `others_bytes` is memory that is neither free nor used by this process. NVML knows how much this process uses
    outside of the allocator (the CUDA context, a few hundred MiB). Where NVML does not tell (a container without
    `--pid=host`), that part counts as used by other processes. A sum over NVML's process list would be more direct,
    but a container may see an incomplete list.

    Args:
        device: CUDA device; without an index, the current one.
        limit: Memory that this process may use, see `meter_for`. `limited` makes PyTorch's allocator keep to it.
        host: Reader of the host's memory, for an integrated GPU.
        safety_ratio: Fraction of the total that the budget leaves free, 0 to 1.
        sys: Folder where `/sys` is mounted, for the sensors of an integrated GPU.
    """

    def __init__(
        self,
        device: torch.device,
        limit: int | float | None = None,
        host: HostMemory | None = None,
        *,
        safety_ratio: float = 0.0,
        sys: Path = Path("/sys"),
    ) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._limit, self._safety_ratio = limit, safety_ratio
        self._host = host or HostMemory()
        self._children = ChildProcesses(self._host.proc)
        properties: Any = torch.cuda.get_device_properties(self._device)
        self.kind = "integrated" if properties.is_integrated else "cuda"
        self._allocator_limit: AllocatorLimit | None = None  # of an integrated GPU, inside `limited`
        self._nvml = NvmlGpu(self._device)
        self._tegra = TegraSensors(sys) if self.kind == "integrated" else None
        self._context_bytes = OnceASecond(self._ask_context_bytes)
        self._busy_percent = OnceASecond(self._ask_busy_percent)
        self._sensors = OnceASecond(self._ask_sensors)

    def read(self) -> Reading:
        """Read the memory now. Inside `limited`, this also renews the allocator's limit for an integrated GPU."""
        counters = self._counters()
        reserved = int(counters["reserved_bytes"]["all"]["current"])
        outside = 0
        if self.kind == "integrated":
            total, free = self._host.room_bytes()
            total = min(total, torch.cuda.mem_get_info(self._device)[1])
            outside = self._host.resident_bytes()[0] + self._children.held_bytes()
        else:
            free, total = torch.cuda.mem_get_info(self._device)
        reading = Reading(
            reserved_bytes=reserved,
            allocated_bytes=int(counters["allocated_bytes"]["all"]["current"]),
            free_bytes=free,
            total_bytes=limited_bytes(total, self._limit),
            others_bytes=max(0, total - free - reserved - outside - self._context_bytes(reserved)),
            outside_bytes=outside,
        )
        if self._allocator_limit is not None:
            self._allocator_limit.change(self._fraction(reading))
        return reading

    def mark(self) -> int:
        """Reset the peak; return the bytes allocated now."""
        torch.cuda.reset_peak_memory_stats(self._device)
        return int(self._counters()["allocated_bytes"]["all"]["current"])

    def peak_bytes(self) -> int:
        """Return the highest allocated bytes since the mark. They are exact, as the allocator counts every request."""
        return int(self._counters()["allocated_bytes"]["all"]["peak"])

    def release(self, *, thorough: bool = True) -> None:
        """See `Meter.release`; this waits for the device."""
        if thorough:
            gc.collect()
        torch.cuda.empty_cache()

    def limited(self) -> AbstractContextManager[None]:
        """Return a context in which PyTorch's allocator is held to the limit.

        Without a limit, the context does nothing, unless the GPU is integrated.
        """
        if self._limit is None and self.kind != "integrated":
            return nullcontext()
        return self._allocator_limited()

    @contextmanager
    def _allocator_limited(self) -> Iterator[None]:
        with allocator_limited(self._device, self._fraction(self.read())) as limit:
            before = self._allocator_limit
            if self.kind == "integrated":
                self._allocator_limit = limit
            try:
                yield
            finally:
                self._allocator_limit = before

    def held_to(self, most_bytes: int) -> AbstractContextManager[None] | None:
        """Return a context in which PyTorch's allocator is held to a number of bytes.

        None on an integrated GPU, whose allocator `limited` holds. None also if the limit that is in force is unknown,
        since it could not be restored: before PyTorch 2.8 without a limit.

        Args:
            most_bytes: Most reserved memory. A limit that is in force stays if it is lower.
        """
        fraction = known_fraction(self._device)
        if self.kind == "integrated" or fraction is None:
            return None
        return self._held(min(fraction, most_bytes / torch.cuda.mem_get_info(self._device)[1]))

    @contextmanager
    def _held(self, fraction: float) -> Iterator[None]:
        with allocator_limited(self._device, fraction):
            yield

    def stopwatch(self) -> Stopwatch:
        """Start a stopwatch on the device's current stream."""
        return _CudaStopwatch(self._device)

    def busy_percent(self) -> float | None:
        """Return the GPU utilisation in percent, at most a second old, from NVML or Tegra's files; None if unknown."""
        return self._busy_percent()

    def sensors(self) -> Sensors:
        """Return power and temperature, at most a second old, from NVML or Tegra's files."""
        return self._sensors()

    def _counters(self) -> dict[str, Any]:
        # Functions such as `memory_allocated` flatten and sort a hundred counters to return one of them.
        counters: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(self._device)
        return counters

    def _fraction(self, reading: Reading) -> float:
        """Return the limit of the allocator, as a fraction of what CUDA says the device has."""
        most_bytes = float(reading.total_bytes)
        if self.kind == "integrated":
            most_bytes = reading.reachable_bytes - self._safety_ratio / 2 * reading.total_bytes
        return min(max(most_bytes / torch.cuda.mem_get_info(self._device)[1], 0.0), 1.0)

    def _ask_context_bytes(self, reserved_bytes: int) -> int:
        return max(0, (self._nvml.own_bytes() or 0) - reserved_bytes)

    def _ask_busy_percent(self) -> float | None:
        percent = self._tegra.busy_percent() if self._tegra is not None else None
        return self._nvml.busy_percent() if percent is None else percent

    def _ask_sensors(self) -> Sensors:
        found = self._tegra.read() if self._tegra is not None else Sensors()
        return self._nvml.sensors() if found == Sensors() else found


class _CudaStopwatch:
    def __init__(self, device: int) -> None:
        self._device = device
        self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._stopped = False
        self._begin.record(torch.cuda.current_stream(device))

    def stop(self) -> None:
        self._end.record(torch.cuda.current_stream(self._device))
        self._stopped = True

    def elapsed_ms(self) -> float | None:
        return self._begin.elapsed_time(self._end) if self._stopped and self._end.query() else None
