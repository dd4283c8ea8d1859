"""Number of loader workers: what limits their speed, and a training that chooses it against 8 workers.

    python -m benchmarks workers --out benchmarks/results/workers.json --seconds 235      (one H200 with 16 cores)
    python -m benchmarks workers --out part.json --only processes loaders
    python -m benchmarks workers --out part.json --small                                  (half a minute on the CPU)

Each part is written as soon as it is measured, and kept when others are measured later. A row for which the time is
not enough is left out.

Part `processes` has what this machine gives to several processes at once, without a loader: `compute` (work in the
processor's cache, in rounds a second), `copy` (16 MiB from and to memory, in GiB/s) and `faults` (first writes on new
pages that are shared, in GiB/s), each for all processes together. Where `compute` stops to grow at half of the cores,
two of them are one physical core. `copy` shows the limit of the memory, `faults` that of the kernel.

Part `loaders` has images/s by number of workers, with a GPU in pinned memory. For one image: `worker_user_ms`,
`worker_system_ms` (CPU time), `worker_runqueue_ms` (ready, but without a core), context switches (voluntary: it waits;
nonvoluntary: another process got its core), page faults, `decode_ms` and `augment_ms` (by the clock of the worker),
`main_ms` (CPU time of this process), `main_other_threads_ms` (that of its pinning thread and others) and
`main_runqueue_ms`. `idle_percent` is the part of the time in which workers neither compute nor wait for the kernel. If
user time grows with the number, workers share cores or memory; if system time grows, the kernel is the limit; if idle
time grows, this process does not take the batches fast enough.

Part `trainings` has whole trainings of YOLO12-N from JPEG files, with `workers=8` and with the number chosen: for each
epoch the number, images/s without the first batch, and the part of the time spent waiting.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.processes import ROOT, Call
from benchmarks.drawings import photographs
from benchmarks.worker_times import Setting, with_setting

PARTS = ("processes", "loaders", "trainings")
NUMBERS = (8, 15, 4, 12, 16, 10, 6, 14, 15, 8)
"""Numbers of workers. The order is mixed, and two come twice, so that a drift does not look like an effect."""
NUMBERS_SMALL = (2, 1)
TRAIN: dict[str, Any] = {
    "imgsz": 640,
    "batch": 64,
    "device": 0,
    "epochs": 100,
    "optimizer": "SGD",
    "lr0": 1e-3,
    "close_mosaic": 0,
    "plots": False,
    "val": False,
    "save": False,
    "recipe": False,
}
SMALL = {"imgsz": 64, "batch": 4, "nbs": 4, "device": "cpu"}
VARIANTS: dict[str, dict[str, Any]] = {"workers=8": {"workers": 8}, "chosen": {}}


# -- processes ---------------------------------------------------------------------------------------------------------


def _compute() -> Callable[[], float]:
    import numpy as np

    values = np.arange(4096.0)  # 32 KiB

    def work() -> float:
        for _ in range(50):
            np.sqrt(values, out=values)
        return 1.0

    return work


def _copy() -> Callable[[], float]:
    import numpy as np

    source, target = np.ones(16 << 20, np.uint8), np.ones(16 << 20, np.uint8)

    def work() -> float:
        np.copyto(target, source)
        return source.size / 2**30

    return work


def _faults() -> Callable[[], float]:
    def work() -> float:
        with mmap.mmap(-1, 4 << 20) as pages:
            for start in range(0, len(pages), mmap.PAGESIZE):
                pages[start] = 1
            return len(pages) / 2**30

    return work


PROBES = {"compute": _compute, "copy": _copy, "faults": _faults}


def _probe(name: str, seconds: float, ready: Any, found: Any) -> None:
    work, done = PROBES[name](), 0.0
    work()
    ready.wait()
    begin = time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds:
        done += work()
    found.put(done / took)


def processes(numbers: tuple[int, ...], seconds: float) -> list[dict[str, float]]:
    """Return what several processes get done a second, all together.

    Args:
        numbers: Numbers of processes.
        seconds: Time of each measurement.
    """
    rows = []
    context = multiprocessing.get_context("fork")
    for number in numbers:
        row: dict[str, float] = {"processes": number}
        for name in PROBES:
            ready, found = context.Barrier(number), context.Queue()
            started = [context.Process(target=_probe, args=(name, seconds, ready, found)) for _ in range(number)]
            for each in started:
                each.start()
            row[name] = sum(found.get() for _ in started)
            for each in started:
                each.join()
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def machine() -> dict[str, str]:
    """Return what Linux says of cores, control groups and shared memory. Files that are missing are left out."""
    files = {
        "siblings of core 0": "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list",
        "cpu.max": "/sys/fs/cgroup/cpu.max",
        "cpu.stat": "/sys/fs/cgroup/cpu.stat",
        "huge pages of shared memory": "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "load": "/proc/loadavg",
        "kernel": "/proc/version",
    }
    found = {"usable cores": ",".join(map(str, sorted(os.sched_getaffinity(0))))}
    for name, file in files.items():
        with contextlib.suppress(OSError):
            found[name] = Path(file).read_text().strip()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["processor"] = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
        )
    return found


# -- loaders ----------------------------------------------------------------------------------------------------------


def loaders(options: argparse.Namespace, device: str, ends_s: float) -> Iterator[dict[str, Any]]:
    """Measure loaders by number of workers, from memory and from JPEG files, and yield a row for each.

    Args:
        options: Options of the command.
        device: `cuda` or `cpu`.
        ends_s: Time of the clock at which to end.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    imgsz, batch, seconds = (64, 4, 0.1) if options.small else (640, 64, 1.5)
    numbers = NUMBERS_SMALL if options.small else options.numbers
    data = check_det_dataset(photographs(32 if options.small else 1024, imgsz))
    for source in ("ram", "files"):
        cfg = get_cfg(overrides={"mode": "train", "imgsz": imgsz, **({"cache": "ram"} if source == "ram" else {})})
        dataset = build_yolo_dataset(cfg, data["train"], batch, data)
        for number in numbers:
            if time.perf_counter() < ends_s:
                found = with_setting(dataset, Setting(number), device, batch, seconds)
                yield {"source": source, **found}


