"""The benchmark of endurance: its counts agree, in small runs of its parts."""

import itertools
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import endurance, endurance_failures, endurance_model, endurance_neighbour
from benchmarks.common.allocations import limit_allocator


def test_failures_are_counted_and_change_nothing(monkeypatch):
    monkeypatch.setattr(endurance_failures, "STEPS", 4)
    found = endurance_failures.exact(failures=1, seconds=60)
    assert found["injected"] == found["counted"] > 0
    assert found["updates"] == found["updates_expected"] == 4
    assert (found["images"], found["images_lost"]) == (found["wanted_images"], 0)
    assert found["largest_difference_of_weights"] < 1e-5
    assert 0 < found["difference_by_a_rounding_error"] < 1e-5
    assert found["steps_in_smaller_groups"] == 0


def test_parts_without_time_count_nothing(monkeypatch):
    monkeypatch.setattr(endurance_failures, "STEPS", 1)
    for part in (endurance_failures.exact, endurance_failures.trainings):
        found = part(failures=0, seconds=0)
        assert (found["injected"], found["counted"], found["operations"]) == (0, 0, [])


def test_a_simulated_neighbour_interrupts_nothing():
    found = endurance_neighbour.simulated(hours=0.02)
    assert found["changes"] > 10
    assert found["out_of_memories"] > 0
    assert found["updates"] == found["steps"] > 20
    assert (found["images"], found["images_lost"], found["interruptions"]) == (found["images_wanted"], 0, 0)


def test_a_schedule_is_drawn_from_its_seed():
    changes = endurance_neighbour.schedule(2.0, 0, 0.4)
    assert changes == endurance_neighbour.schedule(2.0, 0, 0.4) != endurance_neighbour.schedule(2.0, 1, 0.4)
    assert all(1.0 <= later - earlier <= 5.0 for (earlier, _), (later, _) in itertools.pairwise(changes))
    assert max(held for _, held in changes) <= 0.4


def test_stock_meets_changes_at_the_rate_of_ours(monkeypatch):
    calls = []

    def call(function, **arguments):
        calls.append(arguments)
        return SimpleNamespace(result=dict)

    monkeypatch.setattr(endurance_neighbour, "Call", call)
    assert len(list(endurance_neighbour.neighbour("cuda", seconds=100.0, hours=0.1))) == 2
    ours, stock = calls
    assert stock["is_stock"]
    assert not ours["is_stock"]
    assert ours["period_s"] == stock["period_s"]


def test_a_failure_of_stock_is_drawn_over_a_whole_step():
    trainer = SimpleNamespace(epochs=2, batch_size=8, train_loader=SimpleNamespace(dataset=range(16)))
    failed = set()
    for seed in range(20):
        failure = endurance_failures._OneFailure("cpu", random.Random(seed))
        made = []
        for trainer.epoch in (0, 1, 1):
            failure.begin(trainer)
            made = []
            try:
                for _ in range(3):
                    made.append(torch.ones(2))
            except torch.cuda.OutOfMemoryError:
                break
            failure.end(trainer)
        failure.leave()
        assert len(failure.mode.injected) == 1
        assert (failure.wanted, failure.trained) == (32, 16)
        failed.add(len(made))
    assert failed == {0, 1, 2}


def test_stock_is_not_joined(monkeypatch):
    monkeypatch.setitem(sys.modules, "yolov12.seams", SimpleNamespace())
    with pytest.raises(AssertionError, match="joined"):
        endurance_model.training(device="cpu", data="", is_stock=True)


def test_only_a_gpu_is_limited(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    limit_allocator("cpu")
    assert limits == []
    limit_allocator("cuda")
    assert limits == [0.95]


@pytest.mark.deep
def test_all_parts_run(tmp_path, monkeypatch):
    out = tmp_path / "endurance.json"
    monkeypatch.setattr(sys, "argv", ["endurance", "--out", str(out), "--small", "--device", "cpu"])
    assert endurance.main() == 0
    found = json.loads(out.read_text())
    assert found["failures"]["trainings"]["injected"] == found["failures"]["trainings"]["counted"]
    stock = found["failures"]["stock"]
    assert stock["injected"] == stock["runs"] == 1
    assert stock["images_trained"] + stock["images_not_trained"] == stock["images_wanted"] == 240
    ours, stock = (found["kills"][name] for name in ("ours", "stock"))
    assert ours["bit_equal_weights"] == ours["trainings"] > 0
    assert stock["trainings"] > 0  # with equal weights if no kill comes after its first epoch
