"""The record of a run: one row in memory.csv per optimizer step, and memory.json and memory.png at the end.

memory.csv is the only source. The summary and the picture are made from it, so after a resume they cover the whole run.

If several processes (ranks) share each batch, each rank writes a file about its own share: rank 0 writes memory.csv,
and the other ranks write memory.rank1.csv and so on. Step numbers agree between these files. Rank 0 summarises all of
them.
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
from typing import Any, TextIO

from yolov12 import files
from yolov12.mas.journal import picture
from yolov12.mas.journal.columns import COLUMNS
from yolov12.mas.journal.summary import RESUMED, Summary, read_summary, summarise

__all__ = [
    "COLUMNS",
    "OLD_COLUMNS",
    "RESUMED",
    "Journal",
    "Row",
    "Summary",
    "journal_files",
    "read_ranks",
    "read_rows",
]

_FIRST = "memory.csv"
OLD_COLUMNS = {"held_mib": "reserved_mib"}
"""Name of a column in files of earlier versions, which a resumed run continues → its name now."""

_FLUSH_S = 1.0


@dataclass(frozen=True)
class Row:
    """What happened in one optimizer step."""

    step: int
    """Number of the step, from 1. It continues after a resume."""
    epoch: int
    """Epoch, from 1, as Ultralytics prints it."""
    images: int
    """Images in the logical batch.

    The logical batch consists of all loader batches of this update. With several ranks, only this rank's share counts.
    """
    micro_batches: tuple[int, ...]
    """Images in each micro-batch, in the order in which they ran; empty if the share was empty."""
    plan: str
    """Checkpoint plan in text form; empty if every layer keeps everything."""
    image_size: str
    """Height and width in pixels: `640x640`."""
    max_boxes: int
    """Boxes of the image that has most."""
    predicted_bytes: int
    """Predicted peak of allocated memory."""
    peak_bytes: int
    """Measured peak of allocated memory."""
    reserved_bytes: int
    """Memory reserved by this process; see `Reading.reserved_bytes`."""
    free_bytes: int
    """Memory that the device could still give; see `Reading.free_bytes`."""
    budget_bytes: int
    """Memory that this process may use; see `Reading.budget_bytes`."""
    step_ms: float | None
    """Milliseconds of the step; None if they were not measured."""
    events: tuple[str, ...]
    """Events such as `out-of-memory at 64`, `retried 64`, `shrunk 64 to 32`, `grew 32 to 64`, `groups of 16`."""
    data_wait_ms: float | None = None
    """Milliseconds for which the device waited for data; None if they were not measured."""
    decode_ms: float | None = None
    augment_ms: float | None = None
    """Milliseconds of loader workers for reading and decoding, and for everything else; None if unknown."""
    period_ms: float | None = None
    """Milliseconds since the update before; None for the first update of an epoch."""
    power_w: float | None = None
    """Power in watts; None if nothing measures it. See `Sensors`."""
    temperature_c: float | None = None
    """Temperature of the GPU in degrees Celsius; None if nothing measures it."""
    replayed: int = 0
    """Number of micro-batches that were replayed as CUDA graphs."""

    def as_csv(self) -> tuple[str | int, ...]:
        """Return the values of `COLUMNS` in MiB, milliseconds and images/s, with one decimal; empty if unknown."""
        sizes_bytes = (self.predicted_bytes, self.peak_bytes, self.reserved_bytes, self.free_bytes, self.budget_bytes)
        measured = self.data_wait_ms, self.decode_ms, self.augment_ms, self.period_ms, self.power_w, self.temperature_c
        return (
            *(self.step, self.epoch, self.images, " ".join(map(str, self.micro_batches))),
            *(self.plan, self.image_size, self.max_boxes),
            *(f"{size_bytes / 2**20:.1f}" for size_bytes in sizes_bytes),
            "" if self.step_ms is None else f"{self.step_ms:.1f}",
            f"{self.images / self.step_ms * 1000:.1f}" if self.step_ms else "",
            *("" if value is None else f"{value:.1f}" for value in measured),
            self.replayed,
            "; ".join(self.events),
        )


class Journal:
    """Writes memory.csv during a run, and memory.json and memory.png at its end.

    Args:
        folder: Existing folder of the run. Ranks on other machines may have another folder; rank 0 does not see their
            files.
        resume: Continue the existing file. If a kill cut off its last line, that line is dropped.
        steps: With `resume`, drop the rows after this step number, because these steps will run again.
        epochs: With `resume` from the end of an epoch, drop the rows after this epoch number for the same reason.
        rank: Index of this process among the ranks.
        ranks: Number of ranks.

    Raises:
        OSError: From any method: the folder is missing or not writable, or its disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        steps: int | None = None,
        epochs: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._folder, self._rank, self._ranks = Path(folder), rank, ranks
        self._json, self._picture = self._folder / "memory.json", self._folder / "memory.png"
        self._csv = self._folder / (f"memory.rank{rank}.csv" if rank else _FIRST)
        self._lost = self._samples = 0
        self._percent_sum = 0.0
        self._before: Mapping[str, float | None] = {}
        if not resume:
            self._remove_old_files()
        rows, last_step = self._resume(steps, epochs) if resume else ([], 0)
        self._next_step = last_step + 1
        self._resumed_rows, self._first_step = len(rows), self._next_step
        self._mark = (RESUMED if steps is None else f"{RESUMED} after step {steps}") if last_step else ""
        self._flushed_s = time.monotonic()
        self._names: list[str] = []  # columns of the file; one of an earlier version keeps its own
        self._file: TextIO | None = None
        # A file stays open from its first row on. Those of other ranks begin after rank 0 has removed earlier ones.
        if not rank:
            self._open().close()

    def _remove_old_files(self) -> None:
        self._csv.unlink(missing_ok=True)
        if not self._rank:
            for path in (self._json, self._picture, *_rank_files(self._folder).values()):
                path.unlink(missing_ok=True)

    def _resume(self, steps: int | None, epochs: int | None) -> tuple[list[dict[str, str]], int]:
        """Truncate the file to the valid rows. Return them, and the last step number, which all ranks agree on."""
        first = self._folder / _FIRST
        if steps is None and (self._rank or epochs is not None) and first.exists():
            # A kill may cost each rank another number of rows.
            steps = _last_step([row for row in read_rows(first) if epochs is None or int(row["epoch"]) <= epochs])
        rows: list[dict[str, str]] = []
        if self._csv.exists():
            _truncate(self._csv, steps)
            rows = read_rows(self._csv)
            if not self._rank:
                self._before = read_summary(self._json)
            if steps is not None:
                self._before = {**self._before, "images_lost": 0}  # these images will be trained on again
        elif not self._rank:
            for path in (self._json, self._picture):
                path.unlink(missing_ok=True)
        last_step = _last_step(rows) if steps is None else steps
        for rank, path in _rank_files(self._folder).items():
            if not self._rank and rank >= self._ranks:  # this rank no longer exists, but its rows count
                _truncate(path, last_step)
        return rows, last_step

    def _open(self) -> TextIO:
        file = self._csv.open("a+", encoding="utf-8", newline="")
        if file.tell() == 0:
            csv.writer(file, lineterminator="\n").writerow(column.name for column in COLUMNS)
        file.flush()
        file.seek(0)
        self._names = next(csv.reader([file.readline()]))
        return file

    @property
    def next_step(self) -> int:
        """Number of the step that the next row belongs to."""
        return self._next_step

    def add(self, row: Row) -> None:
        """Write a row. Rows reach the file about once a second, and with `flush`, `summary` or `close`."""
        if self._mark:
            row = dataclasses.replace(row, events=(self._mark, *row.events))
            self._mark = ""
        self._file = self._file or self._open()
        values = dict(zip((column.name for column in COLUMNS), row.as_csv(), strict=True))
        names = (OLD_COLUMNS.get(name, name) for name in self._names)
        csv.writer(self._file, lineterminator="\n").writerow(values[name] for name in names)
        self._next_step = row.step + 1
        if time.monotonic() - self._flushed_s >= _FLUSH_S:
            self.flush()

    def lost(self, images: int) -> None:
        """Count images that entered a step but did not reach an update.

        Args:
            images: Number of images, over all ranks.
        """
        self._lost += images

    def busy(self, percent: float | None) -> None:
        """Add a sample of the GPU's utilisation.

        Args:
            percent: 0 to 100; None is ignored.
        """
        if percent is not None:
            self._percent_sum += percent
            self._samples += 1

    def summary(self, *, updates_expected: int | None) -> Summary:
        """Summarise the run so far; on rank 0, over all ranks.

        Args:
            updates_expected: Updates that the run should make since the last resume; None if unknown.
        """
        return self._summary(self._read(), updates_expected)

    def close(self, *, updates_expected: int | None, is_exact: bool = False, bn_group: int | None = None) -> Summary:
        """Write memory.json, and memory.png if there was a step, then return the summary. Must be the last call.

        Rank 0 does this for all ranks. Every other rank must have closed or flushed its journal before, so that its
        rows are in its file. The other ranks write no summary and no picture, and return a summary of their own share.

        Args:
            updates_expected: Updates that the run should make since the last resume; None if unknown.
            is_exact: True if the gradient of a batch does not depend on how it is split into BatchNorm groups.
            bn_group: Number of images that BatchNorm normalises together; None if unknown.
        """
        with self._file or contextlib.nullcontext():
            journals = self._read()
        summary = self._summary(journals, updates_expected, is_exact=is_exact, bn_group=bn_group)
        if self._rank:
            return summary
        text = json.dumps(dataclasses.asdict(summary), indent=2) + "\n"
        files.write(self._json, lambda file: file.write(text.encode()))  # a resume reads it, and a kill may come now
        if journals[0]:
            with contextlib.suppress(ImportError):  # without matplotlib there is no picture
                picture.save(journals.pop(0), self._picture, journals)
        return summary

    def _summary(
        self, journals: Mapping[int, Sequence[Mapping[str, str]]], updates_expected: int | None, **exactness: Any
    ) -> Summary:
        lost = int(self._before.get("images_lost") or 0) + self._lost
        busy_percent = self._utilisation_percent(len(journals[self._rank]))
        missing = 0 if self._rank else len(set(range(self._ranks)) - set(journals))
        return summarise(journals, updates_expected, self._first_step, lost, busy_percent, missing, **exactness)

    def _read(self) -> dict[int, list[dict[str, str]]]:
        self.flush()
        if self._rank:
            return {self._rank: read_rows(self._csv) if self._csv.exists() else []}
        return read_ranks(self._folder)

    def flush(self) -> None:
        """Pass all rows to the operating system, which keeps them even if this process is killed."""
        if self._file is not None:
            self._file.flush()
        self._flushed_s = time.monotonic()

    def _utilisation_percent(self, rows: int) -> float | None:
        now = self._percent_sum / self._samples if self._samples else None
        before = self._before.get("gpu_utilisation_percent")
        if now is None or before is None:
            return before if now is None else now
        # The earlier number of samples is unknown, so steps serve as weights.
        return before + (now - before) * (rows - self._resumed_rows) / max(rows, 1)


