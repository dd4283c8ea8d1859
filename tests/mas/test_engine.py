"""The engine with a small convolutional model on a simulated card, on which an image takes 100 MiB."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.mas.world import IMAGE, World, assert_same_weights
from yolov12.errors import DoesNotFitError
from yolov12.mas import Config, Engine, Loss, TensorTask
from yolov12.mas.distributed.ranks import ALONE
from yolov12.mas.journal.journal import read_rows
from yolov12.mas.memory.replay import ReplayMeter


@pytest.mark.parametrize("pressure", [{"room": 60, "limit": 20 * IMAGE}, {"room": 30, "others": [10]}, {"room": 20}])
def test_what_workers_take_of_a_pool_is_missing_for_the_model(pressure, monkeypatch):
    """The pool has 20 images: a limit, what another process leaves, or the memory of the machine."""
    workers = [0, 0, 4, 9, 14, 14, 2, 0, 0]

    def failures(world):
        return [event for events in world.run(12) for event in events if event.startswith("out-of-memory")]

    world = World(batch=16, workers=workers, bn_group=1, **pressure)
    assert not failures(world)
    assert all(size + held <= 20 for size, held in zip(world.sizes, workers, strict=False))
    assert max(world.sizes[4:6]) < world.sizes[1]
    read = ReplayMeter.read
    monkeypatch.setattr(ReplayMeter, "read", lambda meter: replace(read(meter), outside_bytes=0, free_bytes=20 * IMAGE))
    assert failures(World(batch=16, workers=workers, bn_group=1, **pressure))  # it can fail


def test_layers_that_are_unfrozen_later_count():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 9, 2))
    model[0].requires_grad_(False)
    task = TensorTask(lambda model, x: model(x).square().mean())
    batch, seen = (torch.rand(4, 3, 5, 5),), []
    with Engine(model, task, Config(bn_group=2)) as engine:
        for _ in range(2):
            engine.step(batch)
            seen.append(engine._planner.gradient_bytes)
            model.requires_grad_(True)
    of_the_first, of_all = (sum(part.numel() for part in each.parameters()) * 4 for each in (model[0], model))
    assert seen == [of_all - of_the_first, of_all]


def test_weights_after_a_training_under_pressure_are_those_of_one_without():
    calm, pressed = World(bn_group=2), World(bn_group=2, others=[0, 0, 30, 33, 10, 20, 33, 0, 0])
    calls = []
    pressed.fail = lambda images: calls.append(None) or len(calls) % 5 == 4
    calm.run(12)
    events = [event for each in pressed.run(12) for event in each]
    assert set(calm.sizes) == {16}
    assert min(pressed.sizes) < 8
    assert any(event.startswith("out-of-memory") for event in events)
    assert_same_weights(pressed, calm)


class WorldOfTerms(World):
    """A world whose loss has two normalisers. A batch that is split runs ahead without gradients."""

    def loss(self, model, x, y):
        whole = super().loss(model, x, y)
        error = ((model(x) - y) ** 2).sum(1)
        negative = y[:, 1] < 0
        counts = torch.stack((whole.normaliser, negative.sum()))
        value = torch.stack((whole.value, error[negative].sum() / counts[1].clamp(min=1)))
        return Loss(value, counts, {"error": value * value.new_tensor([1, 0])})


def test_weights_under_pressure_with_several_normalisers():
    calm, pressed = WorldOfTerms(bn_group=2), WorldOfTerms(bn_group=2, others=[0, 0, 30, 33, 10, 20, 33, 0, 0])
    calls, ahead = [], []

    def fail(images):
        calls.append(None)
        ahead.append(not torch.is_grad_enabled())
        return len(calls) % 7 == 4

    pressed.fail = fail
    calm.run(12)
    events = [event for each in pressed.run(12) for event in each]
    assert set(calm.sizes) == {16}
    assert min(pressed.sizes) < 8
    assert any(ahead[3::7])
    assert not all(ahead[3::7])
    assert any(event.startswith("out-of-memory") for event in events)
    assert_same_weights(pressed, calm)


def test_shrinks_before_it_fails():
    world = World(others=[0] * 4 + [26] * 4, bn_group=2)
    events = world.run(8)
    assert world.sizes == [16] * 4 + [8] * 4
    assert events[1:] == [[], [], [], ["shrunk 16 to 8"], [], [], []]


def test_grows_back():
    world = World(others=[0] * 2 + [26] * 2 + [0], bn_group=2, wait_ms=10)
    events = world.run(14)
    assert world.sizes[:4] == [16, 16, 8, 8]
    assert world.sizes[-1] == 16
    assert [event for step in events for event in step] == ["shrunk 16 to 8", "grew 8 to 16"]


def test_memory_that_comes_and_goes_is_used_while_it_is_there():
    others = [0, *[26, 0, 0] * 20]
    world = World(others=others, bn_group=2, wait_ms=10)
    events = world.run(50)
    assert all(size == 8 for size, taken in zip(world.sizes, others, strict=False) if taken)
    assert world.sizes.count(16) > 10
    assert not any("out-of-memory" in event for step in events for event in step)


def test_false_alarm_is_retried_unchanged():
    world = World(bn_group=2)
    world.step()
    alarms = [True]
    world.fail = lambda images: bool(alarms and alarms.pop())
    assert world.step(1) == ["out-of-memory at 16", "retried 16"]
    assert world.step(2) == []
    assert world.sizes == [16, 16, 16]


def test_second_failure_halves():
    world = World(bn_group=2)
    world.step()
    world.fail = lambda images: images > 8
    assert world.step(1) == ["out-of-memory at 16", "out-of-memory at 16", "shrunk 16 to 8"]
    assert world.step(2) == []
    assert world.sizes == [16, 8, 8]


def test_groups_are_split_as_a_last_resort_and_come_back():
    world = World(others=[0] * 3 + [33] + [0], bn_group=8)
    events = world.run(6)
    assert world.sizes[3] < 8
    assert any(event.startswith("groups of") for event in events[3])
    assert not any(event.startswith("groups of") for each in events[4:] for event in each)


def test_nothing_fits():
    world = World(room=1, ways_out=lambda share: ("amp=True", "imgsz=320", "a smaller model", "a new card"), bn_group=1)
    before = {name: value.clone() for name, value in world.model.state_dict().items()}
    with pytest.raises(
        DoesNotFitError, match=r"one image needs 1\d\d MiB .* 90 MiB \(100 MiB free\)\. Ways out: .*; or .*; or "
    ):
        world.step()
    assert all(torch.equal(value, before[name]) for name, value in world.model.state_dict().items())
    assert all(parameter.grad is None for parameter in world.model.parameters())


def test_an_error_that_remains_with_one_image_is_quoted_if_that_should_fit():
    """Libraries say this for lack of memory, and for other reasons."""
    world = World(bn_group=1)
    world.step()

    def fail(module, inputs):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")

    world.model.register_forward_pre_hook(fail)
    with pytest.raises(DoesNotFitError, match=r"What failed: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"):
        world.step(1)


def test_fixed_micro_batch_is_kept_under_pressure():
    world = World(bn_group=2, micro_batch=4, others=[0, 0, 30, 0])
    world.run(20)
    assert set(world.sizes) == {4}


def test_fixed_micro_batch_gives_way_to_a_failure():
    world = World(bn_group=2, micro_batch=8, others=[0, 35, 0])
    events = world.run(12)
    assert world.sizes[:2] == [8, 4]
    assert world.sizes[-1] == 8
    assert "out-of-memory at 8" in events[1]
    assert not any("out-of-memory" in event for later in events[2:] for event in later)


def test_later_batch_may_be_larger_than_the_first():
    """A user's own loop may do so. Groups must not be split only because nothing was observed."""
    world = World(bn_group=16, room=100)
    world.step(images=2)
    events = world.step(images=64)
    assert not [event for event in events if event.startswith("groups")]


