"""Several processes, one batch: over gloo, on the CPU, with a real YOLOv12-N in float64."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from yolov12.mas.normalize import cut

CASES = int(os.environ.get("YOLOV12_CASES", "100"))
RANK = Path(__file__).with_name("rank.py")
PLACES = ("copy", "preprocess", "forward", "assigner", "loss", "backward")


class Processes:
    """So many of `rank.py`, for one case after the other."""

    def __init__(self, size: int) -> None:
        self.size, self.folder, self._cases = size, Path(tempfile.mkdtemp()), 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        self._all = [
            subprocess.Popen(
                [sys.executable, str(RANK), str(self.folder)],
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def run(self, case):
        for process in self._all:
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        for process in self._all:
            assert "done\n" in iter(process.stdout.readline, "")  # Ultralytics has its say before
        files = [self.folder / f"{self._cases}.{rank}.pt" for rank in range(self.size)]
        self._cases += 1
        found = [torch.load(file, weights_only=True) for file in files]
        for file in files:
            file.unlink()
        return found

    def end(self):
        for process in self._all:
            process.stdin.close()
            process.stdout.close()
        assert [process.wait(60) for process in self._all] == [0] * self.size


@pytest.fixture(scope="module", params=[2, 4])
def processes(request):
    processes = Processes(request.param)
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def alone(tools):
    bench = tools.Bench(tools.build("detect", "yolov12n.yaml"))
    bench.preprocess = lambda batch: {**batch, "img": batch["img"].to(bench.dtype) / 255}
    bench.task._preprocess = bench.preprocess
    return bench


def draw(chance, size, groups=None):
    """A batch, how it is shared, and what fails on which rank."""
    group = chance.choice([1, 2])
    if groups is None:
        groups = [1] * size
        for _ in range(chance.randrange(size * 2)):
            groups[chance.randrange(size)] += 1
    images = sum(groups) * group + (chance.randrange(group) if group > 1 else 0)
    boxes = [chance.choice([0, 1, 3, chance.randrange(40), chance.randrange(150)]) for _ in range(images)]
    shares = list(groups)
    shares[-1] += len(cut(images, group)) - sum(groups)  # what is left over is the last rank's
    faults = [
        [
            [chance.choice([0, 0, 1, 2]), place, chance.randrange(295) if place in ("forward", "backward") else 0, error]
            for place, error in [(chance.choice(PLACES), chance.randrange(4)) for _ in range(chance.choice([0, 1, 2]))]
        ]
        for _ in range(size)
    ]
    seed, before = chance.randrange(2**16), chance.random() < 0.3
    return {"boxes": boxes, "group": group, "groups": shares, "faults": faults, "seed": seed, "before": before}


def assert_same(tools, found, wanted, case):
    assert tools.difference(found[0]["gradient"], wanted.gradient) <= 2e-5
    for rank in found:
        torch.testing.assert_close(rank["loss"], wanted.result.loss, rtol=2e-5, atol=1e-6)
        for name, item in wanted.result.items.items():
            torch.testing.assert_close(rank["items"][name], item, rtol=2e-5, atol=1e-6)
        assert rank["gradient_sum"] == found[0]["gradient_sum"]  # replicas are alike bit for bit
        assert rank["checksum"] == found[0]["checksum"]
        for name, buffer in wanted.buffers.items():
            torch.testing.assert_close(rank["buffers"][name], buffer, rtol=1e-6, atol=1e-6)
    assert sum(sum(rank["micro_batches"]) for rank in found) == len(case["boxes"])


@pytest.mark.parametrize("groups", [None, "forced"])
def test_gradient_is_that_of_one_process(tools, processes, alone, groups):
    chance = random.Random(processes.size)
    forced = {2: [3, 5], 4: [1, 2, 2, 3]}[processes.size] if groups else None
    fired = 0
    for _ in range(max(CASES * 7 // 50, 4)):
        case = draw(chance, processes.size, forced)
        found = processes.run(case)
        wanted = alone.whole(tools.batch(case["boxes"], case["seed"]), case["group"])
        assert_same(tools, found, wanted, case)
        fired += sum(rank["failures"] for rank in found)
    assert fired
