"""Small variants, on the CPU, of benchmarks that have no file of tests; and that each benchmark is run by a test."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import benchmarks
from benchmarks.common.processes import environment


@pytest.mark.deep
def test_exact_gradients_of_both_tasks_are_compared(run_small):
    tasks = run_small("exact_tasks")["tasks"]
    assert set(tasks) == {"segment", "pose"}
    for rows in tasks.values():
        assert rows["exact"]["micro_batches"] == rows["by images"]["micro_batches"] == [2] * 4
        assert rows["exact"]["gradient_error"] < 1e-5 < 0.01 < rows["by images"]["gradient_error"]
        assert 0 < rows["rounding_error"] < 1e-3


@pytest.mark.deep
def test_both_prefetches_are_trained_with_in_turn(run_small):
    found = run_small("loading")
    assert [row["ahead"] for row in found["n"]["rows"]] == [4, 2, 4, 2]
    assert all(row["images_per_s"] > 0 for row in found["n"]["rows"])


@pytest.mark.deep
def test_ranks_hold_in_all_parts(run_small):
    found = run_small("ranks")
    assert set(found["measured_on"]) == {"gradient", "shared_card", "squeeze", "death", "speed", "checksum"}
    assert not any(found[part]["faults"] for part in found["measured_on"])


@pytest.mark.deep
def test_the_model_of_the_demo_is_made(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "demo_model", "--small", "--device", "cpu", "--out", str(tmp_path)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    found = json.loads((tmp_path / "demo_model.json").read_text("utf-8"))
    assert found["file"]["sha256"] == hashlib.sha256((tmp_path / "yolov12n-demo.pt").read_bytes()).hexdigest()
    assert len(found["validation"]["map50_of_class"]) == 8  # without the two that are held back


def test_every_benchmark_is_run_by_a_test():
    text = "".join(file.read_text("utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    ways = (
        r'run_small\("{0}"\)|"benchmarks", "{0}"|\["{0}", |from benchmarks import [\w, ]*\b{0}\b|\.{0} import __main__'
    )
    assert [name for name in benchmarks() if not re.search(ways.format(name), text)] == []
