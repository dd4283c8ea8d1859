"""A training of a small convolutional model on a simulated card, on which an image takes 100 MiB."""

import pytest
import torch
from torch import nn

from yolov12.mas import Advice, Config, Engine, Journal, Loss, TensorTask
from yolov12.mas.distributed.ranks import ALONE
from yolov12.mas.memory.replay import ReplayMeter

MIB = 2**20
IMAGE = 100 * MIB


class World:
    """Training on a card with memory for `room` images; other processes hold `others[step]` images in each step.

    Loader workers of the training, which share the memory, hold `workers[step]` images.
    """

    def __init__(
        self,
        batch=16,
        room=40,
        others=(0,),
        workers=(0,),
        live=0,
        folder=None,
        ways_out=lambda share: ("amp=True",),
        optimizer_images=0,
        wait_ms=0,
        ranks=ALONE,
        **config,
    ):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 4, 3, 4, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(1024, 2)
        ).double()
        traces = ([int(images * IMAGE) for images in trace] for trace in (others, workers))
        self.meter = ReplayMeter(room * IMAGE, next(traces), live, config.get("limit"), next(traces))
        self.journal = Journal(folder) if folder else None
        self.fail = lambda images: False
        self.wait_ms = wait_ms  # time of every micro-batch, besides a millisecond per image
        self.lines, self.sizes, self.batch = [], [], batch
        self.options = {}  # arguments of every `Engine.step`
        self.engine = Engine(
            self.model,
            TensorTask(self.loss),
            Config(**config),
            meter=self.meter,
            journal=self.journal,
            layers={},  # no checkpoint plan saves memory on this card
            advice=Advice(ways_out, lambda: int(optimizer_images * IMAGE) if not self.sizes else 0),
            ranks=ranks,
            log=self.lines.append,
        )
        # Memory that it would wait for never comes back here.
        self.engine._planner.sleep = lambda seconds: pytest.fail("waits for other processes")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def loss(self, model, x, y):
        self.meter.use(len(x) * IMAGE)
        self.meter.tick(len(x) + self.wait_ms)
        if self.fail(len(x)):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        # A mean over the targets that count, like a mean over pixels that are not ignored.
        counts = (y[:, 0] > -1).sum()
        error = ((model(x) - y) ** 2)[y[:, 0] > -1].sum() / counts.clamp(min=1)
        return Loss(error, counts, {"error": error})

    def data(self, seed=0, images=None):
        draw = torch.Generator().manual_seed(seed)
        images = images or self.batch
        return tuple(torch.randn(images, *shape, generator=draw, dtype=torch.float64) for shape in ((3, 64, 64), (2,)))

    def step(self, seed=0, images=None):
        result = self.engine.step(self.data(seed, images), **self.options)
        self.engine.update(self.optimizer)
        self.meter.advance()
        self.sizes.append(max(result.micro_batches))
        return list(result.events)

    def run(self, steps):
        return [self.step(index) for index in range(steps)]


def assert_same_weights(one, other):
    for name, value in one.model.state_dict().items():
        # A batch's gradient is scaled once, by a factor in single precision: 6e-8.
        torch.testing.assert_close(value, other.model.state_dict()[name], rtol=1e-5, atol=1e-8)
