"""Host memory that a training needs besides the model: batches in flight, cached images, pictures.

Ultralytics' training loader has up to four batches in flight per worker, and ours has two. Validation uses twice as
many workers, each with two batches of twice the size. Workers pass batches through /dev/shm, which has 64 MiB in a
container by default; a write beyond its end raises a bus error. Batches for a GPU leave /dev/shm soon, for pinned
memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from yolov12.mas.memory.host import HostMemory

__all__ = ["AHEAD", "affordable_workers", "cache_fits", "limit_prefetch", "limit_workers", "plot_fewer_images"]

AHEAD = 2
"""Number of batches that each worker of a training prefetches (benchmarks/loading.py)."""
_IN_SHM, _IN_FLIGHT = 4, AHEAD + 8
"""Most batches in /dev/shm, and in flight, for each training worker, in batches of the training's size; validation is
included."""
_FRACTION = 0.5
"""Largest fraction of the available host memory for batches in flight, and for cached images."""


def affordable_workers(workers: int, batch_bytes: int, shm_bytes: int | None, host_bytes: int) -> int:
    """Return the number of workers whose batches in flight fit into memory.

    Args:
        workers: Requested number of workers.
        batch_bytes: Bytes of one batch.
        shm_bytes: Free bytes of /dev/shm; None on a system without it.
        host_bytes: Available bytes of host memory.
    """
    by_host = int(_FRACTION * host_bytes) // (_IN_FLIGHT * batch_bytes)
    by_shm = workers if shm_bytes is None else shm_bytes // (_IN_SHM * batch_bytes)
    return min(workers, by_host, by_shm)


def limit_workers(trainer: Any, memory: HostMemory | None = None, shm: str = "/dev/shm") -> None:
    """Limit the workers of a training to what fits into host memory, and log a warning with the numbers.

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
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine's memory
    batch_bytes = int(trainer.batch_size) // max(trainer.world_size, 1) * here * 3 * args.imgsz**2
    shm_bytes, host_bytes = _free_bytes(shm), (memory or HostMemory()).room_bytes()[1]
    fewer = affordable_workers(workers, batch_bytes, shm_bytes, host_bytes)
    if fewer >= workers:
        return
    needed = workers * _IN_SHM * batch_bytes
    if shm_bytes is not None and shm_bytes < needed:
        why = f"{shm} has {_mib(shm_bytes)} free. `docker run --shm-size={max(needed >> 30, 1) * 2}g` gives more"
    else:
        needed, why = workers * _IN_FLIGHT * batch_bytes, f"the host has {_mib(host_bytes)} available"
    LOGGER.warning(
        f"memory: {workers} workers may have {_mib(needed)} of batches of {trainer.batch_size} images in flight, and "
        f"{why}: going on with workers={fewer}"
    )
    args.workers = fewer


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
    """Run Ultralytics' `check_cache_ram`, and check the memory limit of the container, which it does not know.

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
    room = (memory or HostMemory()).room_bytes()[1]
    if needed <= _FRACTION * room:
        return True
    LOGGER.warning(
        f"memory: cache=ram would take {_mib(needed)}, more than half of the {_mib(room)} that this process may have: "
        "images are not cached. cache=disk keeps them decoded on disk"
    )
    dataset.cache = None
    return False


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
