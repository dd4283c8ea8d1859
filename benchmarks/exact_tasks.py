"""What exact gradients of segmentation and pose cost: images/s and peak memory with `exact=True` and `exact=False`.

    python benchmarks/exact_tasks.py --out benchmarks/results/exact_tasks.json      (some minutes on one GPU)
    python benchmarks/exact_tasks.py --out part.json --small --device cpu           (seconds, to try it)

YOLO12-S with a head for masks or keypoints, 64 images of 640 pixels, in BatchNorm groups of 16. The batch runs as
4 × 16 with `exact=True` and with `exact=False`, and at once. The variants take turns on one model in one process. A
step is the forward and backward pass and an optimizer step, in fp16 with a gradient scaler on a GPU and in fp32 on a
CPU. `peak_mib` is the peak of allocated memory of a step. `gradient_error` is |difference| / |gradient| against the
batch at once, in fp32, with the weights of the end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

    counts = torch.randint(1, 2 * BOXES_PER_IMAGE, (images,))
    boxes = int(counts.sum())
    batch = {
        "img": torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8),
        "batch_idx": torch.repeat_interleave(torch.arange(images), counts).float(),
        "cls": torch.randint(0, 80, (boxes, 1)).float(),
        "bboxes": torch.rand(boxes, 4) * 0.3 + 0.2,
    }
    if task == "segment":  # for each pixel the object that is seen there, from 1
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

    from yolov12 import mas
    from yolov12.models.activations import activations
    from yolov12.training.adapter.detection import DetectionTask

    torch.manual_seed(0)
    images, size, rounds, steps = (8, 96, 2, 1) if small else (64, 640, ROUNDS, STEPS)
    kind = {"segment": SegmentationModel, "pose": PoseModel}[task]
    model = kind(MODELS[task].replace("12s", "12n") if small else MODELS[task], nc=80, verbose=False)
    model = model.to(device, memory_format=torch.channels_last)
    model.train().args = DEFAULT_CFG
    batch = batch_of(task, images, size, device)
    scaler = torch.amp.GradScaler(device, init_scale=128.0, enabled=device == "cuda")
    scaler.scale(torch.zeros((), device=device))  # it makes its scale only now
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    def preprocess(part: dict[str, Any]) -> dict[str, Any]:
        part = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in part.items()}
        return {**part, "img": part["img"].float() / 255}

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    engines = {}
    for name, settings in VARIANTS.items():
        sizes = {"micro_batch": settings["micro_batch"] * images // 64, "bn_group": images // 4}
        engines[name] = mas.Engine(
            model,
            DetectionTask(preprocess, multi_scale=False, overlapping_masks=True),
            mas.Config(**{**settings, **sizes}),
            backward=lambda loss: scaler.scale(loss).backward(),
            activations=activations(model),
        )

    def step(engine: Any) -> Any:
        with torch.autocast("cuda", torch.float16) if device == "cuda" else contextlib.nullcontext():
            result = engine.step(batch)
        engine.update(optimizer, update)
        return result

    rows: dict[str, Any] = {}
    for name, engine in engines.items():
        for _ in range(2):  # libraries search kernels, and the engine sees the loss
            result = step(engine)
        rows[name] = {"micro_batches": result.micro_batches, "times_ms": []}
    for _ in range(rounds):
        for name, engine in engines.items():
            rows[name]["times_ms"].append(_ms(lambda engine=engine: step(engine), steps, device))
            rows[name]["peak_mib"] = round(max(rows[name].get("peak_mib", 0), engine.latest.peak_bytes / 2**20), 1)
    for row in rows.values():
        ms = statistics.median(row["times_ms"])
        row["times_ms"] = [round(each, 2) for each in row["times_ms"]]
        row |= {"ms": round(ms, 2), "images_per_s": round(1000 * images / ms, 1)}
    torch.backends.cudnn.allow_tf32 = False
    found = {}
    for name, engine in engines.items():
        optimizer.zero_grad()
        engine.step(batch)
        found[name] = torch.cat([each.grad.flatten().double() for each in model.parameters() if each.grad is not None])
    for name, each in found.items():
        rows[name]["gradient_error"] = float((each - found["at once"]).norm() / found["at once"].norm())
    pairs = zip(rows["exact"]["times_ms"], rows["by images"]["times_ms"], strict=True)
    rows["exact_over_by_images"] = round(statistics.median(exact / by_images for exact, by_images in pairs), 3)
    return rows


def _ms(run: Callable[[], Any], steps: int, device: str) -> float:
    """Return the median time of a few runs in milliseconds."""
    import torch

    times = []
    for _ in range(steps):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Measure both tasks, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="8 images of 96 pixels and scale N, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    os.environ.setdefault("YOLO_OFFLINE", "1")
    from yolov12 import autopatch

    autopatch.apply()
    import torch
    import ultralytics

    result: dict[str, Any] = {
        "command": "python benchmarks/exact_tasks.py --out exact_tasks.json" + " --small" * options.small,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "ultralytics": ultralytics.__version__,
        "models": MODELS,
        "tasks": {},
    }
    for task in MODELS:
        result["tasks"][task] = measure(task, small=options.small, device=options.device)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({task: result["tasks"][task]}), flush=True)


if __name__ == "__main__":
    main()
