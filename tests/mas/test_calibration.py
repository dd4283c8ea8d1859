"""What a run settles with its first batch: the warm-up, and the BatchNorm group."""

import pytest
import torch

from tests.mas.world import IMAGE, World, assert_same_weights
from yolov12.errors import DoesNotFitError
from yolov12.mas import calibration
from yolov12.mas.scheduling.peak_model import Features
from yolov12.mas.scheduling.planner import WAIT_S


@pytest.mark.parametrize("group", [0, None, 1, 4])
def test_not_even_the_warm_up_fits(group):
    world = World(bn_group=group)
    world.fail = lambda images: True
    with pytest.raises(DoesNotFitError):
        world.step()


@pytest.mark.parametrize(("room", "group"), [(100, 32), (40, 32), (30, 16), (12, 8), (6, 4), (3, 2), (1.5, 1)])
def test_automatic_group_is_the_largest_that_fits(room, group):
    world = World(batch=64, room=room)
    events = world.step()
    assert world.engine.bn_group == group
    assert not [event for event in events if event.startswith(("groups", "out-of-memory"))]
    assert any(f"BatchNorm sees {group} images" in line for line in world.lines)


def test_group_is_one_that_fits_beside_the_optimizer():
    """It is chosen before the first update, in which the optimizer makes its state."""
    world = World(batch=64, room=40, optimizer_images=4)
    events = [world.step()]
    world.meter.allocated_bytes = int(4 * IMAGE)
    events += world.run(4)
    assert world.engine.bn_group == 16
    assert not [event for each in events for event in each if event.startswith(("groups", "out-of-memory"))]


def test_plans_are_made_before_a_group_is_chosen_that_fits_only_without_the_optimizer(monkeypatch):
    """Under a plan, the larger group may fit beside the optimizer's state."""
    groups = []
    monkeypatch.setattr(calibration.Calibration, "_make_ladder", lambda made, *_: groups.append(made.bn_group))
    World(batch=64, room=40, optimizer_images=4).step()
    assert groups[0] is None


def test_a_warm_up_that_waits_for_memory_is_noted_once(monkeypatch):
    """It is tried again every second until another process releases its memory."""
    once, often = World(room=40, others=[39.5, 0]), World(room=40, others=[39.5] * 30 + [0])
    counts = []
    for world in (once, often):
        notes, advance = [], world.meter.advance
        monkeypatch.setattr(world.engine._step, "_note", notes.append)
        monkeypatch.setattr(world.engine._planner, "sleep", lambda seconds, advance=advance: advance())
        world.step()
        counts.append(notes.count("out-of-memory in a warm-up"))
    assert counts[0] == counts[1] > 0


def tried_out(world, monkeypatch):
    """Return a list to which each pass of the warm-up appends its number of images."""
    sizes, try_out = [], world.engine._step.try_out

    def counted(batch, start, stop, *contexts):
        sizes.append(stop - start)
        return try_out(batch, start, stop, *contexts)

    monkeypatch.setattr(world.engine._step, "try_out", counted)
    return sizes


@pytest.mark.parametrize(
    ("world", "tried"),
    [
        ({}, [32]),
        ({"room": 36}, [32]),
        ({"room": 34}, [32, 8]),  # the card has room for 32 images, the budget has not
        ({"room": 200, "limit": 34 * IMAGE}, [32, 8]),
        ({"room": 100, "others": [66]}, [32, 8]),
        ({"room": 3}, [32, 8, 4, 2]),
        ({"bn_group": 16}, [16]),
        ({"bn_group": 0}, [32]),
        ({"bn_group": 4}, [8]),
        ({"micro_batch": 16}, [16]),
        ({"batch": 36}, [18]),  # its groups
        ({"batch": 12}, [12]),
    ],
)
def test_the_warm_up_begins_with_the_size_of_micro_batches(world, tried, monkeypatch):
    world, notes = World(**{"batch": 64, "room": 40, **world}), []
    ran = tried_out(world, monkeypatch)
    monkeypatch.setattr(world.engine._step, "_note", notes.append)
    events = world.step()
    assert list(dict.fromkeys(ran)) == tried
    assert notes == ["out-of-memory in a warm-up"] * sum(tried[-1] < size <= 8 for size in tried)
    assert not [event for event in events if event.startswith("out-of-memory")]


