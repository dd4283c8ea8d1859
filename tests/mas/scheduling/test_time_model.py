"""The online model of a micro-batch's time, trained on simulated cards."""

import json
import random

import pytest

from yolov12.mas.scheduling.peak_model import Level
from yolov12.mas.scheduling.time_model import NEW_SIZE_MS, SpeedModel

LADDER = (Level(1.0, 1.0), Level(0.8, 1.03), Level(0.6, 1.1), Level(0.4, 1.35))


def card(host=80.0, image=1.25, slow=(1.0, 1.03, 1.1, 1.35)):
    """Return a card's time: constant up to `host / image` images, then proportional to the images."""
    return lambda images, level=0: max(host, image * images) * slow[level]


def taught(takes, *sizes, levels=(0,), scatter=0.0, rounds=4, **options):
    draw, speed = random.Random(0), SpeedModel(LADDER, **options)
    for images in sizes:
        speed.ran(images, 640, 640, timed=False)
    for _ in range(rounds):
        for images in sizes:
            for level in levels:
                speed.observe([images], 640, 640, level, takes(images, level) * (1 + draw.uniform(-scatter, scatter)))
    return speed


def expected(speed, images, level=0):
    return speed.expected_ms(images, 640, 640, level)


def best(speed, images, level=0):
    return speed.optimistic_ms(images, 640, 640, level)


@pytest.mark.parametrize("images", [8, 24, 48, 96, 160, 320])
def test_learns_what_host_and_device_take(images):
    takes = card()
    speed = taught(takes, 16, 32, 128, 256, scatter=0.03)
    assert expected(speed, images) == pytest.approx(takes(images), rel=0.05)
    assert best(speed, images) <= takes(images) * 1.02


def test_knows_up_to_which_size_it_is_the_host_that_is_waited_for():
    assert taught(card(host=80.0, image=1.25), 16, 32, 128, 256).flat_images(640, 640) == pytest.approx(64, rel=0.1)
    assert SpeedModel(LADDER).flat_images(640, 640) == 0.0


