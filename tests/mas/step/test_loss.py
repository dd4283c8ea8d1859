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


@pytest.mark.parametrize("several", [False, True])
def test_parts_of_parts_give_the_items_of_the_batch(several):
    """Ranks that validate one batch give theirs like this; a term that is below zero over the batch does not count."""
    draw = torch.Generator().manual_seed(0)
    shape = (3,) if several else ()
    factors = (lambda value, normaliser: (value >= 0).float()) if several else None
    parts = []
    for normaliser in (0.2, 7.0, 30.0, 0.0):
        value = torch.randn(3, generator=draw) - torch.tensor([0.0, 2.0, -2.0])
        items = {"term": value.clone()} if several else {"term": value[0]}
        parts.append(Loss(value, torch.full(shape, normaliser), items, factors=factors))

    def total(losses, images):
        found = Total(images, 1.0)
        for loss in losses:
            found.add(loss, 1)
        return found

    wanted, nested = total(parts, 4), Total(4, 1.0)
    for each in (parts[:1], parts[1:]):
        nested.add(total(each, len(each)).as_part(), len(each))
    torch.testing.assert_close(nested.items(), wanted.items())
    torch.testing.assert_close(nested.loss(), wanted.loss())
