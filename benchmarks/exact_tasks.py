"""What exact gradients of segmentation and pose cost: images/s and peak memory with `exact=True` and `exact=False`.

    python -m benchmarks exact_tasks --out benchmarks/results/exact_tasks.json      (some minutes on one GPU)
    python -m benchmarks exact_tasks --out part.json --small --device cpu           (seconds, to try it)

YOLO12-S with a head for masks or keypoints, 64 images of 640 pixels, in BatchNorm groups of 16. The batch runs as
4 × 16 with `exact=True` and with `exact=False`, and at once. The variants take turns on one model in one process. A
step is the forward and backward pass and an optimizer step, in fp16 with a gradient scaler on a GPU and in fp32 on a
CPU. `peak_mib` is the peak of allocated memory of a step, with one variant at a time, as CUDA graphs of the others hold
memory. `gradient_error` is |difference| / |gradient| against the batch at once, in fp32, with the weights of the end.
`rounding_error` is what rounding alone makes of it: the batch at once again, in the other memory layout.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
from typing import Any

from benchmarks.common import report
from benchmarks.common.model import autocast, gradient_scaler, random_batch
from benchmarks.common.model import engine as engine_of
from benchmarks.common.model import task as detection_task
from benchmarks.common.rounds import in_turn, median_ms, median_ratio

VARIANTS = {
    "at once": {"micro_batch": 64},
    "exact": {"micro_batch": 16, "exact": True},
    "by images": {"micro_batch": 16, "exact": False},
}
MODELS = {"segment": "yolo12s-seg.yaml", "pose": "yolo12s-pose.yaml"}
BOXES_PER_IMAGE = 8
ROUNDS, STEPS = 5, 8


def batch_of(task: str, images: int, size: int, device: str) -> dict[str, Any]:
    """Return random images with random objects, as a loader of Ultralytics collates them."""
    import torch

    batch = random_batch(images, size, BOXES_PER_IMAGE)
    boxes = len(batch["cls"])
    if task == "segment":  # for each pixel the object that is seen there, from 1
        counts = batch["batch_idx"].long().bincount(minlength=images)
        cells = torch.rand(images, size // 4, size // 4) * (counts[:, None, None] + 1)
        batch["masks"] = cells.to(torch.uint8)
    else:
        batch["keypoints"] = torch.rand(boxes, 17, 3)
        batch["keypoints"][..., 2] = 2.0
    return {key: value.pin_memory() for key, value in batch.items()} if device == "cuda" else batch


def measure(task: str, *, small: bool, device: str) -> dict[str, Any]:
    """Let the variants take turns on one model; return a row for each."""
    import torch
    from ultralytics.nn.tasks import PoseModel, SegmentationModel
    from ultralytics.utils import DEFAULT_CFG

    torch.manual_seed(0)
    images, size, rounds, steps = (8, 96, 2, 1) if small else (64, 640, ROUNDS, STEPS)
    kind = {"segment": SegmentationModel, "pose": PoseModel}[task]
    model = kind(MODELS[task].replace("12s", "12n") if small else MODELS[task], nc=80, verbose=False)
    model = model.to(device, memory_format=torch.channels_last)
    model.train().args = DEFAULT_CFG
    batch = batch_of(task, images, size, device)
    scaler = gradient_scaler(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def made(settings: dict[str, Any]) -> Any:
        sizes = {"micro_batch": settings["micro_batch"] * images // 64, "bn_group": images // 4}
        return engine_of(model, detection_task(device), scaler, {**settings, **sizes})

    def step(engine: Any) -> Any:
        with autocast(device):
            result = engine.step(batch)
        engine.update(optimizer, update)
        return result

    rows: dict[str, Any] = {}
    for name, settings in VARIANTS.items():
        with made(settings) as engine:
            # Libraries search kernels, the engine sees the loss and captures graphs: all before the last step.
            results = [step(engine) for _ in range(2 if small else 8)]
            peak_mib = engine.latest.peak_bytes / 2**20
        rows[name] = {"micro_batches": results[-1].micro_batches, "peak_mib": round(peak_mib, 1)}
    engines = {name: made(settings) for name, settings in VARIANTS.items()}
    timed = {name: functools.partial(median_ms, functools.partial(step, each), steps) for name, each in engines.items()}
    found = in_turn(timed, rounds, warm_up=1)
    for name, row in rows.items():
        ms = statistics.median(found[name])
        row["times_ms"] = [round(each, 2) for each in found[name]]
        row |= {"ms": round(ms, 2), "images_per_s": round(1000 * images / ms, 1)}
    torch.backends.cudnn.allow_tf32 = False

    def gradient(engine: Any) -> Any:
        optimizer.zero_grad()
        engine.step(batch)
        each = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return torch.cat([grad.flatten().double() for grad in each])

    whole = gradient(engines["at once"])

    def error(other: Any) -> float:
        return float((other - whole).norm() / whole.norm())

    rows["at once"]["gradient_error"] = 0.0
    for name in ("exact", "by images"):
        rows[name]["gradient_error"] = error(gradient(engines[name]))
    model.to(memory_format=torch.contiguous_format)
    rows["rounding_error"] = error(gradient(engines["at once"]))
    rows["exact_over_by_images"] = round(median_ratio(found["exact"], found["by images"]), 3)
    return rows


def main() -> None:
    """Measure both tasks, and write the file."""
    options = report.parser(__doc__, small="8 images of 96 pixels and scale N").parse_args()
    os.environ.setdefault("YOLO_OFFLINE", "1")
    from yolov12 import autopatch

    autopatch.apply()
    result = report.Report(options.out, options.device, models=MODELS, tasks={})
    for task in MODELS:
        result["tasks"][task] = measure(task, small=options.small, device=options.device)
        result.write()
        print(json.dumps({task: result["tasks"][task]}), flush=True)


if __name__ == "__main__":
    main()
