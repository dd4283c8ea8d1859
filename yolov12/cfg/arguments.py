"""Every argument that this package adds to Ultralytics: default, values, effect.

The one table of them. Ultralytics' own configuration gets the defaults from here while it is imported, so this module
imports nothing that Ultralytics does not load anyway: neither the engine nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ARGUMENTS", "DATA", "ENGINE", "EXPORT", "RUN", "Argument", "add_arguments", "add_switches", "defaults"]

ENGINE, DATA, RUN, EXPORT = "engine", "data layer", "run", "export"
"""Groups of arguments: the memory-aware engine, image sizes and augmentation, whole runs, exported models."""


@dataclass(frozen=True)
class Argument:
    """One argument, as users write it."""

    name: str
    default: Any
    values: str
    """Permitted values, with their unit and an example."""
    help: str
    """Effect, as one sentence."""
    group: str
    """`ENGINE`, `DATA`, `RUN` or `EXPORT`."""
    commands: tuple[str, ...] = ("train",)
    """Commands of `yolov12` that read it."""


ARGUMENTS: tuple[Argument, ...] = (
    Argument(
        "mas",
        True,
        "True or False",
        "Let the memory-aware engine (memory-aware scheduling, MAS) run every batch in parts that fit into the free "
        "memory; with False, Ultralytics runs them.",
        ENGINE,
        ("train", "val", "predict", "export"),
    ),
    Argument(
        "mem_safety_ratio",
        0.10,
        "fraction of the device's memory, from 0 to 0.9",
        "Keep this fraction of the device's memory out of every plan, as a margin for fragmentation and for other "
        "processes.",
        ENGINE,
        ("train", "val", "predict", "export"),
    ),
    Argument(
        "mem_limit",
        None,
        "bytes with a unit, as in 16GiB, or a fraction of the device, as in 0.5; None: what is free",
        "Use at most this much memory: PyTorch's allocator stops there too, so a GPU can be shared with other "
        "processes, and an exported model is split to fit; on the CPU and an integrated GPU, child processes count, "
        "such as loader workers.",
        ENGINE,
        ("train", "val", "predict", "export"),
    ),
    Argument(
        "bn_group",
        "auto",
        "number of images, auto, or 0 for those of the micro-batch",
        "Normalise this many images together in BatchNorm, however a batch is split; auto takes the largest of 32, 16, "
        "8, 4, 2 and 1 that fits, and with 0 the gradient depends on the split.",
        ENGINE,
    ),
    Argument(
        "exact",
        True,
        "True or False",
        "Give a batch that is split the exact gradient in every task: for losses with several normalisers "
        "(segmentation, pose, models with two heads) its forward pass then runs twice; False weights the parts by "
        "their numbers of images instead, which is faster.",
        ENGINE,
    ),
    Argument(
        "micro_batch",
        None,
        "number of images; None: chosen for each batch by the free memory",
        "Run this many images through the model at once, and fewer only after an allocation of that size has failed.",
        ENGINE,
        ("train", "val", "predict"),
    ),
    Argument(
        "disable_mas_layers",
        None,
        "names of layers, as in ['backbone.4','neck.2']",
        "Keep the activations of these layers always, instead of recomputing them in the backward pass.",
        ENGINE,
    ),
    Argument(
        "cuda_graphs",
        None,
        "True or False; None: True with PyTorch 2.11 or later in one process",
        "On a GPU, replay the kernels of small micro-batches as CUDA graphs, where the GPU would wait for the CPU to "
        "launch them one by one.",
        ENGINE,
    ),
    Argument(
        "recipe",
        True,
        "True or False",
        "Train YOLOv12 models with the official augmentation and warm-up values of their scale, where you give none of "
        "your own.",
        RUN,
    ),
    Argument(
        "save_every",
        "5min",
        "time, as in 30s, 5min or 2h; a number of optimizer steps, as in 100; or 0",
        "Save the run this often in the middle of an epoch, for an exact resume; with 0 only when it is interrupted.",
        RUN,
    ),
    Argument(
        "mas_data",
        "auto",
        "auto, eager or off",
        "Load smaller images, with less mosaic and mixing, if a batch fits in no other way (auto), as soon as a "
        "BatchNorm group does not fit with all activations kept (eager), or never (off).",
        DATA,
    ),
    Argument(
        "augment_on",
        "auto",
        "host, device or auto",
        "Augment images in the loader's workers (host), on the device (device), or on the GPU after an epoch that "
        "waited for data for a tenth of its time or more (auto).",
        DATA,
    ),
    Argument(
        "mas_min_imgsz",
        None,
        "pixels, as in 320; None: half of imgsz",
        "Make images no smaller than this.",
        DATA,
    ),
    Argument(
        "auto_workers",
        None,
        "True or False; None: True unless you give workers",
        "Choose the number of loader workers: at first workers, or the number of cores if that is less; after an epoch "
        "in which the GPU waited for data a tenth of the time or more, a larger number, if cores and memory allow and "
        "if it turns out to be faster.",
        DATA,
    ),
    Argument(
        "replay",
        None,
        "path of a data set yaml, or demo:...; None: no other data",
        "Mix images of this older data set into the training, so that the model forgets less of its classes; their "
        "labels get the class ids of data= by name.",
        DATA,
    ),
    Argument(
        "replay_fraction",
        0.3,
        "fraction, between 0 and 1",
        "Let this fraction of the images of each epoch come from replay.",
        DATA,
    ),
    Argument(
        "rename",
        None,
        "dictionary of old and new class names, as in {'scratch': 'groove'}; None: no class was renamed",
        "Let a class of the model keep its weights, and a class of replay its labels, under a new name in data=.",
        DATA,
    ),
    Argument(
        "engine_builder",
        "auto",
        "auto, tensorrt or tensorrt_rtx",
        "Build engines (format=engine) with this library; auto takes TensorRT, or TensorRT-RTX if only that is "
        "installed.",
        EXPORT,
        ("export",),
    ),
)
"""In the order in which they are listed."""


def defaults(*groups: str) -> dict[str, Any]:
    """Defaults by argument name.

    Args:
        groups: Groups to take; all of them if none is given.
    """
    return {each.name: each.default for each in ARGUMENTS if not groups or each.group in groups}


def add_arguments(configuration: Any) -> Any:
    """Add the arguments to Ultralytics' defaults, in place.

    Args:
        configuration: `DEFAULT_CFG_DICT`, or `DEFAULT_CFG`, which is a namespace.

    Returns:
        The same object.
    """
    target: Any = configuration if isinstance(configuration, Mapping) else vars(configuration)
    target.update(defaults())
    return configuration


def add_switches(names: frozenset[str]) -> frozenset[str]:
    """Add the arguments that are True or False to `CFG_BOOL_KEYS`, whose values Ultralytics checks."""
    return names | {name for name, default in defaults().items() if isinstance(default, bool)}
