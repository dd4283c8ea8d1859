"""Bytes that a profile predicts for a layer, compared with the bytes of tensors in a real pass."""

import gc
import time
from dataclasses import replace

import pytest
import torch

from yolov12 import mas
from yolov12.mas.batchnorm import fused
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.checkpointing.layers import candidates, outermost
from yolov12.mas.memory.reading import ClockStopwatch
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.profiling.recorder import Recorder
from yolov12.mas.profiling.solver import ladder, peak_bytes
from yolov12.mas.profiling.trace import ByteTrace
from yolov12.mas.profiling.warmup import profile
from yolov12.models.activations import activations
from yolov12.models.layer_names import layer_names
from yolov12.plan.cuda_rules import FusedBatchNorm

IMAGES = 4
SMALL = 2**16  # BatchNorm statistics and the loss


@pytest.fixture(scope="module")
def profiled(tools):
    bench = tools.Bench(tools.build("detect", "yolov12n.yaml"), torch.float32)
    batch = tools.batch([3, 1, 5, 2], size=96)
    bench.task.workload(batch)
    bench.reset()
    engine = mas.Engine(bench.model, bench.task, mas.Config(bn_group=IMAGES))
    return engine._step, batch, profile(engine._step, engine.meter, engine._calibration.layers, batch, IMAGES)


def kept_bytes(step, batch, plan):
    """Return the bytes kept between the forward and the backward pass."""
    gc.collect()
    kept = []
    with ByteTrace() as trace:

        def backward(loss):
            kept.append(trace.allocated_bytes)
            loss.backward()

        step._backward = backward
        step.try_out(batch, 0, IMAGES, step.checkpointing.within(plan))
    return kept[0]


@pytest.mark.parametrize("mode", [REBUILD, RECOMPUTE])
def test_bytes_that_a_layer_frees(tools, profiled, mode, deep):
    """The one of each class that frees most; with `--deep` all."""
    step, batch, found = profiled
    everything = kept_bytes(step, batch, KEEP_ALL)
    predicted = {
        layer.name: IMAGES * (layer.rebuild_frees_bytes if mode == REBUILD else layer.recompute_frees_bytes)
        for layer in found.layers
    }
    names = [layer.name for layer in found.layers if layer.inside is None or predicted[layer.name] > 4 * SMALL]
    if not deep:
        classes = {name: type(layer) for name, layer in candidates(tools.build("detect", "yolov12n.yaml")).items()}
        names.sort(key=predicted.get)
        names = list({classes[name]: name for name in names}.values())
        assert len(names) > 4
    freed_by = {}
    for name in names:
        freed = everything - kept_bytes(step, batch, Plan(((name, mode),)))
        assert freed == pytest.approx(predicted[name], rel=0.01, abs=SMALL), name
        freed_by[name] = freed
    assert max(freed_by.values()) > 0.1 * everything


def test_bytes_that_plans_free(profiled):
    step, batch, found = profiled
    by_name = {layer.name: layer for layer in found.layers}
    everything = kept_bytes(step, batch, KEEP_ALL)
    for level in ladder(found)[1:]:
        predicted = IMAGES * sum(
            by_name[name].rebuild_frees_bytes if mode == REBUILD else by_name[name].recompute_frees_bytes
            for name, mode in level.plan.modes
        )
        assert everything - kept_bytes(step, batch, level.plan) == pytest.approx(predicted, rel=0.01, abs=SMALL)


def test_what_stages_keep_adds_up(profiled):
    step, batch, found = profiled
    kept = IMAGES * sum(stage.kept_bytes for stage in found.stages())
    # Kept in addition: the input images, and the tensors of the loss.
    assert kept < kept_bytes(step, batch, KEEP_ALL) < kept + IMAGES * (found.loss_extra_bytes + 5 * 3 * 96 * 96 * 4)


def test_feature_maps_in_the_result_stay_until_the_loss_is_known(profiled):
    """Ultralytics' models return the inputs of their head, so what makes them frees less at the peak in the loss."""
    _, _, found = profiled
    held = {layer.name for layer in found.stages() if layer.result_bytes}
    assert held == {"14", "17", "20"}
    for layer in found.layers:
        assert layer.result_bytes <= layer.held_bytes <= layer.rebuild_frees_bytes


