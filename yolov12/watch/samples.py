"""Checks of an image and its label file. A sample that fails one is set aside with the reason."""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from yolov12.printable import printable
from yolov12.watch.jpeg import has_end

__all__ = [
    "IMAGES",
    "LARGEST_IMAGE",
    "LARGEST_LABEL",
    "TASKS",
    "Box",
    "UnusableError",
    "check_image",
    "count_objects",
    "read",
    "read_label",
]

IMAGES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Suffixes of images."""
TASKS = ("detect", "segment", "obb")
"""Tasks whose labels can be checked."""

LARGEST_IMAGE = 1 << 30
"""Bytes of an image file that are read at most. A larger one could take all memory of a small machine."""
LARGEST_LABEL = 16 << 20
"""Bytes of a label file that are read at most."""

_FORMATS = {"BMP", "JPEG", "MPO", "PNG", "TIFF", "WEBP"}
_JPEG = {"JPEG", "MPO"}
_INCOMPLETE = (
    "the image is incomplete: its JPEG data have no end marker, so the file was cut, or ends in zeros. Send it again"
)
_SMALLEST = 10  # pixels; Ultralytics leaves smaller images out
_VARIED = {"BMP", "TIFF"}  # formats of which Pillow reads more variants than OpenCV, with which a training reads
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


def read(path: Path, most: int) -> bytes:
    """Read a file, but not through a link that has taken its name.

    Args:
        path: The file.
        most: Largest number of bytes.

    Raises:
        OSError: It cannot be read.
        UnusableError: It is larger.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise UnusableError(f"{path.suffix} file of {size >> 20} MiB: at most {most >> 20} MiB are read")
        return file.read()


def check_image(data: bytes) -> None:
    """Decode an image completely.

    Args:
        data: Content of the file.

    Raises:
        MemoryError: There is not enough memory to decode it.
        UnusableError: It is damaged, incomplete, too small, not an image, or a kind that a training cannot read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.verify()  # checksums, and the end of the file
            with Image.open(io.BytesIO(data)) as image:
                kind, size = image.format, image.size
                if kind in _JPEG and not has_end(data):
                    raise UnusableError(_INCOMPLETE)
                image.load()
    except (MemoryError, UnusableError):  # running out of memory says nothing about the image
        raise
    except (UnidentifiedImageError, ModuleNotFoundError) as error:
        # Pillow's message names a Python object. Ultralytics, if it is imported, then looks for a plugin for HEIF.
        reason = "it has no known image format, or its header is damaged"
        raise UnusableError(f"the image cannot be decoded: {reason}") from error
    except Exception as error:  # a damaged file may raise any error
        raise UnusableError(f"the image cannot be decoded: {error}") from error
    if kind not in _FORMATS:
        raise UnusableError(f"the image has the format {kind}: use one of {', '.join(sorted(_FORMATS))}")
    if min(size) < _SMALLEST:
        raise UnusableError(
            f"the image has {size[0]} x {size[1]} pixels: at least {_SMALLEST} x {_SMALLEST} are needed"
        )
    if kind in _VARIED and not _opencv_reads(data):  # one such image would end every training
        raise UnusableError(
            f"OpenCV cannot decode this kind of {kind}, such as one with 32 bits per value: save it as PNG"
        )


def _opencv_reads(data: bytes) -> bool:
    import cv2
    import numpy as np

    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None
    except cv2.error:
        return False


def read_label(data: bytes, names: Mapping[int, str], task: str) -> tuple[Box, ...]:
    """Read a label file in YOLO format. An empty one says that the image shows no object.

    If a file has boxes and polygons, polygons become boxes: a training would leave the whole image out.

    Args:
        data: Content of the file.
        names: Class id → name.
        task: One of `TASKS`.

    Raises:
        UnusableError: A line has a wrong number of columns, an id without a name, or a value outside of 0 to 1.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UnusableError("the label file is not text") from error
    boxes = [_box(number, line.split(), names, task) for number, line in enumerate(lines, 1) if line.strip()]
    if any(len(box.values) == 4 for box in boxes):
        boxes = [box if len(box.values) == 4 else Box(box.name, _around(box.values)) for box in boxes]
    return tuple(boxes)


def count_objects(label: Path, classes: int) -> Counter[int]:
    """Count objects by class id. A line that somebody has damaged is none, as in the training.

    Args:
        label: A label file of the collection. One that is not there has no objects.
        classes: Number of classes.
    """
    try:
        words = [line.split(maxsplit=1)[0] for line in label.read_text("utf-8", "replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return Counter()
    return Counter(int(word) for word in words if word.isdecimal() and int(word) < classes)


def _around(points: tuple[float, ...]) -> tuple[float, ...]:
    """Return x, y, width and height of the box around a polygon."""
    sides = [(min(values), max(values)) for values in (points[::2], points[1::2])]
    return (*((low + high) / 2 for low, high in sides), *(high - low for low, high in sides))


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
    if min((values if len(values) == 4 else _around(tuple(values)))[2:]) <= 0:
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
