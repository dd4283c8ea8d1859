"""Several ranks that share a batch, over gloo on the CPU, with a real YOLOv12-N in float64."""

from __future__ import annotations

import json
import random
import socket
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from yolov12.mas.distributed.ranks import ProcessRanks
from yolov12.mas.scheduling.groups import split_groups
from yolov12.mas.step.step import Step

RANK = Path(__file__).with_name("rank.py")
PLACES = ("copy", "preprocess", "forward", "assigner", "loss", "backward")


class Processes:
    """Processes of `rank.py`, which run one case after the other."""

    def __init__(self, size, folder, start, port) -> None:
        self.size, self.folder, self._cases = size, folder, 0
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        self._all = [start(RANK, folder, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]

    def run(self, case):
        for process in self._all:
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        stuck = threading.Timer(800, lambda: [process.end() for process in self._all])
        stuck.start()
        for process in self._all:
            assert "done\n" in iter(process.stdout.readline, "")  # Ultralytics prints lines before
        stuck.cancel()
        files = [self.folder / f"{self._cases}.{rank}.pt" for rank in range(self.size)]
        self._cases += 1
        found = [torch.load(file, weights_only=True) for file in files]
        for file in files:
            file.unlink()
        return found

    def end(self):
        for process in self._all:
            process.stdin.close()
        assert [process.wait(800) for process in self._all] == [0] * self.size


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, start_script, reserve_port, tmp_path_factory):
    processes = Processes(request.param, tmp_path_factory.mktemp("cases"), start_script, reserve_port())
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def alone(tools):
    bench = tools.Bench(tools.build("detect", "yolov12n.yaml"))
    bench.preprocess = lambda batch: {**batch, "img": batch["img"].to(bench.dtype) / 255}
    bench.task.preprocess = bench.preprocess
    return bench


def fault(chance):
    """Return a random fault: attempt, place, module and kind of error."""
    place = chance.choice(PLACES)
    module = chance.randrange(295) if place in ("forward", "backward") else 0
    return [chance.choice([0, 0, 1, 2]), place, module, chance.randrange(4)]


def draw(chance, size, groups=None):
    """Return a random case: a batch, its shares, and the faults of each rank."""
    group = chance.choice([1, 2])
    if groups is None:
        groups = [1] * size
        for _ in range(chance.randrange(size * 2)):
            groups[chance.randrange(size)] += 1
    images = sum(groups) * group + (chance.randrange(group) if group > 1 else 0)
    boxes = [chance.choice([0, 1, 3, chance.randrange(40), chance.randrange(150)]) for _ in range(images)]
    shares = list(groups)
    shares[-1] += len(split_groups(images, group)) - sum(groups)  # the last rank takes the remaining groups
    faults = [[fault(chance) for _ in range(chance.choice([0, 1, 2]))] for _ in range(size)]
    seed, before = chance.randrange(2**16), chance.random() < 0.3
    return {"boxes": boxes, "group": group, "groups": shares, "faults": faults, "seed": seed, "before": before}


def assert_same(tools, found, wanted, case):
    assert tools.difference(found[0]["gradient"], wanted.gradient) <= 2e-5
    for rank in found:
        torch.testing.assert_close(rank["loss"], wanted.result.loss, rtol=2e-5, atol=1e-6)
        for name, item in wanted.result.items.items():
            torch.testing.assert_close(rank["items"][name], item, rtol=2e-5, atol=1e-6)
        assert rank["gradient_sum"] == found[0]["gradient_sum"]  # replicas are equal bit for bit
        assert rank["checksum"] == found[0]["checksum"]
        for name, buffer in wanted.buffers.items():
            torch.testing.assert_close(rank["buffers"][name], buffer, rtol=1e-6, atol=1e-6)
    assert sum(sum(rank["micro_batches"]) for rank in found) == len(case["boxes"])


