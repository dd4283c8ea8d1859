"""Label-dense data on a GPU under a memory limit, and memory so short that images have to get smaller.

    python -m benchmarks dense --out benchmarks/results/dense.json      (about 10 minutes on one H200)
    python -m benchmarks dense --out part.json --only ladder saving

dense   at 16 GiB, the rows `stock` and `ours` of benchmarks/cards.py: stock Ultralytics at its largest stable batch,
        which is searched for, and ours with batch=256, with the same number of images
ladder  another process leaves too little memory for one image for a while, so images get smaller
off     the same with mas_data=off
saving  time of saving a run in mid-epoch; needs no GPU
"""

from __future__ import annotations

import contextlib
import csv
import functools
import multiprocessing.pool
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.dense_runs import Training, rows_of
from benchmarks.dense_search import Comparison
from benchmarks.dense_trainings import EPOCHS, EQUAL, IMAGES, MODEL, OURS, TRAIN, train
from benchmarks.drawings import noise

LIMIT_GIB = 16
ALONE: dict[str, Any] = {**TRAIN, **OURS}
SMALL = {**ALONE, "model": "yolov12x.yaml", "imgsz": 1280, "batch": 4, "nbs": 4, "workers": 8, "deterministic": False}


def dense() -> dict[str, Any]:
    """Compare stock at its largest stable batch with ours at batch=256."""
    memory = {"total_mib": LIMIT_GIB * 1024, "usable_mib": LIMIT_GIB * 1024}
    arguments = {**TRAIN, **EQUAL, "model": MODEL}
    found: dict[str, Any] = {}
    data = noise(IMAGES, crowded=True)
    comparison = Comparison(data, IMAGES, EPOCHS, memory, arguments, save=lambda _: None, found=found)
    for row in ("stock", "ours"):
        comparison.measure(row)
    rows = found["rows"]
    return {"limit_gib": LIMIT_GIB, "search": found["search"], "stock": [rows["stock"]], "ours": rows["ours"]}


def ladder() -> dict[str, Any]:
    """Train while another process leaves too little memory for one image, and then ends."""
    data = noise(64, crowded=True)
    arguments = {**SMALL, "data": data}
    folder = Path(tempfile.mkdtemp())
    with multiprocessing.pool.ThreadPool(1) as pool:
        auto = pool.apply_async(functools.partial(_run, {**arguments, "mas_data": "auto", "epochs": 8}, folder=folder))
        budget_mib = _come_and_go(folder / "run" / "memory.csv", auto)
        result = _told_rows("auto", auto.get())
    return {"budget_mib": budget_mib, "auto": result}


def off(budget_mib: float) -> list[dict[str, Any]]:
    """Train with mas_data=off, which ends in an error that names a limit; try the named limit until a run completes.

    The first limit replaces the other process, as the engine would wait two minutes for it to release memory.
    """
    data = noise(64, crowded=True)
    limit_mib, attempts = round(budget_mib / 0.9), []
    while len(attempts) < 4:
        limit = {"mas_data": "off", "mem_limit": f"{limit_mib}MiB"}
        run = _run({**SMALL, "data": data, "epochs": 1, **limit})
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


def _come_and_go(file: Path, run: Any) -> float:
    """Take memory until the budget of a run is `LADDER_MIB`, and release it later; return the least budget in MiB."""
    import torch

    torch.empty(1, device="cuda")

    def rows() -> list[dict[str, str]]:
        return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []

    def wait(enough: Callable[[], bool]) -> None:
        while not enough() and not run.ready():
            time.sleep(0.2)

    wait(lambda: len(rows()) >= 3)
    held, leave_mib = [], float(LADDER_MIB)
    while not run.ready() and rows()[-1]["image_size"] == "1280x1280":
        over = float(rows()[-1]["budget_mib"]) - leave_mib
        if over < 50:  # the budget was still enough
            over = 50
            leave_mib -= 50
        free_mib = torch.cuda.mem_get_info()[0] / 2**20
        over = max(min(over, free_mib - 256), 0)  # the training must release memory first
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            held.append(torch.empty(int(over * 2**20), dtype=torch.uint8, device="cuda"))
        seen = len(rows())
        wait(lambda seen=seen: len(rows()) > seen + 1)
    small = rows()
    wait(lambda: len(rows()) >= len(small) + 4)
    budget_mib = float(rows()[-1]["budget_mib"]) if rows() else 0.0
    held.clear()
    torch.cuda.empty_cache()
    return budget_mib


LADDER_MIB = 2050
"""Budget in MiB too small for one image of 1,280 pixels, YOLOv12-X and all layers recomputed, by `yolov12 plan`."""


def _device() -> Any:
    import torch

    return 0 if torch.cuda.is_available() else "cpu"


def saving(scales: str = "sx") -> list[dict[str, Any]]:
    """Measure the seconds that it takes to save a run, for a small model and the largest."""
    data = noise(64, crowded=True)
    begin = {**ALONE, "device": _device(), "save": True, "data": data, "batch": 16, "nbs": 16, "epochs": 2, "imgsz": 64}
    rows = []
    for scale in scales:
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


PARTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dense": lambda _: dense(),
    "ladder": lambda _: ladder(),
    "off": lambda result: off(result["ladder"]["budget_mib"]),
    "saving": lambda _: saving(),
}


def main() -> None:
    """Run the parts, and write the results of each to the file at once."""
    options = report.parser(__doc__, parts=PARTS).parse_args()
    result = report.Report(options.out, keep=True)
    for part in options.only:
        result.add(part, PARTS[part](result))


if __name__ == "__main__":
    main()
