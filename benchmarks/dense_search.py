"""Compares Ultralytics at its largest stable batch, rivals and ours on label-dense data in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import report
from benchmarks.dense_runs import Clock, Training, check_reason, is_stable, told
from benchmarks.dense_trainings import BATCH, OURS
from yolov12.mas.memory.cgroups import usable_cores

ROWS = ("stock", "ours", "autobatch", "halving", "all")
TRY_EPOCHS = 2
"""Epochs of a try, in which an image with hundreds of boxes is part of eight mosaics on average."""
MOST_AT_ONCE = 4
STEP = {"stock": 8, "all": 16}
"""Difference of the batches that are tried; `all` recomputes all layers."""
IMAGES_PER_GIB = {"stock": 2, "all": 4}
"""Number of images for each GiB at which the search begins; it goes on upwards or downwards from there."""
TINY: Mapping[str, Any] = {
    "batch": 8,
    "refuse_above": 4,
    "start": {"stock": 4, "all": 4},
    "step": {"stock": 2, "all": 2},
}
"""The comparison on a CPU, where a batch of more than 4 images fails in Ultralytics' trainings as if memory were short,
and `mem_limit` is the memory of the card."""


@dataclass
class Comparison:
    """All trainings that are compared: the same data, images, loader, and memory.

    A training runs alone when its time is measured. Short tries only look for failures, so they run together.
    """

    data: str
    images: int
    epochs: int
    memory: Mapping[str, int]
    """Arguments of `imitate`: `total_mib` and `usable_mib`."""
    arguments: Mapping[str, Any]
    """Arguments of all trainings, and `model`."""
    save: Callable[[dict[str, Any]], None]
    """Called with everything that was measured so far, after each training."""
    clock: Clock = field(default_factory=Clock)
    found: dict[str, Any] = field(default_factory=dict)
    """What an earlier command measured; it is not measured again."""
    batch: int = BATCH
    """Batch of ours, and the batch at which halving begins."""
    refuse_above: int = 0
    """Batch of Ultralytics above which memory is short, to try this on a CPU; 0 on a GPU."""
    start: Mapping[str, int] | None = None
    """Smallest batch of the first tries; None: by `IMAGES_PER_GIB`."""
    step: Mapping[str, int] = field(default_factory=lambda: STEP)

    def measure(self, row: str) -> None:
        """Measure a row, unless it is there.

        Args:
            row: One of `ROWS`.

        Raises:
            OutOfTimeError: The time is over. What was tried is saved.
            RuntimeError: A training that searches a batch failed for another reason than memory.
        """
        rows = self.found.setdefault("rows", {})
        if row in rows:
            return
        if row in STEP:
            run = self._at_largest_batch(row)
        else:
            run = self._whole(row, {"ours": self.batch, "autobatch": -1, "halving": self.batch}[row])
        if run is not None:
            rows[row] = {**run, "commit": report.commit()}
            self.save(self.found)

    def _at_largest_batch(self, who: str) -> dict[str, Any] | None:
        """Return the whole run at the largest stable batch; None if there is no stable batch.

        Several batches are tried together, until one held and the next larger one failed. Then whole runs go down from
        the largest batch that held its try, until one holds. So every larger batch that was tried has failed, on the
        same data.
        """
        attempts = self.found.setdefault("search", {}).setdefault(who, [])
        start = (self.start or {}).get(who, IMAGES_PER_GIB[who] * self.memory["usable_mib"] // 1024)
        while batches := next_tries(held_of(attempts), start, self.step[who], self._at_once()):
            attempts += self._try(who, batches)
            self.save(self.found)
        held = held_of(attempts)
        batch = max((batch for batch, is_held in held.items() if is_held), default=0)
        while batch > 0:
            if held.get(batch, True):
                run = self._whole(who, batch)
                check_reason(run)
                attempts.append({"batch": batch, "epochs": self.epochs, **_outcome(run)})
                if is_stable(run):
                    return run
                self.save(self.found)
            batch -= self.step[who]
        return None

    def _at_once(self) -> int:
        """Return how many tries fit on this card and on these cores."""
        import torch

        if self.refuse_above or not torch.cuda.is_available():
            return 2
        fit = int(0.9 * torch.cuda.mem_get_info()[1] / 2**20 / self.memory["total_mib"])
        return max(1, min(MOST_AT_ONCE, fit, usable_cores() // 4))

    def _try(self, who: str, batches: Iterable[int]) -> list[dict[str, Any]]:
        """Run short trainings together, each until memory is short for the first time."""
        epochs = min(TRY_EPOCHS, self.epochs)
        workers = min(self.arguments["workers"], max(usable_cores() // self._at_once() - 1, 0))
        runs = {batch: self._start(who, batch, epochs=epochs, workers=workers, until_failure=True) for batch in batches}
        try:
            found = {batch: run.result(self.clock) for batch, run in runs.items()}
        finally:
            for run in runs.values():
                run.call.process.kill()
        attempts = [{"batch": batch, "epochs": epochs, **_outcome(run)} for batch, run in found.items()]
        print(who, *attempts, sep="\n", flush=True)
        for run in found.values():
            check_reason(run)
        return attempts

    def _whole(self, row: str, batch: int) -> dict[str, Any]:
        """Run a whole training alone; at a batch that is searched for, until memory is short for the first time."""
        training = self._start(row, batch, until_failure=row in STEP)
        run = told(training.result(self.clock), self.images, self.epochs)
        hidden = ("memory_csv", "peaks_mib", "epoch_s", "epoch_end_s", "summary")
        print(row, batch, {key: value for key, value in run.items() if key not in hidden}, flush=True)
        return {"batch": batch, **run}

    def _start(self, row: str, batch: int, *, until_failure: bool = False, **arguments: Any) -> Training:
        is_ours = row == "ours"
        arguments = {**self.arguments, "data": self.data, "epochs": self.epochs, "batch": batch, **arguments}
        if is_ours:
            arguments |= {**OURS, "mem_limit": f"{self.memory['usable_mib']}MiB"}
        elif row == "all":
            arguments |= {**OURS, "mas": False}
        return Training(
            arguments,
            stock=row not in ("ours", "all"),
            memory=None if self.refuse_above else {**self.memory, "limited": not is_ours},
            until_failure=until_failure,
            recompute=row == "all",
            refuse_above=0 if is_ours else self.refuse_above,
        )


def held_of(attempts: Iterable[Mapping[str, Any]]) -> dict[int, bool]:
    """Return for each batch whether all of its attempts held."""
    held: dict[int, bool] = {}
    for attempt in attempts:
        held[attempt["batch"]] = held.get(attempt["batch"], True) and attempt["held"]
    return held


def next_tries(held: Mapping[int, bool], start: int, step: int, count: int) -> list[int]:
    """Return the batches to try next; none if a batch held and a larger one failed, or if no batch is left.

    Args:
        held: Batch → whether it held.
        start: Smallest of the first batches, if it is a multiple of `step`.
        step: Difference of neighbouring batches.
        count: Number of batches.
    """
    if not held:
        begin = max(start // step, 1) * step
    elif held[max(held)]:
        begin = max(held) + step
    elif not any(held.values()):
        begin = min(held) - count * step
    else:
        return []
    return [batch for batch in range(begin, begin + count * step, step) if batch > 0]


def _outcome(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether a run held, and why not."""
    found = {"held": is_stable(run), "failure": run["failure"], "warnings": run.get("warnings", [])}
    return {**found, "ended_after_s": run.get("epoch_end_s", [])[-1:]}


def over(found: Mapping[str, Any], row: str = "ours", other: str = "stock") -> dict[str, float]:
    """Return speeds and deviations of a row over those of another, where both have them.

    Args:
        found: Content of a comparison.
        row: One of `ROWS`.
        other: Another one.
    """
    rows = found.get("rows", {})
    keys = ("images_per_s_all", "images_per_s_after_first", "peak_sd_mib", "peak_sd_all_mib")
    a, b = rows.get(row, {}), rows.get(other, {})
    return {key: a[key] / b[key] for key in keys if a.get(key) and b.get(key)}
