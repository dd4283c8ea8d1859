"""Places: the augmentation of an image depends on where it stands in the run, not on the hardware.

The place of an image is its epoch and its position in the order of the epoch. Together with the seed of the run it
gives a seed. While the image is loaded, everything that draws from the random generators of Python, NumPy and PyTorch
draws from this seed: Ultralytics' transforms, partners of mixup, Albumentations, a transform of the user's own.

Mosaic draws from a pool of images that depends on the place, too: a stretch of the image's own batch. So an image has
the same pixels and boxes whatever number of workers or ranks load its batch, and after a resume with another number.
"""

from __future__ import annotations

import itertools
import random
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, get_worker_info

from yolov12.training.adapter.users_code import module_of
from yolov12.training.data.arrangement import arranged
from yolov12.training.data.random_state import random_state, set_random_state

__all__ = ["Later", "Order", "Placed", "Start", "boxes_of", "by_place", "chooses_by_place", "forget", "seeded"]

_LEAST = 16
"""Fewest images in a pool. A smaller batch takes those before it in the order, at the price of decoding them again."""
_STRETCH = 32
"""Images of a batch that are one another's partners. The official recipe has as many in a batch of a GPU. They are
whole BatchNorm groups, so a rank with as many images or more decodes few that only another rank trains on."""
_MEMORY = ("ims", "im_hw0", "im_hw")  # attributes of a data set: its decoded images, and their sizes


class Later(list[int]):
    """Indices of a batch whose images are rendered when it is collated."""


class Placed(Later):
    """Indices of images of one batch, with the seed and the pool of the place of each.

    Args:
        indices: Indices of the images.
        seeds: Seed of each.
        pools: Indices of the images that each may be joined with in a mosaic.
        resolution_step: Resolution step at which they are loaded; None for the step at the time of loading.
    """

    def __init__(
        self,
        indices: Sequence[int],
        seeds: Sequence[int],
        pools: Sequence[Sequence[int]],
        resolution_step: int | None = None,
    ) -> None:
        super().__init__(indices)
        self.seeds, self.pools, self.resolution_step = seeds, pools, resolution_step

    @property
    def seed(self) -> int:
        """Seed of what is drawn once for all these images."""
        return ~self.seeds[0] % 2**32

    def part(self, places: Sequence[int], resolution_step: int | None = None) -> Placed:
        """Return some images of the batch.

        Args:
            places: Their places in the batch.
            resolution_step: See the class.
        """
        seeds, pools = [self.seeds[place] for place in places], [self.pools[place] for place in places]
        return Placed([self[place] for place in places], seeds, pools, resolution_step)


class Start(NamedTuple):
    """Batch of an epoch."""

    generator: Tensor
    """State of the loader's generator before the epoch, which determines the order of the epoch."""
    epoch: int
    """Number of epochs before it in the run."""
    batch: int
    """Number of batches before it in the epoch."""


class Order:
    """Batch sampler that gives every image its place, and can begin at any batch of any epoch.

    Args:
        batches: Batch sampler of a loader.
        generator: Generator of the loader, from which its order is drawn.
        boxes: Number of boxes in each image of the data set before augmentation; None if it is not known.
        epoch: Number of epochs that the run has completed.
    """

    def __init__(
        self, batches: Any, generator: torch.Generator, boxes: Sequence[int] | None = None, epoch: int = 0
    ) -> None:
        self._batches, self._generator, self._boxes, self._epoch = batches, generator, boxes, epoch
        self.split: Callable[[Placed, list[int]], Placed] | None = None
        """Returns the part of a batch that this rank loads, of the batch and its places in their order by boxes."""
        self.drawn: deque[Start] = deque()
        """Epochs that were drawn but have not begun, because workers draw batches ahead of the training."""
        self.begin: Start | None = None
        """Batch at which the next iterator begins; None for the first one of this process."""

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Placed]:
        if self.begin is None:
            for _ in range(self._epoch):  # the orders of the epochs before
                list(self._batches)
            self.begin = Start(self._generator.get_state(), self._epoch, 0)
        start = self.begin
        self._generator.set_state(start.generator)
        batches = list(self._batches)  # all at once, so that the generator does not depend on how far ahead is drawn
        self.begin = Start(self._generator.get_state(), start.epoch + 1, 0)
        if start.batch < len(batches):
            self.drawn.append(start)
        for batch, by_boxes in self._placed(batches, start):
            yield batch if self.split is None else self.split(batch, by_boxes)

    def seed(self, start: Start) -> int:
        """Return the seed of a batch, for what is drawn once for all its images."""
        return self._seed(start.epoch, "batch", start.batch)

    def aside(self) -> Iterator[Placed]:
        """Yield the batches of an epoch that is not one of the run."""
        state = self._generator.get_state()
        batches = list(self._batches)
        self._generator.set_state(state)
        return (batch for batch, _ in self._placed(batches, Start(state, -1, 0)))

    def _seed(self, *place: object) -> int:
        return zlib.crc32(" ".join(map(str, (self._generator.initial_seed(), *place))).encode())

    def _placed(self, batches: Sequence[Sequence[int]], start: Start) -> Iterator[tuple[Placed, list[int]]]:
        """Yield the batches of an epoch, each with its order by boxes."""
        order = [index for batch in batches for index in batch]
        stops = list(itertools.accumulate(map(len, batches)))
        for indices, stop in zip(batches[start.batch :], stops[start.batch :], strict=True):
            by_boxes = list(range(len(indices)))
            if self._boxes is not None:
                by_boxes = arranged([self._boxes[index] for index in indices])
            seeds = [self._seed(start.epoch, position) for position in range(stop - len(indices), stop)]
            end = max(stop, min(_LEAST, len(order)))
            pools = _stretches(indices, by_boxes) or [tuple(order[max(end - _LEAST, 0) : end])] * len(indices)
            yield Placed(indices, seeds, pools), by_boxes


