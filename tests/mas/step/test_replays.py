"""Replays of micro-batches, with a recorder that runs functions again where CUDA would replay kernels.

So everything but CUDA itself is exercised: what is captured and when, gradients and statistics, and what drops graphs.
`tests/mas/test_graphs_on_gpu.py` has the same with CUDA.
"""

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from ultralytics.cfg import get_cfg

from benchmarks.common.allocations import FailingAllocations
from yolov12.mas import Config, Engine
from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.journal.journal import Journal, read_rows
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.step.graphs import recorder
from yolov12.mas.step.graphs.recorder import Graphs, graphs_for
from yolov12.mas.step.retry import IN_A_CAPTURE
from yolov12.mas.step.step import Step
from yolov12.mas.task import TensorTask
from yolov12.training.adapter.detection import DetectionTask

MIB = 2**20


class AgainRecorder:
    """Runs a function again instead of its kernels, and copies the results to where they were at first."""

    def __init__(self, meter):
        self.meter, self.recorded, self.released, self.error = meter, 0, 0, None
        self.pool_bytes = 0  # of each recording

    @contextmanager
    def apart(self):
        yield

    def record(self, function):
        if self.error is not None:
            raise self.error
        self.recorded += 1
        found = function()
        self.meter.cached_bytes += self.pool_bytes

        def replay():
            for place, value in zip(found, function(), strict=True):
                if place is not None:
                    place.copy_(value)

        return found, replay

    def release(self):
        self.released += 1
        self.meter.cached_bytes = 0


class Meter(ReplayMeter):
    """Its allocator has a cache."""

    cached_bytes = 0

    def read(self):
        reading = super().read()
        return replace(reading, reserved_bytes=reading.allocated_bytes + self.cached_bytes)


class Unknown:
    """A stopwatch whose time does not become known."""

    def stop(self):
        pass

    def elapsed_ms(self):
        return None


class Planner:
    """Gives each batch the next of some plans, the last again and again."""

    def __init__(self, *plans, level=0):
        self.plans, self.level, self.failures, self.done_with = list(plans), level, [], []

    def plan(self, start, failure):
        if failure is not None:
            self.failures.append(failure)
            return self.latest
        self.latest = self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]
        return self.latest

    def done(self, start, stop, allocated_bytes, peak_bytes, is_replay=False):
        self.done_with.append((stop - start, allocated_bytes, peak_bytes, is_replay))


SOURCE = """
class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.unused = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        rest = [self.two(x), self.unused(x)]
        return {"deep": x, "one": self.one(x), "rest": rest, "size": 4, "plain": x.detach() * 2}

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.kept = [self.weight]  # as PyTorch's recurrent layers do

    def forward(self, x):
        return x * self.kept[0]
"""
SPACE = {"__name__": "torch.made", "nn": nn, "torch": torch}
exec(SOURCE, SPACE)  # so that its code counts as known


class Own(nn.Module):
    """Layer of a user's own."""

    def forward(self, x):
        return x * 2


class Trainer:
    """A small model that is trained with replays and, as `plain`, without."""

    def __init__(self, *layers, plans=(KEEP_ALL,), seed=0, slow_replay=False, limit_bytes=2**40):
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.SiLU(), *layers,
            nn.Upsample(scale_factor=2.0), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU(),
        )  # fmt: skip
        self.model = nn.Sequential(body, SPACE["Head"]()).double()
        self.model[0][0].bias = None
        self.plain = copy.deepcopy(self.model)
        self.meter = Meter(2**40, [0])
        self.recorder = AgainRecorder(self.meter)
        self.needed_bytes, self.limit_bytes, self.slow_replay = 10 * MIB, limit_bytes, slow_replay
        self.lines, self.notes, self.on_loss = [], [], lambda: None
        graphs = Graphs(self.recorder, lambda start, stop: (self.needed_bytes, self.limit_bytes))
        self.step = self.make(self.model, graphs, plans)
        self.reference = self.make(self.plain, None, plans)

    def make(self, model, graphs, plans):
        def loss(model, x):
            out = model(x)
            if model is self.model:
                self.meter.tick(1.0 if self.step.replays.is_replay and not self.slow_replay else 5.0)
                self.on_loss()
            return (out["one"] * out["plain"][:, :2]).mean() + out["rest"][0].square().mean() * out["size"]

        task = TensorTask(loss, may_replay=True)
        layers = {"0": model[0]}
        told = {"log": self.lines.append, "note": self.notes.append}
        step = Step(model, task, self.meter, torch.Tensor.backward, layers, graphs=graphs, **told)
        step.plans = plans
        return step

    def run(self, *plan, level=0, images=None, around=nullcontext()):  # noqa: B008
        """Run a batch with both, and assert that gradients, statistics and loss are the same; return the result."""
        count = sum(map(sum, plan))
        batch = (torch.randn(count, 3, 4, 4, dtype=torch.float64),) if images is None else images
        self.planner = Planner(plan, level=level)
        with around:
            found = self.step.run(batch, count, self.planner)
        self.expected = self.reference.run(batch, count, Planner(plan, level=level))
        for ours, other in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-12, atol=1e-14)
        for (name, ours), other in zip(self.model.named_buffers(), self.plain.buffers(), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-14, msg=name)
        torch.testing.assert_close(found.loss, self.expected.loss, rtol=1e-12, atol=1e-14)
        self.replayed = found.replayed
        return found


