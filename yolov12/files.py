"""Atomic file writes and folder locks. If a write is interrupted, the previous version of the file stays."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from yolov12 import own_files

__all__ = ["AtomicPath", "is_locked", "lock", "make_atomic", "replacing", "unlock", "write"]

_LOCK = ".lock"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Replace a file in one step.

    Args:
        path: The file to replace.

    Yields:
        A temporary path in the same folder. The block writes its file there. When the block ends, that file is renamed
        to `path`. If the block raises, `path` stays unchanged and the temporary file is deleted.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        own_files.remember(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write(path: str | Path, write_to: Callable[[IO[bytes]], Any]) -> None:
    """Write a file atomically.

    Args:
        path: The file to write.
        write_to: Writes the content to the binary file that it is given.
    """
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        write_to(file)


class AtomicPath(type(Path())):  # type: ignore[misc]  # Path() returns a PosixPath: extend that class
    """A path whose `write_bytes` is atomic. Paths derived from it are atomic, too."""

    def write_bytes(self, data: Any) -> int:
        """Write the file atomically. Returns the number of bytes written."""
        write(self, lambda file: file.write(data))
        return len(data)


def lock(folder: Path) -> IO[bytes] | None:
    """Lock a folder, so that other processes know that this process writes to it.

    Args:
        folder: An existing folder.

    Returns:
        An open lock file. The lock lasts until the file is closed or the process ends. None if another process holds
        the lock. On a file system without locks, a file is returned and nothing is locked.
    """
    file = (folder / _LOCK).open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: worker processes would inherit it
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None
        return (folder / _LOCK).open("ab")  # the file system has no locks
    return file


def unlock(folder: Path, file: IO[bytes] | None) -> None:
    """Release a lock and delete its file.

    Args:
        folder: The folder that was locked.
        file: What `lock` returned.
    """
    (folder / _LOCK).unlink(missing_ok=True)
    if file is not None:
        file.close()


def is_locked(folder: Path) -> bool:
    """Return True if another process holds the lock of a folder."""
    if not (folder / _LOCK).exists():
        return False
    mine = lock(folder)
    if mine is not None:
        mine.close()
    return mine is None


def make_atomic(trainer: Any) -> None:
    """Make the checkpoint writes of an Ultralytics trainer atomic."""
    trainer.wdir, trainer.last, trainer.best = (AtomicPath(path) for path in (trainer.wdir, trainer.last, trainer.best))