def test_the_warm_up_tries_no_group_that_could_harm_others_or_is_known_not_to_fit(monkeypatch):
    """If the allocator is not held to the budget, a failure takes all that is free for a moment."""
    unheld, resumed, roomy = World(batch=64, room=20), World(batch=64, room=20), World(batch=64)
    monkeypatch.setattr(unheld.meter, "held_to", lambda most_bytes: None)
    for world, tried in ((unheld, 8), (resumed, 8), (roomy, 32)):
        if world is not unheld:
            world.engine._planner.cost.observe(Features(4, 64, 64, 0), 4 * IMAGE)
        ran = tried_out(world, monkeypatch)
        world.step()
        assert ran[0] == tried


def test_group_is_one_that_fits_beside_what_the_warm_up_left(monkeypatch):
    """Half-precision copies of weights, and workspaces of libraries, are in memory after the warm-up."""
    world = World(batch=64, room=40)

    def warm_up(*args, **kwargs):
        failure = calibration_warm_up(*args, **kwargs)
        world.meter.allocated_bytes = int(4 * IMAGE)
        return failure

    calibration_warm_up = calibration.warm_up
    monkeypatch.setattr(calibration, "warm_up", warm_up)
    assert not [event for event in world.step() if event.startswith("groups")]
    assert world.engine.bn_group == 16


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (64, "32 images at once (bn_group) in this run"),
        (8, "8 images at once in this run (bn_group=32, 8 in a batch)"),
        (36, "18 images at once in this run (bn_group=32, 36 in a batch)"),
        (40, "32 or 8 images at once (bn_group) in this run"),
    ],
)
def test_the_log_tells_how_many_images_batchnorm_really_sees(batch, told):
    world = World(batch=batch, room=100)
    world.step()
    assert world.engine.bn_group == 32
    assert [line for line in world.lines if "BatchNorm" in line] == [f"memory: BatchNorm sees {told}"]


def test_a_group_larger_than_the_batch_need_not_fit():
    world = World(batch=8, room=20, bn_group=32)
    world.step()
    assert world.lines == []


def test_the_log_tells_the_group_once_though_the_first_batch_is_tried_in_several_sizes():
    world, tried = World(), []
    world.fail = lambda images: True

    def smaller(batch):
        tried.append(len(batch[0]))
        return batch if len(tried) < 3 else None

    world.options = {"smaller": smaller}
    with pytest.raises(DoesNotFitError):
        world.step()
    assert len(tried) == 3
    assert [line for line in world.lines if "BatchNorm" in line] == [
        "memory: BatchNorm sees 1 images at once (bn_group) in this run; other processes hold 0 MiB"
    ]


def test_automatic_group_stays_when_memory_comes():
    world = World(batch=64, room=100, others=[80, 80, 0], bn_group=None, wait_ms=2000)
    world.run(12)
    assert world.engine.bn_group == 8
    assert world.sizes[-1] == 64


def test_group_of_the_micro_batch():
    whole, parts = World(bn_group=0), World(bn_group=0, room=10)
    whole.step()
    parts.step()
    assert (whole.sizes, parts.sizes) == ([16], [8])
    assert parts.model[1].num_batches_tracked == 2
    assert not torch.allclose(parts.model[1].running_var, whole.model[1].running_var, rtol=1e-6)


def test_the_warm_up_leaves_no_trace():
    one, other = World(bn_group=4), World(bn_group=4, micro_batch=16)  # the first warms up, the second does not
    torch.manual_seed(1)
    one.engine.step(one.data())
    drawn = torch.rand(3)
    torch.manual_seed(1)
    other.engine.step(other.data())
    assert torch.equal(torch.rand(3), drawn)
    assert_same_weights(one, other)
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_a_group_is_not_settled_while_others_hold_everything(monkeypatch):
    """Other processes release memory after three seconds. Otherwise the whole run would use groups of one image."""
    world = World(others=[40, 40, 40, 0])
    monkeypatch.setattr(world.engine._planner, "sleep", lambda seconds: world.meter.advance())
    world.step()
    assert world.engine.bn_group == 32
    assert world.sizes == [16]


def test_a_wait_of_the_warm_up_is_in_the_journal(monkeypatch):
    world = World(room=40, others=[39.5] * 3 + [0])
    monkeypatch.setattr(world.engine._planner, "sleep", lambda seconds: world.meter.advance())
    assert "waited 3 s" in world.step()
    assert not [event for event in world.step() if event.startswith("waited")]


def test_waits_of_the_warm_up_and_of_the_batch_together_have_an_end(monkeypatch):
    world, waits = World(room=40, others=[39.5]), []
    monkeypatch.setattr(world.engine._planner, "sleep", waits.append)
    with pytest.raises(DoesNotFitError):
        world.step()
    assert len(waits) == WAIT_S
