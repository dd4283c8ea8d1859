"""The time of loader workers, by where it goes: settings of a loader, and counters of its processes from Linux."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["Setting", "endless", "with_setting"]

_SWITCHES = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")


@dataclass(frozen=True)
class Setting:
    """How a loader is run."""

    workers: int
    is_ours: bool = True
    prefetch: int = 2
    has_places: bool = True
    """True to pass images through memory that is used again."""
    pins: bool = True
    is_for_files: bool = True
    """False for a setting that is measured with `cache=ram` alone."""

    def __str__(self) -> str:
        name = f"{'ours' if self.is_ours else 'stock'}, {self.workers} workers"
        name += f", prefetch {self.prefetch}" if self.prefetch != (2 if self.is_ours else 4) else ""
        name += ", new memory" if self.is_ours and not self.has_places else ""
        return name if self.pins else f"{name}, not pinned"


def endless(loader: Any) -> Iterator[Any]:
    """Yield the batches of all epochs."""
    while True:
        yield from loader


def with_setting(dataset: Any, setting: Setting, device: str, batch: int, seconds: float) -> dict[str, Any]:
    """Load batches as fast as the loader gives them, and return where the time goes.

    As many batches of each worker are measured, because workers that began together deliver in bursts.

    Args:
        dataset: Data set of Ultralytics, whose images may be in memory.
        setting: How the loader is run.
        device: Device of the training.
        batch: Images in a batch.
        seconds: Least time to measure.
    """
    import psutil
    from ultralytics.data.build import build_dataloader
    from ultralytics.utils.torch_utils import init_seeds

    from yolov12.training.data import loader as module

    init_seeds(0)
    with mock.patch("os.cpu_count", return_value=1024):  # Ultralytics has no more workers than processors
        made = build_dataloader(dataset, batch, setting.workers, device=device, pin_memory=setting.pins)
    made.prefetch_factor = setting.prefetch
    places = module.shared_images if device == "cuda" else _places
    with mock.patch.object(module, "shared_images", places if setting.has_places else _none):
        ours = module.ResumableLoader(made, dataset.imgsz).take_over() if setting.is_ours else None
    taken = endless(ours or made)
    for _ in range(setting.workers + 1):
        image = next(taken)["img"]
        if device == "cpu":
            _copied(image)
    workers, own = [psutil.Process(worker.pid) for worker in made.iterator._workers], psutil.Process()

    def spent() -> dict[str, float | None]:
        times = [worker.cpu_times() for worker in workers]
        pids = [worker.pid for worker in workers]
        threads = {thread.id: thread.user_time + thread.system_time for thread in own.threads()}
        main_s = threads.get(own.pid, 0.0)
        return {
            "worker_user_ms": 1000 * sum(each.user for each in times),
            "worker_system_ms": 1000 * sum(each.system for each in times),
            "worker_runqueue_ms": _total(_runqueue_ms(pid) for pid in pids),
            "main_ms": 1000 * sum(own.cpu_times()[:2]),
            "main_other_threads_ms": 1000 * (sum(threads.values()) - main_s),
            "main_runqueue_ms": _runqueue_ms(own.pid),
            "faults_per_image": sum(_page_faults(pid) for pid in pids),
            **{name: _total(_switches(pid, name) for pid in pids) for name in _SWITCHES},
        }

    images, loading_ms, before, begin, took = 0, [0.0, 0.0], spent(), time.perf_counter(), 0.0
    for number in itertools.count(1):
        found = next(taken)
        images += len(found["im_file"])
        if device == "cpu":
            _copied(found["img"])
        if ours is not None and ours.times is not None:
            loading_ms[0] += ours.times.decode_ms or 0.0
            loading_ms[1] += ours.times.augment_ms or 0.0
        took = time.perf_counter() - begin
        if took >= seconds and number % len(workers) == 0:
            break
    after = spent()
    counters = {key: _per_image(before[key], after[key], images) for key in before}
    threads = max(worker.num_threads() for worker in workers)
    made.close()
    user, system = counters["worker_user_ms"] or 0.0, counters["worker_system_ms"] or 0.0
    return {
        "images_per_s": images / took,
        **counters,
        "decode_ms": loading_ms[0] / images,
        "augment_ms": loading_ms[1] / images,
        "idle_percent": 100 * (1 - images * (user + system) / 1000 / took / len(workers)),
        "workers": len(workers),
        "threads": threads,
        "seconds": took,
    }


def _none(*_: Any) -> None:
    return None


def _places(loader: Any, image_size: int, most: float) -> Any:
    """Return places for workers without a GPU, too."""
    from yolov12.training.data.shared_images import SharedImages

    return SharedImages(loader.num_workers, int(most * loader.batch_size * 3 * image_size**2))


def _copied(images: Any) -> Any:
    """Copy images as PyTorch's thread does for a GPU, but into ordinary memory."""
    import torch

    return images.pin_memory() if not isinstance(images, torch.Tensor) else torch.empty_like(images).copy_(images)


def _per_image(before: float | None, after: float | None, images: int) -> float | None:
    return None if before is None or after is None else (after - before) / images


def _total(values: Iterator[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _page_faults(process: int) -> int:
    """Return the number of page faults of a process that needed no disk, from Linux."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7])


def _runqueue_ms(process: int) -> float | None:
    """Return for how long the first thread of a process was ready and had no core; None if Linux does not tell."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e6
    except (OSError, IndexError, ValueError):
        return None


def _switches(process: int, name: str) -> float | None:
    """Return how often a process lost its core, by waiting (voluntary) or to another; None if Linux does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith(name)), None)
