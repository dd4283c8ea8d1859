"""Training loader whose state can be saved after any batch, and restored.

The order of the images depends on the generator of the sampler, and their augmentation on their places in this order
(see `places`). So the state is the generator's before the epoch, and the number of batches since then.

All iterators of the loader take their batches from one endless sequence, as in plain Ultralytics. A user's iterator
therefore moves the training on by the batches that it took. There are two exceptions, in which the user gets batches
that are loaded aside and the training does not move on: among several ranks, because all of them must train on the same
batch; and in a resumed run that repeats the callbacks of an epoch, because their batches were taken before the
interruption.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler

from yolov12.mas.data_times import DataTimes
from yolov12.mas.memory.reading import ClockStopwatch, Stopwatch
from yolov12.training.data.arrangement import arranged
from yolov12.training.data.augmentation import Augmentation
from yolov12.training.data.load_clock import LoadClock
from yolov12.training.data.packing import MOST
from yolov12.training.data.places import Order, Start, boxes_of, seeded
from yolov12.training.data.random_state import without_trace
from yolov12.training.data.rendering import Loaded, Rendering, give_recipes
from yolov12.training.data.shared_images import shared_images
from yolov12.training.data.sharing import SHARE, Sharing
from yolov12.training.data.workers import PaceClock

__all__ = ["SKIPPED", "ResumableLoader", "data_of", "resumable"]

SKIPPED = "yolov12_skipped"
"""Key of a placeholder batch: it stands for a batch that was trained on before the run was interrupted."""

_TIMES = "yolov12_times"

_SETTINGS = frozenset(
    (
        "batch_sampler", "batch_size", "dataset", "drop_last", "generator", "multiprocessing_context", "num_workers",
        "persistent_workers", "pin_memory", "prefetch_factor", "sampler", "timeout", "worker_init_fn",
    )
)  # fmt: skip
"""Attributes of PyTorch's loader that a user may set, or that it refuses to change."""


