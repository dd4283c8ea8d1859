"""Replays of CUDA graphs on a real card: gradients, statistics, failures, and hooks."""

import copy
import traceback

import pytest
import torch
from torch import nn
from ultralytics.cfg import get_cfg

from yolov12 import mas
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.checkpointing.layers import candidates
from yolov12.mas.memory.meter import meter_for
from yolov12.mas.step.graphs import replays, size
from yolov12.mas.step.graphs.recorder import CudaRecorder, Graphs
from yolov12.mas.step.step import Step
from yolov12.models.activations import activations
from yolov12.training.adapter.detection import DetectionTask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here"),
]

SIZES = [(4, 4), (4, 2), (4, 4), (4, 2), (4, 4)]


@pytest.fixture(autouse=True)
def whatever_the_times(monkeypatch):
    """Keep graphs that are no faster, as other processes may use the card; log errors as a whole."""
    monkeypatch.setattr(size, "_FASTER", 1e9)
    monkeypatch.setattr(replays, "reason_of", lambda error: "".join(traceback.format_exception(error)))
    print(
        torch.__version__, torch.version.cuda, torch.cuda.get_device_name(), torch.cuda.memory.get_allocator_backend()
    )
    yield
    torch.cuda.empty_cache()


class Script:
    """Gives each batch the same micro-batches."""

    def __init__(self, level=0, sizes=SIZES):
        self.level, self.sizes, self.failures = level, sizes, []

    def plan(self, start, failure):
        self.failures += [failure] if failure else []
        return self.sizes

    def done(self, *args):
        pass


