"""Checkpoint plans on a GPU: images/s at each memory limit, and measured against predicted bytes that plans free.

    python -m benchmarks checkpointing --out benchmarks/results/checkpointing.json     (about 14 minutes on one H100)
    python -m benchmarks checkpointing --out part.json --only ours-s stock-s all-s --seconds 560
    python -m benchmarks checkpointing --out part.json --only ours-s stock-s all-s --seconds 300 --missing
    python -m benchmarks checkpointing --out part.json --only freed
    python -m benchmarks checkpointing --out part.json --only predicted     (no GPU; for rows in the file)
    python -m benchmarks checkpointing --out part.json --small --device cpu     (half a minute on the CPU, to try it)

Three variants are compared at each limit: `ours` is the engine at batch 256; `stock` is Ultralytics, in a process
without this package, at the largest batch that runs without a failed allocation; `all` is our model with every layer
recomputed, at its largest batch. All run the v1.0 layout, which stock knows, in fp16, with SGD, a scaler, gradient
clipping and an EMA. All update the weights once for 256 images: `stock` and `all` accumulate gradients (`nbs=256`).
What they would run with Ultralytics' default, an update for 64 images, is in their rows, too.

16 GiB comes first. With `--seconds`, each part has an equal share of the time that is left, keeps the rows that it has,
and leaves out limits that it does not reach; `--missing` measures only limits without a row of this commit.

`--small` runs the parts of scale N. On a CPU, all is fp32, memory is the resident memory of the process, and a batch of
`stock` or `all` fails if it used more than the limit, as nothing refuses memory. `predicted` is about allocated memory
of a GPU, so that it has no `off_percent` there.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.checkpointing_bytes import FREED, freed, predicted
from benchmarks.common import model, report
from benchmarks.common.model import Training
from benchmarks.common.processes import EXPANDABLE, GIB, ONE_THREAD, Call

FIRST_GIB = 16
LIMITS_GIB = (FIRST_GIB, 80, 40, 24, 12, 8, 4)
BATCHES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
BATCH = 256
"""Number of images in an update, of all variants."""
NOMINAL_BATCH = 64
"""Number of images in an update by Ultralytics' default, `nbs`."""
SETTLED = 40
"""Number of steps with the same decision after which the controller counts as settled."""
PATIENCE = 3
"""Factor by which `ours` may run longer, until it has tried two pairs of size and plan at the first limit, and until
enough steps in succession were alike."""
ALIKE = 5
"""Number of steps in succession whose median is the speed of `ours`."""
PEAKS_GIB = (16, 24, 8)
"""Limits in GiB for a scale of which only peaks are measured."""


@dataclass(frozen=True)
class Scope:
    """Limits of a part, its time, and the size of its work."""

    limits: tuple[float, ...] = LIMITS_GIB
    """Limits in GiB, in the order in which they are measured."""
    limit_s: float = 20.0
    """Most seconds that `ours` runs at a limit until the controller has settled."""
    until: float = math.inf
    """Time, as of `time.time`, after which no limit is begun."""
    steps: int = 7
    """Number of updates of a variant with a fixed batch that are measured at a limit."""
    images: int = BATCH
    """Number of images in an update."""
    imgsz: int = 640
    """Size of the images in pixels."""
    device: str = "cuda"
    """`cuda` or `cpu`."""
    freed: Mapping[str, int] = field(default_factory=lambda: FREED)
    """Scale → number of images of which a plan frees memory."""

    def training(self, model: str) -> Training:
        """Return the training of a model."""
        return Training(f"{model}.yaml", self.images, self.imgsz, self.device)

    def reached(self) -> Iterator[float]:
        """Yield the limits until the time is over."""
        for index, gib in enumerate(self.limits):
            if time.time() > self.until:
                print(f"no time for {self.limits[index:]} GiB", flush=True)
                return
            yield gib


