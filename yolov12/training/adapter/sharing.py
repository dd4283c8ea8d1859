"""Sharing of one trainer's batches among several ranks."""

from __future__ import annotations

from typing import Any

from yolov12.mas import Engine
from yolov12.mas.config import GROUPS
from yolov12.mas.distributed.ranks import Ranks
from yolov12.mas.scheduling.time_model import NEW_SIZE_MS
from yolov12.training.data.resolution import ResolutionControl
from yolov12.training.data.sharing import Sharing

__all__ = ["share_batches"]


def share_batches(trainer: Any, ranks: Ranks, engine: Engine, resolution: ResolutionControl) -> Sharing:
    """Return a sharing with which all ranks draw the batches that one process would draw.

    Args:
        trainer: Trainer whose loader was made for whole batches; its sampler is changed for it.
        ranks: Processes that share each batch.
        engine: Engine that runs the batches.
        resolution: Chooses the images' size.
    """
    loader = trainer.train_loader
    loader.sampler.set_epoch = lambda epoch: None  # the loop calls it, but the generator decides the order
    group = engine.config.bn_group
    batch = min(trainer.batch_size, len(loader.dataset))
    if group is None:  # an upper bound that every final choice divides
        group = next(group for group in GROUPS if group * ranks.size <= batch)
    ahead = loader.num_workers * (loader.prefetch_factor or 0) + 1
    furthest_ahead = -ranks.least(-ahead)
    move_ms = 0.0 if engine.meter.kind == "host" else NEW_SIZE_MS  # the same on all ranks
    return Sharing(
        ranks.rank,
        ranks.size,
        batch,
        group or 1,
        furthest_ahead,
        move_ms,
        arranges=0 < group < batch,
        resolution_step=lambda: resolution.step,
    )
