"""First update of an optimizer: if memory fails half way, the weights end as without the failure."""

import pytest
import torch
from torch import nn

from benchmarks.common.allocations import FailingAllocations
from yolov12.mas.step.first_update import copy_on_host, survive_first_update


class Stingy(torch.optim.Adam):
    """Adam whose first `failures` steps run out of memory after `after` parameters, which stay changed."""

    failures = 0
    after = 3

    def step(self, closure=None):
        if Stingy.failures:
            Stingy.failures -= 1
            whole = [group["params"] for group in self.param_groups]
            for group in self.param_groups:
                group["params"] = group["params"][: Stingy.after]
            super().step()
            for group, parameters in zip(self.param_groups, whole, strict=True):
                group["params"] = parameters
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return super().step(closure)


def train(failures, error=None):
    """Run three updates with clipping, a loss scale that each update changes, and a moving average of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))
    average = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = Stingy(model.parameters(), lr=0.1)
    scale, released = [8.0], []
    Stingy.failures = failures

    def remember():
        before, undo = scale[0], copy_on_host(average)

        def back():
            scale[0] = before
            undo()

        return back

    def update():
        for parameter in model.parameters():
            parameter.grad /= scale[0]
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scale[0] *= 2
        for old, parameter in zip(average, model.parameters(), strict=True):
            old.lerp_(parameter.detach(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    count = 0
    for index in range(3):
        x = torch.randn(5, 4)
        (model(x).square().sum() * scale[0]).backward()
        if index == 0:
            count = survive_first_update(update, optimizer, lambda: released.append(None), remember)
        else:
            update()
    return [*map(torch.Tensor.detach, model.parameters()), *average], scale, count, len(released)


@pytest.mark.parametrize("failures", [1, 2])
def test_failure_half_way_through_the_first_update(failures):
    wanted, scale, *_ = train(0)
    weights, scale_after, count, released = train(failures)
    assert all(torch.equal(one, other) for one, other in zip(weights, wanted, strict=True))
    assert scale_after == scale
    assert (count, released) == (failures, failures)


def test_gradients_that_cannot_be_restored_at_once_are_restored_later():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer, releases = Stingy([parameter], lr=0.1), []
    Stingy.failures = 1
    mode = FailingAllocations("cpu")

    def release():
        releases.append(None)
        mode.reset({0} if len(releases) == 1 else ())  # the first allocation after it is that of the gradient

    with mode:
        assert survive_first_update(optimizer.step, optimizer, release, lambda: lambda: None) == 2
    assert len(releases) == 2
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.9))


def test_third_failure_is_raised():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(3)


def test_other_errors_are_raised_at_once():
    parameter = nn.Parameter(torch.ones(2))
    calls = []

    def update():
        calls.append(None)
        raise RuntimeError("found inf in the learning rate")

    with pytest.raises(RuntimeError, match="learning rate"):
        survive_first_update(update, torch.optim.SGD([parameter], lr=0.1), lambda: None, lambda: lambda: None)
    assert len(calls) == 1


def test_parameters_without_gradient_have_none_after_a_failure():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    optimizer = Stingy([used, unused], lr=0.1)
    Stingy.failures = 1
    assert survive_first_update(optimizer.step, optimizer, lambda: None, lambda: lambda: None) == 1
    assert unused.grad is None
    assert torch.equal(unused, torch.ones(2))
