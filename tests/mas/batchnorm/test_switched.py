"""Users switch BatchNorm layers between batches. The layers then do what they do in PyTorch, also in groups."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from yolov12.errors import ConfigError
from yolov12.mas.checkpointing.checkpointing import RECOMPUTE, Plan
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.step.step import Step
from yolov12.mas.task import TensorTask


class WithActivation(nn.BatchNorm2d):
    """A BatchNorm layer that includes its activation, like those of timm."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def replace(layer):
    """Return a switch that puts a layer in place of the first BatchNorm."""

    def switch(model):
        model[1] = copy.deepcopy(layer).double().train()

    return switch


def to(**values):
    """Return a switch that sets attributes of the first BatchNorm."""

    def switch(model):
        for name, value in values.items():
            setattr(model[1], name, value)

    return switch


def drop_statistics(model):
    model[1].running_mean = model[1].running_var = None


SWITCHES = {
    "eval": lambda model: model[1].eval(),
    "train": lambda model: model[1].train(),
    "momentum": to(momentum=0.5),
    "momentum of 0": to(momentum=0.0),
    "momentum of 1": to(momentum=1.0),
    "cumulative average": to(momentum=None),
    "cumulative average without a count": to(momentum=None, num_batches_tracked=None),
    "no running statistics any more": to(track_running_stats=False),
    "no running statistics at all": drop_statistics,
    "no running statistics at all, in eval": lambda model: (drop_statistics(model), model[1].eval()),
    "made without running statistics": replace(nn.BatchNorm2d(6, track_running_stats=False)),
    "made with nothing": replace(nn.BatchNorm2d(6, affine=False, track_running_stats=False)),
    "made without parameters": replace(nn.BatchNorm2d(6, affine=False)),
    "parameters off": to(weight=None, bias=None),
    "frozen": lambda model: model[1].requires_grad_(False),
    "other parameters": to(weight=nn.Parameter(torch.full((6,), 2.0, dtype=torch.float64))),
    "eps": to(eps=0.1),
    "another BatchNorm": replace(nn.BatchNorm2d(6, momentum=0.3)),
    "GroupNorm": replace(nn.GroupNorm(2, 6)),
    "InstanceNorm": replace(nn.InstanceNorm2d(6, affine=True)),
    "none": replace(nn.Identity()),
    "another activation": lambda model: model.__setitem__(2, nn.ReLU()),
    "own forward": replace(WithActivation(6)),
    "synchronised": replace(nn.SyncBatchNorm(6)),
    "patched": lambda model: setattr(model[1], "forward", lambda x: 2 * nn.BatchNorm2d.forward(model[1], x)),
}


def a_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, momentum=0.7)]
    return nn.Sequential(*layers).double().train()


