"""Search for the run that `resume=auto` continues."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from yolov12.errors import UntrustedWeightsError, WeightsError
from yolov12.files import is_locked
from yolov12.models import weights
from yolov12.training.run.saved_state import FILE

__all__ = ["begun", "interrupted", "is_complete", "latest_interrupted"]

_BEGUN = re.compile(
    rf"\.lock|args\.yaml|classes\.csv|labels\.jpg|memory(\.rank\d+)?\.csv|train_batch\d+\.jpg"
    rf"|{re.escape(FILE)}(\.unfinished)?|last\.pt\.unfinished"
)
"""Files that a run of this package writes before its first checkpoint. A state without a checkpoint is of no use."""


def latest_interrupted(arguments: Mapping[str, Any], task: str, *, quiet: bool = False) -> Path | None:
    """Return `last.pt` of the latest interrupted run that these arguments started and that no process continues.

    A damaged checkpoint is left out, with a warning, so that a restart without a user still comes back.

    Args:
        arguments: Training arguments; `project`, `name`, `save_dir` and `exist_ok` are used.
        task: Ultralytics' name of the task, such as `detect`.
        quiet: True to log no warning.

    Returns:
        None if there is no such run.

    Raises:
        UntrustedWeightsError: A checkpoint asks for code outside the allow-list.
        UnreadableWeightsError: A checkpoint may be whole, but cannot be read now. Or it is damaged, and a new run would
            take its folder and replace its other files.
    """
    from ultralytics.utils import LOGGER

    folder = _folder(arguments, task)
    own: Exception | None = None
    for last in (newest_first := sorted(_found(folder, "weights/last.pt"), key=_changed, reverse=True)):
        if is_locked(last.parent):
            continue
        try:
            is_interrupted = _is_of_interrupted(weights.read(last)) or last.with_name(FILE).exists()
        except Exception as error:  # with YOLOV12_TRUST_WEIGHTS=1, a damaged file may raise any error
            if not _is_damaged(error):
                raise
            own = error if last.parents[1] == folder else own
            if not quiet:
                which = "the newest run" if last == newest_first[0] else "a run"
                reason = error if isinstance(error, WeightsError) else f"{last} cannot be read ({error!r})"
                LOGGER.warning(f"resume=auto: {which} of this name is left out: {reason}")
            continue
        if is_interrupted:
            return last
    if own is not None and (arguments.get("exist_ok") or arguments.get("save_dir")):
        raise own
    return None


def begun(arguments: Mapping[str, Any], task: str) -> Path | None:
    """Return the folder of a run that these arguments started and that ended before it saved anything.

    Args:
        arguments: Training arguments; `project`, `name` and `save_dir` are used.
        task: Ultralytics' name of the task, such as `detect`.

    Returns:
        The first such folder; None if there is none. One that a process trains in does not count.
    """
    for weights_folder in sorted(_found(_folder(arguments, task), "weights")):
        folder = weights_folder.parent
        names = {file.name for file in folder.rglob("*") if not file.is_dir()}
        is_ours = not names.isdisjoint({".lock", "memory.csv"})  # Ultralytics writes neither
        if is_ours and all(map(_BEGUN.fullmatch, names)) and not is_locked(weights_folder):
            return folder
    return None


def _folder(arguments: Mapping[str, Any], task: str) -> Path:
    """Return the folder of the first run of a name; of every run, with `exist_ok` or `save_dir`."""
    from ultralytics.cfg import get_save_dir

    names = {key: arguments.get(key) for key in ("project", "name", "save_dir")}
    folder: Path = get_save_dir(SimpleNamespace(**names, task=task, mode="train", exist_ok=True))
    return folder


def _found(folder: Path, file: str) -> list[Path]:
    """Return a file of all runs of a name, without those of runs whose names only begin alike.

    Args:
        folder: Folder of the first run of the name.
        file: Path in a folder of a run.
    """
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
    return _is_of_interrupted(weights.read(last))


def _is_of_interrupted(checkpoint: Any) -> bool:
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


def _is_damaged(error: Exception) -> bool:
    """Return False if a file may be whole: its code is not trusted, or its disk or the memory failed for now."""
    if isinstance(error, UntrustedWeightsError):
        return False
    cause = error.__cause__ if isinstance(error, WeightsError) else error
    if isinstance(cause, OSError) and not isinstance(cause, PermissionError):
        return cause.errno in (None, errno.EINVAL)
    return not isinstance(cause, MemoryError)


def _changed(last: Path) -> float:
    return max(file.stat().st_mtime for file in (last, last.with_name(FILE)) if file.exists())
