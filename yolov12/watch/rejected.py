"""The folder of pairs that were set aside, each beside a text file with the reason."""

from __future__ import annotations

from pathlib import Path

from yolov12.printable import printable
from yolov12.watch import moves
from yolov12.watch.inbox import Pair

__all__ = ["REASON", "set_aside"]

REASON = ".reason.txt"
"""Ending of the text files."""


def set_aside(folder: Path, pair: Pair, base: str, reason: str) -> Path:
    """Move a pair into the folder. Of pairs with the same name and content, only the last is kept.

    Args:
        folder: The folder. It is made if somebody has removed it, because the disk was full.
        pair: Image and label file.
        base: Stem of the new names. A number is added if there is such an image or label.
        reason: Why the pair cannot be used.

    Returns:
        The text file.
    """
    folder.mkdir(exist_ok=True)
    suffix, earlier, stem = pair.image.suffix.lower(), list[str](), base
    endings = (suffix, ".txt")
    while any((folder / f"{stem}{ending}").exists() for ending in endings):  # a.jpg and a.png may be the same file
        earlier.append(stem)
        stem = f"{base}-{len(earlier) + 1}"
    note = folder / f"{stem}{REASON}"
    moves.save_text(note, f"{printable(pair.image.name)}: {printable(reason)}\n")
    moves.move(pair.label, folder / f"{stem}.txt")
    moves.move(pair.image, folder / f"{stem}{suffix}")
    for twin in earlier:  # a sender may repeat all its files again and again
        if all(moves.same(folder / f"{twin}{ending}", folder / f"{stem}{ending}") for ending in endings):
            for ending in (REASON, *endings):
                (folder / f"{twin}{ending}").unlink(missing_ok=True)
    return note
