"""BatchNorm and its activation as one operation. The kernels use PyTorch, so the tests run anywhere."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel

from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Checkpointing, Plan
from yolov12.mas.profiling.trace import ByteTrace
from yolov12.models.activations import activations
from yolov12.models.layer_names import layer_names


class Kernels:
    """Kernels that keep only their input for the backward pass, like the CUDA kernels."""

    def __init__(self):
        self.calls = []

    def applies(self, x, weight, means):
        return x.ndim == 4 and weight.dtype == means.dtype

    def batch_norm(self, x, weight, bias, means, variances, sizes, eps, silu=False):
        self.calls.append((tuple(sizes), silu))

        def again(x):
            out = torch.cat([F.batch_norm(part, None, None, weight, bias, True, 0.0, eps) for part in x.split(sizes)])
            return F.silu(out) if silu else out

        for part, mean, variance in zip(x.detach().split(sizes), means, variances, strict=True):
            mean.data.copy_(part.mean((0, 2, 3)))  # not recorded by autograd, as if written by a kernel
            variance.data.copy_(part.var((0, 2, 3)))
        return Fused.apply(x, weight, bias, again), again


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, again):
        ctx.save_for_backward(x, weight, bias)
        ctx.again = again
        return again(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            wanted = [tensor for tensor in (x, weight, bias) if tensor.requires_grad]
            found = iter(torch.autograd.grad(ctx.again(x), wanted, grad))
            return *[next(found) if tensor.requires_grad else None for tensor in (x, weight, bias)], None


SHARED = nn.SiLU()  # Ultralytics' layers share one instance, too


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.act = SHARED
        self.plain = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + self.act(self.plain(self.act(self.bn(self.conv(x)))))


class Bench:
    def __init__(self, fused, blocks=2, channels=4):
        torch.manual_seed(0)
        self.model = nn.Sequential(*[Block(channels) for _ in range(blocks)]).double().train()
        self.kernels = Kernels()
        pairs = {block.bn: block.act for block in self.model} if fused else None
        self.norms = GroupedBatchNorm(self.model, pairs, self.kernels)
        self.layers = dict(self.model.named_children())
        self.checkpointing = Checkpointing(self.model, self.layers, self.norms)

    def run(self, plan=KEEP_ALL, groups=(2, 2)):
        x = torch.randn(sum(groups), 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.norms.begin()
        gc.collect()
        with ByteTrace() as trace, self.norms.within(groups, 0):
            start = trace.mark()
            with self.checkpointing.within(plan):
                loss = self.model(x).square().mean()
            kept_bytes = trace.mark() - start
            loss.backward()
        self.norms.commit(self.norms.averages(groups, sum(groups)), len(groups))
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        return gradient, dict(self.model.named_buffers()), kept_bytes


PLANS = [KEEP_ALL, Plan((("0", REBUILD), ("1", REBUILD))), Plan((("0", RECOMPUTE), ("1", REBUILD)))]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("groups", [(4,), (2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_and_statistics_are_those_of_two_operations(plan, groups, frozen):
    fused, apart = Bench(fused=True), Bench(fused=False)
    for bench in (fused, apart) if frozen else ():
        bench.model[1].bn.requires_grad_(False)
        bench.model[0].bn.eval()
    (gradient, buffers, _), (wanted, others, _) = fused.run(plan, groups), apart.run(KEEP_ALL, groups)
    assert (gradient - wanted).norm() <= 1e-12 * wanted.norm()
    for name, buffer in others.items():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-12, atol=1e-12)
    assert (groups, True) in fused.kernels.calls
    assert fused.norms.fused == 2 - frozen  # layers, also if some ran again
    assert (groups, True) not in apart.kernels.calls


def test_less_is_kept():
    one = 4 * 4 * 8 * 8 * 8
    apart, fused = Bench(fused=False).run(groups=(4,))[2], Bench(fused=True).run(groups=(4,))[2]
    assert fused == pytest.approx(apart - 2 * one, abs=one / 2)  # without BatchNorm's output, in both blocks
    rebuilt = Bench(fused=True).run(PLANS[1], groups=(4,))[2]
    assert rebuilt == pytest.approx(fused - 4 * one, abs=one / 2)  # without SiLU's output and the other layers' outputs


def test_an_activation_that_is_not_applied_is_an_error():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    for pair in (1, 3):
        norms = GroupedBatchNorm(model, {model[pair]: nn.SiLU()}, Kernels())
        norms.begin()
        with pytest.raises(RuntimeError, match="was not applied"), norms.within((2,), 0):
            model(torch.randn(2, 4, 4, 4))
        with norms.within((2,), 0), pytest.raises(ZeroDivisionError):
            raise ZeroDivisionError


def test_other_activations_are_left_alone():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    kernels = Kernels()
    norms = GroupedBatchNorm(model, {model[1]: model[2]}, kernels)
    norms.begin()
    with norms.within((2,), 0):
        model(torch.randn(2, 4, 4, 4))
    assert not kernels.calls
    assert norms.fused == 0


@pytest.mark.parametrize(
    ("layer", "hook"),
    [
        (1, "register_forward_hook"),
        (1, "register_full_backward_hook"),
        (1, "register_full_backward_pre_hook"),
        (2, "register_forward_pre_hook"),
        (2, "register_forward_hook"),
        (2, "register_full_backward_hook"),
        (2, "register_full_backward_pre_hook"),
    ],
)
def test_layers_that_hooks_watch_are_left_alone(layer, hook):
    """Hooks that are added after the engine was created count, too."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU())
    kernels, seen = Kernels(), []
    norms = GroupedBatchNorm(model, {model[1]: model[2]}, kernels)
    x = torch.randn(2, 4, 4, 4)

    def run():
        norms.begin()
        with norms.within((2,), 0):
            model(x).sum().backward()

    run()
    assert norms.fused == 1
    handle = getattr(model[layer], hook)(lambda module, *values: seen.append(values[0]) or None)
    run()
    assert norms.fused == 0
    assert seen
    handle.remove()
    run()
    assert norms.fused == 1
    assert len(kernels.calls) == 2


