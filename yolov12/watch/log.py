"""Lines of the log of a watch, on stdout."""

from __future__ import annotations

import time
from contextlib import suppress

from yolov12.printable import printable

__all__ = ["say", "tell"]


def say(text: str) -> None:
    """Print lines with the time.

    Args:
        text: One or more lines, in which names of others may occur.
    """
    for line in text.splitlines():
        tell(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(line).strip()}")


def tell(line: str) -> None:
    """Print a line as it is. A log that cannot be written, such as on a full disk, does not stop the watch.

    Args:
        line: The line.
    """
    with suppress(OSError):
        try:
            print(line, flush=True)
        except UnicodeEncodeError:  # a locale that does not know all letters of a file name
            print(ascii(line)[1:-1], flush=True)
