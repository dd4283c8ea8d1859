"""Numbers of images by class and split, counted as images come and go: the collection may be large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

__all__ = ["Tally"]


class Tally:
    """Numbers of images."""

    def __init__(self) -> None:
        self._images = Counter[str]()  # by split
        self._with = Counter[tuple[int, str]]()  # by class id and split

    def add(self, split: str, classes: Collection[int], change: int = 1) -> None:
        """Count an image.

        Args:
            split: `train` or `val`.
            classes: Ids of the classes of which it has objects.
            change: -1 if it is gone.
        """
        self._images[split] += change
        for index in classes:
            self._with[index, split] += change

    def by_class(self) -> dict[int, int]:
        """Return the number of images with each class, without those of which there is none."""
        counts = Counter[int]()
        for (index, _), count in self._with.items():
            counts[index] += count
        return dict(+counts)

    def splits(self, index: int | None = None) -> set[str]:
        """Return the splits that have an image.

        Args:
            index: Id of a class that the image must have.
        """
        if index is None:
            return {split for split, count in self._images.items() if count > 0}
        return {split for split in self._images if self._with[index, split] > 0}