PLANS = (KEEP_ALL, Plan((("0", RECOMPUTE),)), Plan((("0", REBUILD),)))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_replays_give_the_gradient_and_the_statistics_of_the_usual_pass(level):
    trainer = Trainer(plans=PLANS)
    trainer.run((2, 2), (2, 2), (2, 1), level=level)
    first = trainer.run((2, 2), (2, 2), (2, 1), level=level)
    assert first.has_captured
    assert first.replayed == 1  # the second of the two sizes that are alike
    for _ in range(2):
        trainer.run((2, 2), (2, 2), (2, 1), level=level)
    last = trainer.run((2, 2), (2, 1), (2, 2), level=level)
    assert (last.replayed, last.has_captured) == (3, False)
    assert trainer.recorder.recorded == 4  # forward and backward pass of both sizes
    assert trainer.run((2, 2), (2, 2), (2, 2), level=level).replayed == 3
    assert not trainer.lines


def captured(**options):
    """Return a trainer that replays all of a batch in two micro-batches."""
    trainer = Trainer(**options)
    for _ in range(3):
        trainer.run((2,), (2,))
    assert trainer.replayed == 2
    return trainer


def forward_of_body(trainer):
    """Give the class of a module another method."""
    kind = type(trainer.model[1])
    usual = kind.forward
    kind.forward = lambda self, x: usual(self, x * 1.5)
    return lambda: setattr(kind, "forward", usual)


def test_a_detector_of_ultralytics_is_replayed(tools):
    layers = [[-1, 1, "Conv", [8, 3, 2]]] * 2 + [[-1, 1, "C2f", [16]]] + [[-1, 1, "Conv", [16, 3, 2]]] * 3
    model = tools.build("detect", {"nc": 5, "backbone": layers, "head": [[[3, 4, 5], 1, "Detect", ["nc"]]]}).train()
    model.args = get_cfg()
    meter = Meter(2**40, [0])
    graphs = Graphs(AgainRecorder(meter), lambda start, stop: (0, 2**40))
    found = []
    for each in (None, graphs):
        task = DetectionTask(lambda part: {**part, "img": part["img"] / 255}, multi_scale=False, overlapping_masks=True)
        own = copy.deepcopy(model)
        step = Step(own, task, meter, torch.Tensor.backward, graphs=each)
        for seed in range(4):
            batch = tools.batch([2, 0, 5, 1], seed)
            result = step.run(batch, task.workload(batch).images, Planner([(2,), (2,)]))
        found.append(
            (result.replayed, torch.cat([each.grad.flatten() for each in own.parameters() if each.requires_grad]))
        )
    assert [replayed for replayed, _ in found] == [0, 2]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0)


def last_nodes(outputs):
    """Return the nodes at which the backward pass of some tensors ends."""
    found, left = set(), [each.grad_fn for each in outputs]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [each for each, _ in node.next_functions]
    return {node for node in found if node.name() == "torch::autograd::AccumulateGrad"}


