"""Which run to go on with."""

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
    """The `last.pt` of the run that was interrupted last, of those that these arguments start, and none goes on with.

    Args:
        arguments: Of a training: `project`, `name` and `save_dir` count.
        task: Ultralytics' name of it.
    """
    from ultralytics.cfg import get_save_dir

    names = {key: arguments.get(key) for key in ("project", "name", "save_dir")}
    folder = get_save_dir(SimpleNamespace(**names, task=task, mode="train", exist_ok=True))
    numbered = re.compile(re.escape(folder.name) + r"(-\d+)?")
    found = [
        last for last in folder.parent.glob("*/weights/last.pt") if numbered.fullmatch(last.parent.parent.name)
    ]  # not of others, whose name begins alike
    newest_first = sorted(found, key=_changed, reverse=True)
    return next((last for last in newest_first if interrupted(last) and not is_locked(last.parent)), None)


def interrupted(last: Path) -> bool:
    """Whether there is something left to train."""
    if last.with_name(FILE).exists():
        return True
    checkpoint = weights.read(last)
    return checkpoint.get("epoch", -1) >= 0 and checkpoint.get("optimizer") is not None


def _changed(last: Path) -> float:
    return max(file.stat().st_mtime for file in (last, last.with_name(FILE)) if file.exists())
