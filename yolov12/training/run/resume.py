"""Search for the run that `resume=auto` continues."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from yolov12.files import is_locked
from yolov12.models import weights
from yolov12.training.run.saved_state import FILE

__all__ = ["begun", "interrupted", "is_complete", "latest_interrupted"]

_BEGUN = re.compile(
    rf"\.lock|args\.yaml|classes\.csv|labels\.jpg|memory(\.rank\d+)?\.csv|train_batch\d+\.jpg"
    rf"|{re.escape(FILE)}(\.unfinished)?|last\.pt\.unfinished"
)
"""Files that a run of this package writes before its first checkpoint. A state without a checkpoint is of no use."""


def latest_interrupted(arguments: Mapping[str, Any], task: str) -> Path | None:
    """Return `last.pt` of the latest interrupted run that these arguments started and that no process continues.

    Args:
        arguments: Training arguments; `project`, `name` and `save_dir` are used.
        task: Ultralytics' name of the task, such as `detect`.

    Returns:
        None if there is no such run.
    """
    newest_first = sorted(_found(arguments, task, "weights/last.pt"), key=_changed, reverse=True)
    return next((last for last in newest_first if interrupted(last) and not is_locked(last.parent)), None)


def begun(arguments: Mapping[str, Any], task: str) -> Path | None:
    """Return the folder of a run that these arguments started and that ended before it saved anything.

    Args:
        arguments: Training arguments; `project`, `name` and `save_dir` are used.
        task: Ultralytics' name of the task, such as `detect`.

    Returns:
        The first such folder; None if there is none. One that a process trains in does not count.
    """
    for weights_folder in sorted(_found(arguments, task, "weights")):
        folder = weights_folder.parent
        names = {file.name for file in folder.rglob("*") if not file.is_dir()}
        is_ours = not names.isdisjoint({".lock", "memory.csv"})  # Ultralytics writes neither
        if is_ours and all(map(_BEGUN.fullmatch, names)) and not is_locked(weights_folder):
            return folder
    return None


def _found(arguments: Mapping[str, Any], task: str, file: str) -> list[Path]:
    """Return a file of all runs of a name, without those of runs whose names only begin alike."""
    from ultralytics.cfg import get_save_dir

    names = {key: arguments.get(key) for key in ("project", "name", "save_dir")}
    folder = get_save_dir(SimpleNamespace(**names, task=task, mode="train", exist_ok=True))
    numbered = re.compile(re.escape(folder.name) + r"(-\d+)?")
    found = folder.parent.glob(f"*/{file}")
    return [each for each in found if numbered.fullmatch(each.relative_to(folder.parent).parts[0])]


def interrupted(last: Path) -> bool:
    """Return whether the run of a checkpoint is not complete.

    Args:
        last: The run's `last.pt`.
    """
    if last.with_name(FILE).exists():
        return True
    checkpoint = weights.read(last)
    return checkpoint.get("epoch", -1) >= 0 and checkpoint.get("optimizer") is not None


def is_complete(file: Path) -> bool:
    """Return whether a checkpoint is of a run that is complete, or are weights that no run wrote.

    Args:
        file: The checkpoint.
    """
    if file.name == "last.pt" and file.with_name(FILE).exists():
        return False
    checkpoint = weights.read(file)
    return checkpoint.get("epoch", -1) == -1 and checkpoint.get("optimizer") is None


def _changed(last: Path) -> float:
    return max(file.stat().st_mtime for file in (last, last.with_name(FILE)) if file.exists())
