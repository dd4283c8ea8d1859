"""Digests in names of files: an image, its label, and the reason why it was set aside begin with that of the image."""

from __future__ import annotations

from pathlib import Path

__all__ = ["digest_of", "digests_in"]


def digest_of(path: Path) -> str:
    """Return the digest in the name of a file of the collection.

    Args:
        path: Image, label, or reason.
    """
    return path.name.partition("-")[0].partition(".")[0]


def digests_in(file: Path) -> set[str]:
    """Return the digests of images in a list of paths or of digests; none if there is no such list.

    Args:
        file: The list, with one in each line.
    """
    if not file.exists():
        return set()
    return {digest_of(Path(line)) for line in file.read_text("utf-8", "replace").splitlines() if line}
