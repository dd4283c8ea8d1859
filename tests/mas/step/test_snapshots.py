"""What layers and hooks of a user's own keep: after failed allocations it is as if they had never run."""

from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from torch import nn
from torch.fx.immutable_collections import immutable_dict

from tests.mas.world import World
from yolov12.errors import DoesNotFitError
from yolov12.mas.step.snapshots import ModuleState, changing

OOM = "CUDA out of memory. Tried to allocate 2.00 MiB"


class Keeping(nn.Module):
    """Keeps what it sees in an attribute, a buffer, a list, a set, and in the model."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.images, self.sizes, self.seen = 0, [], set()

    def forward(self, x):
        self.calls += 1
        self.images += len(x)
        self.sizes.append(len(x))
        self.seen.add(len(x))
        self.model[0].latest = len(x)
        return x

    def kept(self):
        return int(self.calls), self.images, list(self.sizes), set(self.seen), vars(self.model[0]).get("latest")


class Failing(nn.Module):
    """Fails behind the other layers, for more images than fit."""

    most = 8

    def __init__(self):
        super().__init__()
        self.counts = SimpleNamespace(fails=0)  # containers of a layer are restored

    def forward(self, x):
        if len(x) > self.most:
            self.counts.fails += 1
            raise torch.cuda.OutOfMemoryError(OOM)
        return x


def make_world(*layers, **config):
    world = World(bn_group=2, **config)
    world.step()  # after it, a failure tells no longer of the first micro-batch that ever ran
    for layer in (*layers, Failing().double()):
        world.model.append(layer)
    return world


@pytest.mark.parametrize("most", [8, 4, 2])
def test_a_layer_keeps_only_what_it_saw_in_micro_batches_that_ran(most):
    world = make_world()
    layer = Keeping(world.model)
    world.model.insert(0, layer)
    world.model[-1].most = most
    world.step(1)
    assert world.model[-1].counts.fails
    assert layer.kept() == (16 // most, 16, [most] * (16 // most), {most}, most)


def test_a_hook_on_a_layer_of_pytorch_keeps_only_what_it_saw_in_micro_batches_that_ran():
    world = make_world()

    def count(module, inputs, output):
        module.images = getattr(module, "images", 0) + len(output)

    world.model[0].register_forward_hook(count)
    world.step(1)
    assert world.model[-1].counts.fails
    assert world.model[0].images == 16


def test_running_statistics_of_instance_norm_move_once_for_each_micro_batch():
    means = []
    for most in (16, 4):
        world = make_world(limit=None, micro_batch=4 if most == 16 else None)
        norm = nn.InstanceNorm2d(3, track_running_stats=True).double()
        world.model.insert(0, norm)
        world.model[-1].most = most
        world.step(1)
        assert bool(world.model[-1].counts.fails) == (most == 4)
        assert norm.running_mean.any()
        means.append(norm.running_mean)
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=0)


def test_a_batch_that_does_not_fit_at_all_leaves_layers_as_they_were():
    world = make_world()
    layer = Keeping(world.model)
    world.model.insert(0, layer)
    world.step(1)
    before = layer.kept()
    world.model[-1].most = 0
    with pytest.raises(DoesNotFitError):
        world.step(2)
    assert layer.kept() == before


def test_an_error_of_a_users_own_leaves_layers_as_they_were():
    world = make_world(micro_batch=4)
    layer = Keeping(world.model)
    world.model.insert(0, layer)
    world.step(1)
    before = layer.kept()

    def fail(module, inputs):
        if layer.images >= before[1] + 8:
            raise ValueError("a mistake of the user's own")

    world.model[-1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="mistake"):
        world.step(2)
    assert layer.kept() == before


@pytest.mark.parametrize(("task", "name"), [("detect", "yolov12n.yaml"), ("segment", "yolo11n-seg.yaml")])
def test_usual_models_have_nothing_to_copy(tools, task, name):
    modules = list(tools.build(task, name).modules())
    assert changing(modules) == []
    conv = next(module for module in modules if isinstance(module, nn.Conv2d))
    conv.register_forward_hook(lambda *_: None)
    assert changing(modules) == [modules[0], conv]


class Changing(nn.Module):
    """Changes what it holds in ways that are not plain attributes or buffers."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm, self.proj = nn.Dropout(0.0), nn.BatchNorm2d(3).double(), None
        self.register_buffer("spread", torch.ones(1).expand(3))
        self.register_buffer("range", torch.empty(0))
        self.register_buffer("last", None)
        with torch.inference_mode():
            self.register_buffer("encoding", torch.ones(2))
        self.norm.register_buffer("calls", torch.zeros(()))
        self.fixed = immutable_dict({"a": 1})

    def forward(self, x):
        self.drop.p += 0.01
        self.norm.calls += 1
        self.range.resize_(3).copy_(self.range + 1 if self.range.numel() else torch.ones(3))
        self.last = torch.ones(()) if self.last is None else self.last + 1
        if not hasattr(self, "made"):
            self.register_buffer("made", torch.zeros(()))
        self.made += 1
        self.proj = self.proj or nn.Identity()
        was = self.drop.training
        self.drop.eval()
        if len(x) > 8:
            raise torch.cuda.OutOfMemoryError(OOM)
        self.drop.train(was)
        return self.proj(x)

    def kept(self):
        counts = self.norm.calls, self.range[0], self.last, self.made
        return round(self.drop.p, 6), self.drop.training, *map(float, counts)


def test_layers_in_layers_and_buffers_of_every_kind_are_set_back():
    world = make_world()
    layer = Changing()
    world.model.insert(0, layer)
    world.step(1)
    assert layer.kept() == (0.02, True, 2, 2, 2, 2)
    assert isinstance(layer.proj, nn.Identity)
    assert list(layer._modules) == ["drop", "norm", "proj"]
    assert torch.equal(layer.spread, torch.ones(3))


def test_a_container_that_has_not_changed_is_not_written():
    """Another thread may be reading it."""

    class Read(dict):
        def clear(self):
            raise AssertionError

    module = nn.Identity()
    module.names, module.seen = Read(a=1), {"b", "c"}
    state = ModuleState([module])
    module.seen.add("d")
    state.restore()
    assert (module.names, module.seen) == ({"a": 1}, {"b", "c"})


def test_feature_maps_that_a_layer_keeps_are_not_kept_alive_by_snapshots():
    alive, counts = [], []

    def keep(module, inputs, output):
        module.feature = output
        alive.append(ref(output))
        counts.append(sum(each() is not None for each in alive))

    world = make_world(micro_batch=4)
    world.model[0].register_forward_hook(keep)
    for step in range(1, 4):
        world.step(step)
    assert counts == [1] * 12


def test_a_copy_for_which_memory_lacks_is_a_failure_like_any_other(monkeypatch):
    world = make_world()
    layer = Keeping(world.model)
    world.model.insert(0, layer)
    fails, stock = [True] * 3, torch.Tensor.clone

    def clone(tensor, *args, **kwargs):
        if tensor is layer.calls and world.engine._step._parameters and layer.images == 8 and fails:
            fails.pop()
            raise torch.cuda.OutOfMemoryError(OOM)
        return stock(tensor, *args, **kwargs)

    monkeypatch.setattr(layer.calls, "detach", lambda: layer.calls)
    monkeypatch.setattr(torch.Tensor, "clone", clone)
    world.step(1)
    assert fails == []
    assert layer.kept() == (2, 16, [8, 8], {8}, 8)
