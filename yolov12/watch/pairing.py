"""Pairs of files in an inbox: an image and its label file have the same name."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from yolov12.watch.samples import IMAGES

__all__ = ["CLASSES", "Folder", "Matches", "folders", "match", "names_in"]

CLASSES = "classes.txt"
"""labelImg's list of class names."""


@dataclass(frozen=True)
class Folder:
    """Two folders of the inbox: one with images, one with label files. They may be the same."""

    images: Path
    labels: Path


@dataclass(frozen=True)
class Matches:
    """Names of the files in a folder, in their order."""

    pairs: list[tuple[str, str]]
    """Images and their label files."""
    images: list[str]
    """Images without a label file."""
    labels: list[str]
    """Label files without an image."""


def folders(root: Path) -> list[Folder]:
    """Return the folders that are read: the inbox, and `images/` and `labels/` in it if both are there.

    Args:
        root: The inbox.
    """
    inner = Folder(root / "images", root / "labels")
    found = [Folder(root, root)]
    if all(path.is_dir() and not path.is_symlink() for path in (inner.images, inner.labels)):
        found.append(inner)
    return found


def match(folder: Folder) -> Matches:
    """Find the label file of each image. Links and hidden files are left out.

    Names are the same if their Unicode normal forms (NFC) are: macOS may decompose the letters of one of them.

    Args:
        folder: The folder to read.

    Raises:
        OSError: It cannot be read.
    """
    labels = sorted(name for name in names_in(folder.labels) if name[-4:].lower() == ".txt" and name != CLASSES)
    exact = {_stem(name): name for name in labels}  # of a.TXT and a.txt, the latter
    normal = {_normal(stem): name for stem, name in exact.items()}
    pairs, alone = list[tuple[str, str]](), list[str]()
    for image in sorted(name for name in names_in(folder.images) if os.path.splitext(name)[1].lower() in IMAGES):  # noqa: PTH122
        stem = _stem(image)
        label = exact.get(stem) or normal.get(_normal(stem))
        if label:
            pairs.append((image, label))
        else:
            alone.append(image)
    paired = {label for _, label in pairs}
    return Matches(pairs, alone, [name for name in labels if name not in paired])


def names_in(folder: Path) -> Iterator[str]:
    """Return the names of the ordinary files in a folder, without links and hidden files.

    Args:
        folder: The folder to read.

    Raises:
        OSError: It cannot be read.
    """
    with os.scandir(folder) as entries:
        yield from (each.name for each in entries if each.is_file(follow_symlinks=False) and each.name[0] != ".")


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122 - paths of 100,000 names take a second


def _normal(stem: str) -> str:
    return stem if stem.isascii() else unicodedata.normalize("NFC", stem)
