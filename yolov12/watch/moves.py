"""Moves and copies files. After a kill or a power loss, a file is whole under the old name or the new one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from yolov12 import files

__all__ = ["FULL", "can_rename", "copy", "digest", "end_trial", "move", "same", "save_text", "sync_folder"]

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk."""

_PROBE = ".yolov12-watch.probe"


def move(source: Path, target: Path) -> None:
    """Move a file. Between file systems it is copied first, so a kill may leave the whole file in both places.

    Args:
        source: The file to move.
        target: Its new path. A file with this name is replaced.
    """
    with source.open("rb") as file:
        os.fsync(file.fileno())  # whoever wrote the file may not have done it
    try:
        os.rename(source, target)  # noqa: PTH104 - plain os.rename: this step must be atomic
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy(source, target)
        source.unlink()
    sync_folder(target.parent)


def copy(source: Path, target: Path, last_check: Callable[[], None] = lambda: None) -> None:
    """Copy the content of a file. The target is replaced in one step, and keeps its permissions.

    Args:
        source: The file to copy.
        target: Path of the copy.
        last_check: Called when the copy is complete. If it raises an error, the target is not replaced.
    """
    with files.replacing(target) as unfinished:
        shutil.copyfile(source, unfinished)
        with suppress(FileNotFoundError):
            shutil.copymode(target, unfinished)
        last_check()
    sync_folder(target.parent)


def save_text(path: Path, text: str) -> None:
    """Write a text file in one step.

    Args:
        path: The file to write.
        text: Its content.
    """
    files.write(path, lambda file: file.write(text.encode()))
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss.

    Args:
        folder: The folder, in which a file was renamed.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def can_rename(source: Path, target: Path) -> bool:
    """Return whether files can be moved from one folder to another without a copy, by doing so with an empty file.

    Devices say less: two bind mounts of one file system, such as volumes of a container, have the same one, and so have
    two quotas of one disk, but neither can be crossed by a rename.

    Args:
        source: An existing folder.
        target: Another.

    Returns:
        False also if it is unknown, such as in a folder that cannot be written.
    """
    probe, moved = source / _PROBE, target / _PROBE
    end_trial(source)
    try:
        probe.open("xb").close()  # follows no link
        os.rename(probe, moved)  # noqa: PTH104 - like that of `move`
        moved.unlink()
    except OSError:
        end_trial(source)
        return False
    return True


def end_trial(source: Path) -> None:
    """Remove what a kill within `can_rename` has left.

    Args:
        source: Its first folder.
    """
    with suppress(OSError):
        (source / _PROBE).unlink(missing_ok=True)


def same(one: Path, other: Path) -> bool:
    """Return whether two files have the same content. A file that is not there is like no other.

    Args:
        one: A file.
        other: Another.
    """
    with suppress(FileNotFoundError):  # not filecmp, which remembers files by size and time
        return one.stat().st_size == other.stat().st_size and digest(one) == digest(other)
    return False


def digest(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits.

    Args:
        path: The file to read.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
