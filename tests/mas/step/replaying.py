"""Trainer of a small network, and a recorder that runs functions again where CUDA would replay kernels."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.step.graphs.recorder import Graphs
from yolov12.mas.step.step import Step
from yolov12.mas.task import TensorTask

MIB = 2**20


class AgainRecorder:
    """Runs a function again instead of its kernels, and copies the results to where they were at first."""

    def __init__(self, meter):
        self.meter, self.recorded, self.released, self.error = meter, 0, 0, None
        self.pool_bytes = 0  # of each recording

    @contextmanager
    def apart(self):
        yield

    def record(self, function):
        if self.error is not None:
            raise self.error
        self.recorded += 1
        found = function()
        self.meter.cached_bytes += self.pool_bytes

        def replay():
            for place, value in zip(found, function(), strict=True):
                if place is not None:
                    place.copy_(value)

        return found, replay

    def release(self):
        self.released += 1
        self.meter.cached_bytes = 0


class Meter(ReplayMeter):
    """Its allocator has a cache."""

    cached_bytes = 0

    def read(self):
        reading = super().read()
        return replace(reading, reserved_bytes=reading.allocated_bytes + self.cached_bytes)


class Planner:
    """Gives each batch the next of some plans, the last again and again."""

    def __init__(self, *plans, level=0):
        self.plans, self.level, self.failures, self.done_with = list(plans), level, [], []

    def plan(self, start, failure):
        if failure is not None:
            self.failures.append(failure)
            return self.latest
        self.latest = self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]
        return self.latest

    def done(self, start, stop, allocated_bytes, peak_bytes, is_replay=False):
        self.done_with.append((stop - start, allocated_bytes, peak_bytes, is_replay))


SOURCE = """
class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.unused = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        rest = [self.two(x), self.unused(x)]
        return {"deep": x, "one": self.one(x), "rest": rest, "size": 4, "plain": x.detach() * 2}

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.kept = [self.weight]  # as PyTorch's recurrent layers do

    def forward(self, x):
        return x * self.kept[0]
"""

SPACE = {"__name__": "torch.made", "nn": nn, "torch": torch}

exec(SOURCE, SPACE)  # so that its code counts as known


class Trainer:
    """A small model that is trained with replays and, as `plain`, without."""

    def __init__(self, *layers, plans=(KEEP_ALL,), seed=0, slow_replay=False, limit_bytes=2**40):
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.SiLU(), *layers,
            nn.Upsample(scale_factor=2.0), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU(),
        )  # fmt: skip
        self.model = nn.Sequential(body, SPACE["Head"]()).double()
        self.model[0][0].bias = None
        self.plain = copy.deepcopy(self.model)
        self.meter = Meter(2**40, [0])
        self.recorder = AgainRecorder(self.meter)
        self.needed_bytes, self.limit_bytes, self.slow_replay = 10 * MIB, limit_bytes, slow_replay
        self.usual_ms = 5.0
        self.lines, self.notes, self.on_loss = [], [], lambda: None
        graphs = Graphs(self.recorder, lambda *_: (self.needed_bytes, 1.25 * self.needed_bytes, self.limit_bytes))
        self.step = self.make(self.model, graphs, plans)
        self.reference = self.make(self.plain, None, plans)

    def make(self, model, graphs, plans):
        def loss(model, x):
            out = model(x)
            if model is self.model:
                replay_ms = 5.0 if self.slow_replay else 1.0
                self.meter.tick(replay_ms if self.step.replays.is_replay else self.usual_ms)
                self.on_loss()
            return (out["one"] * out["plain"][:, :2]).mean() + out["rest"][0].square().mean() * out["size"]

        task = TensorTask(loss, may_replay=True)
        layers = {"0": model[0]}
        told = {"log": self.lines.append, "note": self.notes.append}
        step = Step(model, task, self.meter, torch.Tensor.backward, layers, graphs=graphs, **told)
        step.plans = plans
        return step

    def run(self, *plan, level=0, images=None, around=nullcontext()):  # noqa: B008
        """Run a batch with both, and assert that gradients, statistics and loss are the same; return the result."""
        count = sum(map(sum, plan))
        batch = (torch.randn(count, 3, 4, 4, dtype=torch.float64),) if images is None else images
        self.planner = Planner(plan, level=level)
        with around:
            found = self.step.run(batch, count, self.planner)
        self.expected = self.reference.run(batch, count, Planner(plan, level=level))
        for ours, other in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-12, atol=1e-14)
        for (name, ours), other in zip(self.model.named_buffers(), self.plain.buffers(), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-14, msg=name)
        torch.testing.assert_close(found.loss, self.expected.loss, rtol=1e-12, atol=1e-14)
        self.replayed = found.replayed
        return found


def captured(**options):
    """Return a trainer that replays all of a batch in two micro-batches."""
    trainer = Trainer(**options)
    for _ in range(3):
        trainer.run((2,), (2,))
    assert trainer.replayed == 2
    return trainer
