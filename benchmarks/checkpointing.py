"""Checkpoint plans on a GPU: images/s at each memory limit, and measured against predicted bytes that plans free.

    python -m benchmarks checkpointing --out benchmarks/results/checkpointing.json     (about 14 minutes on one H100)
    python -m benchmarks checkpointing --out part.json --only freed
    python -m benchmarks checkpointing --out part.json --only predicted     (no GPU; for rows in the file)

Three variants are compared at each limit: `ours` is the engine at batch 256; `stock` is Ultralytics, in a process
without this package, at the largest batch that runs without a failed allocation; `all` is our model with every layer
recomputed, at its largest batch. All run the v1.0 layout, which stock knows, in fp16, with SGD, a scaler, gradient
clipping and an EMA.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import model, report
from benchmarks.common.model import part_of
from benchmarks.common.processes import EXPANDABLE, GIB, Call, limit_memory

LIMITS_GIB = (4, 8, 12, 16, 24, 40, 80)
BATCHES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
SECONDS = {"s": 45.0, "m": 20.0, "x": 18.0}
"""Scale → most seconds that `ours` runs at each limit until the controller has settled."""
SETTLED = 40
"""Number of steps with the same decision after which the controller counts as settled."""
PEAKS_GIB = (8, 16, 24)
"""Limits in GiB for a scale of which only peaks are measured."""


class Training:
    """Model in training, with its optimizer, scaler, moving average and a batch."""

    def __init__(self, cfg: str) -> None:
        import torch
        from ultralytics.utils.torch_utils import ModelEMA

        self.model, self.task, self.scaler, self.batch = model.prepare(256, cfg=cfg)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
        self.ema = ModelEMA(self.model)

    def update(self) -> None:
        model.update(self.model, self.optimizer, self.scaler)
        self.ema.update(self.model)

    def bare(self, batch: int, start: int = 0) -> None:
        """Run forward and backward pass of a batch as Ultralytics does."""
        import torch

        with torch.autocast("cuda", torch.float16):
            part = self.task.preprocess(part_of(self.batch, start, start + batch))
            loss, _ = self.model(part)
        self.scaler.scale(loss.sum()).backward()


def _fixed_batches(training: Training, name: str, limits: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield a row with images/s at the largest batch that runs, for each limit."""
    import torch

    slow: list[str] = []
    _count_fallbacks(slow)

    def runs(batch: int, steps: int) -> float:
        accumulate = max(round(64 / batch), 1)
        several = min(accumulate, 4)
        torch.cuda.reset_peak_memory_stats()
        times = []
        for step in range(steps):
            begin = time.perf_counter()
            for index in range(several):
                training.bare(batch, (step * several + index) * batch % (257 - batch))
            torch.cuda.synchronize()
            middle = time.perf_counter()
            training.update()
            torch.cuda.synchronize()
            times.append((middle - begin) / several + (time.perf_counter() - middle) / accumulate)
        return batch / statistics.median(times[1:] or times)

    runs(BATCHES[2], 3)
    batch, peak, upper = BATCHES[2], torch.cuda.max_memory_allocated(), len(BATCHES)
    fixed = torch.cuda.memory_allocated()
    for gib in sorted(limits, reverse=True):
        limit_memory(gib)
        # Larger batches are not tried: memory grows in proportion to images, and each attempt takes long.
        likely = 1.1 * batch * (gib * GIB - fixed) / (peak - fixed)
        upper = min(upper, sum(size <= likely for size in BATCHES))
        while upper:
            batch = BATCHES[upper - 1]
            slow.clear()
            try:
                runs(batch, 2)
                speed = runs(batch, 7)
                failed = bool(slow)
            except torch.cuda.OutOfMemoryError:
                failed = True
            if not failed:
                break
            training.optimizer.zero_grad()
            torch.cuda.empty_cache()
            upper -= 1
        if upper:
            peak = torch.cuda.max_memory_allocated()
            row = {"limit_gib": gib, "batch": batch, "images_per_s": speed, "peak_mib": peak / 2**20}
            print(name, json.dumps(row), flush=True)
            yield row


