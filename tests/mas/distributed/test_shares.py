"""Shares of a batch, compared with all possible shares and in simulated trainings."""

import itertools
import math
import random
import sys

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from yolov12.mas.distributed.shares import Balance, share_out, slowest_ms
from yolov12.mas.scheduling.groups import split_groups

speeds = st.floats(0.05, 50.0)


@st.composite
def batches(draw, most=200):
    """Draw equal groups, followed by at most two others."""
    size = draw(st.sampled_from([1, 2, 8, 32]))
    groups = [size] * draw(st.integers(1, most))
    return tuple(groups + draw(st.lists(st.integers(1, 2 * size), max_size=2)))


def runs(groups, ranks):
    """Yield the images of each rank for every split of the groups into `ranks` non-empty runs."""
    for inner in itertools.combinations(range(1, len(groups)), ranks - 1):
        ends = [0, *inner, len(groups)]
        yield tuple(sum(groups[i:j]) for i, j in itertools.pairwise(ends))


@given(batches(), st.lists(speeds, min_size=1, max_size=40))
def test_every_image_has_one_rank_and_every_group_too(groups, ms):
    shares = share_out(groups, ms)
    ends = {0, *itertools.accumulate(groups)}
    assert len(shares) == len(ms)
    assert sum(shares) == sum(groups)
    assert set(itertools.accumulate(shares)) <= ends
    if len(groups) >= len(ms):
        assert min(shares) > 0


@given(batches(most=8), st.lists(st.one_of(speeds, st.sampled_from([1.0, 2.0])), min_size=1, max_size=5))
@example((32, 32, 18, 18), [1.0, 1.0])
@example((8, 8, 8, 3, 8), [1.0, 3.0, 1.0])
def test_no_other_shares_take_less_time(groups, ms):
    assume(len(groups) >= len(ms))
    shares = share_out(groups, ms)
    others = list(runs(groups, len(ms)))
    assert shares in others
    assert slowest_ms(shares, ms) <= min(slowest_ms(other, ms) for other in others) * (1 + 1e-12)


@given(st.integers(1, 300), st.lists(speeds, min_size=1, max_size=40))
def test_equal_groups_go_to_the_rank_that_finishes_them_first(count, ms):
    assume(count >= len(ms))
    by_hand = [1] * len(ms)
    for _ in range(count - len(ms)):
        by_hand[min(range(len(ms)), key=lambda rank: ((by_hand[rank] + 1) * ms[rank], rank))] += 1
    assert share_out([1] * count, ms) == tuple(by_hand)


def test_equal_ranks_have_equal_shares():
    assert share_out([32] * 32, [5.0] * 4) == (256,) * 4
    assert share_out([32] * 9, [0.1] * 4) == (96, 64, 64, 64)
    assert share_out(split_groups(1000, 32), [1.0] * 4) == (256, 256, 256, 232)


def test_shares_of_the_issue():
    assert share_out([8] * 128, [1 / 248, 1 / 256, 1 / 256, 1 / 264]) == (248, 256, 256, 264)


def test_fewer_groups_than_ranks_go_to_the_fastest():
    assert share_out([32, 32, 7], [3.0, 1.0, 2.0, 9.0, 2.0]) == (0, 32, 32, 0, 7)
    assert share_out([32, 32], [1.0] * 4) == (32, 32, 0, 0)
    assert share_out([], [1.0, 1.0]) == (0, 0)


def test_a_very_slow_rank_still_has_one_group():
    assert share_out([8] * 10, [1.0, 1e9]) == (72, 8)


def test_groups_that_differ_are_refused():
    with pytest.raises(ValueError, match="alike"):
        share_out([8, 8, 4, 8, 8], [1.0, 1.0])


def operations(ranks, groups):
    """Count the lines and calls that Python executes in the module: a time that other processes cannot disturb."""
    ms = [random.Random(rank).uniform(1.0, 3.0) for rank in range(ranks)]
    count = 0

    def tracer(frame, event, argument):
        nonlocal count
        count += 1
        return tracer if frame.f_code.co_filename.endswith("shares.py") else None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        share_out(groups, ms)
    finally:
        sys.settrace(before)
    return count


def test_work_grows_hardly_faster_than_the_ranks():
    few, many = operations(256, [32] * 4096), operations(1024, [32] * 16384)
    assert many < 4 * 1.25 * few  # O(n log n)
    assert operations(1024, [32] * 65536) < 1.5 * many  # almost independent of the groups, which C code checks


# -- shares during a training ----------------------------------------------------------------------------------------


class Training:
    """Simulated ranks with known times and 3 % noise."""

    def __init__(self, ms_per_image, seed=0, noise=0.03, fixed_ms=0.0):
        self.ms = list(ms_per_image)
        self.balance = Balance(len(self.ms))
        self.random = random.Random(seed)
        self.noise, self.fixed_ms = noise, fixed_ms

    def step(self, groups):
        shares = self.balance.shares(groups)
        times = [share * ms + self.fixed_ms for share, ms in zip(shares, self.ms, strict=True)]
        self.balance.observe(shares, [ms * self.random.gauss(1.0, self.noise) for ms in times])
        return shares

    def steps(self, groups, count):
        return [self.step(groups) for _ in range(count)]


def moves(shares):
    return sum(one != other for one, other in itertools.pairwise(shares))


