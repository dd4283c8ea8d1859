"""The engine's own decision, on bytes that were traced instead of learned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

from yolov12.mas.config import GROUPS
from yolov12.mas.profiling.ladder import Ladder
from yolov12.mas.profiling.profile import Time
from yolov12.mas.scheduling.groups import split_groups
from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.scheduler import Decision, Group, State, decide
from yolov12.mas.scheduling.time_model import SpeedModel
from yolov12.plan.estimate import Estimate, Fixed
from yolov12.plan.loss import Line
from yolov12.plan.micro_batch import IMAGES, MicroBatch

__all__ = ["Choice", "Wish", "choose"]

_MARGIN = 0.01  # the engine's, once it has seen a shape (peak_model.py)


@dataclass(frozen=True)
class Wish:
    """What is asked for."""

    batch: int
    imgsz: int
    boxes: int
    budget_bytes: int
    bn_group: int | None
    """None: the largest that fits, as the engine does; 0: that of the micro-batch."""
    micro_batch: int | None
    """None: as memory allows."""


@dataclass(frozen=True)
class Choice:
    """What the engine would do."""

    estimate: Estimate
    sizes: tuple[int, ...]
    """Images in each micro-batch."""
    bn_group: int
    fits: bool


def choose(micro_batch: MicroBatch, held: Fixed, ladder: Ladder, wish: Wish, total: Time) -> Choice:
    """Choose a micro-batch and a plan; the peak of what is chosen is traced.

    Args:
        micro_batch: Traces plans.
        held: What else is there.
        ladder: Of plans.
        wish: See there.
        total: Of an image, forward and backward, with everything kept.
    """
    cost = _Known(ladder, micro_batch.lines(ladder.plans[0]).peak)
    while True:
        decision, group = _decide(cost, held, ladder, wish, _group(cost, held, wish), total)
        sizes = _sizes(wish.batch, group, decision)
        if cost.knows(decision.level, max(sizes)):
            break
        _, peak_bytes = micro_batch.trace(max(sizes), ladder.plans[decision.level])
        cost.learn(decision.level, max(sizes), peak_bytes)
    live_bytes = held.live_bytes + (held.gradients_bytes if len(sizes) > 1 else 0)
    images = max(sizes)
    estimate = Estimate(images, ladder.plans[decision.level], live_bytes, cost.peak_bytes(decision.level, images))
    return Choice(estimate, sizes, group or images, decision.fits)


def _sizes(batch: int, group: int, decision: Decision) -> tuple[int, ...]:
    groups = split_groups(batch, group or 1)
    ends = accumulate(decision.micro_batches)
    return tuple(sum(groups[end - count : end]) for count, end in zip(decision.micro_batches, ends, strict=True))


class _Known(CostModel):
    """Says what was traced; until then, what follows from the line of keeping all and the shares of plans."""

    def __init__(self, ladder: Ladder, keep: Line) -> None:
        super().__init__(ladder.levels)
        self._keep = keep
        self._traced: dict[tuple[int, int], int] = {}
        self._factors = dict.fromkeys(range(len(ladder.levels)), 1.0)

    def knows(self, level: int, images: int) -> bool:
        """Whether this was traced."""
        return (level, images) in self._traced

    def learn(self, level: int, images: int, peak_bytes: int) -> None:
        """Take what was traced, which tells about the plan's other sizes too."""
        self._factors[level] *= peak_bytes / self.peak_bytes(level, images)
        self._traced[level, images] = peak_bytes

    def peak_bytes(self, level: int, images: int) -> int:
        """Of a micro-batch, above what is live before it."""
        line = Line(self._keep.fixed_bytes, self._keep.bytes_per_image * self.levels[level].share)
        return self._traced.get((level, images)) or round(line(images) * self._factors[level])

    @property
    def largest(self) -> int:
        """See `CostModel`: no prediction is far out."""
        return 2**31

    def predict(self, features: Features) -> int:
        """See `CostModel`."""
        return self.peak_bytes(features.level, features.images)

    def upper(self, features: Features) -> tuple[int, int]:
        """See `CostModel`."""
        bytes_ = self.predict(features)
        return bytes_, math.ceil(bytes_ * (1 + _MARGIN))


def _group(cost: _Known, held: Fixed, wish: Wish) -> int:
    if wish.bn_group is not None:
        return wish.bn_group
    live_bytes = held.live_bytes + held.gradients_bytes

    def holds(group: int) -> bool:
        images = min(group, wish.batch)
        if group > (wish.micro_batch or group):
            return False
        levels = range(len(cost.levels))
        uppers = [cost.upper(Features(images, wish.imgsz, wish.imgsz, wish.boxes, level))[1] for level in levels]
        return live_bytes + min(uppers) <= wish.budget_bytes

    return next((group for group in GROUPS if holds(group)), 1)


def _decide(cost: _Known, held: Fixed, ladder: Ladder, wish: Wish, group: int, total: Time) -> tuple[Decision, int]:
    """As the engine's planner: where not even one group fits, in smaller groups."""
    # The host launches as many operations for one image as for many.
    host_ms, megapixels = total.host_ms * IMAGES[0], wish.imgsz**2 / 1e6
    speed = SpeedModel(ladder.levels, (host_ms, total.device_ms / megapixels))
    state = State(
        groups=(),
        height=wish.imgsz,
        width=wish.imgsz,
        budget_bytes=wish.budget_bytes,
        live_bytes=held.live_bytes,
        gradient_bytes=held.gradients_bytes,
        fixed=wish.micro_batch,
    )
    while True:
        sizes = split_groups(wish.batch, group or 1)
        groups = tuple(Group(images, wish.boxes) for images in sizes)
        decision = decide(replace(state, groups=groups), cost, speed)
        if decision.fits or max(sizes) == 1:
            return decision, group
        group = max(sizes) // 2