def test_a_capture_ends_at_nodes_of_its_own(monkeypatch):
    """Autograd would run a parameter's node on the default stream, which must not wait for a capture."""
    trainer, ends, grad = Trainer(plans=PLANS), [], torch.autograd.grad
    held = last_nodes([parameter.expand_as(parameter) for parameter in trainer.model.parameters()])
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, *args, **more: (
        ends.append(last_nodes(outputs)), grad(outputs, *args, **more)
    )[1])  # fmt: skip
    for _ in range(3):
        trainer.run((2,), (2,), level=1)
    assert trainer.replayed == 2
    assert ends
    assert all(nodes and not nodes & held for nodes in ends)


def test_layers_that_run_again_in_a_capture_are_not_joined(monkeypatch):
    """They run as in the forward pass, which joins nothing within a plan."""
    monkeypatch.setattr("yolov12.mas.batchnorm.fused.writes_into", lambda device: True)
    usual, joins = GroupedBatchNorm._forward, []
    monkeypatch.setattr(
        GroupedBatchNorm, "_forward", lambda norms, *args: (joins.append(norms.joins), usual(norms, *args))[1]
    )
    trainer = Trainer(plans=PLANS)
    for _ in range(3):
        trainer.run((2,), (2,), level=1)
    assert trainer.replayed == 2
    assert joins
    assert not any(joins)
    trainer.run((2,), (2,), level=0)
    assert any(joins)


CHANGES = {
    "attribute": (lambda trainer, model: setattr(model[0][1], "eps", 0.1), True),
    "frozen": (lambda trainer, model: model[1].two.weight.requires_grad_(False), True),
    "moved": (lambda trainer, model: setattr(model[0][0].weight, "data", model[0][0].weight.data * 2), True),
    "replaced": (lambda trainer, model: setattr(model[1], "one", copy.deepcopy(model[1].one)), True),
    "switched": (lambda trainer, model: model[0][1].eval(), True),
    "method of a class": (lambda trainer, model: model is trainer.model and forward_of_body(trainer), False),
    "method of a module": (lambda trainer, model: setattr(model[1], "forward", model[1].forward), False),
    "own layer": (lambda trainer, model: setattr(model, "0", nn.Sequential(Own(), model[0])), False),
    "hook of a parameter": (lambda trainer, model: model[1].one.bias.register_hook(lambda grad: grad * 2), False),
    "hook of a module": (lambda trainer, model: model[0].register_forward_hook(lambda *args: args[2] * 2), False),
    "hook of the backward pass": (
        lambda trainer, model: model[1].one.register_full_backward_hook(lambda _, grads, more: (grads[0] * 2,)),
        False,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_would_miss_drops_it(change):
    trainer = captured()
    make, is_known = CHANGES[change]
    for parameter in (*trainer.model.parameters(), *trainer.plain.parameters()):
        parameter.grad = None
    undo = [make(trainer, model) for model in (trainer.model, trainer.plain)]
    try:
        trainer.run((2,), (2,))
        assert trainer.replayed == 0
        for _ in range(3):
            trainer.run((2,), (2,))
        assert trainer.replayed == 2 * is_known
    finally:
        if change == "method of a class":
            undo[0]()


def test_global_hooks_and_observers_see_each_pass():
    trainer = captured()
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    trainer.run((2,), (2,))
    handle.remove()
    assert calls.count(trainer.model[1]) == 2
    with torch.autograd.set_detect_anomaly(True):
        assert trainer.run((2,), (2,)).replayed == 0


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Dropout(0.5), "it draws random numbers (in __init__"),
        (nn.Identity(), "out of memory (in record"),
        (SPACE["Scale"](), "parameters that PyTorch does not list (in _backward"),
    ],
)
def test_a_size_that_cannot_be_captured_runs_as_usual_for_good(layer, reason):
    trainer = Trainer(layer)
    if isinstance(layer, nn.Identity):
        trainer.recorder.error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    images = (torch.randn(4, 3, 4, 4, dtype=torch.float64),)
    found = []
    for _ in range(6):
        state = torch.get_rng_state()
        found.append(trainer.step.run(images, 4, Planner([(2,), (2,)])))
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        expected = trainer.reference.run(images, 4, Planner([(2,), (2,)]))
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(found[-1].loss, expected.loss)
        for ours, other in zip(trainer.model.buffers(), trainer.plain.buffers(), strict=True):
            assert torch.equal(ours, other)
    assert sum(result.has_captured for result in found) == 1
    assert sum(result.replayed for result in found) == 0
    assert trainer.recorder.released
    assert len(trainer.lines) == 1
    assert reason in trainer.lines[0]
    assert trainer.notes == [IN_A_CAPTURE] * isinstance(layer, nn.Identity)


