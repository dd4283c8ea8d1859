"""Label-dense data on a GPU under a memory limit, and memory so short that images have to get smaller.

    python -m benchmarks dense --out benchmarks/results/dense.json      (about 7 minutes on one H100)
    python -m benchmarks dense --out part.json --only ladder saving

dense   1,536 images, 2 % of them with 300 to 900 boxes and the others with about 10, mosaic 1.0, copy_paste 0.1, whole
        epochs with data loading: stock Ultralytics in a process without this package, at a batch chosen by hand, then
        ours. A peak is that of an optimizer step
ladder  another process leaves too little memory for one image for a while, so images get smaller
off     the same with mas_data=off
saving  time of saving a run in mid-epoch; needs no GPU
"""

from __future__ import annotations

import contextlib
import csv
import functools
import multiprocessing.pool
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.processes import ROOT, Call, limit_memory
from benchmarks.drawings import noise

LIMIT_GIB = 16
STOCK_BATCHES = (32,)
"""Batches of stock, chosen by hand: its assigner must not fall back to single images, nor the batch be halved."""
IMAGES, EPOCHS = 1536, {"stock": 4, "ours": 16}
"""The second half of the epochs is measured, when files are cached and the controller has found its size and plan."""
TRAIN: dict[str, Any] = {
    "imgsz": 640,
    "device": 0,
    "cache": "ram",
    "plots": False,
    "val": False,
    "save": False,
    "workers": 14,
    "optimizer": "SGD",
    "lr0": 1e-3,
    "mosaic": 1.0,
    "copy_paste": 0.1,
    "close_mosaic": 0,
}
OURS: dict[str, Any] = {**TRAIN, "recipe": False}
SMALL = {**OURS, "model": "yolov12x.yaml", "imgsz": 1280, "batch": 4, "nbs": 4, "workers": 8, "deterministic": False}


def train(arguments: dict[str, Any], limit_gib: float | None) -> dict[str, Any]:
    """Train in this process; return times of epochs in seconds and peaks of optimizer steps in MiB."""
    import torch

    if limit_gib is not None:
        limit_memory(limit_gib)
    extra: dict[str, Any] = {"saves_s": [], "file_mib": None} if arguments.pop("timed", False) else {}
    random.seed(0)
    if os.environ.get("YOLOV12_AUTOPATCH") != "0":
        from yolov12 import autopatch

        autopatch.apply()
    from ultralytics import YOLO
    from ultralytics.utils import LOGGER

    peaks: list[float] = []
    clock: list[float] = []
    warnings: list[str] = []
    LOGGER.addFilter(lambda record: warnings.append(record.getMessage()) or True if record.levelno >= 30 else True)

    def batch_ends(trainer: Any) -> None:
        if trainer.device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated() / 2**20)
            torch.cuda.reset_peak_memory_stats()

    def epoch_begins(trainer: Any) -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter())

    if extra:
        _time_saves(extra)
    model = YOLO(arguments.pop("model"))
    model.add_callback("on_train_batch_end", batch_ends)
    model.add_callback("on_train_epoch_start", epoch_begins)
    model.add_callback("on_train_epoch_end", epoch_begins)
    model.train(**arguments)
    return {
        "ran_at": model.trainer.batch_size,
        "epoch_s": [end - begin for begin, end in zip(clock[::2], clock[1::2], strict=False)],
        "peaks_mib": peaks,
        "warnings": [line[:200] for line in warnings if "memory" in line.lower()][:4],
        **extra,
    }


def _in_process(
    stock: bool, limit_gib: float | None, *, folder: Path | None = None, **arguments: Any
) -> dict[str, Any]:
    folder = folder or Path(tempfile.mkdtemp())
    log = folder / "log.txt"
    with log.open("w") as output:
        arguments |= {"project": str(folder), "name": "run"}
        call = Call("dense:train", stock=stock, log=output, arguments=arguments, limit_gib=limit_gib)
        status = call.wait()
    rows = (folder / "run" / "memory.csv").read_text().splitlines() if (folder / "run" / "memory.csv").exists() else []
    if status:
        tail = log.read_text()[-600:].replace(f"{ROOT}/", "")
        return {"exit_status": status, "log_tail": tail, "memory_csv": rows}
    return {**call.result(), "memory_csv": rows}


