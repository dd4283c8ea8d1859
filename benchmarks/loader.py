"""Loading of training images on the CPU: Ultralytics' loader, and this package's, which makes the same bytes of a draw.

    python -m benchmarks loader --out benchmarks/results/loader.json          (about 3 minutes on two cores)
    python -m benchmarks loader --out part.json --small
    python -m benchmarks loader --out benchmarks/results/loader_workers.json --part workers    (one to four minutes)

640 images of the sizes that photographs have in COCO, drawn as noise and saved as JPEG of 150 kB, are loaded at 640
pixels with Ultralytics' default augmentation. Both loaders load one batch each in turn. `cpu_ms` is the CPU time of all
processes for one image, `ratio` the median over the pairs of batches. With workers, whole rounds take turns.

`stages` has the CPU time for one image that is spent in each function, without the functions that it calls.

Part `workers` has images/s of whole loaders by number of workers, with a GPU in pinned memory, and where the time goes:
for one image, the CPU time of the workers (user and system) and of this process with its pinning thread, the page
faults of the workers, and what else Linux counts (see `python -m benchmarks workers`). `idle_percent` is the part of
the time in which workers neither compute nor wait for the kernel. `threads` is the number of threads of a worker. The
first word of a setting says whose loader it is; `new memory` stands for batches in new shared memory, as before.
Without a GPU there are two workers, and this process copies the images into ordinary memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from benchmarks.common import report, rounds
from benchmarks.drawings import photographs
from benchmarks.worker_times import Setting, endless, with_setting

BATCH = 16
CASES: dict[str, dict[str, Any]] = {
    "files": {},
    "ram": {"cache": "ram"},
    "files, mixup": {"mixup": 0.15},
    "files, no mosaic": {"mosaic": 0.0},
}
_OURS = "yolov12.training.data.pixels.Renderer"
STAGES = {
    "read": ("numpy.fromfile",),
    "decode": ("cv2.imdecode",),
    "resize": ("cv2.resize",),
    "canvas": ("numpy.full", "ultralytics.data.augment.Mosaic.apply_image", f"{_OURS}._canvas"),
    "warp": ("cv2.warpAffine",),
    "colours": ("cv2.cvtColor", "cv2.LUT", "cv2.convertScaleAbs", "cv2.merge", f"{_OURS}._change_colors"),
    "channels, flips": ("numpy.ascontiguousarray", "cv2.split", "cv2.flip"),
    "batch": ("torch.stack", "yolov12.training.data.rendering._empty"),
}


def loader(data: dict[str, Any], ours: bool, workers: int, **arguments: Any) -> Any:
    """Return a training loader.

    Args:
        data: Data set as Ultralytics has read it.
        ours: True for this package's loader.
        workers: Number of worker processes.
        arguments: Arguments of the training.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_dataloader, build_yolo_dataset
    from ultralytics.utils.torch_utils import init_seeds

    from yolov12.training.data.loader import ResumableLoader

    init_seeds(0)
    cfg = get_cfg(overrides={"mode": "train", **arguments})
    stock = build_dataloader(build_yolo_dataset(cfg, data["train"], BATCH, data), BATCH, workers, device="cpu")
    return ResumableLoader(stock, cfg.imgsz).take_over() if ours else stock


def in_turn(data: dict[str, Any], batches: int, **arguments: Any) -> dict[str, Any]:
    """Load batches in this process, one of each loader in turn.

    Args:
        data: Data set as Ultralytics has read it.
        batches: Number of batches that are measured.
        arguments: Arguments of the training.
    """
    stock, ours = (endless(loader(data, ours, 0, **arguments)) for ours in (False, True))
    stock_ms, ours_ms, ratio = cpu_times(stock, ours, batches)
    return {"stock_cpu_ms": stock_ms, "ours_cpu_ms": ours_ms, "ratio": ratio}


def cpu_times(one: Iterator[Any], other: Iterator[Any], batches: int) -> tuple[float, float, float]:
    """Load batches of two loaders in turn.

    Args:
        one: Loader without an end that works in this process.
        other: Another one.
        batches: Number of batches of each that are measured, after one that fills buffers.

    Returns:
        CPU time of an image in milliseconds with either loader, and their ratio. All are medians.
    """

    def cpu_ms(loader: Iterator[Any]) -> float:
        begin = time.process_time()
        images = len(next(loader)["im_file"])
        return 1000 * (time.process_time() - begin) / images

    runs = {"one": functools.partial(cpu_ms, one), "other": functools.partial(cpu_ms, other)}
    found = rounds.in_turn(runs, batches, warm_up=1)
    ratio = rounds.median_ratio(found["one"], found["other"])
    return statistics.median(found["one"]), statistics.median(found["other"]), ratio


