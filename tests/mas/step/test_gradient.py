"""The gradient of a batch is the same however the batch was split and whatever allocations failed.

On a real YOLOv12-N with Ultralytics' loss, in float64, where rounding is 1e-16 and anything else is a mistake. What is
left, up to 2e-5, are single-precision sums inside that loss. `--deep` tries more.
"""

import random

import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from yolov12.errors import DoesNotFitError
from yolov12.mas import Config, Engine
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.scheduling.groups import split_groups

GIB = 2**30


def cases(share):
    return settings(max_examples=int(settings.default.max_examples * share), suppress_health_check=list(HealthCheck))


PLACES = ("copy", "preprocess", "forward", "assigner", "loss", "backward")
BOXES = st.one_of(
    st.lists(
        st.one_of(st.just(0), st.integers(0, 6), st.integers(0, 40), st.integers(0, 300)), min_size=2, max_size=12
    ),
    st.lists(st.integers(0, 3), min_size=2, max_size=12),
    st.lists(st.just(0), min_size=2, max_size=5),
)
FAULTS = st.lists(  # (attempt, where, module, error)
    st.tuples(st.integers(0, 5), st.sampled_from(PLACES), st.integers(0, 295), st.integers(0, 3)), max_size=4
)
SEEDS = st.integers(0, 2**16)


@pytest.fixture(scope="module")
def detector(tools):
    return tools.Bench(tools.build("detect", "yolov12n.yaml"))


@pytest.fixture(scope="module")
def single_precision_detector(tools):
    return tools.Bench(tools.build("detect", "yolov12n.yaml"), torch.float32)


def faults_of(tools, bench, drawn):
    """Return faults at modules that run; preprocessing can fail before and after it draws a random number."""
    return [
        tools.Fault(
            attempt,
            where,
            module % {"preprocess": 2, "forward": bench.modules, "backward": bench.modules}.get(where, 1),
            tools.FAILURES[error],
        )
        for attempt, where, module, error in drawn
    ]


def assert_close(value, wanted, tolerance):
    torch.testing.assert_close(value, wanted, rtol=tolerance, atol=min(tolerance, 1e-6), check_dtype=False)


def assert_same(tools, outcome, wanted, tolerance):
    assert tools.difference(outcome.gradient, wanted.gradient) <= tolerance
    for name, item in wanted.result.items.items():
        assert_close(outcome.result.items[name], item, tolerance)
    assert_close(outcome.result.loss, wanted.result.loss, tolerance)
    for name, buffer in wanted.buffers.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(outcome.buffers[name], buffer)
        else:
            assert_close(outcome.buffers[name], buffer, 1e-6)
    assert torch.equal(outcome.drawn, wanted.drawn)
    assert sum(outcome.result.micro_batches) == sum(wanted.result.micro_batches)


def run_disturbed(tools, bench, boxes, group, seed, drawn, before):
    """Run a batch at once, and again with random splits, plans and failures; return both outcomes."""
    batch = tools.batch(boxes, seed)
    wanted = bench.whole(batch, group)
    bench.step.plans = (KEEP_ALL, tools.plan(bench.layers, seed), tools.plan(bench.layers, seed + 1))
    planner = tools.Scripted(split_groups(len(boxes), group), seed, levels=(0, 1, 2))
    outcome = bench.run(batch, planner, faults_of(tools, bench, drawn), before)
    assert len(planner.failures) == len(bench.faults.fired)
    event(f"{len(planner.failures)} failures")
    return outcome, wanted


@cases(0.4)
@given(BOXES, st.sampled_from([1, 2, 4]), SEEDS, FAULTS, st.booleans())
@example(
    [3, 0, 20, 1, 0, 0, 7, 2, 150, 1, 1, 1], 4, 1, [(0, "backward", 0, 0), (1, "loss", 0, 1), (3, "copy", 0, 3)], True
)
@example([5, 2, 9, 4], 2, 2, [(0, "forward", 0, 0), (1, "backward", 60, 0), (2, "assigner", 0, 0)], False)
def test_gradient_does_not_depend_on_the_split_nor_on_failures(tools, detector, boxes, group, seed, drawn, before):
    outcome, wanted = run_disturbed(tools, detector, boxes, group, seed, drawn, before)
    assert_same(tools, outcome, wanted, 2e-5)


