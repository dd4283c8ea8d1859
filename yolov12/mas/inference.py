"""Batches without gradients, run in slices that fit: what validation and prediction need of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from yolov12.mas.config import Config
from yolov12.mas.memory.reading import Meter
from yolov12.mas.oom import does_not_fit, is_out_of_memory, tried_to_allocate
from yolov12.mas.scheduling.peak_model import CostModel, Features

__all__ = ["Slices"]

Found = TypeVar("Found")

_FIRST = 8  # images, while nothing is known
_LARGEST_STEP = 4  # a prediction further out than this times what was observed is a guess


class Slices:
    """Runs something on parts of batches, as many images at once as fit.

    Args:
        config: Of which `safety_ratio`, `limit` and `micro_batch` count.
        meter: Of the device.
    """

    def __init__(self, config: Config, meter: Meter) -> None:
        self._config, self.meter = config, meter
        self._cost = CostModel()
        self.failures = 0
        """Allocations that failed so far."""

    def run(self, images: int, height: int, width: int, work: Callable[[int, int], Found]) -> list[Found]:
        """Do all images of a batch.

        Args:
            images: In the batch.
            height: Of each of them.
            width: Of each of them.
            work: Does images `start` to `stop`. When an allocation fails in it, it is called again with fewer: what it
                changes must be in what it returns.

        Returns:
            What `work` returned, in the order of the images.

        Raises:
            DoesNotFitError: Not even one image gets through.
        """
        found: list[Found] = []
        start, most = 0, images
        self._cost.new_batch()
        while start < images:
            count = min(self._count(images - start, height, width), most)
            live_bytes, failure = self.meter.mark(), ""
            try:
                found.append(work(start, start + count))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error) or type(error).__name__
            if failure:  # out of the `except` block: its traceback held what had been allocated
                self._learn(Features(count, height, width, 0), failure)
                most = count // 2
                continue
            self._cost.observe(Features(count, height, width, 0), self.meter.peak_bytes() - live_bytes)
            start += count
        return found

    def _count(self, images: int, height: int, width: int) -> int:
        """Slices are level: libraries look for kernels when a size is new."""
        if self._config.micro_batch is not None:
            return min(self._config.micro_batch, images)
        most = min(_LARGEST_STEP * self._cost.largest, images) or min(_FIRST, images)
        reading = self.meter.read()
        room_bytes = reading.budget_bytes(self._config.safety_ratio) - reading.live_bytes
        for parts in range(-(-images // most), images + 1):
            count = -(-images // parts)
            if not self._cost.largest or self._cost.upper(Features(count, height, width, 0))[1] <= room_bytes:
                return count
        return 1

    def _learn(self, features: Features, failure: str) -> None:
        needed_bytes = self.meter.peak_bytes() + tried_to_allocate(failure)
        self.failures += 1
        self.meter.release()
        reading = self.meter.read()
        budget_bytes = reading.budget_bytes(self._config.safety_ratio)
        if features.images == 1:
            ways = ["smaller images", "a smaller model", "a larger device"]
            if self._config.limit is not None:
                ways.insert(0, f"a mem_limit above {needed_bytes / 2**20:,.0f} MiB")
            raise does_not_fit(needed_bytes, budget_bytes, reading.free_bytes, ways)
        if self._cost.largest:
            self._cost.observe_failure(features, budget_bytes - reading.live_bytes)
