"""What a training needs besides images: its data set, and room on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from yolov12.watch import moves
from yolov12.watch.damage import number_of
from yolov12.watch.log import say

__all__ = ["explained", "obstacle"]

_KEPT_ATTEMPTS = 10
_WEIGHTS = (".engine", ".onnx", ".pt", ".torchscript")
_FOLDERS = ("", "run/weights/")  # not the many pictures: on a full disk this looks again and again
_LEAST_FREE_BYTES = 128 << 20
_FREE_MODELS = 8  # a training writes several checkpoints, with the state of the optimizer
_LEAST_FREE_FILES = 1000


def obstacle(places: Sequence[str], work: Path, model: Path) -> OSError | None:
    """Return why no training can run at the moment, or None.

    If the disk is too full for one, weights of old attempts are deleted first, the oldest before others. Those of the
    last ten attempts stay, and so do all reports, what others have put into the folder of the attempts or linked into
    it, and the serving model if its link leads there.

    Args:
        places: Files and folders of the data set.
        work: The work folder.
        model: The serving model.

    Raises:
        OSError: The model or the work folder is not there.
    """
    for place in places:
        if not Path(place).exists():
            reason = "the data set is not there; if data= has another place now, start the watch again"
            return FileNotFoundError(errno.ENOENT, reason, place)
    needed = max(_LEAST_FREE_BYTES, _FREE_MODELS * model.stat().st_size)
    while shutil.disk_usage(work).free < needed:
        if _delete_oldest_weights(work / "history", model):
            continue
        return OSError(errno.ENOSPC, f"a training needs {needed >> 20} MiB", str(work))
    files = os.statvfs(work)
    if files.f_files and files.f_favail < _LEAST_FREE_FILES:  # 0 files: the file system has no such limit
        return OSError(errno.ENOSPC, f"a training needs room for {_LEAST_FREE_FILES} files (inodes)", str(work))
    promoted = 2 * model.stat().st_size  # beside the serving model, and an export
    if shutil.disk_usage(model.parent).free < promoted:
        return OSError(errno.ENOSPC, f"a promotion needs {max(promoted >> 20, 1)} MiB", str(model.parent))
    return None


def explained(error: OSError, work: Path, model: Path, poll_s: float) -> str:
    """Return what is in the way, and what to do.

    Args:
        error: The error.
        work: The work folder.
        model: The serving model.
        poll_s: Seconds until the watch tries again.
    """
    if error.errno not in moves.FULL:
        return f"{error}. Trying again every {poll_s:g} s"
    if error.filename is not None and Path(error.filename) in (model, model.parent):
        advice = f"beside {model}"
    else:
        advice = f"for example by removing old folders of {work / 'history'} and of {work / 'rejected'}"
    return f"the disk is full: {error}. Nothing was lost. Free some space, {advice}; the watch then goes on"


def _delete_oldest_weights(history: Path, model: Path) -> bool:
    """Delete the weights of the oldest attempt that has any. Return False if there is none but the last attempts."""
    attempts = [each for each in history.glob("*-*") if number_of(each) and not each.is_symlink()]
    for attempt in sorted(attempts, key=number_of)[:-_KEPT_ATTEMPTS]:
        files = (file for folder in _FOLDERS for file in attempt.glob(f"{folder}*") if file.suffix in _WEIGHTS)
        if weights := [file for file in files if _is_regular(file) and not file.samefile(model)]:
            for file in weights:
                file.unlink(missing_ok=True)
            say(f"the weights in {attempt} were deleted, because the disk is almost full")
            return True
    return False


def _is_regular(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()
