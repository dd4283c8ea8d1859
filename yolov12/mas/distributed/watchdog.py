"""A watchdog that reports soon, and by name, which rank has died.

In a collective operation, a dead rank looks the same as a slow one, and a main thread that waits in a collective can do
nothing else. This module therefore uses other threads. Each rank increments a heartbeat counter in a store of
torch.distributed and reads the counter of the next rank, so the store answers only a few small requests per rank and
second. The first rank that sees a counter stand still writes a message for all ranks. Heartbeats continue while the
main thread is busy, unless it holds Python's global interpreter lock (GIL) all the time.

    watchdog = Watchdog(connect(), rank, size)
    try:
        train()  # if a collective fails, watchdog.gone(45) returns the rank that caused it
    except Exception as error:
        watchdog.leaving(str(error))
        raise
    finally:
        watchdog.close()
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore, rendezvous

from yolov12.errors import plain

__all__ = ["Gone", "Watchdog", "connect", "meet", "telling"]

_READ_HEARTBEATS = 3
"""Heartbeat intervals within which every rank has read the message about a rank that is gone."""
_CONNECT_S = 60.0
"""Seconds to wait for a connection to the store. Its machine may be busy."""
_SLOW_S = 20.0
"""Seconds after which a process says that it waits for others."""
_PATIENCE_S = 5.0
"""Seconds that the main thread waits for a store that may not answer."""


@dataclass(frozen=True)
class Gone:
    """The first rank that died or left the run."""

    rank: int
    """Index of the rank; -1 for the process that launched the run."""
    name: str
    """Name of the rank in messages."""
    reason: str
    """What another rank observed, or what the rank said itself."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def connect(prefix: str = "") -> Store:
    """Return a connection to the process group's store, for the watchdog alone.

    Call it after `torch.distributed.init_process_group`.

    Args:
        prefix: Distinguishes the watchdogs that one process creates one after the other.

    Raises:
        RuntimeError: The store (`MASTER_ADDR`, `MASTER_PORT`) cannot be reached.
    """
    address, patience = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=_CONNECT_S)
    store = TCPStore(*address, is_master=False, timeout=patience, wait_for_workers=False)
    return PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{_restart()}/{prefix}", store)


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """Meet the other processes, for `torch.distributed.init_process_group`.

    PyTorch does the same, but newer versions (2.15) use the same keys after a restart. With `torchrun --master-port`,
    these keys still hold the addresses of processes that have ended, and new processes may wait for them without end.

    Args:
        timeout: Timeout of the store.

    Returns:
        The store of the process group, the rank of this process, and the number of processes.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return PrefixStore(f"group/{_restart()}", store), rank, size


@contextmanager
def telling(
    log: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True), *, slow_s: float = _SLOW_S
) -> Iterator[None]:
    """Return a context in which this process meets the others; it says for whom it waits if they do not come.

    Args:
        log: Receives the line, in another thread; by default it goes to stderr.
        slow_s: Seconds after which it says so.
    """
    rank, size, host, port = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    line = (
        f"memory: rank {rank} of {size} waits for the other processes at {host}:{port}. To train in one process, unset "
        "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
    )
    timer = threading.Timer(slow_s, log, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _restart() -> str:
    """Return the number of restarts if the store outlives them.

    A launcher's store does. Any other store is new after a restart, and must not depend on the number there, because
    machines may have counted different numbers of restarts.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if _launcher_hosts() else ""


