"""Whichever allocation of a step fails, the step ends as without the failure, and the journal counts it."""

import json

import pytest
import torch
from torch import nn

from benchmarks.common.allocations import FailingAllocations
from yolov12 import mas
from yolov12.mas import Loss
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.step.loss import Total

IMAGES = 4


class _Counting(nn.Module):
    """Layer of the user's own with a buffer, of which a look ahead takes a copy."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        return x * 1.5


def _one_sum(model, images, weights):
    """Loss with one normaliser, as that of detection."""
    value = (model(images) * weights[:, None]).square().sum() / weights.sum()
    return Loss(value, weights.sum(), {"loss": value.detach()})


def _two_sums(model, images, weights):
    """Loss with two normalisers, as that of segmentation."""
    normalisers = torch.stack((weights.sum(), weights.square().sum()))
    value = (model(images) * weights[:, None]).square().sum(0) / normalisers
    return Loss(value, normalisers, {"loss": value.detach()})


class Steps:
    """One model that takes the same step again and again, always from the same state."""

    def __init__(self, folder, loss=_one_sum, before=1, **config):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4, momentum=None)]
        self.model = nn.Sequential(*layers, _Counting(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        self.model.double().train()
        images = torch.randn(IMAGES, 3, 8, 8, dtype=torch.float64)
        self.batch = images, torch.arange(1.0, IMAGES + 1, dtype=torch.float64)
        settings = mas.Config(**{"bn_group": 1, "micro_batch": 2, **config})
        meter, journal = ReplayMeter(2**40, [0]), mas.Journal(folder)
        task, silent = mas.TensorTask(loss), (lambda line: None)
        self.engine = mas.Engine(self.model, task, settings, meter=meter, journal=journal, log=silent)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.mode, self.folder, self.updates = FailingAllocations("cpu"), folder, 0
        for _ in range(before):
            self.step()

    def step(self, fail_at=(), accumulated=False):
        """Return what a step leaves: gradients, buffers, loss and items."""
        self.model.load_state_dict(self.state)
        self.model.zero_grad()
        if accumulated:
            self.engine.step(self.batch)
        self.mode.reset(fail_at)
        with self.mode:
            result = self.engine.step(self.batch)
        buffers = [value.clone() for name, value in self.model.named_buffers() if "calls" not in name]  # it ran again
        values = [*(parameter.grad.clone() for parameter in self.model.parameters()), *buffers]
        self.engine.update(self.optimizer)
        self.updates += 1
        return [*values, result.loss, *result.items.values()]

    def counted(self):
        """Close the engine, and return the failures that its summary counts."""
        summary = self.engine.close(updates_expected=self.updates)
        assert (summary.updates, summary.images_lost) == (self.updates, 0)
        assert json.loads((self.folder / "memory.json").read_text())["out_of_memories"] == summary.out_of_memories
        return summary.out_of_memories


@pytest.mark.parametrize(
    ("loss", "accumulated"), [(_one_sum, False), (_one_sum, True), (_two_sums, False)], ids=("one", "added", "two")
)
def test_any_allocation_of_a_step_may_fail(tmp_path, deep, loss, accumulated):
    steps = Steps(tmp_path, loss)
    wanted = steps.step(accumulated=accumulated)
    assert steps.mode.count > 80
    chosen = range(0, steps.mode.count, 1 if deep else 3)
    for index in chosen:
        found = steps.step({index}, accumulated)
        assert len(steps.mode.injected) == 1
        for value, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=steps.mode.injected[0])
    assert steps.counted() == len(chosen)


class _OwnForward(nn.BatchNorm2d):
    """BatchNorm that does not run in groups, as its forward pass is the user's."""

    def forward(self, x):
        return super().forward(x)


def test_a_micro_batch_whose_loss_cannot_be_added_moves_running_statistics_once(tmp_path, monkeypatch):
    steps = Steps(tmp_path)
    steps.model[3] = _OwnForward(4).double()
    steps.state = {name: value.clone() for name, value in steps.model.state_dict().items()}
    wanted, add, calls = steps.step(), Total.add, []

    def failing(*args, **options):
        calls.append(None)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return add(*args, **options)

    monkeypatch.setattr(Total, "add", failing)
    found = steps.step()
    assert len(calls) == 3
    assert steps.model[3].num_batches_tracked == 2
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_any_allocation_of_the_first_step_may_fail(tmp_path, deep):
    """It includes warm-ups."""

    def first(name, fail_at=()):
        (tmp_path / name).mkdir()
        steps = Steps(tmp_path / name, before=0, micro_batch=None)
        return steps, steps.step(fail_at)

    steps, wanted = first("whole")
    assert steps.counted() == 0
    for index in range(0, steps.mode.count, 2 if deep else 20):
        failed, found = first(str(index), {index})
        for value, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=failed.mode.injected[0])
        assert failed.counted() == len(failed.mode.injected) == 1
