"""What stays in the inbox because nothing belongs to it, or because it is not read: one line for the log."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from yolov12.printable import printable
from yolov12.watch.log import say
from yolov12.watch.pairing import CLASSES, folders, match

__all__ = ["Remainder", "Reporter", "look"]

_YOUNG_S = 600.0  # the other file of a pair may still come
_LOOK_EVERY_S, _SAY_EVERY_S = 3600.0, 86400.0


@dataclass(frozen=True)
class Remainder:
    """Paths of files and folders that stay in an inbox, relative to it."""

    images: tuple[str, ...] = ()
    """Images that have had no label file for more than ten minutes."""
    labels: tuple[str, ...] = ()
    """Label files that have had no image for more than ten minutes."""
    files: tuple[str, ...] = ()
    """Files and links that are not read."""
    folders: tuple[str, ...] = ()
    """Folders that are not read, other than `lonely`."""
    lonely: str = ""
    """`images` or `labels` if the other one is missing."""
    age_s: float = field(default=0.0, compare=False)
    """Time for which the oldest of the images has been in the inbox."""

    def __str__(self) -> str:
        """Return the line for the log, or an empty one if nothing stays."""
        parts = []
        if self.images:
            have = "have" if len(self.images) > 1 else "has"
            parts.append(
                f"{_counted(self.images, 'image')} {have} had no label file for up to {_time(self.age_s)} "
                f"(first: {printable(self.images[0])})"
            )
        if self.labels:
            have = "have" if len(self.labels) > 1 else "has"
            parts.append(f"{_counted(self.labels, 'label file')} {have} no image (first: {printable(self.labels[0])})")
        if unread := (*self.files, *self.folders):
            kinds = ((self.files, "file"), (self.folders, "folder"))
            counts = " and ".join(_counted(paths, kind) for paths, kind in kinds if paths)
            are = "are" if len(unread) > 1 else "is"
            parts.append(f"{counts} {are} not read (first: {printable(unread[0])})")
        if self.lonely:
            other = "images" if self.lonely == "labels" else "labels"
            parts.append(f"{self.lonely}/ is not read without a folder {other}/ beside it")
        return f"inbox: {', '.join(parts)}" if parts else ""


class Reporter:
    """Says what stays in an inbox: at the start, and when something else does, but at most once a day.

    Args:
        settle_s: Seconds for which a file must not have changed.
    """

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._looked_at = self._said_at = float("-inf")
        self._said = Remainder()

    def report(self, root: Path, now: float, is_last: bool = False) -> None:
        """Look at the inbox at most once an hour, and say what stays there if it is time to do so.

        Args:
            root: The inbox.
            now: Seconds since 1970.
            is_last: True if the watch ends. It is time then.
        """
        if not is_last and 0 <= now - self._looked_at < _LOOK_EVERY_S:
            return
        with suppress(OSError):  # whoever takes images says so
            found = look(root, now, self._settle_s)
            self._looked_at = now
            if found == Remainder():
                self._said = found
            elif found != self._said and (is_last or not 0 <= now - self._said_at < _SAY_EVERY_S):
                say(str(found))
                self._said, self._said_at = found, now


def look(root: Path, now: float, settle_s: float) -> Remainder:
    """Return what stays in an inbox.

    Args:
        root: The inbox.
        now: Seconds since 1970.
        settle_s: Seconds for which an unread file must not have changed: it may be renamed when it is complete.

    Raises:
        OSError: It cannot be read.
    """
    images, labels, ages = list[str](), list[str](), [0.0]
    known: dict[Path, set[str]] = defaultdict(set)
    known[root].add("data.yaml")
    for each in folders(root):
        matches = match(each)
        known[each.images].update(matches.images, (image for image, _ in matches.pairs))
        known[each.labels].update(matches.labels, (label for _, label in matches.pairs), [CLASSES])
        known[root].update(path.name for path in (each.images, each.labels) if path != root)
        old = dict(_old(each.images, matches.images, now))
        ages.extend(old.values())
        images += [_relative(root, each.images, name) for name in old]
        labels += [_relative(root, each.labels, name) for name, _ in _old(each.labels, matches.labels, now)]
    unread: dict[bool, list[str]] = {True: [], False: []}
    for folder, names in known.items():
        for name, is_folder in _others(folder, names, now - settle_s, now):
            unread[is_folder].append(_relative(root, folder, name))
    lonely = [path for path in unread[True] if path in ("images", "labels") and not (root / path).is_symlink()]
    lone = lonely[0] if len(lonely) == 1 else ""
    others = sorted(path for path in unread[True] if path != lone)
    return Remainder(tuple(images), tuple(labels), tuple(sorted(unread[False])), tuple(others), lone, max(ages))


def _old(folder: Path, names: Iterable[str], now: float) -> Iterator[tuple[str, float]]:
    """Yield the files that are not young, and their ages in the inbox. Times of their content may be of years ago."""
    for name in names:
        with suppress(FileNotFoundError):
            age_s = now - (folder / name).lstat().st_ctime
            if age_s >= _YOUNG_S:
                yield name, age_s


def _others(folder: Path, names: set[str], before: float, now: float) -> list[tuple[str, bool]]:
    """Return names in a folder that are not among others, and whether they are folders. Hidden ones are left out."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == "." or entry.name in names:
                continue
            with suppress(FileNotFoundError):
                is_folder = entry.is_dir()
                if is_folder or not before < entry.stat(follow_symlinks=False).st_mtime <= now:
                    found.append((entry.name, is_folder))
    return found


def _relative(root: Path, folder: Path, name: str) -> str:
    return name if folder == root else f"{folder.name}/{name}"


def _counted(paths: tuple[str, ...], kind: str) -> str:
    return f"{len(paths)} {kind}{'s' if len(paths) > 1 else ''}"


def _time(seconds: float) -> str:
    for unit, size_s in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if (number := int(seconds // size_s)) > 1 or unit == "minute":
            break
    return f"{number} {unit}s"