class Watchdog:
    """Watchdog of one rank; it starts when it is created. A rank without a watchdog is not watched.

    After a rank has died or left, the main thread has `grace_s` seconds to notice and to call `close`, or to begin to
    save the run, see `saving`. Then this process logs the reason and exits with status 1. It does the same if other
    ranks took this rank for dead, because they exit, too. If the store does not answer, the process that hosts it
    counts as dead. A process that ends without `close` tells the other ranks.

    Args:
        store: Store that all ranks share, under a prefix of this run: see `connect`.
        rank: Index of this rank.
        size: Number of ranks.
        heartbeat_s: Seconds between two heartbeats.
        dead_s: Seconds without a heartbeat after which a rank counts as dead.
        grace_s: Seconds for the main thread to end by itself. Time in which this process was stopped does not count.
        save_s: Seconds that it may take to save the run.
        names: Name of each rank in messages; by default `rank 0` and so on.
        log: Receives the line that says why this process exits; by default it goes to stderr.
        leave: Ends this process at once, whatever its main thread does; it gets the exit status.

    Raises:
        RuntimeError: The connection to the store is lost.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        heartbeat_s: float = 1.0,
        dead_s: float = 20.0,
        grace_s: float = 10.0,
        save_s: float = 600.0,
        names: Sequence[str] | None = None,
        log: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.names = names or [f"rank {index}" for index in range(size)]
        self._store: Any = store  # PyTorch 2.3's type hints lack `check`
        self._rank, self._size = rank, size
        self._heartbeat_s, self._dead_s, self._grace_s, self._save_s = heartbeat_s, dead_s, grace_s, save_s
        self._log, self._leave = log, leave
        self._watched, self._standstill = (rank + 1) % size, _StandstillTimer(heartbeat_s)
        self._rounds = 0
        self._saves_begun = self._saves_ended = 0
        self._parting: str | None = None
        self._gone: Gone | None = None
        self._known, self._closed = threading.Event(), threading.Event()
        self._send_heartbeat()
        # Most requests to a store have no timeout. One thread makes them, and a second thread notices if the first gets
        # no answer.
        self._caller = threading.Thread(target=self._run_requests, name="watchdog-store", daemon=True)
        self._caller.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        atexit.register(self.leaving, "its process ended before the run did")

    def gone(self, timeout_s: float) -> Gone | None:
        """Wait until a rank is known to be gone, and return it.

        Args:
            timeout_s: Seconds to wait at most.

        Returns:
            None if no rank is known to be gone in that time, or if it is this rank itself.
        """
        self._known.wait(timeout_s)
        return self._gone if self._gone and self._gone.rank != self._rank else None

    def tell(self, failure: str) -> None:
        """Publish a failure for which no rank has to exit. When this returns, all ranks can read it."""
        with suppress(RuntimeError):
            self._store.set(f"told/{self._rank}", plain(failure))
            self._store.check([f"told/{self._rank}"])  # `set` does not wait for an answer

    def told(self, rank: int) -> str:
        """Return the last failure that a rank published with `tell`; "it failed" if there is none."""
        with suppress(RuntimeError):
            if self._store.check([f"told/{rank}"]):
                return str(self._store.get(f"told/{rank}").decode())
        return "it failed"

    def leaving(self, reason: str) -> None:
        """Tell the other ranks that this rank ends before the run does, and call `close`.

        The message has no effect if another rank is already known to be gone.
        """
        self._parting = plain(reason)
        self.close()
        if self._rank == 0 and not _launcher_hosts():  # the store ends with this process, and others must read it first
            time.sleep(_READ_HEARTBEATS * self._heartbeat_s)

    def close(self) -> None:
        """Stop the watchdog: the run is over or about to end, and the other ranks no longer watch this one."""
        atexit.unregister(self.leaving)
        self._closed.set()
        self._caller.join(_PATIENCE_S)
        self._known.set()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Return a context in which the run is saved. If a rank is gone, this process ends `grace_s` seconds after it.

        The main thread enters it when it no longer waits for any rank, so only a slow file system can make it late.
        """
        self._saves_begun += 1
        try:
            yield
        finally:
            self._saves_ended += 1

    def _run_requests(self) -> None:
        try:
            while not self._closed.is_set():
                self._check_heartbeats()
                self._rounds += 1
                self._closed.wait(self._heartbeat_s)
            if self._parting is not None:
                self._report_gone(self._rank, self._parting)
            self._store.add(f"closed/{self._rank}", 1)
        except RuntimeError:  # a lost connection does not come back
            self._report_lost_store()

    def _send_heartbeat(self) -> None:
        self._store.add(f"heartbeat/{self._rank}", 1)

    def _check_heartbeats(self) -> None:
        self._send_heartbeat()
        if self._store.check(["gone"]):  # `get` alone would wait
            self._read_report(self._store.get("gone"))
            return
        heartbeats = self._store.add(f"heartbeat/{self._watched}", 0)
        quiet_s = self._standstill.quiet_s(heartbeats)
        if not heartbeats or not quiet_s:
            return
        if self._store.check([f"closed/{self._watched}"]):
            self._watched, self._standstill = (self._watched + 1) % self._size, _StandstillTimer(self._heartbeat_s)
        elif quiet_s >= self._dead_s:
            self._report_gone(self._watched, f"has not been heard of for {self._dead_s:g} s")

    def _report_gone(self, rank: int, reason: str) -> None:
        self._read_report(self._store.compare_set("gone", "", json.dumps([rank, reason])))  # the first message wins

    def _read_report(self, word: bytes) -> None:
        rank, reason = json.loads(word)
        self._set_gone(Gone(rank, self.names[rank], reason))

    def _report_lost_store(self) -> None:
        rank = -1 if _launcher_hosts() or self._rank == 0 else 0
        name = self.names[0] if rank == 0 else "the process that launched the run"
        self._set_gone(Gone(rank, name, "the store that it keeps for all does not answer"))

    def _set_gone(self, gone: Gone) -> None:
        self._gone = self._gone or gone
        self._known.set()

    @property
    def _patience_s(self) -> float:
        return self._save_s if self._saves_begun > self._saves_ended else self._grace_s

    def _watch(self) -> None:
        calls = _StandstillTimer(self._heartbeat_s)
        while not self._known.is_set():
            if self._closed.wait(self._heartbeat_s):
                return
            if calls.quiet_s(self._rounds) >= self._dead_s:
                self._report_lost_store()
        main_thread = _StandstillTimer(self._heartbeat_s)
        while main_thread.quiet_s(self._saves_begun + self._saves_ended) < self._patience_s:
            if self._closed.wait(self._heartbeat_s):
                return
        try:
            self._log(f"yolov12: error: {self._gone}, so {self.names[self._rank]} ends too")
        finally:
            self._leave(1)


class _StandstillTimer:
    """Measures how long a counter has stood still. Time in which this process itself was stopped does not count."""

    def __init__(self, interval_s: float) -> None:
        self._longest_s = 2 * interval_s
        self._count, self._quiet_s, self._looked = -1, 0.0, time.monotonic()

    def quiet_s(self, count: int) -> float:
        """Return the seconds for which the counter has stood still; 0 if it has changed since the last call."""
        now = time.monotonic()
        self._quiet_s = self._quiet_s + min(now - self._looked, self._longest_s) if count == self._count else 0.0
        self._count, self._looked = count, now
        return self._quiet_s


def _launcher_hosts() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
