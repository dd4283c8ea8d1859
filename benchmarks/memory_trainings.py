"""Whole trainings for benchmarks/memory.py: under limits, and beside a process that takes and releases memory."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.processes import ONE_THREAD, environment
from benchmarks.common.size import Size
from benchmarks.endurance_model import yaml_of

LIMITS_GIB = (8, 16, 24, 40)
SMALL_LIMITS_GIB = (2,)

TRAIN = {"model": "yolov12s.yaml", "imgsz": 640, "device": 0, "cache": "ram", "plots": False, "exist_ok": True}
SMALL: dict[str, Any] = {"imgsz": 64, "cache": False, "workers": 0, "nbs": 8}


def _train(
    folder: Path,
    stock: bool = False,
    variables: dict[str, str] | None = None,
    size: Size = Size(),  # noqa: B008 - it is frozen
    **arguments: Any,
) -> subprocess.Popen[str]:
    """Start a training; its output goes to a log file beside its folder."""
    arguments = {**TRAIN, "project": folder.parent, "name": folder.name, **arguments}
    if size.small:
        arguments |= {**SMALL, "model": yaml_of("tiny")}
    if size.device == "cpu":
        arguments, variables = {**arguments, "device": "cpu"}, {**ONE_THREAD, **(variables or {})}
    if stock:
        code = f"from ultralytics import YOLO; YOLO({arguments.pop('model')!r}).train(**{_plain(arguments)!r})"
        command = [sys.executable, "-c", code]
    else:
        words = [f"{key}={value}" for key, value in arguments.items()]
        command = [sys.executable, "-m", "yolov12.cli", "train", *words]
    log = folder.with_suffix(".log").open("w")
    return subprocess.Popen(
        command, env=environment(stock, **(variables or {})), stdout=log, stderr=subprocess.STDOUT, text=True
    )


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}


def _rows(folder: Path) -> list[dict[str, str]]:
    file = folder / "memory.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


CASES = {
    "first step": "The first step of the run, predicted from the warm-up.",
    "new": "The first step with these micro-batches under this plan.",
    "changed": "Another step that ran other micro-batches, or another plan, than the step before.",
    "same": "A step with the micro-batches and the plan of the step before.",
}
"""Case → what it is. Every step is in one case."""


def prediction_errors(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Return the errors of predicted peaks in percent of the measured ones: of all steps, and of each of `CASES`.

    Args:
        rows: Rows of memory.csv.
    """
    errors: dict[str, list[tuple[float, int]]] = {case: [] for case in CASES}
    before, known = None, set()
    for row in rows:
        way = row["micro_batches"], row["plan"]
        case = "same" if way == before else "changed" if way in known else "new" if known else "first step"
        percent = 100 * (float(row["predicted_mib"]) / float(row["peak_mib"]) - 1)
        errors[case].append((percent, int(row["step"])))
        known.add(way)
        before = way

    def told(found: list[tuple[float, int]]) -> dict[str, Any]:
        worst = max(found, key=lambda pair: abs(pair[0]))
        median = statistics.median(abs(percent) for percent, _ in found)
        return {"steps": len(found), "median_percent": median, "worst_percent": worst[0], "worst_step": worst[1]}

    everything = [pair for found in errors.values() for pair in found]
    return {"all": told(everything), **{case: told(found) for case, found in errors.items() if found}}


def _draw(folder: Path, images: int) -> str:
    """Draw the demonstration data set and return its yaml, which stock Ultralytics can use, too."""
    from yolov12 import demo

    return str(demo.ensure(f"demo:images={images}", folder))


def limits(device: str = "cuda", small: bool = False) -> dict[str, Any]:
    """Run whole trainings at several limits at the same time on one card, so their times mean nothing."""
    size, folder = Size(device, small), Path(tempfile.mkdtemp())
    epochs, batch = size.sized((7, 256), (2, 8))
    given = {"data": _draw(folder, size.sized(640, 20)), "epochs": epochs, "batch": batch, "workers": 3}
    runs = {
        gib: _train(folder / f"{gib}gib", mem_limit=f"{gib}GiB", size=size, **given)
        for gib in size.sized(LIMITS_GIB, SMALL_LIMITS_GIB)
    }
    out = {}
    for gib, run in runs.items():
        code, run_folder = run.wait(), folder / f"{gib}gib"
        summary = json.loads((run_folder / "memory.json").read_text()) if code == 0 else {}
        out[f"{gib} GiB"] = {
            "exit_status": code,
            "epochs": epochs,
            "summary": summary,
            "prediction": prediction_errors(_rows(run_folder)) if code == 0 else None,
            "rows": _rows(run_folder),
            "log_tail": run_folder.with_suffix(".log").read_text()[-300:] if code else "",
        }
    return out


