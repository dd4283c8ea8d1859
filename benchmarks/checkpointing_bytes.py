"""What checkpoint plans free, and the peaks that `yolov12 plan` predicts, for benchmarks/checkpointing.py."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.common import model

if TYPE_CHECKING:
    from benchmarks.checkpointing import Scope

FREED: Mapping[str, int] = {"n": 32, "s": 32, "m": 16, "l": 16, "x": 8}
"""Scale → number of images."""


def predicted(result: dict[str, Any], scope: Scope) -> dict[str, list[dict[str, Any]]]:
    """Predict with `yolov12 plan` the peaks that `ours` measured. This needs no GPU.

    Args:
        result: Content of the file.
        scope: Size of the work. On a CPU, the measured peaks are of resident memory, so nothing is compared.
    """
    from yolov12.mas.checkpointing.checkpointing import Plan
    from yolov12.plan.estimate import estimate
    from yolov12.plan.fake_model import load

    rows: dict[str, list[dict[str, Any]]] = {}
    for part, measured in result.items():
        if not part.startswith("ours-"):
            continue
        network = load(f"yolo12{part[-1]}.yaml")
        rows[part] = []
        for row in measured:
            plan = Plan(tuple((name, mode) for mode, names in row["plan"].items() for name in names))
            found = estimate(
                network,
                micro_batch=row["micro_batch"],
                plan=plan,
                imgsz=scope.imgsz,
                batch=scope.images,
                boxes=2 * model.BOXES_PER_IMAGE - 1,
                optimizer="SGD",
            )
            mib = found.peak_bytes / 2**20
            told = {key: row[key] for key in ("limit_gib", "micro_batch", "peak_mib", "replayed") if key in row}
            off_percent = 100 * (mib / row["peak_mib"] - 1) if scope.device == "cuda" else None
            rows[part].append({**told, "predicted_mib": mib, "off_percent": off_percent})
            print(part, json.dumps(rows[part][-1]), flush=True)
    return rows


def freed(scope: Scope) -> Iterator[dict[str, Any]]:
    """Yield measured and predicted bytes that plans free, between forward and backward pass and at the peak."""
    import gc

    import torch

    from yolov12.mas.checkpointing.layers import candidates
    from yolov12.mas.profiling.solver import ladder
    from yolov12.mas.profiling.warmup import profile
    from yolov12.models.layer_names import layer_names

    for scale, images in scope.freed.items():
        training = scope.training(f"yolov12{scale}")
        task, layers = training.task, layer_names(training.model)
        engine = model.engine(training.model, task, training.scaler, {"bn_group": 8}, layers=layers)
        step = engine._step
        task.workload(training.batch)
        for _ in range(2):
            with training.autocast():
                step.try_out(training.batch, 0, images)
        training.wait()
        begin = time.perf_counter()
        with training.autocast():
            found = profile(step, engine.meter, candidates(training.model, layers), training.batch, images)
        seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        levels = ladder(found)
        ladder_seconds = time.perf_counter() - begin
        results = []
        for level in levels:
            kept: list[int] = []
            gc.collect()

            def backward(loss: Any, kept: list[int] = kept, training: model.Training = training) -> None:
                kept.append(training.allocated_bytes())
                training.scaler.scale(loss).backward()

            step._backward = backward
            with training.autocast():
                outcome = step.try_out(training.batch, 0, images, step.checkpointing.within(level.plan))
            results.append((kept[0], outcome[1]))
        by_name = {layer.name: layer for layer in found.layers}
        worst = 0.0
        for level, (kept_bytes, peak) in zip(levels[1:], results[1:], strict=True):
            predicted = images * sum(
                by_name[name].rebuild_frees_bytes if mode == "rebuild" else by_name[name].recompute_frees_bytes
                for name, mode in level.plan.modes
            )
            measured = results[0][0] - kept_bytes
            row = {
                "model": f"yolov12{scale}",
                "images": images,
                "plan": str(level.plan),
                "predicted_mib": predicted / 2**20,
                "measured_mib": measured / 2**20,
                "off_percent": 100 * (predicted / measured - 1),
                "kept_mib": [kept_bytes / 2**20, results[0][0] / 2**20],
                "predicted_peak_mib": (levels[0].peak_bytes - level.peak_bytes) * images / 2**20,
                "measured_peak_mib": (results[0][1] - peak) / 2**20,
                "profile_s": seconds,
                "ladder_s": ladder_seconds,
            }
            worst = max(worst, abs(row["off_percent"]))
            yield row
        print(scale, f"off by {worst:.2f} %; profile {seconds:.2f} s, ladder {ladder_seconds:.2f} s", flush=True)
        engine.close()
        del training, task, engine, step
        gc.collect()
        torch.cuda.empty_cache()