def test_a_graph_that_is_no_faster_is_dropped():
    trainer = captured(slow_replay=True)
    for _ in range(3):
        trainer.run((2,), (2,))
    assert trainer.replayed == 0
    assert trainer.recorder.released == 1
    assert trainer.recorder.recorded == 2
    assert captured().run((2,), (2,)).replayed == 2


def test_a_result_tells_whether_a_later_batch_will_be_replayed():
    trainer = Trainer()
    first, second, third = (trainer.run((2,), (2,)) for _ in range(3))
    assert [each.waits_for_capture for each in (first, second, third)] == [True, True, False]
    assert [dict(each.usual_ms) for each in (first, second, third)] == [{}, {2: 5.0}, {}]
    assert trainer.step.replays.possible
    slow = captured(slow_replay=True)
    assert not [slow.run((2,), (2,)) for _ in range(3)][-1].waits_for_capture  # it was refused
    assert slow.step.replays.possible


def test_a_result_does_not_wait_for_what_does_not_come():
    trainer = Trainer(limit_bytes=12 * MIB)
    assert not trainer.run((2,), (2,)).waits_for_capture
    assert trainer.step.replays.lacks_room
    other = Trainer()
    other.step._task._may_replay = False
    assert not other.run((2,), (2,)).waits_for_capture
    assert not other.step.replays.possible
    assert not other.step.replays.lacks_room


def test_no_graphs_are_possible_after_captures_of_two_sizes_have_failed():
    trainer = Trainer()
    trainer.recorder.error = RuntimeError("this cannot be captured")
    for count, possible in ((2, True), (1, False)):
        for _ in range(3):
            trainer.run((count,), (count,))
        assert trainer.step.replays.possible is possible


def test_a_graph_beside_which_the_loss_has_no_room_is_not_captured_again():
    trainer = Trainer(limit_bytes=13 * MIB)
    trainer.recorder.pool_bytes = 6 * MIB  # of each pass
    size = []
    trainer.on_loss = lambda: size.append(trainer.step.replays._size)
    trainer.run((2,), (2,))
    trainer.run((2,))
    size[-1].loss_bytes = 2 * MIB
    for _ in range(3):
        trainer.run((2,), (2,))
        assert (trainer.replayed, trainer.step.replays.lacks_room) == (0, True)
    assert trainer.recorder.recorded == 2
    trainer.limit_bytes = 15 * MIB
    assert trainer.run((2,), (2,)).replayed == 2


def test_the_memory_of_the_loss_is_measured_in_usual_runs():
    """Under a plan that recomputes, the network needs most in its backward pass, which is part of the graph."""
    trainer, sizes = Trainer(limit_bytes=13 * MIB), []
    trainer.recorder.pool_bytes = 4 * MIB  # of each pass; beside them, there is no room for what a usual run needs
    trainer.on_loss = lambda: (trainer.meter.use(3 * MIB), sizes.append(trainer.step.replays._size))
    for _ in range(3):
        trainer.run((2,), (2,))
    assert sizes[0].loss_bytes == 3 * MIB
    assert trainer.replayed == 2
    trainer.needed_bytes = 11.3 * MIB  # the loss may need as much more
    assert trainer.run((2,), (2,)).replayed == 0


def test_graphs_that_have_served_give_way_without_a_pause():
    trainer = captured(limit_bytes=24 * MIB)
    trainer.step.replays.idle_bytes = 10 * MIB
    for _ in range(16):
        trainer.run((2,), (2,))
    trainer.needed_bytes = 15 * MIB
    assert trainer.run((1,), (1,)).replayed == 0
    assert trainer.recorder.released == 1
    trainer.needed_bytes = 10 * MIB
    trainer.run((2,), (2,))
    assert trainer.replayed == 2


