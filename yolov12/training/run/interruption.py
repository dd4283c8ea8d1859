"""SIGTERM and SIGINT as exceptions, which are never raised in the middle of a critical section."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interruption"]


class Interruption:
    """Turns SIGTERM, which `docker stop` sends, into SystemExit(143), and SIGINT into KeyboardInterrupt."""

    def __init__(self) -> None:
        self.at_once = True
        """True if a signal raises its exception at once; False if only `check` raises it."""
        self._signal: int | None = None
        self._deferrals = 0
        self._stock: dict[int, Any] = {}

    def watch(self) -> None:
        """Install the signal handlers. Outside of the main thread, this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # a job in the background ignores them
                self._stock[number] = signal.signal(number, self._arrived)

    def stop(self) -> None:
        """Restore the previous handlers, and pass a signal that has arrived on to a handler of the user's own."""
        stock, self._stock = self._stock, {}
        for number, handler in stock.items():
            signal.signal(number, handler)
        if self._signal is not None and callable(handler := stock.get(self._signal)):
            arrived, self._signal = self._signal, None
            if handler is not signal.default_int_handler:
                handler(arrived, None)

    @property
    def due(self) -> bool:
        """True if a signal has arrived."""
        return self._signal is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Return a context that delays the exception of a signal until its end."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1
        if self.at_once:
            self.check()

    def check(self) -> None:
        """Raise the exception of a signal that has arrived.

        The exception from the handler may have been lost, for example in a destructor.

        Raises:
            SystemExit: SIGTERM has arrived.
            KeyboardInterrupt: SIGINT has arrived.
        """
        if self._signal is not None and not self._deferrals:
            raise SystemExit(128 + self._signal) if self._signal == signal.SIGTERM else KeyboardInterrupt

    def _arrived(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        if self.at_once:
            self.check()
