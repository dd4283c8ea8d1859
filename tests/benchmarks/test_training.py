"""The benchmark of whole trainings: what it measures, and on the CPU that both kinds of training run."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import training
from benchmarks.common.processes import environment
from yolov12.training.data.loader import ResumableLoader


class _Clock:
    def __init__(self):
        self.s = 0.0

    def perf_counter(self):
        return self.s


class _Loader:
    """A loader with prefetched batches; each further one takes half a second."""

    num_workers = 1

    def __init__(self, clock, prefetched):
        self._clock, self.prefetched = clock, prefetched

    def __iter__(self):
        while True:
            if self.prefetched:
                self.prefetched -= 1
            else:
                self._clock.s += 0.5
            yield {}


def test_no_batch_that_was_prefetched_before_is_measured(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(training, "time", clock)
    loader = _Loader(clock, prefetched=5)
    trainer = SimpleNamespace(epoch=0, train_loader=loader, device=torch.device("cpu"), batch_size=4)
    measurement = training.Measurement(2)

    def epoch(prefetched_later):
        measurement.on_train_epoch_start(trainer)
        batches = iter(loader)
        for _ in range(2):
            next(batches)
            measurement.on_train_batch_start(trainer)
            clock.s += 1.5  # the step
            measurement.on_train_batch_end(trainer)
        measurement.on_train_epoch_end(trainer)
        loader.prefetched = prefetched_later

    epoch(prefetched_later=3)
    trainer.epoch = 1
    with pytest.raises(training._Measured):
        epoch(prefetched_later=0)
    result = measurement.result
    assert (result["first_epoch_s"], result["taken_out"], result["batches"]) == (3.0, 4, 2)
    assert (result["seconds"], result["images_per_s"], result["wait_percent"]) == (4.0, 2.0, 25.0)


def test_images_that_the_device_augments_are_not_rendered_when_they_are_taken_out(monkeypatch):
    """Else the first of the prefetched batches would count as waited for, and all others would be measured."""
    clock = _Clock()
    monkeypatch.setattr(training, "time", clock)

    class Packed(_Loader):
        def _take(self):
            return next(super().__iter__())

        def __iter__(self):
            for batch in super().__iter__():
                self._clock.s += 0.1
                yield batch

    assert training._take_out(Packed(clock, prefetched=5)) == 6
    assert callable(ResumableLoader._take)


def test_ratios_compare_both_trainings_of_one_round():
    rows = [
        {"model": "n", "source": "ram", "round": round_, "variant": variant, "images_per_s": rate, "first_epoch_s": s}
        for round_, variant, rate, s in ((0, "stock", 200.0, 9.0), (0, "ours", 300.0, 8.0), (1, "ours", 1.0, 1.0))
    ]
    expected = {"model": "n", "source": "ram", "round": 0, "ratio": 1.5, "first_epoch_longer_s": -1.0}
    assert training.ratios(rows) == [expected]


@pytest.mark.deep
def test_the_small_variant_runs_both_trainings(tmp_path):
    out = tmp_path / "training.json"
    command = [sys.executable, "-m", "benchmarks", "training", "--small", "--out", str(out)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    found = json.loads(out.read_text("utf-8"))
    assert found["ratios"][0]["ratio"] > 0
    assert found["command"] == "python -m benchmarks training --small --out training.json"
