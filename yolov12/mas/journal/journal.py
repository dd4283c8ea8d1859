"""What the engine did: a row in memory.csv for every optimizer step, and at the end memory.json and memory.png.

The file is the only record. The summary and the picture are made from it, so after a resume they cover the whole run.

Where several processes (ranks) share each batch, each has such a file of its own share: memory.csv is that of rank 0,
and memory.rank1.csv and so on are those of the others. Steps count alike in all of them. Rank 0 sums all of them up.
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
from typing import TextIO

from yolov12.mas.journal import picture
from yolov12.mas.journal.summary import RESUMED, Summary, summarise

__all__ = ["COLUMNS", "RESUMED", "Journal", "Row", "Summary", "read_ranks", "read_rows"]

COLUMNS = (
    *("step", "epoch", "images", "micro_batches", "plan", "image_size", "max_boxes"),
    *("predicted_mib", "peak_mib", "held_mib", "free_mib", "budget_mib", "step_ms", "images_per_s", "events"),
)
_FIRST = "memory.csv"
_FLUSH_S = 1.0


@dataclass(frozen=True)
class Row:
    """One optimizer step."""

    step: int
    """Counts from 1 over the whole run, and goes on after a resume."""
    epoch: int
    """From 1, as Ultralytics prints it."""
    images: int
    """Of the logical batch: of all loader batches that went into this update. Of several ranks, this one's share."""
    micro_batches: tuple[int, ...]
    """Images in each, in the order they ran; none where the share was none."""
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


