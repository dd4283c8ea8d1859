"""SIGTERM and SIGINT as exceptions, which never come while something is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interruption"]


class Interruption:
    """Turns SIGTERM, as `docker stop` sends it, into SystemExit(143), and SIGINT into KeyboardInterrupt."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._deferrals = 0
        self._stock: dict[int, Any] = {}

    def watch(self) -> None:
        """Begin; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._stock = {number: signal.signal(number, self._arrived) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(self) -> None:
        """Let the signals do what they did before."""
        for number, handler in self._stock.items():
            signal.signal(number, handler)
        self._stock = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal wait until the block is through."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1
        self.check()

    def check(self) -> None:
        """Raise what is due: an exception from a handler can be lost, in a destructor for example."""
        if self._signal is not None and not self._deferrals:
            raise SystemExit(128 + self._signal) if self._signal == signal.SIGTERM else KeyboardInterrupt

    def _arrived(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        self.check()
