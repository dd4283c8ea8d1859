"""Decisions, which are a pure function of a state and a cost model."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolov12.mas.cost import CostModel, Features
from yolov12.mas.scheduler import CALM_BATCHES, Group, State, decide

MIB = 2**20
IMAGE = 100 * MIB


def model(*sizes, image=IMAGE):
    cost = CostModel()
    for images in sizes or (1, 2, 4, 8, 16, 32, 64):
        for _ in range(2):
            cost.observe(Features(images, 640, 640, 10), images * image)
    return cost


def state(groups, budget_images, **changes):
    """A batch in groups, and a budget of so many images with their margin."""
    values = {
        "groups": tuple(Group(size, 10) for size in groups),
        "height": 640,
        "width": 640,
        "budget_bytes": int(budget_images * IMAGE * 1.02),
        "live_bytes": 0,
        "gradient_bytes": 0,
        "allowance": sum(groups),
    }
    return State(**{**values, **changes})


def test_batch_that_fits_runs_at_once():
    decision = decide(state([8] * 4, 40), model())
    assert (decision.micro_batches, decision.fits) == ((4,), True)
    assert decision.predicted_bytes == pytest.approx(32 * IMAGE, rel=0.01)


@pytest.mark.parametrize(("budget", "sizes"), [(32, (4,)), (31, (2, 2)), (16, (2, 2)), (15, (1,) * 4), (8, (1,) * 4)])
def test_fewest_micro_batches_that_fit(budget, sizes):
    assert decide(state([8] * 4, budget), model()).micro_batches == sizes


def test_nothing_fits():
    decision = decide(state([8] * 4, 7), model())
    assert not decision.fits
    assert decision.micro_batches == (1, 1, 1, 1)


def test_live_tensors_and_gradients_count():
    assert decide(state([8] * 4, 32, live_bytes=4 * IMAGE), model()).micro_batches == (2, 2)
    # Gradients are there only while a second micro-batch runs.
    assert decide(state([8] * 4, 32, gradient_bytes=4 * IMAGE), model()).micro_batches == (4,)
    assert decide(state([8] * 4, 18, gradient_bytes=4 * IMAGE), model()).micro_batches == (1,) * 4


def test_crowded_images_count_where_they_are():
    cost = CostModel()
    for images in (1, 4, 8, 16):
        for boxes in (10, 100, 200, 300):
            cost.observe(Features(images, 640, 640, boxes), images * IMAGE * (100 + max(boxes - 100, 0)) // 100)
    assert decide(state([8, 8], 17), cost).micro_batches == (2,)
    crowded = dataclasses.replace(state([8, 8], 17), groups=(Group(8, 10), Group(8, 300)))
    assert not decide(crowded, cost).fits
    assert decide(dataclasses.replace(crowded, budget_bytes=26 * IMAGE), cost).micro_batches == (1, 1)


def test_shrinks_at_once_and_remembers():
    decision = decide(state([8] * 4, 16), model())
    assert (decision.allowance, decision.calm) == (16, 0)


def test_grows_back_only_after_calm_batches():
    now = state([8] * 4, 40, allowance=16, calm=0)
    for _ in range(CALM_BATCHES):
        decision = decide(now, model())
        assert decision.micro_batches == (2, 2)
        now = dataclasses.replace(now, allowance=decision.allowance, calm=decision.calm)
    assert decide(now, model()).micro_batches == (4,)
    assert decide(now, model()).allowance == 32


def test_grows_back_only_with_room_to_spare():
    now = state([8] * 4, 33, allowance=16)
    assert decide(now, model()).micro_batches == (2, 2)
    assert decide(state([8] * 4, 36, allowance=16), model()).micro_batches == (4,)


def test_memory_that_comes_and_goes_does_not_make_it_swing():
    now, sizes = state([8] * 4, 40), []
    for step in range(60):
        now = dataclasses.replace(now, budget_bytes=int((40 if step // 3 % 2 else 16) * IMAGE * 1.02))
        decision = decide(now, model())
        sizes.append(decision.micro_batches)
        now = dataclasses.replace(now, allowance=decision.allowance, calm=decision.calm)
    assert set(sizes) == {(2, 2)}


def test_smaller_batch_does_not_lower_the_allowance():
    decision = decide(state([8], 40, allowance=32), model())
    assert (decision.micro_batches, decision.allowance) == ((1,), 32)


def test_ceiling_holds_whatever_fits():
    assert decide(state([8] * 4, 400, ceiling=16), model()).micro_batches == (2, 2)
    assert not decide(state([8] * 4, 400, ceiling=4), model()).fits


def test_fixed_size_does_not_ask_the_cost_model():
    decision = decide(state([8] * 4, 1, ceiling=16, fixed=True), model())
    assert (decision.micro_batches, decision.fits) == ((2, 2), True)


def test_no_further_than_four_times_what_was_observed():
    assert decide(state([1] * 32, 400), model(1, 2, 4)).micro_batches == (16, 16)


def test_group_is_not_split_because_little_was_observed():
    """After a first batch of one image, say; memory is what splits groups."""
    assert decide(state([16, 16], 400, allowance=16), model(1)).fits


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(
    groups=st.lists(st.builds(Group, st.integers(1, 16), st.integers(0, 300)), min_size=1, max_size=20),
    observed=st.lists(
        st.tuples(st.integers(1, 64), st.integers(0, 300), st.integers(1, 9000)), min_size=1, max_size=12
    ),
    budget=st.integers(0, 20_000),
    live=st.integers(0, 2000),
    gradients=st.integers(0, 500),
    allowance=st.integers(1, 200),
    calm=st.integers(0, CALM_BATCHES),
    ceiling=st.one_of(st.none(), st.integers(1, 200)),
)
def test_never_above_the_budget(groups, observed, budget, live, gradients, allowance, calm, ceiling):
    cost = CostModel()
    for images, boxes, mib in observed:
        cost.observe(Features(images, 640, 640, boxes), mib * MIB)
    now = State(
        tuple(groups), 640, 640, budget * MIB, live * MIB, gradients * MIB, allowance, calm=calm, ceiling=ceiling
    )
    decision = decide(now, cost)
    assert sum(decision.micro_batches) == len(groups)
    assert max(decision.micro_batches) - min(decision.micro_batches) <= 1
    start, peaks, sizes = 0, [], []
    for count in decision.micro_batches:
        part = groups[start : start + count]
        each = Features(sum(group.images for group in part), 640, 640, max(group.boxes for group in part))
        sizes.append(each.images)
        peaks.append(cost.predict(each) + cost.margin(each))
        start += count
    held = live * MIB + (gradients * MIB if len(sizes) > 1 else 0)
    if decision.fits:
        assert held + max(peaks) <= budget * MIB
        assert max(sizes) <= (ceiling or sum(group.images for group in groups))
        assert max(sizes) <= max(4 * cost.largest, *(group.images for group in groups), 0)
    else:
        assert set(decision.micro_batches) == {1}


def test_a_crowded_batch_is_split_and_says_nothing_about_the_next():
    """One image of 300 boxes among many of 10, now and then: the others keep their size."""
    cost = CostModel()
    for images in (8, 16, 32):
        for boxes in (10, 100, 200, 300):
            cost.observe(Features(images, 640, 640, boxes), images * IMAGE * (100 + max(boxes - 100, 0)) // 100)
    usual = state([8] * 4, 40)
    groups = (*usual.groups[:3], Group(8, 300))
    allowance, calm, sizes = 32, CALM_BATCHES, []
    for index in range(3 * CALM_BATCHES):
        crowded = dataclasses.replace(usual, groups=groups) if index % 6 == 0 else usual
        decision = decide(dataclasses.replace(crowded, allowance=allowance, calm=calm), cost)
        allowance, calm = decision.allowance, decision.calm
        sizes.append(len(decision.micro_batches))
        assert decision.fits
    assert sizes == [4 if index % 6 == 0 else 1 for index in range(3 * CALM_BATCHES)]
