"""The watchdog in real processes that are killed, stopped, busy or done, and in threads with a store in memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from yolov12.mas.distributed.watchdog import Gone, Watchdog, connect, meet, telling

HEARTBEAT_S, DEAD_S, GRACE_S = 0.1, 1.5, 0.5
NOISE_S = 60.0
"""Seconds by which a busy machine may be late. Nothing that is tested takes as long by itself."""

SLEEP = "ctypes.CDLL(None).sleep(250)  # like a collective: Python's lock is free, and no signal handler runs"
RANK = """
import ctypes, os, time
from yolov12.mas.distributed.watchdog import Watchdog, connect
os.environ.update(environment)
os.dup2(os.open(words, os.O_CREAT | os.O_WRONLY), 2)
if hosts:
    from torch.distributed import TCPStore
    host = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
for _ in range(100):
    try:
        watchdog = Watchdog(connect(), rank, size, heartbeat_s=heartbeat_s, dead_s=dead_s, grace_s=grace_s)
        break
    except RuntimeError:  # rank 0 has yet to begin
        time.sleep(0.05)
barrier.wait()
exec(main)
"""


class Ranks:
    """Processes, each with a watchdog and a main program. The store is in this process or in rank 0."""

    def __init__(self, forks, reserve_port, folder, mains, rank_0_hosts=False, dead_s=DEAD_S):
        self._store = None if rank_0_hosts else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = reserve_port() if self._store is None else self._store.port
        barrier = forks.Barrier(len(mains) + 1)
        self._words, self.all = [folder / f"{rank}.txt" for rank in range(len(mains))], []
        for rank, main in enumerate(mains):
            names = {
                "main": main,
                "rank": rank,
                "size": len(mains),
                "words": str(self._words[rank]),
                "hosts": rank_0_hosts and rank == 0,
                "barrier": barrier,
                "environment": {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                "heartbeat_s": HEARTBEAT_S,
                "dead_s": dead_s,
                "grace_s": GRACE_S,
            }
            self.all.append(forks.Process(target=exec, args=(RANK, names), daemon=True))
            self.all[-1].start()
        barrier.wait(NOISE_S)

    def send(self, rank, number):
        os.kill(self.all[rank].pid, number)

    def end(self, ranks, within_s):
        """Wait for ranks to end; return their exit statuses."""
        end = time.monotonic() + within_s
        for rank in ranks:
            self.all[rank].join(max(0.0, end - time.monotonic()))
        return [self.all[rank].exitcode for rank in ranks]

    def words(self, rank):
        """Return the lines that a rank wrote to stderr, without those of PyTorch's C++ code."""
        return [line for line in self._words[rank].read_text().splitlines() if line and line[0] != "["]


@pytest.fixture
def ranks(forks, reserve_port, tmp_path):
    made = []

    def make(*arguments, **keywords):
        made.append(Ranks(forks, reserve_port, tmp_path, *arguments, **keywords))
        return made[-1]

    yield make
    for process in [process for group in made for process in group.all]:
        process.kill()
        process.join()


# Processes


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_all_ranks_end_and_name_the_rank_that_was_killed_or_stopped(ranks, number):
    four = ranks([SLEEP] * 4)
    four.send(2, number)
    assert four.end([0, 1, 3], DEAD_S + GRACE_S + NOISE_S) == [1, 1, 1]
    for rank in (0, 1, 3):
        expected = f"yolov12: error: rank 2: has not been heard of for 1.5 s, so rank {rank} ends too"
        assert four.words(rank) == [expected]
    if number == signal.SIGSTOP:
        four.send(2, signal.SIGCONT)  # no rank is left to work with
        assert four.end([2], GRACE_S + NOISE_S) == [1]
        assert four.words(2) == ["yolov12: error: rank 2: has not been heard of for 1.5 s, so rank 2 ends too"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_0_is_named_when_its_store_dies_with_it(ranks, number):
    three = ranks([SLEEP] * 3, rank_0_hosts=True)
    three.send(0, number)
    assert three.end([1, 2], DEAD_S + GRACE_S + NOISE_S) == [1, 1]
    assert "rank 0: the store that it keeps for all does not answer, so rank 1 ends too" in three.words(1)[-1]


def test_busy_ranks_are_not_dead_and_ranks_that_are_done_are_not_missed(ranks):
    count = "end = time.monotonic() + 3.5\nwhile time.monotonic() < end: sum(range(1000))"
    mains = ["time.sleep(0.5)", "ctypes.CDLL(None).usleep(3_500_000)", "", count, "time.sleep(0.2)"]
    five = ranks([f"{main}\nwatchdog.close()\nassert watchdog.gone(0) is None" for main in mains], dead_s=3.0)
    assert five.end(range(5), 3.5 + NOISE_S) == [0] * 5
    assert [five.words(rank) for rank in range(5)] == [[]] * 5


def test_rank_that_leaves_says_why_before_it_could_be_missed(ranks):
    hear = f"gone = watchdog.gone({NOISE_S})\nwatchdog.close()\nos.write(2, str(gone).encode())"
    four = ranks([hear, hear, "watchdog.leaving('no space left on device')", hear], dead_s=600)
    assert four.end(range(4), 2 * NOISE_S) == [0] * 4
    assert [four.words(rank) for rank in range(4)] == [["rank 2: no space left on device"]] * 2 + [[]] + [
        ["rank 2: no space left on device"]
    ]


def test_a_process_that_ends_without_a_message_is_reported_at_once(run_python, monkeypatch):
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(host.port))
    watchdog = Watchdog(connect(), 0, 2, heartbeat_s=HEARTBEAT_S)
    ended = run_python(
        "-c",
        "from yolov12.mas.distributed.watchdog import *; watchdog = Watchdog(connect(), 1, 2); raise SystemExit(3)",
    )
    assert ended.returncode == 3, ended.stderr
    assert watchdog.gone(NOISE_S) == Gone(1, "rank 1", "its process ended before the run did")
    watchdog.close()