def _count_fallbacks(into: list[str]) -> None:
    """Note when Ultralytics' assigner falls back to single images after a failed allocation: not a stable run."""
    from ultralytics.utils import LOGGER

    warn = LOGGER.warning
    LOGGER.warning = lambda message, *args, **kwargs: (into.append(str(message)), warn(message, *args, **kwargs))


def stock(scale: str, limits: Sequence[int] = LIMITS_GIB) -> Iterator[dict[str, Any]]:
    """Measure unpatched Ultralytics; the import hook is turned off in this process."""
    training = Training(f"yolo12{scale}.yaml")
    assert "yolov12.seams" not in sys.modules, "this is not stock"
    yield from _fixed_batches(training, f"stock {scale}", limits)


def all_layers(scale: str, limits: Sequence[int] = LIMITS_GIB) -> Iterator[dict[str, Any]]:
    """Measure our model with every top-level layer recomputed."""
    from torch.utils.checkpoint import checkpoint

    training = Training(f"yolo12{scale}.yaml")
    for layer in training.model.model:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    yield from _fixed_batches(training, f"all {scale}", limits)


def ours(scale: str, limits: Sequence[int] = LIMITS_GIB) -> Iterator[dict[str, Any]]:
    """Measure the engine at each limit. Later limits use the profile of the first, as runs use that of earlier runs."""
    import torch

    from yolov12.mas.checkpointing.checkpointing import REBUILD, RECOMPUTE
    from yolov12.models.layer_names import layer_names

    training, cache = Training(f"yolo12{scale}.yaml"), Path(tempfile.mkdtemp())
    for gib in limits:
        torch.cuda.empty_cache()
        begin = time.perf_counter()
        engine = model.engine(
            training.model,
            training.task,
            training.scaler,
            {"limit": gib * GIB},
            layers=layer_names(training.model),
            cache=cache,
            log=lambda line: print(line, flush=True),
        )
        steps: list[dict[str, Any]] = []
        while len(steps) < 4 or not (_settled(steps) or time.perf_counter() - begin > SECONDS[scale]):
            start = time.perf_counter()
            with torch.autocast("cuda", torch.float16):
                result = engine.step(training.batch)
            engine.update(training.optimizer, training.update)
            torch.cuda.synchronize()
            latest = engine.latest
            steps.append(
                {
                    "micro_batch": max(result.micro_batches),
                    "level": latest.level,
                    "s": round(time.perf_counter() - start, 4),
                    "predicted_mib": latest.predicted_bytes / 2**20,
                    "peak_mib": latest.peak_bytes / 2**20,
                    "events": latest.events,
                }
            )
        last = [step for step in steps[1:] if _steady(step, steps[-1])][-5:] or steps[-1:]
        row = {
            "limit_gib": gib,
            "bn_group": engine.bn_group,
            "micro_batch": max(result.micro_batches),
            "plan": {mode: engine._step.plans[latest.level].names(mode) for mode in (REBUILD, RECOMPUTE)},
            "images_per_s": 256 / statistics.median(step["s"] for step in last),
            "images_per_s_all": 256 * len(steps) / sum(step["s"] for step in steps),
            "peak_mib": max(step["peak_mib"] for step in last),
            "failures": sum("out-of-memory" in event for step in steps for event in step["events"]),
            "ladder": [[level.fraction, level.slow] for level in engine._planner.cost.levels],
            "steps": steps,
        }
        told = {key: value for key, value in row.items() if key not in ("steps", "ladder", "plan")}
        print("ours", scale, json.dumps(told), "level", latest.level, flush=True)
        engine.close()
        yield row


def _settled(steps: list[dict[str, Any]]) -> bool:
    return len(steps) >= SETTLED and len({(step["micro_batch"], step["level"]) for step in steps[-SETTLED:]}) == 1


