"""Several ranks that share batches: shares under memory pressure, gradients against one process, speed, and costs.

    python benchmarks/ranks.py --out benchmarks/results/ranks.json      (about 20 minutes on four H200s)
    python benchmarks/ranks.py --out part.json --only gradient speed
    python benchmarks/ranks.py --out part.json --device cpu --small     (a trial without GPUs, over gloo)

gradient     gradient of unequal shares, one process per card, against one process
shared_card  two ranks on one card with different limits, while a third process takes the free memory for a while
squeeze      a rank per card over NCCL, 256 images per card; the second card has little memory and injected failures
death        time until the other ranks end after one was killed
speed        whole trainings against stock Ultralytics' DistributedDataParallel; images are in memory and not augmented,
             so that loading does not count
checksum     times of the comparison of weights (by checksums) and of the exchange of reports after a step

A part that needs more cards is skipped. The exit status is 1 if a check or a part failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawings import boards, noise
from ranks_processes import ROOT, Processes
from ranks_work import GROUP

MIB_IN_GIB = 1024
STILL = ("mosaic", "copy_paste", "hsv_h", "hsv_s", "hsv_v", "fliplr", "translate", "scale", "erasing")
TRAIN: dict[str, Any] = {
    **dict.fromkeys(STILL, 0.0),
    "cache": "ram",
    "plots": False,
    "val": False,
    "save": False,
    "optimizer": "SGD",
    "lr0": 1e-3,
}
FLOOR_MIB = 4 * MIB_IN_GIB
"""Least budget of a rank under pressure in MiB, as a BatchNorm group of 8 images has to fit."""
BATCH = 128
"""Number of images in a batch; in `speed`, for each card."""


@dataclass(frozen=True)
class Setup:
    """Machine on which parts run, and their size."""

    device: str
    """`cuda` or `cpu`."""
    small: bool
    """True for a trial with small sizes."""
    gpus: int
    """Number of GPUs."""

    def sized(self, full: Any, small: Any) -> Any:
        """Return the full size, or the small one in a trial."""
        return small if self.small else full

    def arguments(self, data: str, images: int, steps: int, batch: int) -> dict[str, Any]:
        """Return arguments of a training on `images` images with at least `steps` steps."""
        small = {"model": "yolov12n.yaml", "imgsz": 64, "workers": 0, "amp": False}
        size = self.sized({"model": "yolov12s.yaml", "imgsz": 640, "workers": 3}, small)
        epochs = -(-steps * batch // images)
        return {**TRAIN, **size, "data": data, "batch": batch, "nbs": batch, "epochs": epochs, "recipe": False}


def gradient(setup: Setup, _: dict[str, Any]) -> dict[str, Any]:
    """Compare the gradient on two cards (shares 3:5) or four (shares 1:2:2:3) with that of one process."""
    ranks = 2 if setup.device == "cpu" else min(setup.gpus, 4) // 2 * 2
    if ranks < 2:
        return {"skipped": "one GPU"}
    shares = [8 * GROUP * parts // 8 for parts in ([3, 5] if ranks == 2 else [1, 2, 2, 3])]
    size = {"model": setup.sized("yolov12s.yaml", "yolov12n.yaml"), "imgsz": setup.sized(640, 64)}
    found = Processes("gradient", {**size, "device": setup.device, "shares": shares}, ranks, 200).finish()
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


@dataclass(frozen=True)
class _Pressure:
    """Memory that this process takes from a run, for at most two minutes.

    From step `begin` to step `end` it takes memory, also memory that ranks release. It leaves `leave_mib` free on the
    card. It leaves more if the budget of a rank would otherwise fall below `FLOOR_MIB`.
    """

    card: int
    ranks: tuple[int, ...]
    leave_mib: float
    begin: int
    end: int


def _rows(folder: Path) -> list[list[dict[str, str]]]:
    """Return the rows of every rank's journal that are written so far."""
    from yolov12.mas.journal.journal import read_ranks

    return list(read_ranks(folder).values()) if (folder / "memory.csv").exists() else []


def _steps(folder: Path, ranks: int) -> int:
    """Return the number of steps that all ranks have written to their journals."""
    journals = _rows(folder)
    return min(map(len, journals)) if len(journals) == ranks else 0


def _two_writes(run: Processes, step: Callable[[], int]) -> None:
    """Wait until the journals have got new rows twice. Rows reach them about once a second."""
    began_s = time.monotonic()
    for _ in range(2):
        seen = step()
        while run.running() and step() <= seen and time.monotonic() - began_s < 20:
            time.sleep(0.1)


