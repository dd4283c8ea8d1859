"""Processes of an attempt: they end with the watch, however it ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from yolov12 import files
from yolov12.watch import children
from yolov12.watch.children import Process, why

START = """
import sys, time
from pathlib import Path
from yolov12.watch.children import Processes

attempt = Path(sys.argv[1])
child = Processes().start("training", attempt, attempt / "log.txt")
print(child._process.pid, flush=True)
time.sleep(3600)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    end = time.monotonic() + 800
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("moment", ["at its start", "at work"])
def test_a_process_of_a_killed_watch_ends(moment, tmp_path):
    attempt, script = tmp_path / "attempt", tmp_path / "start.py"
    attempt.mkdir()
    (attempt / "attempt.json").write_text("{}")
    script.write_text(START)
    lock = files.lock(attempt)  # the process waits for it, as for one of an earlier watch that saves its state
    try:
        watch = subprocess.Popen([sys.executable, script, attempt], stdout=subprocess.PIPE)
        pid = int(watch.stdout.readline())
        if moment == "at work":
            wait_until(lambda: "waiting" in (attempt / "log.txt").read_text() or not is_running(pid))
            assert is_running(pid)
        watch.kill()
        watch.communicate()
        wait_until(lambda: not is_running(pid))
    finally:
        lock.release()


def test_a_process_is_stopped_with_what_it_has_started(tmp_path):
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '3600']).pid, flush=True); time.sleep(3600)"
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = Process([sys.executable, "-c", code], output)
    wait_until(lambda: log.read_text().endswith("\n"))
    assert process.poll() is None
    process.stop()
    assert process.poll() == -signal.SIGTERM
    wait_until(lambda: not is_running(int(log.read_text())))


def test_a_process_that_writes_nothing_is_stopped_and_one_that_does_is_not(tmp_path):
    log, rows = tmp_path / "log.txt", tmp_path / "memory.csv"
    with log.open("wb") as output:
        process = Process(["sleep", "3600"], output, [log, rows], longest_s=0.3)
    for number in range(10):
        rows.write_text("row\n" * number)
        assert process.poll() is None
        time.sleep(0.05)
    wait_until(lambda: process.poll() is not None)
    assert process.poll() == -signal.SIGTERM
    assert "had written nothing" in why(1, log)
    with log.open("ab") as output:
        patient = Process(["sleep", "3600"], output, longest_s=0.0)
    assert patient.poll() is None
    patient.stop()


def test_a_process_that_cannot_be_killed_does_not_stop_the_watch(tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = Process(["sleep", "3600"], output, [log], longest_s=0.0)
    held, stock = process._process, process._process.wait

    def wait(timeout):
        raise subprocess.TimeoutExpired("sleep", timeout)

    monkeypatch.setattr(held, "wait", wait)
    monkeypatch.setattr(held, "poll", lambda: None)
    found = []
    wait_until(lambda: found.append(process.poll()) or found[-1] is not None)
    assert found[-1] == 1
    monkeypatch.undo()
    assert stock(60) == -signal.SIGTERM


@pytest.mark.parametrize("task", ["training", "judging", "exporting", "reporting"])
def test_every_process_is_stopped_that_writes_nothing(task, tmp_path, monkeypatch):
    monkeypatch.setattr(children, "command", lambda *words: ["sleep", "3600"])
    monkeypatch.setattr(children.Process.__init__, "__defaults__", ((), 0.3))
    process = children.Processes().start(task, tmp_path, tmp_path / "log.txt")
    wait_until(lambda: process.poll() is not None)
    assert "had written nothing" in why(1, tmp_path / "log.txt")


def test_the_reason_of_an_end_is_found(tmp_path):
    log = tmp_path / "log.txt"
    assert why(1, log) == ""
    log.write_text("first\nyolov12: error: no images\nGoodbye\n\n")
    assert why(1, log) == "no images"
    log.write_bytes(b"Killed \xff\n")
    assert why(1, log) == "Killed \ufffd"
    log.write_text("yolov12: error: of the process before\n")
    start = log.stat().st_size
    assert why(1, log, start) == ""
    with log.open("a") as output:
        output.write("all 9 138 0.0196\n")
    assert why(1, log, start) == "all 9 138 0.0196"
    assert why(-9, log, start) == "killed by SIGKILL, as the kernel does when memory runs out"
    assert why(-15, log, start) == "killed by SIGTERM"
    assert why(-15, log) == "of the process before"  # such as what a signal has interrupted
