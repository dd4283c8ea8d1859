"""What the engine would do under a limit."""

from dataclasses import replace
from itertools import pairwise

import pytest

from yolov12.mas.profiling.ladder import ladder_of
from yolov12.plan.choose import Wish, choose
from yolov12.plan.estimate import fixed
from yolov12.plan.roofline import Roofline

MIB = 2**20
WISH = Wish(batch=64, imgsz=128, boxes=20, budget_bytes=0, bn_group=None, micro_batch=None)


@pytest.fixture(scope="module")
def decided(network, micro_batch):
    profile = micro_batch.profile(Roofline(65, 320))
    ladder, held = ladder_of(profile), fixed(network, 64)
    return lambda mib, **wish: choose(
        micro_batch, held, ladder, replace(WISH, budget_bytes=int(mib * MIB), **wish), profile.total
    )


def test_more_memory_never_means_a_smaller_micro_batch(decided):
    choices = [decided(mib) for mib in (110, 180, 350, 1000)]
    for less, more in pairwise(choices):
        assert more.estimate.images >= less.estimate.images
        assert more.fits >= less.fits
    assert choices[-1].sizes == (64,)
    assert str(choices[-1].estimate.plan) == ""


def test_what_fits_is_inside_the_budget_and_its_peak_is_traced(decided, micro_batch):
    for mib in (180, 350):
        choice = decided(mib)
        assert choice.fits
        assert choice.estimate.peak_bytes <= mib * MIB
        traced = micro_batch.trace(choice.estimate.images, choice.estimate.plan)
        assert choice.estimate.micro_batch_bytes == traced[1]
        assert sum(choice.sizes) == 64


def test_layers_are_recomputed_where_a_group_does_not_fit_otherwise(decided, micro_batch):
    choice = decided(200, bn_group=32)
    assert choice.fits
    assert choice.bn_group == 32
    assert choice.estimate.plan.modes
    assert micro_batch.lines().peak(32) > 200 * MIB - choice.estimate.live_bytes


def test_too_little_is_said(decided):
    choice = decided(60)
    assert not choice.fits
    assert choice.estimate.images == 1
    assert choice.estimate.peak_bytes > 60 * MIB


def test_a_micro_batch_that_is_wanted(decided):
    assert set(decided(1000, micro_batch=8).sizes) == {8}
