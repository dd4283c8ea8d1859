"""The memory-aware step on a GPU: limits, another process that takes memory, injected failures, prediction, overhead.

    python -m benchmarks memory --out benchmarks/results/memory.json      (about 15 minutes on one large GPU)
    python -m benchmarks memory --out part.json --small --device cpu           (a minute on the CPU, to try it)
    python -m benchmarks memory --out part.json --only limits overhead

Every part runs in a process of its own. Whole trainings run the command `yolov12 train`, and stock Ultralytics for
comparison. The data set is drawn (`data=demo`); 5 % of its images are crowded.

On a CPU, all is fp32, so that `gradient` has only `limit` and `rounding`, and memory is the resident memory of the
process. With `--small`, no limit is short, `gradient` gives the sizes of micro-batches in place of limits, and parts
run together, so that times say nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.model import autocast, prepare, update, wait
from benchmarks.common.model import engine as _engine
from benchmarks.common.processes import EXPANDABLE, GIB, ONE_THREAD, Call
from benchmarks.common.rounds import in_turn, median_ms, median_ratio
from benchmarks.common.size import Size
from benchmarks.endurance_model import yaml_of
from benchmarks.memory_trainings import first_epoch, limits, neighbour


def _prepare(size: Size, images: int = 256, imgsz: int = 640) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return what `prepare` does, in a trial with few small images and a model of ten layers."""
    if size.small:
        return prepare(min(images, 8), 64, cfg=yaml_of("tiny"), device=size.device)
    return prepare(images, imgsz, device=size.device)


