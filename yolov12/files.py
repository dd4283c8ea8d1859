"""Files that are whole whatever happens: a kill or a full disk while one is written leaves the one before."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["AtomicPath", "is_locked", "lock", "make_atomic", "replacing", "unlock", "write"]

_LOCK = ".lock"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; what is there in the end takes the place of `path`, unless the block raises."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write(path: str | Path, write_to: Callable[[IO[bytes]], Any]) -> None:
    """Write a file in one go."""
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        write_to(file)


class AtomicPath(type(Path())):  # type: ignore[misc]  # Path() makes a PosixPath, of which a subclass is wanted
    """A path that `write_bytes` writes in one go, and so do paths made from it."""

    def write_bytes(self, data: Any) -> int:
        """Write the file in one go."""
        write(self, lambda file: file.write(data))
        return len(data)


def lock(folder: Path) -> IO[bytes] | None:
    """Tell other processes that this one writes here, until it ends or closes what is returned; None: another does."""
    file = (folder / _LOCK).open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which workers would inherit
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None
        return (folder / _LOCK).open("ab")  # a file system without locks
    return file


def unlock(folder: Path, file: IO[bytes] | None) -> None:
    """Leave no trace of a lock."""
    (folder / _LOCK).unlink(missing_ok=True)
    if file is not None:
        file.close()


def is_locked(folder: Path) -> bool:
    """Whether another process writes there."""
    if not (folder / _LOCK).exists():
        return False
    mine = lock(folder)
    if mine is not None:
        mine.close()
    return mine is None


def make_atomic(trainer: Any) -> None:
    """Let an Ultralytics trainer write its checkpoints in one go."""
    trainer.wdir, trainer.last, trainer.best = (AtomicPath(path) for path in (trainer.wdir, trainer.last, trainer.best))
