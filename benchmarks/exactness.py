"""The gradient of a batch that is split: averaging losses against the engine. Needs no GPU.

    python -m benchmarks exactness --out benchmarks/results/exactness.json      (some minutes on two cores)

YOLO12-N, eight images of the demonstration data, split into two micro-batches of 4 and into eight of 1, before training
and after some steps. BatchNorm normalises groups of the micro-batch's size in every case, so only the loss differs.
`average` adds up the gradients of the micro-batches' own losses, as gradient accumulation does. `engine` is this
package. Both are compared with the whole batch at once: |difference| / |gradient|.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import report

IMAGES, SIZE, STEPS = 8, 192, 150


def batch_of() -> dict[str, Any]:
    """Images of the demonstration data, as a loader of Ultralytics collates them."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    from yolov12 import demo

    file = demo.ensure("demo:images=40", Path(tempfile.mkdtemp()))
    data = check_det_dataset(str(file))
    cfg = get_cfg(overrides={"imgsz": SIZE, "mosaic": 0.0})
    dataset = build_yolo_dataset(cfg, data["train"], IMAGES, data, mode="val", rect=False, stride=32)
    batch = dataset.collate_fn([dataset[index] for index in range(IMAGES)])
    return {**batch, "img": batch["img"].float() / 255}


def engine_gradient(model: Any, batch: dict[str, Any], micro_batch: int, group: int) -> Tensor:
    """The gradient that the engine makes."""
    from yolov12 import mas
    from yolov12.training.adapter.detection import DetectionTask

    model.zero_grad()
    task = DetectionTask(lambda part: part, multi_scale=False, overlapping_masks=True)
    mas.Engine(model, task, mas.Config(micro_batch=micro_batch, bn_group=group)).step(batch)
    return gradient_of(model)


def average_gradient(model: Any, batch: dict[str, Any], micro_batch: int) -> Tensor:
    """The sum of the gradients of the micro-batches' own losses, which Ultralytics multiplies by their images."""
    from yolov12.training.adapter.detection import BOXES, DetectionTask

    model.zero_grad()
    task = DetectionTask(lambda part: part, multi_scale=False, overlapping_masks=True)
    task.workload(batch)
    for start in range(0, IMAGES, micro_batch):
        part = task.part(batch, start, start + micro_batch)
        part.pop(BOXES)
        loss, _ = model(part)
        loss.sum().backward()
    return gradient_of(model)


def gradient_of(model: Any) -> Tensor:
    """All gradients of a model in one tensor."""
    return torch.cat([each.grad.flatten().double() for each in model.parameters() if each.grad is not None])


def measure() -> list[dict[str, Any]]:
    """Compare both with the whole batch, before and after some training."""
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG

    torch.manual_seed(0)
    batch = batch_of()
    model = DetectionModel("yolo12n.yaml", nc=11, verbose=False).train()
    model.args = DEFAULT_CFG
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for steps in (0, STEPS):
        for _ in range(steps):
            optimizer.zero_grad()
            model(batch)[0].sum().backward()
            optimizer.step()
        for dtype in (torch.float64, torch.float32):
            found += compare(copy.deepcopy(model).to(dtype), {**batch, "img": batch["img"].to(dtype)}, steps)
    return found


def compare(model: Any, batch: dict[str, Any], steps: int) -> Iterator[dict[str, Any]]:
    """Compare both with the whole batch, for two sizes of micro-batches."""
    model.criterion = None  # is made anew for the weights of this copy
    for size in (4, 1):
        whole = engine_gradient(model, batch, IMAGES, size)
        split = {
            "average": average_gradient(model, batch, size),
            "engine": engine_gradient(model, batch, size, size),
        }
        off = {name: float((each - whole).norm() / whole.norm()) for name, each in split.items()}
        row = {"dtype": str(batch["img"].dtype), "steps_before": steps, "micro_batch": size, **off}
        print(row, flush=True)
        yield row


def main() -> None:
    """Measure, and write the file."""
    out = report.parser(__doc__).parse_args().out
    os.environ.setdefault("YOLO_OFFLINE", "1")
    from yolov12 import autopatch

    autopatch.apply()
    report.Report(out, "cpu", model="yolo12n.yaml", images=IMAGES, imgsz=SIZE, rows=measure()).write()


if __name__ == "__main__":
    main()