@pytest.mark.parametrize("place", [1, 2])
def test_a_pair_of_which_one_was_replaced_is_left_alone(place):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), SHARED), Block(4)).double()
    norms = GroupedBatchNorm(model, {model[0][1]: SHARED, model[1].bn: SHARED}, Kernels())
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each[0][place] = nn.ReLU() if place == 2 else nn.BatchNorm2d(4, momentum=0.5).double()
    norms.find_layers()
    norms.begin()
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    with norms.within((4,), 0):
        out = model(x)
    norms.commit(norms.averages((4,), 4), 1)
    assert norms.fused == 1
    torch.testing.assert_close(out, plain(x))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("change", ["activation", "class of activations", "forward", "class", "parent"])
def test_a_pair_that_runs_in_code_of_the_users_own_is_left_alone(change, monkeypatch):
    """Code that was put there after the engine was created counts, too."""

    class Twice(Block):
        def forward(self, x):
            out = self.bn(self.conv(x))
            return out + self.act(out)

    model = nn.Sequential(Block(4))
    model[0].act = nn.SiLU()
    norms = GroupedBatchNorm(model, {model[0].bn: model[0].act}, Kernels())
    if change == "activation":
        model[0].act.forward = torch.relu
    if change == "class of activations":
        monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: torch.relu(x))
    if change == "forward":
        model[0].forward = Twice.forward.__get__(model[0])
    if change == "class":
        model[0].__class__ = Twice
    if change == "parent":
        before, model[0] = model[0], Twice(4)
        model[0]._modules.update(before._modules)
        norms.find_layers()
    norms.begin()
    x = torch.randn(4, 4, 5, 5)
    with norms.within((4,), 0):
        out = model(x)
    assert norms.fused == 0
    torch.testing.assert_close(out, model(x))


def test_images_that_are_no_whole_groups():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU())
    norms = GroupedBatchNorm(model, {model[0]: model[1]}, Kernels())
    norms.begin()
    with norms.within((4,), 0):  # one group, so any number of images fits
        for images in (2, 4, 6):
            assert len(model(torch.randn(images, 4, 3, 3))) == images
    with norms.within((2, 2), 0):
        assert len(model(torch.randn(8, 4, 3, 3))) == 8
        for images in (2, 7):
            with pytest.raises(RuntimeError, match="leaves open which its groups are"):
                model(torch.randn(images, 4, 3, 3))
    with norms.within((1,), 0), pytest.raises(ValueError, match="more than 1 value"):
        model(torch.randn(1, 4, 1, 1))


def test_a_layer_that_is_recomputed_without_its_activation():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1)).double()
    x, found = torch.randn(4, 4, 5, 5, dtype=torch.float64), []
    for pairs, plan in ((None, KEEP_ALL), ({model[1]: model[2]}, Plan((("1", RECOMPUTE),)))):
        for early_stop in (True, False):
            norms = GroupedBatchNorm(model, pairs, Kernels())
            checkpointing = Checkpointing(model, dict(model.named_children()), norms)
            model.zero_grad()
            norms.begin()
            with norms.within((2, 2), 0), set_checkpoint_early_stop(early_stop):
                with checkpointing.within(plan):
                    loss = model(x).square().sum()
                loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all((gradient - found[0]).norm() <= 1e-12 * found[0].norm() for gradient in found)


@pytest.mark.parametrize("cfg", ["yolov12n.yaml", "yolo12n.yaml", "yolo11n.yaml"])
def test_layers_of_ultralytics(cfg):
    torch.manual_seed(0)
    model = DetectionModel(cfg, verbose=False).double().train()
    pairs = activations(model)
    assert len(pairs) == sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    found = []
    for kernels in (Kernels(), None):
        norms = GroupedBatchNorm(model, pairs, kernels) if kernels else GroupedBatchNorm(model)
        model.zero_grad()
        norms.begin()
        plan = Plan(tuple((name, REBUILD) for name in layer_names(model)) if kernels else ())
        with norms.within((2,), 0):
            with Checkpointing(model, layer_names(model), norms).within(plan):
                predictions = model(x)
            (predictions["boxes"].square().mean() + predictions["scores"].square().mean()).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        fused = sum(silu for _, silu in kernels.calls) if kernels else 0
        assert fused == sum(type(activation) is nn.SiLU for activation in pairs.values()) * bool(kernels)
    assert (found[0] - found[1]).norm() <= 1e-9 * found[1].norm()
    assert not activations(model.fuse())


def test_convolutions_whose_class_was_changed_are_left_alone(monkeypatch):
    def forward(self, x):
        out = self.bn(self.conv(x))
        return out + self.act(out)

    monkeypatch.setattr(Conv, "forward", forward)
    assert not activations(nn.Sequential(Conv(4, 4)))
