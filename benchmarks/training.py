"""Whole trainings: Ultralytics and this package in turn, from JPEG files and from memory.

    python -m benchmarks training --out benchmarks/results/training.json        (about 15 minutes on one H200)
    python -m benchmarks training --out part.json --models n s --rounds 1 --batches 24
    python -m benchmarks training --out part.json --cores 4                     (as with taskset)
    python -m benchmarks training --out part.json --ours mem_limit=16GiB bn_group=16 --both batch=64
    python -m benchmarks training --out part.json --small                       (a few seconds each on the CPU)

Every training runs in a process of its own; Ultralytics' without this package. The data are 3,072 images with the sizes
and the bytes of photographs in COCO, with mosaic. A training has 8 workers and `batch=128` at 640 pixels.

`images_per_s` is measured over `--batches` batches from the beginning of the second epoch, by the clock of the host,
with a wait for the device at both ends. Before that, prefetched batches are taken out of the loader until one has to be
waited for, so that no batch is measured that was loaded earlier. `first_epoch_s` is the time of the epoch before, with
the start of the workers, the search for kernels and the first decisions of the engine. `wait_percent` is the part of
the measured time in which the training waits for the loader. `gpu_percent` is the mean of NVML's utilisation, read ten
times a second. The other values of ours are from memory.csv. `ratios` has ours over Ultralytics' for each round.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.processes import ROOT, Call
from benchmarks.drawings import photographs

VARIANTS = ("stock", "ours")
SOURCES: dict[str, dict[str, Any]] = {"files": {}, "ram": {"cache": "ram"}}
TRAIN: dict[str, Any] = {
    "imgsz": 640,
    "batch": 128,
    "workers": 8,
    "device": 0,
    "epochs": 100,
    "optimizer": "SGD",
    "lr0": 1e-3,
    "close_mosaic": 0,
    "plots": False,
    "val": False,
    "save": False,
}
OURS = {"recipe": False}
SMALL = {"imgsz": 64, "batch": 4, "nbs": 4, "workers": 1, "device": "cpu"}
WAITED_S = 0.02
"""Seconds from which a batch counts as waited for."""


class _Measured(Exception):  # noqa: N818 - it ends a training, which is no error
    """The batches of a training are measured."""


class Measurement:
    """Measures one training by its callbacks, and ends it.

    Args:
        batches: Number of batches to measure.
    """

    def __init__(self, batches: int) -> None:
        self._wanted, self._count, self._images = batches, 0, 0
        self._began = self._epoch_began = self._batch_ended = self._waited_s = 0.0
        self._gpu: _Utilisation | None = None
        self.result: dict[str, Any] = {}

    def attach(self, model: Any) -> None:
        """Add the callbacks to a `YOLO` object."""
        for name in ("on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end"):
            model.add_callback(name, getattr(self, name))

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Begin to measure in the second epoch."""
        if trainer.epoch == 1:
            self.result["taken_out"] = _take_out(trainer.train_loader)
            self._gpu = _Utilisation(trainer.device)
        self._epoch_began = self._batch_ended = _now(trainer)
        if trainer.epoch == 1:
            self._began = self._epoch_began

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Note the time of the first epoch."""
        if trainer.epoch == 0:
            self.result["first_epoch_s"] = _now(trainer) - self._epoch_began

    def on_train_batch_start(self, _: Any) -> None:
        """Note how long the loop has waited for this batch."""
        self._waited_s += time.perf_counter() - self._batch_ended if self._began else 0.0

    def on_train_batch_end(self, trainer: Any) -> None:
        """Count a batch, and end the training after the last one."""
        if self._began:
            self._count += 1
            self._images += trainer.batch_size  # all batches are whole
        if self._count == self._wanted:
            seconds = _now(trainer) - self._began
            self.result |= {
                "images_per_s": self._images / seconds,
                "batches": self._count,
                "seconds": seconds,
                "wait_percent": 100 * self._waited_s / seconds,
                "gpu_percent": self._gpu.mean() if self._gpu is not None else None,
            }
            raise _Measured
        self._batch_ended = time.perf_counter()


class _Utilisation:
    """Reads the utilisation of a GPU in a thread, ten times a second."""

    def __init__(self, device: Any) -> None:
        self._samples: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(device,), daemon=True)
        self._thread.start()

    def _read(self, device: Any) -> None:
        if device.type != "cuda":
            return
        from yolov12.mas.memory.nvml import ask, driver_api, nvml_session, same_gpu

        with nvml_session():
            handle, _ = same_gpu(device.index or 0, driver_api())
            while not self._ended.wait(0.1):
                if rates := ask("nvmlDeviceGetUtilizationRates", handle):
                    self._samples.append(rates.gpu)

    def mean(self) -> float | None:
        """End the thread, and return the mean in percent; None without a GPU."""
        self._ended.set()
        self._thread.join()
        return sum(self._samples) / len(self._samples) if self._samples else None


def _now(trainer: Any) -> float:
    """Wait for the device, and return the time in seconds."""
    if trainer.device.type == "cuda":
        import torch

        torch.cuda.synchronize(trainer.device)
    return time.perf_counter()


def _take_out(loader: Any) -> int:
    """Take batches out of a loader until one has to be waited for, and return their number."""

    # Ultralytics' loader goes on where another iterator has ended. An iterator of this package would render packed
    # images, which takes time in which workers load.
    take = getattr(loader, "_take", lambda: next(iter(loader)))
    count, took_s = 0, 0.0
    while loader.num_workers and took_s < WAITED_S:
        begin = time.perf_counter()
        take()
        took_s = time.perf_counter() - begin
        count += 1
    return count


def train(model: str, batches: int, cores: int | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train in this process until enough batches are measured.

    Args:
        model: Yaml of the model.
        batches: Number of batches to measure.
        cores: Number of cores to run on; None for all.
        arguments: Arguments of the training.
    """
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    begin = time.perf_counter()
    is_stock = os.environ.get("YOLOV12_AUTOPATCH") == "0"
    if not is_stock:
        from yolov12 import autopatch

        autopatch.apply()
    from ultralytics import YOLO

    yolo = YOLO(model)
    measurement = Measurement(batches)
    measurement.attach(yolo)
    with contextlib.suppress(_Measured):
        yolo.train(**arguments)
    yolo.trainer.train_loader.close()
    assert is_stock == ("yolov12.seams" not in sys.modules), "this is not stock"
    journal = _journal(Path(yolo.trainer.save_dir) / "memory.csv")
    return {**measurement.result, **journal, "process_s": time.perf_counter() - begin}