@pytest.mark.parametrize("groups", [pytest.param(None, marks=pytest.mark.deep), "forced"])
def test_gradient_is_that_of_one_process(tools, processes, alone, groups):
    chance = random.Random(processes.size)
    forced = {2: [3, 5], 4: [1, 2, 2, 3]}[processes.size] if groups else None
    fired = 0
    for _ in range(settings.default.max_examples // 10):
        case = draw(chance, processes.size, forced)
        found = processes.run(case)
        wanted = alone.whole(tools.batch(case["boxes"], case["seed"]), case["group"])
        assert_same(tools, found, wanted, case)
        fired += sum(rank["failures"] for rank in found)
    assert fired


def shared(boxes, groups, **more):
    case = {"boxes": boxes, "group": 1, "groups": groups, "faults": [[]] * len(groups), "seed": 1, "before": True}
    return {**case, **more}


def test_a_rank_with_an_empty_share_takes_part(tools, processes, alone):
    boxes, groups = [3, 0, 20], [2, *[0] * (processes.size - 2), 1]
    if processes.size == 2:
        boxes, groups = [3, 0], [2, 0]
    found = processes.run(case := shared(boxes, groups))
    assert_same(tools, found, alone.whole(tools.batch(boxes, 1), 1), case)


def test_all_ranks_end_a_batch_that_fails_on_one_and_can_continue(tools, processes, alone):
    """A rank that failed is named rather than one on which the batch does not fit, and with its latest words."""
    boxes, groups = [3, 0, 20, 1], [1] * processes.size
    groups[0] += len(boxes) - sum(groups)
    last = processes.size - 1
    kinds = {"fit": "DoesNotFitError", "other": "ValueError"}
    for troubles in (
        {last: ("fit", "too large")},
        {0: ("other", "broken")},
        {0: ("fit", "still too large"), last: ("other", "no file")},
        {0: ("other", "broken again"), last: ("fit", "too large as well")},
        {last: ("fit", "too large once more")},
    ):
        found = [rank["error"] for rank in processes.run(shared(boxes, groups, troubles=troubles))]
        named = next((rank for rank, (kind, _) in troubles.items() if kind == "other"), next(iter(troubles)))
        kind, words = troubles[named]
        assert found.pop(named) == f"{kinds[kind]}: {words}"
        error = "RankError" if kind == "other" else "DoesNotFitError"
        assert set(found) == {f"{error}: rank {named} ({socket.gethostname()}): {words}"}
    found = processes.run(case := shared(boxes, groups))
    assert_same(tools, found, alone.whole(tools.batch(boxes, 1), 1), case)


@pytest.mark.parametrize("head", ["masks", "keypoints of two heads"])
def test_losses_with_several_normalisers(tools, processes, head):
    """Normalisers are those of all ranks: with unequal shares, an empty one, failures in both passes, and an error."""
    single = tools.small_bench(head)
    single.preprocess = lambda batch: {**batch, "img": batch["img"].to(single.dtype) / 255}
    single.task.preprocess = single.preprocess
    boxes, last = [3, 0, 20, 1, 0, 7, 0, 2], processes.size - 1
    groups = [5, 1, *[1] * (processes.size - 2)]
    groups[0] += len(boxes) - sum(groups)
    for shares, images in ((groups, 8), ([*groups[:-1], 0], 8 - groups[-1])):
        case = shared(boxes[:images], shares, head=head)
        wanted = single.whole(tools.batch_for(head, boxes[:images], 1), 1)
        case["faults"] = [[[1, "forward", 3, 0]], *[[[2, "loss", 0, 1]]] * last]
        found = processes.run(case)
        assert tools.difference(found[0]["gradient"], wanted.gradient) <= 1e-6
        assert_same(tools, found, wanted, case)
        assert found[0]["failures"]
    found = processes.run(shared(boxes, groups, head=head, troubles={last: ("fit", "what it says")}))
    assert found[last]["error"] == "DoesNotFitError: what it says"
    assert all(rank["error"].endswith("what it says") for rank in found)
    found = processes.run(case := shared(boxes, groups, head=head))
    assert_same(tools, found, single.whole(tools.batch_for(head, boxes, 1), 1), case)


def test_a_replica_that_differs_is_found(processes):
    boxes, groups = [3] * processes.size, [1] * processes.size
    assert all("error" not in rank for rank in processes.run(shared(boxes, groups, flip=-1)))
    found = processes.run(shared(boxes, groups, flip=1))
    assert all(rank["error"].startswith("RankError: rank 1 (") for rank in found)
    assert all("other weights" in rank["error"] for rank in found)
    found = processes.run(shared(boxes, groups, flip=1, troubles={0: ("fit", "too large")}))
    assert found[0]["error"] == "DoesNotFitError: too large"  # a share that failed is the first thing to tell
    assert all(rank["error"].endswith("too large") for rank in found)


def test_memory_for_sums_is_allocated_before_ranks_agree(tools):
    """Later, a failed allocation on one rank would end all ranks."""
    calls = []

    class Recording:
        rank, size, alike = 0, 2, True

        def reserve(self, tensors):
            calls.append(("reserve", sum(tensor.numel() for tensor in tensors)))

        def agree(self, status, failure=None):
            calls.append(("agree", failure))
            return [status]

        def sum(self, tensors):
            calls.append(("sum", sum(tensor.numel() for tensor in tensors)))

    bench = tools.Bench(tools.build("detect", "yolov12n.yaml"))
    bench.step = Step(bench.model, bench.task, bench.meter, torch.Tensor.backward, bench.layers, ranks=Recording())
    bench.run(tools.batch([2, 1], 0))
    assert [name for name, _ in calls] == ["reserve", "agree", "sum", "sum"]
    (_, reserved), _, (_, few), (_, all_gradients) = calls
    assert few < 10
    assert all_gradients <= reserved


def test_memory_for_the_numbers_of_a_loss_is_reserved_once():
    """They are summed in double precision, after ranks have agreed."""
    ranks = object.__new__(ProcessRanks)
    ranks._flat = {}
    found = []
    for _ in range(2):
        ranks.reserve([torch.zeros(3)])
        found.append(ranks._flat[torch.device("cpu"), torch.float64])
    assert found[0] is found[1]
    ranks._buffer((torch.device("cpu"), torch.float64), [torch.zeros(8, dtype=torch.float64)] * 8)
    assert ranks._flat[torch.device("cpu"), torch.float64] is found[0]