# Threads, on a store in memory


class Line:
    """A rank's connection to a store. It can be cut, or go silent like a connection to a machine without power."""

    def __init__(self, store):
        self._store, self.silent, self._cut = store, threading.Event(), False

    def cut(self):
        self._cut = True

    def __getattr__(self, name):
        def call(*arguments):
            if self.silent.is_set():
                threading.Event().wait(60)
            if self._cut:
                raise RuntimeError("Broken pipe")
            return getattr(self._store, name)(*arguments)

        return call


class Ring:
    """Watchdogs of several ranks in one process, with the log and the end of each."""

    def __init__(self, size, **options):
        store = HashStore()
        self.lines = [Line(store) for _ in range(size)]
        self.said, self.left = [[] for _ in range(size)], [threading.Event() for _ in range(size)]
        self.watchdogs = [
            Watchdog(
                line,
                rank,
                size,
                **{"heartbeat_s": 0.02, "dead_s": 0.5, "grace_s": 0.1, **options},
                log=self.said[rank].append,
                leave=lambda status, rank=rank: self.left[rank].set(),
            )
            for rank, line in enumerate(self.lines)
        ]

    def __getitem__(self, rank):
        return self.watchdogs[rank]


@pytest.fixture
def ring():
    rings = []

    def make(size, **options):
        rings.append(Ring(size, **options))
        return rings[-1]

    yield make
    for watchdog in [watchdog for ring in rings for watchdog in ring.watchdogs]:
        watchdog._caller.join = lambda _: None  # some connections hang on purpose
        watchdog.close()


def test_ranks_that_are_done_are_skipped(ring):
    six = ring(6, names=["a", "b", "c", "d", "e", "f"])
    for rank in (2, 1):
        six[rank].close()
    six.lines[3].silent.set()
    for rank in (0, 4, 5):
        assert six[rank].gone(NOISE_S) == Gone(3, "d", "has not been heard of for 0.5 s")
    assert six[1].gone(0) is None
    assert str(six[0].gone(0)) == "d: has not been heard of for 0.5 s"


def test_last_rank_watches_nobody(ring):
    three = ring(3, dead_s=0.3)
    three[1].close()
    three[2].close()
    assert three[0].gone(0.5) is None
    three[0].close()
    assert three.said == [[], [], []]


def test_rank_that_has_not_begun_is_not_dead():
    watchdog = Watchdog(HashStore(), 0, 2, heartbeat_s=0.02, dead_s=0.1)
    assert watchdog.gone(0.5) is None
    watchdog.close()


def test_first_to_be_named_stays_named(ring):
    four = ring(4, grace_s=60)
    four[2].leaving("first")
    four[1].leaving("second")
    four.lines[3].silent.set()
    assert four[0].gone(NOISE_S) == Gone(2, "rank 2", "first")
    assert four[1].gone(NOISE_S) == Gone(2, "rank 2", "first")
    assert four[2].gone(0.1) is None


def test_rank_leaves_after_the_grace_unless_it_closes(ring):
    three = ring(3, grace_s=600)
    three[2].leaving("why")
    assert three[1].gone(NOISE_S)
    three[1].close()
    assert not three.left[0].wait(0.2)
    for watchdog in three.watchdogs:
        watchdog._grace_s = 0.1
    assert three.left[0].wait(NOISE_S)
    assert three.said == [["yolov12: error: rank 2: why, so rank 0 ends too"], [], []]
    assert not three.left[1].wait(0.5)