def _truncate(path: Path, steps: int | None) -> None:
    """Truncate a file to complete rows, and to those up to step number `steps` if it is given."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n")]
    if steps is not None:
        kept = [*kept[:1], *(line for line in kept[1:] if int(line.partition(b",")[0]) <= steps)]
    os.truncate(path, sum(map(len, kept)))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a memory.csv, each as column → text.

    An incomplete last line is left out: the run may still be writing it, or a kill may have cut it off.
    """
    text = path.read_text("utf-8")
    rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
    names = [OLD_COLUMNS.get(name, name) for name in next(rows, [])]
    # A million rows take 0.8 GB. They would take 1.4 GB if equal texts were not one object.
    known: dict[str, str] = {}
    return [dict(zip(names, (known.setdefault(value, value) for value in row), strict=False)) for row in rows if row]


def journal_files(folder: Path) -> dict[int, Path]:
    """Return the files of all ranks in a run folder. That of rank 0 is the first, and may be missing.

    Args:
        folder: Run folder.

    Returns:
        Rank → path.
    """
    return {0: folder / _FIRST, **_rank_files(folder)}


def read_ranks(folder: Path) -> dict[int, list[dict[str, str]]]:
    """Read the rows of every rank whose file is in a run folder.

    Args:
        folder: Folder with at least the file of rank 0.

    Returns:
        Rank → rows, rank 0 first.
    """
    return {rank: read_rows(path) for rank, path in journal_files(folder).items()}


def _rank_files(folder: Path) -> dict[int, Path]:
    """Return the files of the ranks above 0."""
    names = {
        path: path.name.removeprefix("memory.rank").removesuffix(".csv") for path in folder.glob("memory.rank*.csv")
    }
    return dict(sorted((int(rank), path) for path, rank in names.items() if rank.isdecimal()))


def _last_step(rows: Sequence[Mapping[str, str]]) -> int:
    return int(rows[-1]["step"]) if rows else 0
