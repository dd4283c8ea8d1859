"""Host memory that a training needs besides the model: batches in flight, cached images, pictures.

Ultralytics' training loader has up to four batches in flight per worker, and ours has two. Validation uses twice as
many workers, each with two batches of twice the size. Workers pass batches through /dev/shm, which has 64 MiB in a
container by default; a write beyond its end raises a bus error. Batches for a GPU leave /dev/shm soon, for pinned
memory. For mosaics, each worker also keeps decoded images: those of eight batches, and at most a thousand.

On the CPU and on an integrated GPU, the model needs the same memory. There, the data of a training gets at most half of
what `mem_limit` and the margin leave: a quarter for cached images, and a quarter for loader workers.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from yolov12.mas.config import Config
from yolov12.mas.memory.host import HostMemory
from yolov12.mas.memory.meter import meter_for, shares_memory
from yolov12.training.data.packing import MOST

__all__ = ["AHEAD", "affordable_workers", "cache_fits", "cache_room_bytes", "data_room", "has_room_for_packed"]
__all__ += ["is_cached", "limit_prefetch", "limit_workers", "plot_fewer_images", "room_for_workers"]

# A worker must not collect the garbage that it has from its parent: the tensors of a GPU in it would end the worker.
os.register_at_fork(after_in_child=gc.freeze)

AHEAD = 2
"""Number of batches that each worker of a training prefetches (benchmarks/loading.py)."""
_IN_SHM, _IN_FLIGHT = 4, AHEAD + 9
"""Most batches in /dev/shm, and in flight, for each training worker, in batches of the training's size. Validation is
included, and the batch in the place of `shared_images`."""
_FRACTION, _SHARED_FRACTION = 0.5, 0.25
"""Largest fraction of the available host memory for loader workers, and for cached images; without and with a model
that needs the same memory."""
_KEPT_BATCHES, _KEPT_IMAGES = 8, 1000
"""Most images that a worker keeps for mosaics, in batches and in images. Ultralytics' data sets define them."""


@dataclass
class _DataRoom:
    """Host memory for the data of a training."""

    free_bytes: int
    """Memory that is available, within `mem_limit` and its margin if the model needs the same memory."""
    is_shared: bool
    """True if the model needs the same memory."""
    cached_bytes: int = 0
    """Memory that was granted to cached images."""

    @property
    def fraction(self) -> float:
        """Largest fraction for loader workers, and for cached images."""
        return _SHARED_FRACTION if self.is_shared else _FRACTION


class _Building(threading.local):
    """The training whose loaders this thread is building."""

    room: _DataRoom | None = None


_building = _Building()


def _room_of(trainer: Any, memory: HostMemory) -> _DataRoom:
    if not shares_memory(trainer.device):
        return _DataRoom(memory.room_bytes()[1], is_shared=False)
    config = Config.parse(vars(trainer.args))
    reading = meter_for(trainer.device, config.limit, config.safety_ratio, memory).read()
    return _DataRoom(max(0, reading.budget_bytes(config.safety_ratio) - reading.reserved_bytes), is_shared=True)


@contextmanager
def data_room(trainer: Any, memory: HostMemory | None = None) -> Iterator[None]:
    """Limit the images that are cached while a training builds its loaders, if the model needs the same memory.

    Args:
        trainer: Ultralytics trainer whose loaders are not made yet.
        memory: Reader of the host's memory.
    """
    from ultralytics.utils import LOGGER

    before, room = _building.room, _room_of(trainer, memory or HostMemory())
    _building.room = room
    if room.is_shared and (trainer.device.type == "cuda" or is_cached(trainer.args) or trainer.args.workers):
        part = _mib(room.fraction * room.free_bytes)
        LOGGER.info(
            f"memory: model, cached images and loader workers share one pool, with {_mib(room.free_bytes)} left for "
            f"this run: at most {part} for cached images, {part} for workers, and the rest for the model"
        )
    try:
        yield
    finally:
        _building.room = before