def boxes_of(dataset: Any) -> list[int] | None:
    """Return the number of boxes in each image of a data set before augmentation, or None if it is not known."""
    from ultralytics.data.base import BaseDataset

    if not isinstance(dataset, BaseDataset) or len(dataset) != len(dataset.labels):
        return None  # a length of the user's own: an index is not that of a label
    return [len(label["cls"]) for label in dataset.labels]


def _stretches(indices: Sequence[int], by_boxes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the pool of each image of a batch; none for a batch that is smaller than a pool.

    Args:
        indices: Indices of the images.
        by_boxes: Their places in the order by boxes, which ranks divide among them.
    """
    if len(indices) < _LEAST:
        return []
    pools: list[tuple[int, ...]] = [()] * len(indices)
    begins = range(0, max(len(indices) - _STRETCH, 0) + 1, _STRETCH)
    for begin, end in zip(begins, [*begins[1:], len(indices)], strict=True):
        pool = tuple(indices[place] for place in by_boxes[begin:end])
        for place in by_boxes[begin:end]:
            pools[place] = pool
    return pools


def by_place(dataset: Any, batch: Placed, load: Callable[[int], Any]) -> list[Any]:
    """Load the images of a batch, each from the seed and with the pool of its place.

    Args:
        dataset: Data set of a training.
        batch: The images.
        load: Loads the image of an index.
    """
    samples = []
    pools = list(_pools(dataset, set(batch).union(*batch.pools)))
    with seeded(batch.seed), ExitStack() as stack:
        for pool in pools:
            stack.enter_context(pool.in_use())
        for index, seed, partners in zip(batch, batch.seeds, batch.pools, strict=True):
            for pool in pools:
                pool.choose(partners)
            _seed(seed)
            samples.append(load(index))
    return samples


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Return a context that draws from a seed, or from the present state without one.

    The random generators of a process that is no worker are left as they were.
    """
    if seed is None:
        yield
        return
    state = random_state() if get_worker_info() is None else None
    _seed(seed)
    try:
        yield
    finally:
        if state is not None:
            set_random_state(state)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - Ultralytics draws from it
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the generators of GPUs, too


def forget(dataset: Any, images: Sequence[int]) -> None:
    """Remove decoded images from the memory of a data set."""
    for index in images:
        for name in _MEMORY:
            getattr(dataset, name)[index] = None


class _Pool(list[int]):
    """Images from which mosaic chooses: the `buffer` of a data set while a batch is loaded.

    Args:
        dataset: The data set.
        first: Index of its first image, if it is joined with others.
        wanted: Images of all pools of the batch. They stay in memory for the whole batch.
    """

    def __init__(self, dataset: Any, first: int, wanted: Iterable[int]) -> None:
        super().__init__()
        self._dataset, self._range = dataset, range(first, first + len(dataset.labels))
        self._wanted = set(self._own(wanted))
        self._most = dataset.max_buffer_length
        self._in_memory: list[int] = list(dataset.buffer)

    def _own(self, indices: Iterable[int]) -> list[int]:
        return [index - self._range.start for index in indices if index in self._range]

    def append(self, index: int) -> None:
        """Note an image that was loaded, and forget an older one if there are too many. The data set calls this."""
        self._in_memory.append(index)
        if len(self._in_memory) > self._most:
            oldest = next((index for index in self._in_memory if index not in self._wanted), None)
            if oldest is not None:
                self._in_memory.remove(oldest)
                forget(self._dataset, [oldest])

    def choose(self, partners: Iterable[int]) -> None:
        """Let mosaic choose from these images."""
        self[:] = self._own(partners)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Return a context in which this is the buffer of the data set."""
        dataset, buffer = self._dataset, self._dataset.buffer
        dataset.buffer, dataset.max_buffer_length = self, sys.maxsize
        try:
            yield
        finally:
            buffer[:] = self._in_memory
            dataset.buffer, dataset.max_buffer_length = buffer, self._most


def _pools(dataset: Any, wanted: set[int], first: int = 0) -> Iterator[_Pool]:
    """Yield a pool for a data set, or for each that it is joined from.

    A data set that is cached in memory needs none. Methods of the user's own may choose images in another way than by
    their index, as for a balance of classes. Mosaic then chooses among the images that the process has loaded, as in
    Ultralytics.

    Args:
        dataset: Data set.
        wanted: Images that stay in memory for the whole batch.
        first: Index of its first image.
    """
    joined: list[Any] = dataset.datasets if isinstance(dataset, ConcatDataset) else []
    for part in joined:
        yield from _pools(part, wanted, first)
        first += len(part)
    own = getattr(dataset, "__dict__", {})  # a wrapper may pass on the attributes of another data set
    if chooses_by_place(dataset) and all(isinstance(own.get(name), list) for name in _MEMORY):
        yield _Pool(dataset, first, wanted)


def chooses_by_place(dataset: Any) -> bool:
    """Return whether the partners of an image depend on its place alone, and not on what the process has loaded."""
    if isinstance(dataset, ConcatDataset):
        return all(map(chooses_by_place, dataset.datasets))
    return isinstance(getattr(dataset, "__dict__", {}).get("buffer"), list) and all(
        module_of(getattr(dataset, name)).startswith("ultralytics.") for name in ("__getitem__", "__len__")
    )
