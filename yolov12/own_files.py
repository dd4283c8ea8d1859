"""Checkpoints that this process wrote, recognised by their identity and not by their name.

No weight file is trusted, because loading one can run code. A checkpoint that this process wrote is the exception: it
holds nothing that is not in this process already, such as a model whose class stands in the user's script.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO

__all__ = ["is_own", "remember"]

_written: dict[tuple[int, int], tuple[int, int, int]] = {}


def remember(path: str | Path) -> None:
    """Note that this process has written a file, which is complete.

    Args:
        path: The file.
    """
    with suppress(OSError):
        file, state = _identity(Path(path).stat())
        _written[file] = state


def is_own(file: IO[bytes]) -> bool:
    """Return whether this process wrote a file, and nobody has replaced or changed it since.

    Args:
        file: The file, open.
    """
    key, state = _identity(os.fstat(file.fileno()))
    return _written.get(key) == state


def _identity(status: os.stat_result) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Return which file it is, and its state. Unlike the time of modification, that of change cannot be set."""
    return (status.st_dev, status.st_ino), (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