def _steady(step: dict[str, Any], last: dict[str, Any]) -> bool:
    """Return whether a step ran with the same decision as the last step, without a change in it."""
    alike = all(step[key] == last[key] for key in ("micro_batch", "level"))
    return alike and not any(event.startswith(("grew", "shrunk", "plan")) for event in step["events"])


def predicted(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Predict with `yolov12 plan` the peaks that `ours` measured. This needs no GPU."""
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
                network, micro_batch=row["micro_batch"], plan=plan, boxes=2 * model.BOXES_PER_IMAGE - 1, optimizer="SGD"
            )
            mib = found.peak_bytes / 2**20
            told = {key: row[key] for key in ("limit_gib", "micro_batch", "peak_mib")}
            rows[part].append({**told, "predicted_mib": mib, "off_percent": 100 * (mib / row["peak_mib"] - 1)})
            print(part, json.dumps(rows[part][-1]), flush=True)
    return rows


def freed() -> Iterator[dict[str, Any]]:
    """Yield measured and predicted bytes that plans free, between forward and backward pass and at the peak."""
    import gc

    import torch

    from yolov12.mas.checkpointing.layers import candidates
    from yolov12.mas.profiling.solver import ladder
    from yolov12.mas.profiling.warmup import profile
    from yolov12.models.layer_names import layer_names

    for scale, images in zip("nsmlx", (32, 32, 16, 16, 8), strict=True):
        training = Training(f"yolov12{scale}.yaml")
        task, layers = training.task, layer_names(training.model)
        engine = model.engine(training.model, task, training.scaler, {"bn_group": 8}, layers=layers)
        step = engine._step
        task.workload(training.batch)
        autocast = functools.partial(torch.autocast, "cuda", torch.float16)
        for _ in range(2):
            with autocast():
                step.try_out(training.batch, 0, images)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with autocast():
            found = profile(step, engine.meter, candidates(training.model, layers), training.batch, images)
        seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        levels = ladder(found)
        ladder_seconds = time.perf_counter() - begin
        results = []
        for level in levels:
            kept: list[int] = []
            gc.collect()

            def backward(loss: Any, kept: list[int] = kept, training: Training = training) -> None:
                kept.append(torch.cuda.memory_allocated())
                training.scaler.scale(loss).backward()

            step._backward = backward
            with autocast():
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


PARTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "freed": freed,
    **{f"{name}-{scale}": functools.partial(run, scale)
       for scale in "sx" for name, run in (("ours", ours), ("stock", stock), ("all", all_layers))},
    "ours-m": functools.partial(ours, "m", limits=PEAKS_GIB),
}  # fmt: skip


def main() -> int:
    """Run the parts, each in a process of its own, which writes each row at once."""
    parser = report.parser(__doc__, parts=[*PARTS, "predicted"])
    parser.add_argument("--limits", nargs="+", type=int, help="GiB: measure at these, keep the other rows")
    options = parser.parse_args()
    failed = 0
    for part in options.only:
        result = report.Report(options.out, keep=True)
        if part == "predicted":
            result.add(part, predicted(result))
            continue
        result.add(part, result.get(part, []))
        started = time.time()
        work = {"part": part, "out": str(options.out.absolute()), "limits": options.limits or []}
        failed |= Call("checkpointing:run", stock=part.startswith("stock"), variables=EXPANDABLE, **work).wait()
        print(f"{part}: {time.time() - started:.0f} s", flush=True)
    return failed


def run(part: str, out: str, limits: list[int]) -> None:
    """Measure a part in this process, and write each row at once.

    Args:
        part: Key of `PARTS`.
        out: JSON file that has the head of the result.
        limits: Limits in GiB; empty for all.
    """
    result = json.loads(Path(out).read_text())
    kept = [row for row in result.get(part, []) if limits and row["limit_gib"] not in limits]
    for row in PARTS[part](**({"limits": limits} if limits else {})):
        kept = sorted([*kept, row], key=lambda row: row.get("limit_gib", 0))
        report.write(Path(out), {**result, part: kept})


if __name__ == "__main__":
    sys.exit(main())
