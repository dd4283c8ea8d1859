"""The first seconds of a run: a few images run and are forgotten, so that the first decision is no guess."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.memory.reading import Meter
from yolov12.mas.oom import Failure
from yolov12.mas.profiling.profile import Profile
from yolov12.mas.profiling.recorder import Recorder, WholePasses
from yolov12.mas.profiling.trace import ByteTrace
from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.time_model import SpeedModel
from yolov12.mas.step.step import Step
from yolov12.mas.task import Workload

__all__ = ["PROFILE_IMAGES", "profile", "warm_up"]

PROFILE_IMAGES = 8
"""At most."""
_SIZES = {"cuda": (8, 4, 2, 1), "integrated": (4, 2, 1), "host": (4, 2, 1)}
"""Images, by kind of memory; the next where one fails. Just one: libraries take seconds for each size that is new."""


def warm_up(
    step: Step, kind: str, batch: Any, work: Workload, cost: CostModel, speed: SpeedModel, level: int = 0
) -> Failure | None:
    """Run a few images, first to load libraries, then to teach the cost model; those around the fullest image too.

    Args:
        step: Runs them.
        kind: Of the meter.
        batch: The first of the run, on the host.
        work: What it is.
        cost: Is taught.
        speed: Is told which size libraries know now.
        level: Of the step's plans.

    Returns:
        None, or how one image failed.
    """
    fullest = work.boxes.index(max(work.boxes))
    outcome: tuple[int, int] | Failure
    for size in _SIZES[kind]:
        images = min(size, work.images)
        around = min(fullest, work.images - images)
        layers = partial(step.checkpointing.within, step.plans[level])
        outcome = step.try_out(batch, 0, images, layers())
        if isinstance(outcome, Failure):
            continue
        for start in (0, around) if around else (0,):
            outcome = step.try_out(batch, start, start + images, layers())
            if not isinstance(outcome, Failure):
                live_bytes, peak_bytes = outcome
                boxes = max(work.boxes[start : start + images])
                cost.observe(Features(images, work.height, work.width, boxes, level), peak_bytes - live_bytes)
        speed.ran(images, work.height, work.width, timed=False)
        return None
    return outcome if isinstance(outcome, Failure) else None


def profile(step: Step, meter: Meter, layers: Mapping[str, nn.Module], batch: Any, images: int) -> Profile | None:
    """Run a few images a few times and say what each layer costs; fewer where they do not fit, None where none do.

    Args:
        step: Runs them, on a model with these layers.
        meter: Of its device.
        layers: See `checkpointing.layers.candidates`.
        batch: On the host.
        images: How many to run; libraries should have seen this number.
    """
    while images:
        found = _profile(step, meter, layers, batch, images)
        meter.release()
        if not isinstance(found, Failure):
            return found
        images //= 2
    return None


def _profile(step: Step, meter: Meter, layers: Mapping[str, nn.Module], batch: Any, images: int) -> Profile | Failure:
    recorder = Recorder(step.model, layers, step.checkpointing)
    failure = step.try_out(batch, 0, images, recorder.saved_tensors(meter.stopwatch))
    if isinstance(failure, Failure):
        return failure
    # A process' resident size is too coarse for layers: on the host bytes are counted as tensors come and go.
    with ByteTrace() if meter.kind == "host" else nullcontext(meter) as peaks:
        failure = step.try_out(batch, 0, images, recorder.times_and_peaks(meter.stopwatch, peaks))
        last_peak_bytes = peaks.peak_bytes()
    if isinstance(failure, Failure):
        return failure
    times = []
    for mode in (None, REBUILD, RECOMPUTE):
        plan = Plan(tuple((name, mode) for name in recorder.flexible())) if mode else KEEP_ALL
        best_ms = math.inf
        for _ in range(2):
            watch = meter.stopwatch()
            failure = step.try_out(batch, 0, images, step.checkpointing.within(plan))
            watch.stop()
            if isinstance(failure, Failure):
                return failure
            while (time_ms := watch.elapsed_ms()) is None:  # the device is on it
                time.sleep(1e-3)
            best_ms = min(best_ms, time_ms)
        times.append(best_ms)
    return recorder.profile(images, WholePasses(*times), last_peak_bytes)