def dense() -> dict[str, Any]:
    """Compare stock with ours at batch=256."""
    data = noise(IMAGES, crowded=True)
    result: dict[str, Any] = {"limit_gib": LIMIT_GIB, "stock": []}
    for batch in STOCK_BATCHES:
        run = _in_process(
            True, LIMIT_GIB, **TRAIN, model="yolo12s.yaml", data=data, batch=batch, epochs=EPOCHS["stock"]
        )
        result["stock"].append(_told("stock", {"batch": batch, **run}))
    arguments = {**OURS, "model": "yolo12s.yaml", "data": data, "batch": 256, "epochs": EPOCHS["ours"]}
    ours = _in_process(False, None, **arguments, mem_limit=f"{LIMIT_GIB}GiB")
    result["ours"] = _told("ours", {"batch": 256, **ours})
    return result


def _told(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Add statistics of the second half and of the whole run, and print them.

    `alike` marks steps of the second half without a new decision.
    """
    if "peaks_mib" in run:
        if rows := _rows(run):  # the engine resets the count for every micro-batch
            run["peaks_mib"] = [float(row["peak_mib"]) for row in rows]
            alike = [float(row["peak_mib"]) for row in rows[-(len(rows) // 2) :] if not row["events"]]
            run |= {"steps_alike": len(alike), "peak_sd_alike_mib": statistics.pstdev(alike)}
        epochs = len(run["epoch_s"]) // 2
        last = run["peaks_mib"][-(len(run["peaks_mib"]) // 2) :]
        run |= {
            "images_per_s": IMAGES * epochs / sum(run["epoch_s"][-epochs:]),
            "images_per_s_all": IMAGES * len(run["epoch_s"]) / sum(run["epoch_s"]),
            "peak_mean_mib": statistics.mean(last),
            "peak_sd_mib": statistics.pstdev(last),
            "peak_sd_all_mib": statistics.pstdev(run["peaks_mib"]),
        }
    print(name, {key: value for key, value in run.items() if key not in ("peaks_mib", "memory_csv")}, flush=True)
    return run


def _rows(run: dict[str, Any]) -> list[dict[str, str]]:
    return list(csv.DictReader(run["memory_csv"]))


def ladder() -> dict[str, Any]:
    """Train while another process leaves too little memory for one image, and then ends."""
    data = noise(64, crowded=True)
    arguments = {**SMALL, "data": data}
    folder = Path(tempfile.mkdtemp())
    with multiprocessing.pool.ThreadPool(1) as pool:
        auto = pool.apply_async(
            functools.partial(_in_process, False, None, folder=folder, mas_data="auto", epochs=8, **arguments)
        )
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
        run = _in_process(False, None, **SMALL, data=data, epochs=1, mas_data="off", mem_limit=f"{limit_mib}MiB")
        attempts.append(_told_rows("off", {"mem_limit_mib": limit_mib, **run}))
        named = re.search(r"give a mem_limit (?:of|above) ([\d,]+) MiB", run.get("log_tail", ""))
        if named is None:
            break
        limit_mib = int(named[1].replace(",", ""))
    return attempts


def _told_rows(name: str, run: dict[str, Any]) -> dict[str, Any]:
    print(name, {key: value for key, value in run.items() if key not in ("peaks_mib", "memory_csv")})
    for row in _rows(run):
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
    begin = {**OURS, "device": _device(), "save": True, "data": data, "batch": 16, "nbs": 16, "epochs": 2, "imgsz": 64}
    rows = []
    for scale in scales:
        run = _in_process(False, None, **begin, model=f"yolov12{scale}.yaml", save_every=1, timed=True)
        rows.append({"model": f"yolov12{scale}", "saves_s": run.get("saves_s"), "file_mib": run.get("file_mib")})
        seconds = statistics.median(run["saves_s"]) if run.get("saves_s") else None
        rows[-1] |= {"median_s": seconds, "percent_at_5min": seconds and 100 * seconds / 300}
        print(rows[-1] if seconds else run, flush=True)
    return rows


def _time_saves(into: dict[str, Any]) -> None:
    from yolov12.training.run.run_state import RunSaver

    save = RunSaver._save

    def timed(saver: Any) -> None:
        begin = time.perf_counter()
        save(saver)  # a copy from the device waits for it, so the step before counts, too
        into["saves_s"].append(time.perf_counter() - begin)
        into["file_mib"] = saver.path.stat().st_size / 2**20

    RunSaver._save = timed  # type: ignore[method-assign]


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
