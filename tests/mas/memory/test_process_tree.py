"""Memory of child processes: in an invented /proc, and of real forks that share pages with their parent."""

from pathlib import Path

import pytest

from yolov12.mas.memory.process_tree import ChildProcesses

KIB, MIB = 2**10, 2**20
PAGES = 256  # pages of 4 KiB in a MiB


class Family:
    """An invented /proc, in which this process is number 10."""

    def __init__(self, folder):
        self.proc = folder / "proc"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self/stat").write_text("10 (python) S 1 10")
        self.memory("self", rss=1000, pss=600, private=400)
        (self.proc / "meminfo").write_text("MemTotal: 1 kB\n")

    def process(self, pid, parent, name="python", **memory):
        (self.proc / str(pid)).mkdir(exist_ok=True)
        (self.proc / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} 10 10 0")
        self.memory(pid, **memory)

    def memory(self, pid, rss, pss, private):
        sizes = {"Rss": rss, "Pss": pss, "Private_Clean": 0, "Private_Dirty": private}
        text = "".join(f"{name}: {int(size * KIB)} kB\n" for name, size in sizes.items())
        (self.proc / str(pid) / "smaps_rollup").write_text(f"5640-7ffc ---p 00000000 00:00 0    [rollup]\n{text}")
        (self.proc / str(pid) / "statm").write_text(f"1 {rss * PAGES} 1")


@pytest.fixture
def family(tmp_path, monkeypatch):
    monkeypatch.setattr("yolov12.mas.memory.process_tree._PAGE_BYTES", 4096)
    return Family(tmp_path)


def test_pages_of_several_processes_count_once(family):
    """Two workers share 400 MiB with their parent and 300 MiB with each other, and have 50 and 70 MiB of their own."""
    family.memory("self", rss=1000, pss=600 + 400 / 3, private=600)
    family.process(11, 10, rss=750, pss=400 / 3 + 150 + 50, private=50)
    family.process(12, 10, rss=770, pss=400 / 3 + 150 + 70, private=70)
    assert ChildProcesses(family.proc).held_bytes() == pytest.approx(420 * MIB, abs=3 * KIB)


def test_children_of_children_count_and_other_processes_do_not(family):
    family.process(11, 10, rss=100, pss=100, private=100)
    family.process(13, 12, rss=30, pss=30, private=30)
    family.process(12, 11, name="a (b) S 1", rss=20, pss=20, private=20)
    family.process(14, 1, rss=7000, pss=7000, private=7000)
    assert ChildProcesses(family.proc).held_bytes() == 150 * MIB


def test_a_name_that_the_kernel_cut_within_a_letter_is_a_name(family):
    family.process(11, 10, rss=100, pss=100, private=100)
    (family.proc / "12").mkdir()
    (family.proc / "12/stat").write_bytes(b"12 (" + "обучение".encode()[:15] + b") S 10 10")
    assert ChildProcesses(family.proc).held_bytes() == 100 * MIB


def test_a_sandbox_may_hide_all_processes(family, monkeypatch):
    def refuse(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert ChildProcesses(family.proc).held_bytes() == 0


def test_pages_that_outsiders_have_too_do_not_hide_what_workers_hold(family):
    """A fork server has most of the pages of this process, whose proportional set size is therefore small."""
    family.memory("self", rss=1000, pss=100, private=50)
    family.process(11, 10, rss=300, pss=120, private=90)
    assert ChildProcesses(family.proc).held_bytes() == 90 * MIB


def test_a_process_that_ends_while_it_is_counted_counts_nothing(family):
    family.process(11, 10, rss=100, pss=100, private=100)
    for name in ("statm", "smaps_rollup"):
        (family.proc / "11" / name).unlink()
    assert ChildProcesses(family.proc).held_bytes() == 0


def test_between_two_counts_growth_is_added_at_once(family):
    now_s = [100.0]
    children = ChildProcesses(family.proc, lambda: now_s[0])
    family.process(11, 10, rss=500, pss=300, private=100)
    family.memory("self", rss=1000, pss=800, private=600)
    assert children.held_bytes() == 100 * MIB
    family.memory(11, rss=580, pss=380, private=180)
    now_s[0] += 0.5
    assert children.held_bytes() == 180 * MIB
    family.memory(11, rss=400, pss=200, private=10)
    assert children.held_bytes() == 100 * MIB  # what was released is known after the next count
    now_s[0] += 0.6
    assert children.held_bytes() == 10 * MIB


def test_counting_takes_a_hundredth_of_the_time_at_most(family):
    clock, counts = [0.0], []
    children = ChildProcesses(family.proc, lambda: clock[0])
    stock = children._count

    def slow():
        counts.append(clock[0])
        clock[0] += 0.05
        stock()

    children._count = slow
    while clock[0] < 20:
        children.held_bytes()
        clock[0] += 0.25
    assert len(counts) == 4  # at 0, 5, 10 and 15 s


def test_without_proc_there_are_no_children(tmp_path):
    assert ChildProcesses(tmp_path).held_bytes() == 0


REAL = """
import multiprocessing, sys
from pathlib import Path
import numpy as np
from yolov12.mas.memory.process_tree import ChildProcesses

shared = np.ones(150 * 2**20, np.uint8)

def work(own_mib, ready, stop):
    own = np.ones(own_mib * 2**20, np.uint8)
    assert shared.sum() == len(shared)
    ready.release()
    stop.wait()

ready, stop = multiprocessing.Semaphore(0), multiprocessing.Event()
before = ChildProcesses(Path("/proc")).held_bytes()
workers = [multiprocessing.Process(target=work, args=(mib, ready, stop)) for mib in (40, 60)]
for worker in workers:
    worker.start()
for worker in workers:
    ready.acquire()
print(before, ChildProcesses(Path("/proc")).held_bytes())
stop.set()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc here")
def test_forked_workers_count_only_for_what_they_hold_themselves(start_script, tmp_path):
    (tmp_path / "real.py").write_text(REAL)
    output, _ = start_script(tmp_path / "real.py").communicate()
    before, held = map(int, output.split())
    assert before == 0
    assert 100 * MIB <= held < 150 * MIB  # not the 150 MiB that they share with their parent
