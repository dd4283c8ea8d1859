"""Half precision copies of weights under autocast."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.step.step import Step
from yolov12.mas.task import TensorTask


class Casts(TorchDispatchMode):
    """Counts conversions of weights to half precision."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.count += kwargs.get("dtype") == torch.bfloat16
        return function(*args, **kwargs)


class Plan:
    """Micro-batches of two images."""

    level = 0

    def plan(self, start, failure):
        return [(2,)] * 3

    def done(self, *args):
        pass


def test_weights_are_converted_once_for_a_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 1, bias=False))
    task = TensorTask(lambda model, x: model(x).float().square().mean())
    step = Step(model, task, ReplayMeter(2**40, [0]), torch.Tensor.backward)
    for _ in range(2):
        with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
            step.run((torch.randn(6, 3, 4, 4),), 6, Plan())
        assert casts.count == 2
