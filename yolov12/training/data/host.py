"""The host's memory around a training: batches on their way from workers, cached images, pictures.

A training loader of Ultralytics has up to four batches in flight for each worker, ours two; validation, with twice the
workers, has two of twice the size for each. Workers hand them over in /dev/shm, of which a container has 64 MiB unless
told otherwise; a write beyond that is a bus error. On their way to a GPU they leave it soon, for pinned memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from yolov12.mas.memory.host import HostMemory

__all__ = ["AHEAD", "affordable_workers", "cache_fits", "draw_less_ahead", "fewer_pictures", "limit_workers"]

AHEAD = 2
"""Batches that each worker of a training loads ahead (benchmarks/loading.py)."""
_IN_SHM, _IN_FLIGHT = 4, AHEAD + 8
"""Batches of the size of those of a training, for each of its workers, with those of validation."""
_SHARE = 0.5
"""Of the host's memory, for batches in flight."""


def affordable_workers(workers: int, batch_bytes: int, shm_bytes: int | None, host_bytes: int) -> int:
    """How many workers can have all batches in flight that they may have.

    Args:
        workers: Wanted.
        batch_bytes: Of one.
        shm_bytes: Free in /dev/shm; None where there is no such thing.
        host_bytes: Available.
    """
    by_host = int(_SHARE * host_bytes) // (_IN_FLIGHT * batch_bytes)
    by_shm = workers if shm_bytes is None else shm_bytes // (_IN_SHM * batch_bytes)
    return min(workers, by_host, by_shm)


def limit_workers(trainer: Any, memory: HostMemory | None = None, shm: str = "/dev/shm") -> None:
    """Let a training have no more workers than there is room for, and say so with the numbers.

    Args:
        trainer: Of Ultralytics, before its loaders are made.
        memory: Of the host.
        shm: Where workers hand over batches.
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


def draw_less_ahead(trainer: Any) -> None:
    """Let the training loader keep no more batches than it takes to hide what loading one takes.

    Sizes of images, and shares of several ranks, are settled when a batch is drawn: with 8 workers, the 17th batch from
    now has what is decided now, not the 33rd.

    Args:
        trainer: Of Ultralytics, with a training loader that has given no batch yet.
    """
    from ultralytics.data.build import InfiniteDataLoader

    loader = trainer.train_loader
    if isinstance(loader, InfiniteDataLoader) and loader.num_workers and loader.iterator is None:
        loader.prefetch_factor = min(loader.prefetch_factor, AHEAD)


def cache_fits(
    stock: Callable[..., bool], dataset: Any, /, *args: Any, memory: HostMemory | None = None, **kwargs: Any
) -> bool:
    """Run Ultralytics' `check_cache_ram`, which does not know the limit of a container, and check that as well.

    Args:
        stock: Ultralytics' own method.
        dataset: Whose images are to be kept in memory.
        args: Positional arguments for `stock`.
        memory: Of the host.
        kwargs: Keyword arguments for `stock`.
    """
    if not stock(dataset, *args, **kwargs):
        return False
    from ultralytics.utils import LOGGER

    some = range(0, dataset.ni, max(dataset.ni // 30, 1))
    needed = sum(dataset.load_image(index)[0].nbytes for index in some) * dataset.ni // len(some)
    room = (memory or HostMemory()).room_bytes()[1]
    if needed <= _SHARE * room:
        return True
    LOGGER.warning(
        f"memory: cache=ram would take {_mib(needed)}, more than half of the {_mib(room)} that this process may have: "
        "images are not cached. cache=disk keeps them decoded on disk"
    )
    dataset.cache = None
    return False


def fewer_pictures(stock: Callable[..., Any], /, labels: Any, images: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `plot_images` on the images it draws: it makes floats of all it is given.

    Args:
        stock: Ultralytics' own function.
        labels: Of a batch, with its images under `img` or not.
        images: Of the batch.
        args, kwargs: For `stock`.
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
