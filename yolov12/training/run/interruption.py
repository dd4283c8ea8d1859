"""SIGTERM and SIGINT as exceptions, which are never raised in the middle of a critical section.

A handler of the user's own is called instead, as without this package: it may only note that the training shall stop.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
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
        """Restore the previous handlers, unless the user has set others since, and pass on a signal to the user's."""
        users = self._users
        stock, self._stock = self._stock, {}
        for number, handler in stock.items():
            if signal.getsignal(number) == self._arrived:
                signal.signal(number, handler)
        if users is not None:
            self._pass_on(users)

    @property
    def due(self) -> bool:
        """True if a signal has arrived that ends the training."""
        return self._signal is not None and self._users is None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Return a context that delays the exception of a signal until its end."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1
        if self.at_once or self._users is not None:
            self.check()

    def check(self) -> None:
        """Raise the exception of a signal that has arrived, or call the user's own handler, which may raise another.

        The exception from the handler may have been lost, for example in a destructor.

        Raises:
            SystemExit: SIGTERM has arrived.
            KeyboardInterrupt: SIGINT has arrived.
        """
        if self._signal is None or self._deferrals:
            return
        if self._users is not None:
            self._pass_on(self._users)
        else:
            raise SystemExit(128 + self._signal) if self._signal == signal.SIGTERM else KeyboardInterrupt

    @property
    def _users(self) -> Callable[[int, FrameType | None], Any] | None:
        """Handler of the user's own for the signal that has arrived; None if there is none."""
        handler = self._stock.get(self._signal) if self._signal is not None else None
        return handler if callable(handler) and handler is not signal.default_int_handler else None

    def _pass_on(self, users: Callable[[int, FrameType | None], Any]) -> None:
        arrived, self._signal = self._signal, None
        assert arrived is not None
        users(arrived, sys._getframe())

    def _arrived(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        if self.at_once or self._users is not None:
            self.check()