def _journal(file: Path) -> dict[str, float]:
    """Return what memory.csv says of the waits and of the times of workers after the first epoch; empty for stock."""
    if not file.exists():
        return {}
    rows = [row for row in csv.DictReader(file.read_text().splitlines()) if row["epoch"] != "1" and row["period_ms"]]

    def total(name: str) -> float:
        return sum(float(row[name] or 0) for row in rows)

    images = total("images")
    return {
        "journal_wait_percent": 100 * total("data_wait_ms") / total("period_ms"),
        "decode_ms_per_image": total("decode_ms") / images,
        "augment_ms_per_image": total("augment_ms") / images,
        "step_ms_per_image": total("step_ms") / images,
    }


def _in_process(variant: str, folder: Path, call: dict[str, Any]) -> dict[str, Any]:
    log = folder / "log"
    with log.open("w") as output:
        variables = {"YOLO_OFFLINE": "1"}
        process = Call("training:train", stock=variant == "stock", log=output, variables=variables, **call)
        if status := process.wait():
            return {"exit_status": status, "log_tail": log.read_text()[-800:].replace(str(ROOT), "")}
    found: dict[str, Any] = process.result()
    return found


def trainings(options: argparse.Namespace, data: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Run all trainings, the two variants in turn, and yield a row for each.

    Args:
        options: Options of the command.
        data: Path of the data set.
        folder: Folder for the runs.
    """
    common = {**TRAIN, "data": data, "project": str(folder), "exist_ok": True, **(SMALL if options.small else {})}
    for source in options.sources:
        for model in options.models:
            for round_ in range(options.rounds):
                for variant in VARIANTS:
                    arguments = {**common, **SOURCES[source], **dict(options.both), "name": variant}
                    arguments |= {**OURS, **dict(options.ours)} if variant == "ours" else {}
                    call = {"model": f"yolo12{model}.yaml", "batches": options.batches, "cores": options.cores}
                    found = _in_process(variant, folder, {**call, "arguments": arguments})
                    yield {"model": model, "source": source, "round": round_, "variant": variant, **found}


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how many times as many images a second this package trains, and how much longer its first epoch takes.

    Args:
        rows: Rows of the result.
    """
    key = ("model", "source", "round")
    stock = {tuple(row[name] for name in key): row for row in rows if row["variant"] == "stock"}
    pairs = [(stock.get(tuple(row[name] for name in key), {}), row) for row in rows if row["variant"] == "ours"]
    return [
        {
            **{name: ours[name] for name in key},
            "ratio": round(ours["images_per_s"] / other["images_per_s"], 3),
            "first_epoch_longer_s": round(ours["first_epoch_s"] - other["first_epoch_s"], 2),
        }
        for other, ours in pairs
        if "images_per_s" in other and "images_per_s" in ours
    ]


def _argument(text: str) -> tuple[str, Any]:
    import yaml

    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


def main() -> None:
    """Train, and write all rows as JSON after each training."""
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["n", "s", "m"], help="scales of YOLO12")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, default=60, help="batches that are measured in each training")
    parser.add_argument("--images", type=int, default=3072, help="many more than workers keep")
    parser.add_argument("--cores", type=int, help="cores of each training; without it, all")
    parser.add_argument("--both", nargs="+", type=_argument, default=[], help="arguments of all trainings: batch=64")
    parser.add_argument("--ours", nargs="+", type=_argument, default=[], help="arguments of this package's trainings")
    parser.add_argument("--small", action="store_true", help="tiny trainings on the CPU")
    options = parser.parse_args()
    if options.small:
        options.models, options.sources, options.rounds, options.batches, options.images = ["n"], ["files"], 1, 3, 8
    rows: list[dict[str, Any]] = []
    result = report.Report(
        options.out,
        "cpu" if options.small else "cuda",
        **({"cores": options.cores} if options.cores else {}),
        arguments={**TRAIN, **(SMALL if options.small else {}), **dict(options.both)},
        ours={**OURS, **dict(options.ours)},
        rows=rows,
    )
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        data = photographs(options.images, 64 if options.small else 640)
        result["drawing_s"] = time.perf_counter() - begin
        for row in trainings(options, data, Path(folder)):
            rows.append(row)
            print(json.dumps(row), flush=True)
            result["ratios"] = ratios(rows)
            result.write()
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