def test_feature_maps_that_a_later_layer_reads_stay_until_the_forward_pass_ends(profiled):
    """Ultralytics' models refer to the inputs of their concatenations, so at that time rebuilding frees less."""
    _, _, found = profiled
    assert {layer.name for layer in found.stages() if layer.held_bytes} == {"4", "6", "14", "17", "20"}


def test_backward_pass_of_the_head_is_not_part_of_the_loss(tools):
    """Its last branch runs first, before the gradient of its first output is there."""
    bench = tools.Bench(tools.build("detect", "yolov12n.yaml"), torch.float32)
    head = bench.model.model[-1]
    layers = {"head": head}
    batch = tools.batch([3, 1], size=64)
    bench.task.workload(batch)
    bench.reset()
    step = mas.Engine(bench.model, bench.task, mas.Config(bn_group=2))._step
    recorder = Recorder(bench.model, layers, step.checkpointing)
    step.try_out(batch, 0, 2, recorder.saved_tensors(lambda: ClockStopwatch(lambda: 0.0)))
    began = []
    head.cv3[-1][-1].register_full_backward_pre_hook(lambda *_: began.append(len(recorder._marks)))
    with ByteTrace() as trace:
        step.try_out(batch, 0, 2, recorder.times_and_peaks(lambda: ClockStopwatch(lambda: 0.0), trace))
    assert began == [1]


def test_stages_are_the_outermost_layers_in_order(profiled):
    _, _, found = profiled
    names = [stage.name for stage in found.stages()]
    assert names == outermost([layer.name for layer in found.layers])
    assert [stage.stage for stage in found.stages()] == list(range(len(names)))
    for layer in found.layers:
        assert layer.kept_bytes >= max(layer.recompute_frees_bytes, 0)


def test_rebuilding_costs_less_than_recomputing(profiled):
    _, _, found = profiled
    stages = found.stages()
    assert 0 < sum(stage.rebuild.device_ms for stage in stages) < sum(stage.recompute.device_ms for stage in stages)
    assert 0 < found.total.device_ms <= found.total.host_ms


def test_all_kept_is_the_highest_peak(profiled):
    _, _, found = profiled
    everything = Plan(tuple((stage.name, RECOMPUTE) for stage in found.stages()))
    assert peak_bytes(found, everything) < 0.6 * peak_bytes(found, KEEP_ALL)


class CardMeter(ReplayMeter):
    """Counts tensors as the allocator of a GPU would."""

    def __init__(self, trace):
        super().__init__(2**40, [0])
        self.mark, self.peak_bytes = trace.mark, trace.peak_bytes

    def stopwatch(self):
        return ClockStopwatch(lambda: 1e3 * time.perf_counter())


def test_joined_blocks_lower_the_peak_without_a_plan(tools, monkeypatch):
    """BatchNorm adds residuals and writes concatenations in layers that a plan does not rebuild.

    Here, its kernels only allocate.
    """
    for name in ("applies", "batch_norm", "batch_norm_into", "writes_into"):
        monkeypatch.setattr(fused, name, getattr(FusedBatchNorm, name))
    model = tools.build("detect", "yolov12n.yaml").to(memory_format=torch.channels_last).train()
    task = mas.TensorTask(lambda model, x: sum(model(x)[name].sum() for name in ("boxes", "scores")))
    batch = (torch.zeros(IMAGES, 3, 96, 96).to(memory_format=torch.channels_last),)
    options = {"layers": layer_names(model), "activations": activations(model)}
    with ByteTrace() as trace:
        meter = CardMeter(trace)
        engine = mas.Engine(model, task, mas.Config(bn_group=IMAGES), meter=meter, **options)
        step = engine._step
        found = profile(step, meter, engine._calibration.layers, batch, IMAGES)

        def traced_bytes(around):
            """Peak of one image. While a micro-batch runs, the images of the next one are in memory, too."""
            before_bytes, highest_bytes = step.try_out(batch, 0, IMAGES, around)
            return (highest_bytes - before_bytes + batch[0].nbytes) / IMAGES

        plans = [level.plan for level in ladder(found)]
        traced = [traced_bytes(step.checkpointing.within(plan)) for plan in plans]
        apart_bytes = traced_bytes(step.checkpointing.apart())
    assert found.joined_bytes > 0.01 * apart_bytes
    assert peak_bytes(replace(found, joined_bytes=0.0), KEEP_ALL) == pytest.approx(apart_bytes, rel=0.01)
    assert [peak_bytes(found, plan) for plan in plans] == pytest.approx(traced, rel=0.01)
