"""The engine's own decision, on bytes that were traced instead of learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from yolov12.mas.profiling.ladder import Ladder
from yolov12.mas.profiling.profile import Time
from yolov12.mas.scheduling.candidates import beside_bytes
from yolov12.mas.scheduling.groups import decide_groups, largest_group, least_bytes
from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.scheduler import Decision, Group, State
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
        group = _group(cost, held, wish)
        decision, groups, used = _decide(cost, held, ladder, wish, group, total)
        sizes = _sizes(groups, decision)
        if cost.knows(decision.level, max(sizes)):
            break
        _, peak_bytes = micro_batch.trace(max(sizes), ladder.plans[decision.level])
        cost.learn(decision.level, max(sizes), peak_bytes)
    live_bytes = beside_bytes(held.live_bytes, held.gradients_bytes, alone=len(sizes) == 1)
    images = max(sizes)
    estimate = Estimate(images, ladder.plans[decision.level], live_bytes, cost.peak_bytes(decision.level, images))
    return Choice(estimate, sizes, used if group else images, decision.fits)


def _sizes(groups: tuple[int, ...], decision: Decision) -> tuple[int, ...]:
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
    room_bytes = wish.budget_bytes - beside_bytes(held.live_bytes, held.gradients_bytes)

    def fits(group: int) -> bool:
        features = Features(min(group, wish.batch), wish.imgsz, wish.imgsz, wish.boxes)
        return least_bytes(cost, features) <= room_bytes

    return largest_group(fits, micro_batch=wish.micro_batch)


def _decide(
    cost: _Known, held: Fixed, ladder: Ladder, wish: Wish, group: int, total: Time
) -> tuple[Decision, tuple[int, ...], int]:
    # The host launches as many operations for one image as for many.
    host_ms, megapixels = total.host_ms * IMAGES[0], wish.imgsz**2 / 1e6
    speed = SpeedModel(ladder.levels, (host_ms, total.device_ms / megapixels))

    def state(sizes: tuple[int, ...]) -> State:
        return State(
            groups=tuple(Group(images, wish.boxes) for images in sizes),
            height=wish.imgsz,
            width=wish.imgsz,
            budget_bytes=wish.budget_bytes,
            live_bytes=held.live_bytes,
            gradient_bytes=held.gradients_bytes,
            fixed=wish.micro_batch,
        )

    return decide_groups(wish.batch, group, state, cost, speed)
