"""Rebuilt and recomputed layers give the same numbers with less memory."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Checkpointing, Plan
from yolov12.mas.checkpointing.layers import candidates
from yolov12.mas.profiling.trace import ByteTrace

PLANS = {
    "rebuilt": lambda names: Plan(tuple((name, REBUILD) for name in names)),
    "recomputed": lambda names: Plan(tuple((name, RECOMPUTE) for name in names)),
    "mixed": lambda names: Plan(tuple((name, (REBUILD, RECOMPUTE)[index % 2]) for index, name in enumerate(names))),
}


class Block(nn.Module):
    def __init__(self, channels, activation):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(channels), activation
        self.more = nn.Sequential(nn.Conv2d(channels // 2, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        a, b = y.chunk(2, 1)  # views of an output that is rebuilt
        return x + self.more(a * b.sigmoid())


class Model:
    """A model with its BatchNorm groups and checkpoint plans."""

    def __init__(self, layers, dtype=torch.float64):
        torch.manual_seed(0)
        self.model = nn.Sequential(*layers).to(dtype).train()
        self.layers = {name: layer for name, layer in candidates(self.model).items() if "." not in name}
        self.norms = GroupedBatchNorm(self.model)
        self.checkpointing = Checkpointing(self.model, self.layers, self.norms)
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}

    def run(self, x, plan=KEEP_ALL, groups=(2, 2)):
        self.model.load_state_dict(self.state)
        self.model.zero_grad()
        torch.manual_seed(1)
        self.norms.begin()
        with self.norms.within(groups, 0):
            with self.checkpointing.within(plan):
                loss = self.model(x).square().mean()
            loss.backward()
        self.norms.commit(self.norms.averages(groups, sum(groups)), len(groups))
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])
        return gradient, dict(self.model.named_buffers()), torch.rand(3)


def images(channels=4, count=4, dtype=torch.float64):
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


ACTIVATIONS = [
    nn.SiLU(),
    nn.SiLU(inplace=True),
    nn.ReLU(inplace=True),
    nn.GELU(),
    nn.Hardswish(inplace=True),
    nn.Mish(),
]


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.Identity()], ids=str)
@pytest.mark.parametrize("groups", [(4,), (2, 2), (1, 3)], ids=str)
def test_gradients_and_statistics_are_those_without_a_plan(kind, activation, groups):
    bench = Model([Block(4, activation), Block(4, activation), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5))])
    wanted, buffers, drawn = bench.run(images(), groups=groups)
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    gradient, after, then = bench.run(images(), PLANS[kind](bench.layers), groups)
    assert (gradient - wanted).norm() <= 1e-12 * wanted.norm()
    for name, buffer in buffers.items():
        torch.testing.assert_close(after[name], buffer, rtol=1e-12, atol=1e-12)
    assert torch.equal(then, drawn)


def test_recomputing_alone_changes_no_bit():
    bench = Model([Block(4, nn.SiLU()), Block(4, nn.SiLU())], torch.float32)
    x = images(dtype=torch.float32)
    wanted, *_ = bench.run(x, groups=(4,))
    assert torch.equal(bench.run(x, PLANS["recomputed"](bench.layers), (4,))[0], wanted)


def test_groups_are_tracked_once():
    bench = Model([Block(4, nn.SiLU())])
    for plan in PLANS.values():
        _, buffers, _ = bench.run(images(), plan(bench.layers))
        assert {int(value) for name, value in buffers.items() if "tracked" in name} == {2}


def kept_bytes(bench, plan):
    """Return the bytes kept between the forward and the backward pass."""
    x = images(count=32)
    bench.norms.begin()
    gc.collect()
    with ByteTrace() as trace, bench.norms.within((32,), 0):
        start = trace.mark()
        with bench.checkpointing.within(plan):
            loss = bench.model(x).square().mean()
        kept = trace.mark() - start
        loss.backward()
    return kept


def test_what_is_kept_is_what_the_modes_say():
    # Convolution, BatchNorm and SiLU keep three tensors: the inputs of BatchNorm and of SiLU, and SiLU's output.
    layer = [nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    bench = Model([nn.Sequential(*layer), nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.Flatten())])
    one = 32 * 16 * 64 * 8
    everything = kept_bytes(bench, KEEP_ALL)
    small = 2**14  # means, variances, the loss
    assert kept_bytes(bench, Plan((("0", REBUILD),))) == pytest.approx(everything - 2 * one, abs=small)
    assert kept_bytes(bench, Plan((("0", RECOMPUTE),))) == pytest.approx(everything - 2 * one, abs=small)
    both = Plan((("0", REBUILD), ("1", RECOMPUTE)))  # the recomputed layer's input is rebuilt before it runs again
    assert kept_bytes(bench, both) == pytest.approx(everything - 2 * one, abs=small)


def test_an_output_that_was_written_on_is_kept():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(F.silu(self.bn(self.conv(x)).mul_(2.0)))

    bench = Model([Written()])
    wanted, *_ = bench.run(images())
    gradient, *_ = bench.run(images(), PLANS["rebuilt"](bench.layers))
    assert (gradient - wanted).norm() <= 1e-12 * wanted.norm()


def test_the_model_is_untouched_outside():
    bench = Model([Block(4, nn.SiLU())])
    bench.run(images(), PLANS["mixed"](bench.layers))
    with pytest.raises(ZeroDivisionError), bench.checkpointing.within(PLANS["rebuilt"](bench.layers)):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in bench.model.modules())
    assert bench.norms.listener is None


def test_a_plan_says_what_it_does():
    assert str(KEEP_ALL) == ""
    assert str(Plan((("neck.1", RECOMPUTE), ("backbone.0", REBUILD)))) == "rebuild backbone.0, recompute neck.1"


@pytest.mark.parametrize(
    ("kind", "cfg"), [("obb", "yolo11n-obb"), ("segment", "yolo11n-seg"), ("pose", "yolo11n-pose")]
)
def test_heads_that_give_more_than_boxes_may_be_in_a_plan(tools, kind, cfg):
    options = {"data_kpt_shape": (2, 3)} if kind == "pose" else {}
    model = tools.build(kind, f"{cfg}.yaml", **options).double()
    layers = candidates(model)
    norms = GroupedBatchNorm(model)
    checkpointing = Checkpointing(model, layers, norms)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    found = []
    for plan in (KEEP_ALL, PLANS["mixed"]([name for name in layers if "." not in name])):
        model.zero_grad()
        norms.begin()
        with norms.within((2,), 0):
            with checkpointing.within(plan):
                outputs = tree_leaves(model(x))
            sum(output.double().square().mean() for output in outputs if output.requires_grad).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (found[1] - found[0]).norm() <= 1e-9 * found[0].norm()


class Gated(nn.Module):
    """A layer that applies its activation to a part of BatchNorm's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU()
        self.out = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        u, v = self.bn(self.conv(x)).chunk(2, 1)
        return self.out(u * self.act(v))


