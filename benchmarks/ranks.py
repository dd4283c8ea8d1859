"""Several ranks that share batches: shares under memory pressure, gradients against one process, speed, and costs.

    python -m benchmarks ranks --out benchmarks/results/ranks.json      (about 20 minutes on four H200s)
    python -m benchmarks ranks --out part.json --only gradient speed
    python -m benchmarks ranks --out part.json --device cpu --small     (a trial without GPUs, over gloo)

gradient     gradient of unequal shares, one process per card, against one process
shared_card  two ranks on one card with different limits, while a third process takes the free memory for a while
squeeze      a rank per card over NCCL, 256 images per card; the second card has little memory and injected failures
death        time until the other ranks end after one was killed
speed        whole trainings against stock Ultralytics' DistributedDataParallel; images are in memory, and augmented as
             Ultralytics does by default, mosaic included; with `--still`, they are not, so that loading does not count
checksum     times of the comparison of weights (by checksums) and of the exchange of reports after a step

A part that needs more cards is skipped. The exit status is 1 if a check or a part failed.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.common.processes import ROOT
from benchmarks.drawings import boards, noise
from benchmarks.ranks_pressure import BATCH, MIB_IN_GIB, STILL, Pressure, Setup, journal_steps, pressed_run
from benchmarks.ranks_processes import Processes
from benchmarks.ranks_work import GROUP


def gradient(setup: Setup, _: dict[str, Any]) -> dict[str, Any]:
    """Compare the gradient on two cards (shares 3:5) or four (shares 1:2:2:3) with that of one process."""
    ranks = 2 if setup.device == "cpu" else min(setup.gpus, 4) // 2 * 2
    if ranks < 2:
        return {"skipped": "one GPU"}
    shares = [8 * GROUP * parts // 8 for parts in ([3, 5] if ranks == 2 else [1, 2, 2, 3])]
    size = {"model": setup.sized("yolov12s.yaml", "yolov12n.yaml"), "imgsz": setup.sized(640, 64)}
    found = Processes("rank_gradient", {**size, "device": setup.device, "shares": shares}, ranks, 200).finish()
    if "failed" in found:
        return {**found, "faults": ["it did not complete"]}
    result: dict[str, Any] = {"ranks": ranks, "shares": shares, "images": sum(shares), **size}
    faults = []
    for name, most in (("fp32", 1e-3), ("half", 0.3)):  # limits of the relative difference
        each = [told[name] for told in found["told"]]
        alike = all(len({told[what] for told in each}) == 1 for what in ("gradient_crc", "checksum"))
        row = {key: value for key, value in each[0].items() if key not in ("gradient_crc", "checksum")}
        result[name] = {**row, "replicas_alike": alike}
        floor = max(row["one_twice"], row["one_cut_otherwise"])
        if not (alike and row["finite"] and row["ranks_against_one"] <= max(3 * floor, 1e-6) < most):
            faults.append(f"{name}: {result[name]}")
    return {**result, "faults": faults}


def shared_card(setup: Setup, _: dict[str, Any]) -> dict[str, Any]:
    """Run two ranks on card 0 over gloo, under pressure."""
    steps, batch = setup.sized(500, 40), setup.sized(BATCH, 16)
    images = 10 * batch
    arguments = setup.arguments(noise(images), images, steps, batch)
    arguments["device"] = 0 if setup.device == "cuda" else "cpu"
    work = {"arguments": arguments, "of_rank": [{"mem_limit": "40GiB"}, {"mem_limit": "16GiB"}]}
    begin, end = setup.sized((40, 340), (10, 25))
    return pressed_run(work, 2, Pressure(0, (0, 1), 3 * MIB_IN_GIB, begin, end), setup, steps, 270)


def squeeze(setup: Setup, _: dict[str, Any]) -> dict[str, Any]:
    """Run a rank per card; the second is under pressure and has failing allocations."""
    ranks = min(setup.gpus, 4) if setup.device == "cuda" else 2
    if ranks < 2:
        return {"skipped": "one GPU"}
    steps, batch, sets = setup.sized((200, 256 * ranks, 8 * ranks), (40, 16, 2))
    images = 128 * sets
    arguments = setup.arguments(boards(sets, setup.sized(640, 256)), images, steps, batch)
    arguments["device"] = ",".join(map(str, range(ranks))) if setup.device == "cuda" else "cpu"
    failing = sorted(random.Random(7).sample(range(8, steps - 10), 5))
    work = {"arguments": arguments, "failing_rank": 1, "failing_steps": failing}
    begin, end = setup.sized((30, 90), (10, 25))
    return pressed_run(work, ranks, Pressure(1, (1,), 4 * MIB_IN_GIB, begin, end), setup, steps, 360)


def death(setup: Setup, _: dict[str, Any]) -> dict[str, Any]:
    """Run a rank per card and kill the last: how soon do the others end, and do they name it?"""
    ranks = min(setup.gpus, 4) if setup.device == "cuda" else 2
    if ranks < 2:
        return {"skipped": "one GPU"}
    batch, project = setup.sized(BATCH, 8) * ranks, Path(tempfile.mkdtemp())
    arguments = setup.arguments(noise(4 * batch), 4 * batch, 1000, batch) | {"project": str(project), "name": "run"}
    arguments["device"] = ",".join(map(str, range(ranks))) if setup.device == "cuda" else "cpu"
    run, victim = Processes("train", {"arguments": arguments}, ranks, 200), ranks - 1
    while run.running() and journal_steps(project / "run", ranks) < 15:
        time.sleep(0.2)
    steps, killed_s = journal_steps(project / "run", ranks), time.monotonic()
    run.kill(victim)
    while run.any_runs():
        time.sleep(0.1)
    ended_s = time.monotonic() - killed_s
    found = run.finish()
    statuses, logs = found["failed"]["exit_statuses"][:victim], found["log_tails"][:victim]
    faults = [f"it had made {steps} steps"] if steps < 15 else []
    faults += [f"the others took {ended_s:.0f} s to end"] if ended_s > 60 else []
    faults += [f"exit statuses are {statuses}"] if set(statuses) != {1} else []
    told = [next((line for line in log.splitlines() if f"rank {victim} (" in line), "") for log in logs]
    faults += ["its name was not told"] if not all(told) else []
    return {
        "ranks": ranks,
        "steps": steps,
        "ended_s": ended_s,
        "exit_statuses": statuses,
        "told": told,
        "faults": faults,
    }


def speed(setup: Setup, _: dict[str, Any]) -> dict[str, Any]:
    """Train with this package and with stock on 1, 2 and 4 cards, one training after the other."""
    images, each = setup.sized((3072, BATCH), (64, 8))
    arguments = {**setup.arguments(noise(images), images, 1, each), "workers": setup.sized(8, 0)}
    arguments["model"] = setup.sized("yolo12s.yaml", "yolo12n.yaml")
    if not setup.still:
        arguments = {key: value for key, value in arguments.items() if key not in STILL}
    rows, faults = [], []
    for gpus in (1, 2, 4):
        if gpus > (setup.gpus if setup.device == "cuda" else 2):
            break
        arguments["epochs"] = setup.sized(2 + 2 * gpus, 3)  # the first two epochs are not measured
        for who in ("ours", "stock") if gpus == 1 or setup.device == "cuda" else ("ours",):
            row = _timed(who, gpus, {**arguments, "batch": each * gpus, "nbs": each * gpus}, images, setup)
            rows.append(row)
            print(json.dumps(row)[:4000], flush=True)
            if "failed" in row:
                faults.append(f"{who} on {gpus}: it did not complete")
    found = {(row["who"], row["gpus"]): row["images_per_s"] for row in rows if "images_per_s" in row}
    one = {who: found.get((who, 1)) for who in ("ours", "stock")}
    return {
        "arguments": {key: value for key, value in arguments.items() if key not in ("data", "batch", "nbs", "epochs")},
        "images": images,
        "is_augmented": not setup.still,
        "rows": rows,
        "scaling": {f"{who} {gpus}": rate / one[who] for (who, gpus), rate in found.items() if one[who]},
        "ours_over_stock": {
            str(gpus): rate / found["stock", gpus]
            for (who, gpus), rate in found.items()
            if who == "ours" and ("stock", gpus) in found
        },
        "faults": faults,
    }


def _timed(who: str, gpus: int, arguments: dict[str, Any], images: int, setup: Setup) -> dict[str, Any]:
    """Run one training; return rates of the median epoch and the median step, without the first two epochs."""
    project = Path(tempfile.mkdtemp())
    arguments = {**arguments, "project": str(project), "name": "run"}
    arguments["device"] = ",".join(map(str, range(gpus))) if setup.device == "cuda" else "cpu"
    if who == "stock":
        del arguments["recipe"]
    ranks = gpus if setup.device == "cpu" and gpus > 1 else 0  # 0: Ultralytics starts the ranks
    began_s = time.monotonic()
    clock = project / "clock.json"
    work = {"arguments": arguments, "clock": str(clock)}
    found = Processes("train", work, ranks, 150, stock=who == "stock").finish()
    row = {"who": who, "gpus": gpus, "batch": arguments["batch"], "seconds": round(time.monotonic() - began_s, 1)}
    if "failed" in found:
        return {**row, **found}
    epochs = json.loads(clock.read_text())
    late = epochs[2:]
    steps_s = [after - before for epoch in late for before, after in itertools.pairwise(epoch[1:-1])]
    told = {
        **row,
        "ran_at": found["told"][0]["ran_at"],
        "epoch_s": [epoch[-1] - epoch[0] for epoch in epochs],
        "first_batch_s": statistics.median(epoch[1] - epoch[0] for epoch in late),
        "images_per_s": images / statistics.median(epoch[-1] - epoch[0] for epoch in late),
        "step_ms": 1000 * statistics.median(steps_s),
        "images_per_s_by_steps": arguments["batch"] / statistics.median(steps_s),
    }
    if who == "ours":
        summary = json.loads((project / "run" / "memory.json").read_text())
        names = ("updates", "out_of_memories", "micro_batch_min", "micro_batch_median", "peak_max_mib", "images_per_s")
        told["journal"] = {name: summary.get(name) for name in names}
        told["journal"]["shares"] = [[rank["share_min"], rank["share_max"]] for rank in summary.get("ranks", ())]
    return told


def checksum(setup: Setup, result: dict[str, Any]) -> dict[str, Any]:
    """Measure checksums and agreements, relative to a step of `speed` on one card, else of `shared_card`."""
    models = setup.sized(["yolov12s.yaml", "yolov12x.yaml"], ["yolov12n.yaml", "yolov12s.yaml"])
    compared = Processes("checksums", {"models": models, "device": setup.device}, 0, 100).finish()
    agreed = Processes("rank_agree", {"calls": 200}, 2, 60).finish()
    if "failed" in compared or "failed" in agreed:
        return {"checksum": compared, "agree": agreed, "faults": ["it did not complete"]}
    step_ms = None
    for row in result.get("speed", {}).get("rows", ()):
        if (row["who"], row["gpus"]) == ("ours", 1) and "step_ms" in row:
            step_ms = row["step_ms"]
    if step_ms is None and (phase := result.get("shared_card", {}).get("phases", {}).get("before")):
        step_ms = max(ms for ms in phase["median_step_ms"] if ms is not None)
    told, agree = compared["told"][0], agreed["told"][0]
    return {
        "checksum_ms": told,
        "step_ms": step_ms,
        "percent_of_100_steps": step_ms and {name: ms / step_ms for name, ms in told.items()},
        "agree": agree,
        "agree_percent_of_a_step": step_ms and 100 * agree["median_ms"] / step_ms,
        "faults": [],
    }


PARTS: dict[str, Callable[[Setup, dict[str, Any]], dict[str, Any]]] = {
    "gradient": gradient,
    "shared_card": shared_card,
    "squeeze": squeeze,
    "death": death,
    "speed": speed,
    "checksum": checksum,
}


def main() -> int:
    """Run the parts, and write the results of each to the file at once."""
    parser = report.parser(__doc__, parts=PARTS, small="small sizes")
    parser.add_argument("--still", action="store_true", help="speed: images are not augmented")
    options = parser.parse_args()
    import torch

    gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    setup = Setup(options.device, options.small, gpus, options.still)
    result = report.Report(options.out, options.device, keep=True)
    faults = []
    for part in options.only:
        began_s = time.monotonic()
        try:
            found = PARTS[part](setup, result)
        except Exception:
            found = {"failed": traceback.format_exc()[-1500:].replace(f"{ROOT}/", ""), "faults": ["it failed"]}
        if "skipped" in found:
            print(f"{part}: skipped, {found['skipped']}", flush=True)
            continue
        faults += [f"{part}: {fault}" for fault in found["faults"]]
        result.add(part, found, seconds=round(time.monotonic() - began_s))
        shown = {key: value for key, value in found.items() if key not in ("rows", "events", "summary", "arguments")}
        print(f"{part}: {json.dumps(shown)[:4000]}", flush=True)
    print("\n".join(faults) or "all held", flush=True)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
