"""What a training needs besides images: its data set, and room on the disk."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

from yolov12.watch.damage import number_of
from yolov12.watch.log import say

__all__ = ["obstacle"]

_KEPT_ATTEMPTS = 10
_WEIGHTS = (".engine", ".onnx", ".pt", ".torchscript")
_FOLDERS = ("", "run/weights/")  # not the many pictures: on a full disk this looks again and again
_LEAST_FREE_BYTES = 128 << 20
_FREE_MODELS = 8  # a training writes several checkpoints, with the state of the optimizer


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
            return FileNotFoundError(errno.ENOENT, "the data set is not there", place)
    needed = max(_LEAST_FREE_BYTES, _FREE_MODELS * model.stat().st_size)
    while shutil.disk_usage(work).free < needed:
        if _delete_oldest_weights(work / "history", model):
            continue
        return OSError(errno.ENOSPC, f"a training needs {needed >> 20} MiB", str(work))
    return None


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
