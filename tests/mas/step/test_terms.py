"""Losses with several normalisers: the gradient of a batch that is split is that of the whole batch.

Real models with Ultralytics' losses, in float64 where Ultralytics' own code runs in it. Differences up to 1e-7 remain,
because the terms of its losses are in single precision.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from yolov12.errors import DoesNotFitError
from yolov12.mas import Config, Engine, Loss, TensorTask
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.step.loss import Total, UnknownNormalisersError
from yolov12.mas.step.step import Step

BOXES = [3, 0, 20, 1, 5, 2, 0, 0]  # the last part of most splits has no object
SPLITS = [[(4,), (4,)], [(2,)] * 4, [(1,)] * 8, [(2, 1), (3,), (2,)]]
NAMES = [
    "masks",
    "masks apart",
    "keypoints",
    "keypoints without visibility",
    "two heads",
    "masks of two heads",
    "keypoints of two heads",
    "oriented boxes",
    "oriented boxes of two heads",
]
SINGLE = "masks of two heads"  # Ultralytics' assigner for masks mixes dtypes in float64


def make(tools, name):
    """Return a bench with a small model that has seen its loss, and a batch for it."""
    bench = tools.small_bench(name, torch.float32 if name == SINGLE else torch.float64)
    batch = tools.batch_for(name, BOXES)
    bench.run(batch)
    return bench, batch


@pytest.fixture(scope="module")
def pose(tools):
    return make(tools, "keypoints")


def flat(plan):
    return tuple(size for groups in plan for size in groups)


def whole(tools, bench, batch, plan):
    """Run a batch at once, in the groups of a plan."""
    return bench.run(batch, tools.Scripted((), plans=[[flat(plan)]]))


def split(tools, bench, batch, plan, faults=(), **scripted):
    """Run a batch as planned; after a failure, in the same groups, split at random."""
    planner = tools.Scripted(flat(plan), plans=[plan, *scripted.pop("plans", [])], **scripted)
    return bench.run(batch, planner, faults), planner


def assert_same(tools, outcome, wanted, tolerance=1e-6):
    assert tools.difference(outcome.gradient, wanted.gradient) <= tolerance
    torch.testing.assert_close(outcome.result.loss, wanted.result.loss, rtol=1e-5, atol=1e-6)
    for name, item in wanted.result.items.items():
        torch.testing.assert_close(outcome.result.items[name], item, rtol=1e-5, atol=1e-6)
    for name, buffer in wanted.buffers.items():
        torch.testing.assert_close(outcome.buffers[name], buffer, rtol=1e-6, atol=1e-6)
    assert torch.equal(outcome.drawn, wanted.drawn)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_does_not_depend_on_the_split(tools, name):
    bench, batch = make(tools, name)
    plain, at_once = bench.plain(batch), bench.run(batch)
    assert torch.equal(at_once.gradient, plain.gradient)
    assert torch.equal(at_once.result.loss.reshape(-1, len(plain.result.loss)).sum(0), plain.result.loss)
    assert all(torch.equal(at_once.result.items[key], item) for key, item in plain.result.items.items())
    for plan in SPLITS:
        if name == SINGLE and plan[0] == (1,):
            continue  # at 64 pixels the last layers would normalise 4 values, and rounding of 1e-7 become 1e-2
        outcome, _ = split(tools, bench, batch, plan)
        assert_same(tools, outcome, whole(tools, bench, batch, plan), 1e-5 if name == SINGLE else 1e-6)


def test_weights_by_images_and_normalisers_of_one_part_give_another_gradient(tools, pose, monkeypatch):
    """Two negative controls: `exact=False`, and totals that are those of the first part."""
    bench, batch = pose
    wanted = whole(tools, bench, batch, SPLITS[1])
    monkeypatch.setattr(bench.step, "_exact", False)
    outcome, _ = split(tools, bench, batch, SPLITS[1])
    assert tools.difference(outcome.gradient, wanted.gradient) > 0.1
    monkeypatch.undo()
    monkeypatch.setattr(Total, "unfloored", lambda self: self._parts[0].normaliser)
    outcome, _ = split(tools, bench, batch, SPLITS[1])
    assert tools.difference(outcome.gradient, wanted.gradient) > 0.1


def test_weights_by_images_are_those_of_stock_accumulation(tools, pose, monkeypatch):
    bench, batch = pose
    plan, starts = [(3,), (2,), (3,)], (0, 3, 5, 8)
    wanted, value, items = 0, 0, {}
    for start, stop in itertools.pairwise(starts):
        bench.reset()
        torch.rand(start, 1, 1, 1, dtype=torch.float64)  # draws the brightness of the earlier images
        bench.task.workload(batch)
        loss, new = bench.model(bench.preprocess(bench.task.part(batch, start, stop)))
        loss.sum().backward()  # a mean over the part's images, times these images
        wanted = wanted + bench.outcome(None).gradient
        value = value + loss.detach()
        items = {key: items.get(key, 0) + (stop - start) / 8 * item for key, item in new.items()}
    monkeypatch.setattr(bench.step, "_exact", False)
    outcome, _ = split(tools, bench, batch, plan)
    assert tools.difference(outcome.gradient, wanted) <= 1e-6
    torch.testing.assert_close(outcome.result.loss, value, rtol=1e-5, atol=1e-6)
    for key, item in items.items():
        torch.testing.assert_close(outcome.result.items[key], item, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_ultralytics_on_layers_that_normalise_each_group(tools, pose):
    """The reference is the test's own grouped BatchNorm, with Ultralytics' loss on the whole batch."""
    bench, batch = pose
    plan = SPLITS[3]
    wanted = bench.plain(batch, flat(plan))
    outcome, _ = split(tools, bench, batch, plan)
    assert tools.difference(outcome.gradient, wanted.gradient) <= 1e-6


@pytest.mark.parametrize("boxes", [[0] * 4, [0, 0, 0, 2]], ids=["no object", "one part with objects"])
@pytest.mark.parametrize("name", ["masks of two heads", "keypoints"])
def test_parts_without_objects(tools, name, boxes):
    bench, _ = make(tools, name)
    batch, plan = tools.batch_for(name, boxes), [(2,), (2,)]
    outcome, _ = split(tools, bench, batch, plan)
    assert_same(tools, outcome, whole(tools, bench, batch, plan), 1e-5 if name == SINGLE else 1e-6)
    assert torch.equal(bench.run(batch).gradient, bench.plain(batch).gradient)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive over the batch", "negative over the batch"])
def test_a_likelihood_that_is_clamped_over_the_whole_batch(tools, sign):
    """In some parts it has the other sign than in the batch."""
    bench, batch = make(tools, "keypoints of two heads")
    head, plan, seen, offset = bench.heads()[1], SPLITS[1], [], 0.0
    stock = head.rle_loss.forward
    head.rle_loss.forward = lambda *args: seen.append(float(stock(*args)) + offset) or (stock(*args) + offset)
    offset = 1e-3 * sign - float(whole(tools, bench, batch, plan).result.items["rle_loss"]) / bench.model.args.rle
    wanted = whole(tools, bench, batch, plan)
    assert (wanted.result.items["rle_loss"] > 0) == (sign > 0)
    del seen[:]
    outcome, _ = split(tools, bench, batch, plan)
    assert len({value > 0 for value in seen}) == 2
    assert_same(tools, outcome, wanted)
    offset = -1e6
    assert torch.equal(bench.run(batch).gradient, bench.plain(batch).gradient)


# Failures


PLACES = ["copy", "preprocess", "forward", "assigner", "loss", "backward"]


@pytest.mark.parametrize("where", PLACES)
def test_failures_in_both_passes(tools, pose, where):
    bench, batch = pose
    plan = SPLITS[1]
    wanted = whole(tools, bench, batch, plan)
    for attempt in (1, 5):  # of four in each pass
        outcome, planner = split(tools, bench, batch, plan, [tools.Fault(attempt, where)], seed=attempt)
        assert len(planner.failures) == (0 if where == "backward" and attempt == 1 else 1)
        assert_same(tools, outcome, wanted)


def test_an_error_in_the_first_pass_leaves_no_trace(tools, pose):
    bench, batch = pose
    bench.reset([tools.Fault(1, "forward", 2, lambda: ValueError("labels"))], True)
    before = [parameter.grad.clone() for parameter in bench.parameters]
    buffers = {name: buffer.clone() for name, buffer in bench.model.named_buffers()}
    state = torch.get_rng_state()
    bench.task.workload(batch)
    with pytest.raises(ValueError, match="labels"):
        bench.step.run(batch, 8, tools.Scripted((), plans=[SPLITS[0]]))
    assert all(torch.equal(p.grad, old) for p, old in zip(bench.parameters, before, strict=True))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in bench.model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_that_change_begin_the_batch_again(tools, pose):
    """The normalisers of the batch are those of its new groups."""
    bench, batch = pose
    again = [(2,)] * 4
    plans = [again[2:], again]  # of the images that are left, then of the batch
    outcome, _ = split(tools, bench, batch, SPLITS[0], [tools.Fault(3, "backward", 3)], plans=plans)
    assert outcome.result.micro_batches == (2, 2, 2, 2)
    assert_same(tools, outcome, whole(tools, bench, batch, again))


def test_a_batch_that_does_not_fit_in_the_first_pass(tools, pose):
    bench, batch = pose
    planner = tools.Scripted((), plans=[SPLITS[0]])
    stock = planner.plan

    def plan(start, failure):
        if failure is not None:
            raise DoesNotFitError("no")
        return stock(start, failure)

    planner.plan = plan
    with pytest.raises(DoesNotFitError):
        bench.run(batch, planner, [tools.Fault(0, "forward", 3)])
    assert all(parameter.grad is None for parameter in bench.parameters)


# Tasks of a user's own


class Counting(nn.Module):
    """Counts its calls in a buffer, draws random numbers, and keeps weights that autocast converts."""

    def __init__(self, dropout):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(4, 2)
        self.seen = SimpleNamespace(with_gradient=[], without=[])  # the engine restores lists of a layer itself

    def forward(self, x):
        self.calls += 1
        (self.seen.with_gradient if torch.is_grad_enabled() else self.seen.without).append(len(x))
        return self.head(self.body(x))


def two_terms(model, x, y):
    """Return the mean over positive targets, and the mean over the others times two."""
    error = (model(x)[:, 0] - y) ** 2
    positive = y > 0
    counts = torch.stack((positive.sum(), (~positive).sum()))
    sums = torch.stack((error[positive].sum(), 2 * error[~positive].sum()))
    value = sums / counts.clamp(min=1)
    return Loss(value, counts, {"positive": value * value.new_tensor([1, 0])})


def train(model, micro_batch, *, half=False, **more):
    """Run a batch twice, as the engine knows the loss only after the first time; return the second gradient."""
    draw = torch.Generator().manual_seed(2)
    dtype = next(model.parameters()).dtype
    batch = torch.randn(8, 3, 8, 8, generator=draw, dtype=dtype), torch.randn(8, generator=draw, dtype=dtype)
    engine = Engine(
        model,
        TensorTask(two_terms, floor=1.0),
        Config(micro_batch=micro_batch, bn_group=2, **more),
        meter=ReplayMeter(2**30, [0]),
        layers={},
        log=lambda line: None,
    )
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            result = engine.step(batch)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), result


def make_model(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    return Counting(dropout).to(dtype)


def test_a_task_of_ones_own_runs_twice_only_if_its_batch_is_split(tools):
    gradients = {}
    for micro_batch, exact in ((8, True), (2, True), (2, False)):
        model = make_model()
        gradients[micro_batch, exact], result = train(model, micro_batch, exact=exact)
        passes = 8 // micro_batch
        assert model.seen.with_gradient[-passes:] == [micro_batch] * passes
        assert len(model.seen.without) == (8 if micro_batch == 2 and exact else 0)  # of two batches
        loss, positive = result.loss, result.items["positive"]
        assert loss.shape == (2,)
        if exact:
            assert float(positive) == float(loss[0])
    assert tools.difference(gradients[2, True], gradients[8, True]) <= 1e-12
    assert tools.difference(gradients[2, False], gradients[8, True]) > 0.01


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 1.0


def test_a_layer_that_runs_on_each_micro_batch_moves_its_statistics_once():
    """The first pass does not count, neither for this layer nor for one that runs in groups."""
    model = make_model()
    model.body[1] = OwnForward(4).double()
    train(model, 4)
    alone = make_model().body[:2]
    alone[1] = OwnForward(4).double()
    draw = torch.Generator().manual_seed(2)
    for part in torch.randn(8, 3, 8, 8, generator=draw, dtype=torch.float64).split(4) * 2:
        alone(part)
    assert int(model.body[1].num_batches_tracked) == 4
    torch.testing.assert_close(model.body[1].running_mean, alone[1].running_mean)


def test_a_rank_with_all_images_looks_ahead_like_the_others():
    """The ranks without images do not know that one has them all, and all make the same exchanges."""
    loss = Loss(torch.ones(2, requires_grad=True), torch.tensor([3, 0]))
    Total(8, 1.0).scaled(loss, 8)
    with pytest.raises(UnknownNormalisersError):
        Total(8, 1.0, is_shared=True).scaled(loss, 8)


def test_the_first_pass_leaves_buffers_and_random_numbers_as_they_were():
    left = []
    for exact in (True, False):
        model = make_model(dropout=0.5)
        train(model, 2, exact=exact)
        left.append((float(model.calls), model.body[1].running_mean, torch.rand(4)))
    (calls, mean, drawn), (calls_once, mean_once, drawn_once) = left
    assert (calls, calls_once) == (8, 8)  # two batches of four, without the pass whose loss was of an unknown kind
    assert torch.equal(mean, mean_once)
    assert torch.equal(drawn, drawn_once)


def test_weights_that_autocast_has_converted_in_the_first_pass_get_gradients(tools):
    """Autocast keeps converted weights, and those made without gradients would cut the graph."""
    at_once, _ = train(make_model(torch.float32), 8, half=True)
    in_parts, _ = train(make_model(torch.float32), 2, half=True)
    assert tools.difference(in_parts, at_once) < 0.02


def test_the_time_of_the_first_pass_is_known_to_the_scheduler():
    """It makes a batch that fits at once worth more than two halves that take as long."""
    meter = ReplayMeter(2**30, [0])

    def loss(model, x, y):
        meter.tick(10.0 if torch.is_grad_enabled() else 5.0)
        return two_terms(model, x, y)

    config = Config(micro_batch=2, bn_group=2)
    model = make_model()
    engine = Engine(model, TensorTask(loss, floor=1.0), config, meter=meter, layers={}, log=lambda line: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        engine.step((torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)))
        engine.update(optimizer)
    speed = engine._planner.speed
    assert speed.expected_ms(2, 8, 8, 0) == pytest.approx(10.0)
    assert (speed.with_ahead(1), speed.with_ahead(4)) == (1.0, pytest.approx(1.5))


def test_a_loss_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match="same shape"):
        Loss(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="same shape"):
        Loss(torch.ones(2), torch.ones(2), {"one": torch.ones(())})


def test_a_loss_whose_normalisers_become_several(tools):
    """The first part of the batch shows it, and the batch begins again."""
    model = make_model()
    wanted, _ = train(model, 8)
    model = make_model()
    step = Step(model, TensorTask(two_terms, floor=1.0), ReplayMeter(2**30, [0]), torch.Tensor.backward, {})
    draw = torch.Generator().manual_seed(2)
    batch = tuple(torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((8, 3, 8, 8), (8,)))
    step.run(batch, 8, tools.Scripted((2,) * 4, plans=[[(2,)] * 4] * 2))
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert tools.difference(found, wanted) <= 1e-12
    assert (len(model.seen.with_gradient), len(model.seen.without)) == (5, 4)
