"""Decisions of the engine under a memory limit."""

from dataclasses import replace
from itertools import pairwise

import pytest

from yolov12.mas.profiling.ladder import ladder_of
from yolov12.plan.choose import Requirements, choose
from yolov12.plan.estimate import fixed_memory
from yolov12.plan.roofline import Roofline

MIB = 2**20
WANTED = Requirements(batch=64, imgsz=128, boxes=20, budget_bytes=0, bn_group=None, micro_batch=None)


@pytest.fixture(scope="module")
def profile(tracer):
    return tracer.profile(Roofline(65, 320))


@pytest.fixture(scope="module")
def ladder(profile):
    return ladder_of(profile)


@pytest.fixture(scope="module")
def decided(fake_model, tracer, profile, ladder):
    fixed = fixed_memory(fake_model, 64)
    return lambda mib, **wanted: choose(
        tracer, fixed, ladder, replace(WANTED, budget_bytes=int(mib * MIB), **wanted), profile.total
    )


def test_fraction_of_a_plan_is_that_of_its_traced_peaks(tracer, ladder, deep):
    """The first step under a plan is predicted by it. It was 4 % off here, and 2.7 and 3.5 % on a card.

    It may be too high by what BatchNorm saves in layers that the plan does not name, see `Profile.joined_bytes`. There
    are many images, because a fraction leaves out weights and gradients. Two levels; with `--deep` all.
    """
    numbers = range(len(ladder.plans)) if deep else (0, 2, 3)
    traced = [tracer.trace(1024, ladder.plans[level])[1] - tracer.half_weights_bytes for level in numbers]
    low = 0.012 if deep else 5e-3
    for level, peak_bytes in zip(numbers, traced, strict=True):
        assert 1 - low <= ladder.levels[level].fraction * traced[0] / peak_bytes <= 1 + max(low, 0.01)


def test_more_memory_never_means_a_smaller_micro_batch(decided):
    choices = [decided(mib) for mib in (110, 180, 350, 1000)]
    for less, more in pairwise(choices):
        assert more.estimate.images >= less.estimate.images
        assert more.fits >= less.fits
    assert choices[-1].sizes == (64,)
    assert str(choices[-1].estimate.plan) == ""


def test_what_fits_is_inside_the_budget_and_its_peak_is_traced(decided, tracer):
    for mib in (180, 350):
        choice = decided(mib)
        assert choice.fits
        assert choice.estimate.peak_bytes <= mib * MIB
        traced = tracer.trace(choice.estimate.images, choice.estimate.plan)
        assert choice.estimate.micro_batch_bytes == traced[1]
        assert sum(choice.sizes) == 64


def test_layers_are_recomputed_if_a_group_does_not_fit_without(decided, tracer):
    choice = decided(185, bn_group=32)
    assert choice.fits
    assert choice.bn_group == 32
    assert choice.estimate.plan.modes
    assert tracer.linear_bytes().peak(32) > 185 * MIB - choice.estimate.allocated_bytes


def test_a_training_that_does_not_fit_is_reported(decided):
    choice = decided(60)
    assert not choice.fits
    assert choice.estimate.images == 1
    assert choice.estimate.peak_bytes > 60 * MIB


def test_a_requested_micro_batch_is_used(decided):
    assert set(decided(1000, micro_batch=8).sizes) == {8}
