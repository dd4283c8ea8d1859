"""Combination of losses and gradients of the parts of a batch."""

import math

import pytest
import torch

from yolov12.mas.step.loss import Total
from yolov12.mas.task import Loss


def scales(normalisers, per_image=None, floor=1.0):
    """Return the factor of each part's loss when it is differentiated, for parts of one image, and the final factor."""
    total, found = Total(len(normalisers), floor, per_image), []
    for normaliser in normalisers:
        weight = torch.ones((), requires_grad=True)
        loss = Loss(weight * 1.0, torch.tensor(normaliser))
        total.scaled(loss, 1).backward()
        found.append(float(weight.grad))
        total.add(loss, 1, [weight.grad])
    return found, float(total.finished_gradients()[0])


def test_a_first_part_without_objects_does_not_make_the_others_overflow():
    normalisers = [0.0] + [60.0] * 63
    _, exact = scales(normalisers)
    blind, _ = scales(normalisers)
    guided, result = scales(normalisers, per_image=torch.tensor(58.0))
    assert max(blind) == 60.0  # 3,780 times the loss of the batch
    assert max(guided) < 0.05
    assert result == pytest.approx(exact, rel=1e-6)


def test_a_normaliser_of_zero_gives_no_nan():
    for images in (1, 3):
        factors, result = scales([0.0] * images, floor=0.0)
        assert not any(math.isnan(value) for value in factors)
        assert not math.isnan(result)


def test_a_normaliser_in_half_precision_is_added_up_in_single():
    total = Total(600, 1.0)
    for _ in range(2):
        weight = torch.ones((), requires_grad=True)
        loss = Loss(weight * 1.0, torch.tensor(257.0, dtype=torch.bfloat16))
        total.scaled(loss, 300).backward()
        total.add(loss, 300, [weight.grad])
    assert float(total.normaliser()) == 2 * float(torch.tensor(257.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_batch_with_nan_does_not_affect_the_next(broken):
    factors, result = scales([3.0, 5.0], per_image=torch.tensor(broken))
    assert (factors, result) == scales([3.0, 5.0])
