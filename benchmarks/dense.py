"""Label-dense data and memory so short that images have to get smaller, and the time of a save.

    python -m benchmarks dense --out benchmarks/results/dense.json      (some minutes on one GPU)
    python -m benchmarks dense --out part.json --only ladder saving
    python -m benchmarks dense --out part.json --small --device cpu      (a minute on the CPU, to try it)

ladder  another process leaves too little memory for one image for a while, so images get smaller
off     the same with mas_data=off
saving  time of saving a run in mid-epoch; needs no GPU

`--small` trains small models on small images, always on the CPU. In `ladder`, the training reads that it is on a host
of 4 GiB with another process, whose memory is not really taken. Memory is the resident memory of the training.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import math
import multiprocessing.pool
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.size import Size
from benchmarks.dense_runs import Training, rows_of
from benchmarks.dense_trainings import OURS, SMALL, TRAIN, train
from benchmarks.drawings import noise

ALONE: dict[str, Any] = {**TRAIN, **OURS}
SHORT = {**ALONE, "model": "yolov12x.yaml", "imgsz": 1280, "batch": 4, "nbs": 4, "workers": 8, "deterministic": False}
SMALL_SHORT = {**ALONE, **SMALL, "model": "yolov12n.yaml", "imgsz": 416, "batch": 1, "nbs": 1}
HOST_MIB = 4096
"""Memory of the host that a small training reads."""
FULL = Size()


def ladder(size: Size = FULL) -> dict[str, Any]:
    """Train while another process leaves too little memory for one image, and then ends."""
    images, epochs = size.sized((64, 8), (12, 2))
    data = noise(images, crowded=True)
    arguments = {**size.sized(SHORT, SMALL_SHORT), "data": data, "mas_data": "auto", "epochs": epochs}
    folder = Path(tempfile.mkdtemp())
    other = _ImitatedProcess(folder / "held") if size.small else _MemoryOfCard()
    more = size.sized({}, {"function": "dense:train_beside_others", "held": str(folder / "held")})
    with multiprocessing.pool.ThreadPool(1) as pool:
        auto = pool.apply_async(functools.partial(_run, arguments, folder=folder, **more))
        budget_mib = _come_and_go(folder / "run" / "memory.csv", auto, other)
        result = _told_rows("auto", auto.get())
    return {"budget_mib": budget_mib, "auto": result}


def off(budget_mib: float, size: Size = FULL) -> list[dict[str, Any]]:
    """Train with mas_data=off, which ends in an error that names a limit; try the named limit until a run completes.

    The first limit replaces the other process, as the engine would wait two minutes for it to release memory.
    """
    data = noise(size.sized(64, 2), crowded=True)
    limit_mib, attempts = round(budget_mib / 0.9), []
    while len(attempts) < 4:
        limit = {"mas_data": "off", "mem_limit": f"{limit_mib}MiB"}
        run = _run({**size.sized(SHORT, SMALL_SHORT), "data": data, "epochs": 1, **limit})
        attempts.append(_told_rows("off", {"mem_limit_mib": limit_mib, **run}))
        named = re.search(r"give a mem_limit (?:of|above) ([\d,]+) MiB", run.get("log_tail", ""))
        if named is None:
            break
        limit_mib = int(named[1].replace(",", ""))
    return attempts


def _run(arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return Training(arguments, **more).result()


def _told_rows(name: str, run: dict[str, Any]) -> dict[str, Any]:
    print(name, {key: value for key, value in run.items() if key not in ("peaks_mib", "memory_csv")})
    for row in rows_of(run):
        names = ("step", "image_size", "micro_batches", "predicted_mib", "peak_mib", "budget_mib", "events")
        print(*(row[name] for name in names), sep=" | ", flush=True)
    return run


class _MemoryOfCard:
    """Memory of the card that this process takes from a training."""

    step_mib = 50
    """MiB that are taken at a time once the budget is near the need of one image."""
    most_s = math.inf
    """Seconds after which it releases everything although the training has not gone on."""

    def __init__(self) -> None:
        import torch

        torch.empty(1, device="cuda")
        self._held: list[Any] = []

    def leave_mib(self, row: dict[str, str]) -> float:
        """Return the budget to leave at first, beside a step with this row of memory.csv."""
        return float(LADDER_MIB)

    def take(self, mib: float) -> None:
        """Take so much, but no more than is free: the training must release memory first."""
        import torch

        free_mib = torch.cuda.mem_get_info()[0] / 2**20
        mib = max(min(mib, free_mib - 256), 0)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            self._held.append(torch.empty(int(mib * 2**20), dtype=torch.uint8, device="cuda"))

    def release(self) -> None:
        """Release everything."""
        import torch

        self._held.clear()
        torch.cuda.empty_cache()


class _ImitatedProcess:
    """Another process on the host, which exists only for `train_beside_others`: a file with the bytes that it holds."""

    step_mib, most_s = 20, 60.0  # a step is slow where other tests use the cores

    def __init__(self, file: Path) -> None:
        self._file, self._held_mib = file, 0.0
        self._write()

    def leave_mib(self, row: dict[str, str]) -> float:
        return float(row["peak_mib"]) - self.step_mib

    def take(self, mib: float) -> None:
        self._held_mib += mib
        self._write()

    def release(self) -> None:
        self._held_mib = 0.0
        self._write()

    def _write(self) -> None:
        report.write(self._file, {"bytes": int(self._held_mib * 2**20)})


def train_beside_others(arguments: dict[str, Any], held: str) -> dict[str, Any]:
    """Train in this process as if the host had `HOST_MIB`, of which another process holds a part.

    Args:
        arguments: Arguments of the training, and `model`.
        held: File of an `_ImitatedProcess`.
    """
    from yolov12.mas.memory.host import HostMemory

    def room_bytes(memory: HostMemory) -> tuple[int, int]:
        total = HOST_MIB * 2**20
        others = json.loads(Path(held).read_text())["bytes"]
        return total, max(total - others - memory.resident_bytes()[0], 0)

    HostMemory.room_bytes = room_bytes  # type: ignore[method-assign]
    return train(arguments)


def _come_and_go(file: Path, run: Any, other: _MemoryOfCard | _ImitatedProcess) -> float:
    """Take memory until images get smaller, and release it later; return the least budget in MiB."""

    def rows() -> list[dict[str, str]]:
        return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []

    def wait(enough: Callable[[], bool], most_s: float = math.inf) -> bool:
        """Return whether it came in time, or the run has ended."""
        end = time.monotonic() + most_s
        while not enough() and not run.ready() and time.monotonic() < end:
            time.sleep(0.2)
        return time.monotonic() < end

    wait(lambda: len(rows()) >= 3)
    first, step_mib = rows()[0] if rows() else {}, other.step_mib
    leave_mib = other.leave_mib(first) if first else 0.0
    while not run.ready() and rows()[-1]["image_size"] == first["image_size"]:
        over = float(rows()[-1]["budget_mib"]) - leave_mib
        if over < step_mib:  # the budget was still enough
            over = step_mib
            leave_mib -= step_mib
        other.take(over)
        seen = len(rows())
        if not wait(lambda seen=seen: len(rows()) > seen + 1, other.most_s):
            break
    small = rows()
    wait(lambda: len(rows()) >= len(small) + 4, other.most_s)
    budget_mib = float(rows()[-1]["budget_mib"]) if rows() else 0.0
    other.release()
    return budget_mib


LADDER_MIB = 2050
"""Budget in MiB too small for one image of 1,280 pixels, YOLOv12-X and all layers recomputed, by `yolov12 plan`."""


def _device() -> Any:
    import torch

    return 0 if torch.cuda.is_available() else "cpu"


def saving(size: Size = FULL) -> list[dict[str, Any]]:
    """Measure the seconds that it takes to save a run, for a small model and the largest."""
    data = noise(size.sized(64, 32), crowded=True)
    begin = {**ALONE, "device": _device(), **size.sized({}, SMALL), "save": True, "data": data}
    begin |= {"batch": 16, "nbs": 16, "epochs": 2, "imgsz": 64}
    rows = []
    for scale in size.sized("sx", "n"):
        run = _run({**begin, "model": f"yolov12{scale}.yaml", "save_every": 1}, function="dense:train_with_timed_saves")
        rows.append({"model": f"yolov12{scale}", "saves_s": run.get("saves_s"), "file_mib": run.get("file_mib")})
        seconds = statistics.median(run["saves_s"]) if run.get("saves_s") else None
        rows[-1] |= {"median_s": seconds, "percent_at_5min": seconds and 100 * seconds / 300}
        print(rows[-1] if seconds else run, flush=True)
    return rows


def train_with_timed_saves(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, and return also the seconds of each save, and the size of the file in MiB.

    Args:
        arguments: Arguments of the training, and `model`.
    """
    from yolov12.training.run.run_state import RunSaver

    save = RunSaver._save
    found: dict[str, Any] = {"saves_s": [], "file_mib": None}

    def timed(saver: Any) -> None:
        begin = time.perf_counter()
        save(saver)  # a copy from the device waits for it, so the step before counts, too
        found["saves_s"].append(time.perf_counter() - begin)
        found["file_mib"] = saver.path.stat().st_size / 2**20

    RunSaver._save = timed  # type: ignore[method-assign]
    return {**train(arguments), **found}


PARTS: dict[str, Callable[[dict[str, Any], Size], Any]] = {
    "ladder": lambda _, size: ladder(size),
    "off": lambda result, size: off(result["ladder"]["budget_mib"], size),
    "saving": lambda _, size: saving(size),
}
AT_ONCE = (("ladder",), ("off", "saving"))
"""Parts of a trial that run together, as their times say nothing."""


def main() -> None:
    """Run the parts, and write the results of each to the file at once."""
    options = report.parser(__doc__, parts=PARTS, small="small models and few small images").parse_args()
    size = Size("cpu" if options.small else options.device, options.small)
    result = report.Report(options.out, size.device, keep=True)
    for together in AT_ONCE if options.small else [(part,) for part in options.only]:
        parts = [part for part in together if part in options.only]
        with multiprocessing.pool.ThreadPool(len(together)) as pool:
            for part, found in zip(parts, pool.map(lambda part: PARTS[part](result, size), parts), strict=True):
                result.add(part, found)


if __name__ == "__main__":
    main()