def _fixed_batches(training: Training, name: str, scope: Scope) -> Iterator[dict[str, Any]]:
    """Yield a row with images/s at the largest batch that runs, for each limit."""
    slow: list[str] = []
    _count_fallbacks(slow)

    def runs(batch: int, steps: int) -> tuple[float, float]:
        several = min(max(round(scope.images / batch), 1), 4)
        training.mark()
        passes, updates = [], []
        for step in range(steps):
            begin = time.perf_counter()
            for index in range(several):
                training.bare(batch, (step * several + index) * batch % (training.images + 1 - batch))
            training.wait()
            middle = time.perf_counter()
            training.update()
            training.wait()
            passes.append((middle - begin) / several)
            updates.append(time.perf_counter() - middle)
        return statistics.median(passes[1:] or passes), statistics.median(updates[1:] or updates)

    sizes = [batch for batch in BATCHES if batch <= training.images]
    batch = sizes[2]
    runs(batch, min(scope.steps, 3))
    peak, fixed = training.peak_bytes(), training.allocated_bytes()
    for gib in scope.reached():
        training.limit(gib)
        # Larger batches are not tried: memory grows in proportion to images, and each attempt takes long.
        likely = 1.1 * batch * (gib * GIB - fixed) / max(peak - fixed, 1)
        for size in reversed([size for size in sizes if size <= likely]):
            slow.clear()
            try:
                runs(size, min(scope.steps, 2))
                pass_s, update_s = runs(size, scope.steps)
            except training.out_of_memory:
                slow.append("out of memory")
            if training.is_over_limit():
                slow.append("over the limit")
            if not slow:
                batch, peak = size, training.peak_bytes()
                row = {
                    "limit_gib": gib,
                    "batch": batch,
                    "images_per_update": scope.images,
                    "images_per_s": _rate(pass_s, update_s, batch, scope.images),
                    "images_per_s_nbs_64": _rate(pass_s, update_s, batch, NOMINAL_BATCH),
                    "update_ms": 1e3 * update_s,
                    "peak_mib": peak / 2**20,
                }
                print(name, json.dumps(row), flush=True)
                yield row
                break
            training.optimizer.zero_grad()
            training.release()


def _rate(pass_s: float, update_s: float, batch: int, images_per_update: int) -> float:
    """Return images/s if there is an update for so many images, or for each batch if it is larger."""
    return 1 / (pass_s / batch + update_s / max(images_per_update, batch))


def _count_fallbacks(into: list[str]) -> None:
    """Note when Ultralytics' assigner falls back to single images after a failed allocation: not a stable run."""
    from ultralytics.utils import LOGGER

    warn = LOGGER.warning
    LOGGER.warning = lambda message, *args, **kwargs: (into.append(str(message)), warn(message, *args, **kwargs))


def stock(scale: str, scope: Scope) -> Iterator[dict[str, Any]]:
    """Measure unpatched Ultralytics; the import hook is turned off in this process."""
    training = scope.training(f"yolo12{scale}")
    assert "yolov12.seams" not in sys.modules, "this is not stock"
    yield from _fixed_batches(training, f"stock {scale}", scope)


def all_layers(scale: str, scope: Scope, training: Training | None = None) -> Iterator[dict[str, Any]]:
    """Measure our model with every top-level layer recomputed."""
    from torch.utils.checkpoint import checkpoint

    training = training or scope.training(f"yolo12{scale}")
    for layer in training.model.model:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    yield from _fixed_batches(training, f"all {scale}", scope)


