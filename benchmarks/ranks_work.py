"""Work of each process that ranks.py starts: a training, a gradient, or the times of agreements and checksums.

Ultralytics reads the environment when it is imported, so only functions import it here.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GROUP = 8
"""Number of images in a BatchNorm group."""


def train(work: dict[str, Any]) -> dict[str, Any]:
    """Run one training, with its clock and its injected failures."""
    from ultralytics import YOLO

    rank = int(os.environ.get("RANK", "-1"))
    arguments = {**work["arguments"], **(work["of_rank"][rank] if "of_rank" in work else {})}
    model = YOLO(arguments.pop("model"))
    injected: list[str] = []
    if rank >= 0 and rank == work.get("failing_rank"):
        model.add_callback("on_train_batch_start", _fail_at(work["failing_steps"], injected))
    if "clock" in work:
        for name, callback in _clock(work["clock"]).items():
            model.add_callback(name, callback)
    model.train(**arguments)
    return {"injected": injected, "ran_at": model.trainer.batch_size}


def _fail_at(steps: Sequence[int], injected: list[str]) -> Callable[[Any], None]:
    """Return a callback that lets the first or second micro-batch of each of these steps run out of memory."""
    import torch

    from yolov12.training.adapter.detection import DetectionTask

    stock, chance = DetectionTask.loss, random.Random(5)
    step, wait = 0, -1

    def begins(_: Any) -> None:
        nonlocal step, wait
        step += 1
        if step in steps:
            wait = chance.randrange(2)  # if a step has only one micro-batch, the first of the next step fails

    def loss(task: Any, model: Any, part: dict[str, Any]) -> Any:
        nonlocal wait
        found = stock(task, model, part)
        wait, due = max(wait - 1, -1), wait == 0
        if due:  # fails after the forward pass, whose tensors are in memory
            injected.append(f"step {step}, {len(part['img'])} images")
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB (injected)")
        return found

    DetectionTask.loss = loss  # type: ignore[assignment,method-assign]
    return begins


def _clock(file: str) -> dict[str, Callable[[Any], None]]:
    """Return callbacks that write the times of epochs and batches to a file.

    Ultralytics passes them on to the processes that it starts.
    """
    epochs: list[list[float]] = []

    def now(trainer: Any) -> float:
        import torch

        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter()

    def epoch_starts(trainer: Any) -> None:
        epochs.append([now(trainer)])

    def batch_ends(trainer: Any) -> None:
        epochs[-1].append(time.perf_counter())

    def epoch_ends(trainer: Any) -> None:
        epochs[-1].append(now(trainer))
        if os.environ.get("RANK", "0") in ("0", "-1"):
            Path(file).write_text(json.dumps(epochs))

    return {"on_train_epoch_start": epoch_starts, "on_train_batch_end": batch_ends, "on_train_epoch_end": epoch_ends}


def _meet(device: str) -> tuple[Any, Any]:
    """Join the process group; return the ranks and the device of this process."""
    import torch
    import torch.distributed as dist

    from yolov12.mas.distributed.ranks import ProcessRanks, exchange_names
    from yolov12.mas.distributed.watchdog import Watchdog, connect

    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    names = exchange_names()
    return ProcessRanks(Watchdog(connect(), dist.get_rank(), dist.get_world_size(), names=names)), place


def _part(ranks: Any) -> None:
    ranks.all(True)  # all ranks are done, so none is taken for dead
    ranks._watchdog.close()


class _InGroups:
    """Planner that splits a rank's share into micro-batches of a fixed number of groups."""

    level = 0

    def __init__(self, groups: Sequence[int], together: int) -> None:
        self._groups, self._together = tuple(groups), together

    def plan(self, start: int, failure: Any) -> list[tuple[int, ...]]:
        """Plan the remaining micro-batches, see `step.Planner`."""
        if failure is not None:
            raise RuntimeError(failure.message)
        return [self._groups[at : at + self._together] for at in range(0, len(self._groups), self._together)]

    def done(
        self, start: int, stop: int, allocated_bytes: int, peak_bytes: int | None, is_replay: bool = False
    ) -> None:
        """Ignore the measurement, see `step.Planner`."""


