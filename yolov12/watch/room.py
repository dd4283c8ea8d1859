"""What a training needs besides images: its data set, and room on the disk."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

__all__ = ["obstacle"]

_LEAST_FREE_BYTES = 128 << 20
_FREE_MODELS = 8  # a training writes several checkpoints, with the state of the optimizer


def obstacle(places: Sequence[str], work: Path, model: Path) -> OSError | None:
    """Return why no training can run at the moment, or None.

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
    if shutil.disk_usage(work).free < needed:
        return OSError(errno.ENOSPC, f"a training needs {needed >> 20} MiB", str(work))
    return None
