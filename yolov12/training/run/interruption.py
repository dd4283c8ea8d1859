"""SIGTERM and SIGINT as exceptions, which are never raised in the middle of a critical section.

A handler of the user's own is called instead, as without this package: it may only note that the training shall stop.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interruption"]


class Interruption:
    """Turns SIGTERM, which `docker stop` sends, into SystemExit(143), and SIGINT into KeyboardInterrupt.

    A signal that has a handler of the user's own is passed on to that.
    """

    def __init__(self) -> None:
        self.at_once = True
        """True if a signal raises its exception at once; False if only `check` raises it."""
        self._signal: int | None = None
        self._users: list[int] = []  # signals that wait for handlers of the user's own
        self._deferrals = 0
        self._stock: dict[int, Any] = {}

    def watch(self) -> None:
        """Install the signal handlers. Outside of the main thread, this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            # A job in the background ignores them. A handler that is not Python's could not be restored.
            if handler not in (signal.SIG_IGN, None):
                self._stock[number] = handler
                signal.signal(number, self._arrived)

    def stop(self) -> None:
        """Restore the previous handlers, unless the user has set others since, and pass on a signal to the user's."""
        for number, handler in self._stock.items():
            if signal.getsignal(number) == self._arrived:
                signal.signal(number, handler)
        self.at_once = True  # a handler that the user has set since may still call this one
        self._pass_on()

    @property
    def due(self) -> bool:
        """True if a signal has arrived that ends the training."""
        return self._signal is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Return a context that delays the exception of a signal until its end."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1
        self._heed()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Return a context that keeps signals, and raises nothing at its end: an exception ends the training already.

        A signal that arrives in it is left to `check` or `stop`.
        """
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1

    def check(self) -> None:
        """Raise the exception of a signal that has arrived, or call the user's own handler, which may raise another.

        The exception from the handler may have been lost, for example in a destructor.

        Raises:
            SystemExit: SIGTERM has arrived.
            KeyboardInterrupt: SIGINT has arrived.
        """
        if self._deferrals:
            return
        self._pass_on()
        if self._signal is not None:
            raise SystemExit(128 + self._signal) if self._signal == signal.SIGTERM else KeyboardInterrupt

    def _pass_on(self) -> None:
        while self._users:
            number = self._users.pop(0)
            self._stock[number](number, sys._getframe())

    def _heed(self) -> None:
        if self.at_once:
            self.check()
        elif not self._deferrals:
            self._pass_on()

    def _arrived(self, number: int, _: FrameType | None) -> None:
        handler = self._stock[number]
        if callable(handler) and handler is not signal.default_int_handler:
            self._users.append(number)
        else:
            self._signal = number
        self._heed()
