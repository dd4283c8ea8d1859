"""What of a batch is plotted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from yolov12.training.adapter.batch_values import entries
from yolov12.training.adapter.deferred_tensor import made
from yolov12.training.adapter.detection import DetectionTask

__all__ = ["drawn"]

_DRAWN = 16  # number of images of a batch that Ultralytics plots


def drawn(
    host: dict[str, Any], task: DetectionTask, preprocess: Callable[[dict[str, Any]], dict[str, Any]] | None
) -> dict[str, Any]:
    """Return the batch to plot. Ultralytics' own function draws only some images, and accepts them on the host.

    Args:
        host: Batch of the loader, which the task has run.
        task: Splits the batch.
        preprocess: Preprocesses a part as for the model; None if it leaves what is seen as it is.
    """
    count = min(_DRAWN, len(host["img"]))
    if preprocess is None:
        # Rendered here, and not in the thread that plots.
        return {**host, "img": made(entries(host["img"], slice(0, count)))}
    return preprocess(task.opened(task.part(host, 0, count)))
