"""Warm-up, profile and failed attempts leave random generators and a user's own layers as they found them."""

import copy
import math
import random
from collections import deque
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from yolov12 import mas
from yolov12.mas.oom import Failure
from yolov12.mas.profiling import warmup
from yolov12.mas.profiling.ladder import make_ladder
from yolov12.mas.profiling.warmup import profile, warm_up
from yolov12.mas.scheduling.peak_model import CostModel
from yolov12.mas.scheduling.time_model import SpeedModel
from yolov12.mas.step.snapshots import PassState


class Noise(nn.Module):
    """Draws from every generator, and keeps state in every way."""

    def __init__(self, most):
        super().__init__()
        self.most, self.calls = most, 0
        self.sizes, self.shapes, self.counts, self.last = [], set(), {"all": 0}, deque(maxlen=2)
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("none", None)

    def forward(self, x):
        self.calls += 1
        self.sizes.append(len(x))
        self.shapes.add(x.shape)
        self.counts["all"] += 1
        self.last.append(len(x))
        self.written += 1
        self.replaced = self.replaced + len(x)
        self.new = "new"
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        if len(x) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return x * noise


def _generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.mark.parametrize("most", [8, 2, 0])
def test_warm_up_and_profile_leave_no_trace(most):
    noise = Noise(most)
    norms = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *norms, noise, nn.Conv2d(4, 4, 3), nn.Flatten())
    task = mas.TensorTask(lambda model, x: model(x).square().mean())
    batch = (torch.rand(8, 3, 8, 8),)
    engine = mas.Engine(model, task, mas.Config())
    kept = {name: value for name, value in vars(noise).items() if not name.startswith("_")}
    before = copy.deepcopy((kept, model.state_dict())), _generators()
    failure = warm_up(engine._step, "host", batch, task.workload(batch), CostModel(), SpeedModel(new_size_ms=0.0))
    ladder = make_ladder(engine._step, engine.meter, engine._calibration.layers, batch, 4)
    assert ((failure is None), ladder.guessed) == (most > 0, most == 0)
    assert _generators() == before[1]
    (attributes, state), now = before[0], vars(noise)
    assert {name: value for name, value in now.items() if not name.startswith("_")} == attributes
    assert all(now[name] is value for name, value in kept.items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "side_px", "budget_bytes", "passes"),
    [
        ("host", 1, math.inf, [(0, 2), (12, 4)]),  # two, as BatchNorm refuses one image of one pixel
        ("host", 640, math.inf, [(0, 1), (12, 4)]),
        ("host", 640, 0, [(0, 1), (0, 1), (0, 1), (12, 1)]),  # several images would go over a limit
        ("cuda", 640, 0, [(0, 8), (0, 8), (8, 8)]),
    ],
)
def test_the_warm_up_runs_few_images_and_measures_the_fullest(kind, side_px, budget_bytes, passes):
    model, ran = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten()), []
    model.register_forward_pre_hook(lambda module, inputs: ran.append((int(inputs[0][0]), len(inputs[0]))))
    task = mas.TensorTask(lambda model, x: model(x).square().mean())
    engine, batch = mas.Engine(model, task, mas.Config()), (torch.arange(16.0).reshape(16, 1, 1, 1),)
    work = replace(task.workload(batch), boxes=(1,) * 12 + (9,) + (1,) * 3, height=side_px, width=side_px)
    models = CostModel(), SpeedModel(new_size_ms=0.0)
    assert warm_up(engine._step, kind, batch, work, *models, budget_bytes=budget_bytes) is None
    assert ran == passes