def _press(run: Processes, folder: Path, ranks: int, pressure: _Pressure, setup: Setup) -> dict[str, Any]:
    import torch

    def step() -> int:
        return _steps(folder, ranks)

    while run.running() and step() < pressure.begin:
        time.sleep(0.2)
    begun, began_s = step(), time.monotonic()
    held: list[Any] = []
    taken: list[str] = []
    first_mib = min((float(_rows(folder)[rank][-1]["budget_mib"]) for rank in pressure.ranks if begun), default=0.0)
    device = torch.device(setup.device, pressure.card) if setup.device == "cuda" else torch.device("cpu")
    while run.running() and step() < pressure.end and time.monotonic() - began_s < 120:
        budget_mib = min(float(_rows(folder)[rank][-1]["budget_mib"]) for rank in pressure.ranks)
        free_mib = 0.0 if held else pressure.leave_mib + 64  # on a host, take a little
        if device.type == "cuda":
            free_mib = torch.cuda.mem_get_info(device)[0] / 2**20
        over_mib = int(min(free_mib - pressure.leave_mib, budget_mib - FLOOR_MIB if device.type == "cuda" else 64))
        if len(pressure.ranks) == 1 and device.type == "cuda":  # all that is taken lowers this rank's budget
            held_mib = sum(block.numel() for block in held) / 2**20
            over_mib = min(over_mib, int(first_mib - FLOOR_MIB - held_mib))
        if over_mib >= 64:
            with suppress(torch.cuda.OutOfMemoryError):  # a rank has allocated it
                held.append(torch.empty(over_mib * 2**20, dtype=torch.uint8, device=device))
                taken.append(f"step {step()}: {over_mib} of {free_mib:.0f} free, least budget {budget_mib:.0f}")
        _two_writes(run, step)  # steps that had begun do not show what was taken
    ended = step()
    held_mib = sum(block.numel() for block in held) / 2**20
    held.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"from_step": begun, "to_step": ended, "held_mib": held_mib, "taken_mib": taken}


def _pressed_run(
    work: dict[str, Any], ranks: int, pressure: _Pressure, setup: Setup, steps: int, limit_s: float
) -> dict[str, Any]:
    """Run a training under memory pressure; return its journals, phases and faults."""
    project = Path(tempfile.mkdtemp())
    folder = project / "run"
    work["arguments"] |= {"project": str(project), "name": "run", "bn_group": setup.sized(GROUP, 2)}
    batch, began_s = work["arguments"]["batch"], time.monotonic()
    run = Processes("train", work, ranks, limit_s)
    pressed: dict[str, Any] = {}
    try:
        pressed = _press(run, folder, ranks, pressure, setup)
    finally:  # processes must not outlive this function
        found = run.finish()
    result: dict[str, Any] = {"batch": batch, "seconds": round(time.monotonic() - began_s, 1), "pressure": pressed}
    if "failed" in found:
        result |= found
    else:
        result |= {"injected": [line for told in found["told"] for line in told["injected"]]}
    if not (folder / "memory.csv").exists():
        return {**result, "faults": ["there is no journal"]}
    journals = [{int(row["step"]): row for row in rows} for rows in _rows(folder)]
    whole = sorted(set.intersection(*map(set, journals)))
    wrong = [step for step in whole if sum(int(rows[step]["images"]) for rows in journals) != batch]
    summary = json.loads((folder / "memory.json").read_text()) if (folder / "memory.json").exists() else {}
    complete = "failed" not in found and len(journals) == ranks and len(whole) >= steps
    complete = complete and summary.get("updates") == summary.get("updates_expected") == len(whole)
    faults = [f"step {step}: shares do not sum to {batch}" for step in wrong]
    faults += [] if complete else ["it did not complete"]
    moved = len({tuple(rows[step]["images"] for rows in journals) for step in whole}) > 1
    faults += [] if moved or setup.small else ["shares did not move"]
    lost = summary.get("images_lost")
    faults += [f"{lost} images lost"] if lost else []
    missed = len(work.get("failing_steps", ())) - len(result.get("injected", ()))
    faults += [f"{missed} failures were not injected"] if missed and "failed" not in found else []
    return {
        **result,
        "steps": len(whole),
        "complete": complete,
        "sums_exact": not wrong,
        "summary": summary,
        "phases": _phases(journals, whole, pressed) if whole else {},
        "events": [
            [f"{step}: {row['events']}" for step, row in sorted(rows.items()) if row["events"]] for rows in journals
        ],
        "columns": f"{' | '.join(('step', *_SHOWN))}; each of all ranks",
        "rows": [
            " | ".join((str(step), *(", ".join(rows[step][name] for rows in journals) for name in _SHOWN)))
            for step in whole
        ],
        "faults": faults,
    }


