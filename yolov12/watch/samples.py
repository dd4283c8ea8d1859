"""Checks of an image and its label file. A sample that fails one is set aside with the reason."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from yolov12.printable import printable

__all__ = ["IMAGES", "TASKS", "Box", "UnusableError", "check_image", "read_label"]

IMAGES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Suffixes of images."""
TASKS = ("detect", "segment", "obb")
"""Tasks whose labels can be checked."""

_FORMATS = {"BMP", "JPEG", "MPO", "PNG", "TIFF", "WEBP"}
_SMALLEST = 10  # pixels; Ultralytics leaves smaller images out
_LARGEST_LABEL = 16 << 20  # bytes
_LONGEST_NAME = 100  # characters


class UnusableError(Exception):
    """An image or a label file cannot be used. The message is the reason."""


@dataclass(frozen=True)
class Box:
    """One line of a label file."""

    name: str
    """Name of the class."""
    values: tuple[float, ...]
    """Coordinates, as fractions of the image."""


def check_image(data: bytes) -> None:
    """Decode an image completely.

    Args:
        data: Content of the file.

    Raises:
        UnusableError: It is damaged, incomplete, too small, or not an image.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.verify()  # checksums, and the end of the file
            with Image.open(io.BytesIO(data)) as image:
                kind, size = image.format, image.size
                image.load()
    except Exception as error:  # a damaged file may raise any error
        raise UnusableError(f"the image cannot be decoded: {error}") from error
    if kind not in _FORMATS:
        raise UnusableError(f"the image has the format {kind}: use one of {', '.join(sorted(_FORMATS))}")
    if min(size) < _SMALLEST:
        raise UnusableError(
            f"the image has {size[0]} x {size[1]} pixels: at least {_SMALLEST} x {_SMALLEST} are needed"
        )


def read_label(data: bytes, names: Mapping[int, str], task: str) -> tuple[Box, ...]:
    """Read a label file in YOLO format. An empty one says that the image shows no object.

    Args:
        data: Content of the file.
        names: Class id → name.
        task: One of `TASKS`.

    Raises:
        UnusableError: A line has a wrong number of columns, an id without a name, or a value outside of 0 to 1.
    """
    if len(data) > _LARGEST_LABEL:
        raise UnusableError(f"the label file has {len(data)} bytes")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UnusableError("the label file is not text") from error
    return tuple(_box(number, line.split(), names, task) for number, line in enumerate(lines, 1) if line.strip())


def _box(number: int, words: list[str], names: Mapping[int, str], task: str) -> Box:
    where = f"line {number} of the label file"
    if not _fits(task, len(words)):
        raise UnusableError(f"{where} has {len(words)} columns: {_COLUMNS[task]}")
    try:
        index, *values = (float(word) for word in words)
    except ValueError as error:
        raise UnusableError(f"{where} has a word that is not a number") from error
    if not index.is_integer() or (name := names.get(int(index))) is None:
        raise UnusableError(f"{where} has the class id {words[0]}, which has no name: names are {_listed(names)}")
    if not name.strip() or len(name) > _LONGEST_NAME or printable(name) != name:
        raise UnusableError(f"{where} has the class '{name[:_LONGEST_NAME]}', which is not a usable name")
    if not all(0 <= value <= 1 for value in values):  # NaN is not, either
        raise UnusableError(f"{where} has a value outside of 0 to 1: coordinates are fractions of the image")
    if len(values) == 4 and min(values[2:]) <= 0:
        raise UnusableError(f"{where} has a box without width or height")
    return Box(name.strip(), tuple(values))


_COLUMNS = {
    "detect": "a class id and x, y, width, height are needed, or a polygon",
    "segment": "a class id and at least three points are needed",
    "obb": "a class id and four corners are needed",
}


def _fits(task: str, columns: int) -> bool:
    is_polygon = columns >= 7 and columns % 2 == 1
    return columns == 9 if task == "obb" else is_polygon or (task == "detect" and columns == 5)


def _listed(names: Mapping[int, str]) -> str:
    first = [f"{index} {name}" for index, name in sorted(names.items())[:8]]
    return ", ".join(first) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
