"""Checkpoint plans on a GPU: images/s at each memory limit, and measured against predicted bytes that plans free.

    python benchmarks/checkpointing.py --out benchmarks/results/checkpointing.json     (about 14 minutes on one H100)
    python benchmarks/checkpointing.py --out part.json --only freed
    python benchmarks/checkpointing.py --out part.json --only predicted     (no GPU; for rows in the file)

Three variants are compared at each limit: `ours` is the engine at batch 256; `stock` is Ultralytics, in a process
without this package, at the largest batch that runs without a failed allocation; `all` is our model with every layer
recomputed, at its largest batch. All run the v1.0 layout, which stock knows, in fp16, with SGD, a scaler, gradient
clipping and an EMA.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30
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
        from memory import prepare
        from ultralytics.utils.torch_utils import ModelEMA

        self.model, self.task, self.scaler, self.batch = prepare(256, cfg=cfg)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
        self.ema = ModelEMA(self.model)

    def update(self) -> None:
        import torch

        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.model)

    def bare(self, batch: int, start: int = 0) -> None:
        """Run forward and backward pass of a batch as Ultralytics does."""
        import torch

        with torch.autocast("cuda", torch.float16):
            part = self.task.preprocess(_part(self.batch, start, start + batch))
            loss, _ = self.model(part)
        self.scaler.scale(loss.sum()).backward()


def _part(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    image_of = batch["batch_idx"]
    mine = (image_of >= start) & (image_of < stop)
    return {
        "img": batch["img"][start:stop],
        "batch_idx": image_of[mine] - start,
        **{key: batch[key][mine] for key in ("cls", "bboxes")},
    }


def _limit(gib: float) -> None:
    import torch

    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(gib * GIB / total, 1.0))


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
        _limit(gib)
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

    from yolov12 import mas
    from yolov12.mas.checkpointing.checkpointing import REBUILD, RECOMPUTE
    from yolov12.models.activations import activations
    from yolov12.models.layer_names import layer_names

    training, cache = Training(f"yolo12{scale}.yaml"), Path(tempfile.mkdtemp())
    for gib in limits:
        torch.cuda.empty_cache()
        begin = time.perf_counter()
        engine = mas.Engine(
            training.model,
            training.task,
            mas.Config(limit=gib * GIB),
            backward=lambda loss: training.scaler.scale(loss).backward(),
            layers=layer_names(training.model),
            activations=activations(training.model),
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
    from memory import BOXES_PER_IMAGE

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
                network, micro_batch=row["micro_batch"], plan=plan, boxes=2 * BOXES_PER_IMAGE - 1, optimizer="SGD"
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

    from yolov12 import mas
    from yolov12.mas.checkpointing.layers import candidates
    from yolov12.mas.profiling.solver import ladder
    from yolov12.mas.profiling.warmup import profile
    from yolov12.models.activations import activations
    from yolov12.models.layer_names import layer_names

    for scale, images in zip("nsmlx", (32, 32, 16, 16, 8), strict=True):
        training = Training(f"yolov12{scale}.yaml")
        model, task = training.model, training.task
        layers = layer_names(model)
        engine = mas.Engine(
            model, task, mas.Config(bn_group=8), backward=lambda loss, t=training: t.scaler.scale(loss).backward(),
            layers=layers, activations=activations(model),
        )  # fmt: skip
        step = engine._step
        task.workload(training.batch)
        autocast = functools.partial(torch.autocast, "cuda", torch.float16)
        for _ in range(2):
            with autocast():
                step.try_out(training.batch, 0, images)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with autocast():
            found = profile(step, engine.meter, candidates(model, layers), training.batch, images)
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
        del training, model, task, engine, step
        gc.collect()
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "freed": freed,
    **{f"{name}-{scale}": functools.partial(run, scale)
       for scale in "sx" for name, run in (("ours", ours), ("stock", stock), ("all", all_layers))},
    "ours-m": functools.partial(ours, "m", limits=PEAKS_GIB),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "predicted"], default=[*PARTS, "predicted"])
    parser.add_argument("--limits", nargs="+", type=int, help="GiB: measure at these, keep the other rows")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _run(options.part, options.out, options.limits or [])
        return 0
    failed = 0
    for part in options.only:
        if part == "predicted":
            result = _read(options.out)
            _write(options.out, {**result, part: predicted(result)})
        else:
            failed |= _measure(part, options.out, options.limits or [])
    return failed


def _measure(part: str, out: Path, limits: list[int]) -> int:
    """Run a part in its own process, which writes each row at once; return its exit status."""
    import torch
    import ultralytics

    header = {
        "command": "python benchmarks/checkpointing.py --out checkpointing.json",
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ultralytics": ultralytics.__version__,
    }
    _write(out, {**_read(out), **header})
    started = time.time()
    hook = {"YOLOV12_AUTOPATCH": "0"} if part.startswith("stock") else {}
    environment = {**os.environ, **hook, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, __file__, "--out", str(out), "--part", part]
    command += ["--limits", *map(str, limits)] if limits else []
    code = subprocess.run(command, env=environment).returncode
    print(f"{part}: {time.time() - started:.0f} s", flush=True)
    return code


def _run(part: str, out: Path, limits: list[int]) -> None:
    kept = [row for row in _read(out).get(part, []) if limits and row["limit_gib"] not in limits]
    for row in PARTS[part](**({"limits": limits} if limits else {})):
        kept = sorted([*kept, row], key=lambda row: row.get("limit_gib", 0))
        _write(out, {**_read(out), part: kept})


def _read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return found


def _write(out: Path, result: dict[str, Any]) -> None:
    unfinished = out.with_suffix(".new")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(out)


if __name__ == "__main__":
    sys.exit(main())