def test_rank_that_saves_the_run_is_not_ended_before_it_has_saved(ring):
    """On a slow disk, a save takes longer than the grace. It has an end of its own."""
    three = ring(3, save_s=60)
    with three[0].saving():
        three[2].leaving("why")
        assert three.left[1].wait(NOISE_S)
        assert not three.left[0].wait(0.5)
    assert three.left[0].wait(NOISE_S)
    two = ring(2, save_s=0.2)
    with two[0].saving():
        two[1].leaving("why")
        assert two.left[0].wait(NOISE_S)


def test_rank_that_was_taken_for_dead_leaves_too(ring):
    two = ring(2)
    two.lines[0]._store.compare_set("gone", "", '[1, "silent"]')
    assert two.left[1].wait(NOISE_S)
    assert two[1].gone(0) is None
    assert two[0].gone(0) == Gone(1, "rank 1", "silent")


@pytest.mark.parametrize("silent", [False, True])
def test_store_that_is_lost_counts_as_the_death_of_its_host(ring, silent, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    two = ring(2)
    for line in two.lines:
        line.silent.set() if silent else line.cut()
    reason = "the store that it keeps for all does not answer"
    assert two[1].gone(NOISE_S) == Gone(0, "rank 0", reason)
    assert two[0].gone(NOISE_S) == Gone(-1, "the process that launched the run", reason)
    assert two.left[0].wait(NOISE_S)
    assert two.left[1].wait(NOISE_S)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    two = ring(2)
    two.lines[1].cut()
    assert two[1].gone(NOISE_S) == Gone(-1, "the process that launched the run", reason)


def test_failures_are_published_without_ending_any_rank(ring):
    two = ring(2)
    two[0].tell("CUDA error")
    two[0].tell("CUDA error 2")
    assert two[1].told(0) == "CUDA error 2"
    assert two[0].told(1) == "it failed"
    assert two[1].gone(0.2) is None
    two.lines[1].cut()
    two[1].tell("to nobody")
    assert two[1].told(0) == "it failed"


def test_messages_lose_their_colour_codes(ring):
    two = ring(2, grace_s=60)
    two[0].tell("\x1b[34m\x1b[1mval:\x1b[0m no labels")
    assert two[1].told(0) == "val: no labels"
    two[0].leaving("\x1b[31mno disk\x1b[0m")
    assert two[1].gone(NOISE_S) == Gone(0, "rank 0", "no disk")


def test_restarts_are_told_apart_where_the_store_outlives_them(monkeypatch):
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=NOISE_S))
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(host.port), "TORCHELASTIC_RUN_ID": "run"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def client(restarts, agent, prefix=""):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(agent))
        return connect(prefix)

    before = Watchdog(client(0, True), 1, 2, heartbeat_s=0.02)
    before.leaving("before the restart")
    for store, expected in [
        (client(0, True), Gone(1, "rank 1", "before the restart")),
        (client(1, True), None),
        (client(0, True, "2"), None),
    ]:
        watchdog = Watchdog(store, 0, 2, heartbeat_s=0.02)
        assert watchdog.gone(NOISE_S if expected else 0.3) == expected
        watchdog.close()
    # Machines may have counted different numbers of restarts, and this kind of store is new after each restart. So the
    # number must not separate them.
    client(0, False).add("key", 1)
    assert client(1, False).check(["key"])


@pytest.mark.parametrize("outlives", [True, False])
def test_processes_do_not_find_addresses_of_processes_before_a_restart(monkeypatch, outlives):
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=NOISE_S))
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(host.port), "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in {**environment, "TORCHELASTIC_USE_AGENT_STORE": str(outlives)}.items():
        monkeypatch.setenv(name, value)
    found = []
    for restart in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        store, *place = meet(timedelta(seconds=NOISE_S))
        assert place == [1, 2]
        found.append(store.check(["address"]))
        store.set("address", "127.0.0.1:1")
    assert found == [False, not outlives]


def test_a_process_says_for_whom_it_waits(monkeypatch):
    """Variables of a launch that are left in a shell would make a training wait for three hours without a word."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines, told = [], threading.Event()
    with telling(lambda line: (lines.append(line), told.set()), slow_s=0.01):
        assert told.wait(NOISE_S)
    (line,) = lines
    assert "rank 0 of 2 waits for the other processes" in line
    assert "unset RANK" in line
    with telling(lines.append, slow_s=0.2):
        pass
    time.sleep(0.4)
    assert len(lines) == 1
