"""Files that are whole whatever happens: a kill or a full disk while one is written leaves the one before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["AtomicPath", "make_atomic", "replacing"]


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


def make_atomic(trainer: Any) -> None:
    """Let an Ultralytics trainer write its checkpoints in one go."""
    trainer.wdir, trainer.last, trainer.best = (AtomicPath(path) for path in (trainer.wdir, trainer.last, trainer.best))
