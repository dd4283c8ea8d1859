"""Atomic file writes and folder locks. If a write is interrupted, the previous version of the file stays."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from yolov12 import own_files

__all__ = ["AtomicPath", "FolderLock", "is_locked", "lock", "make_atomic", "replacing", "write"]

_LOCK = ".lock"
_FLOCK = "hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, process
_guard = threading.Lock()
_locked: set[tuple[int, int, int]] = set()  # folders that this process has locked


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Replace a file in one step.

    Args:
        path: The file to replace.

    Yields:
        A temporary path in the same folder, of an empty file. The block writes into that file. When the block ends,
        the file is renamed to `path`. If the block raises, `path` stays unchanged and the temporary file is deleted.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        with unfinished.open("xb") as file:  # what is remembered is this file, whoever else writes in the folder
            yield unfinished
            os.fsync(file.fileno())
            unfinished.replace(path)
            own_files.remember(file)
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


class FolderLock:
    """Lock of a folder. It lasts until `release`, or until the process ends."""

    def __init__(self, key: tuple[int, int, int], file: IO[bytes]) -> None:
        self._key, self._file = key, file

    def release(self) -> None:
        """Release the lock and delete its file."""
        with _guard:
            Path(self._file.name).unlink(missing_ok=True)
            self._file.close()
            _locked.discard(self._key)


def lock(folder: Path) -> FolderLock | None:
    """Lock a folder, so that other threads and processes know that it is written to.

    Args:
        folder: An existing folder.

    Returns:
        The lock. None if another thread or process has locked the folder. On a file system without locks, only threads
        of this process notice the lock.
    """
    with _guard:
        key = _key(folder)
        # Locks of files are those of a process, which loses them when it closes the file in any place.
        if key in _locked:
            return None
        file = (folder / _LOCK).open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: worker processes would inherit it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return None
        if not os.fstat(file.fileno()).st_nlink:  # another process has just released and deleted it
            file.close()
            return None
        _locked.add(key)
        return FolderLock(key, file)


def is_locked(folder: Path) -> bool:
    """Return True if a thread or process has locked a folder. This takes no lock that another process could meet."""
    with _guard, suppress(FileNotFoundError):
        if _key(folder) in _locked:
            return True
        with (folder / _LOCK).open("rb") as file, suppress(OSError):  # a file system without locks
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            found = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            return bool(found[0] != fcntl.F_UNLCK)
    return False


def _key(folder: Path) -> tuple[int, int, int]:
    """Return what identifies a folder in this process, but not in a fork of it."""
    status = folder.stat()
    return os.getpid(), status.st_dev, status.st_ino


def make_atomic(trainer: Any) -> None:
    """Make the checkpoint writes of an Ultralytics trainer atomic."""
    trainer.wdir, trainer.last, trainer.best = (AtomicPath(path) for path in (trainer.wdir, trainer.last, trainer.best))