@cases(0.1)
@given(BOXES, st.sampled_from([2, 4]), SEEDS, FAULTS)
def test_gradient_in_single_precision(tools, single_precision_detector, boxes, group, seed, drawn):
    # Without groups of one: at 64 pixels the last layers would normalise 4 values, and rounding of 1e-7 become 1e-2.
    boxes = boxes[: len(boxes) // group * group] or [1] * group
    outcome, wanted = run_disturbed(tools, single_precision_detector, boxes, group, seed, drawn, False)
    assert tools.difference(outcome.gradient, wanted.gradient) <= 1e-4
    for name, item in wanted.result.items.items():
        assert_close(outcome.result.items[name], item, 1e-4)


def test_gradient_of_single_images_in_single_precision(tools, single_precision_detector):
    batch = tools.batch([3, 0, 20, 1], size=128)
    wanted = single_precision_detector.whole(batch, 1)
    outcome = single_precision_detector.run(batch, tools.Scripted((1,) * 4, plans=[[(1,)] * 4]))
    assert tools.difference(outcome.gradient, wanted.gradient) <= 1e-4


@pytest.mark.parametrize("boxes", [[3, 0, 50, 7], [0, 0], [1, 0, 0, 0, 0, 2, 0]])
def test_batch_that_fits_at_once_is_ultralytics_bit_for_bit(tools, detector, boxes):
    batch = tools.batch(boxes)
    wanted, outcome = detector.plain(batch), detector.run(batch)
    assert torch.equal(outcome.gradient, wanted.gradient)
    assert torch.equal(outcome.result.loss, wanted.result.loss)
    assert all(torch.equal(outcome.result.items[name], item) for name, item in wanted.result.items.items())
    for name, buffer in wanted.buffers.items():
        torch.testing.assert_close(outcome.buffers[name], buffer, rtol=2**-52, atol=0)
    assert torch.equal(outcome.drawn, wanted.drawn)


def test_batch_that_fits_at_once_after_a_smaller_attempt_failed(tools, detector):
    batch = tools.batch([3, 0, 50, 7])
    planner = tools.Scripted((2, 2), plans=[[(2,), (2,)], [(4,)]])
    outcome = detector.run(batch, planner, [tools.Fault(0, "backward", 5)])
    assert torch.equal(outcome.gradient, detector.plain(batch).gradient)


def test_gradient_in_groups_is_that_of_layers_that_normalise_each_group(tools, detector):
    """The reference is the test's own grouped BatchNorm, with Ultralytics' loss on the whole batch."""
    batch, groups = tools.batch([3, 0, 50, 7, 2]), (1, 2, 2)
    wanted = detector.plain(batch, groups)
    outcome = detector.run(batch, tools.Scripted(groups, plans=[[(1, 2), (2,)]]))
    assert tools.difference(outcome.gradient, wanted.gradient) <= 2e-5
    assert tools.difference(detector.plain(batch).gradient, wanted.gradient) > 0.01  # groups do matter


def test_average_of_losses_is_another_gradient(tools, detector):
    """The usual accumulation differs on the same groups and images, which shows that the tests above can fail."""
    batch = tools.batch([3, 0, 20, 1, 0, 0, 7, 2])
    wanted = detector.whole(batch, 2)
    total = 0
    for start in range(0, 8, 2):
        detector.reset()
        torch.rand(start, 1, 1, 1, dtype=torch.float64)  # draws the brightness of the earlier images
        detector.task.workload(batch)
        loss, _ = detector.model(detector.preprocess(detector.task.part(batch, start, start + 2)))
        loss.sum().backward()  # times 2 images of 8: a weighted average
        total = total + torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in detector.parameters]
        )
    assert tools.difference(total, wanted.gradient) > 0.01


