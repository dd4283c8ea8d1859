"""Augmentation on the host and on the device: the work of the host, loaders' images/s, and the time of the kernel.

    python -m benchmarks augmentation --out benchmarks/results/augmentation.json    (a minute on the CPU, two on a GPU)
    python -m benchmarks augmentation --out part.json --small                         (seconds)

640 images of the sizes that photographs have in COCO, drawn as noise and saved as JPEG of 150 kB, are loaded at 640
pixels with Ultralytics' default augmentation. Both sides take turns.

`cpu` has the CPU time for one image of a loader without workers, in one thread: until its batch of 16 images is
complete on the host, or packed for the device. `ratio` is the median over the pairs of batches.

With a GPU, `workers` has the images/s of loaders with worker processes and batches of 128. Images count when the device
has them in half precision in channels_last. `cpu_ms` is the CPU time of the workers and of this process for one image.
`kernel` has times by events of the device, `to_device_ms` with the copies from pinned memory before it. `packed_size`
is the size of packed images in sizes of the images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from benchmarks.common import report
from benchmarks.drawings import photographs
from benchmarks.loader import cpu_times, endless

SOURCES: dict[str, dict[str, Any]] = {"ram": {"cache": "ram"}, "files": {}}
MODES = ("host", "device")


def on_device(images: Any, device: Any) -> Any:
    """Return images of a loader's batch as the model gets them.

    Args:
        images: Tensor of the batch.
        device: Device of the model.
    """
    import torch

    from yolov12.training.adapter.images import scaled
    from yolov12.training.data.device_rendering import PackedTensor, rendered

    if isinstance(images, PackedTensor):
        packed = images.packed
        moved = packed._replace(
            pixels=packed.pixels.to(device, non_blocking=True), numbers=packed.numbers.to(device, non_blocking=True)
        )
        return rendered(moved, torch.float16)
    moved = images.to(device, non_blocking=True)
    return scaled(moved, torch.float16) if moved.is_cuda else (moved / 255).half()


def work(data: dict[str, Any], batches: int, **arguments: Any) -> dict[str, float]:
    """Load batches in this process, one for each place in turn.

    Args:
        data: Data set as Ultralytics has read it.
        batches: Number of batches that are measured.
        arguments: Arguments of the training.
    """
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_dataloader, build_yolo_dataset

    from yolov12.training.data.augmentation import Augmentation
    from yolov12.training.data.loader import ResumableLoader

    cfg = get_cfg(overrides={"mode": "train", **arguments})
    loaders = []
    for mode in MODES:
        stock = build_dataloader(build_yolo_dataset(cfg, data["train"], 16, data), 16, 0, device="cpu")
        made = ResumableLoader(stock, cfg.imgsz).take_over(Augmentation(mode, torch.device("cpu")))
        loaders.append(endless(made))
    host, device, ratio = cpu_times(*loaders, batches)
    return {"host_cpu_ms": host, "device_cpu_ms": device, "ratio": ratio}


def speed(dataset: Any, mode: str, device: Any, options: argparse.Namespace) -> dict[str, float]:
    """Load batches as fast as the loader gives them.

    Args:
        dataset: Data set of Ultralytics, whose images may be in memory.
        mode: One of `MODES`.
        device: Device of the model.
        options: See `main`.
    """
    import psutil
    import torch
    from ultralytics.data.build import build_dataloader

    from yolov12.training.data.augmentation import Augmentation
    from yolov12.training.data.loader import ResumableLoader

    stock = build_dataloader(dataset, options.batch, options.workers, device=device.type)
    stock.prefetch_factor = 2
    made = ResumableLoader(stock, dataset.imgsz).take_over(Augmentation(mode, device))
    batches = endless(made)
    for _ in range(2 * options.workers):  # loaded ahead, or with the start of the workers
        on_device(next(batches)["img"], device)
    processes = [psutil.Process(), *(psutil.Process(worker.pid) for worker in made.iterator._workers)]

    def cpu_s() -> float:
        return float(sum(sum(process.cpu_times()[:2]) for process in processes))

    images, cpu, begin, took = 0, cpu_s(), time.perf_counter(), 0.0
    while took < options.seconds:
        images += len(on_device(next(batches)["img"], device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - begin
    result = {"images_per_s": images / took, "cpu_ms": 1000 * (cpu_s() - cpu) / images}
    made.close()
    return result


def kernel(dataset: Any, device: Any, options: argparse.Namespace) -> dict[str, float]:
    """Time the rendering of one batch.

    Args:
        dataset: Data set of Ultralytics.
        device: A GPU.
        options: See `main`.
    """
    import torch

    from yolov12.training.adapter.images import scaled
    from yolov12.training.data.device_rendering import PackedTensor, rendered
    from yolov12.training.data.packing import pack
    from yolov12.training.data.pixels import Renderer
    from yolov12.training.data.places import Later
    from yolov12.training.data.recipes import samples

    recipes = [sample["img"] for sample in samples(dataset, Later(range(options.batch)))]
    packed = pack(recipes, Renderer(), lambda shape: torch.empty(shape, dtype=torch.uint8, pin_memory=True))
    packed = packed._replace(numbers=packed.numbers.pin_memory())
    moved = packed._replace(pixels=packed.pixels.to(device), numbers=packed.numbers.to(device))
    images = rendered(moved).cpu().pin_memory()
    there = images.to(device)

    def ms(run: Any) -> float:
        found = []
        for _ in range(options.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        return statistics.median(found)

    return {
        "images": options.batch,
        "render_half_ms": ms(lambda: rendered(moved, torch.float16)),
        "render_bytes_ms": ms(lambda: rendered(moved)),
        "to_device_ms": ms(lambda: on_device(PackedTensor.of(packed), device)),
        "host_half_ms": ms(lambda: scaled(there, torch.float16)),
        "host_to_device_ms": ms(lambda: on_device(images, device)),
        "packed_size": packed.pixels.numel() / images.numel(),
    }


def main() -> None:
    """Measure loaders and kernel and write them to a file."""
    parser = report.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="few small images, to try the benchmark")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="time of one round")
    options = parser.parse_args()
    options.images, options.imgsz, options.repeats = 640, 640, 30
    if options.small:
        options.images, options.imgsz, options.batch, options.workers, options.seconds = 32, 64, 8, 1, 0.1
    import cv2
    import torch
    from ultralytics.data.utils import check_det_dataset

    from yolov12 import autopatch

    autopatch.apply()
    torch.set_num_threads(1)  # as in a worker
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    data = check_det_dataset(photographs(options.images, options.imgsz))
    result = report.Report(options.out, device.type, opencv=cv2.__version__)
    result |= {"imgsz": options.imgsz, "images": options.images, "cpu": {}}
    for source, arguments in SOURCES.items():
        result["cpu"][source] = work(data, 2 if options.small else 20, imgsz=options.imgsz, **arguments)
        print(source, json.dumps(result["cpu"][source]), flush=True)
        result.write()
    if device.type == "cuda" or options.small:
        with_workers(data, device, options, result)


def with_workers(data: dict[str, Any], device: Any, options: argparse.Namespace, result: report.Report) -> None:
    """Measure loaders with workers, and the kernel, and write each result at once.

    Args:
        data: Data set as Ultralytics has read it.
        device: Device of the model.
        options: See `main`.
        result: All results.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_yolo_dataset

    result["workers"] = {"workers": options.workers, "batch": options.batch}
    for source, arguments in SOURCES.items():
        cfg = get_cfg(overrides={"mode": "train", "imgsz": options.imgsz, **arguments})
        dataset = build_yolo_dataset(cfg, data["train"], options.batch, data)
        if device.type == "cuda" and "kernel" not in result:
            result["kernel"] = kernel(dataset, device, options)
            print("kernel", json.dumps(result["kernel"]), flush=True)
        rounds = [{mode: speed(dataset, mode, device, options) for mode in MODES} for _ in range(options.rounds)]
        found: dict[str, Any] = {
            mode: {name: statistics.median(each[mode][name] for each in rounds) for name in rounds[0][mode]}
            for mode in MODES
        }
        ratios = [each["device"]["images_per_s"] / each["host"]["images_per_s"] for each in rounds]
        result["workers"][source] = {**found, "ratio": statistics.median(ratios)}
        print(source, json.dumps(result["workers"][source]), flush=True)
        result.write()


if __name__ == "__main__":
    main()
