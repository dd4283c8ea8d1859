"""What to do if a training waits for its data, from what was measured and what the machine has left."""

from __future__ import annotations

import math
from typing import Any

from yolov12.mas.journal.summary import Summary
from yolov12.mas.memory.host import HostMemory
from yolov12.training.data.host import cache_room_bytes, is_cached, room_for_workers
from yolov12.training.data.places import chooses_by_place
from yolov12.training.data.workers import cores_of_rank

__all__ = ["waited_for_data"]

_WORTH_SAYING_PERCENT = 10.0
_WORTH_CACHING = 0.2
"""Smallest part of the workers' time for decoding from which cached images are advised."""


def waited_for_data(trainer: Any, loader: Any, summary: Summary, memory: HostMemory | None = None) -> str:
    """Return a line for the end of a training that waited for its data in a tenth of the time or more.

    Args:
        trainer: Ultralytics trainer at the end of its training.
        loader: Its training loader; None if it is the user's own, so that no waits were measured since the last start.
        summary: Summary of the training.
        memory: Reader of the host's memory.

    Returns:
        The line, which begins with a line break; empty if there is nothing to say.
    """
    percent = summary.data_wait_percent
    if loader is None or percent is None or percent < _WORTH_SAYING_PERCENT:
        return ""
    who = f"GPU{'s' * (trainer.world_size > 1)}" if trainer.device.type == "cuda" else "training"
    memory, ways = memory or HostMemory(), []
    if isinstance(trainer.args.imgsz, int):
        ways = [*_more_workers(trainer, loader, memory), *_cached_images(trainer, loader, summary, memory)]
        ways += _on_device(trainer, loader, memory)
    advice = ", ".join(ways) or "the loader needs more CPU cores, or less augmentation"
    return f"\ndata: the {who} waited for data {percent:.0f} % of the time: {advice}"


def _more_workers(trainer: Any, loader: Any, memory: HostMemory) -> list[str]:
    """Advise a worker for each core but one, which is for the training process, as far as they have room.

    A number that is chosen by measuring is left as it is.
    """
    if trainer.args.auto_workers and chooses_by_place(loader.dataset):
        return []
    most = cores_of_rank(trainer) - 1
    if trainer.device.type != "cuda" or loader.num_workers >= most:
        return []
    fitting = room_for_workers(trainer, most, memory)
    return [f"more workers (workers={fitting})"] if fitting > loader.num_workers else []


def _on_device(trainer: Any, loader: Any, memory: HostMemory) -> list[str]:
    """Advise augmentation on the device if it is possible, and if packed images have room."""
    fits = room_for_workers(trainer, loader.num_workers, memory, are_packed=True) >= loader.num_workers
    return ["augment_on=device"] if fits and loader.augmentation.would_help() else []


def _cached_images(trainer: Any, loader: Any, summary: Summary, memory: HostMemory) -> list[str]:
    """Advise cached images if decoding takes a considerable part of the workers' time, and if they fit into memory."""
    decode_ms, augment_ms = summary.decode_ms, summary.augment_ms
    if is_cached(trainer.args) or decode_ms is None or augment_ms is None:
        return []
    if decode_ms < _WORTH_CACHING * (decode_ms + augment_ms):
        return []
    data_sets = [loader.dataset, getattr(getattr(trainer, "test_loader", None), "dataset", None)]
    needed_bytes = sum(_bytes_in_memory(dataset, trainer.args.imgsz) for dataset in data_sets)
    if needed_bytes <= cache_room_bytes(trainer, memory):
        return [f"cache=ram ({needed_bytes / 2**20:,.0f} MiB)"]
    return ["cache=disk"] if str(trainer.args.cache).lower() != "disk" else []


def _bytes_in_memory(dataset: Any, image_size: int) -> int:
    """Return the bytes of all images of a data set as Ultralytics keeps them: the longer side has the image size."""
    total = 0
    labels = getattr(dataset, "labels", None)
    for label in labels if isinstance(labels, list) else ():
        # With rect=True, or in a data set of the user's own, there is no shape.
        height, width = (label.get("shape") if isinstance(label, dict) else None) or (image_size, image_size)
        ratio = image_size / max(height, width)
        total += 3 * min(math.ceil(height * ratio), image_size) * min(math.ceil(width * ratio), image_size)
    return total
