"""Reads the memory of a CUDA device."""

from __future__ import annotations

import gc
from typing import Any

import torch

from yolov12.mas.memory.host import HostMemory
from yolov12.mas.memory.nvml import NvmlGpu, OnceASecond
from yolov12.mas.memory.reading import Reading, Stopwatch, limited_bytes

__all__ = ["CudaMeter"]


class CudaMeter:
    """Measures a CUDA device through PyTorch's allocator. Nothing but `release` waits for the device.

    An integrated GPU shares the host's memory, of which CUDA counts the page cache as used: there MemAvailable is free,
    and what this process holds as host memory counts as held by others.

    `others_bytes` is what is neither free nor ours; of ours, NVML tells the part outside the allocator (the CUDA
    context, a few hundred MiB). Where it does not (a container without `--pid=host`), that part counts as others'. The
    sum over NVML's process list would be the direct way, but a container may see an incomplete one.

    Args:
        device: The device; without an index, the current one.
        limit: See `meter_for`. Making a meter sets the limit of PyTorch's allocator (to all of the device for None).
        host: Where an integrated GPU's memory is read.
    """

    def __init__(self, device: torch.device, limit: int | float | None = None, host: HostMemory | None = None) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._host = host or HostMemory()
        properties: Any = torch.cuda.get_device_properties(self._device)
        self.kind = "integrated" if properties.is_integrated else "cuda"
        _, self._total_bytes = self._room_bytes()
        self._limited_bytes = limited_bytes(self._total_bytes, limit)
        fraction = 1.0 if limit is None else self._limited_bytes / torch.cuda.mem_get_info(self._device)[1]
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)
        self._nvml = NvmlGpu(self._device)
        self._context_bytes = OnceASecond(self._ask_context_bytes)
        self._busy_percent = OnceASecond(self._nvml.busy_percent)

    def read(self) -> Reading:
        """Read the memory now."""
        counters = self._counters()
        held = int(counters["reserved_bytes"]["all"]["current"])
        free, total = self._room_bytes()
        return Reading(
            held_bytes=held,
            live_bytes=int(counters["allocated_bytes"]["all"]["current"]),
            free_bytes=free,
            total_bytes=self._limited_bytes,
            others_bytes=max(0, total - free - held - self._context_bytes(held)),
        )

    def mark(self) -> int:
        """Forget the peak; return the live bytes now."""
        torch.cuda.reset_peak_memory_stats(self._device)
        return int(self._counters()["allocated_bytes"]["all"]["current"])

    def peak_bytes(self) -> int:
        """Return the highest live bytes since the mark. Exact: the allocator counts when memory is asked for."""
        return int(self._counters()["allocated_bytes"]["all"]["peak"])

    def release(self) -> None:
        """Collect garbage and give the allocator's cache back; waits for the device."""
        gc.collect()
        torch.cuda.empty_cache()

    def close(self) -> None:
        """Let PyTorch's allocator have all of the device again."""
        torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def stopwatch(self) -> Stopwatch:
        """Return a stopwatch that is running on the device's current stream."""
        return _CudaStopwatch(self._device)

    def busy_percent(self) -> float | None:
        """Return NVML's GPU utilisation, at most a second old; None where NVML does not tell."""
        return self._busy_percent()

    def _counters(self) -> dict[str, Any]:
        # `memory_allocated` and its like each flatten and sort a hundred counters to return one of them.
        counters: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(self._device)
        return counters

    def _room_bytes(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self._device)
        if self.kind == "integrated":
            host_total, free = self._host.machine_bytes()
            total = min(total, host_total)
        return free, total

    def _ask_context_bytes(self, held_bytes: int) -> int:
        return max(0, (self._nvml.own_bytes() or 0) - held_bytes)


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