class Journal:
    """Writes memory.csv while a run goes on, memory.json and memory.png at its end.

    Args:
        folder: Of the run; exists. Ranks of other machines may have another, whose files rank 0 does not see.
        resume: Go on after what is there. A last line that a kill cut off is dropped.
        steps: With `resume`, rows after so many are dropped: these steps will be made again.
        rank: Which of several processes this one is.
        ranks: How many there are.

    Raises:
        OSError: From any method: the folder is gone, may not be written to, or its disk is full.
    """

    def __init__(
        self, folder: str | Path, *, resume: bool = False, steps: int | None = None, rank: int = 0, ranks: int = 1
    ) -> None:
        self._folder, self._rank, self._ranks = Path(folder), rank, ranks
        self._json, self._picture = self._folder / "memory.json", self._folder / "memory.png"
        self._csv = self._folder / (f"memory.rank{rank}.csv" if rank else _FIRST)
        self._lost = self._samples = 0
        self._percent_sum = 0.0
        self._before: Mapping[str, float | None] = {}
        if not resume:
            self._begin_anew()
        rows, last_step = self._take_up(steps) if resume else ([], 0)
        self._next_step = last_step + 1
        self._resumed_rows, self._first_step = len(rows), self._next_step
        self._mark = (RESUMED if steps is None else f"{RESUMED} after step {steps}") if last_step else ""
        self._flushed_s = time.monotonic()
        self._file: TextIO | None = None
        if not rank:  # the others do so with their first row, when rank 0 has removed what an earlier run left
            self._file = self._open()

    def _begin_anew(self) -> None:
        self._csv.unlink(missing_ok=True)
        if not self._rank:
            for path in (self._json, self._picture, *_others(self._folder).values()):
                path.unlink(missing_ok=True)

    def _take_up(self, steps: int | None) -> tuple[list[dict[str, str]], int]:
        """Cut the file to what holds; return its rows, and the last step that all ranks count on from."""
        first = self._folder / _FIRST
        if steps is None and self._rank and first.exists():
            steps = _last_step(read_rows(first))  # a kill may have cost one rank more rows than another
        rows: list[dict[str, str]] = []
        if self._csv.exists():
            _cut(self._csv, steps)
            rows = read_rows(self._csv)
            if not self._rank and self._json.exists():
                self._before = json.loads(self._json.read_text("utf-8"))
            if steps is not None:
                self._before = {**self._before, "images_lost": 0}  # they are trained on again
        elif not self._rank:
            for path in (self._json, self._picture):
                path.unlink(missing_ok=True)
        last_step = _last_step(rows) if steps is None else steps
        for rank, path in _others(self._folder).items():
            if not self._rank and rank >= self._ranks:  # it is no more, and its rows are part of the run
                _cut(path, last_step)
        return rows, last_step

    def _open(self) -> TextIO:
        file = self._csv.open("a", encoding="utf-8", newline="")
        if file.tell() == 0:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)
        file.flush()
        return file

    @property
    def next_step(self) -> int:
        """Step number of the next row."""
        return self._next_step

    def add(self, row: Row) -> None:
        """Write a row. It reaches the file within a second of training, or with `summary` or `close`."""
        if self._mark:
            row = dataclasses.replace(row, events=(self._mark, *row.events))
            self._mark = ""
        self._file = self._file or self._open()
        csv.writer(self._file, lineterminator="\n").writerow(row.as_csv())
        self._next_step = row.step + 1
        if time.monotonic() - self._flushed_s >= _FLUSH_S:
            self.flush()

    def lost(self, images: int) -> None:
        """Count images, of all ranks, that entered a step and did not reach an update."""
        self._lost += images

    def busy(self, percent: float | None) -> None:
        """Take a sample of the GPU's utilisation; None is no sample."""
        if percent is not None:
            self._percent_sum += percent
            self._samples += 1

    def summary(self, *, updates_expected: int | None) -> Summary:
        """Sum up the run so far; on rank 0, of all ranks.

        Args:
            updates_expected: How many updates this part of the run, since the last resume, should make; None where not
                known.
        """
        return self._summary(self._read(), updates_expected)

    def close(self, *, updates_expected: int | None) -> Summary:
        """Write memory.json, and memory.png if there was a step; return the summary. The last call to make.

        Rank 0 does so for all ranks, whose rows have to be in their files: each of them has closed its own, or flushed.
        The others write nothing, and return a summary of their own share.
        """
        with self._file or contextlib.nullcontext():
            journals = self._read()
        summary = self._summary(journals, updates_expected)
        if self._rank:
            return summary
        # In one go: a resume reads this file, and a kill may come while it is written.
        unfinished = self._json.with_suffix(".json.tmp")
        unfinished.write_text(json.dumps(dataclasses.asdict(summary), indent=2) + "\n", "utf-8")
        unfinished.replace(self._json)
        if journals[0]:
            with contextlib.suppress(ImportError):  # no matplotlib, no picture
                picture.save(journals.pop(0), self._picture, journals)
        return summary

    def _summary(self, journals: Mapping[int, Sequence[Mapping[str, str]]], updates_expected: int | None) -> Summary:
        lost = int(self._before.get("images_lost") or 0) + self._lost
        busy_percent = self._utilisation_percent(len(journals[self._rank]))
        missing = 0 if self._rank else len(set(range(self._ranks)) - set(journals))
        return summarise(journals, updates_expected, self._first_step, lost, busy_percent, missing)

    def _read(self) -> dict[int, list[dict[str, str]]]:
        self.flush()
        if self._rank:
            return {self._rank: read_rows(self._csv) if self._csv.exists() else []}
        return read_ranks(self._folder)

    def flush(self) -> None:
        """Hand all rows to the system, which keeps them if this process is killed."""
        if self._file is not None:
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


def read_ranks(folder: Path) -> dict[int, list[dict[str, str]]]:
    """Read the rows of every rank whose file is in a run folder, rank 0 first: it has to be there."""
    return {0: read_rows(folder / _FIRST), **{rank: read_rows(path) for rank, path in _others(folder).items()}}


def _others(folder: Path) -> dict[int, Path]:
    """Files of the ranks above 0."""
    names = {
        path: path.name.removeprefix("memory.rank").removesuffix(".csv") for path in folder.glob("memory.rank*.csv")
    }
    return dict(sorted((int(rank), path) for path, rank in names.items() if rank.isdecimal()))


def _last_step(rows: Sequence[Mapping[str, str]]) -> int:
    return int(rows[-1]["step"]) if rows else 0
