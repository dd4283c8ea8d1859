"""A training loader that can say after each batch how to go on from there, and can go on from there.

The order of images is that of the sampler's generator. Augmentation draws from the random generators of the process
that loads, and mosaic from the images that this process loaded lately; both go with a worker's batches. What is drawn
is what Ultralytics draws.
"""

from __future__ import annotations

import io
import itertools
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler, get_worker_info

from yolov12.training.data.arrangement import arranged
from yolov12.training.data.sharing import SHARE, Sharing

__all__ = ["SKIPPED", "ResumableLoader", "data_of", "for_file", "random_state", "resumable", "set_random_state"]

SKIPPED = "yolov12_skipped"
"""In a batch that stands for one that was done before the run was interrupted."""

_STATE = "yolov12_worker"
_Worker = Mapping[str, Any]  # `random` and `buffer`, or the `seed` of one that has not begun


def random_state() -> dict[str, Any]:
    """State of this process's generators, for `torch.load(weights_only=True)`."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - Ultralytics draws from it
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put `random_state` back."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])


def resumable(loader: Any) -> bool:
    """Whether it is a loader of Ultralytics' own kind, whose order comes from its generator alone."""
    from ultralytics.data.build import InfiniteDataLoader

    if not isinstance(loader, InfiniteDataLoader):
        return False
    shuffled = isinstance(loader.sampler, RandomSampler) and loader.sampler.generator is loader.generator
    return (shuffled or isinstance(loader.sampler, SequentialSampler)) and loader.generator is not None


def data_of(loader: Any) -> dict[str, int]:
    """What must be the same for a run to go on in mid-epoch: batches, their size, images and their names."""
    names = [Path(name).name for name in getattr(loader.dataset, "im_files", [])]  # folders may move
    return {
        "batches": len(loader),
        "images at once": loader.batch_size,
        "images": len(loader.dataset),
        "checksum of their names": zlib.crc32("\n".join(names).encode()),
    }


class ResumableLoader:
    """Stands for an Ultralytics training loader.

    Args:
        loader: An `InfiniteDataLoader` that has given no batch yet.
        image_size: Of the batches that stand for skipped ones.
        arrange: Whether images of a batch are brought into the order of `arrangement`.
        sharing: Where several ranks share each batch.
    """

    def __init__(self, loader: Any, image_size: int, *, arrange: bool = False, sharing: Sharing | None = None) -> None:
        self._loader, self._image_size, self._sharing = loader, image_size, sharing
        self._order = loader.batch_sampler.sampler = _Order(loader.batch_sampler.sampler, loader.generator, sharing)
        self._first = _FirstState(loader.worker_init_fn)
        self._collate = loader.collate_fn = _Collate(loader.collate_fn, arrange, sharing is None)
        self._data = data_of(loader)
        loader.worker_init_fn = self._first
        self._workers: dict[int, _Worker | bytes] = {}
        self._next_worker = 0
        self._epoch_order: Tensor | None = None
        self._generator: Tensor | None = None  # state where a resumed run was interrupted
        self._skip = 0
        self._then: Callable[[], None] = lambda: None
        self.position = 0
        """Batches given in this epoch, with those skipped."""

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        self.position, skip, self._skip = 0, self._skip, 0
        for _ in range(skip):
            self.position += 1
            yield {
                "img": torch.zeros(0, 3, self._image_size, self._image_size),
                "cls": torch.zeros(0, 1),
                SKIPPED: True,
            }
        then, self._then = self._then, lambda: None
        then()
        for batch in itertools.islice(self._loader, len(self) - skip):
            if self.position == skip:
                self._epoch_order = self._order.drawn.popleft()
                self._first.states = []  # workers have theirs; those after a reset begin anew
            worker = batch.pop(_STATE)
            if worker is not None:
                index, packed = worker
                self._workers[index] = packed
                self._next_worker = (index + 1) % self._loader.num_workers
            self.position += 1
            if self._sharing is not None:
                batch[SHARE] = self._sharing.taken()
            yield batch

    def reset(self) -> None:
        """See `InfiniteDataLoader`: what was loaded ahead is dropped, as the data set has changed."""
        self._loader.reset()
        if self._sharing is not None:
            if self._order.drawn:  # other ranks may have drawn less far ahead
                self._loader.generator.set_state(self._order.drawn[0])
            self._sharing.drop()
        self._order.drawn.clear()
        if self._order.begin is not None and not self._skip:  # the epoch that was skipped had nothing left to load
            self._order.begin, self._first.states = None, []
            self._loader.generator.set_state(self._generator)
        self._workers = dict(enumerate(self._first.states))
        self._next_worker = 0

    @property
    def is_last(self) -> bool:
        """Whether the batch given last is the last of its epoch."""
        return self.position == len(self)

    def state_dict(self) -> dict[str, Any]:
        """How to go on after the batch given last; `for_file` makes it fit for a file."""
        count = self._loader.num_workers
        order = [(self._next_worker + index) % count for index in range(count)]
        workers = [self._workers.get(index) or {"seed": self._seed(index)} for index in order]
        by_place = self._sharing is not None  # then workers have nothing to remember
        return {
            "data": self._data,
            "position": self.position,
            "arrange": self._collate.arrange if self._sharing is None else self._sharing.arranges,
            "order": self._epoch_order,
            "generator": self._loader.generator.get_state(),
            "workers": [] if by_place else workers,
            "buffer": [] if by_place else list(self._buffer()),
            "resolution_steps": self._sharing.state_dict() if self._sharing is not None else [],
        }

    def load_state_dict(self, state: Mapping[str, Any], then: Callable[[], None]) -> bool:
        """Go on from `state_dict`; the next epoch begins with skipped batches.

        Args:
            state: From a loader of the same data, see `data_of`.
            then: Called when the skipped batches are through, before the first other.

        Returns:
            Whether augmentation goes on as well. It does not with another number of workers.
        """
        state = for_file(state)
        self._skip, self._then = state["position"], then
        self._epoch_order = state["order"]
        self._order.begin, self._generator = (state["order"], state["position"]), state["generator"]
        if self._sharing is not None:
            self._sharing.load_state_dict(state.get("resolution_steps") or state.get("rungs", []))  # files of version 1
            return not state["workers"] and not state["buffer"]  # or it was one process, which draws otherwise
        self._collate.arrange = state["arrange"]
        if len(state["workers"]) != self._loader.num_workers:
            return False
        self._first.states = list(state["workers"])
        self._workers = dict(enumerate(state["workers"]))
        if not state["workers"]:
            _fill(self._loader.dataset, state["buffer"])
        return True

    def _seed(self, worker: int) -> int:
        iterator = self._loader.iterator
        return int(iterator._base_seed) + worker if iterator is not None else 0

    def _buffer(self) -> list[int]:
        return getattr(self._loader.dataset, "buffer", [])


