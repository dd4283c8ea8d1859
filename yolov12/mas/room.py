"""Room for images beside what stays allocated: whether there is some on every rank, and waiting for it."""

from __future__ import annotations

import enum
import signal
import time
from collections.abc import Callable

from yolov12.mas.config import Config
from yolov12.mas.distributed.ranks import Ranks
from yolov12.mas.memory.reading import Meter
from yolov12.mas.scheduling.candidates import beside_bytes
from yolov12.mas.scheduling.peak_model import Features
from yolov12.mas.scheduling.planner import WAIT_S, BatchPlanner

__all__ = ["Room"]


class _Status(enum.IntEnum):
    """Room on one rank, worst first."""

    STOP_REQUESTED = 0
    NONE = 1
    IF_OTHERS_RELEASE = 2  # other processes
    SOME = 3


class Room:
    """Room for images on all ranks, which call its methods together.

    Args:
        planner: Knows what micro-batches need.
        meter: Meter of the model's device.
        config: Settings of the engine.
        ranks: Processes that share each batch.
    """

    def __init__(self, planner: BatchPlanner, meter: Meter, config: Config, ranks: Ranks) -> None:
        self._planner, self._meter, self._config, self._ranks = planner, meter, config, ranks

    def fits(self, features: Features | None) -> bool:
        """Return whether a micro-batch is predicted to fit into what is free now, on every rank.

        Args:
            features: Shape of the micro-batch; None if nothing is known yet, which counts as fitting.
        """
        if features is None or not self._planner.cost.largest:
            return self._ranks.all(True)
        reading = self._meter.read()
        _, needed_bytes = self._planner.cost.upper(features)
        beside = beside_bytes(reading.live_bytes, self._planner.gradient_bytes)
        return self._ranks.all(beside + needed_bytes <= reading.budget_bytes(self._config.safety_ratio))

    def wait(self, stop_requested: Callable[[], bool]) -> tuple[bool, int]:
        """Wait while no image of any size has room on some rank, if other processes may release memory.

        Args:
            stop_requested: Returns whether this process was asked to stop.

        Returns:
            Whether there is room now, and the seconds it took: 0 if there was nothing to wait for, as there is room or
            would be none without other processes.

        Raises:
            SystemExit: A rank was asked to stop.
        """
        seconds = 0
        while (least := self._ranks.least(self._status(stop_requested))) == _Status.IF_OTHERS_RELEASE:
            if seconds >= WAIT_S:
                break
            if not seconds:
                self._meter.release()  # another rank may be waiting for it
            time.sleep(1.0)
            seconds += 1
        if least == _Status.STOP_REQUESTED:
            raise SystemExit(128 + signal.SIGTERM)
        return least == _Status.SOME, seconds

    def _status(self, stop_requested: Callable[[], bool]) -> _Status:
        if stop_requested():
            return _Status.STOP_REQUESTED
        reading, ratio = self._meter.read(), self._config.safety_ratio
        stays_bytes = beside_bytes(reading.live_bytes, self._planner.gradient_bytes)
        if stays_bytes < reading.budget_bytes(ratio):
            return _Status.SOME
        if stays_bytes < reading.without_others().budget_bytes(ratio):
            return _Status.IF_OTHERS_RELEASE
        return _Status.NONE
