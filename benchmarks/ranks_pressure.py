"""Trainings of several ranks from which this process takes memory, for benchmarks/ranks.py."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.size import Size
from benchmarks.ranks_processes import Processes
from benchmarks.ranks_work import GROUP

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
class Setup(Size):
    """Machine on which parts run, and their size."""

    gpus: int = 0
    """Number of GPUs."""
    still: bool = False
    """True if the images of `speed` are not augmented. Those of the other parts never are."""

    def arguments(self, data: str, images: int, steps: int, batch: int) -> dict[str, Any]:
        """Return arguments of a training on `images` images with at least `steps` steps."""
        small = {"model": "yolov12n.yaml", "imgsz": 64, "workers": 0, "amp": False}
        size = self.sized({"model": "yolov12s.yaml", "imgsz": 640, "workers": 3}, small)
        epochs = -(-steps * batch // images)
        return {**TRAIN, **size, "data": data, "batch": batch, "nbs": batch, "epochs": epochs, "recipe": False}


@dataclass(frozen=True)
class Pressure:
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


def journal_steps(folder: Path, ranks: int) -> int:
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


def _press(run: Processes, folder: Path, ranks: int, pressure: Pressure, setup: Setup) -> dict[str, Any]:
    import torch

    def step() -> int:
        return journal_steps(folder, ranks)

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


def pressed_run(
    work: dict[str, Any], ranks: int, pressure: Pressure, setup: Setup, steps: int, limit_s: float
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
