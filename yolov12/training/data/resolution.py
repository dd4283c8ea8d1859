"""Resolution control: smaller images with less mosaic and mixing, if nothing else makes a batch fit.

Resolution steps lead from the full image size down in multiples of the model's stride. Workers share the index of the
current step and read it before each batch. A batch that was loaded before the step changed is resized when it arrives.
Several ranks load a batch at the step that was settled when they drew it (see `sharing`), as each loads a part.
"""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
from torch import Tensor
from torch.nn.functional import interpolate

from yolov12.training.data.places import forget
from yolov12.training.data.recipes import samples
from yolov12.training.data.shared_number import SharedNumber

__all__ = ["ResolutionControl", "ResolutionStep", "resolution_steps"]

CALM = 8
"""Number of consecutive batches for which the next larger size must be predicted to fit before it is used. The number
doubles if that size then does not fit."""
_MOST_CALM = 512
_MIXING = ("mosaic", "mixup", "cutmix", "copy_paste")


@dataclass(frozen=True)
class ResolutionStep:
    """Image size and augmentation strength at which images are loaded."""

    image_size: int
    """Length of the longer side, in pixels."""
    strength: float
    """Factor of the probabilities of mosaic, mixup, cutmix and copy-paste, from 0 to 1."""


def resolution_steps(image_size: int, smallest: int, stride: int) -> tuple[ResolutionStep, ...]:
    """Return the resolution steps from full size to the smallest size, at which images are not mixed.

    Args:
        image_size: Full image size of the training in pixels, a multiple of the stride.
        smallest: Lower bound of the size in pixels.
        stride: Stride of the model in pixels.
    """
    sizes = range(image_size, min(smallest, image_size) - 1, -stride)
    return tuple(ResolutionStep(size, 1 - index / max(len(sizes) - 1, 1)) for index, size in enumerate(sizes))


