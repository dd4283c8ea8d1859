"""Label files that an image has left behind, such as those that an annotator saves again after the image was taken."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from yolov12.watch.pairing import Folder, Matches

__all__ = ["Leftovers", "Version", "version"]

Version = tuple[int, int, int]
"""Inode, size and time of a file."""

_ALONE_S = 3600.0
_READ_AGAIN_S = 600.0  # reading the versions of 100,000 label files takes a while, so it is not done at each look


@dataclass
class _Look:
    """Label files without an image in the last look at a folder."""

    at: float = 0.0  # seconds since 1970
    read_at: float = 0.0  # when all versions were read
    alone: dict[str, tuple[Version, float]] = field(default_factory=dict)  # name → version, and alone since when


class Leftovers:
    """Finds images whose label file may belong to an earlier image of the same name, as counters of cameras repeat.

    A label file counts as a leftover if this watch has seen it unchanged for more than an hour without an image. Only
    what the watch sees counts. Times of files say nothing: a data set may be copied with those of years ago. So the
    hour begins anew after a restart of the watch, and a pair that is complete at its start is taken.
    """

    def __init__(self) -> None:
        self._looks: dict[Path, _Look] = {}

    def keep(self, folders: Collection[Folder]) -> None:
        """Forget all other folders.

        Args:
            folders: Folders that are in the inbox.
        """
        there = {folder.labels for folder in folders}
        self._looks = {path: look for path, look in self._looks.items() if path in there}

    def find(self, folder: Folder, matches: Matches, now: float) -> set[str]:
        """Return the label files that now have an image, but are leftovers. One that has changed since is none.

        Args:
            folder: The folder.
            matches: What is in it.
            now: Seconds since 1970.

        Raises:
            OSError: A label file cannot be read.
        """
        last = self._looks.get(folder.labels, _Look(at=now, read_at=now))
        found = _kept(folder.labels, last, {label for _, label in matches.pairs}) if last.alone else {}
        is_due = not 0 <= now - last.read_at < _READ_AGAIN_S
        look = _Look(now, now if is_due else last.read_at, dict(found))
        for name in matches.labels:
            then, since = last.alone.get(name, (None, now))
            current = _read(folder.labels / name) if is_due or then is None else then
            if current is not None:
                look.alone[name] = current, (min(since, now) if current == then else now)
        self._looks[folder.labels] = look
        return set(found)


def _kept(folder: Path, last: _Look, paired: set[str]) -> dict[str, tuple[Version, float]]:
    return {
        name: (then, since)
        for name, (then, since) in last.alone.items()
        if name in paired and last.at - since > _ALONE_S and _read(folder / name) == then
    }


def version(status: os.stat_result) -> Version:
    """Return the version of a file, which changes when somebody writes it.

    Args:
        status: Status of the file.
    """
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(label: Path) -> Version | None:
    try:
        return version(label.lstat())
    except FileNotFoundError:
        return None
