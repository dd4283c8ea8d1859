"""Values of a batch, told apart by what they are: entries for images, entries for objects, or one for the batch.

Ultralytics' losses read a few keys. A collate function or `preprocess_batch` of the user's own may add any others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolov12.training.data.device_rendering import PackedTensor

__all__ = ["Belongs", "Nest", "Values", "entries", "is_nest"]


class Belongs(Enum):
    """What a value of a batch belongs to."""

    IMAGES = "one entry for each image"
    OBJECTS = "one entry for each object"
    BATCH = "one value of the whole batch"
    UNKNOWN = "entries for neither images nor objects, or for either"


class Values:
    """Tells what the values of a training's batches belong to.

    Numbers, strings, dictionaries, None and everything else without an order belong to the batch. A tensor, array, list
    or tuple belongs to what it has the same length as. If a batch has as many objects as images, an earlier batch
    decides.

    Args:
        objects: Keys of Ultralytics' own values with an entry for each object.
    """

    def __init__(self, objects: Iterable[str]) -> None:
        self._objects = frozenset((*objects, "batch_idx"))
        self._seen: dict[str, Belongs] = {"img": Belongs.IMAGES} | dict.fromkeys(self._objects, Belongs.OBJECTS)

    def of(self, batch: Mapping[str, Any]) -> dict[str, Belongs]:
        """Return what each value of a batch belongs to.

        Args:
            batch: Batch with images `img`, and with `batch_idx`, the index of the image of each object.
        """
        return {key: self._one(key, value, batch) for key, value in batch.items()}

    def _one(self, key: str, value: Any, batch: Mapping[str, Any]) -> Belongs:
        if not _has_order(value):
            return Belongs.BATCH
        images, image_of = len(batch["img"]), batch["batch_idx"]
        fits = [Belongs.IMAGES] * (len(value) == images) + [Belongs.OBJECTS] * (len(value) == len(image_of))
        if len(fits) < 2:
            self._seen.setdefault(key, fits[0] if fits else Belongs.UNKNOWN)
        elif key not in self._seen and bool((image_of == torch.arange(images, device=image_of.device)).all()):
            return Belongs.IMAGES  # image and object have the same index
        known = self._seen.get(key, Belongs.UNKNOWN)
        return known if known in fits else Belongs.UNKNOWN


def entries(value: Any, which: slice | Tensor) -> Any:
    """Return some entries of a value.

    Args:
        value: Tensor, array, list or tuple.
        which: A slice, or the indices of the entries on the host.
    """
    if isinstance(which, slice) and isinstance(value, PackedTensor):
        return value.part(which.start, which.stop)
    if isinstance(which, slice) or isinstance(value, Tensor):
        return value[which]
    if isinstance(value, np.ndarray):
        return value[which.numpy()]
    return type(value)([value[index] for index in which.tolist()])


class Nest:
    """Holds a container in which a copy to the device would move tensors that stock's preprocessing leaves.

    Args:
        value: The container.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


def is_nest(value: Any) -> bool:
    """Return whether a value is a dictionary, or a list or tuple with tensors or dictionaries in it."""
    if isinstance(value, (list, tuple)):
        return any(isinstance(each, Tensor) or is_nest(each) for each in value)
    return isinstance(value, Mapping)


def _has_order(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, (Tensor, np.ndarray)) else isinstance(value, (list, tuple))
