"""The lookout: which rank has died, told soon and by name, where all that others notice is that nobody answers.

A collective cannot tell a rank that died from one that is slow, and a main thread that waits in one can do nothing.
Threads beside it can. Each rank counts up a beat in a store of torch.distributed and reads that of the next, so that
the store has a few small calls a rank and second to answer; the first who finds a beat standing still leaves word for
all. The beat goes on whatever the main thread is busy with, unless that keeps Python's lock all the while.

lookout = Lookout(connect(), rank, size)
try:
    train()                                                # where a collective fails, lookout.gone(45) says who it was
except Exception as error:
    lookout.leaving(str(error))
    raise
finally:
    lookout.close()
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

__all__ = ["Gone", "Lookout", "connect"]

_READ_BEATS = 3
"""In which all have read who is gone."""
_PATIENCE_S = 5.0
"""Of a main thread with a store that may not answer."""


@dataclass(frozen=True)
class Gone:
    """The first rank that died or left."""

    rank: int
    """Which; -1 is the process that launched the run."""
    name: str
    """What messages call it."""
    reason: str
    """What was seen of it, or what it said itself."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def connect(prefix: str = "") -> Store:
    """Return a client, for the lookout alone, of the store that the process group met on. Call it after that.

    Args:
        prefix: Tells the lookouts apart that one process makes, one after the other.

    Raises:
        RuntimeError: The store (`MASTER_ADDR`, `MASTER_PORT`) cannot be reached.
    """
    address, patience = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=_PATIENCE_S)
    store = TCPStore(*address, is_master=False, timeout=patience, wait_for_workers=False)
    # A launcher's store outlives a restart. Any other is new then, and machines do not agree on how many there were.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if _launcher_hosts() else ""
    return PrefixStore(f"lookout/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{restart}/{prefix}", store)