def resumable(loader: Any) -> bool:
    """Return whether a loader can be resumed: it is Ultralytics' own, and its order depends only on its generator."""
    from ultralytics.data.build import InfiniteDataLoader

    if not issubclass(type(loader), InfiniteDataLoader):  # a `ResumableLoader` says that it is one
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
        epoch: Number of epochs that the run has completed.
        stopwatch: Starts a stopwatch of the device, which measures how long it waits for a batch.
    """

    def __init__(
        self,
        loader: Any,
        image_size: int,
        *,
        arrange: bool = False,
        sharing: Sharing | None = None,
        epoch: int = 0,
        stopwatch: Callable[[], Stopwatch] = ClockStopwatch,
    ) -> None:
        self._loader, self._image_size, self._sharing, self._stopwatch = loader, image_size, sharing, stopwatch
        self._order = Order(loader.batch_sampler.sampler, loader.generator, boxes_of(loader.dataset), epoch)
        if sharing is not None:
            self._order.split = sharing.split
        self._collate = _Collate(loader.collate_fn, arrange)
        self._augmentation = self._collate.stock.augmentation
        self._data = data_of(loader)
        self._begun: Start | None = None  # the epoch of the latest batch
        self._taken = len(loader)  # batches of this epoch that were returned: at first as if all were
        self._skip = 0
        self._is_repeating = False  # what happened before an interruption
        self._then: Callable[[], None] | None = None
        self.pace = PaceClock()
        """Measures how fast the training loop takes batches."""
        self.is_loops = True
        """True if an iterator that is made now is the training loop's, False if it is a user's."""
        self.position = 0
        """Number of batches returned to the training loop in this epoch, including placeholders."""
        self.skipped = 0
        """Number of placeholders among them."""
        self.resets = 0
        """Number of changes of the data set, as when mosaic is closed."""
        self.times: DataTimes | None = None
        """Times of the training loop's batch at hand; None if it is of another loader."""
        self.seed: int | None = None
        """Seed of the training loop's batch at hand, for what is drawn once for all its images; None if the batch is of
        another loader, which a user has put in the place of this one."""

    def take_over(self, augmentation: Augmentation | None = None) -> ResumableLoader:
        """Replace the loader's sampler and collate function by those of this object.

        Args:
            augmentation: Decides where images are augmented; None for the host.
        """
        if augmentation is not None:
            self._augmentation = self._collate.stock.augmentation = augmentation
        self._loader.batch_sampler.sampler, self._loader.collate_fn = self._order, self._collate
        self._make_places()
        give_recipes(self._loader.dataset)
        self._collate.clock.watch(self._loader.dataset)
        self.pace.begin(self.ahead(self._loader.num_workers))
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy, which has no attributes yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            setattr(self._loader, name, value)
        else:
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Class of the loader, for `isinstance` in code of the user's own."""
        return type(self._loader)

    @property
    def collate_fn(self) -> Callable[[list[Any]], dict[str, Any]]:
        """Collate function of the user or of Ultralytics. A new one counts for the next workers, as in PyTorch."""
        return self._collate.stock.collate

    @collate_fn.setter
    def collate_fn(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self._collate = self._loader.collate_fn = self._collate.around(collate)

    def __iter__(self) -> Iterator[Any]:
        return self._epoch() if self.is_loops else self._for_user()

    def _epoch(self) -> Iterator[Any]:
        self.position, skip, self._skip = 0, self._skip, 0
        self.skipped = skip
        for _ in range(skip):
            self.position += 1
            images = torch.zeros(0, 3, self._image_size, self._image_size)
            yield {"img": images, "cls": torch.zeros(0, 1), SKIPPED: True}
        self._go_on()
        for _ in range(len(self) - skip):
            batch, times = self._augmentation.next(self._take)
            self.position, self.times = self.position + 1, times
            self.pace.took(times.wait, is_first=self.position == 1)
            assert self._begun is not None
            self.seed = self._order.seed(self._begun._replace(batch=self._taken - 1))
            if self._sharing is not None:
                batch[SHARE] = self._sharing.taken()
            yield batch
        self._augmentation.epoch_ends()

    def _for_user(self) -> Iterator[Any]:
        aside = self._aside()
        for _ in range(len(self)):
            batch = next(aside) if self._is_repeating or self._sharing is not None else self._take()[0]
            yield self._augmentation.received(batch, rendered=True)

    def _take(self) -> tuple[Any, DataTimes]:
        self._go_on()
        wait = self._stopwatch()
        batch = next(iter(self._loader))
        wait.stop()
        if self._taken == len(self):
            self._begun = self._order.drawn.popleft()
            self._taken = self._begun.batch
        self._taken += 1
        return batch, DataTimes(wait, *batch.pop(_TIMES))

    def _aside(self) -> Iterator[Any]:
        """Yield batches of another order, loaded here, and leave no trace in the training."""
        dataset = self._loader.dataset
        for batch in self._order.aside():
            part = batch if self._sharing is None else self._sharing.equal_part(batch)
            with without_trace(dataset):
                samples = self._collate.stock(dataset.__getitems__(part))
            yield samples

    def batch_ends(self) -> None:
        """Note that the training loop is done with its batch. The next may be of another loader."""
        self.seed = self.times = None

    def repeated(self) -> None:
        """Note that the last batch before an interruption was repeated: what happens from now on is new."""
        self._is_repeating = False

    def _go_on(self) -> None:
        then, self._then, self._is_repeating = self._then, None, False
        if then is not None:
            then()

    def reset(self) -> None:
        """Drop prefetched batches, because the data set has changed; see `InfiniteDataLoader.reset`."""
        self.resets += 1
        self._loader.reset()
        self._draw_again(len(self), None)

    def ahead(self, workers: int) -> int:
        """Return how many batches are drawn, at most, before the first of them is trained on."""
        return workers * (self._loader.prefetch_factor or 0) + 1

    def restart(self, workers: int, ahead: int) -> None:
        """Go on with another number of workers. Prefetched batches are dropped, and loaded again.

        Args:
            workers: Number of workers of a loader that has some; 0 for one that has none.
            ahead: Largest result of `ahead` of all ranks.
        """
        self._loader.reset()
        self._loader.num_workers = workers
        self._make_places()
        self._draw_again(self._taken, ahead)

    def _make_places(self) -> None:
        """Make places for the batches of workers that have not started."""
        most = MOST if self._augmentation.may_pack else 1.0
        self._collate.stock.shared = shared_images(self._loader, self._image_size, most)

    def _draw_again(self, taken: int, ahead: int | None) -> None:
        """Begin after a batch of the latest epoch with the next iterator."""
        if self._sharing is not None:
            self._sharing.drop(ahead)
        if not self._is_repeating:  # otherwise, the epoch was begun anew before the interruption
            if self._begun is not None:
                self._order.begin = self._begun._replace(batch=taken)
            elif self._order.drawn:
                self._order.begin = self._order.drawn[0]
        self._order.drawn.clear()
        self._taken = len(self)
        self.pace.begin(self.ahead(self._loader.num_workers))

    @property
    def augmentation(self) -> Augmentation:
        """Decides where images are augmented."""
        return self._augmentation

    @property
    def is_last(self) -> bool:
        """True if the latest batch is the last of its epoch."""
        return self.position == len(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the latest batch, in a form for `torch.load(weights_only=True)`."""
        assert self._begun is not None
        return {
            "data": self._data,
            "position": self.position,
            "arrange": self._collate.arrange if self._sharing is None else self._sharing.arranges,
            "order": self._begun.generator,
            "epoch": self._begun.epoch,
            "taken": self._taken,
            "augments_on_device": self._augmentation.is_on_device,
            "resolution_steps": self._sharing.state_dict() if self._sharing is not None else [],
        }

    def load_state_dict(self, state: Mapping[str, Any], then: Callable[[], None]) -> bool:
        """Restore the result of `state_dict`. The next epoch begins with placeholders for the batches that are done.

        Args:
            state: State of a loader with the same data, see `data_of`.
            then: Called after the last placeholder, before the first batch is loaded for the training.

        Returns:
            True if augmentation continues with the same random draws, and False for a file of an older version.
        """
        self._skip, self._then, self._is_repeating = state["position"], then, True
        self._augmentation.resume(on_device=state.get("augments_on_device", False))
        taken = state.get("taken", state["position"])  # older files do not count users' batches
        self._order.begin = self._begun = Start(state["order"], state.get("epoch", 0), taken)
        if self._sharing is not None:
            self._sharing.load_state_dict(state.get("resolution_steps") or state.get("rungs", []))  # files of version 1
        else:
            self._collate.arrange = state["arrange"]
        return "epoch" in state


class _Collate:
    """Collate function that arranges a batch."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], arrange: bool) -> None:
        self.stock, self.arrange = Rendering(collate), arrange
        self.clock = LoadClock()

    def around(self, collate: Callable[[list[Any]], dict[str, Any]]) -> _Collate:
        """Return the same with another collate function."""
        other = _Collate(collate, self.arrange)
        other.clock = self.clock
        other.stock.shared, other.stock.augmentation = self.stock.shared, self.stock.augmentation
        return other

    def __call__(self, samples: Any) -> dict[str, Any]:
        seed = None
        if isinstance(samples, Loaded):
            samples, seed = list(samples), samples.seed
        with seeded(seed):  # a user's collate function may draw
            if self.arrange:
                samples = [samples[index] for index in arranged([len(sample["cls"]) for sample in samples])]
            return {**self.stock(samples), _TIMES: self.clock.times_ms()}
