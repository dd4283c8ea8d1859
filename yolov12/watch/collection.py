"""The collection: a YOLO data set of all accepted images, and a folder for those that were set aside.

Names of files begin with the digest of the image, so the folders themselves say what was taken. A label is moved before
its image: an image that is still in the inbox without its label was interrupted, and `recover` completes the move.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from yolov12.errors import DataError
from yolov12.printable import printable
from yolov12.training.classes.names import match
from yolov12.watch import moves
from yolov12.watch.damage import has_content, names_of_attempts
from yolov12.watch.digests import digest_of
from yolov12.watch.inbox import Inbox, Pair
from yolov12.watch.jpeg import end_jpeg
from yolov12.watch.rejected import REASON, set_aside
from yolov12.watch.samples import IMAGES, Box, count_objects
from yolov12.watch.tally import Tally

__all__ = ["Collection", "Entry"]

_SPLITS = ("train", "val")
_DIGITS = 32  # of the digest, in names of files
_NUMBER = re.compile(r"-\d+$")  # distinguishes files of one name in rejected/


@dataclass(frozen=True)
class Entry:
    """One image of the collection."""

    image: Path
    split: str
    """`train` or `val`."""
    objects: Mapping[int, int]
    """Class id → number of objects in its label."""


class Collection:
    """The accepted images in `dataset/` of a work folder, and those set aside in `rejected/`.

    Args:
        work: The work folder.
        names: Class names of the data set that the line began with. The names in the collection come first.
        val_fraction: Fraction of the images that is for validation.
        used: Digests of the images that attempts have used, as in names of files.

    Raises:
        DataError: The collection's data.yaml cannot be read, or it is gone and the attempts do not have all its names.
    """

    def __init__(self, work: Path, names: Sequence[str], val_fraction: float, used: Iterable[str] = ()) -> None:
        self.folder, self.rejected = work / "dataset", work / "rejected"
        self._received = self.folder / "received"
        self._val_fraction = val_fraction
        for name in (*(f"{kind}/{split}" for kind in ("images", "labels") for split in _SPLITS), "received"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.rejected.mkdir(exist_ok=True)
        self.names = self._read_names()
        self.used = set(used)
        self.entries: dict[str, Entry] = {}
        self.new: dict[str, Entry] = {}
        """Digest → image that no attempt has used yet."""
        self._counts, self._new_counts = Tally(), Tally()
        for split in _SPLITS:
            for image in sorted((self.folder / "images" / split).iterdir()):
                if image.suffix in IMAGES and printable(image.name) == image.name:  # others cannot stand in a list
                    self._add(image, self._label(split, image.stem))
        labels = self._labels("*-*.txt")
        # Labels whose images did not arrive.
        self._unfinished = {digest_of(label): label for label in labels if digest_of(label) not in self.entries}
        self._old_ids = set(self.class_ids(names))

    @property
    def data(self) -> Path:
        """Path of the collection's data.yaml."""
        return self.folder / "data.yaml"

    def class_ids(self, names: Iterable[str]) -> list[int]:
        """Return the ids of classes. Names that are new get the next ids.

        Args:
            names: Names, in the order in which new ones are added.
        """
        wanted = list(names)
        found = match(dict(enumerate(self.names)), dict(enumerate(wanted)))
        if None in found or not self.data.exists():
            names_then = [*self.names, *(name for name, index in zip(wanted, found, strict=True) if index is None)]
            self._write_names(names_then)  # first: an id must not be used before its name is on the disk
            self.names = names_then
            found = match(dict(enumerate(self.names)), dict(enumerate(wanted)))
        return [index for index in found if index is not None]

    def find(self, digest: str) -> Entry | None:
        """Return the image of the collection with a content, or None. It is forgotten if somebody has deleted it.

        Args:
            digest: SHA-256 of the image.
        """
        entry = self.entries.get(digest[:_DIGITS])
        if entry is None or entry.image.exists() or not entry.image.parent.exists():  # without it, a disk is away
            return entry
        self._forget(digest[:_DIGITS])
        if (label := self._label(entry.split, entry.image.stem)).exists():
            self._unfinished[digest[:_DIGITS]] = label
        return None

    def accept(self, pair: Pair, digest: str, boxes: Sequence[Box]) -> str:
        """Move a pair into the collection, its class ids changed to those of the collection.

        Args:
            pair: Image and label file.
            digest: SHA-256 of the image.
            boxes: Content of the label file.

        Returns:
            `train` or `val`.
        """
        digest = digest[:_DIGITS]
        names = list(dict.fromkeys(box.name for box in boxes))
        # A list that has `a` and `A` means two classes, also in an image that shows one of them.
        forms = {name.lower() for name in names}
        others = {name: None for name in pair.names.values() if name.lower() in forms and name not in names and name}
        ids = dict(zip([*names, *others], self.class_ids([*names, *others]), strict=True))
        label = self._unfinished.get(digest) or self._label(
            self._split(digest, ids.values()), f"{digest}-{_plain(pair.image.stem)}"
        )
        self._unfinished[digest] = label
        lines = [" ".join([str(ids[box.name]), *(f"{value:.8g}" for value in box.values)]) for box in boxes]
        moves.save_text(label, "".join(f"{line}\n" for line in lines))
        self._received.mkdir(exist_ok=True)  # somebody may have removed it
        moves.move(pair.label, self._received / label.name)
        self._finish(pair.image, label)
        return label.parent.name

    def set_aside(self, pair: Pair, digest: str, reason: str) -> Path:
        """Move a pair into the folder of rejected images, beside a text file with the reason.

        Args:
            pair: Image and label file.
            digest: SHA-256 of the image.
            reason: Why it cannot be used.

        Returns:
            The text file.
        """
        return set_aside(self.rejected, pair, f"{digest[:_DIGITS]}-{_plain(pair.image.stem)}", reason)

    def recover(self, inbox: Inbox) -> list[str]:
        """Complete the moves that a kill has interrupted.

        Args:
            inbox: The inbox, whose images without a label file are looked at.

        Returns:
            Reasons for which images stay where they are.

        Raises:
            OSError: The disk is full, or a folder cannot be read.
        """
        self.rejected.mkdir(exist_ok=True)
        moves.end_trial(inbox.folder)
        if not (alone := [*inbox.alone()]):
            return []
        there = {path.stem for path in self.rejected.iterdir() if path.suffix in IMAGES}
        stems = (note.name.removesuffix(REASON) for note in self.rejected.glob(f"*{REASON}"))
        notes = {digest_of(Path(stem)): stem for stem in stems if stem not in there}
        # A label that has not left the inbox may have been taken back: its image is not accepted without it.
        labels = {key: label for key, label in self._unfinished.items() if (self._received / label.name).exists()}
        places = [*(label.stem for label in labels.values()), *notes.values()]
        copies: dict[str, list[Path]] = {}
        if not moves.can_rename(inbox.folder, self.folder):
            for path in (*(entry.image for entry in self.entries.values()), *self.rejected.iterdir()):
                if path.suffix in IMAGES:
                    copies.setdefault(digest_of(path), []).append(path)
                    places.append(path.stem)
        names = {place.partition("-")[2] for place in places}
        names |= {_NUMBER.sub("", name) for name in names}
        stuck = []
        for image in alone:
            if _plain(image.stem) not in names:
                continue  # to read all images that wait for a label could take hours
            try:
                digest = moves.digest(image)[:_DIGITS]
                if label := labels.get(digest):
                    self._finish(image, label)
                elif stem := notes.get(digest):
                    moves.move(image, self.rejected / f"{stem}{image.suffix.lower()}")
                elif any(copy.read_bytes() == image.read_bytes() for copy in copies.get(digest, ())):
                    image.unlink()  # the last step of a move between file systems
            except OSError as error:
                if error.errno in moves.FULL:
                    raise
                stuck.append(f"{printable(image.name)} stays in the inbox: {error}")
        return stuck

    def mark_used(self, digests: Iterable[str]) -> None:
        """Note that an attempt uses images.

        Args:
            digests: Digests, as in names of files.
        """
        for digest in digests:
            self.used.add(digest)
            if (entry := self.new.pop(digest, None)) is not None:
                self._new_counts.add(entry.split, entry.objects, -1)

    def mark_new(self, digests: Iterable[str]) -> None:
        """Note that no attempt has used images after all.

        Args:
            digests: Digests, as in names of files.
        """
        for digest in digests:
            self.used.discard(digest)
            if digest not in self.new and (entry := self.entries.get(digest)) is not None:
                self.new[digest] = entry
                self._new_counts.add(entry.split, entry.objects)

    def new_by_class(self) -> dict[str, int]:
        """Return for each class the number of images with it that no attempt has used."""
        return {self.names[index]: count for index, count in self._new_counts.by_class().items()}

    def used_by_new_class(self) -> dict[str, int]:
        """Return for each class that the line's data set does not have the number of its images that were used."""
        new = self._new_counts.by_class()
        counts = {index: count for index, count in self._counts.by_class().items() if index not in self._old_ids}
        return {self.names[index]: count - new.get(index, 0) for index, count in counts.items()}

    def objects_by_class(self, entries: Iterable[Entry]) -> dict[str, int]:
        """Return for each class its number of objects.

        Args:
            entries: Images of the collection.
        """
        counts = sum((Counter(entry.objects) for entry in entries), Counter[int]())
        return {self.names[index]: count for index, count in sorted(counts.items())}

    def set_aside_since(self, start: float) -> list[dict[str, str]]:
        """Return `file` and `reason` of what was set aside.

        Args:
            start: Seconds since 1970.
        """
        notes = sorted(note for note in self.rejected.glob(f"*{REASON}") if note.stat().st_mtime >= start)
        texts = [note.read_text("utf-8", "replace").strip().partition(": ") for note in notes]
        return [{"file": name, "reason": reason} for name, _, reason in texts]

    @property
    def is_trainable(self) -> bool:
        """True if there are images for training and for validation."""
        return self._counts.splits() == set(_SPLITS)

    def snapshot(self, folder: Path) -> Path:
        """Write a data set yaml that names the images that are in the collection now.

        Args:
            folder: Folder for the yaml and two lists of images.

        Returns:
            The yaml.
        """
        for cache in (self.folder / "labels").glob("*.cache"):
            cache.unlink()  # Ultralytics compares sizes: it would miss a class id that was corrected by hand
        for split in _SPLITS:
            images = sorted(str(entry.image.absolute()) for entry in self.entries.values() if entry.split == split)
            moves.save_text(folder / f"{split}.txt", "".join(f"{image}\n" for image in images))
        names = dict(enumerate(self.names))
        lists = {split: str((folder / f"{split}.txt").absolute()) for split in _SPLITS}
        moves.save_text(folder / "data.yaml", yaml.safe_dump({**lists, "names": names}, sort_keys=False))
        return folder / "data.yaml"

    def _finish(self, image: Path, label: Path) -> None:
        """Move an image to its label, the last step of accepting it."""
        target = self.folder / "images" / label.parent.name / f"{label.stem}{image.suffix.lower()}"
        moves.move(image, target)
        with suppress(OSError, MemoryError):
            end_jpeg(target)
        self._add(target, label)
        self._unfinished.pop(digest_of(label), None)

    def _add(self, image: Path, label: Path) -> None:
        entry, digest = Entry(image, label.parent.name, count_objects(label, len(self.names))), digest_of(image)
        if digest in self.entries:  # in both splits
            self._forget(digest)
        self.entries[digest] = entry
        self._counts.add(entry.split, entry.objects)
        if digest not in self.used:
            self.new[digest] = entry
            self._new_counts.add(entry.split, entry.objects)

    def _forget(self, digest: str) -> None:
        entry = self.entries.pop(digest)
        self._counts.add(entry.split, entry.objects, -1)
        if self.new.pop(digest, None) is not None:
            self._new_counts.add(entry.split, entry.objects, -1)

    def _split(self, digest: str, classes: Iterable[int]) -> str:
        """Choose by the digest, but so that a class with two images has one in each split."""
        for index in sorted(classes):
            there = self._counts.splits(index)
            if len(there) < len(_SPLITS):
                return "val" if "train" in there else "train"
        return "val" if int(digest[:8], 16) < self._val_fraction * 16**8 else "train"

    def _label(self, split: str, stem: str) -> Path:
        return self.folder / "labels" / split / f"{stem}.txt"

    def _labels(self, pattern: str) -> Iterator[Path]:
        return (label for split in _SPLITS for label in (self.folder / "labels" / split).glob(pattern))

    def _read_names(self) -> list[str]:
        if not has_content(self.data):
            if names := names_of_attempts(self.folder.parent / "history", self._labels("*.txt")):
                self._write_names(names)
            return names
        try:
            names = yaml.safe_load(self.data.read_text("utf-8"))["names"]
            return [str(names[index]) for index in range(len(names))]
        except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.data} cannot be read: {error!r}. Restore it: its names belong to the labels"
            ) from error

    def _write_names(self, names: Sequence[str]) -> None:
        content = {"train": "images/train", "val": "images/val", "names": dict(enumerate(names))}
        moves.save_text(self.data, yaml.safe_dump(content, sort_keys=False))


def _plain(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:80]
