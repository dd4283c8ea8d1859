"""The meter of the host: this machine's, and a simulated one in control groups and without."""

from pathlib import Path

import pytest
import torch

from tests.mas.memory.simulated import GIB, MIB, have_a_worker, limit_group
from yolov12.errors import ConfigError
from yolov12.mas.memory import host as host_memory
from yolov12.mas.memory.host import HostMemory, HostMeter
from yolov12.mas.memory.meter import meter_for
from yolov12.mas.memory.reading import Reading

needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")


# The host of this machine, measured in a process of its own: the C library would serve blocks from memory that earlier
# tests have freed and that stays resident. Linux counts resident pages per processor and adds them up in steps, hence
# the 8 MiB.

_MEASURE = """
import torch
from yolov12.mas.memory.host import HostMeter

def blocks(count, kib):
    return [torch.ones(kib * 1024, dtype=torch.uint8) for _ in range(count)]

def rise():
    return meter.peak_bytes() - allocated_bytes

meter = HostMeter()
allocated_bytes = meter.mark()
"""


@pytest.fixture
def measure(run_python):
    """Run lines that print bytes, after a first mark in a new process, and return what they print, in MiB."""

    def measure(lines):
        done = run_python("-c", _MEASURE + lines)
        assert done.returncode == 0, done.stderr
        return [int(number) / MIB for number in done.stdout.split()]

    return measure


@needs_linux
def test_host_peak_rises_by_what_was_allocated_and_falls_after_a_mark(measure):
    reserved, freed, marked, freed_at_once = measure("""
held = blocks(1, 200 * 1024)
print(meter.read().reserved_bytes - allocated_bytes)
del held
print(rise())
allocated_bytes = meter.mark()
print(rise())
blocks(1, 50 * 1024)
print(rise())
""")
    assert 192 <= reserved <= 208
    assert 192 <= freed <= 208
    assert marked <= 8
    assert 42 <= freed_at_once <= 58


@needs_linux
@pytest.mark.skipif(not host_memory.trim_heap(), reason="the C library cannot give its heap back")
def test_small_host_step_is_measured_after_a_large_one(measure):
    large, small = measure("""
held = blocks(3200, 64)
print(rise())
last = held.pop()  # at the end of the heap: the freed memory below it stays resident
del held
allocated_bytes = meter.mark()
held = blocks(800, 64)
print(rise())
""")
    assert 192 <= large <= 216
    assert 42 <= small <= 66


def test_host_of_this_machine():
    meter = meter_for(torch.device("cpu"))
    reading = meter.read()
    assert 0 < reading.allocated_bytes <= reading.reserved_bytes < reading.total_bytes
    assert 0 < reading.free_bytes < reading.total_bytes
    assert meter_for(torch.device("cpu"), 0.5).read().total_bytes == reading.total_bytes // 2
    assert meter_for(torch.device("cpu"), GIB).read().total_bytes == GIB
    assert meter.busy_percent() is None
    stopwatch = meter.stopwatch()
    assert stopwatch.elapsed_ms() is None
    stopwatch.stop()
    assert stopwatch.elapsed_ms() >= 0


# A simulated host


def test_host_without_a_control_group(invented):
    memory, _ = invented
    assert HostMeter(memory=memory).read() == Reading(GIB, GIB, 6 * GIB, 8 * GIB, GIB)


def test_host_in_nested_control_groups(invented):
    memory, _ = invented
    (memory.proc / "self/cgroup").write_text("0::/job/step\n")
    limit_group(memory.cgroups / "job", 4 * GIB, 3 * GIB, GIB // 2)
    limit_group(memory.cgroups / "job/step", "max", 3 * GIB, 0)
    assert HostMeter(memory=memory).read() == Reading(GIB, GIB, 3 * GIB // 2, 4 * GIB, 3 * GIB // 2)
    limited = HostMeter(2 * GIB, memory).read()
    assert (limited.total_bytes, limited.others_bytes) == (2 * GIB, 3 * GIB // 2)


def test_host_in_a_control_group_of_version_1(invented):
    memory, _ = invented
    (memory.proc / "self/cgroup").write_text("3:cpu:/x\n4:memory:/not/there\n0::/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit_group(memory.cgroups / "memory", 4 * GIB, 3 * GIB, GIB // 2, names)
    assert HostMeter(memory=memory).read() == Reading(GIB, GIB, 3 * GIB // 2, 4 * GIB, 3 * GIB // 2)


def test_host_whose_peak_cannot_be_reset_and_heap_not_be_given_back(invented, monkeypatch):
    memory, hold = invented
    monkeypatch.setattr(host_memory, "trim_heap", lambda: False)
    meter = HostMeter(memory=memory)
    assert meter.mark() == GIB
    hold(1500, 3000)
    assert meter.peak_bytes() == 3000 * MIB
    assert meter.mark() == GIB  # the other 476 MiB may be in the C library's heap
    hold(1800, 3000)  # the peak is that of the previous step
    assert meter.peak_bytes() == 1800 * MIB
    hold(900, 3200)
    assert meter.peak_bytes() == 3200 * MIB
    assert meter.read().allocated_bytes == 900 * MIB
    assert meter.mark() == 900 * MIB


@pytest.fixture
def trims(monkeypatch):
    """Return a list that gets an entry whenever the heap is returned to the system."""
    found = []
    monkeypatch.setattr(host_memory, "trim_heap", lambda: found.append(None) or True)
    return found


def test_equal_steps_on_the_host_keep_their_pages(invented, trims):
    memory, hold = invented
    meter, at = HostMeter(memory=memory), []
    for mark in range(1, 201):
        before = len(trims)
        hold(1024 + mark % 3, 3000)
        meter.mark()
        hold(1030, 3000)
        meter.peak_bytes()
        meter.release(thorough=False)  # as after each validation
        at += [mark] * (len(trims) - before)
        meter.read()
    assert at == [1, 2, 4, 8, 16, 32, 64, 128, 192]


@pytest.mark.parametrize(("limit", "trimmed"), [(None, 0), (3 * GIB, 1)])
def test_what_a_validation_leaves_in_the_heap_does_not_count_as_a_step_where_memory_is_short(
    limit, trimmed, invented, trims
):
    memory, hold = invented
    meter = HostMeter(limit, memory)
    for _ in range(2):
        meter.mark()
        hold(1200, 1200)
        meter.peak_bytes()
    hold(2000, 2000)  # the validation
    meter.read()
    before = len(trims)
    meter.mark()
    assert len(trims) - before == trimmed


def test_a_host_without_proc_is_one_clear_error(tmp_path):
    for read in (HostMemory.resident_bytes, HostMemory.room_bytes):
        with pytest.raises(ConfigError, match=r"memory cannot be read, as .* is missing: use Linux"):
            read(HostMemory(tmp_path, tmp_path))


def test_workers_of_a_host_training_count_in_its_limit(invented):
    memory, _ = invented
    have_a_worker(memory, 512)
    reading = HostMeter(4 * GIB, memory).read()
    assert (reading.reserved_bytes, reading.outside_bytes) == (GIB, GIB // 2)
    assert reading.budget_bytes(0.1) == int(3.5 * GIB - 0.4 * GIB)
    assert reading.others_bytes == GIB // 2  # what the machine does not have available, and this run does not hold
    assert HostMeter(memory=memory).read().budget_bytes(0) == 7 * GIB  # what is available is less by the worker already
