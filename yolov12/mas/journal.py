"""What the engine did: a row in memory.csv for every optimizer step, and at the end memory.json and memory.png.

The file is the only record. The summary and the picture are made from it, so after a resume they cover the whole run.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, median_low

from yolov12.mas import picture

__all__ = ["COLUMNS", "RESUMED", "Journal", "Row", "Summary", "read_rows"]

COLUMNS = (
    *("step", "epoch", "images", "micro_batches", "plan", "image_size", "max_boxes"),
    *("predicted_mib", "peak_mib", "held_mib", "free_mib", "budget_mib", "step_ms", "images_per_s", "events"),
)
RESUMED = "resumed"
"""Event that the journal adds to the first row after a resume."""
_FLUSH_S = 1.0


@dataclass(frozen=True)
class Row:
    """One optimizer step."""

    step: int
    """Counts from 1 over the whole run, and goes on after a resume."""
    epoch: int
    """From 1, as Ultralytics prints it."""
    images: int
    """Of the logical batch: of all loader batches that went into this update."""
    micro_batches: tuple[int, ...]
    """Images in each, in the order they ran."""
    plan: str
    """Name of the checkpointing plan; empty if nothing is recomputed."""
    image_size: str
    """Height and width in pixels: `640x640`."""
    max_boxes: int
    """Of the image that has most."""
    predicted_bytes: int
    """Predicted peak."""
    peak_bytes: int
    """Measured peak."""
    held_bytes: int
    """See `Reading`, like the two below."""
    free_bytes: int
    budget_bytes: int
    step_ms: float | None
    """None where not measured."""
    events: tuple[str, ...]
    """Such as `out-of-memory at 64`, `retried 64`, `shrunk 64 to 32`, `grew 32 to 64`, `groups of 16`."""

    def as_csv(self) -> tuple[str | int, ...]:
        """Return the values of `COLUMNS`: MiB, milliseconds and images a second with one decimal, empty if unknown."""
        sizes_bytes = (self.predicted_bytes, self.peak_bytes, self.held_bytes, self.free_bytes, self.budget_bytes)
        return (
            *(self.step, self.epoch, self.images, " ".join(map(str, self.micro_batches))),
            *(self.plan, self.image_size, self.max_boxes),
            *(f"{size_bytes / 2**20:.1f}" for size_bytes in sizes_bytes),
            "" if self.step_ms is None else f"{self.step_ms:.1f}",
            f"{self.images / self.step_ms * 1000:.1f}" if self.step_ms else "",
            "; ".join(self.events),
        )


@dataclass(frozen=True)
class Summary:
    """A whole run, with the parts before a resume. None where there is nothing to tell it from."""

    updates: int
    """That the weights have gone through."""
    updates_expected: int | None
    updates_repeated: int
    """Not among `updates`: made after the last checkpoint before an interruption, and made again after the resume."""
    images: int
    """In `updates`."""
    images_lost: int
    """That entered a step and did not reach an update."""
    out_of_memories: int
    """Survived ones."""
    retries: int
    shrinks: int
    grows: int
    peak_mean_mib: float | None
    peak_sd_mib: float | None
    peak_max_mib: float | None
    budget_min_mib: float | None
    budget_max_mib: float | None
    prediction_error_percent: float | None
    """Median of |predicted - measured| / measured peak."""
    micro_batch_min: int | None
    """Images in the largest micro-batch of a step; so are the two below."""
    micro_batch_median: int | None
    micro_batch_max: int | None
    images_per_s: float | None
    """Median of the steps."""
    gpu_utilisation_percent: float | None
    """Mean of the samples."""

    def as_text(self) -> str:
        """Return the lines to log at the end of a run."""
        lost = _counted(self.images_lost, "image", "images")
        if self.peak_mean_mib is None:
            return f"memory: no steps were run, {lost} lost"
        updates = _counted(self.updates, "update", "updates")
        if self.updates_expected is not None:
            updates = f"{self.updates:,} of {_counted(self.updates_expected, 'update', 'updates')}"
        repeated = f" ({self.updates_repeated:,} more were repeated after a resume)" if self.updates_repeated else ""
        budget = _span(self.budget_min_mib, self.budget_max_mib)
        error = self.prediction_error_percent
        sizes = _span(self.micro_batch_min, self.micro_batch_max)
        middle = f", median {self.micro_batch_median:,}" if self.micro_batch_min != self.micro_batch_max else ""
        changes = f"shrunk {_counted(self.shrinks, 'time', 'times')}, grown {_counted(self.grows, 'time', 'times')}"
        busy = self.gpu_utilisation_percent
        return (
            f"memory: {_counted(self.out_of_memories, 'out-of-memory', 'out-of-memories')} survived, {lost} lost, "
            f"{updates}{repeated}\n"
            f"  peak {self.peak_mean_mib:,.0f} ± {self.peak_sd_mib:,.0f} MiB, at most {self.peak_max_mib:,.0f}, "
            f"of a budget of {budget} MiB" + (f"; predicted to {error:.1f} %" if error is not None else "") + "\n"
            f"  micro-batches of {sizes} images{middle}, {changes}"
            + (f"; {self.images_per_s:,.1f} images/s" if self.images_per_s is not None else "")
            + (f"; GPU busy {busy:.0f} % of the time" if busy is not None else "")
        )


class Journal:
    """Writes memory.csv while a run goes on, memory.json and memory.png at its end.

    Args:
        folder: Of the run; exists.
        resume: Go on after what is there. A last line that a kill cut off is dropped.

    Raises:
        OSError: From any method: the folder is gone, may not be written to, or its disk is full.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        self._csv, self._json, self._picture = (folder / f"memory.{suffix}" for suffix in ("csv", "json", "png"))
        self._lost = self._samples = 0
        self._percent_sum = 0.0
        self._before: Mapping[str, float | None] = {}
        rows: list[dict[str, str]] = []
        if resume and self._csv.exists():
            os.truncate(self._csv, self._csv.read_bytes().rfind(b"\n") + 1)
            rows = read_rows(self._csv)
            if self._json.exists():
                self._before = json.loads(self._json.read_text("utf-8"))
        else:
            for path in (self._csv, self._json, self._picture):
                path.unlink(missing_ok=True)
        self._next_step = int(rows[-1]["step"]) + 1 if rows else 1
        self._resumed_rows = len(rows)
        self._file = self._csv.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if self._file.tell() == 0:
            self._writer.writerow(COLUMNS)
        self._flush()
        self._mark_resume = bool(rows)

    @property
    def next_step(self) -> int:
        """Step number of the next row."""
        return self._next_step

    def add(self, row: Row) -> None:
        """Write a row. It reaches the file within a second of training, or with `summary` or `close`."""
        if self._mark_resume:
            row = dataclasses.replace(row, events=(RESUMED, *row.events))
            self._mark_resume = False
        self._writer.writerow(row.as_csv())
        self._next_step = row.step + 1
        if time.monotonic() - self._flushed_s >= _FLUSH_S:
            self._flush()

    def lost(self, images: int) -> None:
        """Count images that entered a step and did not reach an update."""
        self._lost += images

    def busy(self, percent: float | None) -> None:
        """Take a sample of the GPU's utilisation; None is no sample."""
        if percent is not None:
            self._percent_sum += percent
            self._samples += 1

    def summary(self, *, updates_expected: int | None) -> Summary:
        """Sum up the run so far.

        Args:
            updates_expected: How many updates the whole run should make; None where not known.
        """
        return self._summary(self._read(), updates_expected)

    def close(self, *, updates_expected: int | None) -> Summary:
        """Write memory.json, and memory.png if there was a step; return the summary. The last call to make."""
        with self._file:
            rows = self._read()
        summary = self._summary(rows, updates_expected)
        # In one go: a resume reads this file, and a kill may come while it is written.
        unfinished = self._json.with_suffix(".json.tmp")
        unfinished.write_text(json.dumps(dataclasses.asdict(summary), indent=2) + "\n", "utf-8")
        unfinished.replace(self._json)
        if rows:
            picture.save(rows, self._picture)
        return summary

    def _summary(self, rows: Sequence[Mapping[str, str]], updates_expected: int | None) -> Summary:
        lost = int(self._before.get("images_lost") or 0) + self._lost
        return _summarise(rows, updates_expected, lost, self._utilisation_percent(len(rows)))

    def _read(self) -> list[dict[str, str]]:
        self._flush()
        return read_rows(self._csv)

    def _flush(self) -> None:
        self._file.flush()
        self._flushed_s = time.monotonic()

    def _utilisation_percent(self, rows: int) -> float | None:
        now = self._percent_sum / self._samples if self._samples else None
        before = self._before.get("gpu_utilisation_percent")
        if now is None or before is None:
            return before if now is None else now
        # How many samples there were before is not recorded; steps stand in for them.
        return before + (now - before) * (rows - self._resumed_rows) / max(rows, 1)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a memory.csv, of a run that goes on or was killed too: a last line without its end is left out."""
    text = path.read_text("utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def _summarise(
    rows: Sequence[Mapping[str, str]], updates_expected: int | None, images_lost: int, busy_percent: float | None
) -> Summary:
    kept = _kept(rows)
    events = [event for row in rows for event in row["events"].split("; ")]
    peaks, predictions, budgets = (
        [float(row[name]) for row in rows] for name in ("peak_mib", "predicted_mib", "budget_mib")
    )
    errors = [abs(predicted - peak) / peak * 100 for predicted, peak in zip(predictions, peaks, strict=True) if peak]
    largest = [max(map(int, row["micro_batches"].split())) for row in rows]
    speeds = [float(row["images_per_s"]) for row in rows if row["images_per_s"]]
    mean = fmean(peaks) if peaks else None
    return Summary(
        updates=len(kept),
        updates_expected=updates_expected,
        updates_repeated=len(rows) - len(kept),
        images=sum(int(row["images"]) for row in kept),
        images_lost=images_lost,
        out_of_memories=sum(event.startswith("out-of-memory") for event in events),
        retries=sum(event.startswith("retried") for event in events),
        shrinks=sum(event.startswith("shrunk") for event in events),
        grows=sum(event.startswith("grew") for event in events),
        peak_mean_mib=mean,
        peak_sd_mib=math.sqrt(fmean((peak - mean) ** 2 for peak in peaks)) if mean is not None else None,
        peak_max_mib=max(peaks, default=None),
        budget_min_mib=min(budgets, default=None),
        budget_max_mib=max(budgets, default=None),
        prediction_error_percent=median(errors) if errors else None,
        micro_batch_min=min(largest, default=None),
        micro_batch_median=median_low(largest) if largest else None,
        micro_batch_max=max(largest, default=None),
        images_per_s=median(speeds) if speeds else None,
        gpu_utilisation_percent=busy_percent,
    )


def _kept(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Rows whose update is in the weights: a resume starts an epoch anew, from the checkpoint before it."""
    kept: list[Mapping[str, str]] = []
    for row in rows:
        if RESUMED in row["events"].split("; "):
            while kept and int(kept[-1]["epoch"]) >= int(row["epoch"]):
                kept.pop()
        kept.append(row)
    return kept


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _span(low: float | None, high: float | None) -> str:
    first, last = f"{low:,.0f}", f"{high:,.0f}"
    return first if first == last else f"{first} to {last}"