_SHOWN = ("images", "micro_batches", "plan", "image_size", "budget_mib", "peak_mib", "step_ms")


def _phases(journals: list[dict[int, dict[str, str]]], steps: list[int], pressed: dict[str, Any]) -> dict[str, Any]:
    """Return statistics before, during and after the pressure, for the second half of each, when shares are settled."""
    marks = (0, pressed.get("from_step", steps[-1]), pressed.get("to_step", steps[-1]), steps[-1])
    found = {}
    for name, begin, end in zip(("before", "during", "after"), marks, marks[1:], strict=False):
        late = [step for step in steps if (begin + end) / 2 < step <= end]
        if not late:
            continue
        ms = [[float(rows[step]["step_ms"]) for step in late if rows[step]["step_ms"]] for rows in journals]
        budgets = [[float(rows[step]["budget_mib"]) for step in late] for rows in journals]
        found[name] = {
            "steps": [late[0], late[-1]],
            "mean_shares": [statistics.mean(int(rows[step]["images"]) for step in late) for rows in journals],
            "least_budgets_mib": [min(each) for each in budgets],
            "median_budgets_mib": [statistics.median(each) for each in budgets],
            "median_step_ms": [statistics.median(each) if each else None for each in ms],
        }
    return found


def shared_card(setup: Setup, _: dict[str, Any]) -> dict[str, Any]:
    """Run two ranks on card 0 over gloo, under pressure."""
    steps, batch = setup.sized(500, 40), setup.sized(BATCH, 16)
    images = 10 * batch
    arguments = setup.arguments(noise(images), images, steps, batch)
    arguments["device"] = 0 if setup.device == "cuda" else "cpu"
    work = {"arguments": arguments, "of_rank": [{"mem_limit": "40GiB"}, {"mem_limit": "16GiB"}]}
    begin, end = setup.sized((40, 340), (10, 25))
    return _pressed_run(work, 2, _Pressure(0, (0, 1), 3 * MIB_IN_GIB, begin, end), setup, steps, 270)


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
    return _pressed_run(work, ranks, _Pressure(1, (1,), 4 * MIB_IN_GIB, begin, end), setup, steps, 360)


def death(setup: Setup, _: dict[str, Any]) -> dict[str, Any]:
    """Run a rank per card and kill the last: how soon do the others end, and do they name it?"""
    ranks = min(setup.gpus, 4) if setup.device == "cuda" else 2
    if ranks < 2:
        return {"skipped": "one GPU"}
    batch, project = setup.sized(BATCH, 8) * ranks, Path(tempfile.mkdtemp())
    arguments = setup.arguments(noise(4 * batch), 4 * batch, 1000, batch) | {"project": str(project), "name": "run"}
    arguments["device"] = ",".join(map(str, range(ranks))) if setup.device == "cuda" else "cpu"
    run, victim = Processes("train", {"arguments": arguments}, ranks, 200), ranks - 1
    while run.running() and _steps(project / "run", ranks) < 15:
        time.sleep(0.2)
    steps, killed_s = _steps(project / "run", ranks), time.monotonic()
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
    began_s, patch = time.monotonic(), "0" if who == "stock" else "1"
    clock = project / "clock.json"
    work = {"arguments": arguments, "clock": str(clock)}
    found = Processes("train", work, ranks, 150, YOLOV12_AUTOPATCH=patch).finish()
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
    agreed = Processes("agree", {"calls": 200}, 2, 60).finish()
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    import torch
    import ultralytics

    gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    setup = Setup(options.device, options.small, gpus)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"measured_on": {}}
    result["command"] = "python benchmarks/ranks.py --out ranks.json"
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
        result[part] = found
        result["measured_on"][part] = {
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if gpus else f"{os.cpu_count()} CPU cores",
            "gpus": gpus,
            "torch": torch.__version__,
            "ultralytics": ultralytics.__version__,
            "seconds": round(time.monotonic() - began_s),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        shown = {key: value for key, value in found.items() if key not in ("rows", "events", "summary", "arguments")}
        print(f"{part}: {json.dumps(shown)[:4000]}", flush=True)
    print("\n".join(faults) or "all held", flush=True)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
