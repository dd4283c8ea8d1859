"""The engine on a real card, with real failed allocations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yolov12 import mas
from yolov12.errors import DoesNotFitError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here"),
]

MIB = 2**20


@pytest.fixture(autouse=True)
def whole_card():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def make(images=32, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 32, 3, padding=1, bias=False)]
    for _ in range(6):
        layers += [nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1, bias=False)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).cuda()
    model = model.to(memory_format=torch.channels_last)
    return model, (torch.randn(images, 3, 128, 128).pin_memory(), torch.randint(0, 10, (images,)).pin_memory())


def loss(model, images, labels):
    return F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)


def gradient(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def off(a, b):
    return float((a - b).norm() / b.norm())


def engine_for(model, layers=None, **settings):
    return mas.Engine(model, mas.TensorTask(loss), mas.Config(**settings), layers=layers)


def test_a_limit_changes_the_micro_batch_and_not_the_gradient():
    model, batch = make()
    engine = engine_for(model, bn_group=4)
    whole = engine.step(batch)
    reference = gradient(model)
    statistics = [buffer.clone().double() for buffer in model.buffers()]
    assert whole.micro_batches == (32,)
    peak_bytes = engine.latest.peak_bytes

    model, batch = make()
    engine = engine_for(model, layers={}, bn_group=4, limit=int(0.4 * peak_bytes))  # without checkpoint plans
    split = engine.step(batch)
    assert max(split.micro_batches) < 32
    assert engine.latest.peak_bytes <= engine.latest.budget_bytes <= 0.4 * peak_bytes
    assert off(gradient(model), reference) < 1e-4
    for ours, other in zip(model.buffers(), statistics, strict=True):
        torch.testing.assert_close(ours.double(), other, rtol=1e-6, atol=1e-6)
    assert float(split.loss) == pytest.approx(float(whole.loss), rel=1e-5)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_real_failed_allocations_are_survived(times):
    model, batch = make()
    engine_for(model, bn_group=4).step(batch)
    reference = gradient(model)

    model, batch = make()
    engine = engine_for(model, bn_group=4)
    left = [0]

    def fail(*_):
        if left[0]:
            left[0] -= 1
            torch.empty(2**50, device="cuda")

    model[9].register_full_backward_hook(fail)
    engine.step(batch)
    model.load_state_dict(make()[0].state_dict())
    model.zero_grad()
    left[0] = times
    result = engine.step(batch)
    assert sum(event.startswith("out-of-memory") for event in engine.latest.events) == times
    assert sum(result.micro_batches) == 32
    assert max(result.micro_batches) == 32 if times == 1 else max(result.micro_batches) <= 16
    assert off(gradient(model), reference) < 1e-4


def test_a_limit_below_one_image_is_named_in_the_error():
    model, batch = make(images=2)
    needed_bytes = 4 * MIB  # two activations of one image
    with pytest.raises(DoesNotFitError, match=r"one image needs .* MiB .* budget is .*give a mem_limit (of|above) "):
        engine_for(model, limit=torch.cuda.memory_reserved() + needed_bytes).step(batch)
    assert all(p.grad is None for p in model.parameters())


def test_prediction_follows_the_measured_peak():
    model, batch = make(images=64)
    engine = engine_for(model, bn_group=4)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(4):
        engine.step(batch)
        engine.update(optimizer)
    assert engine.latest.predicted_bytes == pytest.approx(engine.latest.peak_bytes, rel=0.03)


def test_the_first_update_survives_a_real_failure():
    def trained(fail_at):
        model, batch = make()
        engine = engine_for(model, bn_group=8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        calls = []

        def update():
            optimizer.step()
            calls.append(1)
            if len(calls) == fail_at:  # the weights have changed, and the state exists
                torch.empty(2**50, device="cuda")
            optimizer.zero_grad()

        for _ in range(2):
            engine.step(batch)
            engine.update(optimizer, update)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), len(calls)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        (weights, calls), (disturbed, more_calls) = trained(fail_at=0), trained(fail_at=1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (calls, more_calls) == (2, 3)
    torch.testing.assert_close(disturbed, weights, rtol=1e-5, atol=1e-6)


def test_a_group_that_does_not_fit_runs_under_a_checkpoint_plan():
    model, batch = make()
    engine = engine_for(model, bn_group=32)
    engine.step(batch)
    reference, peak_bytes = gradient(model), engine.latest.peak_bytes

    model, batch = make()
    # Without blocks of layers, only BatchNorm's outputs can be freed, a third of what is kept.
    engine = engine_for(model, bn_group=32, limit=int(0.9 * peak_bytes))
    result = engine.step(batch)
    assert result.micro_batches == (32,)
    assert engine.latest.level > 0
    assert engine.latest.peak_bytes <= engine.latest.budget_bytes
    assert off(gradient(model), reference) < 1e-4