def test_class_weights(tools):
    model = tools.build("detect", "yolov12n.yaml")
    model.class_weights = torch.tensor([0.2, 0.5, 1.0, 1.3, 2.0])
    bench = tools.Bench(model)
    batch = tools.batch([3, 0, 20, 1, 5, 9])
    wanted = bench.run(batch, tools.Scripted((2, 2, 2), plans=[[(2, 2, 2)]]))
    outcome = bench.run(batch, tools.Scripted((2, 2, 2), seed=1, plans=[[(2,), (2, 2)]]), [tools.Fault(1, "loss")])
    assert_same(tools, outcome, wanted, 2e-5)
    assert torch.equal(bench.run(batch).gradient, bench.plain(batch).gradient)


# Oriented boxes are as exact. Masks and keypoints: test_terms.py.


@pytest.fixture(scope="module")
def oriented(tools):
    return tools.Bench(tools.build("obb", "yolo11n-obb.yaml"))


@cases(0.1)
@given(BOXES, st.sampled_from([2, 4]), SEEDS, FAULTS)
def test_gradient_of_oriented_boxes(tools, oriented, boxes, group, seed, drawn):
    batch = tools.batch(boxes, seed, angles=True)
    wanted = oriented.whole(batch, group)
    planner = tools.Scripted(split_groups(len(boxes), group), seed)
    assert_same(tools, oriented.run(batch, planner, faults_of(tools, oriented, drawn)), wanted, 2e-5)


def test_oriented_boxes_at_once_are_ultralytics_bit_for_bit(tools, oriented):
    batch = tools.batch([3, 0, 50, 7], angles=True)
    assert torch.equal(oriented.run(batch).gradient, oriented.plain(batch).gradient)


def test_failure_that_the_loss_of_oriented_boxes_calls_a_malformed_data_set(tools, oriented, monkeypatch):
    """Ultralytics raises a TypeError there from any RuntimeError, so also from a failed allocation."""
    batch, criterion = tools.batch([3, 0, 50, 7], angles=True), oriented.model.criterion
    wanted = oriented.whole(batch, 2)
    pad, calls = criterion.preprocess, []

    def fails_once(*args, **kwargs):
        calls.append(None)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return pad(*args, **kwargs)

    monkeypatch.setattr(criterion, "preprocess", fails_once)
    planner = tools.Scripted((2, 2), plans=[[(2, 2)], [(2,), (2,)]])
    assert_same(tools, oriented.run(batch, planner), wanted, 2e-5)
    assert len(planner.failures) == 1


# Errors other than failed allocations


@pytest.mark.parametrize("where", ["copy", "preprocess", "forward", "assigner", "loss", "backward"])
@pytest.mark.parametrize("attempt", [0, 1])
def test_other_errors_leave_no_trace(tools, detector, where, attempt):
    batch = tools.batch([3, 0, 50, 7])
    detector.reset([tools.Fault(attempt, where, 1 if where == "preprocess" else 0, lambda: ValueError("labels"))], True)
    before = [parameter.grad.clone() for parameter in detector.parameters]
    buffers = {name: buffer.clone() for name, buffer in detector.model.named_buffers()}
    state = torch.get_rng_state()
    detector.task.workload(batch)
    with pytest.raises(ValueError, match="labels"):
        detector.step.run(batch, 4, tools.Scripted((2, 2), plans=[[(2,), (2,)]]))
    assert all(torch.equal(p.grad, old) for p, old in zip(detector.parameters, before, strict=True))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in detector.model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(
        tools,
        detector.run(batch, tools.Scripted((2, 2), plans=[[(2,), (2,)]])),
        detector.whole(batch, 2),
        2e-5,
    )


