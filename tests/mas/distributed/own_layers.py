"""One of two processes that train small models with layers of a user's own: `python own_layers.py FOLDER`.

It runs every case, also as one process would, and saves the outcomes in the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from yolov12.mas import Config, Engine, TensorTask
from yolov12.mas import engine as engine_module
from yolov12.mas.distributed.ranks import ALONE, ProcessRanks, Ranks, exchange_names
from yolov12.mas.distributed.watchdog import Watchdog, connect
from yolov12.mas.task import Share

CHECK_EVERY = 2
"""Number of updates after which ranks compare their weights here."""
IMAGES = torch.tensor([[1.0, 2, 3, 4], [2, 1, 1, 1], [-1, -2, -3, -4], [-2, -1, -1, -1]], dtype=torch.float64)
"""Images that the layers below treat differently: the first two are positive, the others are not."""


class Experts(nn.Module):
    """One of two branches, chosen by the images; a third is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative, self.unused = (
            nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.positive(x) if x.mean() > 0 else self.negative(x)


class Dropped(nn.Module):
    """A layer that is left out for some images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.mean() > 0 else x


class Watching(nn.Module):
    """Buffers of many kinds that keep what the layer sees, and some that do not change."""

    def __init__(self) -> None:
        super().__init__()
        for name, dtype in (("mean", torch.float64), ("wave", torch.complex64), ("count", torch.int16)):
            self.register_buffer(name, torch.zeros((), dtype=dtype))
        self.register_buffer("seen", torch.zeros(4, 2, dtype=torch.float64)[:, :1])  # a part of a larger tensor
        self.register_buffer("ones", torch.ones(1).expand(4))
        self.register_buffer("collected", torch.zeros(0, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean())
        self.wave.add_(x.detach().mean() * 1j)
        self.count.add_((x > 0).sum())
        self.seen.copy_(x.detach()[:1].T)
        self.collected = torch.cat((self.collected, x.detach()[x > 0]))
        return x


FIRST = {"experts": Experts, "dropped": Dropped, "watching": Watching}


def train(name: str, ranks: Ranks, images: slice, share: Share | None, steps: int = 1, updates: int = 0) -> nn.Module:
    """Run a batch several times, first with updates, and return the model: a layer of `FIRST` and a head."""
    torch.manual_seed(0)
    model = nn.Sequential(FIRST[name](), nn.Linear(4, 2)).double()
    task = TensorTask(lambda model, x, y: ((model(x) - y) ** 2).mean())
    engine = Engine(model, task, Config(bn_group=2, micro_batch=2), ranks=ranks, log=lambda line: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = IMAGES[images], torch.ones(4, 2, dtype=torch.float64)[images]
    with engine:
        for step in range(steps):
            engine.step(batch, share)
            if step < updates:
                engine.update(optimizer)
    return model


def instance_norm(ranks: Ranks) -> nn.Module:
    """Train a model with InstanceNorm, which has running statistics, on images that differ between ranks."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.BatchNorm2d(4), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(4 * 36, 2))
    task = TensorTask(lambda model, x, y: ((model(x) - y) ** 2).mean())
    engine = Engine(model, task, Config(bn_group=2, micro_batch=2), ranks=ranks, log=lambda line: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(ranks.rank)
    with engine:
        for _ in range(2 * CHECK_EVERY):
            engine.step((torch.randn(2, 3, 8, 8, generator=draw), torch.randn(2, 2, generator=draw)), Share(4))
            engine.update(optimizer)
    return model


def changed_here(ranks: Ranks, change: Callable[[nn.Module], Any], alike: bool) -> nn.Module:
    """Train a model that something changes on rank 1 only, on devices that are alike or not."""
    ranks.alike = alike
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    task = TensorTask(lambda model, x, y: ((model(x) - y) ** 2).mean())
    engine = Engine(model, task, Config(bn_group=2, micro_batch=2), ranks=ranks, log=lambda line: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    try:
        with engine, torch.no_grad():
            for update in range(CHECK_EVERY + 1):
                with torch.enable_grad():
                    engine.step((IMAGES[:2], torch.ones(2, 2, dtype=torch.float64)), Share(4))
                if not update and ranks.rank:
                    change(model)
                if update < CHECK_EVERY:
                    engine.update(optimizer)
    finally:
        ranks.alike = True
    return model


def outcome(run: Callable[[], nn.Module]) -> dict[str, Any]:
    """Return what a run leaves, or its error."""
    try:
        model = run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "parameters": {name: parameter.detach() for name, parameter in model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    engine_module._CHECK_EVERY = CHECK_EVERY
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    watchdog = Watchdog(connect(), rank, dist.get_world_size(), names=exchange_names(), dead_s=600)
    ranks = ProcessRanks(watchdog)
    mine = slice(2 * rank, 2 * rank + 2)
    padding = slice(2, 4) if rank else slice(2)
    some = {"steps": CHECK_EVERY + 1, "updates": CHECK_EVERY}
    until_check, checked = ({"steps": 2 * CHECK_EVERY, "updates": 2 * CHECK_EVERY - less} for less in (1, 0))
    cases: dict[str, Callable[[], nn.Module]] = {
        "experts in one process": lambda: train("experts", ALONE, slice(4), None),
        "dropped in one process": lambda: train("dropped", ALONE, slice(4), None),
        "experts, padding in one process": lambda: train("experts", ALONE, slice(2), None),
        "experts, updates in one process": lambda: train("experts", ALONE, slice(4), None, **some),
        "dropped, updates in one process": lambda: train("dropped", ALONE, slice(4), None, **some),
        "experts": lambda: train("experts", ranks, mine, Share(4)),
        "dropped": lambda: train("dropped", ranks, mine, Share(4)),
        "experts, padding": lambda: train("experts", ranks, padding, Share(2, is_padding=rank == 1)),
        "experts, updates": lambda: train("experts", ranks, mine, Share(4), **some),
        "dropped, updates": lambda: train("dropped", ranks, mine, Share(4), **some),
        "watching": lambda: train("watching", ranks, mine, Share(4), **until_check),
        "watching, checked": lambda: train("watching", ranks, mine, Share(4), **checked),
        "instance norm": lambda: instance_norm(ranks),
        "weight": lambda: changed_here(ranks, lambda model: model[0].weight.add_(1e-12), True),
        "running mean": lambda: changed_here(ranks, lambda model: model[1].running_mean.add_(1e-12), True),
        "weight, not alike": lambda: changed_here(ranks, lambda model: model[0].weight.add_(1e-12), False),
    }
    torch.save({name: outcome(run) for name, run in cases.items()}, folder / f"{rank}.pt")
    ranks.all(True)
    watchdog.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
