"""Decoding of JPEG files: OpenCV, which Ultralytics uses, PyTorch's torchvision, and nvJPEG on a GPU.

    python -m benchmarks decoding --out benchmarks/results/decoding.json      (about half a minute on one H200)
    python -m benchmarks decoding --out part.json --small --device cpu

The files have the sizes and the bytes of photographs in COCO and are in memory. Every decoder decodes all of them in
turn. `images_per_s` has the rounds of each: one thread for `opencv` and `torchvision`, a process on every core for
`opencv, all cores`, and one thread that gives batches of 128 files to the GPU for `nvjpeg`. `difference` says how far
the values of pixels, from 0 to 255, are from OpenCV's: the largest and the mean difference, and the percentage of
values that differ by more than 2.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import report, rounds
from benchmarks.drawings import photographs
from yolov12.mas.memory.cgroups import usable_cores

IMAGES, ROUNDS, BATCH = 1024, 5, 128
SMALL = {"images": 8, "rounds": 1}
_MOST = 2
"""Largest difference of a value that counts as rounding."""


def opencv(files: Sequence[Any]) -> list[Any]:
    """Decode files as Ultralytics does, each to (height, width, 3), blue first."""
    import cv2

    cv2.setNumThreads(1)
    return [cv2.imdecode(file, cv2.IMREAD_COLOR) for file in files]


def decoders(files: Sequence[Any], pool: Any, device: str) -> dict[str, Callable[[], object]]:
    """Return what decodes all files, by name.

    Args:
        files: Bytes of each file, a NumPy array.
        pool: Processes that have the files, too.
        device: `cuda` for nvJPEG as well.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    tensors = [torch.from_numpy(file) for file in files]

    def torchvision(on: str) -> None:
        parts = [tensors[begin : begin + BATCH] for begin in range(0, len(tensors), BATCH)]
        for part in parts:
            if on == "cpu":
                _ = [decode_jpeg(file, mode=ImageReadMode.RGB) for file in part]
            else:
                decode_jpeg(part, mode=ImageReadMode.RGB, device=on)
                torch.cuda.synchronize()

    torch.set_num_threads(1)
    found: dict[str, Callable[[], object]] = {
        "opencv": lambda: opencv(files),
        "opencv, all cores": lambda: pool.map(_decode_mine, range(usable_cores()), chunksize=1),
        "torchvision": functools.partial(torchvision, "cpu"),
    }
    return found | ({"nvjpeg": functools.partial(torchvision, "cuda")} if device == "cuda" else {})


def difference(files: Sequence[Any], device: str) -> dict[str, float]:
    """Return how far the pixels of torchvision on a device are from those of OpenCV.

    Args:
        files: Bytes of each file, a NumPy array.
        device: `cuda` for nvJPEG.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    largest, total, beyond, values = 0, 0, 0, 0
    for file, wanted in zip(files, opencv(files), strict=True):
        found = decode_jpeg(torch.from_numpy(file), mode=ImageReadMode.RGB, device=device).cpu()
        off = (found.permute(1, 2, 0).flip(-1).int() - torch.from_numpy(wanted).int()).abs()
        largest, total = max(largest, int(off.max())), total + int(off.sum())
        beyond, values = beyond + int((off > _MOST).sum()), values + off.numel()
    return {"largest": largest, "mean": total / values, "percent_beyond_2": 100 * beyond / values}


_mine: list[Any] = []


def _keep(files: Sequence[Any]) -> None:
    _mine[:] = files


def _decode_mine(process: int) -> None:
    opencv(_mine[process :: usable_cores()])


def measure(images: int, count: int, device: str) -> dict[str, Any]:
    """Let the decoders take turns, and compare their pixels.

    Args:
        images: Number of files.
        count: Number of rounds.
        device: `cuda` or `cpu`.
    """
    import numpy as np

    folder = Path(photographs(images)).parent / "images"
    files = [np.fromfile(file, dtype=np.uint8) for file in sorted(folder.iterdir())]
    with multiprocessing.get_context("fork").Pool(usable_cores(), initializer=_keep, initargs=(files,)) as pool:
        runs = {name: _timed(run, images) for name, run in decoders(files, pool, device).items()}
        speeds = rounds.in_turn(runs, count, warm_up=1)
    devices = {"torchvision": "cpu", **({"nvjpeg": "cuda"} if device == "cuda" else {})}
    return {
        "images": images,
        "mean_bytes": sum(map(len, files)) / images,
        "images_per_s": speeds,
        "difference": {name: difference(files[:64], on) for name, on in devices.items()},
    }


def _timed(run: Callable[[], object], images: int) -> Callable[[], float]:
    def timed() -> float:
        began = time.perf_counter()
        run()
        return images / (time.perf_counter() - began)

    return timed


def main() -> None:
    """Measure, and write the JSON file."""
    options = report.parser(__doc__, small="decode a few files once").parse_args()
    numbers = SMALL if options.small else {"images": IMAGES, "rounds": ROUNDS}
    found = measure(numbers["images"], numbers["rounds"], options.device)
    result = report.Report(options.out, options.device)
    result.update(found)
    result.write()
    for name, each in found["images_per_s"].items():
        print(name, *(f"{speed:.0f}" for speed in each), "images/s", found["difference"].get(name, ""))


if __name__ == "__main__":
    main()
