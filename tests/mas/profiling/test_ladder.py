"""The engine with checkpoint plans, on a simulated card: the CPU, with its tensors counted byte by byte."""

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yolov12 import mas
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.journal.journal import read_rows
from yolov12.mas.memory.reading import ClockStopwatch, Reading, Sensors
from yolov12.mas.profiling.ladder import Ladder, make_ladder
from yolov12.mas.profiling.trace import ByteTrace
from yolov12.mas.scheduling.peak_model import Level

BATCH = 16


class Card(ByteTrace):
    """Meter of a simulated card, whose allocator fails when the card is full."""

    kind = "cuda"

    def __init__(self, total_bytes):
        super().__init__()
        self.total_bytes = total_bytes
        self.now_ms = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.now_ms += 0.01
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.allocated_bytes > self.total_bytes:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB")
        return result

    def read(self):
        live = self.allocated_bytes
        return Reading(live, live, max(self.total_bytes - live, 0), self.total_bytes, 0)

    def release(self, *, thorough=True):
        pass

    def limited(self):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def held_to(self, most_bytes):
        before, self.total_bytes = self.total_bytes, min(self.total_bytes, most_bytes)
        yield
        self.total_bytes = before

    def stopwatch(self):
        return ClockStopwatch(lambda: self.now_ms)

    def busy_percent(self):
        return None

    def sensors(self):
        return Sensors()


def loss(model, images, labels):
    return F.cross_entropy(model(images), labels)


def make():
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Conv2d(3 if index == 0 else 16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        for index in range(6)
    ]
    model = nn.Sequential(*layers, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))).double()
    return model, (torch.randn(BATCH, 3, 32, 32, dtype=torch.float64), torch.randint(0, 4, (BATCH,)))


class Run:
    """A run of some batches on a card with `total_bytes`."""

    def __init__(self, total_bytes, batches=1, folder=None, cache=None, **config):
        self.model, batch = make()
        card = Card(int(total_bytes))
        journal = mas.Journal(folder) if folder else None
        self.engine = mas.Engine(
            self.model, mas.TensorTask(loss), mas.Config(**{"bn_group": BATCH, **config}), meter=card, journal=journal,
            log=lambda line: None, cache=cache,
        )  # fmt: skip
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        with card:
            for _ in range(batches):
                self.result = self.engine.step(batch)
                self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
                self.engine.update(optimizer)
        self.latest = self.engine.latest
        self.plan = self.engine._step.plans[self.latest.level]

    @property
    def events(self):
        return self.latest.events


@pytest.fixture(scope="module")
def whole():
    return Run(1e12)


def test_a_group_that_does_not_fit_as_it_is_stays_whole_under_a_plan(whole):
    assert whole.plan == KEEP_ALL
    run = Run(0.7 * whole.latest.peak_bytes, batches=3)
    assert run.result.micro_batches == (BATCH,)
    assert run.plan != KEEP_ALL
    assert run.latest.peak_bytes <= run.latest.budget_bytes < 0.7 * whole.latest.peak_bytes
    assert (run.gradient - whole.gradient).norm() <= 1e-12 * whole.gradient.norm()
    assert not any("groups of" in event for event in run.events)


@pytest.mark.parametrize(("share", "images"), [(0.95, 12), (0.7, 8)])
def test_layers_are_profiled_with_images_that_libraries_know(whole, share, images, monkeypatch):
    """A group of 12 images fits and a batch of 16 does not, or neither fits."""
    profiled = []

    def make(*arguments):
        profiled.append(arguments[-1])
        return make_ladder(*arguments)

    monkeypatch.setattr("yolov12.mas.calibration.make_ladder", make)
    Run(share * whole.latest.peak_bytes, bn_group=12)
    assert profiled == [images]


def test_predicted_peak_under_a_plan_is_what_it_takes(whole):
    run = Run(0.6 * whole.latest.peak_bytes, batches=4)
    assert run.latest.level > 0
    assert run.latest.predicted_bytes == pytest.approx(run.latest.peak_bytes, rel=0.03)