def ours(scale: str, scope: Scope, training: Training | None = None) -> Iterator[dict[str, Any]]:
    """Measure the engine at each limit. Later limits use the profile of the first, as runs use that of earlier runs."""
    from yolov12 import mas
    from yolov12.mas.checkpointing.checkpointing import REBUILD, RECOMPUTE
    from yolov12.models.layer_names import layer_names
    from yolov12.training.adapter.memory_needs import optimizer_bytes

    training, cache = training or scope.training(f"yolo12{scale}"), Path(tempfile.mkdtemp())
    needs = functools.partial(optimizer_bytes, training.optimizer, training.model)
    for gib in scope.reached():
        training.release()
        begin = tried = time.perf_counter()
        engine = model.engine(
            training.model,
            training.task,
            training.scaler,
            {"limit": int(gib * GIB)},
            layers=layer_names(training.model),
            cache=cache,
            advice=mas.Advice(optimizer_bytes=needs),
            log=lambda line: print(line, flush=True),
        )
        steps: list[dict[str, Any]] = []
        while not _enough(steps, gib, time.perf_counter() - tried, scope):
            start = time.perf_counter()
            with training.autocast():
                result = engine.step(training.batch)
            engine.update(training.optimizer, training.update)
            training.wait()
            latest = engine.latest
            steps.append(
                {
                    "micro_batch": max(result.micro_batches),
                    "level": latest.level,
                    "s": round(time.perf_counter() - start, 4),
                    "predicted_mib": latest.predicted_bytes / 2**20,
                    "peak_mib": latest.peak_bytes / 2**20,
                    "replayed": result.replayed,
                    "events": latest.events,
                }
            )
            if len(steps) == 1:  # kernels are compiled in the first one
                tried = time.perf_counter()
        last = _alike(steps)[-ALIKE:] or steps[-1:]
        images = training.images
        row = {
            "limit_gib": gib,
            "bn_group": engine.bn_group,
            "steps_in_smaller_groups": sum(any(e.startswith("groups of") for e in step["events"]) for step in steps),
            "micro_batch": max(result.micro_batches),
            "plan": {mode: engine._step.plans[latest.level].names(mode) for mode in (REBUILD, RECOMPUTE)},
            "images_per_update": images,
            "images_per_s": images / statistics.median(step["s"] for step in last),
            "images_per_s_all": images * len(steps) / sum(step["s"] for step in steps),
            "peak_mib": max(step["peak_mib"] for step in last),
            "failures": sum("out-of-memory" in event for step in steps for event in step["events"]),
            "replayed": result.replayed,
            "pairs_tried": _tried(steps),
            "seconds": round(time.perf_counter() - begin, 1),
            "ladder": [[level.fraction, level.slow] for level in engine._planner.cost.levels],
            "steps": steps,
        }
        told = {key: value for key, value in row.items() if key not in ("steps", "ladder", "plan")}
        print("ours", scale, json.dumps(told), "level", latest.level, flush=True)
        engine.close()
        yield row


def _enough(steps: list[dict[str, Any]], gib: float, seconds: float, scope: Scope) -> bool:
    """Return whether `ours` has run long enough at a limit, of which the first step does not count."""
    if len(steps) < 4:
        return False
    is_unknown = (gib == FIRST_GIB and _tried(steps) < 2) or len(_alike(steps)) < ALIKE
    return settled(steps) or seconds > (PATIENCE if is_unknown else 1) * scope.limit_s or time.time() > scope.until


def _tried(steps: list[dict[str, Any]]) -> int:
    """Return the number of pairs of micro-batch size and plan."""
    return len({(step["micro_batch"], step["level"]) for step in steps})


def settled(steps: list[dict[str, Any]]) -> bool:
    """Return whether the last `SETTLED` steps had one pair of micro-batch size and plan."""
    return len(steps) >= SETTLED and _tried(steps[-SETTLED:]) == 1