class _Order:
    """Batches of indices, over and over; keeps how the order of each epoch was drawn."""

    def __init__(self, batches: Any, generator: torch.Generator, sharing: Sharing | None) -> None:
        self._batches, self._generator, self._sharing = batches, generator, sharing
        self.drawn: deque[Tensor] = deque()
        """State of the generator before each epoch that is not begun; workers are ahead of the training."""
        self.begin: tuple[Tensor, int] | None = None
        """Of the next epoch: state of the generator, batches to leave out."""

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        skip = 0
        if self.begin is not None:
            (state, skip), self.begin = self.begin, None
            self._generator.set_state(state)
        state = self._generator.get_state()
        if skip < len(self):
            self.drawn.append(state)
        batches = itertools.islice(iter(self._batches), skip, None)
        if self._sharing is None:
            yield from batches
            return
        epoch = zlib.crc32(state.numpy().tobytes())
        for position, indices in enumerate(batches, skip):
            yield self._sharing.split(indices, f"{epoch} {position}")


class _Collate:
    """Adds to a batch the state of the worker that loaded it, unless images are augmented by their place."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], arrange: bool, add_state: bool = True) -> None:
        self._collate, self.arrange, self._add_state = collate, arrange, add_state

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        worker = get_worker_info()
        state = None
        if worker is not None and self._add_state:
            buffer = list(getattr(worker.dataset, "buffer", []))
            state = worker.id, _packed({"buffer": buffer, "random": random_state()})
        if self.arrange:
            samples = [samples[index] for index in arranged([len(sample["cls"]) for sample in samples])]
        return {**self._collate(samples), _STATE: state}


class _FirstState:
    """Starts workers in the state they were in."""

    def __init__(self, stock: Callable[[int], None]) -> None:
        self._stock = stock
        self.states: list[_Worker] = []

    def __call__(self, index: int) -> None:
        state = self.states[index] if self.states else {}
        if "seed" in state:
            torch.manual_seed(state["seed"])
        self._stock(index)
        if "random" in state:
            worker = get_worker_info()
            assert worker is not None
            _fill(worker.dataset, state["buffer"])
            set_random_state(state["random"])


def for_file(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `ResumableLoader.state_dict` gave, for `torch.load(weights_only=True)`. To unpack it takes milliseconds."""
    workers = [
        torch.load(io.BytesIO(worker), weights_only=True) if isinstance(worker, bytes) else worker
        for worker in state["workers"]
    ]
    return {**state, "workers": workers}


def _packed(state: Mapping[str, Any]) -> bytes:
    """One object for the way between processes, which takes a file handle for every tensor."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _fill(dataset: Any, buffer: list[int]) -> None:
    """Load the images that mosaic chooses from."""
    dataset.buffer.clear()
    for index in buffer:
        dataset.load_image(index)
