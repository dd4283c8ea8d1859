"""The memory-aware step on a GPU: limits, another process that takes memory, injected failures, prediction, overhead.

    python -m benchmarks memory --out benchmarks/results/memory.json      (about 15 minutes on one large GPU)
    python -m benchmarks memory --out part.json --only limits overhead

Every part runs in a process of its own. Whole trainings run the command `yolov12 train`, and stock Ultralytics for
comparison. The data set is drawn (`data=demo`); 5 % of its images are crowded.
"""

from __future__ import annotations

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
from benchmarks.common.model import engine as _engine
from benchmarks.common.model import prepare, update
from benchmarks.common.processes import EXPANDABLE, GIB, Call
from benchmarks.common.rounds import in_turn, median_ms, median_ratio
from benchmarks.memory_trainings import first_epoch, limits, neighbour


def gradient() -> dict[str, Any]:
    """Compare the gradients of one batch at 8 GiB and at 40 GiB with the effect of rounding alone.

    The effect of fp16 rounding is the difference when the same micro-batches run in the other memory layout, which
    changes the order of summation. The weights are those after 60 steps of training, so that the assigner finds
    objects.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    model, task, scaler, batch = prepare()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    engine = _engine(model, task, scaler, {"bn_group": 16})
    for _ in range(60):
        with torch.autocast("cuda", torch.float16):
            engine.step(batch)
        engine.update(optimizer)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found: dict[str, Any] = {}

    def run(name: str, limit_gib: int, dtype: Any = torch.float16, layout: Any = torch.channels_last) -> None:
        model.to(memory_format=layout)
        with _engine(model, task, scaler, {"limit": limit_gib * GIB, "bn_group": 16}) as engine:
            for _ in range(3):  # until the micro-batch has settled
                model.zero_grad()
                model.load_state_dict(state)
                with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
                    result = engine.step(batch)
        found[name] = {
            "micro_batches": result.micro_batches,
            "peak_mib": engine.latest.peak_bytes / 2**20,
            "loss": float(result.loss.sum()),
            "gradient": [p.grad.double() / scaler.get_scale() for p in model.parameters() if p.grad is not None],
            "statistics": [value.double() for name, value in model.named_buffers() if "running" in name],
        }
        model.zero_grad()
        torch.cuda.empty_cache()

    run("8 GiB", 8)
    run("40 GiB", 40)
    run("8 GiB, other layout", 8, layout=torch.contiguous_format)
    run("12 GiB, fp32", 12, torch.float32)
    run("60 GiB, fp32", 60, torch.float32)

    def off(a: str, b: str, what: str) -> float:
        pairs = list(zip(found[a][what], found[b][what], strict=True))
        return float(sum(((x - y) ** 2).sum() for x, y in pairs).sqrt() / sum((y**2).sum() for _, y in pairs).sqrt())

    pairs = {
        "limit": ("8 GiB", "40 GiB"),
        "rounding": ("8 GiB, other layout", "8 GiB"),
        "fp16 against fp32": ("8 GiB", "12 GiB, fp32"),
        "limit, fp32": ("12 GiB, fp32", "60 GiB, fp32"),
    }
    return {
        "runs": {name: {key: run[key] for key in ("micro_batches", "peak_mib", "loss")} for name, run in found.items()},
        "relative_difference": {name: off(a, b, "gradient") for name, (a, b) in pairs.items()},
        "running_statistics": {name: off(a, b, "statistics") for name, (a, b) in pairs.items()},
    }


def first_times() -> list[dict[str, float]]:
    """Measure the first and the second micro-batch of each size: libraries search kernels for the first."""
    import torch

    model, task, scaler, batch = prepare(images=64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    rows = []
    task.workload(batch)
    for images in (1, 2, 4, 8, 16, 32, 15, 14, 24):
        times = []
        for _ in range(2):
            start = time.perf_counter()
            with torch.autocast("cuda", torch.float16):
                loss, _ = model(task.preprocess(task.part(batch, 0, images)))
            scaler.scale(loss.sum()).backward()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        rows.append({"images": images, "first_s": times[0], "second_s": times[1]})
    return rows


def overhead(steps: int = 5, rounds: int = 3) -> list[dict[str, Any]]:
    """Compare the engine with a bare loop at the same micro-batch: forward, loss, backward, optimizer."""
    import torch

    model, task, scaler, batch = prepare()
    images = len(batch["img"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    step = functools.partial(update, model, optimizer, scaler)

    def bare(micro: int) -> None:
        with torch.autocast("cuda", torch.float16):
            for start in range(0, images, micro):
                part = task.preprocess(task.part(batch, start, start + micro))
                loss, _ = model(part)
                scaler.scale(loss.sum()).backward()
        step()

    def ours(engine: Any) -> None:
        with torch.autocast("cuda", torch.float16):
            engine.step(batch)
        engine.update(optimizer, step)

    rows = []
    for micro, group in ((256, 256), (32, 32), (128, 32), (64, 32), (256, 32)):
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


def _failing_steps(probability: float, steps: int = 200) -> dict[str, Any]:
    """Train with real failed allocations at random places of forward and backward passes, and save the weights."""
    import torch

    from yolov12 import mas

    model, task, scaler, batch = prepare(images=64, size=320)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    folder = Path(tempfile.mkdtemp())
    engine = _engine(model, task, scaler, {"bn_group": 16}, journal=mas.Journal(folder))
    chance = random.Random(1)
    leaves = [module for module in model.modules() if not list(module.children())]
    left = injected = 0

    def fail(*_: Any) -> None:
        nonlocal left, injected
        if left:
            left, injected = left - 1, injected + 1
            torch.empty(2**50, device="cuda")  # more than any card has, so the allocator raises its own error

    order = torch.Generator().manual_seed(0)
    first_loss = last_loss = 0.0
    for index in range(steps):
        shuffled = {**batch, "img": batch["img"][torch.randperm(64, generator=order)].pin_memory()}
        hook = None
        if chance.random() < probability and index:
            left, leaf = chance.randint(1, 2), chance.choice(leaves)  # a second failure hits the retry, too
            register = chance.choice((leaf.register_forward_pre_hook, leaf.register_full_backward_hook))
            hook = register(fail)
        with torch.autocast("cuda", torch.float16):
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


def failures(steps: int = 200, probability: float = 0.2) -> dict[str, Any]:
    """Run steps with injected failures and, at the same time, the same steps without: nothing may be lost."""
    import torch

    runs = {
        share: Call("memory:_failing_steps", probability=share, steps=steps, variables=EXPANDABLE)
        for share in (0.0, probability)
    }
    calm, disturbed = (run.result() for run in runs.values())
    a, b = (torch.load(_weights(share)) for share in runs)
    start = [parameter.detach().double().cpu() for parameter in prepare(images=1, size=64)[0].parameters()]

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


def main() -> int:
    """Run the parts, each in a process of its own, and write the results of each to the file at once."""
    options = report.parser(__doc__, parts=PARTS).parse_args()
    result = report.Report(options.out, keep=True)
    failed = 0
    while options.only:
        # Parts that measure no times run together on one card.
        together = UNTIMED & set(options.only) or {options.only[0]}
        options.only = [part for part in options.only if part not in together]
        started = time.time()
        runs = {part: Call(f"memory:{part}", variables=EXPANDABLE) for part in together}
        for part, run in runs.items():
            if status := run.wait():
                failed |= status
            else:
                result.add(part, run.result())
            print(f"{part}: {time.time() - started:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