@pytest.mark.parametrize(("ranks", "steps"), [(2, 1000), (3, 1000), (16, 200), (128, 100)])
@pytest.mark.parametrize("group", [8, 32])
def test_noise_changes_no_share(ranks, steps, group):
    training = Training([1.0] * ranks, seed=ranks)
    seen = training.steps(split_groups(256 * ranks, group), steps)
    assert set(seen) == {(256,) * ranks}


@pytest.mark.parametrize("ranks", [2, 4, 32, 128])
def test_a_rank_that_slows_down_soon_has_a_smaller_share(ranks):
    groups = split_groups(256 * ranks, 8)
    training = Training([1.0] * ranks, seed=ranks)
    before = training.steps(groups, 50)[-1]
    training.ms[1] = 1.5
    after = training.steps(groups, 15)
    assert after[10][1] < 0.85 * before[1]
    assert after[-1][1] < before[1]
    assert slowest_ms(after[-1], training.ms) <= 1.05 * slowest_ms(share_out(groups, training.ms), training.ms)
    assert moves(after) <= 2


@pytest.mark.parametrize("seed", range(5))
def test_a_slowdown_of_ten_percent_changes_shares(seed):
    groups = split_groups(8 * 256, 8)
    training = Training([1.0] * 8, seed=seed)
    before = training.steps(groups, 100)[-1]
    training.ms[3] = 1.1
    after = training.steps(groups, 30)
    assert after[-1][3] < before[3] == after[0][3]
    assert moves(after) <= 2


def test_cards_of_a_mixed_fleet_finish_together():
    groups = split_groups(6 * 256, 8)
    training = Training([3.4, 1.0, 1.0, 1.3, 2.1, 1.1])
    seen = training.steps(groups, 300)
    assert seen[0] == (256,) * 6
    assert slowest_ms(seen[10], training.ms) <= 1.05 * slowest_ms(share_out(groups, training.ms), training.ms)
    assert moves(seen) <= 3


def test_the_last_batch_of_an_epoch_changes_no_share_though_its_images_take_longer():
    training = Training([1.0, 1.5, 1.0, 1.2], fixed_ms=40.0)
    usual, last = split_groups(1024, 8), split_groups(397, 8)
    seen = [(training.step(usual), training.step(last)) for _ in range(150)]
    assert moves([one for one, _ in seen]) <= 3
    assert all(sum(one) == 1024 and sum(other) == 397 for one, other in seen)


def test_shares_keep_learning_after_batches_get_smaller():
    training = Training([1.0, 1.0])
    training.steps(split_groups(1024, 8), 50)
    training.ms[0] = 2.0
    last = training.steps(split_groups(256, 8), 20)[-1]
    assert last[0] < last[1]


def test_a_single_slow_step_changes_no_share():
    balance, groups = Balance(4), split_groups(1024, 8)
    for step in range(200):
        shares = balance.shares(groups)
        assert shares == (256,) * 4
        balance.observe(shares, [300.0, 300.0, 3000.0 if step % 8 == 7 else 300.0, 300.0])


def test_unknown_times_are_ignored():
    balance, groups = Balance(3), split_groups(3 * 256, 8)
    for _ in range(20):
        balance.observe(balance.shares(groups), [None, math.nan, math.inf])
    assert balance.shares(groups) == (256,) * 3
    for _ in range(20):
        balance.observe(balance.shares(groups), [None, 500.0, 1500.0])
    shares = balance.shares(groups)
    assert shares[2] < shares[0] < 256 < shares[1]  # the unknown rank counts as average


def test_ranks_without_a_share_are_accepted():
    training = Training([1.0, 2.0, 1.0, 1.0])
    seen = training.steps(split_groups(64, 32), 20)
    assert seen[0] == (32, 32, 0, 0)
    assert seen[-1][1] == 0
    assert all(sum(shares) == 64 for shares in seen)


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_every_rank_computes_the_same_shares(seed, ranks):
    numbers = random.Random(seed)
    balances = [Balance(ranks) for _ in range(3)]
    for _ in range(20):
        groups = split_groups(numbers.randrange(1, 100 * ranks), 8)
        shares, *others = [balance.shares(groups) for balance in balances]
        assert others == [shares, shares]
        ms = [numbers.choice([None, math.nan, numbers.uniform(1.0, 900.0)]) for _ in range(ranks)]
        for balance in balances:
            balance.observe(shares, list(ms))


def test_shares_change_when_staying_has_lost_the_price_of_the_change():
    groups, steps = [8] * 16, 0
    balance = Balance(2, move_ms=1000.0)
    while balance.shares(groups) == (64, 64):
        balance.observe([64, 64], [200.0, 100.0])
        steps += 1
        assert steps < 100
    best_ms = max(200 / 64 * 40, 100 / 64 * 88)
    assert 1000 / (200 - best_ms) <= steps <= 1000 / (200 - best_ms) + 10


def test_a_launch_bound_share_counts_as_the_images_that_would_take_no_longer():
    """A rank that takes 150 ms for any share of up to 80 images is not slow because it was given 8."""
    groups, balance = [8] * 16, Balance(2)
    for _ in range(40):
        balance.observe([120, 80], [150.0, 150.0])
    assert balance.shares(groups) == (80, 48) or balance.shares(groups) == (72, 56)
