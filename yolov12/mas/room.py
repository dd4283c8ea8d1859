"""Memory for images on every rank, beside what stays allocated: check whether there is any, and wait for it."""

from __future__ import annotations

import enum
import signal
import time
from collections.abc import Callable

from yolov12.mas.config import Config
from yolov12.mas.distributed.ranks import Ranks
from yolov12.mas.memory.reading import Meter
from yolov12.mas.oom import tell_wait
from yolov12.mas.scheduling.candidates import beside_bytes
from yolov12.mas.scheduling.peak_model import Features
from yolov12.mas.scheduling.planner import WAIT_S, BatchPlanner

__all__ = ["Room"]


class _Status(enum.IntEnum):
    """Memory status of a rank, worst first."""

    STOP_REQUESTED = 0
    """This process was asked to stop."""
    NONE = 1
    """No image fits, even without other processes on the device."""
    IF_OTHERS_RELEASE = 2
    """No image fits unless other processes release memory."""
    SOME = 3
    """There is memory for images."""


class Room:
    """Memory for images on all ranks. All ranks call its methods together.

    Args:
        planner: Predicts what micro-batches need.
        meter: Meter of the model's device.
        config: Settings of the engine.
        ranks: Processes that share each batch.
        log: Takes lines for the log of the training.
    """

    def __init__(
        self, planner: BatchPlanner, meter: Meter, config: Config, ranks: Ranks, log: Callable[[str], None]
    ) -> None:
        self._planner, self._meter, self._config, self._ranks, self._log = planner, meter, config, ranks, log

    def fits(self, features: Features | None) -> bool:
        """Return whether a micro-batch is predicted to fit into the memory that is free now, on every rank.

        Args:
            features: Properties of the micro-batch; None if nothing is known yet: the result is then True.
        """
        if features is None or not self._planner.cost.largest:
            return self._ranks.all(True)
        reading = self._meter.read()
        _, needed_bytes = self._planner.cost.upper(features)
        beside = beside_bytes(reading.allocated_bytes, self._planner.gradient_bytes)
        return self._ranks.all(beside + needed_bytes <= reading.budget_bytes(self._config.safety_ratio))

    def wait(self, stop_requested: Callable[[], bool]) -> tuple[bool, int]:
        """Wait while some rank has no memory for any image, as long as other processes may release memory.

        Args:
            stop_requested: Returns whether this process was asked to stop.

        Returns:
            Whether there is memory now, and the seconds waited. The wait is 0 s if there is memory already, or if there
            would be none even without other processes.

        Raises:
            SystemExit: A rank was asked to stop.
        """
        seconds = 0
        while (least := self._ranks.least(self._status(stop_requested))) == _Status.IF_OTHERS_RELEASE:
            if seconds >= WAIT_S:
                break
            if not seconds:
                self._meter.release()  # another rank may wait for the memory
            others_bytes = self._meter.read().others_bytes if self._ranks.size == 1 else None  # any card may be full
            tell_wait(self._log, others_bytes, seconds, WAIT_S)
            time.sleep(1.0)
            seconds += 1
        if least == _Status.STOP_REQUESTED:
            raise SystemExit(128 + signal.SIGTERM)
        return least == _Status.SOME, seconds

    def _status(self, stop_requested: Callable[[], bool]) -> _Status:
        if stop_requested():
            return _Status.STOP_REQUESTED
        reading, ratio = self._meter.read(), self._config.safety_ratio
        stays_bytes = beside_bytes(reading.allocated_bytes, self._planner.gradient_bytes)
        if stays_bytes < reading.budget_bytes(ratio):
            return _Status.SOME
        if stays_bytes < reading.without_others().budget_bytes(ratio):
            return _Status.IF_OTHERS_RELEASE
        return _Status.NONE
