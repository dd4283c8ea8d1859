"""Forward passes without gradients, split into slices that fit into memory: for validation and prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from yolov12.mas.config import Config
from yolov12.mas.memory.reading import Meter
from yolov12.mas.oom import does_not_fit, is_out_of_memory, tried_to_allocate
from yolov12.mas.scheduling.peak_model import CostModel, Features

__all__ = ["Slices"]

Found = TypeVar("Found")

_LARGEST_STEP = 8  # largest slice as a multiple of the largest one that ran: predictions beyond are guesses


class Slices:
    """Runs work on slices of batches, with as many images per slice as fit into memory.

    Args:
        config: Settings of the engine; `safety_ratio`, `limit` and `micro_batch` are used.
        meter: Meter of the device.
    """

    def __init__(self, config: Config, meter: Meter) -> None:
        self._config, self.meter = config, meter
        self._cost = CostModel()
        self._largest = 0  # most images in a slice that ran
        self.peak_bytes = 0
        """Highest peak so far, also of slices that failed."""
        self.failures = 0
        """Number of allocations that have failed so far."""

    @property
    def over_limit(self) -> str:
        """Words for the log about a peak above `mem_limit`; empty if there was none."""
        reading = self.meter.read()
        limit_bytes = reading.total_bytes
        if self._config.limit is None or self.peak_bytes <= limit_bytes - reading.outside_bytes:
            return ""
        beside = f" beside {reading.outside_bytes / 2**20:,.0f} MiB of this run's own" if reading.outside_bytes else ""
        return f"peaked at {self.peak_bytes / 2**20:,.0f} MiB{beside}, over the limit of {limit_bytes / 2**20:,.0f} MiB"

    def run(
        self,
        images: int,
        height: int,
        width: int,
        work: Callable[[int, int], Found],
        at_once: Callable[[], bool] = lambda: False,
    ) -> list[Found]:
        """Run work on all images of a batch.

        Args:
            images: Number of images in the batch.
            height: Height of every image in pixels.
            width: Width of every image in pixels.
            work: Called with `start` and `stop`; runs images `start` to `stop` and returns their result. If an
                allocation fails in it, it is called again with fewer images, so it must have no other effect.
            at_once: Returns True if the whole batch should run at once, unless it is known not to fit, or a limit is
                set. It is asked only where nothing is known about such large slices yet.

        Returns:
            Results of `work`, in the order of the images.

        Raises:
            DoesNotFitError: Not even one image fits into memory.
        """
        found: list[Found] = []
        start, most = 0, images
        self._cost.new_batch()
        while start < images:
            count = min(self._count(images - start, height, width, at_once), most)
            allocated_bytes, failure = self.meter.mark(), ""
            try:
                found.append(work(start, start + count))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error) or type(error).__name__
            peak_bytes = self.meter.peak_bytes()
            self.peak_bytes = max(self.peak_bytes, peak_bytes)
            if failure:  # outside of the `except` block, whose traceback kept the tensors allocated
                self._learn(Features(count, height, width, 0), failure)
                most = count // 2
                continue
            self._cost.observe(Features(count, height, width, 0), peak_bytes - allocated_bytes)
            self._largest = max(self._largest, count)
            start += count
        return found

    def _count(self, images: int, height: int, width: int, at_once: Callable[[], bool]) -> int:
        """Return the size of the next slice: one image while nothing is known about its memory, or all if `at_once()`.

        Slices are equal, as libraries search kernels for every new size.
        """
        if self._config.micro_batch is not None:
            return min(self._config.micro_batch, images)
        most = min(_LARGEST_STEP * self._largest, images) or 1
        if most < images and self._config.limit is None and at_once():
            most = images
        reading = self.meter.read()
        room_bytes = reading.budget_bytes(self._config.safety_ratio) - reading.allocated_bytes
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
                roomy_bytes = (needed_bytes + reading.outside_bytes) / (1 - self._config.safety_ratio)
                ways.insert(0, f"a mem_limit above {roomy_bytes / 2**20:,.0f} MiB")
            cause = failure if needed_bytes <= budget_bytes else ""
            raise does_not_fit(needed_bytes, budget_bytes, reading.free_bytes, ways, cause)
        if self._cost.largest:
            self._cost.observe_failure(features, budget_bytes - reading.allocated_bytes)
