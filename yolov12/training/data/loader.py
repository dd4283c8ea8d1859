"""Training loader whose state can be saved after any batch, and restored.

The order of the images depends on the generator of the sampler. The augmentation depends on the worker process that
loads an image: on its random generators, and on the images that it loaded recently, from which mosaic chooses. Each
batch that a worker returns therefore contains the state of this worker. The random draws are the same as in plain
Ultralytics.

All iterators of the loader take their batches from one endless sequence, as in plain Ultralytics. A user's iterator
therefore moves the training on by the batches that it took. There are two exceptions, in which the user gets batches
that are loaded aside and the training does not move on: among several ranks, because all of them must train on the same
batch; and in a resumed run that repeats the callbacks of an epoch, because their batches were taken before the
interruption.
"""

from __future__ import annotations

import io
import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler, get_worker_info

from yolov12.mas.data_times import DataTimes
from yolov12.mas.memory.reading import ClockStopwatch, Stopwatch
from yolov12.training.data.arrangement import arranged
from yolov12.training.data.load_clock import LoadClock
from yolov12.training.data.random_state import fill_buffer, random_state, set_random_state, without_trace
from yolov12.training.data.recipes import Later
from yolov12.training.data.rendering import Rendering, give_recipes, load_samples
from yolov12.training.data.shared_images import shared_images
from yolov12.training.data.sharing import SHARE, Sharing

__all__ = ["SKIPPED", "ResumableLoader", "data_of", "for_file", "resumable"]

SKIPPED = "yolov12_skipped"
"""Key of a placeholder batch: it stands for a batch that was trained on before the run was interrupted."""

_STATE, _TIMES = "yolov12_worker", "yolov12_times"
_Worker = Mapping[str, Any]  # keys `random` and `buffer`; `seed` for a worker that has returned no batch


def resumable(loader: Any) -> bool:
    """Return whether a loader can be resumed: it is Ultralytics' own, and its order depends only on its generator."""
    from ultralytics.data.build import InfiniteDataLoader

    if not isinstance(loader, InfiniteDataLoader):
        return False
    shuffled = isinstance(loader.sampler, RandomSampler) and loader.sampler.generator is loader.generator
    return (shuffled or isinstance(loader.sampler, SequentialSampler)) and loader.generator is not None


def data_of(loader: Any) -> dict[str, int]:
    """Return the properties of the data that must be unchanged when a run resumes in mid-epoch.

    Args:
        loader: Training loader.

    Returns:
        Number of batches, their size, number of images, and a checksum of the images' names.
    """
    names = [Path(name).name for name in getattr(loader.dataset, "im_files", [])]  # folders may have moved
    return {
        "batches": len(loader),
        "images at once": loader.batch_size,
        "images": len(loader.dataset),
        "checksum of their names": zlib.crc32("\n".join(names).encode()),
    }


