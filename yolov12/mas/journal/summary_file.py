"""Reads and writes memory.json, the summary of a run. The file is replaced in one operation, so it is always whole."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from yolov12.mas.journal.summary import Summary

__all__ = ["read", "write"]


def read(path: Path) -> dict[str, Any]:
    """Read the figures of the run so far.

    Args:
        path: The file.

    Returns:
        Name of a field of `Summary` → value. Empty if there is no file, or if it is damaged: a run can go on without
        them.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, summary: Summary) -> None:
    """Write a summary.

    Args:
        path: The file.
        summary: What to write.

    Raises:
        OSError: The disk is full, or the folder is not writable. The earlier file stays.
    """
    unfinished = path.with_suffix(".json.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
