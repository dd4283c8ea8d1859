"""Makes the engine's decision before a training, with traced memory in place of measured memory."""

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
from yolov12.plan.estimate import Estimate, FixedMemory
from yolov12.plan.loss_bytes import LinearBytes
from yolov12.plan.micro_batch import IMAGES, MicroBatchTracer

__all__ = ["Choice", "Requirements", "choose"]

_MARGIN = 0.01  # the engine's margin for a shape that it has observed (peak_model.py)


@dataclass(frozen=True)
class Requirements:
    """Size of a training and the memory for it."""

    batch: int
    """Images in a batch."""
    imgsz: int
    """Height and width of the images in pixels."""
    boxes: int
    """Boxes of the fullest image."""
    budget_bytes: int
    """Bytes that the training may allocate."""
    bn_group: int | None
    """Size of a BatchNorm group. None means: the largest that fits, as in the engine; 0 means: the micro-batch."""
    micro_batch: int | None
    """Images in a micro-batch. None means: as many as fit."""


@dataclass(frozen=True)
class Choice:
    """Decision of the engine for a training."""

    estimate: Estimate
    sizes: tuple[int, ...]
    """Images in each micro-batch of a batch."""
    bn_group: int
    """Images in a BatchNorm group."""
    fits: bool
    """True if peak and margin are within the budget."""


def choose(tracer: MicroBatchTracer, fixed: FixedMemory, ladder: Ladder, wanted: Requirements, total: Time) -> Choice:
    """Choose micro-batches and a checkpoint plan. The peak of the chosen combination is traced, not interpolated.

    Args:
        tracer: Traces the memory of micro-batches.
        fixed: Memory that does not depend on the micro-batch.
        ladder: The checkpoint plans.
        wanted: Size of the training and its memory.
        total: Time of forward and backward pass of one image without checkpointing.

    Returns:
        The decision.
    """
    cost = _TracedCostModel(ladder, tracer.linear_bytes(ladder.plans[0]).peak)
    while True:
        group = _group(cost, fixed, wanted)
        decision, groups, used = _decide(cost, fixed, ladder, wanted, group, total)
        sizes = _sizes(groups, decision)
        if cost.knows(decision.level, max(sizes)):
            break
        _, peak_bytes = tracer.trace(max(sizes), ladder.plans[decision.level])
        cost.learn(decision.level, max(sizes), peak_bytes)
    allocated_bytes = beside_bytes(fixed.allocated_bytes, fixed.gradients_bytes, alone=len(sizes) == 1)
    images = max(sizes)
    estimate = Estimate(images, ladder.plans[decision.level], allocated_bytes, cost.peak_bytes(decision.level, images))
    return Choice(estimate, sizes, used if group else images, decision.fits)


def _sizes(groups: tuple[int, ...], decision: Decision) -> tuple[int, ...]:
    ends = accumulate(decision.micro_batches)
    return tuple(sum(groups[end - count : end]) for count, end in zip(decision.micro_batches, ends, strict=True))


class _TracedCostModel(CostModel):
    """Predicts traced peaks exactly, and other peaks from the trace without checkpointing.

    A peak that was not traced is the linear function without checkpointing, scaled by the activation bytes of the plan
    and by a factor from the traces of the same plan.
    """

    def __init__(self, ladder: Ladder, keep: LinearBytes) -> None:
        super().__init__(ladder.levels)
        self._keep = keep
        self._traced: dict[tuple[int, int], int] = {}
        self._factors = dict.fromkeys(range(len(ladder.levels)), 1.0)

    def knows(self, level: int, images: int) -> bool:
        """Return True if this combination was traced."""
        return (level, images) in self._traced

    def learn(self, level: int, images: int, peak_bytes: int) -> None:
        """Store a traced peak. It also corrects the other sizes of the same plan."""
        self._factors[level] *= peak_bytes / self.peak_bytes(level, images)
        self._traced[level, images] = peak_bytes

    def peak_bytes(self, level: int, images: int) -> int:
        """Return the peak of a micro-batch, without the memory allocated before it."""
        line = LinearBytes(self._keep.fixed_bytes, self._keep.bytes_per_image * self.levels[level].fraction)
        return self._traced.get((level, images)) or round(line(images) * self._factors[level])

    @property
    def largest(self) -> int:
        """Largest observed number of images (see `CostModel`). Without limit, because any number can be traced."""
        return 2**31

    def predict(self, features: Features) -> int:
        """Return the predicted peak in bytes (see `CostModel`)."""
        return self.peak_bytes(features.level, features.images)

    def upper(self, features: Features) -> tuple[int, int]:
        """Return the predicted peak without and with the margin, in bytes (see `CostModel`)."""
        expected_bytes = self.predict(features)
        return expected_bytes, math.ceil(expected_bytes * (1 + _MARGIN))


def _group(cost: _TracedCostModel, fixed: FixedMemory, wanted: Requirements) -> int:
    if wanted.bn_group is not None:
        return wanted.bn_group
    room_bytes = wanted.budget_bytes - beside_bytes(fixed.allocated_bytes, fixed.gradients_bytes)

    def fits(group: int) -> bool:
        features = Features(min(group, wanted.batch), wanted.imgsz, wanted.imgsz, wanted.boxes)
        return least_bytes(cost, features) <= room_bytes

    return largest_group(fits, micro_batch=wanted.micro_batch)


def _decide(
    cost: _TracedCostModel, fixed: FixedMemory, ladder: Ladder, wanted: Requirements, group: int, total: Time
) -> tuple[Decision, tuple[int, ...], int]:
    # The number of operations that the host launches does not depend on the number of images.
    host_ms, megapixels = total.host_ms * IMAGES[1], wanted.imgsz**2 / 1e6
    speed = SpeedModel(ladder.levels, (host_ms, total.device_ms / megapixels))

    def state(sizes: tuple[int, ...]) -> State:
        return State(
            groups=tuple(Group(images, wanted.boxes) for images in sizes),
            height=wanted.imgsz,
            width=wanted.imgsz,
            budget_bytes=wanted.budget_bytes,
            allocated_bytes=fixed.allocated_bytes,
            gradient_bytes=fixed.gradients_bytes,
            fixed=wanted.micro_batch,
        )

    return decide_groups(wanted.batch, group, state, cost, speed)