class ResumableLoader:
    """Wrapper of an Ultralytics training loader with a state that can be saved and restored.

    Args:
        loader: Ultralytics `InfiniteDataLoader` that has returned no batch yet.
        image_size: Size of the images of placeholder batches, in pixels.
        arrange: True to bring the images of a batch into the order of `arrangement`.
        sharing: Splits batches among several ranks; None for a training in one process.
        stopwatch: Starts a stopwatch of the device, which measures how long it waits for a batch.
    """

    def __init__(
        self,
        loader: Any,
        image_size: int,
        *,
        arrange: bool = False,
        sharing: Sharing | None = None,
        stopwatch: Callable[[], Stopwatch] = ClockStopwatch,
    ) -> None:
        self._loader, self._image_size, self._sharing, self._stopwatch = loader, image_size, sharing, stopwatch
        self._order = _Order(loader.batch_sampler.sampler, loader.generator, sharing)
        self._collate = _Collate(loader.collate_fn, arrange, sharing is None)
        self._first, self._data = _FirstState(loader.worker_init_fn), data_of(loader)
        self._workers: dict[int, _Worker | bytes] = {}
        self._next_worker = 0
        self._epoch_order: Tensor | None = None
        self._generator: Tensor | None = None  # state of the generator when a resumed run was interrupted
        self._taken = len(loader)  # batches of the latest order that were returned: at first as if all were
        self._skip, self._is_repeating = 0, False  # what happened before an interruption
        self._then: Callable[[], None] | None = None
        self.is_loops = True
        """True if an iterator that is made now is the training loop's, False if it is a user's."""
        self.position = 0
        """Number of batches returned to the training loop in this epoch, including placeholders."""
        self.times: DataTimes | None = None
        """Times of the training loop's latest batch; None before the first."""

    def take_over(self) -> ResumableLoader:
        """Replace the loader's sampler, worker initialisation and collate function by those of this object."""
        self._loader.batch_sampler.sampler, self._loader.collate_fn = self._order, self._collate
        self._loader.worker_init_fn = self._first
        self._collate.stock.shared = shared_images(self._loader, self._image_size)
        give_recipes(self._loader.dataset)
        self._collate.clock.watch(self._loader.dataset)
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        return self._epoch() if self.is_loops else self._for_user()

    def _epoch(self) -> Iterator[Any]:
        self.position, skip, self._skip = 0, self._skip, 0
        for _ in range(skip):
            self.position += 1
            yield {
                "img": torch.zeros(0, 3, self._image_size, self._image_size),
                "cls": torch.zeros(0, 1),
                SKIPPED: True,
            }
        self._go_on()
        for _ in range(len(self) - skip):
            batch, self.times = self._take()
            self.position += 1
            if self._sharing is not None:
                batch[SHARE] = self._sharing.taken()
            yield batch

    def _for_user(self) -> Iterator[Any]:
        aside = self._aside()
        for _ in range(len(self)):
            yield next(aside) if self._is_repeating or self._sharing is not None else self._take()[0]

    def _take(self) -> tuple[Any, DataTimes]:
        self._go_on()
        wait = self._stopwatch()
        batch = next(iter(self._loader))
        wait.stop()
        if self._taken == len(self):
            self._epoch_order, self._taken = self._order.drawn.popleft()
            self._first.states = []  # used by the present workers; workers after a reset start without
        self._taken += 1
        worker = batch.pop(_STATE)
        if worker is not None:
            index, packed = worker
            self._workers[index] = packed
            self._next_worker = (index + 1) % self._loader.num_workers
        return batch, DataTimes(wait, *batch.pop(_TIMES))

    def _aside(self) -> Iterator[Any]:
        """Yield batches of another order, loaded here, and leave no trace in the training."""
        loader = self._loader
        state = loader.generator.get_state()
        batches = list(self._order.batches)
        loader.generator.set_state(state)
        for indices in batches:
            part = indices if self._sharing is None else self._sharing.equal_part(indices)
            with without_trace(loader.dataset):
                batch = self._collate.stock(load_samples(loader.dataset, part))
            yield batch

    def repeated(self) -> None:
        """Note that the last batch before an interruption was repeated: what happens from now on is new."""
        self._is_repeating = False

    def _go_on(self) -> None:
        then, self._then, self._is_repeating = self._then, None, False
        if then is not None:
            then()

    def reset(self) -> None:
        """Drop prefetched batches, because the data set has changed; see `InfiniteDataLoader.reset`."""
        self._loader.reset()
        if self._sharing is not None:
            if self._order.drawn:  # this epoch has not begun, and other ranks may not have drawn it yet
                self._loader.generator.set_state(self._order.drawn[0][0])
            self._sharing.drop()
        self._order.drawn.clear()
        self._taken = len(self)
        if self._order.begin is not None and not self._is_repeating:  # nothing was loaded since the interruption
            self._order.begin, self._first.states = None, []
            self._loader.generator.set_state(self._generator)
        self._workers = dict(enumerate(self._first.states))
        self._next_worker = 0

    @property
    def is_last(self) -> bool:
        """True if the latest batch is the last of its epoch."""
        return self.position == len(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the latest batch. `for_file` converts it, so that it can be saved."""
        count = self._loader.num_workers
        order = [(self._next_worker + index) % count for index in range(count)]
        workers = [self._workers.get(index) or {"seed": self._seed(index)} for index in order]
        by_place = self._sharing is not None  # each image then has a seed of its own
        return {
            "data": self._data,
            "position": self.position,
            "arrange": self._collate.arrange if self._sharing is None else self._sharing.arranges,
            "order": self._epoch_order,
            "taken": self._taken,
            "generator": self._loader.generator.get_state(),
            "workers": [] if by_place else workers,
            "buffer": [] if by_place else list(self._buffer()),
            "resolution_steps": self._sharing.state_dict() if self._sharing is not None else [],
        }

    def load_state_dict(self, state: Mapping[str, Any], then: Callable[[], None]) -> bool:
        """Restore the result of `state_dict`. The next epoch begins with placeholders for the batches that are done.

        Args:
            state: State of a loader with the same data, see `data_of`.
            then: Called after the last placeholder, before the first batch is loaded for the training.

        Returns:
            True if augmentation continues with the same random draws. With another number of workers it does not.
        """
        state = for_file(state)
        self._skip, self._then, self._is_repeating = state["position"], then, True
        taken = state.get("taken", state["position"])  # older files do not count users' batches
        self._order.begin, self._generator = (state["order"], taken), state["generator"]
        if self._sharing is not None:
            self._sharing.load_state_dict(state.get("resolution_steps") or state.get("rungs", []))  # files of version 1
            return not state["workers"] and not state["buffer"]  # False for a state of a single process
        self._collate.arrange = state["arrange"]
        if len(state["workers"]) != self._loader.num_workers:
            return False
        self._first.states = list(state["workers"])
        self._workers = dict(enumerate(state["workers"]))
        if not state["workers"]:
            fill_buffer(self._loader.dataset, state["buffer"])
        return True

    def _seed(self, worker: int) -> int:
        iterator = self._loader.iterator
        return int(iterator._base_seed) + worker if iterator is not None else 0

    def _buffer(self) -> list[int]:
        return getattr(self._loader.dataset, "buffer", [])


class _Order:
    """Batch sampler that stores the generator's state before each epoch. This state determines the epoch's order."""

    def __init__(self, batches: Any, generator: torch.Generator, sharing: Sharing | None) -> None:
        self.batches, self._generator, self._sharing = batches, generator, sharing
        self.drawn: deque[tuple[Tensor, int]] = deque()
        """Epochs that were drawn but have not begun, because workers draw batches ahead of the training: state of the
        generator before each, and number of batches to skip."""
        self.begin: tuple[Tensor, int] | None = None
        """For a resumed run: state of the generator before its epoch, and number of batches to skip; else None."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        skip = 0
        if self.begin is not None:
            (state, skip), self.begin = self.begin, None
            self._generator.set_state(state)
        state = self._generator.get_state()
        if skip < len(self):
            self.drawn.append((state, skip))
        batches = itertools.islice(iter(self.batches), skip, None)
        if self._sharing is None:
            yield from map(Later, batches)
            return
        epoch = zlib.crc32(state.numpy().tobytes())
        for position, indices in enumerate(batches, skip):
            yield Later(self._sharing.split(indices, f"{epoch} {position}"))


class _Collate:
    """Collate function that adds the state of the worker to a batch, unless each image has a seed of its own."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], arrange: bool, add_state: bool = True) -> None:
        self.stock, self.arrange, self._add_state = Rendering(collate), arrange, add_state
        self.clock = LoadClock()

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        worker = get_worker_info()
        state = None
        if worker is not None and self._add_state:
            buffer = list(getattr(worker.dataset, "buffer", []))
            state = worker.id, _packed({"buffer": buffer, "random": random_state()})
        if self.arrange:
            samples = [samples[index] for index in arranged([len(sample["cls"]) for sample in samples])]
        return {**self.stock(samples), _STATE: state, _TIMES: self.clock.times_ms()}


class _FirstState:
    """Worker initialisation that restores the states of an interrupted run."""

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
            fill_buffer(worker.dataset, state["buffer"])
            set_random_state(state["random"])


def for_file(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the result of `ResumableLoader.state_dict` for `torch.load(weights_only=True)`.

    The conversion takes milliseconds, so it is done only when the state is saved or restored.

    Args:
        state: State of a loader; the states of its workers may be packed.
    """
    workers = [
        torch.load(io.BytesIO(worker), weights_only=True) if isinstance(worker, bytes) else worker
        for worker in state["workers"]
    ]
    return {**state, "workers": workers}


def _packed(state: Mapping[str, Any]) -> bytes:
    """Pack a state into bytes. Otherwise, each tensor would go to the other process through its own file handle."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
