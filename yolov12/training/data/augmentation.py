"""The place where the images of a training are augmented: in the loader's workers, or on the device.

On the device, a worker draws the same random numbers and computes the same boxes, but sends the parts of decoded images
that a batch is made of (see `packing`). The device renders them in the memory of the micro-batch that needs them. So
the host does a fraction of the work, and the memory is part of every measured peak.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from yolov12.mas.memory.meter import shares_memory
from yolov12.training.adapter.deferred_tensor import made
from yolov12.training.adapter.users_code import is_ultralytics
from yolov12.training.data.device_rendering import PackedTensor, has_kernel
from yolov12.training.data.host import has_room_for_packed
from yolov12.training.data.packing import PackedImages
from yolov12.training.data.recipes import only_on_host
from yolov12.training.data.shared_number import SharedNumber

__all__ = ["WAIT_FRACTION", "Augmentation", "chosen", "note_host"]

_Times = TypeVar("_Times")

WAIT_FRACTION = 0.1
"""Fraction of the time from which on `auto` augments on the device, if the training waits for data so long."""
_MEASURED = 8  # least number of batches that are measured before


class Augmentation:
    """Decides where the images of one training are augmented, and receives its batches.

    Args:
        mode: `host`, `device` or `auto`; see the argument `augment_on`.
        device: Device of the training.
        why_host: Reason why all images are augmented on the host; empty if there is none.
        skip: Number of batches that workers may have loaded before the first is taken: their wait tells nothing.
    """

    def __init__(
        self, mode: str = "host", device: torch.device | None = None, why_host: str = "", skip: int = 0
    ) -> None:
        self._device, self._why_host = device, why_host
        self._may_change = mode == "auto"
        self._may_notice = mode == "device" and not why_host
        # Workers read it for each batch.
        self._shared = SharedNumber(ctypes.c_bool, mode == "device" and not why_host) if mode != "host" else None
        self._skip, self._batches = skip, 0
        self._waited_s = self._worked_s = 0.0
        self.has_moved = False
        """True if `epoch_ends` has gone to the device."""
        self._left = 0.0  # time at which the training got the latest batch; 0 at the beginning of an epoch

    @property
    def is_on_device(self) -> bool:
        """True if a batch that is collated now is augmented on the device."""
        return self._shared is not None and bool(self._shared.value)

    @property
    def may_pack(self) -> bool:
        """True if batches of this training may be augmented on the device, now or later."""
        return self._shared is not None and not self._why_host

    def would_help(self) -> bool:
        """Return whether a training that augments on the host could augment on its GPU instead."""
        device = self._device
        if self._shared is not None or self._why_host or device is None or device.type != "cuda":
            return False
        return not shares_memory(device) and has_kernel(device)

    def resume(self, *, on_device: bool) -> None:
        """Go on where an interrupted run augmented its images, in mode `auto`."""
        if self._shared is not None and self._may_change and on_device and not self._why_host:
            self._shared.value, self._may_change = True, False

    def next(self, take: Callable[[], tuple[Any, _Times]]) -> tuple[Any, _Times]:
        """Return a batch for the training, and its times, and measure the wait for it.

        Args:
            take: Takes a batch from the loader, with its times.
        """
        begin = time.perf_counter()
        batch, times = take()
        end = time.perf_counter()
        self._skip -= 1
        if self._left and self._skip < 0:
            self._worked_s += begin - self._left
            self._waited_s += end - begin
            self._batches += 1
        self._left = end
        return self.received(batch), times

    def received(self, batch: Any, *, rendered: bool = False) -> Any:
        """Return a batch whose images are a tensor.

        Args:
            batch: Batch of the loader.
            rendered: False for a tensor that is rendered when its values are used.
        """
        images = batch.get("img") if isinstance(batch, dict) else None
        if not isinstance(images, PackedImages):
            if self._may_notice:
                self._may_notice = False
                note_host("device", "no transform or image of a batch is one that the device supports")
            return batch
        tensor = PackedTensor.of(images._replace(device=self._device))
        return {**batch, "img": made(tensor) if rendered else tensor}

    def epoch_ends(self) -> None:
        """Go to the device if the training waited for data too long. Call this at the end of each epoch."""
        self._left = 0.0
        if not self._may_change or self._batches < _MEASURED:
            return
        from ultralytics.utils import LOGGER

        fraction = self._waited_s / (self._waited_s + self._worked_s)
        self._batches, self._waited_s, self._worked_s = 0, 0.0, 0.0
        if fraction < WAIT_FRACTION:
            return
        self._may_change = False
        line = f"loader: the training waited for data {fraction:.0%} of the time: "
        if self._why_host:
            LOGGER.info(f"{line}images would be augmented on the device, but {self._why_host}")
            return
        self._shared.value = self.has_moved = True  # type: ignore[union-attr]
        LOGGER.info(f"{line}images are augmented on the device from now on")


def chosen(trainer: Any, knows_preprocess: bool) -> Augmentation:
    """Return where a training with a loader of Ultralytics augments its images.

    Args:
        trainer: Ultralytics trainer.
        knows_preprocess: True if its `preprocess_batch` is Ultralytics' own.
    """
    from ultralytics.utils import LOGGER

    mode, device, loader = trainer.args.augment_on, trainer.device, trainer.train_loader
    why = only_on_host(loader.dataset)
    if not why and not (knows_preprocess and is_ultralytics(loader.collate_fn)):
        why = f"{'collate_fn' if knows_preprocess else 'preprocess_batch'} is your own"
    if mode == "host" or (mode == "auto" and device.type != "cuda"):
        return Augmentation("host", device, why)
    if not why and mode == "auto":
        if shares_memory(device):
            why = "the device has no memory of its own"
        elif not has_room_for_packed(trainer):
            why = "the memory of the host, or /dev/shm, has no room for that"
        elif not has_kernel(device):
            why = "its kernel does not run here"
    if why:
        note_host(mode, why)
    elif mode == "device":
        if device.type == "cuda" and not has_kernel(device):
            LOGGER.info("augment_on=device: PyTorch renders the images, slowly, as the kernel does not run here")
        if names := _rendered_on_host(trainer.args, loader.dataset):
            LOGGER.info(f"augment_on=device: images with {', '.join(names)} are rendered on the host")
    return Augmentation(mode, device, why, skip=(loader.prefetch_factor or 0) * loader.num_workers)


def _rendered_on_host(args: Any, dataset: Any) -> list[str]:
    """Return the arguments in use whose effect on an image has no recipe."""
    names = [name for name in ("perspective", "cutmix") if getattr(args, name, 0)]
    pastes = getattr(args, "copy_paste", 0) and any(len(label["segments"]) for label in dataset.labels)
    return [*names, *["copy_paste"] * bool(pastes)]


def note_host(mode: str, why: str) -> None:
    """Say why images are augmented on the host, if the user has asked for the device.

    Args:
        mode: Argument of the training.
        why: The reason.
    """
    from ultralytics.utils import LOGGER

    if mode == "device":
        LOGGER.info(f"augment_on=device: images are augmented on the host, as {why}")