@pytest.mark.parametrize("seen", [16, 256])
def test_one_size_leaves_open_what_is_waited_for(seen):
    """The expected time is the larger of the two possible times, and the optimistic time is the smaller."""
    speed = taught(card(), seen)
    ms = card()(seen)
    assert expected(speed, 2 * seen) == pytest.approx(2 * ms)
    assert best(speed, 2 * seen) == pytest.approx(0.85 * ms)
    assert expected(speed, seen // 2) == pytest.approx(ms)
    assert best(speed, seen // 2) == pytest.approx(0.85 * ms / 2)


def test_two_sizes_bound_the_others():
    """From 128 to 256 images the time doubles, so it must rise as steeply beyond."""
    speed = taught(card(), 128, 256)
    assert best(speed, 512) >= 0.94 * card()(512)
    flat = taught(card(), 16, 32)
    assert best(flat, 64) <= 80


def test_prior_speaks_until_something_was_measured():
    speed = SpeedModel(LADDER, prior_ms=(80.0, 1.25 / 0.4096))
    assert expected(speed, 16) == pytest.approx(80)
    assert expected(speed, 256, 3) == pytest.approx(320 * 1.35)
    assert best(speed, 256) == pytest.approx(320 * 0.85)
    speed.ran(32, 640, 640, timed=False)
    speed.observe([32], 640, 640, 0, 160.0)  # the card is half as fast as in the profile
    assert expected(speed, 256) == pytest.approx(640, rel=0.02)


def test_plan_that_is_slower_than_its_profile_is_so_for_all_sizes():
    speed = taught(card(slow=(1.0, 1.03, 1.4, 1.35)), 16, 128, levels=(0, 2), rounds=16)
    assert expected(speed, 64, 2) == pytest.approx(80 * 1.4, rel=0.05)


def test_first_time_is_no_speed():
    """The first run of a size takes 6 s more, for kernel search. The learned cost of a new size approaches that."""
    speed = SpeedModel()
    for images in (8, 16, 32, 64):
        assert not speed.warm(images, 640, 640)
        speed.ran(images, 640, 640)
        speed.observe([images, images], 640, 640, 0, 160 + 6000)
        assert speed.warm(images, 640, 640)
        assert not speed.seen(images, 640, 640, 0)
        for _ in range(4):
            speed.observe([images, images], 640, 640, 0, 160)
        assert expected(speed, images) == pytest.approx(80)
    assert speed.new_size_ms == pytest.approx(6000, rel=0.05)
    assert NEW_SIZE_MS < 5000


def test_time_of_a_batch_is_that_of_its_micro_batches():
    takes, speed = card(host=1.0), SpeedModel()
    for images in (85, 86):
        speed.ran(images, 640, 640, timed=False)
    for _ in range(8):
        speed.observe([85, 85, 86], 640, 640, 0, takes(85) * 2 + takes(86))
    assert expected(speed, 85) == pytest.approx(takes(85), rel=0.01)
    assert expected(speed, 86) == pytest.approx(takes(86), rel=0.01)


def test_follows_a_card_that_others_slow_down():
    speed = taught(card(), 32, 64)
    for _ in range(60):
        speed.observe([64], 640, 640, 0, 160)
    assert expected(speed, 64) == pytest.approx(160, rel=0.05)


def test_what_was_measured_long_ago_is_worth_another_look():
    speed = taught(card(), 32, 64)
    before = best(speed, 32)
    for _ in range(400):
        speed.observe([64], 640, 640, 0, 80)
    assert best(speed, 32) < before


def test_one_hiccup_is_no_speed():
    speed = taught(card(), 64, rounds=8)
    speed.observe([64], 640, 640, 0, 30_000)
    assert expected(speed, 64) < 100


def test_clock_that_does_not_move():
    speed = SpeedModel()
    speed.ran(8, 640, 640, timed=False)
    speed.observe([8], 640, 640, 0, 0.0)
    assert not speed.seen(8, 640, 640, 0)
    assert 2 * expected(speed, 8) > expected(speed, 16)  # so the fewest micro-batches win


def test_state_goes_through_json():
    speed = taught(card(), 16, 64, 256, levels=(0, 2), scatter=0.03)
    again = SpeedModel(LADDER)
    again.load_state_dict(json.loads(json.dumps(speed.state_dict())))
    grid = [(images, level) for images in (8, 16, 40, 64, 256, 300) for level in range(4)]
    assert [expected(again, *each) for each in grid] == [expected(speed, *each) for each in grid]
    assert [best(again, *each) for each in grid] == [best(speed, *each) for each in grid]
    assert again.new_size_ms == speed.new_size_ms
    assert not again.warm(16, 640, 640)  # another process has to search for kernels again


def test_levels_that_stay_keep_what_they_learned():
    speed = taught(card(), 64, levels=(0, 1, 2))
    speed.set_levels((LADDER[0], LADDER[1], Level(0.5, 1.2)))
    assert [speed.seen(64, 640, 640, level) for level in range(3)] == [True, True, False]
    assert expected(speed, 64, 2) == pytest.approx(80 * 1.2, rel=0.01)


def test_a_pass_ahead_of_split_batches_is_learned_separately():
    """The search for kernels of a new size is not part of it."""
    speed = SpeedModel(LADDER)
    speed.observe([16] * 4, 640, 640, 0, 80.0, 4000.0)
    for _ in range(3):
        speed.observe([16] * 4, 640, 640, 0, 80.0, 30.0)
    assert expected(speed, 16) == pytest.approx(20.0)
    assert speed.with_ahead(4) == pytest.approx(1.375)
    assert speed.with_ahead(1) == 1.0
    assert speed.new_size_ms == pytest.approx((NEW_SIZE_MS + 4080.0 - 110.0) / 2)
    resumed = SpeedModel(LADDER)
    resumed.load_state_dict(json.loads(json.dumps(speed.state_dict())))
    assert resumed.with_ahead(4) == speed.with_ahead(4)
