"""Columns of memory.csv and the events in them, each with its meaning. docs/reference/journal.md is made from these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["COLUMNS", "EVENTS", "NEW_COLUMNS", "Column"]


@dataclass(frozen=True)
class Column:
    """One column of memory.csv."""

    name: str
    unit: str
    """Unit of the values; empty for text."""
    meaning: str
    """Meaning, as one sentence or more."""


COLUMNS: tuple[Column, ...] = (
    Column("step", "number", "Number of the optimizer step, from 1. It continues after a resume."),
    Column("epoch", "number", "Number of the epoch, from 1, as Ultralytics prints it."),
    Column(
        "images",
        "images",
        "Images of the batch, which is all that reaches one optimizer step. With several ranks: images of the share "
        "of this rank.",
    ),
    Column(
        "micro_batches",
        "images",
        "Images in each micro-batch, in the order in which they ran, separated by spaces: `64 64 32`. Empty if the "
        "share of this rank was empty.",
    ),
    Column(
        "plan",
        "",
        "Checkpoint plan of the last micro-batch: the layers that were rebuilt and the layers that were recomputed. "
        "Empty if every layer kept everything.",
    ),
    Column("image_size", "pixels", "Height and width of the images: `640x640`."),
    Column("max_boxes", "boxes", "Boxes of the image that has most."),
    Column("predicted_mib", "MiB", "Predicted peak of allocated memory."),
    Column("peak_mib", "MiB", "Measured peak of allocated memory."),
    Column(
        "reserved_mib",
        "MiB",
        "Memory that this process had reserved, with PyTorch's cache. This and the next two columns were read when the "
        "batch began, or after its last failed allocation.",
    ),
    Column("free_mib", "MiB", "Memory that the device could still give, whatever the limit."),
    Column(
        "budget_mib",
        "MiB",
        "Memory that this process could use: reserved + free, or the limit if that is less, minus `mem_safety_ratio` × "
        "total. On a CPU and on an integrated GPU, what loader workers hold is taken off the limit, and on an "
        "integrated GPU also the host memory of this process.",
    ),
    Column(
        "step_ms",
        "ms",
        "Time of forward and backward, with repeated attempts. With several ranks: without waiting for the others. "
        "Empty if it is not known.",
    ),
    Column("images_per_s", "images/s", "`images` divided by the time. Empty if the time is not known."),
    Column(
        "data_wait_ms",
        "ms",
        "Time for which the device had nothing to do because the data loader had no batch. This and the next two "
        "columns are sums over the batches of the step, and empty with a data loader or data set of your own.",
    ),
    Column("decode_ms", "ms", "Time in which a worker read and decoded images, or took them from a cache."),
    Column("augment_ms", "ms", "Time in which a worker did everything else: labels, augmentation, collation."),
    Column(
        "period_ms",
        "ms",
        "Time since the update before: waiting for data, the step, the optimizer and everything else. Empty for the "
        "first update of an epoch.",
    ),
    Column(
        "power_w",
        "W",
        "Power of the GPU, or on a Jetson of the whole module. This and the next column are at most a second old, and "
        "empty where nothing measures them.",
    ),
    Column("temperature_c", "°C", "Temperature of the GPU."),
    Column("replayed", "micro-batches", "Micro-batches that were replayed as CUDA graphs, see `cuda_graphs`."),
    Column("events", "", "What happened in this step, separated by `; `. See below."),
)
"""In the order of the file."""

NEW_COLUMNS = frozenset(
    {"power_w", "temperature_c", "data_wait_ms", "decode_ms", "augment_ms", "period_ms", "replayed"}
)
"""Columns that a file of an earlier version does not have, even if a resumed run continues it."""

EVENTS: Mapping[str, str] = {
    "batch of N did not fit": "A batch of N images did not fit at once with everything kept. It ran in parts, or with "
    "layers recomputed. Noted again only for a larger batch.",
    "share of N did not fit": "The same, with several ranks: N images are the share of this rank.",
    "out-of-memory at N": "An allocation failed in a micro-batch of N images. The micro-batch ran again.",
    "out-of-memory between micro-batches": "An allocation failed while a batch was looked at, while its "
    "micro-batches were combined, or before the first update. That was repeated.",
    "out-of-memory in a copy": "The next micro-batch could not be copied to the device ahead. It was copied later.",
    "out-of-memory in a warm-up": "An allocation failed in a warm-up, or while layers were profiled. Fewer images were "
    "tried, or another plan.",
    "out-of-memory in a capture": "An allocation failed while a CUDA graph was captured. Micro-batches of "
    "that size run without a graph.",
    "retried N": "The failed micro-batch of N images ran again unchanged, and succeeded.",
    "shrunk A to B": "Micro-batches became smaller: from A to B images.",
    "grew A to B": "Micro-batches became larger: from A to B images.",
    "plan A to B": "Another checkpoint plan is used. Plan 0 keeps everything; a higher plan keeps less memory.",
    "groups of N": "Not even one BatchNorm group fitted, so this batch was normalised in groups of N images.",
    "waited N s": "The engine waited N seconds for other processes to release memory.",
    "waited N s for room": "The same, before images were made smaller.",
    "image size A to B": "The data layer changed the image size from A to B pixels.",
    "workers A to B": "From here on, B workers load the data instead of A, see `auto_workers`.",
    "augmentation to the device": "From here on, images are augmented on the device, see `augment_on=auto`.",
    "out-of-memory in the optimizer": "The first update ran out of memory. It was undone and ran again.",
    "over the limit of N MiB": "The peak, with what workers held, was above `mem_limit`: nothing enforces it on a CPU.",
    "resumed": "The run was resumed before this step, from the end of an epoch.",
    "resumed after step N": "The run was resumed in the middle of an epoch. Step N is the last one before it.",
}
"""Event → its meaning. N, A and B are numbers."""
