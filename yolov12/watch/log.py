"""Lines of the log of a watch, on stdout, and of the logs of its processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from yolov12.printable import printable

__all__ = ["SparseBars", "say", "tell"]

_REDRAW = "\r\033[K"  # how a frame of Ultralytics' progress bars begins
_BAR_EVERY_S = 60.0


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


class SparseBars:
    """A stream that shows Ultralytics' progress bars once a minute and at their end.

    They are redrawn ten times a second, which would fill a disk over the years. Ultralytics gives frames of a bar to
    the method `progress` of a stream that has one, and then writes the end of the line itself.

    Args:
        stream: Stream for all output.
        clock: Returns seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._frames: dict[int, str] = {}
        self._written_at: dict[int, float] = {}

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream."""
        return getattr(self._stream, name)

    def progress(self, bar: int, frame: str) -> None:
        """Take a frame.

        Args:
            bar: Id of the bar.
            frame: Its text; "" after the last one.
        """
        if not frame:
            self._stream.write(self._frames.pop(bar, ""))
            self._written_at.pop(bar, None)
            return
        self._frames[bar] = frame.removeprefix(_REDRAW)
        if self._clock() - self._written_at.setdefault(bar, self._clock()) >= _BAR_EVERY_S:
            self._stream.write(f"{self._frames[bar]}\n")
            self._written_at[bar] = self._clock()