@pytest.fixture
def strict():
    """Ultralytics' default: deterministic kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def preprocess(part):
    images = part["img"].cuda().float() / 255
    return {**part, "img": images}


def make(tools, recorder=None):
    """Return a step, whose `lines` are those of the log."""
    lines = []
    model = tools.build("detect", "yolo12n.yaml").cuda().to(memory_format=torch.channels_last).train()
    model.args = get_cfg()
    layers = candidates(model)
    graphs = Graphs(recorder, lambda start, stop: (0, 0, 2**50)) if recorder else None
    step = Step(
        model,
        DetectionTask(preprocess, multi_scale=False, overlapping_masks=True),
        meter_for(torch.device("cuda")),
        lambda loss: (loss * 64).backward(),  # half precision holds the largest gradients
        layers,
        activations(model),
        log=lines.append,
        graphs=graphs,
    )
    step.lines = lines
    outer = [name for name in layers if "." not in name]
    modes = {name: RECOMPUTE if index % 2 else REBUILD for index, name in enumerate(outer[:-1])}
    step.plans = (KEEP_ALL, Plan(tuple(modes.items())))
    return step


def run(step, batch, planner):
    step.model.zero_grad()
    with torch.autocast("cuda", torch.float16):
        return step.run(batch, step._task.workload(batch).images, planner)


def state(step):
    gradient = torch.cat([p.grad.flatten().double() for p in step.model.parameters() if p.grad is not None])
    statistics = torch.cat([buffer.flatten().double() for buffer in step.model.buffers()])
    return gradient, statistics


def off(one, other):
    return float((one - other).norm() / other.norm())


def differing(one, other):
    """Return by how much tensors of two models differ that should not, the first ten of them."""
    pairs = zip(one.model.named_parameters(), other.model.parameters(), strict=True)
    found = {name: (a.grad, b.grad) for (name, a), b in pairs if a.grad is not None or b.grad is not None}
    found |= {name: (a, dict(other.model.named_buffers())[name]) for name, a in one.model.named_buffers()}
    return [
        (name, tuple(a.shape), off(a.double(), b.double()) if a is not None and b is not None else (a, b))
        for name, (a, b) in found.items()
        if a is None or b is None or not torch.equal(a, b)
    ][:10]


@pytest.mark.parametrize("level", [0, 1])
def test_replays_are_the_usual_passes_bit_for_bit(tools, strict, level):
    usual, again, replayed = make(tools), make(tools), make(tools, CudaRecorder(torch.device("cuda")))
    planners = [Script(level) for _ in range(3)]
    counts = []
    for seed in range(5):
        batch = tools.batch([3, 0, 9, 1] * 9, seed, size=160)
        results = [run(*each) for each in zip((usual, again, replayed), [batch] * 3, planners, strict=True)]
        counts.append(results[2].replayed)
        print("batch", seed, "replayed", counts[-1], "losses", [float(each.loss.sum()) for each in results])
        assert not replayed.lines, replayed.lines[0]
        assert not any(planner.failures for planner in planners), [planner.failures for planner in planners]
        assert not differing(again, usual), "the usual passes do not repeat themselves"
        assert not differing(replayed, usual), counts
        assert torch.equal(results[2].loss, results[0].loss)
    assert counts[-1] == len(SIZES)


@pytest.mark.parametrize("fails", ["out of memory", "synchronises", "raises"])
def test_a_failed_capture_leaves_nothing_behind(tools, fails):
    class Failing(CudaRecorder):
        def record(self, function):
            def fail():
                found = function()
                if fails == "out of memory":
                    torch.empty(2**50, device="cuda")
                elif fails == "synchronises":
                    torch.cuda.synchronize()
                else:
                    raise ValueError
                return found

            return super().record(fail)

    usual, failing = make(tools), make(tools, Failing(torch.device("cuda")))
    batch = tools.batch([3, 0, 9, 1] * 9, size=160)
    for _ in range(4):
        assert run(failing, batch, Script()).replayed == 0
        run(usual, batch, Script())
    print(*failing.lines, sep="\n")
    assert off(state(failing)[0], state(usual)[0]) < 1e-3
    assert len(failing.lines) == 2  # of both sizes
    torch.rand(3, device="cuda")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(2**50, device="cuda")
    again = make(tools, CudaRecorder(torch.device("cuda")))
    for _ in range(4):
        result = run(again, batch, Script())
    assert not again.lines, again.lines[0]
    assert result.replayed == len(SIZES)
    assert off(state(again)[0], state(usual)[0]) < 1e-3


def test_graphs_are_dropped_for_a_hook_and_return_their_memory(tools):
    step = make(tools, CudaRecorder(torch.device("cuda")))
    batch = tools.batch([3, 0, 9, 1] * 9, size=160)
    for _ in range(4):
        result = run(step, batch, Script())
    assert not step.lines, step.lines[0]
    assert result.replayed == len(SIZES)
    assert step.replays.idle_bytes > 2**20
    torch.cuda.empty_cache()
    reserved_bytes, idle_bytes = torch.cuda.memory_reserved(), step.replays.idle_bytes
    step.replays.drop()
    assert torch.cuda.memory_reserved() <= reserved_bytes - 0.9 * idle_bytes
    assert run(step, batch, Script()).replayed == len(SIZES)
    calls = []
    handle = step.model.model[3].register_forward_hook(lambda *_: calls.append(1))
    assert run(step, batch, Script()).replayed == 0
    assert len(calls) == len(SIZES)
    handle.remove()


def test_a_failed_allocation_in_a_replayed_micro_batch(tools):
    usual, step = make(tools), make(tools, CudaRecorder(torch.device("cuda")))
    batch = tools.batch([3, 0, 9, 1] * 9, size=160)
    for _ in range(4):
        run(step, batch, Script())
    left, loss = [1], step._task.loss

    def fail(model, part):
        found = loss(model, part)
        if left[0]:
            left[0] -= 1
            torch.empty(2**50, device="cuda")
        return found

    step._task.loss = fail
    planner = Script()
    result = run(step, batch, planner)
    assert result.replayed < len(SIZES)
    assert not planner.failures
    for _ in range(5):
        run(usual, batch, Script())
    assert off(state(step)[0], state(usual)[0]) < 1e-3


def test_an_engine_replays_small_micro_batches_and_counts_them(strict):
    def loss(model, x):
        return model(x).float().square().mean()

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.SiLU()]
    for _ in range(20):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)).cuda()
    other = copy.deepcopy(model)
    batch = (torch.randn(32, 3, 32, 32).pin_memory(),)
    task = mas.TensorTask(loss, may_replay=True)
    configs = [mas.Config(micro_batch=4, bn_group=4, cuda_graphs=graphs) for graphs in (True, False)]
    engines = [mas.Engine(each, task, config) for each, config in zip((model, other), configs, strict=True)]
    for _ in range(4):
        results = [engine.step(batch) for engine in engines]
    assert [result.replayed for result in results] == [8, 0]
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    for engine in engines:
        engine.close()
    assert engines[0]._step.replays.idle_bytes == 0
