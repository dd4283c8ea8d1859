"""What the engine did: a row in memory.csv for every optimizer step, and at the end memory.json and memory.png.

The file is the only record. The summary and the picture are made from it, so after a resume they cover the whole run.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yolov12.mas import picture
from yolov12.mas.summary import RESUMED, Summary, summarise

__all__ = ["COLUMNS", "RESUMED", "Journal", "Row", "Summary", "read_rows"]

COLUMNS = (
    *("step", "epoch", "images", "micro_batches", "plan", "image_size", "max_boxes"),
    *("predicted_mib", "peak_mib", "held_mib", "free_mib", "budget_mib", "step_ms", "images_per_s", "events"),
)
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
            *(self.step, self.epoch, self.images, " ".join(map(str, self.micro_batches or (0,)))),
            *(self.plan, self.image_size, self.max_boxes),
            *(f"{size_bytes / 2**20:.1f}" for size_bytes in sizes_bytes),
            "" if self.step_ms is None else f"{self.step_ms:.1f}",
            f"{self.images / self.step_ms * 1000:.1f}" if self.step_ms else "",
            "; ".join(self.events),
        )


class Journal:
    """Writes memory.csv while a run goes on, memory.json and memory.png at its end.

    Args:
        folder: Of the run; exists.
        resume: Go on after what is there. A last line that a kill cut off is dropped.
        steps: With `resume`, rows after so many are dropped: these steps will be made again.
        rank: Of several processes, each keeps rows of its own share, in memory.rank1.csv and so on; that of rank 0 sums
            them all up.
        ranks: How many there are.

    Raises:
        OSError: From any method: the folder is gone, may not be written to, or its disk is full.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False, steps: int | None = None, rank: int = 0, ranks: int = 1) -> None:
        self._csv, self._json, self._picture = (Path(folder, f"memory.{suffix}") for suffix in ("csv", "json", "png"))
        self._rank, self._ranks = rank, ranks
        if rank:
            self._csv = self._csv.with_name(f"memory.rank{rank}.csv")
        self._lost = self._samples = 0
        self._percent_sum = 0.0
        self._before: Mapping[str, float | None] = {}
        rows: list[dict[str, str]] = []
        if resume and self._csv.exists():
            _cut(self._csv, steps)
            rows = read_rows(self._csv)
            if self._json.exists():
                self._before = json.loads(self._json.read_text("utf-8"))
            if steps is not None:
                self._before = {**self._before, "images_lost": 0}  # they are trained on again
        else:
            for path in (self._csv, self._json, self._picture):
                path.unlink(missing_ok=True)
        self._next_step = int(rows[-1]["step"]) + 1 if rows else 1
        self._resumed_rows, self._first_step = len(rows), self._next_step
        self._file = self._csv.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if self._file.tell() == 0:
            self._writer.writerow(COLUMNS)
        self.flush()
        self._mark = (RESUMED if steps is None else f"{RESUMED} after step {steps}") if rows else ""

    @property
    def next_step(self) -> int:
        """Step number of the next row."""
        return self._next_step

    def add(self, row: Row) -> None:
        """Write a row. It reaches the file within a second of training, or with `summary` or `close`."""
        if self._mark:
            row = dataclasses.replace(row, events=(self._mark, *row.events))
            self._mark = ""
        self._writer.writerow(row.as_csv())
        self._next_step = row.step + 1
        if time.monotonic() - self._flushed_s >= _FLUSH_S:
            self.flush()

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
            updates_expected: How many updates this part of the run, since the last resume, should make; None where not
                known.
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
            with contextlib.suppress(ImportError):  # no matplotlib, no picture
                picture.save(rows, self._picture)
        return summary

    def _summary(self, rows: Sequence[Mapping[str, str]], updates_expected: int | None) -> Summary:
        lost = int(self._before.get("images_lost") or 0) + self._lost
        return summarise(rows, updates_expected, self._first_step, lost, self._utilisation_percent(len(rows)))

    def _read(self) -> list[dict[str, str]]:
        self.flush()
        return read_rows(self._csv)

    def flush(self) -> None:
        """Hand all rows to the system, which keeps them if this process is killed."""
        self._file.flush()
        self._flushed_s = time.monotonic()

    def _utilisation_percent(self, rows: int) -> float | None:
        now = self._percent_sum / self._samples if self._samples else None
        before = self._before.get("gpu_utilisation_percent")
        if now is None or before is None:
            return before if now is None else now
        # How many samples there were before is not recorded; steps stand in for them.
        return before + (now - before) * (rows - self._resumed_rows) / max(rows, 1)


def _cut(path: Path, steps: int | None) -> None:
    """Leave whole rows, of the first steps."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n")]
    if steps is not None:
        kept = [*kept[:1], *(line for line in kept[1:] if int(line.partition(b",")[0]) <= steps)]
    os.truncate(path, sum(map(len, kept)))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a memory.csv, of a run that goes on or was killed too: a last line without its end is left out."""
    text = path.read_text("utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