def first_epoch(device: str = "cuda", small: bool = False) -> dict[str, Any]:
    """Time the first epochs of stock, of this package with an empty cache of Triton kernels, and with the filled one.

    Each training has a configuration folder of its own, so that none finds the plans that another one stored. A fifth
    of the drawn images is for validation.
    """
    size, folder = Size(device, small), Path(tempfile.mkdtemp())
    data = _draw(folder, size.sized(1920, 20))
    epochs = size.sized(3, 2)
    alike = {"data": data, "epochs": epochs, "val": False, "workers": 8, "model": "yolo12s.yaml", "size": size}
    ways: dict[str, dict[str, Any]] = {"stock": {"batch": size.sized(32, 4)}}
    ours = size.sized({"batch": 256, "mem_limit": "16GiB"}, {"batch": 8, "mem_limit": f"{SMALL_LIMITS_GIB[0]}GiB"})
    ways |= dict.fromkeys(("empty cache", "filled cache"), ours)
    out: dict[str, Any] = {}
    for name, arguments in ways.items():
        run_folder = folder / name.replace(" ", "_")
        config = str(run_folder.with_suffix(".config"))
        variables = {"TRITON_CACHE_DIR": str(folder / "triton"), "YOLO_CONFIG_DIR": config}
        begin = time.monotonic()
        code = _train(run_folder, name == "stock", variables, **alike, **arguments).wait()
        rows = _rows(run_folder)
        out[name] = {
            "exit_status": code,
            "seconds": round(time.monotonic() - begin, 1),
            "epoch_s": epoch_seconds((run_folder / "results.csv").read_text()) if code == 0 else [],
            "new_sizes_ms": new_sizes(rows),
            "log_tail": run_folder.with_suffix(".log").read_text()[-300:] if code else "",
        }
        print(name, json.dumps(out[name]), flush=True)
    return out


def epoch_seconds(results: str) -> list[float]:
    """Return the seconds of each epoch.

    Args:
        results: Content of results.csv.
    """
    ends = [float(row["time"]) for row in csv.DictReader(results.splitlines(), skipinitialspace=True)]
    return [round(end - begin, 2) for begin, end in itertools.pairwise([0.0, *ends])]


def new_sizes(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the first step of each micro-batch size with its milliseconds, and those of the median step.

    Args:
        rows: Rows of memory.csv.
    """
    first: dict[str, dict[str, str]] = {}
    for row in rows:
        for size in set(row["micro_batches"].split()):
            first.setdefault(size, row)
    usual_ms = statistics.median(float(row["step_ms"]) for row in rows) if rows else 0.0
    return [
        {
            "images": int(size),
            "step": int(row["step"]),
            "epoch": int(row["epoch"]),
            "ms": float(row["step_ms"]),
            "usual_ms": usual_ms,
        }
        for size, row in first.items()
    ]


def neighbour(device: str = "cuda", small: bool = False) -> dict[str, Any]:
    """Run our training, then stock's, while this process takes and releases up to 40 % of the card at random.

    Stock's training also runs alone. In a trial, this process takes little, so that others have what they need.
    """
    size, folder = Size(device, small), Path(tempfile.mkdtemp())
    # Stock needs 343 MiB for an image (docs/reference/measurements.md), four fifths of the card for the batch: it fits
    # alone, and not beside all memory of this process.
    batch = 8 if small else int(0.8 * _total_bytes(device) / (343 * 2**20)) // 64 * 64
    data = _draw(folder, 5 * batch)  # a fifth is for validation, so that no batch is partial
    out: dict[str, Any] = {"batch": batch}
    short_s = size.sized(40, 2)
    for name, stock, seconds in (
        ("ours", False, size.sized(150, 3)),
        ("stock", True, short_s),
        ("stock_alone", True, short_s),
    ):
        run_folder = folder / name
        more = {"model": "yolo12s.yaml", "size": size}  # a layout that both can run
        hours = (seconds + size.sized(5, 1)) / 3600
        run = _train(run_folder, stock, data=data, epochs=1000, batch=batch, time=hours, val=False, workers=14, **more)
        log = run_folder.with_suffix(".log")
        while run.poll() is None and "Starting training" not in log.read_text():
            time.sleep(0.5)
        taken = _press(run, seconds, size) if name != "stock_alone" else []
        code = run.wait()
        text = log.read_text()
        out[name] = {
            "exit_status": code,
            "seconds": seconds,
            "card_taken": taken,
            "out_of_memory_lines": [line[-200:] for line in text.splitlines() if "out of memory" in line.lower()][:5],
            "log_tail": "" if code == 0 else text[-400:],
        }
        if not stock:
            summary = json.loads(file.read_text()) if (file := run_folder / "memory.json").exists() else {}
            out[name] |= {"summary": summary, "rows": _rows(run_folder)}
            shutil.copytree(run_folder, os.environ.get("OUT", folder / "kept"), dirs_exist_ok=True, ignore=_not_memory)
    return out


def _not_memory(_: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith("memory.")]


def _total_bytes(device: str) -> int:
    """Return the memory of the card, or of the host."""
    import torch

    from yolov12.mas.memory.host import HostMemory

    return torch.cuda.mem_get_info()[1] if device == "cuda" else HostMemory().room_bytes()[0]


def _press(run: subprocess.Popen[str], seconds: int, size: Size) -> list[tuple[float, float]]:
    """Take and release memory while a training runs; return (seconds, fraction of the card) for each change."""
    import torch

    chance = random.Random(4)
    block = size.sized(256, 16) * 2**20
    total = _total_bytes(size.device)
    most = size.sized(0.4, 16 * block / total)
    pause_s = size.sized((5.0, 20.0), (0.2, 0.8))
    blocks: list[Any] = []
    log = []
    start = time.time()
    while run.poll() is None and time.time() - start < seconds:
        wanted = int(chance.random() * most * total / block)
        del blocks[wanted:]
        torch.cuda.empty_cache()
        while len(blocks) < wanted:
            try:
                blocks.append(torch.ones(block, dtype=torch.uint8, device=size.device))  # written to: really there
            except torch.cuda.OutOfMemoryError:
                break  # the training has allocated it
        log.append((round(time.time() - start, 1), round(len(blocks) * block / total, 3)))
        time.sleep(chance.uniform(*pause_s))
    blocks.clear()
    torch.cuda.empty_cache()
    return log
