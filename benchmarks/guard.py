"""Regression guard: parts of other benchmarks, as ratios of ours and stock, beside the committed ratios.

    python -m benchmarks guard --out guard.json                        (four to five minutes on one GPU)
    python -m benchmarks guard --out guard.json --device cpu           (about two minutes on two cores)
    python -m benchmarks guard --out guard.json --update               (commit benchmarks/results/guard.json after it)
    python -m benchmarks guard --out after.json --reference before.json

`scripts/bench.sh` runs it. Ours and stock take turns in every part. The exit status is 1 if a ratio is worse than the
committed one by more than its tolerance (see guard_ratios.py), or if a part failed. On another device, or with another
PyTorch, than the committed ones, only portable ratios are compared. If there are none, nothing fails.

step        images/s of a step without data and optimizer, memory of an image, kernels and their time: see step.py
limit       images/s within 12 GiB, and the predicted peak of the worst step: see checkpointing.py; needs a GPU
imports     CPU time and modules of `from ultralytics import YOLO`: see imports.py
loader      CPU time of the training loader: see loader.py
controller  images/s of the simulated controller, as a fraction of the oracle's: see controller/
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.processes import EXPANDABLE, GIB, ROOT, Call
from benchmarks.common.rounds import in_turn
from benchmarks.guard_ratios import VERDICTS, Comparison, Ratio, compare, reference_for, table

COMMITTED = ROOT / "benchmarks" / "results" / "guard.json"
ROUNDS, SECONDS = 5, 300.0
LIMIT_GIB = 12
MOST_AT_ONCE = (128, 64, 32, 16, 8)
COMMON_AT_ONCE = 16
"""Micro-batch that every card from 16 GB on can run, so that its ratios are portable."""
BYTES_PER_IMAGE, FIXED_BYTES = 6e8, 3e9
"""Memory of stock and of ours together, a little more than measured: for an image of 640 pixels, and for the rest."""
Found = Iterator[tuple[str, Ratio]]


def step(device: str, rounds: int) -> Found:
    """Yield the ratios of a step: of a GPU with the largest micro-batch that fits twice, and of a common one."""
    from benchmarks.step import Variant

    settings: dict[str, Any] = {"cfg": "yolo12n.yaml", "images": 16, "size": 64}
    at_once = small = 2
    if device == "cuda":
        at_once = _most_at_once()
        small = min(COMMON_AT_ONCE, at_once)
        settings = {"cfg": "yolo12s.yaml", "images": 2 * at_once, "size": 640}
    variants = {name: Variant(name, ROOT, device=device, **settings) for name in ("stock", "now")}

    def answers(rounds: int, warm_up: int = 0, **request: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        runs = {name: functools.partial(variant.ask, **request) for name, variant in variants.items()}
        found = in_turn(runs, rounds, warm_up=warm_up)
        return list(zip(found["stock"], found["now"], strict=True))

    pairs = answers(rounds, 1, micro_batch=at_once, steps=5)
    # The least time of a round, as other work on the machine makes single steps long.
    times = [min(stock["ms"]) / min(ours["ms"]) for stock, ours in pairs]
    yield f"images/s of a step, {at_once} at once", Ratio(times, 0.03)
    if device == "cuda":
        for micro_batch in sorted({at_once, small}):
            pairs = answers(1, 1, micro_batch=micro_batch, steps=1)
            peaks = [stock["mb_per_image"] / ours["mb_per_image"] for stock, ours in pairs]
            is_common = micro_batch == COMMON_AT_ONCE
            yield f"memory of an image at the peak, {micro_batch} at once", Ratio(peaks, 0.02, is_common)
    pairs = answers(min(rounds, 2), micro_batch=small, profile=True)
    counts = [stock["launches"] / ours["launches"] for stock, ours in pairs]
    if device == "cuda":
        yield f"kernels of a step, {small} at once", Ratio(counts, 0.02)
        times = [stock["busy_ms"] / ours["busy_ms"] for stock, ours in pairs]
        yield f"GPU time of a step, {small} at once", Ratio(times, 0.03)
    else:
        yield f"operations of a step, {small} at once", Ratio(counts, 0.01)
    for variant in variants.values():
        variant.end()


def _most_at_once() -> int:
    import torch

    free_bytes = torch.cuda.mem_get_info()[0]
    for images in MOST_AT_ONCE:
        if images * BYTES_PER_IMAGE + FIXED_BYTES <= free_bytes:
            return images
    raise SystemExit(f"the GPU has {free_bytes / GIB:.1f} GiB free, and the step of both variants needs 8 GiB")


def limit(device: str, rounds: int) -> Found:
    """Yield the ratios of training steps within a limit: stock with the largest batch that fits, before and after."""
    assert device == "cuda"

    def row(name: str) -> dict[str, Any]:
        call = Call("guard:limited", name=name, stock=name == "stock", variables=EXPANDABLE)
        found: dict[str, Any] = call.result()
        return found

    stock = [row("stock")]
    ours = row("ours")
    if rounds > 1:
        stock.append(row("stock"))
    speeds = [ours["images_per_s"] / each["images_per_s"] for each in stock]
    yield f"images/s within {LIMIT_GIB} GiB", Ratio(speeds, 0.1)
    pairs = [(each["predicted_mib"], each["peak_mib"]) for each in ours["steps"][3:]]
    yield "predicted peak, the worst step", Ratio([min(min(a / b, b / a) for a, b in pairs)], 0.02, is_portable=True)


def limited(name: str) -> Any:
    """Measure `ours` or `stock` within the limit in this process, and return the row of benchmarks/checkpointing.py."""
    from benchmarks import checkpointing

    return next(checkpointing.PARTS[f"{name}-s"](checkpointing.Scope(limits=(LIMIT_GIB,))))


def imports(device: str, rounds: int) -> Found:
    """Yield the ratios of the CPU times of an import, and of the modules that it loads."""
    from benchmarks.imports import VARIANTS, cpu_s, modules

    found = in_turn({name: functools.partial(cpu_s, name) for name in VARIANTS}, rounds, warm_up=1)
    ratios = [stock / ours for stock, ours in zip(found["stock"], found["ours"], strict=True)]
    yield "CPU time of the import", Ratio(ratios, 0.03, is_portable=True)
    loaded = {name: len(modules(name)) for name in VARIANTS}
    yield "modules of the import", Ratio([loaded["stock"] / loaded["ours"]], 0.003, is_portable=True)


def loader(device: str, rounds: int) -> Found:
    """Yield the ratios of the CPU times of the training loaders, from files and from memory."""
    import torch
    from ultralytics.data.utils import check_det_dataset

    from benchmarks.drawings import photographs
    from benchmarks.loader import CASES, in_turn
    from yolov12 import autopatch

    autopatch.apply()
    torch.set_num_threads(1)  # as in a worker
    imgsz, batches = (640, 8) if rounds > 1 else (64, 2)
    data = check_det_dataset(photographs(64, imgsz))
    for name in ("files", "ram"):
        ratios = [in_turn(data, batches, imgsz=imgsz, **CASES[name])["ratio"] for _ in range(rounds)]
        yield f"CPU time of the loader, {name}", Ratio(ratios, 0.05)


def controller(device: str, rounds: int) -> Found:
    """Yield the speed of the simulated controller as a fraction of the oracle's, the same on all machines."""
    from benchmarks.controller.tournament import compare, summed

    seeds, traces = (3, 16) if rounds > 1 else (1, 4)
    scores = [score for seed in range(seeds) for score in compare(seed, traces, 80, ("ours",))]
    yield "controller against an oracle", Ratio([summed(scores)["all"]["of_oracle"]], 0.005, is_portable=True)


