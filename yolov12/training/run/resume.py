"""Search for the run that `resume=auto` continues."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from yolov12.files import is_locked
from yolov12.models import weights
from yolov12.training.run.run_state import FILE

__all__ = ["interrupted", "latest_interrupted"]


def latest_interrupted(arguments: Mapping[str, Any], task: str) -> Path | None:
    """Return `last.pt` of the latest interrupted run that these arguments started and that no process continues.

    Args:
        arguments: Training arguments; `project`, `name` and `save_dir` are used.
        task: Ultralytics' name of the task, such as `detect`.

    Returns:
        None if there is no such run.
    """
    from ultralytics.cfg import get_save_dir

    names = {key: arguments.get(key) for key in ("project", "name", "save_dir")}
    folder = get_save_dir(SimpleNamespace(**names, task=task, mode="train", exist_ok=True))
    numbered = re.compile(re.escape(folder.name) + r"(-\d+)?")
    found = [
        last for last in folder.parent.glob("*/weights/last.pt") if numbered.fullmatch(last.parent.parent.name)
    ]  # without runs whose names only begin alike
    newest_first = sorted(found, key=_changed, reverse=True)
    return next((last for last in newest_first if interrupted(last) and not is_locked(last.parent)), None)


def interrupted(last: Path) -> bool:
    """Return whether the run of a checkpoint is not complete.

    Args:
        last: The run's `last.pt`.
    """
    if last.with_name(FILE).exists():
        return True
    checkpoint = weights.read(last)
    return checkpoint.get("epoch", -1) >= 0 and checkpoint.get("optimizer") is not None


def _changed(last: Path) -> float:
    return max(file.stat().st_mtime for file in (last, last.with_name(FILE)) if file.exists())
