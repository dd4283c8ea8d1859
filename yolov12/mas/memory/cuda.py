"""Memory of a CUDA device: how to read it, and how to limit PyTorch's allocator."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from yolov12.mas.memory.host import HostMemory
from yolov12.mas.memory.nvml import NvmlGpu, OnceASecond
from yolov12.mas.memory.reading import Reading, Stopwatch, limited_bytes

__all__ = ["CudaMeter"]


class CudaMeter:
    """Meter of a CUDA device, through PyTorch's allocator. Only `release` waits for the device.

    An integrated GPU shares the host's memory, of which CUDA counts the page cache as used. For such a GPU,
    MemAvailable counts as free, and the host memory of this process counts as used by other processes.

    `others_bytes` is memory that is neither free nor used by this process. NVML knows how much this process uses
    outside of the allocator (the CUDA context, a few hundred MiB). Where NVML does not tell (a container without
    `--pid=host`), that part counts as used by other processes. A sum over NVML's process list would be more direct,
    but a container may see an incomplete list.

    Args:
        device: CUDA device; without an index, the current one.
        limit: Memory that this process may use, see `meter_for`. `limited` makes PyTorch's allocator keep to it.
        host: Reader of the host's memory, for an integrated GPU.
    """

    def __init__(self, device: torch.device, limit: int | float | None = None, host: HostMemory | None = None) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._host = host or HostMemory()
        properties: Any = torch.cuda.get_device_properties(self._device)
        self.kind = "integrated" if properties.is_integrated else "cuda"
        _, self._total_bytes = self._room_bytes()
        self._limited_bytes = limited_bytes(self._total_bytes, limit)
        self._has_limit = limit is not None
        self._nvml = NvmlGpu(self._device)
        self._context_bytes = OnceASecond(self._ask_context_bytes)
        self._busy_percent = OnceASecond(self._nvml.busy_percent)

    def read(self) -> Reading:
        """Read the memory now."""
        counters = self._counters()
        reserved = int(counters["reserved_bytes"]["all"]["current"])
        free, total = self._room_bytes()
        return Reading(
            reserved_bytes=reserved,
            allocated_bytes=int(counters["allocated_bytes"]["all"]["current"]),
            free_bytes=free,
            total_bytes=self._limited_bytes,
            others_bytes=max(0, total - free - reserved - self._context_bytes(reserved)),
        )

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
        """Return a context in which PyTorch's allocator keeps to the limit; without a limit, one that does nothing."""
        if not self._has_limit:
            return nullcontext()
        return _allocator_limited(self._device, self._limited_bytes / torch.cuda.mem_get_info(self._device)[1])

    def stopwatch(self) -> Stopwatch:
        """Start a stopwatch on the device's current stream."""
        return _CudaStopwatch(self._device)

    def busy_percent(self) -> float | None:
        """Return NVML's GPU utilisation in percent, at most a second old; None if NVML does not tell."""
        return self._busy_percent()

    def _counters(self) -> dict[str, Any]:
        # Functions such as `memory_allocated` flatten and sort a hundred counters to return one of them.
        counters: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(self._device)
        return counters

    def _room_bytes(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self._device)
        if self.kind == "integrated":
            host_total, free = self._host.machine_bytes()
            total = min(total, host_total)
        return free, total

    def _ask_context_bytes(self, reserved_bytes: int) -> int:
        return max(0, (self._nvml.own_bytes() or 0) - reserved_bytes)


class _Fraction:
    """Limit of PyTorch's allocator on one device, as a fraction of the device's memory."""

    def __init__(self, value: float) -> None:
        self.value = value


_fractions: dict[int, list[_Fraction]] = {}  # device index → the fraction found there, and those of open contexts


@contextmanager
def _allocator_limited(device: int, value: float) -> Iterator[None]:
    """Limit the allocator. On exit, restore the limit of the open context that opened last, or the original limit.

    Contexts may close in any order: a prediction in a callback ends before its training, a streamed one may end after.
    """
    fractions = _fractions.setdefault(device, [])
    if not fractions:
        read = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # PyTorch 2.3 cannot be asked
        fractions.append(_Fraction(read(device) if read is not None else 1.0))
    mine = _Fraction(value)
    fractions.append(mine)
    torch.cuda.set_per_process_memory_fraction(value, device)
    try:
        yield
    finally:
        fractions.remove(mine)
        torch.cuda.set_per_process_memory_fraction(fractions[-1].value, device)
        if len(fractions) == 1:
            del _fractions[device]


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