PARTS: dict[str, Callable[[str, int], Found]] = {
    "step": step,
    "limit": limit,
    "imports": imports,
    "loader": loader,
    "controller": controller,
}
NEED_GPU = {"limit"}


def measure(part: str, device: str, rounds: int) -> dict[str, Any]:
    """Measure a part in this process, and return its ratios by name.

    Args:
        part: Key of `PARTS`.
        device: `cuda` or `cpu`.
        rounds: Number of rounds; one also means less work in a round.
    """
    found = {}
    for name, ratio in PARTS[part](device, rounds):
        found[name] = {**asdict(ratio), "rounds": [round(each, 4) for each in ratio.rounds]}
        print(f"{part}: {name}: {ratio.median:.3f}", flush=True)
    return found


def device_name(device: str) -> str:
    """Return the name under which ratios are committed: GPU or processor, and PyTorch's version."""
    import torch

    from yolov12.mas.memory.cgroups import usable_cores

    version = ".".join(torch.__version__.split(".")[:2])
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {version}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {usable_cores()} cores, torch {version}"


def main() -> int:
    """Measure the parts, compare their ratios, and return the exit status."""
    parser = report.parser(__doc__, parts=PARTS, small="one round of less work, compared with nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no part begins later (default: 300)")
    parser.add_argument("--reference", type=Path, default=COMMITTED, help="JSON file to compare with")
    parser.add_argument("--update", action="store_true", help="write the ratios into the reference, too")
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("guard: PyTorch finds no GPU; --device cpu measures the processor", file=sys.stderr)
        return 2
    device = device_name(options.device) + (", small" if options.small else "")
    has_reference = options.reference.exists() and not options.small
    committed = json.loads(options.reference.read_text()) if has_reference else {}
    found, missing = _measure_all(options, device)
    name, before = reference_for(committed, device, options.device == "cuda")
    comparisons = compare(before, {key: Ratio(**each) for key, each in found.items()})
    if options.update:
        is_whole = {*missing.values()} <= {"needs a GPU"}
        kept = {} if is_whole else committed.get(device, {})
        report.Report(options.reference, options.device, keep=True).add(device, {**kept, **found})
    print(table(comparisons))
    for line in remarks(device, name, committed, comparisons, missing):
        print(line)
    return int(any(each.is_worse for each in comparisons) or "failed" in missing.values())


