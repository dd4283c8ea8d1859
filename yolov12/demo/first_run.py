"""The first run: what `yolov12 train` does without arguments, and what it says to try next.

It teaches the weights that come with this package two new classes, with a batch that does not fit into the memory that
it may use. On two CPU cores this takes a few minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import LogRecord
from pathlib import Path
from typing import Any

from yolov12.models.weight_names import DEMO

__all__ = ["MODEL", "arguments", "next_steps", "without_frozen_parameters"]

MODEL = DEMO
"""Model of a training without `model=` and `data=`."""

# The first layers know boards and parts already: without their backward pass, steps are faster, and less is forgotten.
# No layer recomputes, as a profile takes seconds that a run of minutes does not win back.
_NEW_CLASSES: Mapping[str, Any] = {
    "data": "demo",
    "epochs": 8,
    "imgsz": 320,
    "batch": 64,
    "bn_group": 16,
    "disable_mas_layers": "model",
    "freeze": 9,
    "optimizer": "AdamW",
    "lr0": 0.001,
    "warmup_epochs": 0,
    "close_mosaic": 4,
}
# A process on the CPU has about 0.8 GiB without any image. On a GPU, only what PyTorch allocates counts. On an
# integrated GPU, the host memory of the process counts too, and how much that is depends on the module.
_LIMITS: Mapping[str, str] = {"cpu": "1.9GiB", "cuda": "0.7GiB"}

# Another model learns all classes anew: many small steps, mosaic in the first epoch only.
_ALL_CLASSES: Mapping[str, Any] = {
    "data": "demo",
    "epochs": 5,
    "imgsz": 256,
    "batch": 4,
    "nbs": 4,
    "optimizer": "AdamW",
    "lr0": 0.003,
    "warmup_epochs": 0.5,
    "close_mosaic": 4,
}


def arguments(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a training without `data=`. Those that the user gives replace them.

    The memory limit is that of the demo model and its image size: nothing else has to fit into it.

    Args:
        model: The `YOLO` object.
        given: Argument name → value that the user has given.
    """
    if not model.ckpt:
        return dict(_ALL_CLASSES)
    import torch

    from yolov12.mas.memory.meter import shares_memory

    is_cpu = str(given.get("device")) == "cpu" or not torch.cuda.is_available()
    is_other = given.get("model") not in (None, MODEL) or "imgsz" in given or given.get("mas") is False
    if is_other or (not is_cpu and shares_memory(torch.device("cuda"))):
        return dict(_NEW_CLASSES)
    return {**_NEW_CLASSES, "mem_limit": _LIMITS["cpu" if is_cpu else "cuda"]}


@contextmanager
def without_frozen_parameters() -> Iterator[None]:
    """Return a context in which Ultralytics does not log each frozen parameter, which are 196 lines here."""
    from ultralytics.utils import LOGGER

    def is_another(record: LogRecord) -> bool:
        return not str(record.msg).startswith("Freezing layer '")

    LOGGER.addFilter(is_another)
    try:
        yield
    finally:
        LOGGER.removeFilter(is_another)


def next_steps(best: Path) -> list[tuple[str, str]]:
    """Return what to try after the first run: commands, each with its purpose.

    Args:
        best: Weights that were trained.
    """
    return [
        (f"yolov12 predict model={best}", "look at what it finds on the validation images"),
        ("yolov12 train batch=128", "a larger batch in the same memory"),
        (f"yolov12 train model={best} data=yours.yaml", "your own images"),
    ]