class Lookout:
    """One rank's lookout, on watch as soon as it is made; see the module. A rank that has none yet is not watched.

    When a rank is gone, the main thread has `grace_s` to notice and to `close`; then this process says why and leaves,
    with status 1. So it does when it was taken for dead itself, as the others leave then. A store that does not answer
    counts as the death of its host. A process that ends without `close` says so to the others.

    Args:
        store: That all ranks have, under a prefix of this run: see `connect`.
        rank: Which this one is.
        size: How many there are.
        beat_s: Between two beats.
        dead_s: Without a beat, after which a rank counts as dead.
        grace_s: For the main thread to end by itself.
        names: Rank → what messages call it.
        log: Takes the line that says why this process leaves; stderr by default.
        leave: Ends this process at once, whatever its main thread is in.

    Raises:
        RuntimeError: The store has gone.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        beat_s: float = 1.0,
        dead_s: float = 20.0,
        grace_s: float = 10.0,
        names: Sequence[str] | None = None,
        log: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.names = names or [f"rank {index}" for index in range(size)]
        self._store: Any = store  # PyTorch 2.3 does not declare `check`
        self._rank, self._size = rank, size
        self._beat_s, self._dead_s, self._grace_s = beat_s, dead_s, grace_s
        self._log, self._leave = log, leave
        self._watched, self._pulse = (rank + 1) % size, _Pulse(beat_s)
        self._rounds = 0
        self._parting: str | None = None
        self._gone: Gone | None = None
        self._known, self._closed = threading.Event(), threading.Event()
        self._beat()
        # Two threads, as most calls of a store have no timeout: the second finds a store that does not answer.
        self._caller = threading.Thread(target=self._call, name="lookout-store", daemon=True)
        self._caller.start()
        threading.Thread(target=self._mind, name="lookout", daemon=True).start()
        atexit.register(self.leaving, "its process ended before the run did")

    def gone(self, timeout_s: float) -> Gone | None:
        """Return who is gone as soon as that is known; None where it is not in time, or is this rank itself."""
        self._known.wait(timeout_s)
        return self._gone if self._gone and self._gone.rank != self._rank else None

    def tell(self, failure: str) -> None:
        """Leave word of a failure that nobody has to end for; it is there for all when this returns."""
        with suppress(RuntimeError):
            self._store.set(f"told/{self._rank}", failure)
            self._store.check([f"told/{self._rank}"])  # `set` does not wait for an answer

    def told(self, rank: int) -> str:
        """Return the last word that a rank left with `tell`."""
        with suppress(RuntimeError):
            if self._store.check([f"told/{rank}"]):
                return str(self._store.get(f"told/{rank}").decode())
        return "it failed"

    def leaving(self, reason: str) -> None:
        """Say that this rank ends before the run does, unless another is gone already, and `close`."""
        self._parting = reason
        self.close()
        if self._rank == 0 and not _launcher_hosts():  # the store ends with this process: others are yet to read it
            time.sleep(_READ_BEATS * self._beat_s)

    def close(self) -> None:
        """End the watch: the run is over or being ended, and nobody minds this rank's silence any more."""
        atexit.unregister(self.leaving)
        self._closed.set()
        self._caller.join(_PATIENCE_S)
        self._known.set()

    def _call(self) -> None:
        try:
            while not self._closed.is_set():
                self._look()
                self._rounds += 1
                self._closed.wait(self._beat_s)
            if self._parting is not None:
                self._accuse(self._rank, self._parting)
            self._store.add(f"closed/{self._rank}", 1)
        except RuntimeError:  # the connection is lost, and does not come back
            self._lose_store()

    def _beat(self) -> None:
        self._store.add(f"beat/{self._rank}", 1)

    def _look(self) -> None:
        self._beat()
        if self._store.check(["gone"]):  # `get` would wait for it
            self._learn(self._store.get("gone"))
            return
        beats = self._store.add(f"beat/{self._watched}", 0)
        quiet_s = self._pulse.quiet_s(beats)
        if not beats or not quiet_s:
            return
        if self._store.check([f"closed/{self._watched}"]):
            self._watched, self._pulse = (self._watched + 1) % self._size, _Pulse(self._beat_s)
        elif quiet_s >= self._dead_s:
            self._accuse(self._watched, f"has not been heard of for {self._dead_s:g} s")

    def _accuse(self, rank: int, reason: str) -> None:
        self._learn(self._store.compare_set("gone", "", json.dumps([rank, reason])))  # returns who was named first

    def _learn(self, word: bytes) -> None:
        rank, reason = json.loads(word)
        self._conclude(Gone(rank, self.names[rank], reason))

    def _lose_store(self) -> None:
        rank = -1 if _launcher_hosts() or self._rank == 0 else 0
        name = self.names[0] if rank == 0 else "the process that launched the run"
        self._conclude(Gone(rank, name, "the store that it keeps for all does not answer"))

    def _conclude(self, gone: Gone) -> None:
        self._gone = self._gone or gone
        self._known.set()

    def _mind(self) -> None:
        calls = _Pulse(self._beat_s)
        while not self._known.is_set():
            if self._closed.wait(self._beat_s):
                return
            if calls.quiet_s(self._rounds) >= self._dead_s:
                self._lose_store()
        if self._closed.wait(self._grace_s):
            return
        try:
            self._log(f"yolov12: error: {self._gone}, so {self.names[self._rank]} ends too")
        finally:
            self._leave(1)


class _Pulse:
    """How long a counter has stood still while this process ran: its own pauses (SIGSTOP) are not another's silence."""

    def __init__(self, look_s: float) -> None:
        self._longest_s = 2 * look_s
        self._count, self._quiet_s, self._looked = -1, 0.0, time.monotonic()

    def quiet_s(self, count: int) -> float:
        """Take what the counter shows now; 0 if it moved since the last look."""
        now = time.monotonic()
        self._quiet_s = self._quiet_s + min(now - self._looked, self._longest_s) if count == self._count else 0.0
        self._count, self._looked = count, now
        return self._quiet_s


def _launcher_hosts() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
