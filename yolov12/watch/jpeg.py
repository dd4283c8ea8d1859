"""The end of a JPEG file: it shows that the file is whole."""

from __future__ import annotations

import os
from pathlib import Path

from yolov12 import files

__all__ = ["end_jpeg", "has_end"]

_START, _SCAN, _END = b"\xff\xd8", 0xDA, b"\xff\xd9"
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}  # an escaped 0xFF, TEM, restart markers, and the start of an image


def has_end(data: bytes) -> bool:
    """Return whether the image in a JPEG file has an end marker, whatever follows it.

    A file whose last part is zeros, such as after a power loss, has none, but decoders fill such an image with grey.
    The end marker of a thumbnail, in a segment before the image, does not count.

    Args:
        data: Content of the file.
    """
    at = len(_START)
    while (at := data.find(b"\xff", at) + 1) > 0:
        kind = data[at : at + 1]
        if kind == b"\xff":  # the marker was a fill byte
            continue
        if not kind or kind == _END[1:]:
            return False
        if kind[0] == _SCAN:
            return data.find(_END, at) >= 0  # in the data of a scan, a zero follows each other 0xFF
        at += 1
        if kind[0] not in _WITHOUT_LENGTH:
            at += int.from_bytes(data[at : at + 2], "big")
    return False


def end_jpeg(path: Path) -> None:
    """Add the end marker to a JPEG file that has other data after its image, as some cameras write it.

    Without it, Ultralytics encodes the image anew and replaces the file.

    Args:
        path: An image of any format.

    Raises:
        OSError: The file cannot be read or written.
    """
    with path.open("rb") as file:
        is_jpeg = file.read(2) == _START
        file.seek(-2, os.SEEK_END)
        if not is_jpeg or file.read() == _END:
            return
        file.seek(0)
        data = file.read()
    files.write(path, lambda file: file.write(data + _END))  # a new file: this one may have other names