@pytest.mark.parametrize("tries", [False, True])
def test_what_fails_before_the_first_part_loses_no_gradient_of_earlier_batches(tools, detector, monkeypatch, tries):
    """On a GPU, a stream or an event may fail."""
    batch = tools.batch([3, 0, 50, 7])
    detector.reset([], True)
    before = [parameter.grad.clone() for parameter in detector.parameters]

    def fail(*_):
        raise RuntimeError("CUDA error: invalid resource handle")

    monkeypatch.setattr("yolov12.mas.step.step.Prefetch", fail)
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        detector.step.try_out(batch, 0, 2) if tries else detector.step.run(batch, 4, tools.Scripted((2, 2)))
    assert all(torch.equal(p.grad, old) for p, old in zip(detector.parameters, before, strict=True))


# Images of randomly drawn sizes


def test_multi_scale_draws_one_size_a_batch_whatever_fails(tools):
    bench = tools.Bench(tools.build("detect", "yolov12n.yaml"), multi_scale=True)
    batch, sizes, plain = tools.batch([3, 0, 50, 7]), [], bench.preprocess

    def preprocess(part):
        bench.faults.reach("forward", -1)  # before a size is drawn
        size = random.choice((64, 96, 128))
        sizes.append((len(part["img"]), size))
        return plain({**part, "img": part["img"][:, :, :1].repeat(1, 1, size, 1)[..., :1].repeat(1, 1, 1, size)})

    bench.task.preprocess = preprocess

    def next_sizes(faults):
        random.seed(5)
        sizes.clear()
        drawn = []
        for _ in range(6):
            bench.run(batch, tools.Scripted((2, 2), plans=[[(2,), (2,)]] * 3), faults)
            assert len({size for _, size in sizes}) == 1
            drawn.append(sizes[0][1])
            sizes.clear()
        return drawn

    undisturbed = next_sizes([])
    assert len(set(undisturbed)) > 1
    assert next_sizes([tools.Fault(0, "forward", -1)]) == undisturbed
    assert next_sizes([tools.Fault(0, "backward", 0)]) == undisturbed


# The whole engine


@cases(0.1)
@given(
    BOXES,
    st.sampled_from([1, 2, 4]),
    SEEDS,
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(PLACES), st.integers(0, 295), st.integers(0, 3)), max_size=3),
    st.sampled_from([None, 4, 6]),
    st.integers(1, 9),
)
@example([3, 0, 20, 1, 0, 0, 7, 2], 2, 1, [(0, "backward", 0, 0), (1, "backward", 0, 0)], 4, 9)
def test_gradient_of_the_engine_does_not_depend_on_failures(
    tools, detector, boxes, group, seed, drawn, micro_batch, fits
):
    """Allocations fail at random, and always above `fits` images; after retries and splits the result is the same."""
    batch = tools.batch(boxes, seed)
    wanted = detector.whole(batch, group)
    fits = max(fits, group)
    meter = ReplayMeter(80 * GIB, [0])

    def take(module, inputs):
        meter.use(len(inputs[0]) * 2**20)
        if len(inputs[0]) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    config = Config(bn_group=group, micro_batch=micro_batch)
    engine = Engine(detector.model, detector.task, config, meter=meter, log=lambda line: None)
    optimizer = torch.optim.SGD(detector.parameters, lr=0.1)
    updates = []
    detector.reset(faults_of(tools, detector, drawn))
    handle = detector.model.model[0].register_forward_pre_hook(take)
    try:
        result = engine.step(batch)
    except DoesNotFitError:  # one image failed twice
        assert all(parameter.grad is None for parameter in detector.parameters)
        return
    finally:
        handle.remove()
    event(" ".join(event_.split()[0] for event_ in engine.latest.events))
    outcome = detector.outcome(result)
    if not any(event_.startswith("groups of") for event_ in engine.latest.events):
        assert_same(tools, outcome, wanted, 2e-5)
    assert max(result.micro_batches) <= fits
    engine.update(optimizer, lambda: updates.append(None))
    assert len(updates) == 1