def _alike(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last steps in succession that ran in the same way, without those that changed something."""
    found: list[dict[str, Any]] = []
    for step in reversed(steps[1:]):
        alike = all(step[key] == steps[-1][key] for key in ("micro_batch", "level", "replayed"))
        if not alike or any(event.startswith(("grew", "shrunk", "plan")) for event in step["events"]):
            break
        found.insert(0, step)
    return found


PARTS: dict[str, Callable[[Scope], Iterator[dict[str, Any]]]] = {
    "freed": freed,
    **{f"{name}-{scale}": functools.partial(run, scale)
       for scale in "sxn" for name, run in (("ours", ours), ("stock", stock), ("all", all_layers))},
    "ours-m": functools.partial(ours, "m"),
}  # fmt: skip
SMALL: dict[str, Any] = {"steps": 2, "images": 4, "imgsz": 96, "freed": {"n": 4}}
SMALL_PARTS = ["freed", "ours-n", "stock-n", "all-n", "predicted"]
SMALL_LIMITS_GIB, SMALL_LIMIT_S = (2,), 0.5


def main() -> int:
    """Run the parts, each in a process of its own, which writes each row at once."""
    parts = [*PARTS, "predicted"]
    parser = report.parser(__doc__, parts=parts, small="4 images of 96 pixels, scale N and one limit")
    parser.set_defaults(only=None)
    parser.add_argument("--limits", nargs="+", type=int, help="GiB: measure at these, keep the other rows")
    parser.add_argument("--missing", action="store_true", help="measure only limits without a row of this commit")
    parser.add_argument("--limit-seconds", type=float, default=20.0, help="most seconds of `ours` at a limit")
    parser.add_argument("--seconds", type=float, default=math.inf, help="seconds for all parts")
    options = parser.parse_args()
    only = options.only or (SMALL_PARTS if options.small else [part for part in parts if not part.endswith("-n")])
    size = SMALL if options.small else {}
    end, failed = time.time() + options.seconds, 0
    for index, part in enumerate(only):
        result = report.Report(options.out, options.device, keep=True)
        if part == "predicted":
            result.add(part, predicted(result, Scope(device=options.device, **size)))
            continue
        rows = result.get(part, [])
        limits = options.limits or (PEAKS_GIB if part == "ours-m" else SMALL_LIMITS_GIB if size else LIMITS_GIB)
        if options.missing:
            limits = missing(rows, limits, result["commit"])
        result.add(part, rows)
        started = time.time()
        until = started + (end - started) / (len(only) - index)
        limit_s = min(options.limit_seconds, SMALL_LIMIT_S) if size else options.limit_seconds
        work = {"part": part, "out": str(options.out.absolute()), "limits": limits, "limit_s": limit_s, "size": size}
        work |= {"until": until if math.isfinite(until) else 1e12, "device": options.device}
        variables = EXPANDABLE if options.device == "cuda" else ONE_THREAD
        failed |= Call("checkpointing:run", stock=part.startswith("stock"), variables=variables, **work).wait()
        print(f"{part}: {time.time() - started:.0f} s", flush=True)
    return failed


def missing(rows: list[dict[str, Any]], limits: Sequence[int], commit: str | None) -> list[int]:
    """Return the limits of which a part has no row of a commit.

    Args:
        rows: Rows of the part.
        limits: All its limits in GiB.
        commit: The commit.
    """
    found = {row.get("limit_gib") for row in rows if row.get("commit") == commit}
    return [gib for gib in limits if gib not in found]


def run(
    part: str, out: str, limits: list[float], limit_s: float, until: float, size: dict[str, Any], device: str
) -> None:
    """Measure a part in this process, and write each row at once.

    Args:
        part: Key of `PARTS`.
        out: JSON file that has the head of the result.
        limits: Limits in GiB.
        limit_s: Most seconds of `ours` at a limit.
        until: Time after which no limit is begun.
        size: Fields of `Scope` that differ.
        device: `cuda` or `cpu`.
    """
    result = json.loads(Path(out).read_text())
    rows = [] if part == "freed" else result.get(part, [])
    for row in PARTS[part](Scope(tuple(limits), limit_s, until, device=device, **size)):
        if part != "freed":
            row |= {"commit": result["commit"], "device": result["device"]}
            rows = [other for other in rows if other["limit_gib"] != row["limit_gib"]]
        rows = sorted([*rows, row], key=lambda row: row.get("limit_gib", 0))
        report.write(Path(out), {**result, part: rows})


if __name__ == "__main__":
    sys.exit(main())
