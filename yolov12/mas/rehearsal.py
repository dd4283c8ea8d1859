"""The first seconds of a run: a few images run and are forgotten, so that the first decision is no guess."""

from __future__ import annotations

from typing import Any

from yolov12.mas.cost import CostModel, Features
from yolov12.mas.step import Failure, Step
from yolov12.mas.task import Workload

__all__ = ["GROUPS", "rehearse"]

GROUPS = (32, 16, 8, 4, 2, 1)
"""What `bn_group=auto` chooses from. 32 is the share of one GPU in the official recipe, 256 on 8."""
_SIZES = {"cuda": (8, 4, 2, 1), "integrated": (4, 2, 1), "host": (4, 2, 1)}
"""Images, by kind of memory; the next where one fails. Just one: libraries take seconds for each size that is new."""


def rehearse(step: Step, kind: str, batch: Any, work: Workload, cost: CostModel) -> Failure | None:
    """Run a few images, first to load libraries, then to teach the cost model; those around the fullest image too.

    Args:
        step: Runs them.
        kind: Of the meter.
        batch: The first of the run, on the host.
        work: What it is.
        cost: Is taught.

    Returns:
        None, or how one image failed.
    """
    fullest = work.boxes.index(max(work.boxes))
    outcome: tuple[int, int] | Failure
    for size in _SIZES[kind]:
        images = min(size, work.images)
        around = min(fullest, work.images - images)
        outcome = step.rehearse(batch, 0, images)
        if isinstance(outcome, Failure):
            continue
        for start in (0, around) if around else (0,):
            outcome = step.rehearse(batch, start, start + images)
            if not isinstance(outcome, Failure):
                live_bytes, peak_bytes = outcome
                boxes = max(work.boxes[start : start + images])
                cost.observe(Features(images, work.height, work.width, boxes), peak_bytes - live_bytes)
        return None
    return outcome if isinstance(outcome, Failure) else None
