"""Work of an attempt in processes of their own: they may be killed or fail, and free their memory at their end.

A process of an attempt ends with the watch that started it: after SIGTERM the watch passes the signal on, and if the
watch is killed, Linux sends it. A training saves its state then, and the next watch continues it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

__all__ = ["Child", "Children", "Processes", "command", "why"]

_PATIENCE_S = 60.0  # for a training to save its state
_STALLED_S = 6 * 3600.0  # a training writes a row each second, but compiles and scans large data sets before; and
# to build an engine may take an hour
_ERROR = "yolov12: error: "
_WRITTEN = ("memory.csv", "results.csv", "weights/last.pt", "weights/state.pt")


class Child(Protocol):
    """Running work."""

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""


class Children(Protocol):
    """Starts the work of an attempt."""

    def start(self, task: str, attempt: Path, log: Path) -> Child:
        """Start work.

        Args:
            task: `training`, `judging`, `exporting` or `reporting`.
            attempt: Folder of the attempt.
            log: File to which its output is appended.
        """


def command(*words: str) -> list[str]:
    """Return the command of a process of this package.

    Args:
        words: A task of `yolov12.watch.child`, and its arguments.
    """
    return [sys.executable, "-m", "yolov12.watch.child", str(os.getpid()), *words]


class Processes:
    """Starts processes, each the leader of a session of its own: Ctrl-C in a terminal reaches only the watch."""

    def start(self, task: str, attempt: Path, log: Path) -> Child:
        """Start work: see `Children`."""
        shown = (log, *(attempt / "run" / name for name in _WRITTEN if task == "training"))
        with log.open("ab") as output:
            return Process(command(task, str(attempt)), output, shown)


class Process:
    """A process, stopped with all that it has started.

    Args:
        words: Command line.
        output: File for its output.
        written: Files that show its progress, the log first. If none of them changes for `longest_s`, the process is
            stopped: a network folder or a driver may never answer. Without files, nothing is.
        longest_s: Seconds without progress. They do not pass while the machine sleeps, or when its clock is set.
    """

    def __init__(
        self, words: Sequence[str], output: IO[bytes], written: Sequence[Path] = (), longest_s: float = _STALLED_S
    ) -> None:
        self._written, self._longest_s = written, longest_s
        self._seen, self._since = _versions(written), time.monotonic()
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        status = self._process.poll()
        if status is not None or not self._is_stalled():
            return status
        self.stop()
        with suppress(OSError), self._written[0].open("a") as log:
            log.write(f"yolov12: error: it had written nothing for {self._longest_s / 3600:g} hours, and was stopped\n")
        return self._process.returncode or 1

    def _is_stalled(self) -> bool:
        seen, now = _versions(self._written), time.monotonic()
        if seen != self._seen or not self._written:
            self._seen, self._since = seen, now
        return now - self._since > self._longest_s

    def stop(self) -> None:
        """Ask it to end. If it does not within a minute, or after another signal to this process, kill it.

        The next process of the attempt waits for one that cannot be killed, so the two never write at the same time.
        """
        self._process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # also what it has started
            with suppress(subprocess.TimeoutExpired):  # a driver that never answers may hold it for ever
                self._process.wait(_PATIENCE_S)


def _versions(paths: Sequence[Path]) -> list[tuple[int, int]]:
    found = []
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            found.append((status.st_size, status.st_mtime_ns))
    return found


def why(status: int, log: Path, start: int = 0) -> str:
    """Return why a process has ended.

    Args:
        status: Its exit status, negative for a signal.
        log: File with its output.
        start: Size of the log when it began.

    Returns:
        Its last error, its last line if there is none, or the signal; empty if nothing is known.
    """
    lines = _lines(log, start)
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    if status < 0 and not errors:
        name = {each.value: each.name for each in signal.Signals}.get(-status, f"signal {-status}")
        return f"killed by {name}" + (", as the kernel does when memory runs out" if name == "SIGKILL" else "")
    return (errors or lines or [""])[-1][:500]


def _lines(log: Path, start: int) -> list[str]:
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(log.stat().st_size - 20_000, start, 0))
        return [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return []
