"""On the CPU, a training stays in one pool with its loader workers, its cached images and a neighbour."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from yolov12.mas.journal.journal import read_rows
from yolov12.mas.memory.cgroups import CGROUPS, MEMBERSHIP, cgroup_folders, read_fields

MIB = 2**20
SCRIPT = Path(__file__).with_name("pool.py")
NEIGHBOUR = """
import os, sys
from pathlib import Path

if sys.argv[1]:
    Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
held = []
for line in sys.stdin:
    while len(held) > int(line):
        held.pop()
    while len(held) < int(line):
        held.append(bytearray(b"1") * 2**20)
    print(flush=True)
"""
LIMIT_MIB, WORKER_MIB = 1040, 150
NEIGHBOUR_MIB = [0, 300, 425, 0]  # what the neighbour holds during each batch


@pytest.fixture
def group():
    """Make a control group of `LIMIT_MIB` inside of this process' own: its folder; None where that is not permitted."""
    groups = [folder for folder in cgroup_folders("memory", CGROUPS, MEMBERSHIP) if (folder / "memory.stat").exists()]
    folder = (groups[-1] if groups else CGROUPS) / f"yolov12-test-{os.getpid()}"
    made = False
    for name in ("memory.max", "memory.limit_in_bytes"):  # version 2 and version 1
        try:
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(str(LIMIT_MIB * MIB))
            made = True
        except OSError:
            continue
    yield folder if made else None
    for _ in range(1200):  # the kernel needs a moment to see that its processes are gone
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.05)


@pytest.fixture
def neighbour(group):
    """Return a function that lets another process in the group hold a number of MiB."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", NEIGHBOUR, str(group or "")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def hold(mib):
        process.stdin.write(f"{mib}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "\n"

    yield hold
    assert process.poll() is None  # nobody killed it
    process.communicate()


def workers_mib(parent):
    """Return what the child processes hold for themselves, in MiB, according to the kernel."""
    stats = [path.read_text().rpartition(")") for path in Path("/proc").glob("[0-9]*/stat")]
    children = [int(head.split()[0]) for head, _, tail in stats if int(tail.split()[1]) == parent]
    fields = [read_fields(Path(f"/proc/{pid}/smaps_rollup")) for pid in children]
    return sum(each["Private_Clean"] + each["Private_Dirty"] for each in fields) / MIB


def test_a_training_its_workers_and_a_neighbour_stay_in_their_pool(
    trainings, tiny_model, start_script, tmp_path, group, neighbour
):
    layers = ["head", "neck.2", *(f"backbone.{index}" for index in range(6))]
    settings = {
        **trainings.TINY, "imgsz": 320, "batch": 16, "nbs": 16, "epochs": 4, "cache": "ram", "val": False,
        "mem_limit": f"{LIMIT_MIB}MiB", "bn_group": 1, "disable_mas_layers": layers, "project": str(tmp_path),
    }  # fmt: skip
    neighbour(NEIGHBOUR_MIB[0])
    training = start_script(SCRIPT, tiny_model, json.dumps(settings), WORKER_MIB, group or "")
    folder, beside_mib, log = None, [], []
    for line in training.stdout:
        log.append(line)
        if line.startswith("batch "):
            folder = Path(line.split(" ", 1)[1].strip())
            beside_mib.append(workers_mib(training.pid))
            done = len(beside_mib) == len(NEIGHBOUR_MIB)
            neighbour(0 if done else NEIGHBOUR_MIB[len(beside_mib)])
            training.stdin.write("stop\n" if done else "\n")
            training.stdin.flush()
    assert training.wait(60) == 0, "".join(log)[-3000:]
    assert "stopped\n" in log
    rows = read_rows(folder / "memory.csv")
    totals = [float(row["peak_mib"]) + mib for row, mib in zip(rows, beside_mib, strict=True)]
    assert min(beside_mib) > 2 * WORKER_MIB
    assert max(totals) <= LIMIT_MIB
    if group is None:
        return
    largest = [max(map(int, row["micro_batches"].split())) for row in rows]
    budgets_mib = [float(row["budget_mib"]) for row in rows]
    assert largest[2] < largest[0]  # the neighbour holds most
    assert budgets_mib[2] < min(budgets_mib[0], budgets_mib[3])
    events = {**read_fields(group / "memory.oom_control"), **read_fields(group / "memory.events")}
    assert events["oom_kill"] == 0
    used = group / "memory.max_usage_in_bytes", group / "memory.peak"
    assert all(int(file.read_text()) < LIMIT_MIB * MIB for file in used if file.exists())
