"""Rows of results.csv, of which Ultralytics writes one at the end of each epoch, before its checkpoint."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from yolov12 import files

__all__ = ["drop_rows", "has_row"]


def has_row(path: Path, epoch: int) -> bool:
    """Return whether an epoch was complete.

    Args:
        path: The results.csv.
        epoch: Number of the epoch, from 1.
    """
    if not path.exists():
        return False
    return any(_epoch_of(row) == epoch for row in path.read_text("utf-8", errors="replace").splitlines()[1:])


def drop_rows(path: Path, epochs: int) -> None:
    """Remove the rows of incomplete epochs, and those that are damaged, from a results.csv.

    Args:
        path: The file.
        epochs: Number of complete epochs.
    """
    if not path.exists():
        return
    text = path.read_text("utf-8", errors="replace")
    if "\n" not in text:  # the disk was full; Ultralytics writes the header of a missing file
        path.unlink()
        return
    header, *rows = text[: text.rfind("\n")].splitlines()  # a full disk may have cut off the last line, too
    kept = "\n".join([header, *(row for row in rows if _epoch_of(row) <= epochs), ""])
    if kept != text:
        files.write(path, lambda file: file.write(kept.encode()))


def _epoch_of(row: str) -> float:
    """Return the epoch of a row of results.csv. One that a power cut has damaged is of no epoch: infinity."""
    try:
        return float(next(csv.reader([row]))[0])
    except (ValueError, IndexError, csv.Error):
        return math.inf
