"""The inbox: which labelled images in it are complete, and what their class ids mean."""

from __future__ import annotations

import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from yolov12.errors import DataError
from yolov12.printable import printable
from yolov12.watch.leftovers import Leftovers, Version, version
from yolov12.watch.pairing import CLASSES, Folder, folders, match
from yolov12.watch.remainder import Reporter

__all__ = ["Inbox", "Pair"]

_UNREADABLE: Mapping[int, str] = {}


@dataclass(frozen=True)
class Pair:
    """An image and its label file, both complete."""

    image: Path
    label: Path
    names: Mapping[int, str]
    """Class id → name, for the ids in the label file."""


class Inbox:
    """Reader of an inbox. It changes nothing there.

    Args:
        folder: The inbox, with pairs `name.jpg` and `name.txt`, or with such files in `images/` and `labels/`.
        names: Class names for inboxes without a list of their own.
        settle_s: Seconds for which a file must not have changed.
    """

    def __init__(self, folder: Path, names: Mapping[int, str], settle_s: float) -> None:
        self.folder, self._names, self._settle_s = folder, names, settle_s
        self._seen: dict[Path, tuple[Version, float]] = {}
        self._texts: dict[Path, tuple[bytes, float]] = {}  # list of names → content, and since when
        self._leftovers, self._reporter = Leftovers(), Reporter(settle_s)
        self.waiting = 0
        """Number of pairs in the last `complete` that had changed shortly before."""
        self.problems: list[str] = []
        """Reasons in the last `complete` for which files stay where they are."""

    def complete(self, now: float, most: int = sys.maxsize) -> list[Pair]:
        """Return the pairs that are complete, in the order of their names.

        Args:
            now: Seconds since 1970.
            most: Number of pairs after which no others are looked for.

        Raises:
            OSError: The inbox cannot be read.
        """
        before, self._seen = self._seen, {}
        self.waiting, self.problems, found = 0, [], list[Pair]()
        root = self.folder.resolve()  # one folder for a pair and its names, even if a link changes now
        there = folders(root)
        self._leftovers.keep(there)
        for each in there:
            matches = match(each)
            counts = Counter(label for _, label in matches.pairs)
            shared = {label for label, count in counts.items() if count > 1}
            leftovers = self._leftovers.find(each, matches, now) - shared
            self._explain(shared, leftovers)
            unclear = shared | leftovers
            pairs = [names for names in matches.pairs if names[1] not in unclear]
            names = self._names_for(root, each, now, before) if pairs else None
            for image_name, label_name in pairs if names is not _UNREADABLE else []:
                if len(found) >= most:
                    self._seen = {**before, **self._seen}
                    return found
                pair = each.images / image_name, each.labels / label_name
                settled = [self._is_settled(file, now, before) for file in pair]
                if names is not None and all(settled):
                    found.append(Pair(*pair, names))
                else:
                    self.waiting += 1
        return found

    def has_changed(self, pair: Pair) -> bool:
        """Return whether a file of a pair has changed since the last `complete`.

        Args:
            pair: A pair that it returned.

        Raises:
            FileNotFoundError: Somebody has removed a file.
        """
        return any(version(path.lstat()) != self._seen[path][0] for path in (pair.image, pair.label))

    def alone(self) -> Iterator[Path]:
        """Return the images that have no label file."""
        for each in folders(self.folder.resolve()):
            yield from (each.images / name for name in match(each).images)

    def report(self, now: float, is_last: bool = False) -> None:
        """Say in the log what stays in the inbox without a partner or is not read, if it is time to do so.

        Args:
            now: Seconds since 1970.
            is_last: True if the watch ends.
        """
        self._reporter.report(self.folder.resolve(), now, is_last)

    def _explain(self, shared: set[str], leftovers: set[str]) -> None:
        """Add the reasons for which label files and their images stay where they are."""
        if shared:
            first = printable(min(shared))
            self.problems.append(
                f"{len(shared)} label files belong to two images each (first: {first}): rename the images"
            )
        if leftovers:
            self.problems.append(
                f"{len(leftovers)} label files (first: {printable(min(leftovers))}) were in the inbox for more than an "
                "hour before an image of the same name came, so they may belong to earlier images: save them again to "
                "use them, or delete them"
            )

    def _names_for(
        self, root: Path, folder: Folder, now: float, before: Mapping[Path, Any]
    ) -> Mapping[int, str] | None:
        """Return the names of the class ids; None while their list changes, `_UNREADABLE` if it cannot be read."""
        for file in (folder.labels / CLASSES, root / CLASSES, root / "data.yaml"):
            if not _is_regular(file):
                continue
            text = file.read_bytes()  # first: if the file changes from now on, this is still the old text
            if not self._is_settled(file, now, before) and not self._is_same_text(file, text, now):
                return None
            try:
                return _read_names(file.suffix, text.decode("utf-8-sig"))
            except Exception as error:  # PyYAML raises any error, such as AttributeError for an impossible date
                self.problems.append(f"{file} cannot be read, so its images stay there: {error}")
                return _UNREADABLE
        return self._names

    def _is_settled(self, path: Path, now: float, before: Mapping[Path, tuple[Version, float]]) -> bool:
        try:
            status = path.lstat()
        except FileNotFoundError:
            return False
        current = version(status)
        seen, since = before.get(path, (current, now))
        since = since if seen == current and since <= now else now  # later only if the clock was set back
        self._seen[path] = current, since
        # The writer's clock may differ from ours, so watching the file counts, too.
        return now - min(since, status.st_mtime) >= self._settle_s

    def _is_same_text(self, file: Path, text: bytes, now: float) -> bool:
        """Return whether a list has had the same content for long: some programs write it with every image."""
        seen, since = self._texts.get(file, (text, now))
        since = since if seen == text and since <= now else now
        self._texts[file] = text, since
        return now - since >= self._settle_s


def _read_names(suffix: str, text: str) -> Mapping[int, str]:
    if suffix == ".txt":  # labelImg's list: a name per line, the first has the id 0
        listed = {index: line.strip() for index, line in enumerate(text.splitlines()) if line.strip()}
        if not listed:  # a power loss may have left it empty
            raise DataError("it has no names of classes")
        return listed
    found = yaml.safe_load(text)
    names = found.get("names") if isinstance(found, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(isinstance(index, int) for index in names):
        raise DataError("it has no names: of classes")
    return {index: str(name).strip() for index, name in names.items()}


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False