def affordable_workers(
    workers: int,
    batch_bytes: int,
    shm_bytes: int | None,
    host_bytes: int,
    *,
    fraction: float = _FRACTION,
    kept_bytes: int = 0,
) -> int:
    """Return the number of workers that fit into memory.

    Args:
        workers: Requested number of workers.
        batch_bytes: Bytes of one batch.
        shm_bytes: Free bytes of /dev/shm; None on a system without it.
        host_bytes: Available bytes of host memory.
        fraction: Fraction of them that the workers may take.
        kept_bytes: Bytes of the images that each worker keeps.
    """
    by_host = int(fraction * host_bytes) // (_IN_FLIGHT * batch_bytes + kept_bytes)
    by_shm = workers if shm_bytes is None else shm_bytes // (_IN_SHM * batch_bytes)
    return min(workers, by_host, by_shm)


def limit_workers(trainer: Any, memory: HostMemory | None = None, shm: str = "/dev/shm") -> None:
    """Limit the workers of a training to what fits into host memory, and log a warning with the numbers.

    If the model needs the same memory, they get a quarter of what is left, and the images that they keep count too.

    Args:
        trainer: Ultralytics trainer whose loaders are not made yet.
        memory: Reader of the host's memory.
        shm: Folder of the shared memory through which workers pass batches.
    """
    from ultralytics.utils import LOGGER

    args = trainer.args
    if not args.workers or not isinstance(args.imgsz, int) or trainer.batch_size < 1:
        return
    workers = min(args.workers, (os.cpu_count() or 1) // max(trainer.world_size, 1))
    shm_bytes, room = _free_bytes(shm), _room_of(trainer, memory or HostMemory())
    batch_bytes, kept_bytes = _worker_bytes(trainer, room)
    fewer = affordable_workers(
        workers, batch_bytes, shm_bytes, room.free_bytes, fraction=room.fraction, kept_bytes=kept_bytes
    )
    if fewer >= workers:
        return
    needed = workers * _IN_SHM * batch_bytes
    if shm_bytes is not None and shm_bytes < needed:
        why = f"{shm} has {_mib(shm_bytes)} free. `docker run --shm-size={max(needed >> 30, 1) * 2}g` gives more"
    else:
        needed, why = workers * _IN_FLIGHT * batch_bytes, f"the host has {_mib(room.free_bytes)} available"
        if room.is_shared:
            why = (
                f"{_mib(workers * kept_bytes)} of images for mosaics, more than a quarter of the "
                f"{_mib(room.free_bytes)} that are left for this run, model and cached images"
            )
    LOGGER.warning(
        f"memory: {workers} workers may have {_mib(needed)} of batches of {trainer.batch_size} images in flight, and "
        f"{why}: going on with workers={fewer}"
    )
    args.workers = fewer


def has_room_for_packed(trainer: Any, memory: HostMemory | None = None, shm: str = "/dev/shm") -> bool:
    """Return whether the batches of a training's workers also fit into memory as packed images, see `packing`.

    Args:
        trainer: Ultralytics trainer with a training loader.
        memory: Reader of the host's memory.
        shm: Folder of the shared memory through which workers pass batches.
    """
    workers = int(trainer.train_loader.num_workers)
    return workers <= room_for_workers(trainer, workers, memory or HostMemory(), shm, are_packed=True)


def room_for_workers(
    trainer: Any, workers: int, memory: HostMemory, shm: str = "/dev/shm", *, are_packed: bool = False
) -> int:
    """Return how many of the workers would fit into memory now.

    Args:
        trainer: Ultralytics trainer with a known image size and batch.
        workers: Number of workers.
        memory: Reader of the host's memory.
        shm: Folder of the shared memory through which workers pass batches.
        are_packed: True if they pass packed images, as they do with `augment_on=device` in any case.
    """
    room = _room_of(trainer, memory)
    batch_bytes, kept_bytes = _worker_bytes(trainer, room, are_packed=are_packed)
    free_bytes, fraction = room.free_bytes, room.fraction
    return affordable_workers(
        workers, batch_bytes, _free_bytes(shm), free_bytes, fraction=fraction, kept_bytes=kept_bytes
    )


def _worker_bytes(trainer: Any, room: _DataRoom, *, are_packed: bool = False) -> tuple[int, int]:
    """Return the bytes of a batch, and of the images that each worker keeps if they count, on this machine."""
    are_packed = are_packed or getattr(trainer.args, "augment_on", "host") == "device"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine's memory
    image_bytes = 3 * trainer.args.imgsz**2
    batch_bytes = int(trainer.batch_size) // max(trainer.world_size, 1) * here * image_bytes
    passed_bytes = int(MOST * batch_bytes) if are_packed else batch_bytes
    if not room.is_shared or is_cached(trainer.args):
        return passed_bytes, 0
    return passed_bytes, min(_KEPT_BATCHES * batch_bytes, _KEPT_IMAGES * here * image_bytes)


def limit_prefetch(trainer: Any) -> None:
    """Limit the prefetch of the training loader to what is needed to hide the time of loading.

    The size of images, and the shares of ranks, are settled when a batch is drawn. With 8 workers, a decision then
    takes effect at the 17th batch from now instead of the 33rd.

    Args:
        trainer: Ultralytics trainer whose training loader has returned no batch yet.
    """
    from ultralytics.data.build import InfiniteDataLoader

    loader = trainer.train_loader
    if isinstance(loader, InfiniteDataLoader) and loader.num_workers and loader.iterator is None:
        loader.prefetch_factor = min(loader.prefetch_factor, AHEAD)


def cache_fits(
    stock: Callable[..., bool], dataset: Any, /, *args: Any, memory: HostMemory | None = None, **kwargs: Any
) -> bool:
    """Run Ultralytics' `check_cache_ram`, and check the limits that it does not know: of the container and of the run.

    Cached images may take half of the available memory; inside `data_room` with a model that needs the same memory, a
    quarter of what is left for the run.

    Args:
        stock: Ultralytics' own method.
        dataset: Ultralytics data set whose images may be cached in memory.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.
        memory: Reader of the host's memory.

    Returns:
        Whether the images are to be cached.
    """
    if not stock(dataset, *args, **kwargs):
        return False
    from ultralytics.utils import LOGGER

    some = range(0, dataset.ni, max(dataset.ni // 30, 1))
    needed = sum(dataset.load_image(index)[0].nbytes for index in some) * dataset.ni // len(some)
    room = _building.room or _DataRoom((memory or HostMemory()).room_bytes()[1], is_shared=False)
    if room.is_shared:
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each process on this machine has a cache
    if needed + room.cached_bytes <= room.fraction * room.free_bytes:
        room.cached_bytes += needed if room.is_shared else 0
        return True
    part = f"more than half of the {_mib(room.free_bytes)} that this process may have"
    if room.is_shared:
        part = (
            f"beside {_mib(room.cached_bytes)} of other cached images more than a quarter of the "
            f"{_mib(room.free_bytes)} that are left for this run, model and workers"
        )
    LOGGER.warning(
        f"memory: cache=ram would take {_mib(needed)}, {part}: images are not cached. cache=disk keeps them decoded on "
        "disk"
    )
    dataset.cache = None
    return False


def is_cached(args: Any) -> bool:
    """Return whether images are cached in memory by the arguments of a training."""
    return str(args.cache).lower() in ("ram", "true")


def cache_room_bytes(trainer: Any, memory: HostMemory) -> int:
    """Return the bytes that cached images could take now.

    Args:
        trainer: Ultralytics trainer.
        memory: Reader of the host's memory.
    """
    room = _room_of(trainer, memory)
    return int(room.fraction * room.free_bytes)


def plot_fewer_images(stock: Callable[..., Any], /, labels: Any, images: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `plot_images` only on the images that it draws, as it converts all images to floats first.

    Args:
        stock: Ultralytics' own function.
        labels: Labels of a batch, which may hold its images under `img`.
        images: Images of the batch.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.
    """
    most = kwargs.get("max_subplots", 16)
    if "img" in labels:
        labels = {**labels, "img": labels["img"][:most]}
    return stock(labels, None if images is None else images[:most], *args, **kwargs)


def _free_bytes(folder: str) -> int | None:
    try:
        stat = os.statvfs(folder)
    except (OSError, AttributeError):
        return None
    return stat.f_bavail * stat.f_frsize


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