class ResolutionControl:
    """Chooses the resolution step of one training.

    Args:
        mode: `auto` takes smaller images if a batch fits in no other way; `eager` takes them if a BatchNorm group does
            not fit with everything kept for the backward pass; `off` never does.
        steps: Resolution steps, full size first.
        stride: Stride of the model in pixels.
    """

    def __init__(self, mode: str, steps: Sequence[ResolutionStep], stride: int) -> None:
        self.is_eager = mode == "eager"
        """True if a whole BatchNorm group with everything kept has to fit, rather than one image with least memory."""
        self._steps = steps[:1] if mode == "off" else steps
        self._stride = stride
        self._shared = SharedNumber(ctypes.c_int, 0)
        self._calm, self._patience, self._since_rise = 0, CALM, _MOST_CALM
        self._events: list[str] = []

    @property
    def step(self) -> int:
        """Index of the current resolution step; 0 is full size."""
        return int(self._shared.value)

    @property
    def image_size(self) -> int:
        """Image size of the current resolution step in pixels."""
        return self._steps[self.step].image_size

    def join(self, dataset: Any, settings: Any) -> None:
        """Let a data set load images at the current resolution step, if it builds its own transforms.

        Args:
            dataset: Training data set of Ultralytics.
            settings: Arguments with which the data set was made.
        """
        if (
            len(self._steps) > 1
            and all(hasattr(dataset, name) for name in ("build_transforms", "ims"))
            and not dataset.rect
        ):
            _Loading(dataset, settings, self._steps, self._shared).begin()

    def preprocess(self, stock: Callable[[Any], Any], settings: Any) -> Callable[[Any], Any]:
        """Wrap Ultralytics' `preprocess_batch`, so that `multi_scale` draws sizes around the current image size.

        Args:
            stock: Ultralytics' own method.
            settings: Arguments of the training.
        """

        def run(batch: Any) -> Any:
            full, settings.imgsz = settings.imgsz, self.image_size
            try:
                return stock(batch)
            finally:
                settings.imgsz = full

        return run

    def before(self, batch: dict[str, Any], fits: Callable[[int], bool]) -> dict[str, Any]:
        """Return a batch at the current resolution step, in mode `eager` after a look at the free memory.

        Args:
            batch: Batch as it was loaded.
            fits: Returns whether images of a size in pixels are predicted to fit, see `is_eager`.
        """
        if self.is_eager and not fits(self.image_size):
            self._down()
        return self._resized(batch)

    def smaller(self, batch: dict[str, Any]) -> dict[str, Any] | None:
        """Return a batch that does not fit at the next smaller size; None if there is no smaller size."""
        return self._resized(batch) if self._down() else None

    def after(self, fits: Callable[[int], bool]) -> None:
        """Go back to the next larger size if it has been predicted to fit for long enough. Call this after each batch.

        Args:
            fits: Returns whether images of a size in pixels are predicted to fit, see `is_eager`.
        """
        self._since_rise += 1
        if not self.step:
            return
        self._calm = self._calm + 1 if fits(self._steps[self.step - 1].image_size) else 0
        if self._calm >= self._patience:
            self._since_rise = 0
            self._set(self.step - 1)

    def state_dict(self) -> dict[str, int]:
        """Return the state, for a run that resumes."""
        return {"step": self.step, "patience": self._patience, "calm": self._calm, "since_rise": self._since_rise}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the result of `state_dict`. The resolution steps may be others than then."""
        step = state["step"] if "step" in state else state["rung"]  # the name in files of version 1
        self._shared.value = min(step, len(self._steps) - 1)
        self._patience, self._calm, self._since_rise = state["patience"], state["calm"], state["since_rise"]

    def take_events(self) -> list[str]:
        """Return the changes of size since the last call, as the journal names them."""
        events, self._events = self._events, []
        return events

    def _down(self) -> bool:
        if self.step + 1 >= len(self._steps):
            return False
        if self._since_rise < 2 * self._patience:  # the last rise came too soon
            self._patience, self._since_rise = min(2 * self._patience, _MOST_CALM), _MOST_CALM
        self._set(self.step + 1)
        return True

    def _set(self, step: int) -> None:
        self._events.append(f"image size {self.image_size} to {self._steps[step].image_size}")
        self._shared.value, self._calm = step, 0

    def _resized(self, batch: dict[str, Any]) -> dict[str, Any]:
        images: Tensor = batch["img"]
        longer = max(images.shape[2:])
        if not self.step or longer <= self.image_size:  # at full size no batch is changed, whatever its size
            return batch
        factor = self.image_size / longer
        size = [math.ceil(side * factor / self._stride) * self._stride for side in images.shape[2:]]
        return {**batch, "img": interpolate(images, size, mode="bilinear")}


class _Loading:
    """Makes a data set load each batch at the current resolution step."""

    def __init__(self, dataset: Any, settings: Any, steps: Sequence[ResolutionStep], shared: Any) -> None:
        self._dataset, self._steps, self._shared = dataset, steps, shared
        self._settings, self._stock_build = copy.copy(settings), dataset.build_transforms
        self._transforms: dict[int, Any] = {}
        self._step = 0  # of the current batch
        self._stock_load = dataset.load_image

    def begin(self) -> None:
        """Take over the data set's methods."""
        dataset = self._dataset
        dataset.load_image = self._load_image
        dataset.build_transforms = self._build  # called again when mosaic is closed
        dataset.__getitems__ = self._load  # PyTorch loads a batch with it

    def _build(self, hyp: Any) -> Any:
        self._settings = copy.copy(hyp)
        self._transforms.clear()
        return self._stock_build(hyp)

    def _load(self, indices: Sequence[int]) -> list[Any]:
        step, dataset = getattr(indices, "resolution_step", None), self._dataset
        step = self._shared.value if step is None else step
        if step != self._step and isinstance(dataset.ims, list):  # images in memory have the size of another step
            forget(dataset, dataset.buffer)
            dataset.buffer.clear()
        self._step = step
        if not self._step:
            return samples(dataset, indices)
        full = dataset.imgsz, dataset.transforms
        try:
            dataset.imgsz = self._steps[self._step].image_size
            dataset.transforms = self._transforms_of(self._step)
            return samples(dataset, indices)
        finally:
            dataset.imgsz, dataset.transforms = full

    def _load_image(self, i: int, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Load an image. One that is cached in memory at full size is resized."""
        image, original, shape = self._stock_load(i, *args, **kwargs)
        factor = self._dataset.imgsz / max(shape)
        if self._step and factor < 1:
            height, width = (max(round(side * factor), 1) for side in shape)
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            image = image.reshape(height, width, -1)  # keeps the dimension of a single channel
        return image, original, image.shape[:2]

    def _transforms_of(self, step: int) -> Any:
        if step not in self._transforms:
            settings = copy.copy(self._settings)
            for name in _MIXING:
                setattr(settings, name, getattr(settings, name) * self._steps[step].strength)
            self._transforms[step] = self._stock_build(settings)
        return self._transforms[step]