def _measure_all(options: argparse.Namespace, device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the parts, each in a process of its own, and write the file after each.

    Returns:
        The ratios by name, and the parts without them by the reason: `failed`, or another.
    """
    missing = {part: "not asked for" for part in PARTS if part not in options.only}
    if options.device == "cpu":
        missing |= dict.fromkeys(NEED_GPU, "needs a GPU")
    result = report.Report(options.out, options.device, keep=set(options.only) != set(PARTS))
    found: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for part in [each for each in PARTS if each not in missing]:
            if time.monotonic() - began > options.seconds:
                missing[part] = f"{options.seconds:.0f} s were over"
                continue
            started = time.monotonic()
            call = {"part": part, "device": options.device, "rounds": 1 if options.small else ROUNDS}
            process = Call("guard:measure", variables={"TMPDIR": folder, "YOLO_OFFLINE": "1"}, **call)
            if process.wait():
                missing[part] = "failed"
                continue
            found |= process.result()
            result.add(device, {**result.get(device, {}), **found})
            print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)
    return found, missing


def remarks(
    device: str,
    name: str | None,
    committed: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    missing: Mapping[str, str],
) -> Iterator[str]:
    """Yield lines that tell what was compared with what, and what follows.

    Args:
        device: Name of this device.
        name: Name of the device whose ratios were compared; None if there is none.
        committed: Content of the committed file.
        comparisons: The ratios.
        missing: Part → reason why it was not measured.
    """
    yield from (f"{part}: not measured: {reason}" for part, reason in missing.items())
    count = {verdict: sum(each.verdict == verdict for each in comparisons) for verdict in VERDICTS}
    if name is None:
        yield f"No reference for {device}: this is what was measured. --update writes one to commit."
        return
    head = committed["measured_on"][name]
    told = f"{head['date']}, commit {head['commit']}"
    if name != device:
        told += f"; {device} has no reference, so only portable ratios are compared"
    yield f"Compared with {name} ({told}): {count['WORSE']} worse, {count['better']} better, {count['same']} the same."
    if count["WORSE"]:
        yield "Repeat it on an idle machine. If the loss is meant, --update commits it; the commit says why."
    elif count["better"]:
        yield "--update raises the reference, so that it cannot be lost again."


if __name__ == "__main__":
    sys.exit(main())