def images(count, seed):
    return torch.randn(count, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Switches to layers that groups cannot honour.
OWN = {"own forward", "synchronised", "patched"}


OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")


class Planner:
    """Runs a batch in given groups; the first attempts of some micro-batches fail."""

    def __init__(self, *micro_batches, level=0):
        self._left, self.level = list(micro_batches), level

    def plan(self, start, failure):
        return self._left

    def done(self, start, *_):
        self._left = self._left[1:]


class Bench:
    """A model whose batches the engine's step runs."""

    def __init__(self, model, **more):
        self.model, self.log, self.failures = model, [], []
        pairs = {model[1]: model[2]}
        layers = {"all": model}
        task = TensorTask(self.loss)
        self.step = Step(
            model, task, ReplayMeter(2**40, [0]), torch.Tensor.backward, layers, pairs, log=self.log.append, **more
        )
        self.step.plans = (Plan(), Plan((("all", RECOMPUTE),)))

    def loss(self, model, x):
        loss = loss_of(model, x)
        if self.failures:
            raise self.failures.pop()
        return loss

    def run(self, x, *micro_batches, level=0, failures=()):
        self.failures = list(failures)
        self.step.run((x,), len(x), Planner(*micro_batches, level=level))


def loss_of(model, x):
    out = model(x)
    return (out.square() * out.cos()).mean()


def state(model):
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {**gradients, **model.state_dict()}


def assert_same(model, other):
    found, wanted = state(model), state(other)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] is None) is (value is None), name
        if value is not None:
            torch.testing.assert_close(
                found[name], value, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("begin", [0, 1], ids=["from the start", "later"])
def test_a_layer_that_is_switched_does_what_it_does_in_pytorch(name, begin):
    """The fourth batch runs with a new layer in place of the switched one. The two layers have different momenta."""
    plain = a_model()
    bench = Bench(copy.deepcopy(plain))
    for batch in range(4):
        for model in (plain, bench.model):
            if batch == begin:
                torch.manual_seed(1)
                SWITCHES[name](model)
            if batch == 3:
                model[1] = nn.BatchNorm2d(6).double()
        x = images(4, batch)
        bench.run(x, (4,))
        loss_of(plain, x).backward()
        assert_same(bench.model, plain)
    assert len(bench.log) == (name in OWN)


@pytest.mark.parametrize("name", sorted(SWITCHES.keys() - OWN))
def test_groups_of_a_switched_layer_do_not_depend_on_the_split(name):
    whole, *others = (Bench(a_model()) for _ in range(3))
    for bench in (whole, *others):
        bench.run(images(5, 9), (2, 3))
        torch.manual_seed(1)
        SWITCHES[name](bench.model)
    for batch in range(2):
        x = images(5, batch)
        whole.run(x, (2, 3))
        others[0].run(x, (2,), (3,), failures=[OUT_OF_MEMORY])
        others[1].run(x, (2,), (3,), level=1)
    for bench in others:
        assert_same(bench.model, whole.model)


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_layer_that_cannot_run_in_groups_runs_on_each_micro_batch(name):
    """It writes to its buffers once, also if it fails and if it is recomputed, and not before the batch is complete."""
    benches = [Bench(a_model()) for _ in range(3)]
    plain = a_model()
    for model in (plain, *(bench.model for bench in benches)):
        SWITCHES[name](model)
    before = copy.deepcopy(plain.state_dict())
    x = images(4, 0)
    for bench in benches:
        bench.step.try_out((x,), 0, 4)
        with pytest.raises(ZeroDivisionError):
            bench.run(x, (2,), (2,), failures=[ZeroDivisionError()])
        assert all(torch.equal(value, before[key]) for key, value in bench.model.state_dict().items())
    benches[0].run(x, (2,), (2,))
    benches[1].run(x, (2,), (2,), failures=[OUT_OF_MEMORY] * 2)
    benches[2].run(x, (2,), (2,), level=1)
    for part in x.split(2):
        plain[:2](part)
    for bench in benches:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(bench.model[1], key), getattr(plain[1], key))
        assert_same(bench.model, benches[0].model)
        (line,) = bench.log
        assert line.startswith(f"memory: 1 ({type(plain[1]).__name__}) is not PyTorch's own BatchNorm")


def test_a_forward_pass_that_all_batchnorm_layers_have_instead_is_used(monkeypatch):
    stock = nn.modules.batchnorm._BatchNorm.forward
    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", lambda layer, x: 2 * stock(layer, x))
    plain = a_model()
    bench = Bench(copy.deepcopy(plain))
    bench.run(images(4, 0), (4,))
    loss_of(plain, images(4, 0)).backward()
    assert_same(bench.model, plain)
    assert "is not PyTorch's own BatchNorm" in bench.log[0]


def test_several_ranks_cannot_share_such_a_layer():
    """Each rank would count other statistics, and layers that are synchronised would wait for each other."""
    ranks = SimpleNamespace(rank=0, size=2, alike=True)
    model = a_model()
    model[1] = nn.SyncBatchNorm(6).double()
    with pytest.raises(ConfigError, match="SyncBatchNorm is not PyTorch's BatchNorm, so several processes"):
        Bench(model, ranks=ranks).run(images(4, 0), (4,))