def test_graphs_that_have_saved_more_than_captures_take_give_way_without_a_pause():
    """Epochs may be short. Their last batch is smaller, and may have no room beside the graphs."""
    trainer = captured(limit_bytes=24 * MIB)
    for _ in range(3):
        for _ in range(6):
            trainer.run((2,), (2,))
        assert trainer.replayed == 2
        trainer.step.replays.idle_bytes = 10 * MIB
        trainer.needed_bytes = 15 * MIB
        assert trainer.run((1,)).waits_for_capture
        assert not trainer.step.replays.lacks_room
        trainer.needed_bytes = 10 * MIB


def test_a_batch_before_which_graphs_gave_way_does_not_show_how_fast_replays_are():
    trainer = captured(limit_bytes=24 * MIB)
    trainer.step.replays.idle_bytes = 10 * MIB
    trainer.needed_bytes = 15 * MIB
    result = trainer.run((1,), (1,))
    assert (result.replayed, result.waits_for_capture) == (0, True)
    assert not trainer.step.replays.possible


def test_room_that_other_graphs_have_is_not_lacking():
    """The last batch of an epoch may be smaller. Decisions need not leave more room for the graphs of others."""
    trainer = captured(limit_bytes=24 * MIB)
    trainer.step.replays.idle_bytes = 12 * MIB
    result = trainer.run((1,), (1,))
    assert (result.replayed, result.waits_for_capture) == (0, True)
    assert not trainer.step.replays.lacks_room
    both = trainer.run((2,), (1,))
    assert (both.replayed, both.waits_for_capture) == (1, False)  # this batch runs like this


def test_a_lack_of_room_is_told_as_long_as_there_is_one():
    trainer = Trainer(limit_bytes=12 * MIB)
    for _ in range(20):
        trainer.run((2,), (2,))
        assert trainer.step.replays.lacks_room
    trainer.limit_bytes = 2**40
    assert trainer.run((2,), (2,)).replayed == 2


def test_a_capture_that_ran_out_of_memory_lacked_room():
    """So decisions leave more for one, and do not take the size for one that graphs do not make faster."""
    trainer = Trainer(limit_bytes=20 * MIB)
    trainer.recorder.error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    for _ in range(20):
        result = trainer.run((2,), (2,))
    assert (result.waits_for_capture, trainer.step.replays.lacks_room) == (False, True)
    assert trainer.notes == [IN_A_CAPTURE]
    trainer.recorder.error = None
    trainer.limit_bytes = 24 * MIB
    assert trainer.run((2,), (2,)).replayed == 0
    trainer.limit_bytes = 25 * MIB
    assert trainer.run((2,), (2,)).replayed == 2


def test_a_size_that_has_room_and_is_not_captured_is_not_waited_for():
    trainer = Trainer()
    trainer.meter.stopwatch = lambda: Unknown()
    found = [trainer.run((2,), (2,)).waits_for_capture for _ in range(12)]
    assert found == [True] * 8 + [False] * 4


def test_an_error_of_a_capture_does_not_hide_one_of_the_network():
    trainer = captured()
    with pytest.raises(RuntimeError, match="expected input"):
        trainer.step.run((torch.randn(2, 5, 4, 4, dtype=torch.float64),), 2, Planner([(2,)]))
    assert trainer.run((2,), (2,)).replayed == 2


def test_nothing_is_captured_where_memory_does_not_suffice():
    trainer = Trainer(limit_bytes=12 * MIB)
    for _ in range(4):
        trainer.run((2,), (2,))
    assert trainer.recorder.recorded == 0
    trainer.limit_bytes = 13 * MIB
    assert trainer.run((2,), (2,)).replayed == 2


def test_graphs_give_way_to_a_micro_batch_that_does_not_fit_beside_them():
    trainer = Trainer(limit_bytes=24 * MIB)
    trainer.recorder.pool_bytes = 5 * MIB  # of each pass
    for _ in range(3):
        trainer.run((2,), (2,))
    assert trainer.replayed == 2
    assert trainer.step.replays.idle_bytes == 10 * MIB
    trainer.run((2,), (2,))
    size, allocated_bytes, peak_bytes, is_replay = trainer.planner.done_with[-1]
    assert (size, is_replay) == (2, True)
    assert min(allocated_bytes, peak_bytes) >= 10 * MIB
    trainer.run((1,), (1,))  # fits beside them
    assert trainer.replayed == 0
    assert not trainer.planner.done_with[-1][-1]
    trainer.needed_bytes = 15 * MIB
    trainer.run((1,), (1,))
    assert trainer.recorder.released == 1
    assert trainer.step.replays.idle_bytes == 0
    assert trainer.planner.done_with[-1][1] == 0
    trainer.needed_bytes = 10 * MIB
    for _ in range(14):
        assert trainer.run((2,), (2,)).replayed == 0  # for a while
    trainer.run((2,), (2,))
    assert trainer.run((2,), (2,)).replayed == 2