def rank_gradient(work: dict[str, Any]) -> dict[str, Any]:
    """Compute the gradient of one batch on all ranks and, on rank 0, in one process, and compare them."""
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    from yolov12.mas.distributed.replicas import checksum
    from yolov12.mas.memory.meter import meter_for
    from yolov12.mas.step.step import Step
    from yolov12.mas.task import Share
    from yolov12.models.activations import activations
    from yolov12.training.adapter.detection import BOXES, DetectionTask

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ranks, device = _meet(work["device"])
    torch.manual_seed(0)
    model: Any = DetectionModel(work["model"], nc=80, verbose=False)
    with torch.no_grad():
        for scores in model.model[-1].cv3:  # scores of all sizes, unlike those of a new model
            scores[-1].bias.uniform_(-4.0, 0.0)
    model.to(device).train().args = get_cfg()
    images, shares = sum(work["shares"]), work["shares"]
    counts = torch.randint(1, 20, (images,))
    boxes = int(counts.sum())
    batch = {
        "img": torch.randint(0, 256, (images, 3, work["imgsz"], work["imgsz"]), dtype=torch.uint8),
        "batch_idx": torch.repeat_interleave(torch.arange(images), counts).float(),
        "cls": torch.randint(0, 80, (boxes, 1)).float(),
        "bboxes": torch.rand(boxes, 4) * 0.3 + 0.2,
    }

    def preprocess(part: dict[str, Any]) -> dict[str, Any]:
        part = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in part.items()}
        return {**part, "img": part["img"].float() / 255}

    task = DetectionTask(preprocess, multi_scale=False, overlapping_masks=True)
    scale = 1.0
    backward: Callable[[Any], None] = lambda loss: (loss * scale).backward()  # noqa: E731
    options = (meter_for(device), backward, None, activations(model))
    of_all, alone = Step(model, task, *options, ranks=ranks), Step(model, task, *options)
    start = sum(shares[: ranks.rank])
    task.workload(batch)
    mine = {key: value for key, value in task.part(batch, start, start + shares[ranks.rank]).items() if key != BOXES}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16

    def run(step: Any, part: Any, half: bool, together: int = 2) -> tuple[Any, float]:
        for _ in range(2):  # the second run uses the normaliser of the batch before, as in a training
            model.load_state_dict(state)
            model.zero_grad()
            planner = _InGroups([GROUP] * (task.workload(part).images // GROUP), together)
            with torch.autocast(device.type, dtype, enabled=half):
                result = step.run(part, len(part["img"]), planner, Share(images))
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return torch.cat([gradient.double().flatten() for gradient in gradients]) / scale, float(result.loss.sum())

    told: dict[str, Any] = {"device": str(device), "share": shares[ranks.rank]}
    for name, half in (("fp32", False), ("half", True)):
        scale = 1 / 16 if half else 1.0  # gradients of an untrained model are large
        ours, loss = run(of_all, mine, half)
        found: dict[str, Any] = {"gradient_crc": zlib.crc32(ours.cpu().numpy().tobytes())}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        found["checksum"] = checksum([*model.parameters(), *model.buffers()])
        if ranks.rank == 0:

            def off(one: Any, other: Any) -> float:
                return float((one - other).norm() / other.norm())

            (one, one_loss), (again, _), (other, _) = (run(alone, batch, half, split) for split in (2, 2, 1))
            found |= {
                "ranks_against_one": off(ours, one),
                "one_twice": off(again, one),
                "one_cut_otherwise": off(other, one),
                "loss_off": abs(loss / one_loss - 1),
                "finite": bool(ours.isfinite().all()),
                "norm": float(one.norm()),
            }
        told[name] = found
        ranks.all(True)
    _part(ranks)
    return told


def rank_agree(work: dict[str, Any]) -> dict[str, Any]:
    """Measure the milliseconds of host time that an agreement of the ranks takes, without waiting for a slow rank."""
    from yolov12.mas.distributed.ranks import NO_NEWS

    ranks, _ = _meet("cpu")
    times_ms = []
    for _ in range(work["calls"]):
        begin = time.perf_counter()
        ranks.agree(NO_NEWS)
        times_ms.append(1000 * (time.perf_counter() - begin))
    _part(ranks)
    return {"median_ms": statistics.median(times_ms), "p95_ms": statistics.quantiles(times_ms, n=20)[-1]}


def checksums(work: dict[str, Any]) -> dict[str, Any]:
    """Measure the milliseconds of a checksum of each model, from its launch to the result on the host."""
    import torch
    from ultralytics.nn.tasks import DetectionModel

    from yolov12.mas.distributed.replicas import checksum

    found = {}
    for name in work["models"]:
        model: Any = DetectionModel(name, nc=80, verbose=False).to(work["device"])
        times_ms = []
        for _ in range(22):
            if work["device"] == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            checksum([*model.parameters(), *model.buffers()])
            times_ms.append(1000 * (time.perf_counter() - begin))
        found[name] = statistics.median(times_ms[2:])
    return found
