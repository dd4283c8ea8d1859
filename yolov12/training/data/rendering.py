"""Batches of rendered images.

Samples of a known data set have recipes instead of images (see `recipes`). When a batch is collated, each image is
rendered into its place, or what it is made of is packed for the device (see `augmentation`). In a worker, this place is
in shared memory, so that the batch goes to the training without another copy (see `shared_images`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from yolov12.training.adapter.users_code import is_ultralytics, module_of
from yolov12.training.data.augmentation import Augmentation
from yolov12.training.data.packing import pack
from yolov12.training.data.pixels import Recipe, Renderer
from yolov12.training.data.places import Placed, seeded
from yolov12.training.data.recipes import samples
from yolov12.training.data.shared_images import SharedImages

__all__ = ["Loaded", "Rendering", "give_recipes"]


def give_recipes(dataset: Any) -> None:
    """Let a data set load by place, and give recipes, for the batches that ask for it.

    Args:
        dataset: Data set of a training loader.
    """
    own = getattr(dataset, "__getitems__", None)
    if own is None or not module_of(own).startswith("yolov12."):
        dataset.__getitems__ = _Samples(dataset, own).load


class Loaded(list[Any]):
    """Samples of a batch, with the seed of what is drawn once for all of them; None for random draws."""

    def __init__(self, samples: list[Any], seed: int | None) -> None:
        super().__init__(samples)
        self.seed = seed


class _Samples:
    """Loads the samples of a batch for PyTorch.

    Args:
        dataset: Data set of a training loader.
        own: A `__getitems__` of the data set's own, which gets the whole batch; None without one.
    """

    def __init__(self, dataset: Any, own: Callable[[list[int]], Any] | None) -> None:
        self._dataset, self._own = dataset, own

    def load(self, indices: Sequence[int]) -> Any:
        """Load the samples of a batch. The data set's own method may return something other than a list."""
        seed = indices.seed if isinstance(indices, Placed) else None
        if self._own is None:
            return Loaded(samples(self._dataset, indices), seed)
        with seeded(seed):
            loaded = self._own(list(indices))
        return Loaded(loaded, seed) if isinstance(loaded, list) else loaded


class Rendering:
    """Collate function that renders images before, or instead of, stacking them, or packs them.

    Args:
        collate: Collate function of the loader, which gets whole samples if it is the user's own.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate, self._is_known = collate, is_ultralytics(collate)
        self._renderer = Renderer()
        self.shared: SharedImages | None = None
        """Places of workers for their images; None if each batch gets new shared memory."""
        self._own: Tensor | None = None  # this worker's place, if the batch at hand is written there
        self.augmentation = Augmentation()
        """Decides whether images are rendered here or packed for the device."""

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        """Collate samples, whose images may be recipes."""
        if not any(isinstance(sample, dict) and isinstance(sample.get("img"), Recipe) for sample in samples):
            return self.collate(samples)
        images = [sample["img"] for sample in samples]
        are_bytes = all(isinstance(image, Recipe) or image.dtype == torch.uint8 for image in images)
        if not (self._is_known and are_bytes and len({tuple(image.shape) for image in images}) == 1):
            return self.collate([self._whole(sample) for sample in samples])
        # An empty image keeps the place of the key among the keys of the batch.
        batch = self.collate([{**sample, "img": torch.empty(0, dtype=torch.uint8)} for sample in samples])
        if self.augmentation.is_on_device and images[0].shape[0] in (1, 3):
            packed = pack(images, self._renderer, self._place)
            batch["img"] = packed._replace(pixels=self._passed(packed.pixels))
            return batch
        stacked = self._place((len(images), *images[0].shape))
        for place, image in zip(stacked, images, strict=True):
            self._fill(place, image)
        batch["img"] = self._passed(stacked)
        return batch

    def _place(self, shape: tuple[int, ...]) -> Tensor:
        """Return memory for the images of a batch: the place of this worker, if it is free, or new memory."""
        self._own = self.shared.empty(shape) if self.shared is not None else None
        return _empty(shape) if self._own is None else self._own

    def _passed(self, images: Tensor) -> Any:
        """Return what is sent to the training process instead of images in the result of `_place`."""
        return images if self._own is None or self.shared is None else self.shared.passed(images)

    def _whole(self, sample: Any) -> Any:
        if not isinstance(sample["img"], Recipe):
            return sample
        image = torch.empty(sample["img"].shape, dtype=torch.uint8)
        self._fill(image, sample["img"])
        return {**sample, "img": image}

    def _fill(self, place: Tensor, image: Tensor | Recipe) -> None:
        if isinstance(image, Recipe):
            self._renderer.render(image, place.numpy())
        else:
            place.copy_(image)


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Return a tensor for the images of a batch, in a worker in shared memory."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, np.uint8))  # NumPy asks for huge pages, so that there are few faults
    storage = torch.UntypedStorage._new_shared(torch.Size(shape).numel(), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