def test_a_replay_that_fails_runs_again_without_graphs():
    trainer = captured()
    left = [1]

    def fail():
        if left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    trainer.on_loss = fail
    trainer.run((2,), (2,))
    assert not trainer.planner.failures  # the same micro-batch fits without graphs
    assert trainer.notes == ["out-of-memory at 2"]
    assert trainer.replayed == 0
    left[0] = 1
    trainer.run((2,), (2,))
    assert [failure.images for failure in trainer.planner.failures] == [2]
    assert len(trainer.notes) == 1


@pytest.mark.parametrize("batches_before", [1, 3], ids=["captured", "replayed"])
def test_any_allocation_beside_graphs_may_fail_and_is_counted(batches_before, deep, monkeypatch):
    monkeypatch.setattr("yolov12.mas.step.graphs.watch._get_current_dispatch_mode", lambda: None)

    def fail(*index):
        trainer = Trainer()
        for _ in range(batches_before):
            trainer.run((2,), (2,))
        mode = FailingAllocations("cpu", like_cuda=True)
        mode.reset(index)
        result = trainer.run((2,), (2,), around=mode)  # compares gradients and statistics
        assert [*trainer.notes, *trainer.planner.failures][1:] == []
        assert bool(trainer.notes or trainer.planner.failures) == bool(index)
        return mode.count, result, trainer.notes

    count, result, _ = fail()
    assert (result.replayed, result.has_captured) == ((1, True) if batches_before == 1 else (2, False))
    found = {tuple(fail(index)[-1]) for index in range(0, count, 1 if deep else 29)}
    assert found <= {(), ("out-of-memory at 2",), ("out-of-memory between micro-batches",), (IN_A_CAPTURE,)}
    assert ((IN_A_CAPTURE,) in found) == (batches_before == 1)


def test_a_loss_that_uses_other_outputs_is_not_replayed():
    trainer = captured()
    images = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    usual = trainer.step._task._loss, trainer.reference._task._loss
    for step in (trainer.step, trainer.reference):
        step._task._loss = lambda model, x: model(x)["rest"][1].square().mean()
    for _ in range(2):
        trainer.run((2,), (2,), images=(images,))
    assert trainer.replayed == 0
    assert not trainer.planner.failures
    assert not trainer.notes  # no memory was lacking
    trainer.step._task._loss, trainer.reference._task._loss = usual
    trainer.run((2,), (2,))


def test_a_loss_that_calls_the_model_twice_or_keeps_its_outputs_is_not_replayed():
    for change in ("twice", "keeps", "other arguments"):
        trainer = Trainer()
        for step in (trainer.step, trainer.reference):
            usual = step._task._loss
            if change == "twice":
                step._task._loss = lambda model, x, usual=usual: usual(model, x) + usual(model, x * 2)
            elif change == "keeps":
                step._task._may_replay = False
            else:
                step._task._loss = lambda model, x: model(input=x)["one"].mean()
        for _ in range(4):
            trainer.run((2,), (2,))
            assert trainer.replayed == 0, change


def test_a_batch_of_nan_leaves_no_trace_in_the_statistics_of_later_ones():
    """Ultralytics restores weights and statistics after one. The memory of graphs keeps what it saw."""
    trainer = captured()
    trainer.step.run((torch.full((4, 3, 4, 4), torch.nan, dtype=torch.float64),), 4, Planner([(2,), (2,)]))
    assert trainer.model[0][1].running_mean.isnan().all()
    trainer.model.load_state_dict(trainer.plain.state_dict())
    for parameter in (*trainer.model.parameters(), *trainer.plain.parameters()):
        parameter.grad = None
    trainer.run((2,), (2,))
    assert trainer.replayed == 2