# -- trainings --------------------------------------------------------------------------------------------------------


class _Measured(Exception):  # noqa: N818 - it ends a training, which is no error
    """The epochs of a training are measured."""


def train(epochs: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, and return what each epoch took.

    Args:
        epochs: Number of epochs to measure. The schedule of the training is longer.
        arguments: Arguments of the training.
    """
    from yolov12 import autopatch

    autopatch.apply()
    from ultralytics import YOLO

    rows: list[dict[str, Any]] = []
    begins: list[float] = []
    waited_s = [0.0]
    ended = [0.0]

    def now(trainer: Any) -> float:
        if trainer.device.type == "cuda":
            import torch

            torch.cuda.synchronize(trainer.device)
        return time.perf_counter()

    def batch_starts(trainer: Any) -> None:
        if trainer.train_loader.position == 2:
            begins.append(ended[0])  # after the first batch, before which workers may start
            waited_s[0] = 0.0
        waited_s[0] += time.perf_counter() - ended[0]

    def batch_ends(trainer: Any) -> None:
        ended[0] = now(trainer) if trainer.train_loader.position == 1 else time.perf_counter()

    def epoch_ends(trainer: Any) -> None:
        seconds, loader = now(trainer) - begins[-1], trainer.train_loader
        images = trainer.batch_size * (len(loader) - 1)
        row = {"workers": loader.num_workers, "seconds": seconds, "images_per_s": images / seconds}
        rows.append({**row, "wait_percent": 100 * waited_s[0] / seconds})
        print(json.dumps(rows[-1]), flush=True)
        if len(rows) == epochs:
            raise _Measured

    yolo = YOLO("yolo12n.yaml")
    yolo.add_callback("on_train_batch_start", batch_starts)
    yolo.add_callback("on_train_batch_end", batch_ends)
    yolo.add_callback("on_train_epoch_end", epoch_ends)
    begin = time.perf_counter()
    with contextlib.suppress(_Measured):
        yolo.train(**arguments)
    yolo.trainer.train_loader.close()
    return {"epochs": rows, "process_s": time.perf_counter() - begin}


def trainings(options: argparse.Namespace, ends_s: float) -> Iterator[dict[str, Any]]:
    """Train with each variant, and yield a row for each.

    Args:
        options: Options of the command.
        ends_s: Time of the clock at which to end.
    """
    images, epochs = (16, 2) if options.small else (options.images, options.epochs)
    data = photographs(images, 64 if options.small else 640)
    took_s = 0.0
    for name, own in VARIANTS.items():
        if time.perf_counter() + took_s > ends_s:
            return
        with tempfile.TemporaryDirectory() as folder:
            arguments = {**TRAIN, **(SMALL if options.small else {}), **own, "data": data, "project": folder}
            log, begin = Path(folder, "log"), time.perf_counter()
            with log.open("w") as output:
                call = {"epochs": epochs, "arguments": arguments}
                process = Call("workers:train", log=output, variables={"YOLO_OFFLINE": "1"}, **call)
                status = process.wait()
            text = log.read_text().replace(str(ROOT), "")
            took_s = time.perf_counter() - begin
        lines = [line for line in text.splitlines() if line.startswith("data: ")]
        found = {"exit_status": status, "log_tail": text[-800:]} if status else process.result()
        yield {"variant": name, **found, "log": lines}


def main() -> None:
    """Measure the parts, and write each row as JSON at once."""
    parser = report.parser(__doc__, parts=PARTS)
    parser.add_argument("--seconds", type=float, default=600.0, help="time for all parts")
    parser.add_argument("--numbers", type=int, nargs="+", default=list(NUMBERS), help="numbers of workers")
    parser.add_argument("--images", type=int, default=2048, help="images of a training")
    parser.add_argument("--epochs", type=int, default=11, help="epochs of a training that are measured")
    parser.add_argument("--small", action="store_true", help="small images on the CPU, to try the benchmark")
    options = parser.parse_args()
    ends_s = time.perf_counter() + options.seconds
    import torch

    from yolov12 import autopatch
    from yolov12.mas.memory.cgroups import usable_cores

    autopatch.apply()
    torch.set_num_threads(1)  # as in a worker
    device = "cuda" if torch.cuda.is_available() and not options.small else "cpu"
    result = report.Report(options.out, device, keep=True)
    if "processes" in options.only:
        few, count = (1, 2), usable_cores()
        numbers = (
            few if options.small else tuple(sorted({1, *(max(count * each // 16, 1) for each in (4, 8, 12, 15, 16))}))
        )
        result.add("processes", {"rows": processes(numbers, 0.05 if options.small else 0.6), "machine": machine()})
    runs: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "loaders": lambda: loaders(options, device, ends_s - ("trainings" in options.only) * 0.55 * options.seconds),
        "trainings": lambda: trainings(options, ends_s),
    }
    for part in (each for each in runs if each in options.only):
        rows: list[dict[str, Any]] = []
        for row in runs[part]():
            rows.append(row)
            print(json.dumps(row), flush=True)
            result.add(part, {"rows": rows, "cpu.stat": machine().get("cpu.stat")})


if __name__ == "__main__":
    main()