@pytest.mark.parametrize(
    ("fits", "passes"),
    [
        (lambda first, images: True, [(0, 12), (0, 12), (4, 12)]),
        (lambda first, images: images <= 8, [(0, 12), (0, 8), (0, 8), (8, 8)]),
        # The image with most boxes needs more.
        (lambda first, images: images <= 8 or first == 0, [(0, 12), (0, 12), (4, 12), (0, 8), (0, 8), (8, 8)]),
        (lambda first, images: images <= 2, [(0, 12), (0, 8), (0, 4), (0, 2), (0, 2), (12, 2)]),
    ],
)
def test_a_group_is_tried_first_and_nothing_tells_that_it_did_not_fit(fits, passes, monkeypatch):
    """Micro-batches have its size later, so libraries need not look for kernels for another one."""
    ran, held, notes = [], [], []

    def forward(module, inputs):
        first, images = int(inputs[0][0]), len(inputs[0])
        ran.append((first, images))
        assert bool(held) == (images > 8)  # what others have is safe
        if not fits(first, images):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    @contextmanager
    def hold():
        held.append(True)
        yield
        held.clear()

    def copy_state(device, modules):
        assert modules  # as the model has a hook
        assert not held  # a failure of this would end the run
        return PassState(device, modules)

    monkeypatch.setattr("yolov12.mas.step.step.PassState", copy_state)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten())
    model.register_forward_pre_hook(forward)
    task = mas.TensorTask(lambda model, x: model(x).square().mean())
    engine, batch = mas.Engine(model, task, mas.Config()), (torch.arange(16.0).reshape(16, 1, 1, 1),)
    engine._step._note = notes.append
    work = replace(task.workload(batch), boxes=(1,) * 12 + (9,) + (1,) * 3)
    cost, speed, learned = CostModel(), SpeedModel(new_size_ms=0.0), []
    monkeypatch.setattr(cost, "observe", lambda features, needed_bytes: learned.append(features.images))
    assert warm_up(engine._step, "cuda", batch, work, cost, speed, group=12, held=hold) is None
    assert ran == passes
    fitted = passes[-1][1]
    assert learned == [fitted] * 2
    assert [images for images in (12, 8, 4, 2) if speed.warm(images, 1, 1)] == [fitted]
    assert notes == ["out-of-memory in a warm-up"] * sum(fitted < size for size in (8, 4))
    assert engine._step.notes_tries
    assert not held
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("most", [12, 32])
def test_a_profile_that_does_not_fit_goes_on_with_sizes_of_the_warm_up(most, monkeypatch):
    ran = []

    def fail(step, meter, layers, batch, images):
        ran.append((images, step.notes_tries))
        return Failure(images, "CUDA out of memory", 0)

    monkeypatch.setattr(warmup, "_profile", fail)
    engine = mas.Engine(nn.Conv2d(1, 4, 1), mas.TensorTask(lambda model, x: model(x).mean()), mas.Config())
    assert profile(engine._step, engine.meter, {}, (), most) is None
    assert ran == [(most, True), (8, True), (4, True), (2, True), (1, True)]


def test_each_failed_allocation_of_a_profile_counts():
    """Also with more images than the warm-up tries: a profile runs a BatchNorm group only if it is to fit."""
    notes = []

    def forward(module, inputs):
        if len(inputs[0]) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten())
    model.register_forward_pre_hook(forward)
    engine = mas.Engine(model, mas.TensorTask(lambda model, x: model(x).square().mean()), mas.Config())
    engine._step._note = notes.append
    assert profile(engine._step, engine.meter, {}, (torch.rand(16, 1, 1, 1),), 16)
    assert notes == ["out-of-memory in a warm-up"] * 2  # 16 and 8


def test_a_failed_attempt_draws_again_what_it_drew():
    noise = Noise(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), noise, nn.Flatten())
    task = mas.TensorTask(lambda model, x: model(x).square().mean())
    batch = (torch.rand(8, 3, 8, 8),)
    after = []
    for most in (4, 8):
        noise.most = most
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        engine = mas.Engine(model, task, mas.Config(bn_group=0, micro_batch=4 if most == 8 else 8))
        result = engine.step(batch)
        after.append((result.micro_batches, _generators()))
    assert after[0] == after[1]
    assert after[0][0] == (4, 4)
