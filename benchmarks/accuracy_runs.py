"""Trainings for benchmarks/accuracy.py: one in this process, many at the same time, and the largest batch of stock."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.processes import ROOT, Call, limit_memory
from benchmarks.dense_runs import check_reason, is_stable
from benchmarks.dense_trainings import ASSIGNED_SINGLY, HALVED

MAP = "metrics/mAP50-95(B)"
_POLL_S = 0.1
_LOG_TAIL = 2000
"""Characters of the end of a log that are kept, in which PyTorch's message on memory fits."""
_FROM_SUMMARY = (
    "images_lost",
    "out_of_memories",
    "shrinks",
    "grows",
    "micro_batch_min",
    "micro_batch_median",
    "micro_batch_max",
    "peak_max_mib",
    "over_limit",
    "budget_min_mib",
    "budget_max_mib",
)


def train(model: str, limit_gib: float | None, niceness: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train in this process.

    Args:
        model: Yaml or weights of the model.
        limit_gib: Limit of PyTorch's allocator in GiB; None for no limit, or if the training has `mem_limit`.
        niceness: How far the process stands back for others on the host, from 0 to 19.
        arguments: Arguments of the training.

    Returns:
        `map`, the mAP50-95 on held-out images after each epoch, and how the training ran.
    """
    import torch

    os.nice(niceness)
    is_stock = os.environ.get("YOLOV12_AUTOPATCH") == "0"
    if limit_gib is not None:
        limit_memory(limit_gib)
    if not is_stock:
        from yolov12 import autopatch

        autopatch.apply()
    from ultralytics import YOLO
    from ultralytics.utils import LOGGER

    warnings: list[str] = []
    LOGGER.addFilter(lambda record: warnings.append(record.getMessage()) or True if record.levelno >= 30 else True)
    curve: list[float] = []
    updates: list[int] = []

    def note(trainer: Any) -> None:
        if len(curve) < trainer.epochs:  # a validation of the best weights follows
            curve.append(round(float(trainer.metrics.get(MAP, 0.0)), 5))
            updates.append(trainer.ema.updates)

    begin = time.perf_counter()
    yolo = YOLO(model)
    yolo.add_callback("on_fit_epoch_end", note)
    yolo.train(**arguments)
    assert is_stock == ("yolov12.seams" not in sys.modules), "this is not stock"
    folder = Path(yolo.trainer.save_dir)
    return {
        "map": curve,
        "updates": updates[-1],
        "ran_at": yolo.trainer.batch_size,
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if torch.cuda.is_available() else None,
        "halvings": sum(HALVED in line for line in warnings),
        "assigner_fallbacks": sum(ASSIGNED_SINGLY in line for line in warnings),
        **_engine(folder),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _engine(folder: Path) -> dict[str, Any]:
    """Return how the engine ran the batches; empty for stock."""
    if not (file := folder / "memory.json").exists():
        return {}
    from ultralytics.utils import YAML

    summary = json.loads(file.read_text())
    group = YAML.load(folder / "args.yaml")["bn_group"]
    return {"engine": {"bn_group": group, **{key: summary[key] for key in _FROM_SUMMARY}}}


def scan(data: str) -> None:
    """Let Ultralytics check all images and cache their labels, so that trainings do not do so at the same time."""
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    about = check_det_dataset(data)
    for split in ("train", "val"):
        YOLODataset(img_path=about[split], data=about, augment=False)


@dataclass(frozen=True)
class Job:
    """One training."""

    name: dict[str, Any]
    """What tells it from other trainings: data, model, variant, seed."""
    is_stock: bool
    call: dict[str, Any]
    """Arguments of `train`."""

    def start(self) -> Call:
        """Start it in a process of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "results.csv").unlink(missing_ok=True)  # `unfinished` reads it
        with self.log.open("w") as log:
            variables = {"YOLO_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            return Call("accuracy_runs:train", stock=self.is_stock, log=log, variables=variables, **self.call)

    @property
    def folder(self) -> Path:
        """Folder of the training."""
        return Path(self.call["arguments"]["project"], self.call["arguments"]["name"])

    @property
    def log(self) -> Path:
        """File of its output."""
        return self.folder / "log"

    def result(self, call: Call) -> dict[str, Any]:
        """Return the row of a training that has ended."""
        if status := call.wait():
            found = {"exit_status": status, "failure": self.log.read_text()[-_LOG_TAIL:].replace(str(ROOT), "")}
        else:
            found = call.result()
        return {**self.name, **found}

    def unfinished(self) -> dict[str, Any]:
        """Return the row of a training that was killed: `map_so_far` in place of `map`."""
        file = self.folder / "results.csv"
        rows = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
        return {**self.name, "map_so_far": [float(row[MAP]) for row in rows]}


def at_once(
    jobs: Sequence[Job], most: int, seconds_left: Callable[[], float], *, keep_unfinished: bool = False
) -> Iterator[tuple[dict[str, Any], float]]:
    """Run jobs, several at the same time, and yield the row of each when it ends, and the seconds that it took.

    A job is not started if the longest job so far took more time than is left. When no time is left, what runs is
    killed.

    Args:
        jobs: The jobs; those in front start first.
        most: Number of jobs that run at the same time.
        seconds_left: Returns the seconds until the end of the time budget.
        keep_unfinished: True to yield the rows of killed jobs, too.
    """
    waiting, running, longest_s = list(jobs), [], 0.0
    try:
        while running or (waiting and seconds_left() > longest_s):
            while waiting and len(running) < most and seconds_left() > longest_s:
                job = waiting.pop(0)
                running.append((job, job.start(), time.monotonic()))
            time.sleep(_POLL_S)
            for each in [each for each in running if each[1].process.poll() is not None]:
                running.remove(each)
                job, call, begun = each
                took_s = time.monotonic() - begun
                longest_s = max(longest_s, took_s)
                yield job.result(call), took_s
            if seconds_left() <= 0:
                break
    finally:
        for _, call, _ in running:
            call.process.kill()
            call.wait()
    if keep_unfinished:
        for job, _, begun in running:
            yield job.unfinished(), time.monotonic() - begun


def largest_stable(rows: Sequence[dict[str, Any]]) -> int:
    """Return the largest batch up to which all trials were stable.

    Args:
        rows: Rows of trials whose `batch` differs.

    Raises:
        RuntimeError: A trial failed for another reason than memory, or not even the smallest batch was stable.
    """
    best = 0
    for row in rows:
        check_reason(row)
    for row in sorted(rows, key=lambda row: row["batch"]):
        if not is_stable(row):
            break
        best = row["batch"]
    if not best:
        raise RuntimeError(f"not even batch {min(row['batch'] for row in rows)} is stable: give --stock-batch")
    return best