def test_less_memory_means_a_plan_that_frees_more(whole):
    peaks = [Run(share * whole.latest.peak_bytes, batches=3).latest.peak_bytes for share in (1.2, 0.8, 0.6)]
    assert peaks[0] > peaks[1] > peaks[2]


def test_layers_left_alone_are_in_no_plan_and_keep_their_memory(whole, tmp_path):
    limit = 0.75 * whole.latest.peak_bytes
    free, bound = Run(limit), Run(limit, folder=tmp_path, disabled_layers=("0", "2", "3"))
    assert not {"0", "2", "3"} & {name for plan in bound.engine._step.plans for name, _ in plan.modes}
    lowest = [run.engine._planner.cost.levels[-1].fraction for run in (free, bound)]
    assert lowest[1] > lowest[0] + 0.1
    bound.engine.close()
    rows = read_rows(tmp_path / "memory.csv")
    assert rows[0]["plan"] == str(bound.plan)
    assert not any("groups of" in event for event in free.events)
    assert any("groups of" in event for event in bound.events)  # the other layers cannot free enough for a group


def test_what_was_learned_goes_into_a_checkpoint_and_comes_back(whole):
    run = Run(0.7 * whole.latest.peak_bytes, batches=4)
    state = json.loads(json.dumps(run.engine.state_dict()))
    other = mas.Engine(make()[0], mas.TensorTask(loss), mas.Config(bn_group=BATCH), meter=Card(10**12))
    other.load_state_dict(state)
    assert other.state_dict() == run.engine.state_dict()
    assert other._step.plans == run.engine._step.plans
    # State is ignored by a model in which a planned layer is disabled, on another device, and by a version in which
    # layers take other bytes and times.
    named = next(name for plan in run.engine._step.plans for name, _ in plan.modes)
    others = [(mas.Config(), {"device": "another"}), (mas.Config(), {"format": 4}), (mas.Config(), {"format": None})]
    for config, changed in [(mas.Config(disabled_layers=(named,)), {}), *others]:
        fresh = mas.Engine(make()[0], mas.TensorTask(loss), config, meter=Card(10**12))
        before = fresh.state_dict()
        fresh.load_state_dict({**state, **changed})
        assert fresh.state_dict() == before


def test_where_nothing_runs_as_it_is_all_is_recomputed():
    one_image = Run(1e12, bn_group=1).latest.peak_bytes / BATCH
    # One image does not fit if everything is kept. It fits if everything is recomputed.
    for share in (1.0, 0.9, 0.8):
        run = Run(share * one_image + 3e5, bn_group=1, safety_ratio=0.0)
        assert sum(run.result.micro_batches) == BATCH


def test_ladder_round_trip():
    ladder = Ladder((KEEP_ALL, Plan((("a", REBUILD), ("b.0", RECOMPUTE)))), (Level(1.0, 1.0), Level(0.5, 1.2)))
    assert Ladder.from_state_dict(json.loads(json.dumps(ladder.state_dict()))) == ladder
    assert ladder.names() == {"a", "b.0"}


def test_a_ladder_is_made_once_for_the_same_training(whole, tmp_path, monkeypatch):
    limit = 0.7 * whole.latest.peak_bytes
    first = Run(limit, cache=tmp_path / "plans")
    (file,) = (tmp_path / "plans").iterdir()
    monkeypatch.setattr("yolov12.mas.calibration.make_ladder", lambda *_: pytest.fail("profiles once more"))
    second = Run(limit, cache=tmp_path / "plans")
    assert second.engine._step.plans == first.engine._step.plans
    monkeypatch.undo()
    Run(limit, cache=tmp_path / "plans", disabled_layers=("5",))  # other layers have another ladder
    assert len(list((tmp_path / "plans").iterdir())) == 2
    monkeypatch.setattr("yolov12.mas.batchnorm.fused.writes_into", lambda device: True)
    Run(limit, cache=tmp_path / "plans")  # blocks that are joined need less memory without a plan
    assert len(list((tmp_path / "plans").iterdir())) == 3
    monkeypatch.undo()
    file.write_text("{")  # an unreadable ladder is made again
    assert Run(limit, cache=tmp_path / "plans").engine._step.plans[0] == KEEP_ALL
    assert len(Ladder.from_state_dict(json.loads(file.read_text())).plans) > 3