class Transposed(nn.Module):
    """A layer with BatchNorm of a transposed tensor."""

    def __init__(self):
        super().__init__()
        self.mix, self.bn, self.act = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.SiLU()
        self.out = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return self.out(self.act(self.bn(self.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2)))).view_as(x)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("layer", [Gated, Transposed])
@pytest.mark.parametrize("groups", [(4,), (2, 2)], ids=str)
def test_views_and_other_layouts_are_made_again_as_they_were(kind, layer, groups):
    bench = Model([layer(), layer()])
    wanted, *_ = bench.run(images(), groups=groups)
    gradient, *_ = bench.run(images(), PLANS[kind](bench.layers), groups)
    assert (gradient - wanted).norm() <= 1e-12 * wanted.norm()


def test_an_activation_that_is_a_layer_is_rebuilt_with_what_is_around_it():
    layers = [nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 4, 1, bias=False)]
    bench = Model(layers)
    wanted, *_ = bench.run(images())
    gradient, *_ = bench.run(images(), Plan((("1", REBUILD), ("2", REBUILD))))
    assert (gradient - wanted).norm() <= 1e-12 * wanted.norm()
    one = 32 * 16 * 64 * 8
    freed = kept_bytes(bench, KEEP_ALL) - kept_bytes(bench, Plan((("1", REBUILD), ("2", REBUILD))))
    assert freed == pytest.approx(2 * one, abs=2**14)


def test_an_input_that_is_written_on_later_is_no_silent_mistake():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.first(x)
            z = self.second(y)
            y.add_(1.0)
            return y + z

    bench = Model([Late()])
    layers = dict(bench.model[0].named_children())
    checkpointing = Checkpointing(bench.model, layers, bench.norms)
    with checkpointing.within(Plan((("second", RECOMPUTE),))):
        loss = bench.model(images()).sum()
    with pytest.raises(RuntimeError, match="name it in disable_mas_layers"):
        loss.backward()


def test_a_forward_pass_of_the_users_own_comes_back():
    bench = Model([Block(4, nn.SiLU())])
    own = bench.model[0].forward = bench.model[0].forward
    bench.run(images(), PLANS["recomputed"](bench.layers))
    assert vars(bench.model[0])["forward"] is own
