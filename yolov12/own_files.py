"""Checkpoints that this process wrote, recognised by their identity and not by their name.

No weight file is trusted, because loading one can run code. A checkpoint that this process wrote is the exception: it
holds nothing that is not in this process already, such as a model whose class stands in the user's script.

The ranks of a training trust each other's files, and so does a process that starts them. They note the identities in a
file that only this user may read and write, and whose path they know from an environment variable.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["is_own", "join", "remember", "share", "shared", "written"]

_Identity = tuple[int, ...]

_SHARED = "_YOLOV12_OWN_FILES"  # environment variable: path of the file with identities of several processes
_written: set[_Identity] = set()
_notes: Any = None  # that file, if this process has made it: it is deleted with this object


def remember(file: IO[bytes]) -> None:
    """Note that this process has written a file, which is complete.

    Args:
        file: The file, open since it was written: another file may have its name by now.
    """
    _note(_identity(os.fstat(file.fileno())))


def is_own(file: IO[bytes]) -> bool:
    """Return whether this process or one that shares with it wrote a file, and nobody has replaced or changed it since.

    Args:
        file: The file, open.
    """
    identity = _identity(os.fstat(file.fileno()))
    return identity in _written or identity in _noted()


@contextmanager
def written(*paths: str | Path) -> Iterator[None]:
    """Return a context in which other code writes files. Remember those that have changed and belong to this user.

    Args:
        paths: Files that it may write.
    """
    before = [_at(path) for path in paths]
    yield
    for path, was in zip(paths, before, strict=True):
        with suppress(OSError), Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            if _identity(status) != was and status.st_uid == os.geteuid():
                remember(file)


@contextmanager
def shared() -> Iterator[None]:
    """Return a context in which this process and those that it starts trust each other's files, also afterwards."""
    global _notes
    share()
    try:
        yield
    finally:
        _written.update(_noted())
        os.environ.pop(_SHARED, None)
        _notes = None


def share() -> str:
    """Return the path of the file in which this process notes what it writes, for `join` in other processes."""
    global _notes
    if _SHARED not in os.environ:
        _notes = tempfile.NamedTemporaryFile(prefix="yolov12-")  # noqa: SIM115 - it lives as long as this process
        join(_notes.name)
    return os.environ[_SHARED]


def join(path: str) -> None:
    """Trust what other processes note in a file, and note there what this process writes.

    Args:
        path: Result of `share` in another process of this machine.
    """
    os.environ[_SHARED] = path
    for identity in list(_written):
        _note(identity)


def _note(identity: _Identity) -> None:
    _written.add(identity)
    with suppress(OSError), _open_notes("a") as notes:  # on another machine, there is no such file
        notes.write(" ".join(map(str, identity)) + "\n")


def _noted() -> set[_Identity]:
    with suppress(OSError, ValueError), _open_notes("r") as notes:
        return {tuple(map(int, line.split())) for line in notes}
    return set()


def _open_notes(mode: str) -> IO[str]:
    """Open the shared file, if it is this user's. In /tmp, others can make one, or a link, when the name is free."""
    path = os.environ.get(_SHARED, os.devnull)
    notes = open(path, mode, encoding="ascii", opener=_existing)  # noqa: SIM115
    if os.fstat(notes.fileno()).st_uid != os.geteuid():
        notes.close()
        raise PermissionError(f"{path} belongs to another user")
    return notes


def _existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT | os.O_NOFOLLOW)


def _at(path: str | Path) -> _Identity | None:
    with suppress(OSError):
        return _identity(Path(path).stat())
    return None


def _identity(status: os.stat_result) -> _Identity:
    """Return which file it is, and its state. Unlike the time of modification, that of change cannot be set."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