def test_a_cache_that_cannot_be_written_is_no_error(whole, tmp_path):
    (tmp_path / "file").touch()
    assert Run(0.7 * whole.latest.peak_bytes, cache=tmp_path / "file").latest.level > 0


class Shift(nn.Module):
    """A layer that does not need its input for its backward pass, so that the input may be overwritten."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x + self.by


class Awkward(nn.Module):
    """A model with parts that cannot run twice, later, or in another order."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.shared = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.counts = nn.Sequential(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8, track_running_stats=True))
        self.relu = nn.ReLU(inplace=True)
        self.residual = nn.Sequential(Shift(), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.last = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())

    def forward(self, x):
        x = self.counts(self.shared(self.shared(self.plain(x))))
        x = self.relu(x) * 1.0
        x += self.residual(x)
        return self.last(x).mean((2, 3))


def awkward(total_bytes):
    torch.manual_seed(0)
    model = Awkward().double()
    batch = torch.randn(BATCH, 3, 32, 32, dtype=torch.float64), torch.randint(0, 4, (BATCH,))
    card = Card(int(total_bytes))
    engine = mas.Engine(model, mas.TensorTask(loss), mas.Config(bn_group=BATCH), meter=card, log=lambda line: None)
    with card:
        engine.step(batch)
    return engine, torch.cat([p.grad.flatten() for p in model.parameters()]), model


def test_layers_that_cannot_run_otherwise_are_in_no_plan():
    free, wanted, _ = awkward(1e12)
    engine, gradient, model = awkward(1.05 * free.latest.peak_bytes)
    names = {name for plan in engine._step.plans for name, _ in plan.modes}
    assert engine.latest.level > 0
    assert {"shared", "counts", "relu", "residual"}.isdisjoint(names)
    assert any(name.startswith(("plain", "last")) for name in names)
    assert (gradient - wanted).norm() <= 1e-9 * wanted.norm()
    assert int(model.shared[1].num_batches_tracked) == 1


def test_a_model_without_layers_that_are_called():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 32 * 32, 4)

        def forward(self, x):
            return F.linear(x.flatten(1), self.fc.weight.to(x))

    model = Bare()
    card = Card(6 * 10**5)
    engine = mas.Engine(model, mas.TensorTask(loss), mas.Config(safety_ratio=0.0), meter=card, log=lambda line: None)
    with card:
        result = engine.step((torch.randn(BATCH, 3, 32, 32), torch.randint(0, 4, (BATCH,))))
    assert sum(result.micro_batches) == BATCH


def test_a_guess_is_not_kept_for_later_runs(whole, tmp_path):
    one_image = Run(1e12, bn_group=1, micro_batch=1).latest.peak_bytes
    tight = Run(1.05 * one_image, bn_group=1, safety_ratio=0.0, cache=tmp_path / "plans")
    if tight.engine._calibration.ladder.guessed:
        assert not (tmp_path / "plans").exists()
        assert tight.engine.state_dict()["ladder"] is None
    assert len(Run(0.7 * whole.latest.peak_bytes, cache=tmp_path / "plans").engine._step.plans) > 3


def test_what_another_version_learned_is_no_reason_to_stop():
    lines = []
    engine = mas.Engine(make()[0], mas.TensorTask(loss), mas.Config(), meter=Card(10**12), log=lines.append)
    before = engine.state_dict()
    engine.load_state_dict({**before, "ladder": [{"other": 1}]})
    assert "begins to learn anew" in lines[0]
    assert engine.state_dict() == before