def with_workers(data: dict[str, Any], workers: int, rounds: int, batches: int, **arguments: Any) -> dict[str, Any]:
    """Load batches in worker processes, in rounds of both loaders in turn.

    Args:
        data: Data set as Ultralytics has read it.
        workers: Number of worker processes.
        rounds: Number of rounds of each loader.
        batches: Number of batches that are measured in a round.
        arguments: Arguments of the training.
    """
    import psutil

    cpu_ms: list[list[float]] = [[], []]
    images_per_s: list[list[float]] = [[], []]
    for _, ours in itertools.product(range(rounds), (False, True)):
        made = loader(data, ours, workers, **arguments)
        each = endless(made)
        for _ in range(2 * workers):
            next(each)
        processes = [psutil.Process(), *(psutil.Process(worker.pid) for worker in made.iterator._workers)]

        def cpu_s(processes: list[Any] = processes) -> float:
            return sum(sum(process.cpu_times()[:2]) for process in processes)

        images, cpu, begin = 0, cpu_s(), time.perf_counter()
        for batch in itertools.islice(each, batches):
            images += len(batch["img"])
        images_per_s[ours].append(images / (time.perf_counter() - begin))
        cpu_ms[ours].append(1000 * (cpu_s() - cpu) / images)
        made.close()
    (stock_ms, ours_ms), (stock, ours_speed) = map(statistics.median, cpu_ms), map(statistics.median, images_per_s)
    return {
        "workers": workers,
        "stock_cpu_ms": stock_ms,
        "ours_cpu_ms": ours_ms,
        "ratio": stock_ms / ours_ms,
        "stock_images_per_s": stock,
        "ours_images_per_s": ours_speed,
    }


@contextlib.contextmanager
def timed(ours: bool) -> Iterator[Counter[str]]:
    """Add up the CPU time in each stage, in seconds, while the context lasts.

    Args:
        ours: True to leave Ultralytics' functions alone, as changed ones would not be known to this package.
    """
    spent: Counter[str] = Counter()
    inner = [0.0]

    def around(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - begin
                spent[stage] += took - inner.pop()
                inner[-1] += took

        return run

    with contextlib.ExitStack() as stack:
        for stage, places in STAGES.items():
            for place in places:
                if ours and place.startswith("ultralytics."):
                    continue
                patch = mock.patch(place)
                original, _ = patch.get_original()
                stack.enter_context(mock.patch(place, around(stage, original)))
        yield spent


def stages(data: dict[str, Any], batches: int, **arguments: Any) -> dict[str, dict[str, float]]:
    """Return the CPU milliseconds for one image of each stage, of Ultralytics' loader and of ours.

    Args:
        data: Data set as Ultralytics has read it.
        batches: Number of batches that are measured.
        arguments: Arguments of the training.
    """
    found = {}
    for name, ours in (("stock", False), ("ours", True)):
        made = endless(loader(data, ours, 0, **arguments))
        next(made)
        with timed(ours) as spent:
            begin = time.process_time()
            images = sum(len(batch["img"]) for batch in itertools.islice(made, batches))
            whole = time.process_time() - begin
        spent["labels and the rest"] = whole - spent.total()
        found[name] = {stage: 1000 * took / images for stage, took in spent.items()}
    return found


SETTINGS = (
    *(Setting(workers) for workers in (4, 8, 12, 15)),
    *(Setting(workers, has_places=False) for workers in (8, 15)),
    *(Setting(workers, is_ours=False, prefetch=4) for workers in (8, 15)),
    Setting(8, prefetch=4, is_for_files=False),
    Setting(8, has_places=False, pins=False, is_for_files=False),
)
ON_CPU = (Setting(2), Setting(2, has_places=False), Setting(2, is_ours=False, prefetch=4)) * 3


def workers_part(options: argparse.Namespace, result: report.Report) -> None:
    """Measure loaders by number of workers, from JPEG files and from memory, and write each result at once."""
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, imgsz, batch, seconds = (1024, 640, 64, 1.5) if device == "cuda" else (512, 640, 16, 10.0)
    if options.small:
        images, imgsz, batch, seconds = 32, 64, 4, 0.1
    data = check_det_dataset(photographs(images, imgsz))
    result |= {"imgsz": imgsz, "batch": batch, "rows": []}
    for name in ("ram", "files"):
        cfg = get_cfg(overrides={"mode": "train", "imgsz": imgsz, **CASES[name]})
        dataset = build_yolo_dataset(cfg, data["train"], batch, data)
        for setting in SETTINGS if device == "cuda" else ON_CPU:
            if setting.is_for_files or name == "ram":
                row = {"source": name, "setting": str(setting)}
                row |= with_setting(dataset, setting, device, batch, seconds)
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
                result.write()


def main() -> None:
    """Measure all cases and write them to a file."""
    parser = report.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="small images, to try the benchmark")
    parser.add_argument("--part", choices=("cases", "workers"), default="cases", help="what to measure")
    options = parser.parse_args()
    import cv2
    import torch
    from ultralytics.data.utils import check_det_dataset

    from yolov12 import autopatch

    autopatch.apply()
    torch.set_num_threads(1)  # as in a worker
    result = report.Report(options.out, "cuda" if options.part == "workers" else "cpu", opencv=cv2.__version__)
    if options.part == "workers":
        workers_part(options, result)
        return
    images, imgsz, batches, rounds = (32, 64, 8, 1) if options.small else (640, 640, 20, 2)
    data = check_det_dataset(photographs(images, imgsz))
    result |= {"imgsz": imgsz, "batch": BATCH}
    for name, arguments in CASES.items():
        result[name] = in_turn(data, batches, imgsz=imgsz, **arguments)
        print(name, json.dumps(result[name]), flush=True)
        result.write()
    for name in ("files", "ram"):
        case = with_workers(data, 2, rounds, batches, imgsz=imgsz, **CASES[name])
        result[f"{name}, 2 workers"] = case
        print(name, json.dumps(case), flush=True)
        result[f"{name}, stages"] = stages(data, batches, imgsz=imgsz, **CASES[name])
        print(name, json.dumps(result[f"{name}, stages"]), flush=True)
        result.write()


if __name__ == "__main__":
    main()
