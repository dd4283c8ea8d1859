"""SIGTERM and SIGINT as exceptions, which are never raised in the middle of a critical section.

A handler of the user's own is called instead, as without this package: it may only note that the training shall stop.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakSet

__all__ = ["Interruption"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Masks(threading.local):
    """Signals that the threads of this process had blocked before they forked it."""

    def __init__(self) -> None:
        self.before: list[set[int]] = []


class Interruption:
    """Turns SIGTERM, which `docker stop` sends, into SystemExit(143), and SIGINT into KeyboardInterrupt.

    A signal that has a handler of the user's own is passed on to that.
    """

    def __init__(self) -> None:
        self.at_once = True
        """True if a signal raises its exception at once; False if only `check` raises it."""
        self._signal: int | None = None
        self._is_raised = False  # whether its exception was raised
        self._users: list[int] = []  # signals that wait for handlers of the user's own
        self._deferrals = 0
        self._stock: dict[int, Any] = {}

    def watch(self) -> None:
        """Install the signal handlers, unless they are. Outside of the main thread, this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            # A job in the background ignores them. A handler that is not Python's could not be restored.
            if handler not in (signal.SIG_IGN, None, self._arrived):
                self._stock[number] = handler
                signal.signal(number, self._arrived)
        _watching.add(self)

    def stop(self) -> None:
        """Restore the previous handlers, unless the user has set others since, and pass on a signal to the user's.

        Raises:
            SystemExit: SIGTERM had arrived and was kept.
            KeyboardInterrupt: SIGINT had arrived and was kept.
        """
        self._put_back()
        self.at_once = True  # a handler that the user has set since may still call this one
        self._pass_on()
        if self._signal is not None and not self._is_raised:
            self._raise()

    def _put_back(self) -> None:
        _watching.discard(self)
        for number, handler in self._stock.items():
            if signal.getsignal(number) == self._arrived:
                signal.signal(number, handler)

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

    @contextmanager
    def users_code(self) -> Iterator[None]:
        """Return a context for code of the user's own: a Ctrl-C whose exception it catches has had its effect.

        SIGTERM has not: without this package it would have ended the process.
        """
        was_due = self.due
        yield
        if self._signal == signal.SIGINT and self._is_raised and not was_due:
            self._signal = None

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
            self._raise()

    def _raise(self) -> None:
        self._is_raised = True
        raise SystemExit(128 + signal.SIGTERM) if self._signal == signal.SIGTERM else KeyboardInterrupt

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
            self._signal, self._is_raised = number, False
        self._heed()


# A process that is forked is no part of the training, and has the handlers from before it. Python forgets signals that
# arrive in it before it can run any code. They are blocked meanwhile, so that they arrive later.
_watching: WeakSet[Interruption] = WeakSet()
_masks = _Masks()


def _before_fork() -> None:
    _masks.before.append(signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS if _watching else ()))


def _in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before.pop())


def _in_child() -> None:
    for interruption in list(_watching):
        interruption._put_back()
    _in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