def test_loss_that_changes_its_images_in_place():
    world, plain = World(bn_group=0), World(bn_group=0)
    task = TensorTask(lambda model, x, y: world.loss(model, x.mul_(3), y))
    engine = Engine(world.model, task, Config(bn_group=0), meter=world.meter, log=world.lines.append)
    engine.step(world.data())
    x, y = plain.data()
    plain.loss(plain.model, x * 3, y).value.backward()
    for mine, theirs in zip(world.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_allocation_that_fails_while_the_size_of_a_batch_is_determined():
    """With `multi_scale`, the size of images is known only after one of them was resized on the device."""
    world, failures = World(bn_group=4), [True]
    look = world.engine._task.workload

    def workload(batch):
        if failures:
            failures.pop()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return look(batch)

    world.engine._task.workload = workload
    world.step()
    assert world.sizes == [16]


@pytest.mark.parametrize("skipped", [0, 2])
def test_first_update_that_runs_out_of_memory(tmp_path, skipped):
    """A `GradScaler` skips updates until its scale fits. The optimizer creates its state only after them."""
    world, undisturbed = World(folder=tmp_path, bn_group=4), World(bn_group=4)
    failures = [True]

    def skips(world, update):
        left = [skipped]

        def step():
            if left[0]:
                left[0] -= 1
            else:
                update()

        world.optimizer.step = step

    def fails_half_way(step):
        if failures:
            failures.pop()
            with torch.no_grad():
                world.model[0].weight.mul_(0.5)
            world.optimizer.state[world.model[0].weight]["step"] = torch.tensor(1.0)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        step()

    skips(world, functools.partial(fails_half_way, world.optimizer.step))
    skips(undisturbed, undisturbed.optimizer.step)
    world.run(skipped + 3)
    undisturbed.run(skipped + 3)
    world.engine.close()
    assert_same_weights(world, undisturbed)
    events = [row["events"] for row in read_rows(tmp_path / "memory.csv")]
    assert events[skipped].endswith("out-of-memory in the optimizer")
    assert not any("optimizer" in event for event in events[:skipped] + events[skipped + 1 :])


@settings(max_examples=settings.default.max_examples // 2)
@given(st.lists(st.integers(0, 34), min_size=1, max_size=12), st.sampled_from([1, 2, 4]), st.integers(3, 16))
def test_plans_stay_inside_the_budget_of_a_random_trace(others, group, batch):
    """If memory changes only between batches, no allocation fails."""
    world = World(batch=batch, others=[0, *others], bn_group=group)
    for index in range(len(others) + 2):
        events = world.step(index)
        latest = world.engine.latest
        assert latest.predicted_bytes <= latest.budget_bytes
        assert latest.peak_bytes <= latest.budget_bytes
        assert not [event for event in events if event.startswith("out-of-memory")]
        assert sum(latest.micro_batches) == batch


def test_a_layer_may_be_unfrozen_during_a_training():
    worlds = [World(bn_group=2), World(bn_group=2, micro_batch=4)]
    for world in worlds:
        world.model[0].requires_grad_(False)
        world.step()
        world.model[0].requires_grad_(True)
        world.engine.step(world.data(1))
    whole, split = ([parameter.grad for parameter in world.model.parameters()] for world in worlds)
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_batch_that_broke_leaves_no_history_in_what_is_saved():
    """A run that ends since nothing fits resumes with the size that it had."""
    world = World(bn_group=1)
    world.run(3)
    before = world.engine.state_dict()["history"]
    world.fail = lambda images: True
    with pytest.raises(DoesNotFitError):
        world.step()
    assert world.engine.state_dict()["history"] == before


class HeardRanks:
    """One of two ranks, which notes what it tells the other."""

    rank, size, alike = 0, 2, True

    def __init__(self):
        self.told = []

    def agree(self, status, failure=None):
        self.told.append(status)
        return [status, status]

    def reserve(self, tensors):
        pass

    sum = reserve

    def all(self, flag):
        return flag

    least = all


@pytest.mark.parametrize(("ranks", "wanted"), [(ALONE, None), (HeardRanks(), False)])
def test_several_processes_replay_graphs_only_if_they_are_asked_to(monkeypatch, ranks, wanted):
    asked = []
    monkeypatch.setattr("yolov12.mas.engine.graphs_for", lambda device, room, wanted: asked.append(wanted))
    World(ranks=ranks, bn_group=4, micro_batch=4)
    World(ranks=ranks, bn_group=4, micro_batch=4, cuda_graphs=True)
    assert asked == [wanted, True]


def test_other_ranks_are_told_each_time_once():
    """With two batches in an update, no new time is known before the second."""
    ranks = HeardRanks()
    world = World(ranks=ranks, bn_group=4, micro_batch=4)
    for _ in range(4):
        for seed in range(2):
            world.engine.step(world.data(seed))
        world.engine.update(world.optimizer)
    world.engine.close()
    news = [status.ms == status.ms for status in ranks.told]
    assert news == [False, False, False, False, True, False, True, False]
