"""Prefetch of data workers: speed of whole trainings with 2 and 4 batches per worker.

    python -m benchmarks loading --out benchmarks/results/loading.json      (about 7 minutes on one H100)
    python -m benchmarks loading --out part.json --device cpu --small

The data are the demonstration data set, decoded in memory, with Ultralytics' augmentation and a validation after each
epoch. Both settings take turns, twice each.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from typing import Any

from benchmarks.common import report
from benchmarks.drawings import boards

AHEADS = (4, 2)


def train(ahead: int, model_file: str, images: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train, and measure all epochs but the first.

    Args:
        ahead: Number of batches that each worker prefetches.
        model_file: Yaml of the model.
        images: Number of training images.
        arguments: Arguments of the training.
    """
    from ultralytics import YOLO

    from yolov12.training.data import host

    host.AHEAD = ahead
    begins: list[float] = []
    ends: list[float] = []
    waited: list[float] = []
    last = 0.0

    def now(trainer: Any) -> float:
        import torch

        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter()

    def epoch_starts(trainer: Any) -> None:
        nonlocal last
        begins.append(now(trainer))
        last = 0.0

    def batch_starts(_: Any) -> None:
        if last and len(begins) > 1:
            waited.append(time.perf_counter() - last)

    def batch_ends(_: Any) -> None:
        nonlocal last
        last = time.perf_counter()

    model = YOLO(model_file)
    model.add_callback("on_train_epoch_start", epoch_starts)
    model.add_callback("on_train_epoch_end", lambda trainer: ends.append(now(trainer)))
    model.add_callback("on_train_batch_start", batch_starts)
    model.add_callback("on_train_batch_end", batch_ends)
    model.train(**arguments)
    epochs_s = [end - begin for begin, end in zip(begins[1:], ends[1:], strict=True)]
    return {
        "ahead": ahead,
        "workers": model.trainer.train_loader.num_workers,
        "epochs_s": epochs_s,
        "images_per_s": images / statistics.median(epochs_s),
        "images_per_s_with_val": images * len(epochs_s) / (ends[-1] - ends[0]),
        "wait_ms": {"median": 1000 * statistics.median(waited), "mean": 1000 * statistics.mean(waited)},
    }


def main() -> None:
    """Run all trainings in this process, so that kernels are searched once."""
    options = report.parser(__doc__, small="few small images and scale N").parse_args()
    from yolov12 import autopatch

    autopatch.apply()
    sets, imgsz, workers = (1, 64, 1) if options.small else (10, 640, 8)
    common = {
        "imgsz": imgsz,
        "device": 0 if options.device == "cuda" else "cpu",
        "plots": False,
        "save": False,
        "cache": "ram",
        "workers": workers,
        "close_mosaic": 0,
        "recipe": False,
    }
    cases = {"s": ("yolov12s.yaml", 128, 9), "x": ("yolov12x.yaml", 64, 4)}
    if options.small:
        cases = {"n": ("yolov12n.yaml", 16, 3)}
    result = report.Report(options.out, options.device, arguments=common)
    data, project = boards(sets, max(imgsz, 256)), tempfile.mkdtemp()
    for name, (model, batch, epochs) in cases.items():
        rows: list[dict[str, Any]] = []
        result[name] = {"model": model, "batch": batch, "epochs": epochs, "rows": rows}
        arguments = {**common, "data": data, "project": project, "batch": batch, "nbs": batch, "epochs": epochs}
        for ahead in AHEADS * 2:
            rows.append(train(ahead, model, 128 * sets, arguments))
            print(name, json.dumps(rows[-1]), flush=True)
            result.write()


if __name__ == "__main__":
    main()
