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
        self.at_once = True
        """Whether an exception comes when the signal does, rather than where `check` is called."""
        self._signal: int | None = None
        self._deferrals = 0
        self._stock: dict[int, Any] = {}

    def watch(self) -> None:
        """Begin; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as for a job in the background
                self._stock[number] = signal.signal(number, self._arrived)

    def stop(self) -> None:
        """Let the signals do what they did before; a handler of the user's own gets the one that came."""
        stock, self._stock = self._stock, {}
        for number, handler in stock.items():
            signal.signal(number, handler)
        if self._signal is not None and callable(handler := stock.get(self._signal)):
            arrived, self._signal = self._signal, None
            if handler is not signal.default_int_handler:
                handler(arrived, None)

    @property
    def due(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal wait until the block is through."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1
        if self.at_once:
            self.check()

    def check(self) -> None:
        """Raise what is due: an exception from a handler can be lost, in a destructor for example."""
        if self._signal is not None and not self._deferrals:
            raise SystemExit(128 + self._signal) if self._signal == signal.SIGTERM else KeyboardInterrupt

    def _arrived(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        if self.at_once:
            self.check()