def test_a_warm_up_has_the_memory_of_graphs():
    trainer = captured()
    trainer.step.try_out((torch.randn(2, 3, 4, 4, dtype=torch.float64),), 0, 2)
    assert trainer.recorder.released == 1
    assert trainer.run((2,), (2,)).replayed == 2  # captured again at once


def test_graphs_are_dropped_before_a_validation_unless_they_are_small():
    trainer = captured()
    trainer.step.replays.make_room()
    assert trainer.run((2,), (2,)).replayed == 2
    trainer.step.replays.idle_bytes = 2**40
    trainer.step.replays.make_room()
    assert trainer.recorder.released == 1
    assert trainer.run((2,), (2,)).replayed == 2  # captured again at once


@pytest.mark.parametrize(
    ("version", "wanted", "has_graphs"),
    [("2.3.1+cu121", None, False), ("2.11.0+cu130", None, True), ("2.15.0", None, True), ("2.3.1", True, True),
     ("2.15.0", False, False)],
)  # fmt: skip
def test_graphs_are_on_with_versions_of_pytorch_that_were_measured(monkeypatch, version, wanted, has_graphs):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(recorder, "recorder_for", lambda device: AgainRecorder(None))
    found = graphs_for(torch.device("cuda"), lambda start, stop: (0, 0), wanted)
    assert (found is not None) is has_graphs


@pytest.mark.parametrize("arguments", [{}, {"cuda_graphs": True}, {"cuda_graphs": False}])
def test_an_engine_replays_if_it_is_asked_to(monkeypatch, tmp_path, arguments):
    made = []

    def graphs_for(device, room, wanted):
        assert wanted is arguments.get("cuda_graphs")
        if not wanted:
            return None
        made.append(AgainRecorder(meter))
        return Graphs(made[0], room)

    monkeypatch.setattr("yolov12.mas.engine.graphs_for", graphs_for)
    meter = Meter(2**40, [0], allocated_bytes=MIB)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
    task = TensorTask(lambda model, x: model(x).square().mean(), may_replay=True)
    config = replace(Config.parse(arguments), micro_batch=2, bn_group=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Engine(model, task, config, meter=meter, journal=Journal(tmp_path)) as engine:
        for _ in range(4):
            engine.step((torch.randn(6, 3, 5, 5),))
            engine.update(optimizer)
    replayed = [int(row["replayed"]) for row in read_rows(tmp_path / "memory.csv")]
    wanted = arguments.get("cuda_graphs", False)
    assert replayed == ([0, 3, 3, 3] if wanted else [0, 0, 0, 0])
    assert [recorder.released > 0 for recorder in made] == [True] * wanted


def test_an_engine_leaves_room_for_a_graph_where_that_is_faster(monkeypatch):
    """Four images fit, but no graph of them. Two at once launch as much, and have room for one."""
    meter = Meter(2**40, [0], allocated_bytes=MIB, limit=530 * MIB)
    made = []

    def graphs_for(device, room, wanted):
        made.append(AgainRecorder(meter))
        return Graphs(made[-1], room)

    monkeypatch.setattr("yolov12.mas.engine.graphs_for", graphs_for)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())

    def loss(model, x):
        out, is_replay = model(x), engine._step.replays.is_replay
        meter.use(int((0.05 if is_replay else 1.0) * len(x) * 100 * MIB))
        meter.tick(2.0 * len(x) if is_replay else 50.0)
        return out.square().mean()

    task, config = TensorTask(loss, may_replay=True), replace(Config.parse({"mem_limit": "530MiB"}), bn_group=1)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    with Engine(model, task, config, meter=meter, layers={}) as engine:
        engine._planner.speed.new_size_ms = 0.0
        for _ in range(30):
            found.append(engine.step((torch.randn(8, 3, 5, 5),)))
            engine.update(optimizer)
            engine.flush()
    assert found[-1].replayed == len(found[-1].micro_batches) > 2
    speed = engine._planner.speed
    assert speed.expected_ms(2, 3, 5, 0, replays=True) < 10.0 < 40.0 < speed.expected_ms(2, 3, 5, 0)
    assert all(each.peak_bytes <= each.budget_bytes for each in found)
