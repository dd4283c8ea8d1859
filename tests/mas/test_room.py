"""Waiting for memory that other processes hold."""

import time

import pytest

from tests.mas.world import IMAGE, World
from yolov12.errors import DoesNotFitError
from yolov12.mas.journal.journal import read_rows

LINE = (
    "memory: no image fits beside what other processes hold (4,000 MiB): waiting up to {} s for them to release memory"
)


def told(world):
    return [line for line in world.lines if "waiting" in line]


@pytest.fixture
def waiting(monkeypatch):
    """Return a function that lets each second of waiting advance the trace by a step, and that returns the waits."""
    slept = []

    def prepare(world):
        def sleep(seconds):
            slept.append(seconds)
            world.meter.advance()

        monkeypatch.setattr(time, "sleep", sleep)
        monkeypatch.setattr(world.engine._planner, "sleep", sleep)
        return slept

    return prepare


@pytest.mark.parametrize(("later", "asked_after"), [(0, []), (35.3, [7])])
def test_images_do_not_get_smaller_where_no_size_would_fit(waiting, tmp_path, later, asked_after):
    """Others first leave no memory even for the weights. Then all is free, or for 4 s too little for one image."""
    world = World(others=[0, 0, *[40] * 5, *[later] * 4, 0], live=IMAGE // 4, bn_group=1, folder=tmp_path)
    world.run(2)
    slept, asked = waiting(world), []
    world.options["smaller"] = lambda batch: asked.append(len(slept)) or batch
    world.step()
    world.engine.close()
    assert asked == asked_after
    assert "s for room" in list(read_rows(tmp_path / "memory.csv"))[-1]["events"]


def test_a_group_is_not_settled_while_there_is_no_room_for_any_image(waiting):
    world = World(others=[40] * 12 + [0], live=IMAGE // 4)
    world.options["smaller"] = lambda batch: pytest.fail("images get smaller")
    waiting(world)
    world.step()
    assert (world.engine.bn_group, world.sizes) == (32, [16])


def test_where_no_room_comes_the_run_ends_after_two_minutes_with_images_as_they_are(waiting):
    world = World(others=[0, 0, *[40] * 300], live=IMAGE // 4, bn_group=1)
    world.run(2)
    slept = waiting(world)
    world.options["smaller"] = lambda batch: pytest.fail("images get smaller")
    with pytest.raises(DoesNotFitError):
        world.step()
    assert 120 <= len(slept) <= 125
    assert told(world) == [LINE.format(118)]


def test_a_training_whose_images_cannot_get_smaller_tells_of_its_wait_once(waiting):
    world = World(others=[0, 0, *[40] * 300], live=IMAGE // 4, bn_group=1)
    world.run(2)
    slept = waiting(world)
    with pytest.raises(DoesNotFitError):
        world.step()
    assert 120 <= len(slept) <= 121
    assert told(world) == [LINE.format(118)]


def test_each_wait_is_told_when_it_begins_and_a_short_one_is_not(waiting):
    world = World(others=[0, 0, *[40] * 10, 0, 0, 40, 40, 0, 0, *[40] * 10, 0, 0], live=IMAGE // 4, bn_group=1)
    world.run(2)
    slept, seen = waiting(world), []
    world.engine._planner._log = lambda line: seen.append(len(slept))
    world.run(2)
    assert seen == [2]
    seen.clear()
    slept.clear()
    world.run(1)
    assert (seen, len(slept)) == ([], 2)


def test_a_wait_for_room_ends_when_the_process_is_asked_to_stop(waiting):
    world = World(others=[0, 0, *[40] * 300], live=IMAGE // 4, bn_group=1)
    world.run(2)
    slept = waiting(world)
    world.options["smaller"] = lambda batch: pytest.fail("images get smaller")
    world.options["stop_requested"] = lambda: len(slept) > 6
    with pytest.raises(SystemExit) as stop:
        world.step()
    assert (stop.value.code, len(slept)) == (143, 7)


def test_nobody_waits_for_room_that_would_not_be_there_without_others_either(monkeypatch):
    world = World(others=[0, 0, 1], bn_group=1)
    world.run(2)
    world.meter.allocated_bytes = 39 * IMAGE
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    assert world.engine._room.wait(lambda: False)[1] == 0
