"""Warm-up: a few images run before the first batch, so that the first decisions are based on measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.memory.reading import Meter
from yolov12.mas.oom import Failure
from yolov12.mas.profiling.observations import WholePasses
from yolov12.mas.profiling.profile import Profile
from yolov12.mas.profiling.recorder import Recorder
from yolov12.mas.profiling.solver import peak_bytes
from yolov12.mas.profiling.trace import ByteTrace
from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.time_model import SpeedModel
from yolov12.mas.step.step import Step
from yolov12.mas.task import Workload

__all__ = ["PROFILE_IMAGES", "profile", "warm_up"]

PROFILE_IMAGES = 8
"""Most images that are run to profile layers, unless libraries know a larger size from the warm-up."""
_SIZES = {"cuda": (8, 4, 2, 1), "integrated": (4, 2, 1), "host": (4, 2, 1)}
"""Numbers of images to try, by kind of memory, until one fits. Only one is measured: on a GPU, libraries take seconds
for each new size."""
_SMALL_PX = 128
"""Side of an image up to which the deepest layers of a detector, which see one pixel in 64, may see only one or two."""

_Held = Callable[[], AbstractContextManager[None] | None]


def warm_up(
    step: Step,
    kind: str,
    batch: Any,
    work: Workload,
    cost: CostModel,
    speed: SpeedModel,
    level: int = 0,
    *,
    budget_bytes: float = math.inf,
    group: int = 0,
    held: _Held = nullcontext,
) -> Failure | None:
    """Run a few images: once to load libraries, then to measure memory, also around the image with most boxes.

    A BatchNorm group is tried first, because micro-batches of this size follow, and libraries need not look for kernels
    for another size. If it does not fit, this is no event, and nothing is learned from it.

    On the host, one image or two small ones load the libraries, and memory is measured only around the image with most
    boxes. Nothing enforces a limit there, so several large images run only if the first one has shown that they fit.

    Args:
        step: Runs the images and undoes all effects.
        kind: Kind of memory, see `Meter.kind`.
        batch: First batch of the run, on the host.
        work: Properties of the batch.
        cost: Model of peak bytes; it learns from the measurements.
        speed: Model of times; it notes the size that libraries know now.
        level: Index of the checkpoint plan to use.
        budget_bytes: Memory that this process may use, for the host.
        group: Number of images to try first. It counts only if it is larger than the sizes that are tried anyway.
        held: Returns the context of a pass with `group` images, see `Meter.held_to`.

    Returns:
        None, or the failed allocation if not even one image fits.
    """
    sizes, failure = _SIZES[kind], None
    for size in (group, *sizes) if group > sizes[0] else sizes:
        images, is_trial = min(size, work.images), size > sizes[0]
        with _without_notes(step) if is_trial else nullcontext():
            within = held if is_trial else nullcontext
            found, failure = _measure(step, kind, batch, work, level, images, budget_bytes, within)
        if found and not (is_trial and failure):
            for features, needed_bytes in found:
                cost.observe(features, needed_bytes)
            speed.ran(images, work.height, work.width, timed=False)
            return None
    return failure


@contextmanager
def _without_notes(step: Step) -> Iterator[None]:
    notes, step.notes_tries = step.notes_tries, False
    try:
        yield
    finally:
        step.notes_tries = notes


def _measure(
    step: Step, kind: str, batch: Any, work: Workload, level: int, images: int, budget_bytes: float, held: _Held
) -> tuple[list[tuple[Features, int]], Failure | None]:
    """Return the bytes that images needed above the allocated ones, and the last allocation if it failed."""
    fullest = work.boxes.index(max(work.boxes))
    around = min(fullest, work.images - images)
    layers = partial(step.checkpointing.within, step.plans[level])
    first, starts = images, {0, around}
    if kind == "host":
        # A pass takes long, and one image is enough to load the libraries. BatchNorm needs two if they are so small
        # that a layer sees one pixel of each.
        first, starts = min(images, 1 if min(work.height, work.width) > _SMALL_PX else 2), {around}
    outcome: tuple[int, int] | Failure = step.try_out(batch, 0, first, layers(), held())
    if isinstance(outcome, Failure):
        return [], outcome
    if first == 1 < images and outcome[0] + images * (outcome[1] - outcome[0]) > budget_bytes:
        return [], None
    found = []
    for start in sorted(starts):
        outcome = step.try_out(batch, start, start + images, layers(), held())
        if not isinstance(outcome, Failure):
            allocated_bytes, peak_bytes = outcome
            boxes = max(work.boxes[start : start + images])
            found.append((Features(images, work.height, work.width, boxes, level), peak_bytes - allocated_bytes))
    return found, outcome if isinstance(outcome, Failure) else None


def profile(step: Step, meter: Meter, layers: Mapping[str, nn.Module], batch: Any, images: int) -> Profile | None:
    """Measure the memory and the time of each layer by running a few images a few times.

    Args:
        step: Runs the images, on a model with these layers.
        meter: Meter of the model's device.
        layers: Name → layer, see `checkpointing.layers.candidates`.
        batch: Batch on the host.
        images: Number of images to run. Libraries should know this size. If it does not fit, at most `PROFILE_IMAGES`
            run, halved until they fit.

    Returns:
        The profile; None if not even one image fits.
    """
    while images:
        found = _profile(step, meter, layers, batch, images)
        meter.release()
        if not isinstance(found, Failure):
            return found
        # Sizes that the warm-up tries, too.
        images = PROFILE_IMAGES if images > PROFILE_IMAGES else images // 2
    return None


def _profile(step: Step, meter: Meter, layers: Mapping[str, nn.Module], batch: Any, images: int) -> Profile | Failure:
    recorder = Recorder(step.model, layers, step.checkpointing)
    failure = step.try_out(batch, 0, images, recorder.saved_tensors(meter.stopwatch))
    if isinstance(failure, Failure):
        return failure
    # The resident size of a process is too coarse for single layers. On the host, bytes of tensors are counted.
    with ByteTrace() if meter.kind == "host" else nullcontext(meter) as peaks:
        before_bytes = peaks.mark()
        failure = step.try_out(batch, 0, images, recorder.times_and_peaks(meter.stopwatch, peaks))
        last_peak_bytes = peaks.peak_bytes()
    if isinstance(failure, Failure):
        return failure
    times, keep_bytes = [], math.inf
    for mode in (None, REBUILD, RECOMPUTE):
        plan = Plan(tuple((name, mode) for name in recorder.flexible())) if mode else KEEP_ALL
        best_ms = math.inf
        for _ in range(2):
            watch = meter.stopwatch()
            outcome = step.try_out(batch, 0, images, step.checkpointing.within(plan))
            watch.stop()
            if isinstance(outcome, Failure):
                return outcome
            if mode is None:
                keep_bytes = min(keep_bytes, outcome[1] - outcome[0])
            while (time_ms := watch.elapsed_ms()) is None:  # the device is still at work
                time.sleep(1e-3)
            best_ms = min(best_ms, time_ms)
        times.append(best_ms)
    images_bytes = recorder.allocated_bytes - before_bytes
    if meter.kind == "host":
        return recorder.profile(images, WholePasses(*times), last_peak_bytes, images_bytes)
    # While a micro-batch runs, the images of the next one are copied to the device.
    found = recorder.profile(images, WholePasses(*times), last_peak_bytes, 2 * images_bytes)
    joined_bytes = peak_bytes(found, KEEP_ALL) - (keep_bytes + images_bytes) / images
    return replace(found, joined_bytes=max(joined_bytes, 0.0))