def gradient(device: str = "cuda", small: bool = False) -> dict[str, Any]:
    """Compare the gradients of one batch at 8 GiB and at 40 GiB with the effect of rounding alone.

    The effect of fp16 rounding is the difference when the same micro-batches run in the other memory layout, which
    changes the order of summation. The weights are those after 60 steps of training, so that the assigner finds
    objects.

    Args:
        device: `cuda` or `cpu`.
        small: True for a trial, in which the sizes of micro-batches are given in place of limits.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    size = Size(device, small)
    model, task, scaler, batch = _prepare(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    group = size.sized(16, 2)
    engine = _engine(model, task, scaler, {"bn_group": group})
    for _ in range(size.sized(60, 5)):
        with autocast(device):
            engine.step(batch)
        # Weight gradients of 256 images can exceed fp16. As in a training, such an update is left out.
        engine.update(optimizer, functools.partial(update, model, optimizer, scaler))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found: dict[str, Any] = {}

    def run(way: str, dtype: str = "", layout: str = "") -> None:
        model.to(memory_format=torch.contiguous_format if layout else torch.channels_last)
        amount = int(way.split()[0])
        limit = {"micro_batch": amount} if small else {"limit": amount * GIB}
        with _engine(model, task, scaler, {**limit, "bn_group": group}) as engine:
            for _ in range(3):  # until the micro-batch has settled
                model.zero_grad()
                model.load_state_dict(state)
                with contextlib.nullcontext() if dtype else autocast(device):
                    result = engine.step(batch)
        found[f"{way}{layout}{dtype}"] = {
            "micro_batches": result.micro_batches,
            "peak_mib": engine.latest.peak_bytes / 2**20,
            "loss": float(result.loss.sum()),
            "scale": scaler.get_scale(),
            "gradient": [p.grad.double() / scaler.get_scale() for p in model.parameters() if p.grad is not None],
            "statistics": [value.double() for name, value in model.named_buffers() if "running" in name],
        }
        model.zero_grad()
        torch.cuda.empty_cache()

    less, more = size.sized(("8 GiB", "40 GiB"), ("2 at once", "8 at once"))
    less_fp32, more_fp32 = size.sized(("12 GiB", "60 GiB"), (less, more))
    other, fp32 = ", other layout", ", fp32"
    run(less)
    run(more)
    run(less, layout=other)
    pairs = {"limit": (less, more), "rounding": (f"{less}{other}", less)}
    if device == "cuda":  # on a CPU, all of them are fp32
        run(less_fp32, fp32)
        run(more_fp32, fp32)
        pairs["fp16 against fp32"] = less, f"{less_fp32}{fp32}"
        pairs["limit, fp32"] = f"{less_fp32}{fp32}", f"{more_fp32}{fp32}"

    def off(a: str, b: str, what: str) -> float:
        both = list(zip(found[a][what], found[b][what], strict=True))
        return float(sum(((x - y) ** 2).sum() for x, y in both).sqrt() / sum((y**2).sum() for _, y in both).sqrt())

    told = ("micro_batches", "peak_mib", "loss", "scale")
    return {
        "runs": {name: {key: run[key] for key in told} for name, run in found.items()},
        "relative_difference": {name: off(a, b, "gradient") for name, (a, b) in pairs.items()},
        "running_statistics": {name: off(a, b, "statistics") for name, (a, b) in pairs.items()},
    }


def first_times(device: str = "cuda", small: bool = False) -> list[dict[str, float]]:
    """Measure the first and the second micro-batch of each size: libraries search kernels for the first."""
    import torch

    size = Size(device, small)
    model, task, scaler, batch = _prepare(size, 64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    rows = []
    task.workload(batch)
    for images in size.sized((1, 2, 4, 8, 16, 32, 15, 14, 24), (1, 2, 8)):
        times = []
        for _ in range(2):
            start = time.perf_counter()
            with autocast(device):
                loss, _ = model(task.preprocess(task.part(batch, 0, images)))
            scaler.scale(loss.sum()).backward()
            wait(device)
            times.append(time.perf_counter() - start)
        rows.append({"images": images, "first_s": times[0], "second_s": times[1]})
    return rows


def overhead(device: str = "cuda", small: bool = False) -> list[dict[str, Any]]:
    """Compare the engine with a bare loop at the same micro-batch: forward, loss, backward, optimizer."""
    import torch

    size = Size(device, small)
    steps, rounds = size.sized((5, 3), (1, 2))
    model, task, scaler, batch = _prepare(size)
    images = len(batch["img"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    step = functools.partial(update, model, optimizer, scaler)

    def bare(micro: int) -> None:
        with autocast(device):
            for start in range(0, images, micro):
                part = task.preprocess(task.part(batch, start, start + micro))
                loss, _ = model(part)
                scaler.scale(loss.sum()).backward()
        step()

    def ours(engine: Any) -> None:
        with autocast(device):
            engine.step(batch)
        engine.update(optimizer, step)

    rows = []
    for micro, group in size.sized(((256, 256), (32, 32), (128, 32), (64, 32), (256, 32)), ((8, 8), (2, 2), (8, 2))):
        engine = _engine(model, task, scaler, {"bn_group": group, "micro_batch": micro})
        runs = {"bare": functools.partial(bare, micro), "engine": functools.partial(ours, engine)}
        in_turn(runs, 2)
        ms = in_turn({name: functools.partial(median_ms, run, steps) for name, run in runs.items()}, rounds)
        rows.append(
            {
                "micro_batch": micro,
                "bn_group": group,
                **{f"{name}_ms": statistics.median(each) for name, each in ms.items()},
                "engine_over_bare": median_ratio(ms["engine"], ms["bare"]),
                "rounds": [a / b for a, b in zip(ms["engine"], ms["bare"], strict=True)],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _failing_steps(probability: float, steps: int, device: str, small: bool) -> dict[str, Any]:
    """Train with real failed allocations at random places of forward and backward passes, and save the weights."""
    import torch

    from yolov12 import mas

    size = Size(device, small)
    model, task, scaler, batch = _prepare(size, 64, 320)
    images = len(batch["img"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    folder = Path(tempfile.mkdtemp())
    engine = _engine(model, task, scaler, {"bn_group": size.sized(16, 2)}, journal=mas.Journal(folder))
    chance = random.Random(1)
    leaves = [module for module in model.modules() if not list(module.children())]
    left = injected = 0

    def fail(*_: Any) -> None:
        nonlocal left, injected
        if left:
            left, injected = left - 1, injected + 1
            torch.empty(2**50, device=device)  # more than any device has, so the allocator raises its own error

    order = torch.Generator().manual_seed(0)
    first_loss = last_loss = 0.0
    for index in range(steps):
        shuffled = {**batch, "img": batch["img"][torch.randperm(images, generator=order)]}
        if device == "cuda":
            shuffled["img"] = shuffled["img"].pin_memory()
        hook = None
        if chance.random() < probability and index:
            left, leaf = chance.randint(1, 2), chance.choice(leaves)  # a second failure hits the retry, too
            register = chance.choice((leaf.register_forward_pre_hook, leaf.register_full_backward_hook))
            hook = register(fail)
        with autocast(device):
            last_loss = float(engine.step(shuffled).loss.sum())
        first_loss = first_loss or last_loss
        if hook is not None:
            hook.remove()
        engine.update(optimizer)
    summary = engine.close(updates_expected=steps)
    assert summary is not None
    torch.save([parameter.detach().double().cpu() for parameter in model.parameters()], _weights(probability))
    names = ("updates", "updates_expected", "images", "images_lost", "out_of_memories", "retries", "shrinks", "grows")
    return {
        "steps": steps,
        "failures_injected": injected,
        **{name: getattr(summary, name) for name in names},
        "loss": [first_loss, last_loss],
    }


def _weights(probability: float) -> Path:
    return Path(tempfile.gettempdir()) / f"weights-{probability}.pt"


def failures(device: str = "cuda", small: bool = False) -> dict[str, Any]:
    """Run steps with injected failures and, at the same time, the same steps without: nothing may be lost."""
    import torch

    size = Size(device, small)
    steps, probability = size.sized((200, 0.2), (8, 0.5))
    work = {"steps": steps, "device": device, "small": small, "variables": EXPANDABLE}
    runs = {share: Call("memory:_failing_steps", probability=share, **work) for share in (0.0, probability)}
    calm, disturbed = (run.result() for run in runs.values())
    a, b = (torch.load(_weights(share)) for share in runs)
    start = [parameter.detach().double().cpu() for parameter in _prepare(size, 1, 64)[0].parameters()]

    def length(one: Any, other: Any) -> float:
        return float(sum(((x - y) ** 2).sum() for x, y in zip(one, other, strict=True)) ** 0.5)

    return {
        "undisturbed": calm,
        "disturbed": disturbed,
        "difference_of_weights": length(a, b),
        "way_the_weights_went": length(a, start),
    }


PARTS = {
    "gradient": gradient,
    "first_times": first_times,
    "first_epoch": first_epoch,
    "overhead": overhead,
    "failures": failures,
    "limits": limits,
    "neighbour": neighbour,
}
UNTIMED = {"limits", "failures"}
AT_ONCE = 4
"""Number of parts of a trial that run together."""


def main() -> int:
    """Run the parts, each in a process of its own, and write the results of each to the file at once."""
    small = f"few images of 64 pixels, a tiny model, and {AT_ONCE} parts at once"
    options = report.parser(__doc__, parts=PARTS, small=small).parse_args()
    result = report.Report(options.out, options.device, keep=True)
    variables = EXPANDABLE if options.device == "cuda" else ONE_THREAD
    size = {"device": options.device, "small": options.small}
    failed = 0
    while options.only:
        # Parts that measure no times run together on one card.
        together = set(options.only[:AT_ONCE]) if options.small else UNTIMED & set(options.only) or {options.only[0]}
        options.only = [part for part in options.only if part not in together]
        started = time.time()
        runs = {part: Call(f"memory:{part}", variables=variables, **size) for part in together}
        for part, run in runs.items():
            if status := run.wait():
                failed |= status
            else:
                try:
                    result.add(part, run.result())
                except ValueError as error:  # other parts have other figures
                    print(error, flush=True)
                    failed = 1
            print(f"{part}: {time.time() - started:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
