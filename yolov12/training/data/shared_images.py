"""Shared memory through which workers pass images, used again for each batch.

By default, a worker asks the kernel for new shared memory for each batch. The first write on each of its pages is a
page fault, in the worker and once more in the training process, and all of them contend for the kernel's locks. Here,
each worker has one place that both processes have mapped since its start. The place is free again when the training
process has copied the images into pinned memory. A worker that finds its place in use passes new memory as before.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import os
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

__all__ = ["PassedImages", "SharedImages", "shared_images"]

_FREE, _IN_USE = 0, 1
_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, SharedImages] = weakref.WeakValueDictionary()


def shared_images(loader: Any, image_size: int, most: float = 1.0) -> SharedImages | None:
    """Return the places for the batches of a loader.

    Args:
        loader: Loader that has not started its workers.
        image_size: Height and width of the largest images, in pixels.
        most: Largest size of a batch, in sizes of its images. Packed images may be larger.

    Returns:
        The places; None if the batches are not copied into pinned memory, or if workers do not inherit memory.
    """
    pins = loader.pin_memory and torch.cuda.is_available()
    forks = loader.multiprocessing_context is None and multiprocessing.get_start_method() == "fork"
    if not (pins and forks and loader.num_workers):
        return None
    return SharedImages(loader.num_workers, int(most * loader.batch_size * 3 * image_size**2))


class SharedImages:
    """One place in shared memory for the images of a batch, for each worker. Workers inherit it when they are forked.

    Args:
        workers: Number of workers.
        place_bytes: Bytes of the largest batch.
    """

    def __init__(self, workers: int, place_bytes: int) -> None:
        self._number = next(_numbers)
        _known[self._number] = self
        self._place_bytes, self._process = place_bytes, os.getpid()
        # Anonymous memory is not part of /dev/shm. Its pages are allocated when they are first written.
        self._places = np.frombuffer(mmap.mmap(-1, workers * place_bytes), np.uint8).reshape(workers, place_bytes)
        self._states = np.frombuffer(mmap.mmap(-1, workers), np.uint8)

    def empty(self, shape: tuple[int, ...]) -> Tensor | None:
        """Return the place of this worker as a tensor; None if it is in use or too small, or if this is no worker.

        Args:
            shape: Shape of the images, (images, channels, height, width).
        """
        worker = get_worker_info()
        if worker is None or math.prod(shape) > self._place_bytes:
            return None
        if self._process != os.getpid():  # a new worker: the last batch of one before it may have been lost
            self._process, self._states[worker.id] = os.getpid(), _FREE
        return self._view(worker.id, shape) if self._states[worker.id] == _FREE else None

    def passed(self, images: Tensor) -> PassedImages:
        """Return what a worker sends instead of the images that it has written into its place.

        Args:
            images: Result of `empty`.
        """
        worker = get_worker_info()
        assert worker is not None
        self._states[worker.id] = _IN_USE
        return PassedImages(self._number, worker.id, tuple(images.shape))

    def take(self, worker: int, shape: tuple[int, ...]) -> Tensor:
        """Return the images of a worker in pinned memory, where there is a GPU, and free its place.

        Args:
            worker: Index of the worker.
            shape: Shape of the images.
        """
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        images.copy_(self._view(worker, shape))
        self._states[worker] = _FREE
        return images

    def _view(self, worker: int, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self._places[worker, : math.prod(shape)]).view(shape)


class PassedImages:
    """Images in the place of a worker.

    Args:
        number: Number of the `SharedImages`.
        worker: Index of the worker.
        shape: Shape of the images.
    """

    def __init__(self, number: int, worker: int, shape: tuple[int, ...]) -> None:
        self._number, self._worker, self._shape = number, worker, shape

    def pin_memory(self) -> Tensor:
        """Return the images in pinned memory. PyTorch's thread calls this for each part of a batch that has it."""
        return _known[self._number].take(self._worker, self._shape)
