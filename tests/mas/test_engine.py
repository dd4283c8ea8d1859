"""The engine with a small convolutional model on a simulated card, on which an image takes 100 MiB."""

import functools
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolov12.errors import DoesNotFitError
from yolov12.mas import Advice, Config, Engine, Journal, Loss, TensorTask, calibration
from yolov12.mas.distributed.ranks import ALONE
from yolov12.mas.journal.journal import read_rows
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.scheduling.peak_model import Features
from yolov12.mas.scheduling.planner import BatchPlanner

MIB = 2**20
IMAGE = 100 * MIB


@pytest.fixture(autouse=True)
def nobody_sleeps(monkeypatch):
    """Fail a test if the engine waits for memory, which would never come back here."""
    defaults = BatchPlanner.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "sleep", lambda seconds: pytest.fail("waits for other processes"))


class World:
    """Training on a card with memory for `room` images; other processes hold `others[step]` images in each step.

    Loader workers of the training, which share the memory, hold `workers[step]` images.
    """

    def __init__(
        self,
        batch=16,
        room=40,
        others=(0,),
        workers=(0,),
        live=0,
        folder=None,
        ways_out=lambda share: ("amp=True",),
        optimizer_images=0,
        wait_ms=0,
        ranks=ALONE,
        **config,
    ):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 3, 4, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(1024, 2)
        ).double()
        traces = ([int(images * IMAGE) for images in trace] for trace in (others, workers))
        self.meter = ReplayMeter(room * IMAGE, next(traces), live, config.get("limit"), next(traces))
        self.journal = Journal(folder) if folder else None
        self.fail = lambda images: False
        self.wait_ms = wait_ms  # time of every micro-batch, besides a millisecond per image
        self.lines, self.sizes, self.batch = [], [], batch
        self.options = {}  # arguments of every `Engine.step`
        self.engine = Engine(
            self.model,
            TensorTask(self.loss),
            Config(**config),
            meter=self.meter,
            journal=self.journal,
            layers={},  # no checkpoint plan saves memory on this card
            advice=Advice(ways_out, lambda: int(optimizer_images * IMAGE) if not self.sizes else 0),
            ranks=ranks,
            log=self.lines.append,
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def loss(self, model, x, y):
        self.meter.use(len(x) * IMAGE)
        self.meter.tick(len(x) + self.wait_ms)
        if self.fail(len(x)):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        # A mean over the targets that count, like a mean over pixels that are not ignored.
        counts = (y[:, 0] > -1).sum()
        error = ((model(x) - y) ** 2)[y[:, 0] > -1].sum() / counts.clamp(min=1)
        return Loss(error, counts, {"error": error})

    def data(self, seed=0, images=None):
        draw = torch.Generator().manual_seed(seed)
        images = images or self.batch
        return tuple(torch.randn(images, *shape, generator=draw, dtype=torch.float64) for shape in ((3, 64, 64), (2,)))

    def step(self, seed=0, images=None):
        result = self.engine.step(self.data(seed, images), **self.options)
        self.engine.update(self.optimizer)
        self.meter.advance()
        self.sizes.append(max(result.micro_batches))
        return list(result.events)

    def run(self, steps):
        return [self.step(index) for index in range(steps)]


def assert_same_weights(one, other):
    for name, value in one.model.state_dict().items():
        # A batch's gradient is scaled once, by a factor in single precision: 6e-8.
        torch.testing.assert_close(value, other.model.state_dict()[name], rtol=1e-5, atol=1e-8)


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


def test_loss_that_changes_its_images_in_place():
    world, plain = World(bn_group=0), World(bn_group=0)
    task = TensorTask(lambda model, x, y: world.loss(model, x.mul_(3), y))
    engine = Engine(world.model, task, Config(bn_group=0), meter=world.meter, log=world.lines.append)
    engine.step(world.data())
    x, y = plain.data()
    plain.loss(plain.model, x * 3, y).value.backward()
    for mine, theirs in zip(world.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_journal(tmp_path):
    world = World(folder=tmp_path, others=[0, 0, 29, 0], bn_group=4, live=2 * IMAGE)
    for _ in range(3):
        for seed in range(2):  # two batches per update
            world.engine.step(world.data(seed))
        world.engine.update(world.optimizer, epoch=3)
        world.meter.advance()
    summary = world.engine.close(updates_expected=3, is_exact=True)
    rows = read_rows(tmp_path / "memory.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert {(row["epoch"], row["images"], row["image_size"], row["max_boxes"]) for row in rows} == {
        ("3", "32", "64x64", "0")
    }
    assert [row["micro_batches"] for row in rows] == ["16 16", "16 16", "4 4 4 4 4 4 4 4"]
    assert [row["peak_mib"] for row in rows] == ["1800.0", "1800.0", "600.0"]
    assert all(float(row["predicted_mib"]) == pytest.approx(float(row["peak_mib"]), rel=0.03) for row in rows)
    assert [row["budget_mib"] for row in rows] == ["3600.0", "3600.0", "700.0"]
    assert [row["step_ms"] for row in rows] == ["32.0", "32.0", "32.0"]
    assert rows[2]["events"] == "batch of 16 did not fit; shrunk 16 to 4"
    how = "ran as 4 × 4, the same gradient (BatchNorm in groups of 4)"
    assert summary.explanation == f"batch=16 did not fit into the budget of 0.7 GiB in 2 of 6 batches: {how}"
    assert (summary.updates, summary.images, summary.images_lost, summary.shrinks) == (3, 96, 0, 1)


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


@pytest.mark.parametrize("batches", [0, 1])
def test_images_of_a_batch_that_fails_are_counted_as_lost(tmp_path, batches):
    world = World(folder=tmp_path, bn_group=4)
    world.run(batches)
    world.fail = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        world.step()
    assert world.engine.close().images_lost == 16


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


def test_a_group_is_not_settled_while_others_hold_everything(monkeypatch):
    """Other processes release memory after three seconds. Otherwise the whole run would use groups of one image."""
    world = World(others=[40, 40, 40, 0])
    monkeypatch.setattr(world.engine._planner, "sleep", lambda seconds: world.meter.advance())
    world.step()
    assert world.engine.bn_group == 32
    assert world.sizes == [16]


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
